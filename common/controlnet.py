"""ControlNet: a copy of the U-Net's encoder that reads a picture, the hint, and adds to the U-Net's skips.

Zhang et al. 2023 (https://arxiv.org/abs/2302.05543), with the Dense Hint Input of Siamese-Diffusion (Qiu et al. 2025,
https://arxiv.org/abs/2505.06068) in place of its shallow stem, so that it reads texture as well as masks. The hint is
encoded apart from the rest: in sampling once for an image, not once for a step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.nets import ControlNet
from monai.networks.nets.swin_unetr import PatchMergingV2
from torch import Tensor, nn

from .checkpoints import fill, read_weights
from .unet import DiffusionEncoder, DiffusionUNet, set_transformer_norm_eps

Control = tuple[list[Tensor], Tensor]
Encoded = tuple[Tensor, list[Tensor], Tensor]

# What a ControlNet has and the U-Net it copies has not.
OWN = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")


def check_sides(shape: torch.Size, halvings: int, what: str) -> None:
    """Refuse spatial sides that cannot be halved evenly that often."""
    factor = 2**halvings
    if any(side % factor for side in shape[2:]):
        raise ValueError(
            f"{what} has sides {tuple(shape[2:])}, expected multiples of {factor}: it is halved {halvings} times, so "
            "resize it, or take fewer levels"
        )


class DenseHintInput(nn.Module):
    """DHI stem: convolutions and residual units whose patch merging keeps every pixel of the hint.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the hint.
        out_channels: ``channels[0]`` of the ControlNet.
        num_merges: log2 of the latent's down-sampling: 3 for Stable Diffusion, 0 for diffusion on pixels.
        width: channels of the first stage; the second has twice as many, and every merge doubles them again.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, num_merges: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        self.num_merges = num_merges
        widths = [width * 2**k for k in range(num_merges + 2)]

        def conv(inputs: int, outputs: int) -> nn.Module:
            return Convolution(spatial_dims, inputs, outputs, kernel_size=3, padding=1, conv_only=True)

        def unit(channels: int) -> nn.Module:
            return ResidualUnit(
                spatial_dims, channels, channels, adn_ordering="A", act="SWISH", norm=None, last_conv_only=True
            )

        def merge(channels: int) -> nn.Module:
            block = PatchMergingV2(channels, spatial_dims=spatial_dims)
            block.reduction = nn.Linear(2**spatial_dims * channels, 2 * channels)  # MONAI's has no bias
            return block

        # A merge already widens: the convolution behind it keeps the width.
        self.convs = nn.ModuleList(
            [conv(in_channels, width), conv(width, 2 * width), *(conv(w, w) for w in widths[2:])]
        )
        self.units = nn.ModuleList([unit(w) for w in widths])
        self.merges = nn.ModuleList([merge(w) for w in widths[1:-1]])
        self.conv_out = conv(widths[-1], out_channels)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hint: Tensor) -> Tensor:
        """Encode the hint (B, in_channels, *S) -> (B, out_channels, *S / 2^num_merges)."""
        check_sides(hint.shape, self.num_merges, "the hint")
        h = hint
        for k, (conv, unit) in enumerate(zip(self.convs, self.units, strict=True)):
            if k >= 2:
                h = self.merges[k - 2](h.movedim(1, -1)).movedim(-1, 1)
            h = nn.functional.silu(unit(conv(h)))
        return self.conv_out(h)


class HintControlNet(DiffusionEncoder, ControlNet):
    """MONAI's ``ControlNet`` with a stem of one's choice, default timesteps and a hint that may come encoded.

    State-dict keys are MONAI's; a stem lies under ``controlnet_cond_embedding``.

    Args:
        stem: encodes the hint, e.g. `DenseHintInput`; None takes MONAI's, which is ControlNet's original one.
        max_period: as in `DiffusionUNet`.
        transformer_norm_eps: as in `DiffusionUNet`.
        kwargs: further arguments of ``ControlNet``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        stem: nn.Module | None = None,
        max_period: float = 10000.0,
        transformer_norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, in_channels, **kwargs)
        set_transformer_norm_eps(self, transformer_norm_eps)
        self.max_period = max_period
        if stem is not None:
            self.controlnet_cond_embedding: Any = stem

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encode a hint (B, K, *S) -> (B, channels[0], *s), ready for every step."""
        return self.controlnet_cond_embedding(hint)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        controlnet_cond: Tensor | None = None,
        conditioning_scale: float = 1.0,
        context: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        encoded: Tensor | None = None,
    ) -> Control:
        """Compute what is added to the U-Net's skips and middle.

        Args:
            x: noisy image (B, in_channels, *s).
            timesteps: times (B,); zero when left out.
            controlnet_cond: hint (B, K, *S), or None.
            conditioning_scale: strength of the control.
            context: tokens for cross-attention (B, L, D).
            class_labels: class indices (B,).
            encoded: the hint from `encode_hint`, in place of ``controlnet_cond``.

        Returns:
            (residuals of the skips from fine to coarse, residual of the middle)
        """
        if encoded is None and controlnet_cond is not None:
            encoded = self.encode_hint(controlnet_cond)
        if encoded is not None and encoded.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the encoded hint has sides {tuple(encoded.shape[2:])}, the noisy image {tuple(x.shape[2:])}: the "
                "stem must halve the hint as often as the latent was halved (num_merges)"
            )
        h, skips = self.encode(x, self.embed(x, timesteps, class_labels), context, encoded)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        mid = self.controlnet_mid_block(h)
        if conditioning_scale == 1:
            return down, mid
        return [d * conditioning_scale for d in down], mid * conditioning_scale


def copied_encoder(controlnet: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a ControlNet whose encoder is the U-Net's ("add control"); stem and zero convolutions stay."""
    shared = [key for key in controlnet if not key.startswith(OWN)]
    foreign = [key for key in shared if key not in unet or unet[key].shape != controlnet[key].shape]
    if foreign:
        raise ValueError(
            f"{len(foreign)} weights of the ControlNet are not the U-Net's ({', '.join(foreign[:3])}): build both with "
            "the same channels, attention_levels, num_res_blocks, heads and context"
        )
    return {**controlnet, **{key: unet[key] for key in shared}}


class ControlledUNet(nn.Module):
    """A U-Net and its ControlNet as one network: one file of weights, one average, one forward.

    Args:
        unet: the U-Net.
        controlnet: a ControlNet of the same build.
        freeze_encoder: train the U-Net's decoder alone, and run its time embedding, encoder and middle without
            gradient (Siamese-Diffusion); False trains all of it.
    """

    def __init__(self, unet: DiffusionUNet, controlnet: HintControlNet, freeze_encoder: bool = True) -> None:
        super().__init__()
        copied_encoder(controlnet.state_dict(), unet.state_dict())  # they must match
        self.unet = unet
        self.controlnet = controlnet
        self.freeze_encoder = freeze_encoder
        self.in_channels, self.out_channels = unet.in_channels, unet.out_channels
        frozen = (unet.time_embed, unet.conv_in, unet.down_blocks, unet.middle_block, unet.words)
        for module in frozen if freeze_encoder else ():
            if module is not None:
                module.requires_grad_(False)

    def add_control(self) -> None:
        """Start the ControlNet as a copy of the U-Net's encoder, as the paper does."""
        state = copied_encoder(self.controlnet.state_dict(), self.unet.state_dict())
        self.controlnet.load_state_dict(state)

    def start(self, base: str | os.PathLike | bool | None) -> None:
        """Fill the network for a training's start.

        Args:
            base: weights of the U-Net, whose encoder the ControlNet copies; or of both (Stable Diffusion by way of
                tools/import_weights.py, an earlier training), which are taken as they are; None, or False on
                the command line, leaves the U-Net as it was drawn.
        """
        path = str(base) if base else None
        state = {} if path is None else read_weights(path)
        if any(key.startswith("controlnet.") for key in state):
            fill(self, state, path)
            return
        if path is not None:
            fill(self.unet, state, path)
        self.add_control()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        hint: Tensor | None = None,
        *,
        encoded: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Predict from the noisy image under the hint's control; without a hint, as the U-Net alone.

        Args:
            x: noisy image (B, in_channels, *s).
            timesteps: times (B,); zero when left out.
            context: tokens for cross-attention (B, L, D), or numbers of words (B, L); one zero token when left out.
            hint: picture (B, K, *S).
            encoded: the hint from `encode_hint`, in its place.
            scale: strength of the control.

        Returns:
            prediction (B, out_channels, *s).
        """
        context = self.tokens(x, context)
        features = self.encode(x, timesteps, context)
        if hint is None and encoded is None:
            return self.decode(features, None, context)
        control = self.controlnet(x, timesteps, hint, scale, context, encoded=encoded)
        return self.decode(features, control, context)

    def tokens(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The tokens given, or a zero token where the networks attend to tokens and none were given."""
        if context is None and self.unet.cross_attention_dim is not None:
            return x.new_zeros(x.shape[0], 1, self.unet.cross_attention_dim)
        return self.unet.tokens(context)

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encode a hint once for all steps."""
        return self.controlnet.encode_hint(hint)

    def encode(self, x: Tensor, timesteps: Tensor | None, context: Tensor | None) -> Encoded:
        """Run the U-Net's encoder, without gradient if it is frozen -> (middle, skips, time embedding)."""
        check_sides(x.shape, len(self.unet.down_blocks) - 1, "the image or latent")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            emb = self.unet.embed(x, timesteps)
            h, skips = self.unet.encode(x, emb, context)
        return h, skips, emb

    def decode(self, encoded: Encoded, control: Control | None, context: Tensor | None, frozen: bool = False) -> Tensor:
        """Add the control and run the decoder, its weights held constant if `frozen`."""
        h, skips, emb = encoded
        if control is not None:
            down, mid = control
            h, skips = h + mid, [s + d for s, d in zip(skips, down, strict=True)]
        return self.unet.decode(h, skips, emb, context, frozen=frozen)
