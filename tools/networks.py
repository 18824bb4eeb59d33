"""A bundle's networks: their shapes and sizes, MONAI's view of the workflows, exports, and the shipped weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow, ckpt_export, verify_net_in_out

from common.io import sha256
from tools.reading import FILLS, build, channels_of, configs, grid, parser, read

# Parameters of the published networks, by the configs that build them.
PAPER_PARAMETERS: dict[str, dict[tuple[str, ...], int]] = {
    "cmdm": {
        ("train", "paper"): 130_378_113,
        ("inference", "paper"): 130_378_113,
    },
    "lung_ddpm": {
        ("train", "paper"): 40_226_433,
        ("inference", "paper"): 40_226_433,
        ("train", "train_plus", "paper_plus"): 39_051_393,
        ("inference", "inference_plus", "paper_plus"): 39_051_393,
    },
    "guidegen": {
        ("train", "paper"): 267_541_124,
        ("inference", "paper"): 267_541_124,
        ("train", "pixel", "paper_pixel"): 172_883_713,
        ("inference", "pixel", "paper_pixel"): 172_883_713,
        ("train", "train_mask", "paper", "paper_mask", "unconditional"): 95_402_060,
        ("train", "train_mask", "paper", "paper_mask"): 115_439_308 + 40_946_688,
    },
    "lesion_diffusion": {
        ("train", "paper"): 187_503_365,
        ("inference", "paper"): 187_503_365,
        ("train", "train_mask", "paper", "paper_mask"): 2_527_489,
        ("train", "train_vq", "paper", "paper_vq"): 7_009_709,
    },
    "siamese_diffusion": {
        ("train", "paper"): 1_222_977_476,
        ("inference", "paper"): 1_222_977_476,
    },
}

MODELS = (".pt", ".ts", ".json")  # state dict, TorchScript, card or statistics
MAX_MODELS = 15_000_000  # bytes of all that lies in models/, as it is in git
IDS = ("bundle_root", "device", "dataset_dir", "output_dir", "seed", "network_def")  # in train.json and inference.json


def formats(bundle: Path) -> dict[str, dict[str, Any]]:
    """What metadata.json says of a network's tensors as ``X_data_format``, by its name in inference.json, ``X_def``."""
    meta, ending = read(bundle / "configs" / "metadata.json"), "_data_format"
    return {f"{key.removesuffix(ending)}_def": form for key, form in meta.items() if key.endswith(ending)}


def check_data_format(bundle: Path) -> list[str]:
    """Every ``*_data_format`` says what the knobs of inference.json say."""
    parsed, problems = parser(bundle, "inference"), []
    for component, form in formats(bundle).items():
        if component not in parsed:
            problems.append(f"metadata.json tells the data format of {component}, which inference.json does not have")
            continue
        pairs = zip((form["inputs"]["image"], form["outputs"]["pred"]), channels_of(build(parsed, network=component)))
        for entry, channels in pairs:
            told = {"num_channels": channels} | ({"spatial_shape": grid(parsed)} if component == "network_def" else {})
            wrong = {key: value for key, value in told.items() if entry[key] != value}
            problems += [f"{k} is {entry[k]} in metadata.json, {v} by inference.json" for k, v in wrong.items()]
            if len(entry.get("channel_def", {})) not in (0, entry["num_channels"]):
                problems.append(f"channel_def names {len(entry['channel_def'])} channels of {entry['num_channels']}")
    return problems


def check_paper(bundle: Path) -> list[str]:
    """The published networks build and run, without memory, and have the published number of parameters."""
    table = PAPER_PARAMETERS.get(bundle.name, {})
    named = {name for names in table for name in names}
    overlays = [p.stem for p in sorted((bundle / "configs").glob("paper*.json"))]
    problems = [f"{n}.json is not in PAPER_PARAMETERS of tools/networks.py" for n in overlays if n not in named]
    if problems:
        return problems
    for names, expected in table.items():
        parsed = parser(bundle, *names)
        network = build(parsed)
        size = grid(parsed)
        taken, given = channels_of(network)
        shape = _shape(network, (1, taken, *size))
        count = sum(p.numel() for p in network.parameters())
        if count != expected or shape != (1, given, *size):
            problems.append(f"{'+'.join(names)}: {count:,} parameters, expected {expected:,}; output {shape}")
    return problems


def check_properties(bundle: Path) -> list[str]:
    """MONAI finds every property of a training and of an inference workflow; asked at smoke size, as it builds them."""
    bases = configs(bundle)[0]
    problems = [f"{name}.json: no {key}" for name in ("train", "inference") for key in IDS if key not in bases[name]]
    if problems:  # which MONAI could not put into words
        return problems
    meta, logging_file = (str(bundle / "configs" / name) for name in ("metadata.json", "logging.conf"))
    for name, kind in (("train", "train"), ("inference", "infer")):
        files = [str(bundle / "configs" / f"{n}.json") for n in (name, "smoke")]
        with tempfile.TemporaryDirectory() as folder:
            places = {"bundle_root": str(bundle), "output_dir": folder, "device": "cpu"}
            # Nothing is loaded; but what lies beside the shipped weights may be read.
            places["weights"] = str(bundle / "models" / "model.pt")
            workflow = ConfigWorkflow(files, meta, logging_file, workflow_type=kind, **places)
            workflow.initialize()
            try:
                wrong = workflow.check_properties() or []
            except KeyError as error:  # MONAI's answer to a required one that is missing
                wrong = [str(error.args[0])]
            problems += [f"{name}.json: {w}" for w in wrong]
    return problems


def check_network(bundle: Path) -> list[str]:
    """A network turns one tensor of the shape in metadata.json into one of the other; MONAI's own check agrees."""
    meta, parsed = bundle / "configs" / "metadata.json", parser(bundle, "inference")
    for component, form in formats(bundle).items():
        entries = (form["inputs"]["image"], form["outputs"]["pred"])
        shapes = [(1, entry["num_channels"], *entry["spatial_shape"]) for entry in entries]
        shape = _shape(build(parsed, network=component), shapes[0])
        if shape != shapes[1]:
            return [f"{component} turns {shapes[0]} into {shape}, metadata.json says {shapes[1]}"]
    config = str(bundle / "configs" / "inference.json")
    verify_net_in_out("network_def", str(meta), config, device="cpu", bundle_root=str(bundle))
    return []


def _shape(network: torch.nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that a network on ``"meta"`` turns another into."""
    output = network(torch.empty(shape, device="meta"))
    return tuple((output[0] if isinstance(output, tuple) else output).shape)  # an autoencoder tells more


def check_export(bundle: Path) -> list[str]:
    """Exported, the network computes the same for any batch: by TorchScript, by `torch.export`, in models/model.ts.

    TorchScript is traced, by MONAI's ``ckpt_export``. Scripting, the zoo's default, is impossible for all of MONAI's
    diffusion networks ("cannot statically infer the expected size of a list").
    """
    parsed = parser(bundle, "inference")
    network = build(parsed, "cpu")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True))
    shape = (channels_of(network)[0], *[max(8, s // 8) for s in grid(parsed)])
    batches = [torch.rand(size, *shape) for size in (1, 3)]
    with torch.no_grad():
        for way, exported in _exports(bundle, network, *batches):
            pairs = [(exported(images), network(images)) for images in batches]
            if not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs):
                return [f"{way} computes something else than the network"]
    return []


def _exports(
    bundle: Path, network: torch.nn.Module, one: torch.Tensor, three: torch.Tensor
) -> Iterator[tuple[str, Any]]:
    """Yield (way, exported network)."""
    models = bundle / "models"
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "use_trace": True,
            "input_shape": one.shape,
            "converter_kwargs": {"check_trace": False},
        }
        options |= {"bundle_root": str(bundle), "device": "cpu"}
        files = (f"{folder}/model.ts", str(models / "model.pt"), None, str(bundle / "configs" / "inference.json"))
        ckpt_export("network_def", *files, **options)
        yield "TorchScript", torch.jit.load(files[0])
    if (models / "model.ts").is_file():
        yield "models/model.ts", torch.jit.load(models / "model.ts", map_location="cpu")
    batch = ({0: torch.export.Dim("batch")},)
    yield "torch.export", torch.export.export(network, (three,), dynamic_shapes=batch, strict=False).module()


def check_weights(bundle: Path) -> list[str]:
    """Shipped weights are small, plain, finite, fill their network and agree with their card ``models/<name>.json``."""
    problems = []
    held = [p for p in sorted((bundle / "models").rglob("*")) if p.is_file() and ".previous." not in p.name]
    found = [p for p in held if p.suffix == ".pt"]
    size = sum(p.stat().st_size for p in held)
    problems += [f"models/{p.name} is no {' or '.join(MODELS)}" for p in held if p.suffix not in MODELS]
    if size > MAX_MODELS:
        problems.append(f"models/ holds {size / 1e6:.1f} MB, more than {MAX_MODELS / 1e6:.0f} MB")
    bases, overlays = configs(bundle)
    for path in found:
        users = [(n, k) for n, c in {**bases, **overlays}.items() for k in FILLS if f"/{path.name}'" in str(c.get(k))]
        name, knob = users[0] if users else ("inference", "weights")
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            parsed = parser(bundle, "inference", *[name] * (name in overlays))
            build(parsed, network=FILLS[knob]).load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            problems.append(f"{path.name}: {' '.join(str(error).split())[:200]}")
        if not all(value.isfinite().all() for value in state.values()):
            problems.append(f"{path.name} holds NaN or infinity")
        card = path.with_suffix(".json")
        if not card.is_file():
            problems.append(f"{path.name} has no provenance card {card.name}")
        elif read(card).get("weights_sha256") != sha256(path):
            problems.append(f"weights_sha256 in {card.name} is not that of {path.name}")
    missing = [] if (bundle / "models" / "model.pt").is_file() else ["no weights models/model.pt"]
    return missing + problems
