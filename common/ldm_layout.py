"""Latent-diffusion names (Stable Diffusion 1.x, ControlNet, Siamese-Diffusion, GuideGen) into ours, for `checkpoints`.

`UNET`, `CONTROLNET` (with the original stem or the dense one) and `AUTOENCODER` are rules for one part in its bare
names; `parts` cuts a merged checkpoint into them, `by_parts` reads it for a bundle. Levels, blocks and attention are
read off the weights; the number of heads is not in them (`CONTROLNET` and `UNET` assume 8, Stable Diffusion's).

`PLAIN_UNET` is the same U-Net with plain self-attention, as its ancestor has it (guided-diffusion), and `TEXT_ADAPTER`
GuideGen's; `by_networks` reads files that hold such networks, each below a prefix of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoints import CheckpointError, Foreign, Part, dropped_keys, read_knobs, select, translate
from .codebook import VQ
from .controlnet import copied_encoder

# ---------------------------------------------------------------------------------------------------------------------
# A merged checkpoint

PREFIXES = {"unet": "model.diffusion_model.", "controlnet": "control_model.", "autoencoder": "first_stage_model."}
DROPPED = [
    [r"cond_stage_model\..*", "text encoder: common/text.py has it, the frozen CLIP as its makers released it"],
    [r"model_ema\..*", "averages of an earlier training: the published code samples from the weights themselves"],
    [
        r"((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_\w+|logvar|scale_factor)",
        "schedule table, computed anew in float64 by common/schedules.py",
    ],
]


def parts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Cut a merged checkpoint into its networks, in bare names; every key belongs to one or is `DROPPED`.

    Args:
        content: what `checkpoints.read_weights` gives.

    Returns:
        {"unet", "controlnet", "autoencoder": state dict}, those that the file has.
    """
    state, _ = select(content, {"select": ["state_dict", ""]})
    found: dict[str, dict[str, Any]] = {}
    foreign = []
    for key, value in state.items():
        name = next((n for n, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if name is not None:
            found.setdefault(name, {})[key.removeprefix(PREFIXES[name])] = value
        elif not any(re.fullmatch(pattern, key) for pattern, _ in DROPPED):
            foreign.append(key)
    if foreign or not found:
        held = ", ".join((foreign or list(state))[:5])
        raise CheckpointError(
            f"{len(foreign)} keys belong to no part of a latent-diffusion checkpoint ({held}): another layout, or one "
            f"part in bare names, which its own rules translate; expected {', '.join(PREFIXES.values())}"
        )
    return found


def controlled_from_ldm(content: Mapping[str, Any], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a merged checkpoint -> the one of a `controlnet.ControlledUNet`.

    A plain Stable Diffusion file fills the U-Net, and the ControlNet with a copy of its encoder ("add control").

    Args:
        content: what `checkpoints.read_weights` gives.
        target: ``network.state_dict()``.
    """
    found = parts(content)
    if "unet" not in found:
        raise CheckpointError(f"no U-Net in the checkpoint, only {', '.join(found)}: take the merged file")

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in target.items() if k.startswith(f"{name}.")}

    unet = _part(found, "unet", UNET, part("unet"))
    if "controlnet" in found:
        control = _part(found, "controlnet", CONTROLNET, part("controlnet"))
    else:
        control = copied_encoder(part("controlnet"), unet)
    return {**{f"unet.{k}": v for k, v in unet.items()}, **{f"controlnet.{k}": v for k, v in control.items()}}


def _part(found: dict, name: str, rules: dict, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _translated(found[name], rules, target, f"{name} ({PREFIXES[name]}*)")


def _translated(source: dict, rules: dict, target: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    try:
        return translate(source, rules, target)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error


# What a file of this kind has in common with Stable Diffusion 1.x without telling it.
LATENT_DIFFUSION: dict[str, Any] = {
    "select": ["state_dict", ""],
    "drop": DROPPED,
    "knobs": {
        "num_heads": 8,
        "latent_scale": 0.18215,
        "prediction_type": "epsilon",
        "num_train_timesteps": "$shape('betas', 0) if has('betas') else 1000",
    },
}


def by_parts(source: Mapping[str, Any], rules: Mapping[str, Any], given: Mapping[str, Any]) -> Foreign:
    """Read a merged checkpoint for a bundle: U-Net and ControlNet fill ``network_def``, the autoencoder its own.

    Args:
        source: the state dict.
        rules: `LATENT_DIFFUSION`, with what the bundle's ``import_rules.json`` adds.
        given: the user's knobs, which win.
    """
    found = parts(source)
    read = {**_network_knobs(found), **_autoencoder_knobs(found)}
    fill = {"network_def": lambda target: controlled_from_ldm(source, target)}
    dropped, notes = dropped_keys(source, rules), []
    if "autoencoder" in found:
        fill["autoencoder_def"] = lambda target: _part(found, "autoencoder", AUTOENCODER, target)
        inner = dropped_keys(found["autoencoder"], AUTOENCODER)
        dropped |= {reason: [PREFIXES["autoencoder"] + key for key in keys] for reason, keys in inner.items()}
    else:
        notes.append(
            "no autoencoder in the file: give one that it was trained with by --autoencoder_weights, e.g. the "
            "autoencoder.pt that comes of importing Stable Diffusion's own file into another folder"
        )
    if "controlnet" not in found:
        notes.append("no ControlNet in the file: it starts as a copy of the U-Net's encoder and must be trained")
    homes = {"unet": ("network_def", "unet."), "controlnet": ("network_def", "controlnet.")}
    return Foreign(
        knobs={**read, **read_knobs(source, rules, given)},
        fill=fill,
        parts={
            name: Part([k for k in source if k.startswith(prefix)], *homes.get(name, ("autoencoder_def", "")))
            for name, prefix in PREFIXES.items()
            if name in found or name in homes
        },
        dropped=dropped,
        notes=tuple(notes),
        ready="controlnet" in found,
    )


def _network_knobs(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Knobs of U-Net and ControlNet, in the bundle's names."""
    if "unet" not in found:
        raise CheckpointError(f"no U-Net in the checkpoint, only {', '.join(found)}: take the merged file")
    knobs = read_knobs(found["unet"], UNET)
    inputs, outputs = knobs["in_channels"], knobs["out_channels"]
    if inputs != outputs:
        raise CheckpointError(
            f"the U-Net reads {inputs} channels and predicts {outputs}, as for inpainting: take another"
        )
    shared = ("channels", "attention_levels", "num_res_blocks", "norm_num_groups", "cross_attention_dim",
              "transformer_num_layers", "transformer_norm_eps")  # fmt: skip
    # Its tokens are a text encoder's, not words that it has learned itself.
    result = {**{k: knobs[k] for k in shared}, "latent_channels": inputs, "num_words": None}
    return {**result, **_hint_knobs(found.get("controlnet", {}))}


def _hint_knobs(control: dict[str, Any]) -> dict[str, Any]:
    """Knobs of the ControlNet's stem; none without a ControlNet."""
    if not control:
        return {}
    knobs = read_knobs(control, CONTROLNET)
    hint = {k: knobs[k] for k in ("hint_channels", "dense_hint")}
    if knobs["dense_hint"]:
        width = len(control["input_hint_block.0.initial_conv.weight"])
        return {**hint, "hint_width": width, "num_merges": knobs["num_merges"]}
    # Every fourth place widens and, but for the first, halves.
    places = (f"input_hint_block.{n}.weight" for n in range(0, len(control), 4))
    return {**hint, "hint_widths": [len(control[place]) for place in places if place in control]}


def _autoencoder_knobs(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Knobs of the autoencoder, which say, too, how far it shrinks images."""
    if "autoencoder" not in found:
        return {}
    knobs = read_knobs(found["autoencoder"], AUTOENCODER)
    ours = {"channels": "channels", "num_res_blocks": "blocks", "norm_num_groups": "groups"}
    result = {f"autoencoder_{ours[k]}": v for k, v in knobs.items() if k in ours}
    if any(knobs["attention_levels"]):  # on top of the middle's; Stable Diffusion has none
        result["autoencoder_def::attention_levels"] = knobs["attention_levels"]
    return {**result, "autoencoder_attention": True}


# ---------------------------------------------------------------------------------------------------------------------
# U-Net and ControlNet: a flat walk of input blocks (stem, then for each level its blocks and one down-sampling) and of
# output blocks (for each level, deepest first, one block more; the last of a level up-samples)

_BLOCK = r"_blocks\.\d+\.0\.(in_layers\.0|op)\.weight$"

_CONSTANTS = {
    "N": rf"$1 + count(r'^input{_BLOCK}')",
    "M": rf"$count(r'^output{_BLOCK}')",
    # Entries that end a level; level and place within it, of each entry.
    "D": "$[n for n in range(N) if has(f'input_blocks.{n}.0.op.weight')]",
    "I": "$[len([d for d in D if d < n]) for n in range(N)]",
    "J": "$[n - 1 - (D[I[n] - 1] if I[n] else 0) for n in range(N)]",
    "E": "$[n for n in range(M) if max(has(f'output_blocks.{n}.{k}.conv.weight') for k in (1, 2))]",
    "U": "$[len([e for e in E if e < n]) for n in range(M)]",
    "V": "$[n - (E[U[n] - 1] + 1 if U[n] else 0) for n in range(M)]",
    # First block of each level, its blocks and channels.
    "S": "$[1, *[d + 1 for d in D]]",
    "B": "$[(D[i] if i < len(D) else N) - S[i] for i in range(len(S))]",
    "C": "$[shape(f'input_blocks.{s}.0.out_layers.3.weight', 0) for s in S]",
    "T": r"$count(r'^middle_block\.1\.transformer_blocks\.\d+\.norm1\.weight$')",
}

_RENAME = [
    [r"^input_blocks\.0\.0\.", "conv_in.conv."],
    [r"^input_blocks\.(\d+)\.0\.op\.", "down_blocks.{I[_1]}.downsampler.op.conv."],
    [r"^input_blocks\.(\d+)\.0\.", "down_blocks.{I[_1]}.resnets.{J[_1]}."],
    [r"^input_blocks\.(\d+)\.1\.", "down_blocks.{I[_1]}.attentions.{J[_1]}."],
    [r"^middle_block\.0\.", "middle_block.resnet_1."],
    [r"^middle_block\.1\.", "middle_block.attention."],
    [r"^middle_block\.2\.", "middle_block.resnet_2."],
    [r"^output_blocks\.(\d+)\.[12]\.conv\.", "up_blocks.{U[_1]}.upsampler.postconv.conv."],
    [r"^output_blocks\.(\d+)\.0\.", "up_blocks.{U[_1]}.resnets.{V[_1]}."],
    [r"^output_blocks\.(\d+)\.1\.", "up_blocks.{U[_1]}.attentions.{V[_1]}."],
    [r"^out\.2\.", "out.2.conv."],
    [r"\.in_layers\.0\.", ".norm1."],
    [r"\.in_layers\.2\.", ".conv1.conv."],
    [r"\.emb_layers\.1\.", ".time_emb_proj."],
    [r"\.out_layers\.0\.", ".norm2."],
    [r"\.out_layers\.3\.", ".conv2.conv."],
    [r"\.skip_connection\.", ".skip_connection.conv."],
]

_RENAME_TRANSFORMER = [
    [r"\.to_out\.0\.", ".out_proj."],
    [r"\.ff\.net\.0\.proj\.", ".ff.linear1."],
    [r"\.ff\.net\.2\.", ".ff.linear2."],
]
_RENAME_TRANSFORMERS = [[r"\.(proj_in|proj_out)\.", ".{_1}.conv."], *_RENAME_TRANSFORMER]

_KNOBS = {
    "in_channels": "$shape('input_blocks.0.0.weight', 1)",
    "channels": "$C",
    "num_res_blocks": "$B[0] if min(B) == max(B) else B",
    "attention_levels": "$[has(f'input_blocks.{s}.1.norm.weight') for s in S]",
    "num_head_channels": "$[c // 8 for c in C]",
    "with_conditioning": True,
    "cross_attention_dim": "$shape('middle_block.1.transformer_blocks.0.attn2.to_k.weight', 1)",
    "transformer_num_layers": "$T",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "transformer_norm_eps": 1e-6,
}

UNET: dict[str, Any] = {
    "constants": _CONSTANTS,
    "rename": [*_RENAME, *_RENAME_TRANSFORMERS],
    "knobs": {**_KNOBS, "out_channels": "$shape('out.2.weight', 0)"},
}

# LesionDiffusion's: plain GELUs, and one projection before all attention (`attribute_unet`).
ATTRIBUTE_UNET: dict[str, Any] = {
    "constants": {**_CONSTANTS, "head_channels": 32},
    "rename": [
        [r"^context_linear_projection\.", "context_projection."],
        [r"\.ff\.net\.0\.0\.", ".ff.linear1."],
        *UNET["rename"],
    ],
    "knobs": {
        **{name: UNET["knobs"][name] for name in ("in_channels", "out_channels", "channels", "num_res_blocks")},
        **{name: UNET["knobs"][name] for name in ("attention_levels", "cross_attention_dim", "transformer_num_layers")},
        "num_head_channels": "$head_channels",
    },
}

# Rows of the plain attention's one projection lie head by head.
PLAIN_UNET: dict[str, Any] = {
    "constants": {**_CONSTANTS, "head_channels": 32},
    "rename": [*_RENAME, [r"\.proj_out\.", ".attn.out_proj."]],
    "split": [
        {
            "key": ".qkv.",
            "into": [".attn.to_q.", ".attn.to_k.", ".attn.to_v."],
            "heads": "$max(1, channels // head_channels)",
        }
    ],
    "squeeze": [r".*\.attn\.(to_[qkv]|out_proj)\.weight"],
    "knobs": {
        "in_channels": "$shape('input_blocks.0.0.weight', 1)",
        "out_channels": "$shape('out.2.weight', 0)",
        "channels": "$C",
        "num_res_blocks": "$B[0] if min(B) == max(B) else B",
        "attention_levels": "$[has(f'input_blocks.{s}.1.norm.weight') for s in S]",
        "num_head_channels": "$[min(c, head_channels) for c in C]",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    },
}

TEXT_ADAPTER: dict[str, Any] = {
    "rename": [[r"^transformer_blocks\.", "blocks."], *_RENAME_TRANSFORMER],
    "knobs": {
        "width": "$shape('transformer_blocks.0.norm1.weight', 0)",
        "depth": r"$count(r'^transformer_blocks\.\d+\.norm1\.weight$')",
    },
}

# The hint: original stem, a sequence of convolutions at every other place, or dense stem (its last convolution at 1).
CONTROLNET: dict[str, Any] = {
    "constants": {
        **_CONSTANTS,
        "H": r"$count(r'^input_hint_block\.\d+\.weight$')",
        "P": r"$count(r'^input_hint_block\.0\.patch_merge\d+\.norm\.weight$')",
        "dense": "$has('input_hint_block.0.initial_conv.weight')",
        "first": "$'input_hint_block.0.initial_conv.weight' if dense else 'input_hint_block.0.weight'",
    },
    "rename": [
        [r"^input_hint_block\.0\.initial_conv\.", "controlnet_cond_embedding.convs.0.conv."],
        [r"^input_hint_block\.0\.conv_before_res(\d+)\.", "controlnet_cond_embedding.convs.{_1 - 1}.conv."],
        [
            r"^input_hint_block\.0\.layer(\d+)\.conv(\d)\.",
            "controlnet_cond_embedding.units.{_1 - 1}.conv.unit{_2 - 1}.conv.",
        ],
        [r"^input_hint_block\.0\.patch_merge(\d+)\.", "controlnet_cond_embedding.merges.{_1 - 1}."],
        [r"^input_hint_block\.0\.(weight|bias)$", "controlnet_cond_embedding.conv_in.conv.{_1}"],
        [
            r"^input_hint_block\.(\d+)\.",
            "controlnet_cond_embedding.{'conv_out' if _1 == max(1, 2 * H - 2) else 'blocks.%d' % (_1 // 2 - 1)}.conv.",
        ],
        [r"^zero_convs\.0\.0\.", "controlnet_down_blocks.0."],
        [r"^zero_convs\.(\d+)\.0\.", "controlnet_down_blocks.{_1}.conv."],
        [r"^middle_block_out\.0\.", "controlnet_mid_block.conv."],
        *_RENAME,
        *_RENAME_TRANSFORMERS,
    ],
    "knobs": {
        **_KNOBS,
        "hint_channels": "$shape(first, 1)",
        "dense_hint": "$dense",
        "num_merges": "$P",
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder: our blocks are one flat list for each side

AUTOENCODER: dict[str, Any] = {
    "constants": {
        "L": r"$count(r'^encoder\.down\.\d+\.block\.0\.norm1\.weight$')",
        "R": r"$count(r'^encoder\.down\.0\.block\.\d+\.norm1\.weight$')",
        # Blocks of a residual unit, 2 where attention follows it; first block of each level, down and up; the ends.
        "A": "$[1 + has(f'encoder.down.{i}.attn.0.norm.weight') for i in range(L)]",
        "E": "$[1 + len([0 for k in range(i) for _ in range(R * A[k] + 1)]) for i in range(L)]",
        "G": "$[4 + len([0 for k in range(i + 1, L) for _ in range((R + 1) * A[k] + 1)]) for i in range(L)]",
        "M": "$E[L - 1] + R * A[L - 1]",
        "O": "$G[0] + (R + 1) * A[0]",
    },
    "drop": [[r"loss\..*", "discriminator of the autoencoder's training"]],
    "rename": [
        [r"^(encoder|decoder)\.conv_in\.", "{_1}.blocks.0.conv."],
        [r"^encoder\.down\.(\d+)\.block\.(\d+)\.", "encoder.blocks.{E[_1] + _2 * A[_1]}."],
        [r"^encoder\.down\.(\d+)\.attn\.(\d+)\.", "encoder.blocks.{E[_1] + _2 * A[_1] + 1}."],
        [r"^encoder\.down\.(\d+)\.downsample\.", "encoder.blocks.{E[_1] + R * A[_1]}.conv."],
        [r"^encoder\.mid\.block_(\d)\.", "encoder.blocks.{M + 2 * _1 - 2}."],
        [r"^encoder\.mid\.attn_1\.", "encoder.blocks.{M + 1}."],
        [r"^encoder\.norm_out\.", "encoder.blocks.{M + 3}."],
        [r"^encoder\.conv_out\.", "encoder.blocks.{M + 5}.conv."],
        [r"^decoder\.mid\.block_(\d)\.", "decoder.blocks.{2 * _1 - 1}."],
        [r"^decoder\.mid\.attn_1\.", "decoder.blocks.2."],
        [r"^decoder\.up\.(\d+)\.block\.(\d+)\.", "decoder.blocks.{G[_1] + _2 * A[_1]}."],
        [r"^decoder\.up\.(\d+)\.attn\.(\d+)\.", "decoder.blocks.{G[_1] + _2 * A[_1] + 1}."],
        [r"^decoder\.up\.(\d+)\.upsample\.conv\.", "decoder.blocks.{G[_1] + (R + 1) * A[_1]}.postconv.conv."],
        [r"^decoder\.norm_out\.", "decoder.blocks.{O}."],
        [r"^decoder\.conv_out\.", "decoder.blocks.{O + 2}.conv."],
        [r"\.(conv1|conv2|nin_shortcut)\.", ".{_1}.conv."],
        [r"\.([qkv])\.(weight|bias)$", ".attn.to_{_1}.{_2}"],
        [r"\.proj_out\.", ".attn.out_proj."],
        [r"^quant_conv\.", "moments."],
        [r"^post_quant_conv\.", "post_quant_conv.conv."],
    ],
    "split": [{"key": "moments.", "into": ["quant_conv_mu.conv.", "quant_conv_log_sigma.conv."]}],
    "squeeze": [r".*\.attn\.(to_[qkv]|out_proj)\.weight"],
    "knobs": {
        "in_channels": "$shape('encoder.conv_in.weight', 1)",
        "out_channels": "$shape('decoder.conv_out.weight', 0)",
        "channels": "$[shape(f'encoder.down.{i}.block.0.conv1.weight', 0) for i in range(L)]",
        "num_res_blocks": "$R",
        "attention_levels": "$[a == 2 for a in A]",
        "latent_channels": "$shape('post_quant_conv.weight', 1)",
        "norm_num_groups": 32,
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# A file of networks, each below a prefix of its own; what is where stands in a bundle's import_rules.json

NETWORKS = {
    "unet": PLAIN_UNET,
    "attribute_unet": ATTRIBUTE_UNET,
    "autoencoder": AUTOENCODER,
    "codebook_autoencoder": VQ,
}


def by_networks(source: Mapping[str, Any], rules: Mapping[str, Any], given: Mapping[str, Any]) -> Foreign:
    """Read a file of one or more networks; every key belongs to one or is dropped for a reason.

    Args:
        source: the state dict.
        rules: of the bundle. ``networks`` maps a name to

            - ``prefix``: of its keys; ``rules``: its kind, a name in `NETWORKS`; ``fills``: component of the config.
            - ``knobs``: {the bundle's name: the one among the rules' knobs or constants}.
            - ``missing``: what to tell where the file has none of it; without it that is an error.
            - ``axes``: of each of our spatial axes its place among theirs; kernels are turned, so that the network
              is the same function of volumes in our order of axes.

            ``averages`` are the prefixes of weights and of their dotless averages, ``take`` the one asked for (default:
            the averages, where there are some). ``drop``, ``knobs`` and ``notes`` are for the whole file.
        given: the user's knobs, which win.
    """
    names, dropped, notes = _averaged(source, rules)
    left = dropped_keys(names, rules)
    names = {name: key for name, key in names.items() if not any(name in keys for keys in left.values())}
    dropped |= left
    found: dict[str, _Network] = {}
    for name, entry in rules["networks"].items():
        prefix = entry["prefix"]
        keys = {k.removeprefix(prefix): names.pop(k) for k in list(names) if k.startswith(prefix)}
        if keys:
            found[name] = _Network(name, entry, keys, source, given)
        elif "missing" in entry:
            notes.append(entry["missing"])
        else:
            raise CheckpointError(f"no {name} ({prefix}*) in the file, which begins {', '.join(list(source)[:3])}")
    if names:
        raise CheckpointError(
            f"{len(names)} keys belong to no network of the bundle ({', '.join(list(names.values())[:5])}); expected "
            f"{', '.join(entry['prefix'] + '*' for entry in rules['networks'].values())}"
        )
    read: dict[str, Any] = {}
    for network in found.values():
        read |= network.knobs()
        dropped |= network.dropped()
        notes += network.notes(given)
    return Foreign(
        knobs={**read, **read_knobs(source, rules, given)},
        fill={network.entry["fills"]: network.weights for network in found.values()},
        parts={name: Part(list(network.keys.values()), network.entry["fills"]) for name, network in found.items()},
        dropped=dropped,
        notes=(*notes, *rules.get("notes", [])),
    )


class _Network:
    """One network of a file, by its entry among the ``networks``."""

    def __init__(
        self, name: str, entry: dict, keys: dict[str, str], source: Mapping[str, Any], given: Mapping[str, Any]
    ) -> None:
        self.name, self.entry, self.keys = name, entry, keys
        self.state = {bare: source[key] for bare, key in keys.items()}
        shared = NETWORKS[entry["rules"]]
        self.constants: dict[str, Any] = shared["constants"]
        wanted = {theirs: given[ours] for ours, theirs in entry["knobs"].items() if ours in given}
        told = {theirs: value for theirs, value in wanted.items() if theirs in self.constants}
        self.rules = {**shared, "constants": {**self.constants, **told}}

    def knobs(self) -> dict[str, Any]:
        """Knobs in the bundle's names."""
        values = {**self.rules["constants"], **read_knobs(self.state, self.rules)}
        return {ours: values[theirs] for ours, theirs in self.entry["knobs"].items()}

    def dropped(self) -> dict[str, list[str]]:
        """Keys in the file that the rules leave out knowingly."""
        return {why: [self.keys[k] for k in keys] for why, keys in dropped_keys(self.state, self.rules).items()}

    def notes(self, given: Mapping[str, Any]) -> list[str]:
        """What was assumed."""
        assumed = {k: v for k, v in self.entry["knobs"].items() if v in self.constants and k not in given}
        return [
            f"{self.name}: the weights do not tell --{ours}, {self.constants[theirs]} is taken as published"
            for ours, theirs in assumed.items()
        ]

    def weights(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict that fills the network as it is built."""
        state = _translated(self.state, self.rules, target, f"{self.name} ({self.entry['prefix']}*)")
        axes = self.entry.get("axes", ())
        order = (0, 1, *(2 + axis for axis in axes))
        return {k: v.permute(order).contiguous() if axes and v.ndim == len(order) else v for k, v in state.items()}


def _averaged(
    source: Mapping[str, Any], rules: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    """Choose between weights and their averages -> {name: key in the file}, {reason: keys left out}, notes."""
    names = {key: key for key in source}
    if "averages" not in rules:
        return names, {}, []
    own, averaged = rules["averages"]
    weights, averages = ([k for k in source if k.startswith(prefix)] for prefix in (own, averaged))
    if rules.get("take") == own:
        reason = "averages of the weights: the weights themselves were asked for"
        return {k: k for k in source if k not in set(averages)}, {reason: averages}, []
    if not averages and rules.get("take") != averaged:
        return names, {}, ["the file has no averages of the weights: the weights themselves are taken"]
    twins = {k: averaged + k.removeprefix(own).replace(".", "") for k in weights}
    lost = [k for k, twin in twins.items() if twin not in source]
    if lost:
        raise CheckpointError(
            f"{len(lost)} weights have no average under {averaged} ({', '.join(lost[:5])}): take the weights "
            f"themselves by --select {own.rstrip('.')}, or the file as it was saved"
        )
    names = {k: twins.get(k, k) for k in source if k not in set(twins.values())}
    return names, {"the weights themselves: their averages are taken": weights}, []
