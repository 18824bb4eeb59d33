"""CMDM's network: the shared U-Net whose blocks are gated by the asked size and location of a lesion.

Heo & Jung 2025 (https://doi.org/10.1016/j.compbiomed.2025.110807). In every gated block the first convolution's output
h becomes ``h * g_size * g_loc + W SiLU(emb)``, with ``g_size = SiLU(A size + a)`` and ``g_loc = SiLU(B (x, y) + b)``:
the paper's "regressor". Gated are the down-sampling blocks, the middle and the whole up path.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import nn

from .common.unet import DiffusionUNet

ONE = 1.2784645  # SiLU(ONE) = 1


class TimedBlock(DiffusionUNetResnetBlock):
    """MONAI's block, given the time embedding with the statistics behind it: it reads the time alone."""

    @classmethod
    def like(cls, block: DiffusionUNetResnetBlock, **kwargs: Any) -> TimedBlock:
        """A block of this class with another one's settings."""
        return cls(
            block.spatial_dims,
            block.channels,
            block.emb_channels,
            block.out_channels,
            block.up,
            block.down,
            block.norm1.num_groups,
            block.norm1.eps,
            **kwargs,
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Transform ``x`` (B, C, *S) at the time and statistics ``emb`` (B, emb_channels + 3 K)."""
        return super().forward(x, emb[:, : self.emb_channels])


class GatedBlock(TimedBlock):
    """The block with two gates per channel, one driven by the K sizes, one by the K locations.

    Args:
        num_classes: K, components described at once.
        kwargs: arguments of MONAI's block.
    """

    def __init__(self, *args: Any, num_classes: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes
        self.size_gate = nn.Linear(num_classes, self.out_channels)
        self.location_gate = nn.Linear(2 * num_classes, self.out_channels)
        self.open_gates()

    def open_gates(self) -> None:
        """Begin with gates that differ and are open: each is 1 at a statistic of its own, and bends steeply around it.

        As torch initialises them, two thirds of the channels start below 0.05, and all bend outside the image.
        """
        for gate, slope, highest in ((self.size_gate, 18.0, 0.3), (self.location_gate, 6.0, 1.0)):
            nn.init.normal_(gate.weight, std=slope)
            centre = torch.rand_like(gate.weight) * highest
            gate.bias.data.copy_(ONE - (gate.weight * centre).sum(dim=1))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Transform ``x`` (B, C, *S) at the time and statistics ``emb`` (B, emb_channels + 3 K)."""
        emb, size, location = emb.split([self.emb_channels, self.num_classes, 2 * self.num_classes], dim=1)
        act, axes = self.nonlinearity, (..., *[None] * self.spatial_dims)
        h = act(self.norm1(x))
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        gate = act(self.size_gate(size)) * act(self.location_gate(location))
        h = self.conv1(h) * gate[axes] + self.time_emb_proj(act(emb))[axes]
        out: torch.Tensor = self.skip_connection(x) + self.conv2(act(self.norm2(h)))
        return out


class GatedUNet(DiffusionUNet):
    """`DiffusionUNet` whose ``context`` (B, 3 K) says what it is to draw: K sizes, then K pairs (x, y).

    All are fractions of the image: area, column, row. State-dict keys are MONAI's, and ``size_gate`` and
    ``location_gate`` in the gated blocks.

    Args:
        num_classes: K, image channels, each a mask of one class.
        time_scale: the embedding reads ``time_scale * timesteps``.
        null: value of a statistic that is not given.
        kwargs: arguments of `DiffusionUNet`, without its channels in and out.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        num_classes: int = 1,
        time_scale: float = 1.0,
        null: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, num_classes, num_classes, resblock_updown=True, **kwargs)
        self.time_scale = time_scale
        self.null = null
        self.num_statistics = 3 * num_classes
        blocks = {n: m for n, m in self.named_modules() if isinstance(m, DiffusionUNetResnetBlock)}
        for name, block in blocks.items():
            plain = name.startswith("down_blocks.") and ".resnets." in name
            new = TimedBlock.like(block) if plain else GatedBlock.like(block, num_classes=num_classes)
            self.set_submodule(name, new)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from noisy masks.

        Args:
            x: noisy masks (B, K, *S).
            timesteps: times (B,); zero when left out.
            context: statistics (B, 3 K); all ``null`` when left out.

        Returns:
            prediction (B, K, *S).
        """
        if timesteps is not None:
            timesteps = timesteps * self.time_scale
        emb = self.embed(x, timesteps)
        if context is None:
            context = x.new_full((x.shape[0], self.num_statistics), self.null)
        emb = torch.cat([emb, context.to(emb)], dim=1)
        h, skips = self.encode(x, emb)
        return self.decode(h, skips, emb)
