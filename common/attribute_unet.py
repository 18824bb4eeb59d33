"""LesionDiffusion's two networks, one U-Net: it attends to attributes, a text for each (Tian et al., arXiv 2503.00741).

MONAI's U-Net is theirs key by key after three changes: norms of 32 groups, or one for each channel where 32 do not
divide them; a plain GELU in the transformers; one projection of the tokens before all attention. The published network
has no token for "nothing said": `null_token` adds one, so that classifier-free guidance has something to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import MLPBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetTransformerBlock
from torch import Tensor, nn

from .report_unet import Summary
from .unet import DiffusionUNet


class AttributeUNet(DiffusionUNet):
    """`DiffusionUNet` whose context is a list of encoded attributes, rows of zeros where there are none.

    Published: LMNet has ``channels`` (16, 32, 64), ``num_res_blocks`` 1, LINet (128, 256, 512) and 2, both attention at
    the deepest level, ``cross_attention_dim`` 512, ``num_head_channels`` 32.

    Args:
        spatial_dims: number of spatial axes.
        in_channels: channels of what is diffused, then those of the condition.
        out_channels: channels of the prediction.
        channels: of each level.
        cross_attention_dim: width of an encoded attribute, D.
        null_token: put a learned token where nothing is said; without it a row of zeros is attended to as such.
        summary_width: hidden width of a `Summary` of the tokens that joins the embedding of time, and so is heard from
            the first step on; attention, which begins at zero, takes thousands. Rows that say nothing do not count.
            0 for none.
        norm_num_groups: of all norms. None as published, 32 or one for each channel: a norm of single channels takes
            away what the embedding of time added to them, so that layers of up to 32 channels hear neither time nor
            summary. A network that is narrow throughout needs fewer groups.
        kwargs: of `DiffusionUNet`; attention is fused unless told otherwise.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        cross_attention_dim: int,
        null_token: bool = False,
        summary_width: int = 0,
        norm_num_groups: int | None = None,
        **kwargs: Any,
    ) -> None:
        defaults = {"norm_eps": 1e-5, "transformer_norm_eps": 1e-6, "use_flash_attention": True}
        # MONAI wants groups that divide every level; the published ones are set below.
        fixed = {"with_conditioning": True, "norm_num_groups": norm_num_groups or math.gcd(*channels)}
        super().__init__(
            spatial_dims, in_channels, out_channels, channels=channels, cross_attention_dim=cross_attention_dim,
            **{**defaults, **kwargs, **fixed},
        )  # fmt: skip
        self.context_width = cross_attention_dim
        self.context_projection = nn.Linear(cross_attention_dim, cross_attention_dim, bias=False)
        self.nothing = nn.Parameter(torch.randn(1, 1, cross_attention_dim)) if null_token else None
        self.summary = Summary(cross_attention_dim, summary_width, 4 * channels[0]) if summary_width else None
        as_wide = True
        for module in self.modules():
            if isinstance(module, nn.GroupNorm) and norm_num_groups is None:
                module.num_groups = 32 if module.num_channels % 32 == 0 else module.num_channels
            elif isinstance(module, DiffusionUNetTransformerBlock):
                width = module.norm1.normalized_shape[0]
                module.ff = MLPBlock(width, 4 * width, act="GELU")
                as_wide &= width == cross_attention_dim
        self.attends_to_itself = as_wide and not null_token and not summary_width

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict from the noisy image.

        Args:
            x: noisy image, then the concatenated condition (B, in_channels, *S).
            timesteps: times (B,); zero when left out.
            context: encoded attributes (B, L, D). None says nothing: it is a row of zeros, but in a network as
                published whose tokens are as wide as its transformers, there the second attention becomes attention to
                itself, through the same weights. That is how the authors switch the text off.
            kwargs: of `DiffusionUNet.forward`.
        """
        if context is None and not self.attends_to_itself:
            context = x.new_zeros(x.shape[0], 1, self.context_width)
        return super().forward(x, timesteps, context, **kwargs)

    def tokens(self, context: Tensor | None) -> Tensor | None:
        """Projected tokens; the learned one where nothing is said."""
        if context is None:
            return None
        if context.shape[-1] != self.context_width:
            got = f"attributes of width {context.shape[-1]}, the network reads {self.context_width}"
            raise ValueError(f"{got}: set cross_attention_dim to the text encoder's, or take the encoder it knows")
        if self.nothing is not None:
            said = context.abs().amax(dim=-1, keepdim=True) > 0
            context = torch.where(said, context, self.nothing)
        return self.context_projection(context)

    def inform(self, emb: Tensor, context: Tensor | None) -> Tensor:
        """Add the summary of the attributes to the embedding of time, whatever the number of empty rows."""
        if self.summary is None or context is None:
            return emb
        silence = self.tokens(context.new_zeros(1, 1, self.context_width))
        heard = self.summary.each(context) - self.summary.each(silence)
        return emb + self.summary.all(heard.sum(dim=1))
