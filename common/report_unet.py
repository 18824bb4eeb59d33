"""GuideGen's first network: a U-Net over label volumes that attends to the tokens of a report.

Tokens pass an adapter, a few transformer blocks beside a residual path (40,946,688 parameters at the published width
768). Where a report says nothing stands a learned token, so that "nothing said" is a condition like any other, which
classifier-free guidance compares with. The published code builds the adapter and never reads it: its sampler is
unconditional, and such weights fit ``with_conditioning=False``.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionUNetTransformerBlock
from torch import Tensor, nn

from .unet import DiffusionUNet


class TextAdapter(nn.Module):
    """Fits a frozen encoder's tokens to the task: tokens plus what some transformer blocks make of them.

    Args:
        width: of the tokens, D.
        depth: blocks of twice self-attention and a gated feed-forward.
        num_heads: heads of the attention.
        num_head_channels: width of a head.
        dropout: behind attention and feed-forward, in training. With fused attention MONAI drops in evaluation as well,
            so a block that drops attends in the plain way.
    """

    def __init__(
        self, width: int, depth: int = 4, num_heads: int = 8, num_head_channels: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            DiffusionUNetTransformerBlock(
                num_channels=width, num_attention_heads=num_heads, num_head_channels=num_head_channels, dropout=dropout,
                cross_attention_dim=width, use_flash_attention=not dropout,
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Adapt tokens (B, L, D)."""
        adapted = tokens
        for block in self.blocks:
            adapted = block(adapted)
        return tokens + adapted if len(self.blocks) else tokens


class Summary(nn.Module):
    """One vector of a set of tokens, whatever their order (Deep Sets, Zaheer et al. 2017, 1703.06114).

    Each token is read by itself before all are summed, so that what belongs together stays so: "spleen, enlarged;
    liver, small" is not "spleen, small; liver, enlarged".

    Args:
        width: of the tokens, D.
        hidden: of the layers.
        outputs: of the vector.
    """

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.all = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs))

    def forward(self, tokens: Tensor) -> Tensor:
        """Summarise tokens (B, L, D) -> (B, outputs)."""
        return self.all(self.each(tokens).sum(dim=1))


class ReportUNet(DiffusionUNet):
    """`DiffusionUNet` whose context is a report's tokens, rows of zeros where there is none.

    Args:
        spatial_dims: number of spatial axes.
        in_channels: planes of the label map, K, and `blank_channels`.
        out_channels: K.
        blank_channels: further channels that are always 0, which the published network has left of its ancestor, where
            an image entered by them.
        adapter_depth: blocks of the `TextAdapter`.
        adapter_heads: its heads.
        adapter_head_channels: their width.
        adapter_dropout: its dropout.
        summary_width: hidden width of a `Summary` of the tokens that joins the embedding of time, and so reaches every
            block from the first step on; attention, which begins at zero, takes thousands to be heard. 0 for none.
        kwargs: of `DiffusionUNet`; with ``with_conditioning=False`` there is neither adapter nor text.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        blank_channels: int = 0,
        adapter_depth: int = 4,
        adapter_heads: int = 8,
        adapter_head_channels: int = 64,
        adapter_dropout: float = 0.0,
        summary_width: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, **kwargs)
        self.blank_channels = blank_channels
        self.adapter: TextAdapter | None = None
        self.summary: Summary | None = None
        if self.with_conditioning:
            width = self.cross_attention_dim or 0
            self.adapter = TextAdapter(width, adapter_depth, adapter_heads, adapter_head_channels, adapter_dropout)
            self.nothing = nn.Parameter(torch.randn(1, 1, width))
            if summary_width:
                self.summary = Summary(width, summary_width, 4 * self.block_out_channels[0])

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict logits (B, K, *S) from planes (B, K, *S), or, as MONAI's checks call it, from all channels.

        Args:
            x: planes of the noisy label map.
            timesteps: times (B,).
            context: tokens (B, L, D); None is "nothing said".
            kwargs: of `DiffusionUNet.forward`.
        """
        missing = self.in_channels - x.shape[1]
        if 0 < missing <= self.blank_channels:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
        if self.adapter is not None and context is None:
            context = self.nothing.new_zeros(x.shape[0], 1, self.nothing.shape[-1])
        return super().forward(x, timesteps, context if self.adapter is not None else None, **kwargs)

    def inform(self, emb: Tensor, context: Tensor | None) -> Tensor:
        """Add the summary of the report to the embedding of time."""
        return emb if self.summary is None or context is None else emb + self.summary(context)

    def tokens(self, context: Tensor | None) -> Tensor | None:
        """Adapted tokens; the learned one where nothing is said."""
        if self.adapter is None or context is None:
            return None
        if context.shape[-1] != self.nothing.shape[-1]:
            got = f"tokens of width {context.shape[-1]}, the network reads {self.nothing.shape[-1]}"
            raise ValueError(f"{got}: set cross_attention_dim to the text encoder's, or take the encoder it knows")
        said = context.abs().amax(dim=-1, keepdim=True) > 0
        return torch.where(said, self.adapter(context), self.nothing)
