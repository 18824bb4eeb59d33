"""LesionDiffusion's autoencoder: a VQ-GAN (Esser et al. 2021) for CT crops, whose latents are vectors of a codebook.

Diffusion runs in latents before they are quantised, the decoder quantises what it is given. Training (section 4 of the
method): absolute error, codebook loss, and later two discriminators, one that sees volumes and one that sees slices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.networks.blocks import Convolution
from monai.networks.nets import PatchDiscriminator
from monai.networks.nets.autoencoderkl import Decoder, Encoder
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn import functional

from .checkpoints import unwrapped

logger = logging.getLogger(__name__)

Pred = tuple[Tensor, Tensor, Tensor]


class CodebookAutoencoder(nn.Module):
    """Encoder, codebook, decoder; the defaults are the published size (7,009,709 parameters).

    Modules and their names are MONAI's, with an activation before the last convolution of either side, as in latent
    diffusion; the blocks of the middle count among those of the last level.

    Args:
        spatial_dims: 2 or 3.
        channels: of each level; all but the last halve the sides.
        encoder_blocks: residual blocks of each level on the way down.
        decoder_blocks: of each level on the way up, in the order of ``channels``.
        latent_channels: length of a code.
        num_codes: codes of the codebook.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        channels: Sequence[int] = (96, 96),
        encoder_blocks: Sequence[int] = (1, 4),
        decoder_blocks: Sequence[int] = (2, 6),
        latent_channels: int = 4,
        num_codes: int = 2048,
        norm_num_groups: int = 16,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not len(channels) == len(encoder_blocks) == len(decoder_blocks):
            raise ValueError(
                f"channels {tuple(channels)}, encoder_blocks {tuple(encoder_blocks)} and decoder_blocks "
                f"{tuple(decoder_blocks)} must have an entry for each level"
            )
        self.spatial_dims, self.num_codes = spatial_dims, num_codes
        self.in_channels, self.out_channels = in_channels, out_channels
        self.factor = 2 ** (len(channels) - 1)
        common: dict[str, Any] = {
            "spatial_dims": spatial_dims, "channels": channels, "attention_levels": [False] * len(channels),
            "norm_num_groups": norm_num_groups, "norm_eps": norm_eps, "with_nonlocal_attn": False,
        }  # fmt: skip
        z = latent_channels
        self.encoder = Encoder(in_channels=in_channels, out_channels=z, num_res_blocks=encoder_blocks, **common)
        self.decoder = Decoder(in_channels=z, out_channels=out_channels, num_res_blocks=decoder_blocks, **common)
        for blocks in (self.encoder.blocks, self.decoder.blocks):
            blocks.insert(len(blocks) - 1, nn.SiLU())
        self.quant_conv = Convolution(spatial_dims, z, z, kernel_size=1, padding=0, conv_only=True)
        self.post_quant_conv = Convolution(spatial_dims, z, z, kernel_size=1, padding=0, conv_only=True)
        self.codebook = nn.Embedding(num_codes, z)
        nn.init.uniform_(self.codebook.weight, -1 / num_codes, 1 / num_codes)

    @property
    def last_weight(self) -> nn.Parameter:
        """Weights of the last convolution, by whose gradients adversarial and other terms are balanced."""
        last: Any = self.decoder.blocks[-1]
        return last.conv.weight

    def encode(self, image: Tensor) -> Tensor:
        """Latents (B, z, *S / factor) of images (B, C, *S), not quantised: what diffusion runs in."""
        if any(side % self.factor for side in image.shape[2:]):
            sides = tuple(image.shape[2:])
            raise ValueError(f"the image has sides {sides}, expected multiples of {self.factor}: crop or pad it")
        return self.quant_conv(self.encoder(image))

    @torch.no_grad()
    def nearest(self, latent: Tensor, chunk: int = 4096) -> Tensor:
        """Number of the nearest code (B, *s) for every place of latents (B, z, *s), ``chunk`` places at a time."""
        codes = self.codebook.weight
        places = latent.movedim(1, -1)
        # |z|^2 is the same for all codes. No table of all places by all codes: 2 GB at 64^3 places and 2048 codes.
        norms = codes.square().sum(1)
        flat = places.reshape(-1, codes.shape[1]).split(chunk)
        return torch.cat([torch.addmm(norms, z, codes.T, alpha=-2).argmin(1) for z in flat]).view(places.shape[:-1])

    def quantise(self, latent: Tensor) -> Pred:
        """Replace latents by their nearest codes, in full precision whatever the network computes in.

        Args:
            latent: (B, z, *s).

        Returns:
            codes (B, z, *s), whose gradient goes straight through to ``latent``; their numbers (B, *s); the codebook
            loss, with 0.25 on the term that moves the codes, as published (elsewhere it is on the other).
        """
        with torch.autocast("cuda" if latent.is_cuda else "cpu", enabled=False):
            latent = latent.to(self.codebook.weight.dtype)
            indices = self.nearest(latent)
            codes = self.codebook(indices).movedim(-1, 1)
            loss = functional.mse_loss(latent, codes.detach()) + 0.25 * functional.mse_loss(codes, latent.detach())
            return codes.detach() + (latent - latent.detach()), indices, loss

    def decode(self, latent: Tensor, quantised: bool = True) -> Tensor:
        """Images (B, C, *S) of latents (B, z, *s), which are quantised first unless told otherwise."""
        return self.decoder(self.post_quant_conv(self.quantise(latent)[0] if quantised else latent))

    def reconstruct(self, image: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(image))

    def forward(self, image: Tensor) -> Pred:
        """Training's view of images (B, C, *S) -> reconstruction, codebook loss, numbers of the codes (B, *s)."""
        codes, indices, loss = self.quantise(self.encode(image))
        return self.decode(codes, quantised=False), loss, indices


class CodeSpace:
    """Where LINet's diffusion runs: latents of a codebook's autoencoder before they are quantised, scaled.

    No gradient is kept: the autoencoder is a fixed frame.

    Args:
        autoencoder: its weights are frozen.
        scale: latents are multiplied by it, about to unit variance (published: 1, as they are).
    """

    def __init__(self, autoencoder: CodebookAutoencoder, scale: float = 1.0) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale = scale

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Scaled latents (B, z, *s) of images (B, C, *S) in [0, 1]."""
        return self.scale * self.autoencoder.encode(image)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Images (B, C, *S) of scaled latents, quantised on the way."""
        return self.autoencoder.decode(latent / self.scale)


@torch.no_grad()
def tell_scale(autoencoder: CodebookAutoencoder, images: Sequence[Tensor]) -> float:
    """Log, for the stage that follows, the scale that gives these images' latents unit variance."""
    device = autoencoder.last_weight.device
    latents = torch.cat([autoencoder.encode(convert_to_tensor(image)[None].to(device)).flatten() for image in images])
    scale = float(1 / latents.float().std())
    logger.info(f"latents have unit variance with --latent_scale {scale:.3f}")
    return scale


def codebook_usage(indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Share of the codes that are used at all, and their perplexity: how many codes used evenly would say as much.

    Example:
        >>> [x.item() for x in codebook_usage(torch.tensor([0, 0, 3, 3]), 4)]
        [0.5, 2.0]
    """
    counts = torch.bincount(indices.flatten(), minlength=num_codes)
    return (counts > 0).float().mean(), torch.special.entr(counts / counts.sum()).sum().exp()


def axial_slices(*volumes: Tensor) -> list[Tensor]:
    """An axial slice (B, C, A, L), drawn for each case, of all the volumes (B, C, S, A, L); images stay as they are."""
    if volumes[0].ndim < 5:
        return list(volumes)
    cases = torch.arange(len(volumes[0]))
    places = torch.randint(volumes[0].shape[2], cases.shape)
    return [volume[cases, :, places] for volume in volumes]


def edge_error(error: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference between neighbours of an error image (B, C, *S), at full, half, quarter... size.

    What blurs edges costs more than under the absolute error: a perceptual loss in small, without weights.
    """
    pool = functional.avg_pool3d if error.ndim == 5 else functional.avg_pool2d
    total = error.new_zeros(())
    for scale in range(scales):
        error = pool(error, 2) if scale else error
        total = total + torch.stack([error.diff(dim=axis).abs().mean() for axis in range(2, error.ndim)]).mean()
    return total / scales


class CodebookLoss(nn.Module):
    """Absolute error, codebook loss and, where asked for, edges or a perceptual loss; means over the batch.

    `latest` keeps the terms of the last call and how the batch used the codebook, for the log.

    Args:
        num_codes: codes of the codebook.
        codebook_weight: of the codebook loss.
        edge_weight: of `edge_error`; 0 as published.
        perceptual: compares the same axial slice (B, C, A, L) of both, drawn for each case. Published: LPIPS, in MONAI
            ``PerceptualLoss(2, "vgg")``, which fetches its weights and wants the package lpips.
    """

    def __init__(
        self,
        num_codes: int,
        codebook_weight: float = 1.0,
        edge_weight: float = 0.0,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.codebook_weight = codebook_weight
        self.edge_weight = edge_weight
        self.perceptual = perceptual
        self.latest: dict[str, Tensor] = {}

    def terms(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What keeps the reconstruction near the image."""
        terms = {"l1": (image - target).abs().mean()}
        if self.edge_weight:
            terms["edges"] = self.edge_weight * edge_error(image - target)
        if self.perceptual is not None:
            if isinstance(self.perceptual, nn.Module):
                self.perceptual.to(image.device)
            terms["perceptual"] = self.perceptual(*axial_slices(image, target)).mean()
        return terms

    def split(self, pred: Pred, target: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction loss and weighted codebook loss of a `CodebookAutoencoder`'s output."""
        image, codebook, indices = pred
        terms = self.terms(image.float(), target.float())
        self.latest = {name: term.detach() for name, term in {**terms, "codebook": codebook}.items()}
        self.latest["codes_used"], self.latest["perplexity"] = codebook_usage(indices, self.num_codes)
        return torch.stack(list(terms.values())).sum(), self.codebook_weight * codebook

    def forward(self, pred: Pred, target: Tensor) -> Tensor:
        """Sum the terms."""
        return torch.stack(self.split(pred, target)).sum()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of a discriminator that should say 1 or more of what is real, -1 or less of what is not."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


class AdversarialCodebookLoss:
    """`CodebookLoss`, and from a step on discriminators to deceive, of volumes and of axial slices (one, in 2-D).

    It is the engine's ``loss_function`` and lets the discriminators learn before it asks them, each time it is called
    with gradients; so it belongs among the objects of `training.TrainingState`, too.

    Args:
        network: the `CodebookAutoencoder` that is trained, on its device; may be wrapped for several GPUs.
        loss: the other terms.
        start: steps before the discriminators begin (published: 25,000, counted as 50,000 with two optimisers).
        weight: of the generator's term, on top of the ratio of gradients at the last convolution.
        channels: filters of a discriminator's first layer.
        layers: of a discriminator, in the middle.
        lr: of the discriminators' Adam.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: CodebookLoss,
        *,
        start: int = 25_000,
        weight: float = 0.5,
        channels: int = 64,
        layers: int = 3,
        lr: float = 1e-4,
    ) -> None:
        self.network = cast(CodebookAutoencoder, unwrapped(network))
        self.loss = loss
        self.start, self.weight, self.step = start, weight, 0
        self.discriminators = nn.ModuleList(
            PatchDiscriminator(dims, channels, self.network.out_channels, num_layers_d=layers, padding=2)
            for dims in sorted({2, self.network.spatial_dims})
        ).to(self.network.last_weight.device)
        self.optimizer = torch.optim.Adam(self.discriminators.parameters(), lr=lr, betas=(0.5, 0.9))

    @property
    def latest(self) -> dict[str, Tensor]:
        """Terms of the last call, for the log."""
        return self.loss.latest

    def __call__(self, pred: Pred, target: Tensor) -> Tensor:
        """Sum the terms; when training, and from the start on, teach the discriminators and add the generator's."""
        near, codebook = self.loss.split(pred, target)
        if not pred[0].requires_grad:
            return near + codebook
        self.step += 1
        if self.step <= self.start:
            return near + codebook
        # All of the image, and one slice where it is a volume.
        pairs = [axial_slices(target.float(), pred[0].float()), [target.float(), pred[0].float()]]
        pairs = pairs[-len(self.discriminators) :]
        judged = self.learn(pairs)
        self.discriminators.requires_grad_(False)
        gan = -torch.stack([d(fake)[-1].mean() for d, (_, fake) in zip(self.discriminators, pairs)]).mean()
        ratio = self.balance(near, gan)
        self.latest.update(gan=gan.detach(), gan_weight=ratio, discriminators=judged)
        return near + codebook + ratio * gan

    def learn(self, pairs: Sequence[Sequence[Tensor]]) -> Tensor:
        """One step of the discriminators on (real, fake) for each -> their hinge loss."""
        self.discriminators.requires_grad_(True)
        self.optimizer.zero_grad()
        loss = torch.stack(
            [hinge(d(real)[-1], d(fake.detach())[-1]) for d, (real, fake) in zip(self.discriminators, pairs)]
        )
        loss.sum().backward()
        if dist.is_initialized():
            for gradient in (p.grad for p in self.discriminators.parameters() if p.grad is not None):
                dist.all_reduce(gradient.div_(dist.get_world_size()))
        self.optimizer.step()
        return loss.detach().mean()

    def balance(self, near: Tensor, gan: Tensor) -> Tensor:
        """Weight that makes both terms pull equally at the last convolution, times ``weight``."""
        a, b = (torch.autograd.grad(x, self.network.last_weight, retain_graph=True)[0].norm() for x in (near, gan))
        return self.weight * (a / (b + 1e-4)).clamp(0, 1e4)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "step": self.step,
            "discriminators": self.discriminators.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stood."""
        self.step = state["step"]
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimizer.load_state_dict(state["optimizer"])


class CodebookRevival:
    """Handler that turns codes which no latent has chosen for a while into latents of the batch, beginning at once.

    Not published. A codebook that is drawn near zero, as published, uses few codes for long: too long for a short run.
    Keep it among the objects of `training.TrainingState`.

    Args:
        network: the `CodebookAutoencoder` that is trained; may be wrapped for several GPUs.
        every: steps between; 0 never does it.
    """

    def __init__(self, network: nn.Module, every: int = 0) -> None:
        self.network = cast(CodebookAutoencoder, unwrapped(network))
        self.every = every
        self.used = torch.zeros(self.network.num_codes, dtype=torch.bool, device=self.network.last_weight.device)

    def attach(self, engine: Engine) -> None:
        """Before the optimiser's step, while the batch is whole."""
        if self.every:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Note the codes in use; when it is time, replace the others."""
        output: Any = engine.state.output
        self.used[output["pred"][2].flatten()] = True
        if (engine.state.iteration - 1) % self.every:
            return
        latents = self.network.encode(output["image"]).movedim(1, -1).flatten(0, -2)
        self.replace(latents[torch.randperm(len(latents)).to(latents.device)])
        self.used.zero_()

    @torch.no_grad()
    def replace(self, latents: Tensor) -> None:
        """Give unused codes the first of these latents (N, z); all ranks alike."""
        codes: Tensor = self.network.codebook.weight
        if dist.is_initialized():
            used = self.used.int()
            dist.all_reduce(used)
            self.used.copy_(used > 0)
        unused = (~self.used).nonzero()[: len(latents), 0]
        codes[unused] = latents[: len(unused)].to(codes)
        if dist.is_initialized():
            dist.broadcast(codes, 0)

    def state_dict(self) -> dict[str, Any]:
        """Codes in use since the last time."""
        return {"used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stood."""
        self.used.copy_(state["used"])


# The authors' names in ours, for `checkpoints.translate`: several of their levels make one of ours, as only some halve
# the sides. L levels of R blocks; T: those that end by halving; N: how many make each of ours. E and G: first block of
# each, down and up (where the level above a halved one doubles); M and O: middle and end.
VQ: dict[str, Any] = {
    "select": ["state_dict", ""],
    "constants": {
        "norm_num_groups": 16,
        "L": r"$count(r'^encoder\.down\.\d+\.block\.0\.norm1\.weight$')",
        "R": r"$count(r'^encoder\.down\.0\.block\.\d+\.norm1\.weight$')",
        "T": "$[i for i in range(L) if has(f'encoder.down.{i}.downsample.conv.weight')] + [L - 1]",
        "N": "$[T[k] - (T[k - 1] if k else -1) for k in range(len(T))]",
        "E": "$[1 + i * R + len([t for t in T if t < i]) for i in range(L)]",
        "M": "$E[L - 1] + R",
        "G": "$[3 + (L - 1 - i) * (R + 1) + len([t for t in T[:-1] if t >= i]) for i in range(L)]",
        "O": "$G[0] + R + 1",
    },
    "drop": [[r"loss\..*", "discriminators of the autoencoder's training"]],
    "rename": [
        [r"^(encoder|decoder)\.conv_in\.", "{_1}.blocks.0.conv."],
        [r"^encoder\.down\.(\d+)\.block\.(\d+)\.", "encoder.blocks.{E[_1] + _2}."],
        [r"^encoder\.down\.(\d+)\.downsample\.", "encoder.blocks.{E[_1] + R}.conv."],
        [r"^encoder\.mid\.block_(\d)\.", "encoder.blocks.{M + _1 - 1}."],
        [r"^encoder\.norm_out\.", "encoder.blocks.{M + 2}."],
        [r"^encoder\.conv_out\.", "encoder.blocks.{M + 4}.conv."],
        [r"^decoder\.mid\.block_(\d)\.", "decoder.blocks.{_1}."],
        [r"^decoder\.up\.(\d+)\.block\.(\d+)\.", "decoder.blocks.{G[_1] + _2}."],
        [r"^decoder\.up\.(\d+)\.upsample\.", "decoder.blocks.{G[_1] + R + 1}.post"],
        [r"^decoder\.norm_out\.", "decoder.blocks.{O}."],
        [r"^decoder\.conv_out\.", "decoder.blocks.{O + 2}.conv."],
        [r"\.postconv\.", ".postconv.conv."],
        [r"\.(conv1|conv2|nin_shortcut)\.", ".{_1}.conv."],
        [r"^(quant_conv|post_quant_conv)\.", "{_1}.conv."],
        [r"^quantize\.embedding\.", "codebook."],
    ],
    "knobs": {
        "in_channels": "$shape('encoder.conv_in.weight', 1)",
        "out_channels": "$shape('decoder.conv_out.weight', 0)",
        "channels": "$[shape(f'encoder.down.{t}.block.0.conv1.weight', 0) for t in T]",
        "encoder_blocks": "$[N[k] * R + 2 * (k == len(N) - 1) for k in range(len(N))]",
        "decoder_blocks": "$[N[k] * (R + 1) + 2 * (k == len(N) - 1) for k in range(len(N))]",
        "latent_channels": "$shape('quantize.embedding.weight', 1)",
        "num_codes": "$shape('quantize.embedding.weight', 0)",
        "norm_num_groups": "$norm_num_groups",
    },
}
