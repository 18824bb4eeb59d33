"""The autoencoder of latent diffusion (Rombach et al. 2022), and the scaled latent space diffusion runs in.

MONAI's ``AutoencoderKL`` differs from Stable Diffusion's in three places: no activation before the last convolution
of either side, as many residual blocks in the decoder as in the encoder, and moments made of z instead of 2z channels.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import Decoder
from monai.transforms import Transform
from monai.utils import convert_to_tensor, ensure_tuple_rep
from torch import Tensor, nn

from .schedules import Noise, draw

logger = logging.getLogger(__name__)


class LDMAutoencoder(AutoencoderKL):
    """``AutoencoderKL`` as in latent diffusion: Stable Diffusion's weights fit exactly (`ldm_layout.AUTOENCODER`).

    Stable Diffusion 1.5: ``channels`` (128, 256, 512, 512), ``num_res_blocks`` 2, ``latent_channels`` 4.

    Args:
        spatial_dims: 2 or 3.
        channels: of each level; all but the last halve the sides.
        num_res_blocks: of each level of the encoder; the decoder has one more.
        attention_levels: where attention follows each residual block; the middle has one in any case.
        kwargs: further arguments of ``AutoencoderKL``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        channels: Sequence[int] = (128, 256, 512, 512),
        num_res_blocks: Sequence[int] | int = 2,
        attention_levels: Sequence[bool] | None = None,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        blocks = ensure_tuple_rep(num_res_blocks, len(channels))
        levels = [False] * len(channels) if attention_levels is None else list(attention_levels)
        common: dict[str, Any] = {
            "channels": channels, "attention_levels": levels, "norm_num_groups": norm_num_groups, "norm_eps": norm_eps,
        }  # fmt: skip
        super().__init__(
            spatial_dims, in_channels, out_channels, blocks, latent_channels=latent_channels, **common, **kwargs
        )
        self.levels = len(channels)

        # One residual block more on every level of the way up.
        own: dict[str, Any] = {
            k: v for k, v in kwargs.items() if k not in ("with_encoder_nonlocal_attn", "use_checkpoint")
        }
        own["with_nonlocal_attn"] = own.pop("with_decoder_nonlocal_attn", True)
        self.decoder = Decoder(
            spatial_dims,
            in_channels=latent_channels,
            out_channels=out_channels,
            num_res_blocks=[n + 1 for n in blocks],
            **common,
            **own,
        )

        # The encoder ends in 2z channels, of which two convolutions make mean and logarithm of the variance.
        def conv(inputs: int, outputs: int, size: int) -> Convolution:
            return Convolution(spatial_dims, inputs, outputs, kernel_size=size, padding=size // 2, conv_only=True)

        ends: Any = self.encoder.blocks, self.decoder.blocks
        ends[0][-1] = conv(channels[-1], 2 * latent_channels, 3)
        self.quant_conv_mu = conv(2 * latent_channels, latent_channels, 1)
        self.quant_conv_log_sigma = conv(2 * latent_channels, latent_channels, 1)

        # Norm, activation, convolution.
        for blocks_of_side in ends:
            blocks_of_side.insert(len(blocks_of_side) - 1, nn.SiLU())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, C, *S) -> mean and standard deviation of their latents (B, z, *S / 2^levels)."""
        factor = 2 ** (self.levels - 1)
        if any(side % factor for side in x.shape[2:]):
            raise ValueError(f"the image has sides {tuple(x.shape[2:])}, expected multiples of {factor}: resize it")
        return super().encode(x)


class AutoencoderLoss(nn.Module):
    """Mean absolute error of the reconstruction, and a light pull of the latents towards a standard normal.

    Args:
        kl_weight: strength of the pull, on means over the latent's entries.
    """

    def __init__(self, kl_weight: float = 1e-3) -> None:
        super().__init__()
        self.kl_weight = kl_weight

    def forward(self, pred: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        """Compare what ``AutoencoderKL`` gives (reconstruction, mean and standard deviation) with the image."""
        image, mean, std = (x.float() for x in pred)
        divergence = 0.5 * (mean.square() + std.square() - 1) - std.log()
        return (image - target).abs().mean() + self.kl_weight * divergence.mean()


class LatentSpace:
    """Where latent diffusion runs: latents of an autoencoder, scaled to about unit variance.

    ``decode`` serves as `sampler.DiffusionSampler`'s. No gradient is kept: the autoencoder is a fixed frame.

    Args:
        autoencoder: any with ``encode(image) -> (mean, std)`` and ``decode(latent)``.
        scale: latents are multiplied by it (Stable Diffusion: 0.18215).
    """

    def __init__(self, autoencoder: AutoencoderKL, scale: float = 1.0) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale = scale

    @torch.no_grad()
    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and standard deviation (B, z, *s) of images (B, C, *S) in [-1, 1]: what is worth caching."""
        mean, std = self.autoencoder.encode(image)
        return self.scale * mean, self.scale * std

    def encode(self, image: Tensor, generator: Noise = None) -> Tensor:
        """Draw scaled latents (B, z, *s) of images (B, C, *S)."""
        mean, std = self.moments(image)
        return mean + std * draw(mean, generator)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Images (B, C, *S) of scaled latents (B, z, *s)."""
        return self.autoencoder.decode(latent / self.scale)


def unit_scale(latents: Tensor) -> float:
    """Scale that gives unscaled latents unit variance, as latent diffusion sets it for an autoencoder of one's own."""
    return float(1 / latents.float().std())


@torch.no_grad()
def tell_scale(autoencoder: AutoencoderKL, images: Sequence[Tensor]) -> float:
    """Log, for the stage that follows, the scale that gives these images' latents unit variance."""
    device = next(autoencoder.parameters()).device
    latents = [autoencoder.encode(convert_to_tensor(image)[None].to(device))[0] for image in images]
    scale = unit_scale(torch.cat(latents))
    logger.info(f"latents have unit variance with --latent_scale {scale:.3f}")
    return scale


class LatentMomentsd(Transform):
    """Adds ``mean`` and ``std`` of an image's latent: with MONAI's ``CacheDataset``, each image is encoded once.

    Args:
        key: image (C, *S) in [-1, 1].
        latents: the latent space.
        device: where its autoencoder lies.
    """

    def __init__(self, key: str, latents: LatentSpace, device: str | torch.device = "cpu") -> None:
        self.key = key
        self.latents = latents
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Encode."""
        mean, std = self.latents.moments(convert_to_tensor(data[self.key])[None].to(self.device))
        return {**data, "mean": mean[0].cpu(), "std": std[0].cpu()}
