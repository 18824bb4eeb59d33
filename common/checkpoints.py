"""Other people's weights into our networks: no code run, names translated by rules, every key accounted for.

`read_weights` opens a file, `CheckpointLoader` puts it into a network from a config, and `translate` turns a foreign
state dict into ours. All are strict both ways: a key left over, missing or of another shape is an error that lists it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.handlers
import torch
from ignite.engine import Engine
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MAX_BYTES = 8 * 2**30


class CheckpointError(ValueError):
    """A weights file is unusable or does not fit; the message names file, cause and fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_weights(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read tensors from a ``.safetensors`` or PyTorch file on the CPU; code inside a pickle is never run.

    Args:
        path: the file; nested dicts of tensors and plain values are kept as they are.
        max_bytes: refuse larger files, also when they unpack to more.

    Returns:
        what the file holds, usually ``{name: tensor}`` or such dicts one level down.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist: train first, fetch them, or run tools/import_weights.py")
    _check_file(path, max_bytes)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors: save a state dict")
    return dict(content)


def _check_file(path: Path, max_bytes: int) -> None:
    """Recognise, by size and first bytes, what is often saved in place of weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise CheckpointError(f"{path} is empty: the download failed, fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` or fetch the raw file")
    if head.startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, the download failed: fetch the raw file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    elif head.startswith(b"pk\x03\x04"):
        raise CheckpointError(f"{path} is cut off (a zip without its end): fetch it again")
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes, more than the limit of {max_bytes}: raise max_bytes")


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError  # here, as only users of this format need the package
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not in safetensors format ({error}): fetch it again") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is damaged or no PyTorch file: fetch it again") from error
        raise CheckpointError(
            f"{path} wants to run code ({wanted[1]}) and is refused: if you trust its author, save its plain tensors "
            "with torch.save(state_dict, ...) on a machine that may run that code"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is damaged, cut off or no PyTorch file ({reason}): fetch it again") from error


class CheckpointLoader(monai.handlers.CheckpointLoader):
    """MONAI's handler, but strict and telling: loads at the start of a run, and lists what does not fit.

    Arguments are MONAI's; `load_path` may be ``.safetensors``. The file holds a plain state dict, or one under the name
    used in `load_dict`, "model" or "state_dict". With ``strict=False`` whatever does not fit is skipped with a warning.
    """

    def __call__(self, engine: Engine) -> None:
        """Load every object of `load_dict`."""
        content = read_weights(self.load_path)
        for name, item in self.load_dict.items():
            nested = (content.get(k) for k in (name, "model", "state_dict"))
            inner = next((state for state in nested if isinstance(state, Mapping)), None)
            if inner is None and len(self.load_dict) > 1:
                raise CheckpointError(f"{self.load_path} has no entry {name!r}, only {', '.join(map(repr, content))}")
            state = content if inner is None else inner
            if isinstance(item, nn.Module):
                fill(unwrapped(item), state, self.load_path, strict=self.strict)
            else:
                item.load_state_dict(state)
        self.logger.info(f"Restored all variables from {self.load_path}")


def fill(network: nn.Module, state: Mapping[str, Any], path: str | os.PathLike | None, *, strict: bool = True) -> None:
    """Load weights that must fit, or, not `strict`, those that do; `path`, their file, is for the message."""
    target = network.state_dict()
    problems = compare(state, target)
    if problems and strict:
        raise CheckpointError(
            f"{path} does not fit the network: {problems}. Weights and knobs differ: pass the overlay "
            "that tools/import_weights.py wrote (models/imported.json), the knobs of that training, or train again"
        )
    if problems:
        logger.warning(f"{path} fits in part only: {problems}")
    network.load_state_dict({k: v for k, v in state.items() if _fits(v, target.get(k))}, strict=strict)


def filled(network: nn.Module, path: str | os.PathLike | bool | None) -> nn.Module:
    """The network with the weights of a file, which must fit; without a path (or False) as it is."""
    if path:
        fill(network, read_weights(str(path)), str(path))
    return network


def compare(state: Mapping[str, Any], target: Mapping[str, Tensor], origin: Mapping[str, str] | None = None) -> str:
    """Say in one line what keeps `state` from filling `target`; empty if it fits. `origin` maps names to the file's."""
    names = {k: k if origin is None or origin.get(k, k) == k else f"{k} from {origin[k]}" for k in state}
    found = {
        "missing": [k for k in target if k not in state],
        "unexpected": [names[k] for k in state if k not in target],
        "of another shape": [
            f"{names[k]} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__} for {tuple(target[k].shape)}"
            for k, v in state.items()
            if k in target and not _fits(v, target[k])
        ],
    }
    return "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in found.items() if keys)


def _fits(value: Any, target: Tensor | None) -> bool:
    return target is not None and isinstance(value, Tensor) and value.shape == target.shape


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel`` or ``DataParallel``, or the network itself."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return network.module if isinstance(network, parallel) else network


# ---------------------------------------------------------------------------------------------------------------------
# Renaming

# MONAI GenerativeModels 0.2.3. Its attention blocks own a `proj_attn` that their forward never applies, so it stays as
# drawn. MONAI's `load_old_state_dict` copies it into `out_proj`, which is applied: other outputs. Ours: identity.
MONAI_GENERATIVE: dict[str, Any] = {
    "select": ["state_dict", "model", ""],
    "drop": [[r".*\.proj_attn\.(weight|bias)", "never applied by generative's forward"]],
    "rename": [
        [r"^((?:.*\.)?(?:attentions\.\d+|attention|blocks\.\d+))\.(to_[qkv])\.", "{_1}.attn.{_2}."],
        [r"\.to_out\.0\.", ".out_proj."],
        [r"\.upsampler\.conv\.", ".upsampler.postconv."],
        [r"^(decoder\.blocks\.\d+)\.conv\.conv\.", "{_1}.postconv.conv."],
    ],
    "fill": [[r".*\.attn\.out_proj\.weight", "identity"], [r".*\.attn\.out_proj\.bias", "zeros"]],
    "knobs": {
        "channels": "$[shape(f'down_blocks.{i}.resnets.0.conv1.conv.weight', 0) for i in range(max(L, 1))]",
        "attention_levels": "$[has(f'down_blocks.{i}.attentions.0.norm.weight') for i in range(L)]",
        "num_res_blocks": "$R[0] if min(R) == max(R) else R",
        "norm_num_groups": 32,
    },
    "constants": {
        "L": r"$count(r'down_blocks\.\d+\.resnets\.0\.norm1\.weight')",
        "R": r"$[count(rf'down_blocks\.{i}\.resnets\.\d+\.norm1\.weight') for i in range(L)]",
    },
}


def select(content: Mapping[str, Any], rules: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Find the state dict inside a file -> (state dict, its name).

    ``"select"`` names the alternatives, first found first taken, ``""`` being the file's top level. ``"ema"``, e.g.
    ``["model.", "model_ema."]``, says under which prefixes weights and their dotless averaged twins lie, as in LDM.
    """
    found = {n: content if n == "" else content.get(n) for n in rules.get("select", [""])}
    usable = [n for n, v in found.items() if isinstance(v, Mapping) and any(isinstance(x, Tensor) for x in v.values())]
    if not usable:
        wanted = " or ".join(repr(n) if n else "its top level" for n in found)
        held = _some([repr(k) for k in content])
        raise CheckpointError(f"no weights under {wanted}; the file holds {held}: name one by --select")
    state = dict(found[usable[0]] or {})
    if "ema" in rules:
        plain, averaged = rules["ema"]
        twins = {k: averaged + k.removeprefix(plain).replace(".", "") for k in state if k.startswith(plain)}
        lost = [k for k, twin in twins.items() if twin not in state]
        if lost:
            raise CheckpointError(f"{len(lost)} weights have no average under {averaged} ({_some(lost)})")
        state = {k: state[twins[k]] if k in twins else v for k, v in state.items() if k not in set(twins.values())}
    return state, usable[0]


def translate(source: Mapping[str, Any], rules: Mapping[str, Any], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and squeeze a foreign state dict until it fills `target` exactly.

    Args:
        source: state dict of the reference implementation.
        rules: data from ``import_rules.json``, applied in this order. A ``"$..."`` string is an expression that may use
            ``shape(key, axis)``, ``value(key, index)``, ``has(key)``, ``count(regex)`` of the source and the constants
            before it.

            - ``constants``: ``{name: value}``.
            - ``drop``: ``[regex of a whole key, reason]``.
            - ``rename``: ``[regex, replacement]``, each applied to the result of those before; ``{...}`` in a
              replacement is an expression over constants and groups (``_1``, ``_2``, ...; digits are numbers).
            - ``split``: ``{"key": part of a name, "into": its replacements, "heads": 1}``; rows lie (head, part,
              channel); an expression for heads may use ``channels``.
            - ``squeeze``: regexes of whole keys that lose trailing axes of length one.
            - ``fill``: ``[regex of a whole key, "identity" or "zeros"]`` for what the source does not have.
        target: ``network.state_dict()``; gives names, order, shapes and types.

    Returns:
        a state dict that loads strictly.

    Example:
        >>> rules = {"rename": [["block(\\\\d)", "blocks.{_1 - 1}"]]}
        >>> list(translate({"block3.w": torch.ones(2)}, rules, {"blocks.2.w": torch.zeros(2)}))
        ['blocks.2.w']
    """
    scope = _scope(source, rules)
    dropped = {key for keys in dropped_keys(source, rules).values() for key in keys}
    result: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in source.items():
        if key in dropped:
            continue
        for name, part in _split(_rename(key, rules, scope), value, rules, scope).items():
            if name in result:
                raise CheckpointError(f"{origin[name]} and {key} both become {name}: the rules do not fit this file")
            origin[name] = key
            result[name] = _squeeze(part) if any(re.fullmatch(p, name) for p in rules.get("squeeze", [])) else part
    for pattern, how in rules.get("fill", []):
        for name in [n for n in target if n not in result and re.fullmatch(pattern, n)]:
            like = target[name]
            result[name] = torch.eye(*like.shape) if how == "identity" else torch.zeros(like.shape)
    problems = compare(result, target, origin)
    if problems:
        raise CheckpointError(f"the weights do not fill the network: {problems}. Check layout, --select and knobs")
    bad = [origin.get(n, n) for n, v in result.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise CheckpointError(f"{len(bad)} tensors hold NaN or infinity ({_some(bad)}): take another file")
    # Copies, so that nothing of the mapped file or of a shared storage stays behind.
    return {n: result[n].detach().to(v.dtype, copy=True).contiguous() for n, v in target.items()}


def from_monai_generative(source: Mapping[str, Any], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a MONAI GenerativeModels U-Net or autoencoder -> the one of MONAI's or ours."""
    return translate(source, MONAI_GENERATIVE, target)


def dropped_keys(source: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, list[str]]:
    """Say which source keys the rules leave out knowingly -> {reason: keys}."""
    dropped: dict[str, list[str]] = {}
    for key in source:
        reason = next((why for pattern, why in rules.get("drop", []) if re.fullmatch(pattern, key)), None)
        if reason is not None:
            dropped.setdefault(reason, []).append(key)
    return dropped


def read_knobs(
    source: Mapping[str, Any], rules: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a network's knobs off its weights.

    Args:
        source: state dict of the reference implementation.
        rules: ``"knobs"`` maps names to values or ``"$..."`` expressions; null marks what the user must give.
        given: the user's values, which win.

    Returns:
        {knob: value}
    """
    given = dict(given or {})
    scope = _scope(source, rules)
    knobs = {k: given[k] if k in given else _evaluate(v, scope) for k, v in rules.get("knobs", {}).items()}
    unknown = [k for k, v in knobs.items() if v is None]
    if unknown:
        raise CheckpointError(f"the weights do not tell {', '.join(unknown)}: give --{unknown[0]} as in their training")
    return {**knobs, **given}


@dataclass(frozen=True)
class Part:
    """A piece of a foreign checkpoint: its keys in the file, and the component (and prefix of names there) it fills."""

    keys: list[str]
    component: str = "network_def"
    prefix: str = ""


@dataclass(frozen=True)
class Foreign:
    """What a foreign checkpoint gives to a bundle, as the reader of its layout sees it.

    Args:
        knobs: values for the bundle's config, the user's among them.
        fill: component of the config -> maker of its weights out of those of the network as it is built.
        parts: name -> its keys and where they go.
        dropped: reason -> keys that are left out knowingly.
        notes: what the file lacks, and what the user does about it.
        ready: False where the network must be trained before it is of use.
    """

    knobs: dict[str, Any]
    fill: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]
    parts: dict[str, Part]
    dropped: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    ready: bool = True


def by_rules(source: Mapping[str, Any], rules: Mapping[str, Any], given: Mapping[str, Any]) -> Foreign:
    """Read one network's weights by rules that fit all of it."""
    return Foreign(
        knobs=read_knobs(source, rules, given),
        fill={"network_def": lambda target: translate(source, rules, target)},
        parts={"network": Part(list(source))},
        dropped=dropped_keys(source, rules),
    )


def _scope(source: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """Names that the rules' expressions may use: a few functions over the source, then the constants."""

    def find(key: str) -> str | None:
        return next((k for k in source if k == key or k.endswith(f".{key}")), None)

    def tensor(key: str) -> Tensor:
        name = find(key)
        if name is None:
            begin = _some(list(source), 3)
            raise CheckpointError(f"no {key} among the weights, which begin {begin}: another layout or file")
        return source[name]

    def shape(key: str, axis: int) -> int:
        return int(tensor(key).shape[axis])

    def value(key: str, index: int = 0) -> float:
        return float(f"{tensor(key).flatten()[index].item():.6g}")  # the digits that float32 holds

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, k)) for k in source)

    functions: dict[str, Callable] = {"shape": shape, "value": value, "count": count}
    functions["has"] = lambda key: find(key) is not None
    scope: dict[str, Any] = {"__builtins__": {"range": range, "len": len, "max": max, "min": min}, **functions}
    for name, constant in rules.get("constants", {}).items():
        scope[name] = _evaluate(constant, scope)
    return scope


def _evaluate(value: Any, scope: dict[str, Any]) -> Any:
    """Evaluate a ``"$..."`` string, MONAI's mark of an expression; rules belong to the bundle, as its configs do."""
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    try:
        return eval(value[1:], scope)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"rule {value} fails on these weights ({error}): another layout or file") from error


def _rename(key: str, rules: Mapping[str, Any], scope: dict[str, Any]) -> str:
    for pattern, replacement in rules.get("rename", []):

        def expand(match: re.Match, replacement: str = replacement) -> str:
            groups = {f"_{n}": int(g) if g and g.isdigit() else g or "" for n, g in enumerate(match.groups(), 1)}
            return re.sub(r"\{(.+?)\}", lambda part: str(_evaluate(f"${part[1]}", {**scope, **groups})), replacement)

        key = re.sub(pattern, expand, key)
    return key


def _split(key: str, value: Any, rules: Mapping[str, Any], scope: dict[str, Any]) -> dict[str, Any]:
    """Cut a combined projection into its parts; one of any other name comes back as it is."""
    for rule in rules.get("split", []):
        into = rule["into"]
        if rule["key"] in key and isinstance(value, Tensor) and value.ndim:
            heads = _evaluate(rule.get("heads", 1), {**scope, "channels": value.shape[0] // len(into)})
            if value.shape[0] % (heads * len(into)):
                raise CheckpointError(f"{key}: {value.shape[0]} rows are no multiple of {len(into)} x {heads} heads")
            parts = value.reshape(heads, len(into), -1, *value.shape[1:]).unbind(1)
            return {key.replace(rule["key"], n): p.flatten(0, 1) for n, p in zip(into, parts, strict=True)}
    return {key: value}


def _squeeze(value: Any) -> Any:
    while isinstance(value, Tensor) and value.ndim > 2 and value.shape[-1] == 1:
        value = value.squeeze(-1)
    return value
