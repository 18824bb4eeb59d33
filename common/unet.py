"""One diffusion U-Net for all five bundles: MONAI's, plus the references' settings that MONAI has no argument for.

All five papers descend from the guided-diffusion U-Net (Dhariwal & Nichol 2021). MONAI's ``DiffusionModelUNet`` holds
their weights key by key; only the forward differs in the embedding period and the up-sampling, and training from
scratch in the zero initialisation of the attention projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.blocks import SpatialAttentionBlock, Upsample
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import SpatialTransformer
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import nn
from torch.func import functional_call


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding, cosine half first, as in the references.

    Args:
        timesteps: times, integer or fractional (B,).
        dim: embedding width; an odd one is padded by a zero.
        max_period: longest wavelength (MONAI fixes 10000; Lung-DDPM uses 1000).

    Returns:
        float32 embedding (B, dim).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device).float() / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def constant(module: nn.Module) -> Callable[..., Any]:
    """The module with its weights held constant: gradients pass through it, none reaches its weights; no copies."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda *args, **kwargs: functional_call(module, weights, args, kwargs)


def set_transformer_norm_eps(network: nn.Module, eps: float | None) -> None:
    """Set the epsilon of the norms before transformers, where it differs from ``norm_eps``; None leaves them."""
    for module in network.modules():
        if isinstance(module, SpatialTransformer) and eps is not None:
            module.norm.eps = eps


class DiffusionEncoder:
    """Time embedding, down path and middle in MONAI's names: what U-Net and ControlNet have in common."""

    max_period: float
    block_out_channels: Any
    num_class_embeds: Any
    with_conditioning: bool
    time_embed: Any
    class_embedding: Any
    conv_in: Any
    down_blocks: Any
    middle_block: Any

    def embed(
        self, x: torch.Tensor, timesteps: torch.Tensor | None, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed time (and class) -> (B, 4 * channels[0])."""
        if timesteps is None:
            timesteps = torch.zeros(x.shape[0], device=x.device)
        emb = timestep_embedding(timesteps.expand(x.shape[0]), self.block_out_channels[0], self.max_period)
        emb = self.time_embed(emb.to(x.dtype))
        if self.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("class_labels are needed: the network was built with num_class_embeds")
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        return emb

    def encode(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None = None,
        hint: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the down path and the middle -> bottleneck, skips from fine to coarse.

        A ControlNet's encoded ``hint`` (B, channels[0], *S) is added once, behind the first convolution.
        """
        if context is not None and not self.with_conditioning:
            raise ValueError("context came, but the network has no cross-attention: set with_conditioning")
        h = self.conv_in(x) if hint is None else self.conv_in(x) + hint
        skips = [h]
        for block in self.down_blocks:
            h, residuals = block(hidden_states=h, temb=emb, context=context)
            skips += residuals
        return self.middle_block(hidden_states=h, temb=emb, context=context), skips


class DiffusionUNet(DiffusionEncoder, DiffusionModelUNet):
    """``DiffusionModelUNet`` with default timesteps, the references' settings and encode/decode halves.

    State-dict keys are MONAI's. ``timesteps`` may be left out, so that MONAI's shape check and exporters, which call a
    network with one tensor, work unchanged.

    Args:
        max_period: longest wavelength of the time embedding.
        upsample_mode: ``"nearest"`` (MONAI) or ``"linear"`` (bi-/trilinear, ``align_corners=False``).
        zero_init_attention: start every self-attention block as the identity, as the references do (MONAI already
            does so with the transformers of cross-attention).
        transformer_norm_eps: epsilon of the norms before transformers (Stable Diffusion: 1e-6, with ``norm_eps`` 1e-5
            elsewhere); None takes ``norm_eps``.
        num_words: size of a learned table of tokens; a ``context`` of whole numbers (B, L) is looked up in it. It needs
            ``cross_attention_dim``, the tokens' width.
        patch_size: voxels on a side that are folded into channels at the door and unfolded at the end: a fine grid at
            the cost of a coarse one, for what varies little within a patch, as labels do.
        kwargs: arguments of ``DiffusionModelUNet``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        max_period: float = 10000.0,
        upsample_mode: str = "nearest",
        zero_init_attention: bool = True,
        transformer_norm_eps: float | None = None,
        num_words: int | None = None,
        patch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        folded = patch_size**spatial_dims
        super().__init__(spatial_dims, folded * in_channels, folded * out_channels, **kwargs)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size = patch_size
        set_transformer_norm_eps(self, transformer_norm_eps)
        self.spatial_dims = spatial_dims
        self.cross_attention_dim: int | None = kwargs.get("cross_attention_dim")
        if num_words is not None and self.cross_attention_dim is None:
            raise ValueError(f"num_words {num_words} needs cross-attention: set with_conditioning, cross_attention_dim")
        self.words = None if num_words is None else nn.Embedding(num_words, self.cross_attention_dim or 0)
        self.max_period = max_period
        if upsample_mode not in ("nearest", "linear"):
            raise ValueError(f"upsample_mode must be 'nearest' or 'linear', got {upsample_mode!r}")
        for module in self.modules():
            if isinstance(module, Upsample) and upsample_mode == "linear":
                interpolate: Any = module.upsample_non_trainable
                interpolate.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[spatial_dims]
                interpolate.align_corners = False
            if zero_init_attention and isinstance(module, SpatialAttentionBlock):
                for parameter in module.attn.out_proj.parameters():
                    nn.init.zeros_(parameter)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from the noisy image.

        Args:
            x: noisy image, then the concatenated condition (B, in_channels, *S).
            timesteps: times (B,); zero when left out.
            context: tokens for cross-attention (B, L, D), or numbers of words (B, L).
            class_labels: class indices (B,).
            down_block_additional_residuals: a ControlNet's, one for each skip.
            mid_block_additional_residual: a ControlNet's, for the middle.

        Returns:
            prediction (B, out_channels, *S).
        """
        context = self.tokens(context)
        if self.patch_size > 1:
            x = pixelunshuffle(x, self.spatial_dims, self.patch_size)
        emb = self.inform(self.embed(x, timesteps, class_labels), context)
        h, skips = self.encode(x, emb, context)
        if down_block_additional_residuals is not None:
            skips = [s + r for s, r in zip(skips, down_block_additional_residuals, strict=True)]
        if mid_block_additional_residual is not None:
            h = h + mid_block_additional_residual
        pred = self.decode(h, skips, emb, context)
        return pred if self.patch_size == 1 else pixelshuffle(pred, self.spatial_dims, self.patch_size)

    def tokens(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """Tokens of a context: those of the words it names, or the context itself."""
        if context is None or context.is_floating_point():
            return context
        if self.words is None:
            raise ValueError("context holds numbers of words, the network no table of them: set num_words")
        return self.words(context)

    def inform(self, emb: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Hook: what else the embedding of time (B, 4 * channels[0]) is to carry, e.g. a summary of the tokens."""
        return emb

    def decode(
        self,
        h: torch.Tensor,
        skips: Sequence[torch.Tensor],
        emb: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Run the up path -> prediction (B, out_channels, *S); `frozen` holds its weights `constant`."""
        skips = list(skips)
        block: Any
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, used = skips[:-count], skips[-count:]
            run = constant(block) if frozen else block
            h = run(hidden_states=h, res_hidden_states_list=used, temb=emb, context=context)
        return constant(self.out)(h) if frozen else self.out(h)
