"""BiomedCLIP's text tower: one text, one vector, as LesionDiffusion's networks are told each attribute.

PubMedBERT (a BERT of 12 x 768) reads the words, the state of its first token passes a projection without bias. It is
`torch.nn.TransformerEncoder` with other names of weights, so a folder of open_clip is read without open_clip.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import compare, read_weights
from .text import warn_cut

DOWNLOAD = (
    "download open_clip_config.json, open_clip_pytorch_model.bin, vocab.txt, tokenizer.json, tokenizer_config.json of "
    "huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 beforehand and name their folder, or do "
    "without: PhraseEncoder (common/text.py) needs no weights, as the default config has it"
)
FILES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors", "open_clip_model.safetensors")
WORDS = "embeddings.word_embeddings.weight"
# Hugging Face's name of a part of a layer -> torch's; query, key and value become one.
LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


class TextTower(nn.Module):
    """A BERT and its projection: token numbers (B, T), 0 behind the last, -> (B, D). Padding is not attended to.

    Args:
        num_words: rows of the table of words.
        length: most tokens of a text.
        width: of a token; a multiple of `heads`.
        layers: of the transformer.
        heads: of attention.
        hidden: width between the two linear layers of a block.
        projection: widths of the projection's hidden layer and of the result, D.
    """

    def __init__(
        self, num_words: int, length: int, width: int, layers: int, heads: int, hidden: int, projection: tuple[int, int]
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(num_words, width), nn.Embedding(length, width)
        self.kinds = nn.Embedding(2, width)  # of two sentences; ours are all the first
        self.norm = nn.LayerNorm(width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.proj = nn.Sequential(
            nn.Linear(width, projection[0], bias=False), nn.GELU(), nn.Linear(*projection, bias=False)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode texts: (B, T) integers -> (B, D)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.norm(self.words(tokens) + self.positions(places) + self.kinds.weight[0])
        padding = tokens == 0
        hidden = self.encoder(hidden, src_key_padding_mask=padding if padding.any() else None)
        return self.proj(hidden[:, 0])


class BiomedCLIPText:
    """Vectors of BiomedCLIP's frozen text tower: one text -> (D,) float32 on the CPU, D = 512; not normalised.

    Nothing is loaded before the first text, so behind a `CachedText` that holds all texts no weights are needed.

    Args:
        folder: in open_clip's layout: weights and the tokenizer's files. Caches know the encoder by this name.
        device: where the tower runs.
        length: most tokens of a text with its start and end.
        weights: another file that holds the tower, e.g. a LesionDiffusion checkpoint; the folder's if None.
        heads: of attention, which weights do not tell; None has them 64 wide, as every BERT.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        device: str | torch.device = "cpu",
        length: int = 256,
        weights: str | os.PathLike | None = None,
        heads: int | None = None,
    ) -> None:
        if length < 3:
            raise ValueError(f"length {length} leaves no room between start and end: give at least 3")
        self.folder = Path(folder)
        self.device = device
        self.length = length
        self.weights = None if weights is None else Path(weights)
        self.heads = heads
        source = f", weights={str(weights)!r}" * (weights is not None)
        self.description = f"BiomedCLIPText(folder={str(folder)!r}, length={length}{source})"
        self.told: set[str] = set()

    @functools.cached_property
    def loaded(self) -> tuple[Any, TextTower]:
        """Tokenizer and tower."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"BiomedCLIP's folder {self.folder} does not exist: {DOWNLOAD}")
        tower = read_tower(self.weights or weights_of(self.folder), self.heads)
        if self.length > tower.positions.num_embeddings:
            most = tower.positions.num_embeddings
            raise ValueError(f"the text tower reads {most} tokens, length is {self.length}: set {most} or less")
        tokenizer = read_tokenizer(self.folder)
        if len(tokenizer) > tower.words.num_embeddings:
            raise ValueError(
                f"the tokenizer in {self.folder} has {len(tokenizer)} words, the text tower "
                f"{tower.words.num_embeddings}: they belong to different models; {DOWNLOAD}"
            )
        return tokenizer, tower.to(self.device)

    def tokens(self, text: str) -> list[int]:
        """Numbers of a text's tokens, with start and end, without padding."""
        whole = self.loaded[0]([text], truncation=False)["input_ids"][0]
        if lost := whole[self.length - 1 : -1]:
            warn_cut(text, f"{self.length} tokens", self.loaded[0].decode(lost), self.told)
            return [*whole[: self.length - 1], whole[-1]]
        return whole

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """Encode a text: (D,)."""
        tokens = torch.tensor([self.tokens(text)], device=self.device)
        return self.loaded[1](tokens)[0].cpu()


def weights_of(folder: Path) -> Path:
    """The file of weights in a folder of open_clip's layout; another model's folder is refused."""
    config = folder / "open_clip_config.json"
    if config.is_file():
        text = json.loads(config.read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})
        kind = (text.get("hf_proj_type", "mlp"), text.get("hf_pooler_type"))
        if kind != ("mlp", "cls_last_hidden_state_pooler"):
            raise ValueError(f"{config} describes another text tower (projection and pooler {kind}): {DOWNLOAD}")
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(FILES)}: {DOWNLOAD}")
    return found


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder: WordPiece, lower case."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} holds neither tokenizer.json nor vocab.txt: {DOWNLOAD}")
    try:
        import transformers  # here, as only users of real encoders need the package
    except ImportError as error:
        raise RuntimeError(
            f"BiomedCLIP's tokenizer needs the package transformers ({error}): pip install transformers==5.23.0 (see "
            "requirements-extras.txt), or do without: PhraseEncoder, as the default config has it"
        ) from error
    return transformers.BertTokenizer.from_pretrained(str(folder))


def read_tower(path: str | os.PathLike, heads: int | None = None) -> TextTower:
    """The text tower in a file of open_clip's or LesionDiffusion's, in the size its weights have, frozen.

    Args:
        path: holds ``<any prefix>transformer.<BERT's names>`` and ``<the same prefix>proj.{0,2}.weight``.
        heads: of attention; None has them 64 wide.
    """
    content = read_weights(path)
    state = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    key = next((key for key in state if key.endswith(f"transformer.{WORDS}")), None)
    if key is None:
        begin = ", ".join(list(state)[:3])
        raise ValueError(f"{path} holds no BERT (no transformer.{WORDS}; it begins {begin}): {DOWNLOAD}")
    prefix = key.removesuffix(f"transformer.{WORDS}")
    try:
        ours = to_torch({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        tower = TextTower(**sizes(ours), heads=heads or max(1, ours["words.weight"].shape[1] // 64))
    except KeyError as error:
        raise ValueError(f"{path} lacks weights of the text tower ({error.args[0]}): {DOWNLOAD}") from error
    if problems := compare(ours, tower.state_dict()):
        raise ValueError(f"{path} holds another text tower: {problems}. {DOWNLOAD}")
    tower.load_state_dict(ours)
    return tower.requires_grad_(False).eval()


def to_torch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a tower by Hugging Face's names -> by ours; parts of CLIP that are no text tower are left out."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, part = key.rpartition(".")
        name = name.removeprefix("transformer.")
        if layer := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name):
            start, what = f"encoder.layers.{layer[1]}", layer[2]
            if what.startswith("attention.self."):
                if what.endswith(".query"):  # the three lie one below the other
                    rows = [state[key.replace(".query.", f".{other}.")] for other in ("query", "key", "value")]
                    ours[f"{start}.self_attn.in_proj_{part}"] = torch.cat(rows)
            else:
                ours[f"{start}.{LAYER.get(what, what)}.{part}"] = value
        elif table := re.fullmatch(r"embeddings\.(word|position|token_type)_embeddings", name):
            ours[{"word": "words", "position": "positions", "token_type": "kinds"}[table[1]] + f".{part}"] = value
        elif name == "embeddings.LayerNorm" or name.startswith("proj"):
            ours[f"{name.replace('embeddings.LayerNorm', 'norm')}.{part}"] = value
    return {name: value.float() for name, value in ours.items()}


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the `TextTower` that has these weights."""
    num_words, width = state["words.weight"].shape
    return {
        "num_words": num_words,
        "length": len(state["positions.weight"]),
        "width": width,
        "layers": sum(name.endswith(".linear1.weight") for name in state),
        "hidden": len(state["encoder.layers.0.linear1.weight"]),
        "projection": (len(state["proj.0.weight"]), len(state["proj.2.weight"])),
    }
