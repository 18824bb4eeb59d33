"""Text: a prompt becomes what a network attends to.

`HashedWords` needs nothing but the prompt: it numbers the words, and the network learns what they mean.
`PhraseEncoder` turns a phrase into one vector, `AttributeEncoder` what a report says into tokens. `CLIPText` is the
frozen encoder of Stable Diffusion 1.5, on which Siamese-Diffusion stands, `BERTText` one as GuideGen has it.
`CachedText` encodes each text once, and `Contextd` brings the result into a case.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor

from .io import CaseError, atomic_path
from .reports import ORGANS, READING, SITES, Attributes, Finding, parse_report

logger = logging.getLogger(__name__)

FIXED = 24  # numbers of a token of `AttributeEncoder` before its signs
# CT values (HU) between which a vessel of `PhraseEncoder` fills up: finer where tissues differ.
KNOTS = (-1000, -700, -400, -200, -100, -50, -20, 0, 20, 40, 60, 80, 100, 150, 200, 400, 1000)
HOUNSFIELD = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*hu\b")


class HashedWords:
    """Words as numbers, equal on every machine, so that any prompt works without a vocabulary file.

    The network owns the table of what the numbers mean, ``nn.Embedding(num_words, D)``. Few numbers let words collide:
    harmless for a handful of prompts, and more numbers cost little.

    Args:
        length: words of a prompt that count, L.
        num_words: size of the network's table; 0 is no word, words become 1 .. num_words - 1.

    Example:
        >>> HashedWords(length=4)("A polyp, a POLYP.").tolist()
        [101, 43, 101, 43]
    """

    def __init__(self, length: int = 8, num_words: int = 256) -> None:
        if length < 1 or num_words < 2:
            raise ValueError(f"length {length} and num_words {num_words} leave no room: give at least 1 and 2")
        self.length = length
        self.num_words = num_words
        self.description = f"HashedWords(length={length}, num_words={num_words})"
        self.told: set[str] = set()

    def __call__(self, text: str) -> Tensor:
        """Number the words of a prompt: (L,) integers, padded with 0; the empty prompt is all 0."""
        # Composed first: a letter and its accent apart would split the word.
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
        if lost := words[self.length :]:
            warn_cut(text, f"{self.length} words", " ".join(lost), self.told)
        numbers = [self.number(word) for word in words[: self.length]]
        return torch.tensor(numbers + [0] * (self.length - len(numbers)))

    def number(self, word: str) -> int:
        """The word's row in the network's table."""
        return 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % (self.num_words - 1)


class AttributeEncoder:
    """What a report says as tokens: one for each finding, one for sex and age. Neither wording nor order matters.

    Denials of a tumour in parts of the bowel are one denial of all, and say nothing beside a tumour that is there.

    Needs no weights: what is hashed is equal on every machine, and any noun has its own code. The empty report is all
    0, and so is each row that no finding fills. A token is, from its first number on:

    - 1 for a finding, 1 for the person
    - 4 for the state, one-hot: present, absent, enlarged, small
    - 1 where a size is given, and 8 that fill up with it, one after the other, from 0 to 10 cm
    - 2 for the sex, one-hot: male, female
    - 1 where an age is given, and 6 that fill up with it, from 0 to 90 years
    - of the rest one half each: signs (+1, -1) of ``what``, and of ``where``; no place is all 0

    Args:
        length: tokens, L. Findings of organs and tumours come first, should there be more.
        width: numbers of a token, D; more let fewer nouns resemble each other.
    """

    def __init__(self, length: int = 16, width: int = 64) -> None:
        if length < 1 or width < FIXED + 16:
            raise ValueError(f"length {length} and width {width} leave no room: give at least 1 and {FIXED + 16}")
        self.length = length
        self.width = width
        self.description = f"AttributeEncoder(length={length}, width={width}, reading={READING})"
        self.told: set[str] = set()

    def __call__(self, text: str) -> Tensor:
        """Encode a report: (L, D) float32."""
        attributes = parse_report(text)
        findings = sorted(_denials_as_one(attributes.findings), key=_rank)
        known = bool(attributes.sex) or attributes.age is not None
        tokens = [self.person(attributes)] * known + [self.finding(finding) for finding in findings]
        if lost := findings[max(0, self.length - known) :]:
            warn_cut(text, f"{self.length} tokens", "; ".join(f"{f.what} {f.state}" for f in lost), self.told)
        return torch.stack(tokens[: self.length] + [torch.zeros(self.width)] * (self.length - len(tokens)))

    def person(self, attributes: Attributes) -> Tensor:
        """Token of sex and age: (D,)."""
        sex = [float(attributes.sex == name) for name in ("male", "female")]
        age = [0.0] * 7 if attributes.age is None else [1.0, *_filled(attributes.age, 6, 90)]
        return self.padded([0.0, 1.0, *[0.0] * 13, *sex, *age])

    def finding(self, finding: Finding) -> Tensor:
        """Token of a finding: (D,)."""
        state = [float(finding.state == name) for name in ("present", "absent", "enlarged", "small")]
        size = [0.0] * 9 if finding.size_cm is None else [1.0, *_filled(finding.size_cm, 8, 10)]
        half = (self.width - FIXED) // 2
        return self.padded(
            [1.0, 0.0, *state, *size, *[0.0] * 9, *_signs(finding.what, half), *_signs(finding.where, half)]
        )

    def padded(self, numbers: list[float]) -> Tensor:
        """Fill up with 0 to the width: (D,)."""
        return torch.tensor(numbers + [0.0] * (self.width - len(numbers)))


class PhraseEncoder:
    """A phrase as one vector: a sum over its words, so that phrases which share words are near. Order does not matter.

    Needs no weights: what is hashed is equal on every machine. Every vector has the length sqrt(width); the empty
    phrase is all 0. A vector is, from its first number on:

    - 17 for a CT value, as in "57.0 HU": +1 where one is given, and 16 that go from -1 to +1 one after the other, from
      -1000 to 1000 HU, half of them between -100 and 200; without a CT value 0
    - of the rest the sum of the words' signs (+1, -1)

    Args:
        width: numbers of a vector, D; more let fewer words resemble each other.
    """

    def __init__(self, width: int = 64) -> None:
        if width < len(KNOTS) + 15:
            raise ValueError(f"width {width} leaves no room: give at least {len(KNOTS) + 15}")
        self.width = width
        self.description = f"PhraseEncoder(width={width})"

    def __call__(self, text: str) -> Tensor:
        """Encode a phrase: (D,) float32."""
        text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
        value = HOUNSFIELD.search(text)
        words = re.findall(r"[^\W_]+", HOUNSFIELD.sub(" ", text))
        signs = torch.tensor([_signs(word, self.width - len(KNOTS)) for word in words])
        numbers = self.value(float(value[1])) if value else [0.0] * len(KNOTS)
        rest = signs.sum(0) / math.sqrt(len(words)) if words else torch.zeros(self.width - len(KNOTS))
        vector = torch.cat([torch.tensor(numbers), rest])
        return vector * (math.sqrt(self.width) / vector.norm().clamp(min=1e-6))

    def value(self, number: float) -> list[float]:
        """Numbers of a CT value in HU."""
        filled = [(number - low) / (high - low) for low, high in itertools.pairwise(KNOTS)]
        return [1.0] + [2 * min(max(part, 0.0), 1.0) - 1 for part in filled]


def contexts_of(texts: Sequence[str], encoder: Callable[[str], Tensor], length: int | None = 10) -> Tensor:
    """What the network attends to, of several texts: their vectors, then zero rows, which say nothing.

    Args:
        texts: at most `length`.
        encoder: one text -> (D,), e.g. `PhraseEncoder` or a `CachedText`.
        length: rows, L; None has one for each text.

    Returns:
        (L, D)
    """
    if length is not None and len(texts) > length:
        raise ValueError(f"{len(texts)} texts for {length} rows: raise length, the last text is {texts[-1]!r:.60}")
    rows = [encoder(text) for text in texts]
    empty = torch.zeros_like(rows[0] if rows else encoder(""))
    count = len(rows) if length is None else length
    return torch.stack([*rows, *[empty] * (count + 1 - len(rows))])[:count]


class PretrainedText:
    """Tokens of a frozen text encoder of the package transformers: its last hidden state.

    Nothing is loaded before the first text, so behind a `CachedText` that holds all prompts no encoder is needed.

    Args:
        model: a folder, also of a whole pipeline in diffusers' layout, or an id on the Hugging Face hub. Caches know
            the encoder by this name.
        device: where the encoder runs; its tokens come back to the CPU.
        length: tokens of a prompt with its start, end and padding, L; None takes all that the encoder has.
    """

    tokenizer: str  # names of classes in transformers
    network: str
    padding: str | bool  # whether the network sees the padding; else rows of padding are 0

    def __init__(self, model: str, device: str | torch.device = "cpu", length: int | None = None) -> None:
        if length is not None and length < 3:
            raise ValueError(f"length {length} leaves no room between start and end: give at least 3, or None")
        self.model = model
        self.device = device
        self.length = length
        self.description = f"{type(self).__name__}(model={model!r}, length={length})"
        self.told: set[str] = set()

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Tokenizer and network."""
        tokenizer, network = load_encoder(self.model, self.tokenizer, self.network, self.device)
        if self.length is not None and self.length > network.config.max_position_embeddings:
            most = network.config.max_position_embeddings
            raise ValueError(
                f"text encoder {self.model} reads {most} tokens, length is {self.length}: set {most} or less"
            )
        return tokenizer, network

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """Encode a prompt: (L, D) float32 on the CPU."""
        tokenizer, network = self.loaded
        length = self.length or network.config.max_position_embeddings
        shape: dict[str, Any] = {"padding": self.padding, "truncation": True, "max_length": length}
        tokens = tokenizer([text], **shape, return_overflowing_tokens=True)["input_ids"]
        if len(tokens) > 1:
            lost = " ".join(tokenizer.batch_decode(tokens[1:], skip_special_tokens=True))
            warn_cut(text, f"{length} tokens", lost, self.told)
        # No attention mask: a network that shall not see the padding gets none.
        hidden = network(torch.tensor(tokens[:1], device=self.device)).last_hidden_state[0].cpu()
        return torch.nn.functional.pad(hidden, (0, 0, 0, length - len(hidden)))


class CLIPText(PretrainedText):
    """Tokens of a frozen CLIP text encoder: its last hidden state, normed, as Stable Diffusion 1.5 reads it.

    Stable Diffusion's padding is attended to, and has been trained so: its rows are tokens as all others.

    Args:
        model: folder of the encoder or of a whole Stable Diffusion in diffusers' layout, or an id on the Hugging Face
            hub; Stable Diffusion 1.5 has ``openai/clip-vit-large-patch14``. Caches know the encoder by this name.
        device: where the encoder runs; its tokens come back to the CPU.
        length: tokens of a prompt with its start, end and padding, L; None takes all that the encoder has (77).
    """

    tokenizer, network, padding = "CLIPTokenizer", "CLIPTextModel", "max_length"


class BERTText(PretrainedText):
    """Tokens of a frozen encoder of the family of BERT and ERNIE. Rows behind the last token are 0: they say nothing.

    Args:
        model: a folder, or an id on the Hugging Face hub. GuideGen's encoder reads Chinese reports; its public
            equivalent is ``nghuyong/ernie-health-zh``, 512 tokens of 768. Caches know the encoder by this name.
        device: where the encoder runs; its tokens come back to the CPU.
        length: tokens of a report with its start and end, L; None takes all that the encoder has.
    """

    tokenizer, network, padding = "AutoTokenizer", "AutoModel", False

    def __init__(self, model: str, device: str | torch.device = "cpu", length: int | None = 512) -> None:
        super().__init__(model, device, length)


class CachedText:
    """Encodes every text once: in memory, and with a path once for all runs that share the file.

    Call `encode_all` before a data loader forks: then its workers need no encoder, and the file is written once.

    Args:
        encoder: text -> tensor. With a path it needs a ``description`` that tells its results from other encoders'.
        path: the file, ``{sha256 of description and text: tensor}``; other encoders' entries may lie beside ours.
    """

    def __init__(self, encoder: Callable[[str], Tensor], path: str | os.PathLike | None = None) -> None:
        self.encoder = encoder
        self.path = None if path is None else Path(path)
        self.description = str(getattr(encoder, "description", ""))
        if self.path is not None and not self.description:
            raise ValueError(f"{encoder!r} has no description to tell its contexts in {path} from others': give it one")
        self.contexts = {} if self.path is None else read_contexts(self.path)

    def __call__(self, text: str) -> Tensor:
        """Encode a text, or recall what it was encoded to."""
        self.encode_all([text])
        return self.contexts[self.key(text)].clone()  # the caller's own, to change at will

    def key(self, text: str) -> str:
        """Name of a text's entry."""
        return hashlib.sha256(json.dumps([self.description, text]).encode()).hexdigest()

    def encode_all(self, texts: Iterable[str]) -> None:
        """Encode the texts that are new, and write the file once."""
        new = {key: text for text in texts if (key := self.key(text)) not in self.contexts}
        self.contexts |= {key: self.encoder(text).detach().cpu().clone() for key, text in new.items()}
        if new and self.path is not None:
            # What another run has written meanwhile stays. Two that write at the same moment lose no more than time.
            self.contexts = read_contexts(self.path) | self.contexts
            with atomic_path(self.path) as temporary:
                torch.save(self.contexts, temporary)


class Contextd(Transform):
    """Puts what the network attends to into a case, beside its prompt.

    Args:
        contexts: text -> tensor, e.g. `HashedWords` or `CachedText`.
        key: the case's text.
        output: name of the result.
        default: text of a case that has none.
    """

    def __init__(
        self, contexts: Callable[[str], Tensor], key: str = "prompt", output: str = "context", default: str = ""
    ) -> None:
        self.contexts = contexts
        self.key = key
        self.output = output
        self.default = default

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of the case with its context."""
        text = data.get(self.key, self.default)
        if not isinstance(text, str):
            raise CaseError(
                f"case {data.get('name', '')}: {self.key} is {text!r:.60}, expected text: correct its entry"
            )
        return {**data, self.output: self.contexts(text)}


def load_encoder(model: str, tokenizer: str, network: str, device: str | torch.device) -> tuple[Any, Any]:
    """Load a text encoder of the package transformers, frozen; weights left out or of another shape are an error.

    Args:
        model: a folder, also of a whole pipeline in diffusers' layout, or an id on the hub.
        tokenizer: name of the tokenizer's class in transformers.
        network: name of the network's class in transformers.
        device: where the network shall run.

    Returns:
        tokenizer, network
    """
    try:
        import transformers  # here, as only users of real encoders need the package
    except ImportError as error:
        raise RuntimeError(
            f"text encoder {model} needs the package transformers ({error}): pip install transformers==5.23.0 (see "
            "requirements-extras.txt), or do without: learned words (HashedWords), as the default config has them"
        ) from error
    kinds = (getattr(transformers, network), getattr(transformers, tokenizer))
    parts = [folder if (folder := Path(model) / part).is_dir() else model for part in ("text_encoder", "tokenizer")]
    # Whatever we do not accept is raised below; its table of a CLIP's unused picture half would only frighten.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        # The network first: without a connection the hub gives up on it after seconds, on a tokenizer after minutes.
        safely: dict[str, Any] = {"dtype": torch.float32, "weights_only": True, "ignore_mismatched_sizes": True}
        with torch.random.fork_rng(devices=[]):  # weights left out are drawn
            encoder, report = kinds[0].from_pretrained(parts[0], **safely, output_loading_info=True)
        words = kinds[1].from_pretrained(parts[1])
        # A BERT trained on gaps alone has no pooler, and the last hidden state does not pass it.
        missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        if wrong := [*missing, *report["mismatched_keys"], *report["error_msgs"]]:
            raise ValueError(f"{len(wrong)} weights are missing or of another shape, {wrong[0]}")
        # Without its files a tokenizer loads, too, and knows no word. Some networks have a few rows to spare.
        if not 0.9 * encoder.config.vocab_size <= len(words) <= encoder.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(words)} words, the network {encoder.config.vocab_size}")
    except Exception as error:  # transformers and its libraries raise any kind, even Exception itself
        raise ValueError(
            f"text encoder {model} cannot be loaded ({_reason(error)}): download it beforehand into a folder and give "
            "that with --text_encoder, or do without: contexts computed elsewhere (CachedText) or learned words"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return words, encoder.requires_grad_(False).eval().to(device)


def read_contexts(path: Path) -> dict[str, Tensor]:
    """Read a `CachedText`'s file, without running code; one that does not exist yet is empty."""
    if not path.exists():
        return {}
    kinds = (
        OSError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        entries = content.items() if isinstance(content, dict) else [("", content)]
        if not all(re.fullmatch("[0-9a-f]{64}", str(key)) and isinstance(value, Tensor) for key, value in entries):
            raise ValueError("it holds other things")
    except kinds as error:
        raise ValueError(
            f"{path} is no cache of texts, or a damaged one ({_reason(error)}): name another file, or delete this one "
            "if nothing else needs it, and the texts are encoded again"
        ) from error
    return content


def warn_cut(text: str, limit: str, lost: str, told: set[str]) -> None:
    """Say once for each text what of it the network will not see."""
    if text not in told:
        told.add(text)
        logger.warning(f"prompt {text!r:.80} has more than {limit}, cut off: {lost!r:.80}")


def _rank(finding: Finding) -> tuple:
    known = finding.what in ORGANS or finding.what == "tumour"
    return not known, finding.what, finding.where, finding.state, finding.size_cm or 0


def _denials_as_one(findings: Sequence[Finding]) -> list[Finding]:
    """Findings in which a tumour of the bowel is absent once or not at all."""
    bowel = ("", "colon", *SITES)
    kept = [f for f in findings if not (f.what == "tumour" and f.state == "absent" and f.where in bowel)]
    if len(kept) < len(findings) and not any(f.what == "tumour" and f.state != "absent" for f in kept):
        kept.append(Finding("tumour", "absent"))
    return kept


def _signs(word: str, count: int) -> list[float]:
    """Code of a word: +1 and -1, equal on every machine; of no word 0."""
    blocks = (hashlib.sha256(f"{block}/{word}".encode()).digest() for block in range(count // 256 + 1))
    bits = "".join(f"{byte:08b}" for byte in b"".join(blocks))
    return [float(2 * int(bit) - 1) if word else 0.0 for bit in bits[:count]]


def _filled(value: float, count: int, most: float) -> list[float]:
    """A number as a row of vessels that fill up one after the other: smooth, and near numbers are alike."""
    return [min(max(value / most * count - i, 0.0), 1.0) for i in range(count)]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
