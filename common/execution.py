"""Execution: how a network is run on the device it finds itself on, decided in one place and said in one line.

The fast path is bf16 autocast where the device computes bf16 natively, channels-last weights, PyTorch's fused attention
(``use_flash_attention`` in ``network_def``) and, on request, ``torch.compile``. Whatever surrounds the network (the
sampler's state, the loss) stays float32.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

logger = logging.getLogger(__name__)


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device computes bfloat16 in hardware, so that autocast gains and does not merely emulate."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


class FastPath(Inferer):
    """Runs another inferer on the fast path of the device its tensors live on; the result comes back in float32.

    Args:
        inferer: any inferer called as ``inferer(inputs, network, ...)``: MONAI's for training, ours for synthesis.
        precision: ``"auto"`` (bf16 where native), ``"bf16"`` or ``"float32"``.
        channels_last: keep convolution weights, and so activations, channels-last. A ``DistributedDataParallel``
            network keeps the layout it was wrapped with: changed later, gradients come out wrong (PyTorch only warns).
        compile: compile the network with ``torch.compile`` (slow first call; pays on long GPU runs).
    """

    def __init__(
        self, inferer: Inferer, precision: str = "auto", channels_last: bool = True, compile: bool = False
    ) -> None:
        super().__init__()
        if precision not in ("auto", "bf16", "float32"):
            raise ValueError(f"precision must be 'auto', 'bf16' or 'float32', got {precision!r}")
        self.inferer = inferer
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        # By the object, not its id: an id comes back when a network is gone.
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._described = False

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped inferer under autocast, on a network prepared once."""
        self.prepare(network, inputs)
        with self.autocast(inputs.device):
            pred = self.inferer(inputs, network, *args, **kwargs)
        return pred.float() if isinstance(pred, torch.Tensor) else pred

    def use_bf16(self, device: torch.device) -> bool:
        """Whether networks on this device run under bf16 autocast."""
        return self.precision == "bf16" or (self.precision == "auto" and native_bf16(device))

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast context of this path; it does nothing in float32."""
        if not self.use_bf16(device):
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def prepare(self, network: Any, inputs: torch.Tensor) -> None:
        """Lay out the weights, compile on request and say once which path is live."""
        if not isinstance(network, nn.Module) or network in self._prepared:
            return
        wrapped = isinstance(network, nn.parallel.DistributedDataParallel)
        # A network of slices may be called with volumes, one of volumes with tokens.
        dims = getattr(network, "spatial_dims", inputs.ndim - 2)
        if self.channels_last and dims in (2, 3) and not wrapped:
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
            network.to(memory_format=layout)  # type: ignore[call-overload]
        if self.compile:
            network.compile()
        if not self._described:
            logger.info(self.describe(inputs.device))
            self._described = True
        self._prepared.add(network)

    def describe(self, device: torch.device) -> str:
        """One line that says which path is live."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        parts = [
            "bf16 autocast" if self.use_bf16(device) else "float32",
            "channels-last" if self.channels_last else "contiguous",
            "fused attention where the network asks for it",
            "compiled" if self.compile else "eager",
        ]
        return f"execution path on {name}: {', '.join(parts)}"
