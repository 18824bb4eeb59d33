"""Texts become what networks attend to: numbered words, findings, tokens of encoders made on the spot; their cache."""

from __future__ import annotations

import doctest
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import common.text
from common.io import CaseError
from common.reports import Attributes, Finding, write_report
from common.text import (
    AttributeEncoder,
    BERTText,
    CachedText,
    CLIPText,
    Contextd,
    HashedWords,
    PhraseEncoder,
    contexts_of,
)

PROMPTS = ["", "a polyp", "A photo of a polyp.", "polyp of a photo"]


class Counting:
    """An encoder that counts its calls."""

    def __init__(self, description: str = "counting") -> None:
        self.description = description
        self.calls: list[str] = []

    def __call__(self, text: str) -> torch.Tensor:
        self.calls.append(text)
        return torch.full((2, 3), float(len(text)))


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_example():
    assert doctest.testmod(common.text).failed == 0


def test_words_are_numbers_of_the_table():
    numbers = HashedWords(length=64, num_words=7)(" ".join(f"word{i}" for i in range(64)))
    assert numbers.dtype == torch.long
    assert numbers.shape == (64,)
    assert set(numbers.tolist()) == set(range(1, 7)), "every row is used, and 0 is no word"


def test_same_word_same_number_anywhere():
    words = HashedWords()
    a, polyp = words("a polyp")[:2]
    assert words("Polyp, POLYP - pOlYp!").tolist() == [polyp] * 3 + [0] * 5
    assert words("polyp a").tolist() != words("a polyp").tolist()
    assert torch.equal(words("a polyp"), HashedWords()("  A  Polyp."))
    assert [int(a), int(polyp)] == [101, 43], "the same on each machine, as trained tables rely on it"


@pytest.mark.parametrize("text", ["", "  ", "...!?"])
def test_the_empty_prompt_is_all_zero(text):
    assert HashedWords()(text).tolist() == [0] * 8


@pytest.mark.parametrize(
    ("one", "other"),
    [("GRÜN", "gru\u0308n"), ("Straße", "STRASSE"), ("Ελικοσ", "ΕΛΙΚΟΣ"), ("息肉", "息肉"), ("ＣＴ", "ct")],  # noqa: RUF001
)
def test_unicode(one, other):
    words = HashedWords()
    assert torch.equal(words(one), words(other))
    assert (words(one) > 0).sum() == 1


def test_a_cut_prompt_is_told_once(caplog):
    words = HashedWords(length=2)
    for _ in range(3):
        assert torch.equal(words("a small polyp here"), words("a small"))
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'a small polyp here' has more than 2 words, cut off: 'polyp here'"
    ]
    words("a large polyp")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("settings", [{"length": 0}, {"num_words": 1}])
def test_impossible_tables(settings):
    with pytest.raises(ValueError, match="leave no room"):
        HashedWords(**settings)


def test_descriptions_tell_settings_apart():
    encoders = [HashedWords(), HashedWords(9), HashedWords(8, 9), CLIPText("a"), CLIPText("b"), CLIPText("a", length=9)]
    encoders += [
        BERTText("a"),
        BERTText("a", length=9),
        AttributeEncoder(),
        AttributeEncoder(9),
        AttributeEncoder(9, 80),
    ]
    assert len({encoder.description for encoder in encoders}) == 11
    assert CLIPText("a", device="cuda").description == CLIPText("a").description


# ---------------------------------------------------------------------------------------------------------------------
# What a report says

SAME = [
    "Male, 63. The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
    "No ascites; rectal tumour measuring 35 x 20 mm, splenomegaly, status post left nephrectomy in a 63-year-old man.",
    "男，63岁。直肠见肿块，大小约3.5 cm。左肾切除术后。脾大。未见腹水。",  # noqa: RUF001
]
OTHERS = [
    "Female, 63. The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
    "Male, 64. The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
    "Male, 63. The spleen is small. The left kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
    "Male, 63. The spleen is enlarged. The right kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
    "Male, 63. The spleen is enlarged. The left kidney is absent. A mass of 3.6 cm in the rectum. No ascites.",
    "Male, 63. The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the caecum. No ascites.",
    "Male, 63. The spleen is enlarged. The left kidney is absent. A mass in the rectum. No ascites.",
    "Male, 63. The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the rectum.",
    "The spleen is enlarged. The left kidney is absent. A mass of 3.5 cm in the rectum. No ascites.",
]


def test_wording_order_and_language_do_not_matter():
    encode = AttributeEncoder()
    tokens = encode(SAME[0])
    assert tokens.shape == (16, 64)
    assert tokens.dtype == torch.float32
    assert (tokens != 0).any(dim=1).tolist() == [True] * 5 + [False] * 11, "a person, four findings, padding"
    assert all(torch.equal(encode(text), tokens) for text in SAME)


def test_whatever_is_said_matters():
    encode = AttributeEncoder()
    tokens = [encode(text) for text in [SAME[0], *OTHERS]]
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == len(tokens)
    # And nothing else changes: all but one row stay.
    rows = [{tuple(row) for row in t.tolist()} for t in tokens]
    assert all(len(rows[0] - other) <= 1 for other in rows)


def test_order_of_random_findings_does_not_matter():
    rng = np.random.default_rng(0)
    names = ("spleen", "liver", "kidney_left", "stomach", "urinary_bladder")
    for _ in range(20):
        findings = [Finding(name, str(rng.choice(["enlarged", "small", "present"]))) for name in names]
        findings.append(Finding("tumour", where="rectum", size_cm=3.0))
        for language in ("en", "zh"):
            one, other = (write_report(Attributes(tuple(findings), "male", 50), language, rng) for _ in range(2))
            assert torch.equal(AttributeEncoder()(one), AttributeEncoder()(other)), (one, other)


@pytest.mark.parametrize("text", ["", "  ", "...", "\n", "The scan was done."])
def test_nothing_said_is_all_zero(text):
    assert not AttributeEncoder()(text).any()


def test_layout_of_a_token():
    person, finding = AttributeEncoder(length=2, width=40)("Male, 45. A mass of 2.5 cm.")
    assert person[:16].tolist() == [0, 1] + [0] * 13 + [1]
    assert person[16:24].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert not person[24:].any()
    assert finding[:6].tolist() == [1, 0, 1, 0, 0, 0]
    assert finding[6:15].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert not finding[15:24].any()
    assert set(finding[24:32].abs().tolist()) == {1}
    assert not finding[32:].any(), "no place"
    for k, state in enumerate(["A mass", "No mass", "Enlarged spleen", "Small spleen"]):
        assert AttributeEncoder()(state)[0, 2:6].tolist() == [float(i == k) for i in range(4)]


def test_sizes_and_ages_are_smooth():
    encode = AttributeEncoder()
    sizes = torch.stack([encode(f"A mass of {size / 10:.1f} cm.")[0] for size in range(0, 130)])
    steps = (sizes[1:] - sizes[:-1]).abs().sum(dim=1)
    torch.testing.assert_close(steps[:99], torch.full((99,), 0.08), rtol=0, atol=1e-5)
    assert not steps[100:].any(), "larger than 10 cm is 10 cm"
    ages = torch.stack([encode(f"{age} years old")[0] for age in range(1, 120)])
    assert ((ages[1:] - ages[:-1]).abs().sum(dim=1)[:88] > 0.05).all()


def test_any_noun_has_a_code():
    encode = AttributeEncoder()
    nouns = [
        "gallstones",
        "free fluid",
        "lymphadenopathy",
        "pneumonia",
        "hernia",
        "stent",
        "abscess",
        "腹股沟疝",
        "polyp",
    ]
    tokens = [encode(f"No {noun}.")[0] for noun in nouns]
    for i, one in enumerate(tokens):
        assert one[3] == 1, "absent"
        for other in tokens[:i]:
            assert (one != other).sum() >= 2
    assert torch.equal(encode("No hernia.")[0, 24:], encode("There is a hernia.")[0, 24:])
    wide = [AttributeEncoder(width=1024)(f"No {noun}.")[0, 24:524] for noun in nouns]
    close = torch.stack(wide) @ torch.stack(wide).T / 500
    assert (close - torch.eye(len(nouns))).abs().max() < 0.25, "codes are next to orthogonal"


def test_equal_in_every_process():
    code = (
        "import hashlib; from common.text import AttributeEncoder\n"
        f"print(hashlib.sha256(AttributeEncoder()({SAME[0]!r}).numpy().tobytes()).hexdigest())"
    )
    repo = Path(common.text.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    here = hashlib.sha256(AttributeEncoder()(SAME[0]).numpy().tobytes()).hexdigest()
    assert run.stdout.strip() == here, run.stderr
    bits = AttributeEncoder()(SAME[0])[1, 24:44]
    assert "".join("+" if bit > 0 else "-" for bit in bits) == "+----+++--+--+++---+", "trained networks rely on it"


def test_too_many_findings(caplog):
    text = "Male. Gallstones. Ascites. The spleen is enlarged. A mass in the rectum."
    encode = AttributeEncoder(length=3)
    for _ in range(2):
        assert torch.equal(encode(text), AttributeEncoder()("Male. The spleen is enlarged. A mass in the rectum.")[:3])
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt {text!r} has more than 3 tokens, cut off: 'ascites present; gallstones present'"
    ]


@pytest.mark.parametrize("settings", [{"length": 0}, {"width": 39}])
def test_impossible_tokens(settings):
    with pytest.raises(ValueError, match="leave no room: give at least 1 and 40"):
        AttributeEncoder(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a random CLIP text encoder with byte pairs for "polyp", and the encoder itself."""
    transformers = pytest.importorskip("transformers", reason="transformers (requirements-extras.txt) is not installed")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "po", "ly", "poly", "polyp</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\np o\nl y\npo ly\npoly p</w>\n")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = transformers.CLIPTextConfig(vocab_size=len(words), projection_dim=32, **size, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.CLIPTextModel(config).eval()
    network.save_pretrained(folder)
    return folder, network


@pytest.fixture
def heard(caplog, monkeypatch):
    """Records of transformers, too, which speaks past the root logger."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.fixture
def copy(clip, tmp_path):
    """A folder of one's own to break."""
    return Path(shutil.copytree(clip[0], tmp_path / "clip"))


def test_last_hidden_state_of_the_padded_prompt(clip):
    folder, network = clip
    vocabulary = json.loads((folder / "vocab.json").read_text())
    encode = CLIPText(str(folder))
    for text, words in (("", []), ("A  polyp", ["a</w>", "polyp</w>"]), ("polyp.", ["polyp</w>", ".</w>"])):
        ids = [vocabulary[word] for word in ["<|startoftext|>", *words, "<|endoftext|>"]]
        ids += [vocabulary["<|endoftext|>"]] * (77 - len(ids))
        with torch.no_grad():
            expected = network(torch.tensor([ids])).last_hidden_state[0]
        tokens = encode(text)
        assert tokens.shape == (77, 32)
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    assert tokens.mean(-1).abs().max() < 1e-5, "after the final norm"


def test_frozen_and_silent(clip, heard):
    state = torch.get_rng_state()
    encode = CLIPText(str(clip[0]))
    tokens = encode("a polyp")
    assert torch.equal(state, torch.get_rng_state()), "a run draws the same with and without a cache"
    assert not tokens.requires_grad
    assert not encode.loaded[1].training
    assert not [p for p in encode.loaded[1].parameters() if p.requires_grad or p.dtype != torch.float32]
    assert torch.equal(tokens, encode("a polyp"))
    assert not heard.records


def test_diffusers_layout(clip, tmp_path):
    for part, files in (
        ("tokenizer", ("vocab.json", "merges.txt")),
        ("text_encoder", ("config.json", "*.safetensors")),
    ):
        (tmp_path / part).mkdir()
        for file in (file for pattern in files for file in clip[0].glob(pattern)):
            shutil.copy(file, tmp_path / part)
    assert torch.equal(CLIPText(str(tmp_path))("a polyp"), CLIPText(str(clip[0]))("a polyp"))


def test_weights_as_published(clip, copy, heard):
    """Stable Diffusion 1.5 has a prefix, half precision, a table of positions; OpenAI's file the picture half, too."""
    path = copy / "model.safetensors"
    ours = load_file(path)
    theirs = {f"text_model.{name}": value.half() for name, value in ours.items()}
    theirs |= {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    theirs |= {"logit_scale": torch.ones(()), "vision_model.embeddings.class_embedding": torch.ones(32)}
    save_file(theirs, path, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    encode = CLIPText(str(copy))
    torch.testing.assert_close(encode("a polyp"), CLIPText(str(clip[0]))("a polyp"), rtol=0, atol=0.02)
    assert encode("a polyp").dtype == torch.float32
    assert not heard.records
    # An older file, a pickle: read as plain tensors.
    path.unlink()
    torch.save({f"text_model.{name}": value for name, value in ours.items()}, copy / "pytorch_model.bin")
    assert torch.equal(CLIPText(str(copy))("a polyp"), CLIPText(str(clip[0]))("a polyp"))


def test_a_cut_prompt_says_what_is_lost(clip, caplog):
    encode = CLIPText(str(clip[0]), length=5)
    for _ in range(2):
        assert torch.equal(encode("a polyp a polyp . a"), encode("a polyp a"))
    assert encode("a polyp a").shape == (5, 32)
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'a polyp a polyp . a' has more than 5 tokens, cut off: 'polyp . a'"
    ]
    full = CLIPText(str(clip[0]))
    assert torch.equal(full("polyp " * 75), full("polyp " * 76))
    assert len(caplog.records) == 2


def test_impossible_lengths(clip):
    with pytest.raises(ValueError, match="at least 3"):
        CLIPText("any", length=2)
    with pytest.raises(ValueError, match="reads 77 tokens, length is 78: set 77 or less"):
        CLIPText(str(clip[0]), length=78)("")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    encode = CLIPText("openai/clip-vit-large-patch14")
    with pytest.raises(RuntimeError, match=r"pip install transformers==5\.23\.0 .*learned words \(HashedWords\)"):
        encode("a polyp")


WAYS_OUT = r"download it beforehand .*--text_encoder, or do without: .*\(CachedText\) or learned words"


def test_missing_folder(clip, tmp_path):
    with pytest.raises(ValueError, match=rf"text encoder {tmp_path}/none cannot be loaded \(.+\): {WAYS_OUT}"):
        CLIPText(f"{tmp_path}/none")("")


def test_no_connection(clip, monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nRead this and that page.")

    asked = []
    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", offline)
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", lambda *args: asked.append(args))
    with pytest.raises(
        ValueError, match=rf"openai/clip cannot be loaded \(We couldn't connect to the hub\.\): {WAYS_OUT}"
    ):
        CLIPText("openai/clip")("")
    assert not asked, "the hub's tokenizers take minutes to give up"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("config.json", "model.safetensors") for content in (None, b"", b"<html>")),
        *((name, content) for name in ("vocab.json", "merges.txt") for content in (None, b"<html>")),
        ("config.json", b"{}"),
        ("vocab.json", b"{}"),
    ],
)
def test_broken_folder(copy, name, content):
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"text encoder {copy} cannot be loaded \(.+\): {WAYS_OUT}"):
        CLIPText(str(copy))("")


def test_half_an_encoder_is_refused(copy):
    path = copy / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "final" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="2 weights are missing or of another shape, final_layer_norm"):
        CLIPText(str(copy))("")
    save_file(weights, path, metadata={"format": "pt"})
    (copy / "vocab.json").unlink()
    (copy / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"the tokenizer has \d words, the network 194"):
        CLIPText(str(copy))("")


def test_code_in_weights_is_not_run(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (copy / "model.safetensors").unlink()
    torch.save({"text_model.final_layer_norm.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        CLIPText(str(copy))("")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# BERT


WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"左右肾脾脏缺如增大。",
    "the",
    "spleen",
    "is",
    "en",
    "##larged",
    ".",
]


@pytest.fixture(scope="module", params=["Bert", "Ernie"])
def bert(request, tmp_path_factory):
    """Folder of a random encoder without its pooler, as published ones are, and the encoder itself."""
    transformers = pytest.importorskip("transformers", reason="transformers (requirements-extras.txt) is not installed")
    if not hasattr(transformers, f"{request.param}Model"):
        pytest.skip(f"this transformers has no {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=len(WORDS) + 1, max_position_embeddings=40, **size
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(transformers, f"{request.param}Model")(config, add_pooling_layer=False).eval()
    network.save_pretrained(folder)
    return folder, network


def test_last_hidden_state_and_nothing_behind(bert):
    folder, network = bert
    encode = BERTText(str(folder), length=20)
    for text, words in (
        ("", []),
        ("The spleen is ENLARGED.", ["the", "spleen", "is", "en", "##larged", "."]),
        ("左肾缺如。脾脏增大", [*"左肾缺如。脾脏增大"]),
        ("spleen 肝", ["spleen", "[UNK]"]),
    ):
        ids = torch.tensor([[WORDS.index(word) for word in ["[CLS]", *words, "[SEP]"]]])
        count = ids.shape[1]
        padded = torch.nn.functional.pad(ids, (0, 20 - count))
        with torch.no_grad():
            expected = network(ids).last_hidden_state[0]
            masked = network(padded, attention_mask=(padded > 0).long()).last_hidden_state[0, :count]
        tokens = encode(text)
        assert tokens.shape == (20, 32)
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens[:count], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:count], masked, rtol=0, atol=1e-5)
        assert not tokens[count:].any()


def test_bert_is_frozen_and_silent(bert, heard):
    state = torch.get_rng_state()
    encode = BERTText(str(bert[0]), length=20)
    tokens = encode("the spleen")
    assert torch.equal(state, torch.get_rng_state()), "a run draws the same with and without a cache"
    assert not tokens.requires_grad
    assert not encode.loaded[1].training
    assert not [p for p in encode.loaded[1].parameters() if p.requires_grad or p.dtype != torch.float32]
    assert torch.equal(tokens, encode("the spleen"))
    assert not heard.records


def test_a_cut_report_says_what_is_lost(bert, caplog):
    encode = BERTText(str(bert[0]), length=5)
    for _ in range(2):
        assert torch.equal(encode("脾脏缺如增大"), encode("脾脏缺"))
    assert [record.getMessage() for record in caplog.records] == [
        "prompt '脾脏缺如增大' has more than 5 tokens, cut off: '如 增 大'"
    ]
    assert BERTText(str(bert[0]), length=None)("脾").shape == (40, 32)


def test_bert_lengths(bert):
    with pytest.raises(ValueError, match="at least 3"):
        BERTText("any", length=2)
    with pytest.raises(ValueError, match="reads 40 tokens, length is 512: set 40 or less"):
        BERTText(str(bert[0]))("")


@pytest.mark.parametrize("broken", ["vocab.txt", "model.safetensors", "config.json", "half"])
def test_broken_bert(bert, tmp_path, broken):
    folder = Path(shutil.copytree(bert[0], tmp_path / "bert"))
    if broken == "half":
        weights = load_file(folder / "model.safetensors")
        weights = {k: v for k, v in weights.items() if "layer.1" not in k}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / broken).unlink()
    with pytest.raises(ValueError, match=rf"text encoder {folder} cannot be loaded \(.+\): {WAYS_OUT}"):
        BERTText(str(folder), length=20)("")


def test_bert_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"text encoder nghuyong/ernie-health-zh needs the package transformers"):
        BERTText("nghuyong/ernie-health-zh")("脾大")


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def test_each_text_is_encoded_once(tmp_path):
    path = tmp_path / "new" / "contexts.pt"
    first, second = Counting(), Counting()
    contexts = CachedText(first, path)
    for text in [*PROMPTS, *PROMPTS]:
        assert torch.equal(contexts(text), Counting()(text))
    assert first.calls == PROMPTS
    again = CachedText(second, str(path))
    assert all(torch.equal(again(text), contexts(text)) for text in PROMPTS)
    assert second.calls == []
    assert [file.name for file in path.parent.iterdir()] == ["contexts.pt"]


def test_in_memory_any_function_will_do():
    contexts = CachedText(lambda text: torch.ones(2, requires_grad=True) * len(text))
    assert contexts("abc").tolist() == [3, 3]
    assert not contexts("abc").requires_grad
    contexts("abc").zero_()
    assert contexts("abc").tolist() == [3, 3], "callers cannot change the cache"


def test_all_at_once_is_written_once(tmp_path, monkeypatch):
    encoder, saved = Counting(), []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (saved.append(1), save(*args)))
    contexts = CachedText(encoder, tmp_path / "contexts.pt")
    contexts.encode_all(iter([*PROMPTS, *PROMPTS]))
    contexts.encode_all(PROMPTS)
    assert encoder.calls == PROMPTS
    assert len(saved) == 1


def test_encoders_share_a_file(tmp_path):
    path = tmp_path / "contexts.pt"
    one, other = CachedText(Counting("one"), path), CachedText(HashedWords(), path)
    one.encode_all(PROMPTS)
    other.encode_all(PROMPTS)
    for encoder, contexts in ((Counting("one"), one), (HashedWords(), other)):
        assert all(torch.equal(CachedText(encoder, path)(text), contexts(text)) for text in PROMPTS)
    stored = torch.load(path, weights_only=True)
    assert len(stored) == 2 * len(PROMPTS)
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.long}


def test_two_runs_keep_each_others_entries(tmp_path):
    path = tmp_path / "contexts.pt"
    one, other = CachedText(Counting(), path), CachedText(Counting(), path)
    one("a")
    other("b")
    one("c")
    encoder = Counting()
    CachedText(encoder, path).encode_all("abc")
    assert encoder.calls == []


def test_no_encoder_is_needed_when_the_file_has_all(tmp_path, monkeypatch):
    encoder = CLIPText("no/such/model")
    prepared = Counting(encoder.description)
    CachedText(prepared, tmp_path / "contexts.pt").encode_all(PROMPTS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    contexts = CachedText(encoder, tmp_path / "contexts.pt")
    assert all(torch.equal(contexts(text), prepared(text)) for text in PROMPTS)
    with pytest.raises(RuntimeError, match="transformers"):
        contexts("a new prompt")


def test_reports_are_encoded_once_for_all_runs(tmp_path, monkeypatch):
    path, calls = tmp_path / "contexts.pt", []
    call = AttributeEncoder.__call__
    monkeypatch.setattr(AttributeEncoder, "__call__", lambda self, text: (calls.append(text), call(self, text))[1])
    first = CachedText(AttributeEncoder(), path)
    first.encode_all([*SAME, *SAME])
    assert calls == SAME
    again = CachedText(AttributeEncoder(), path)
    assert all(torch.equal(again(text), first(text)) for text in SAME)
    assert calls == SAME, "another run reads the file"
    assert CachedText(AttributeEncoder(length=8), path)(SAME[0]).shape == (8, 64)
    assert calls == [*SAME, SAME[0]], "other settings are another encoder"


def test_bert_is_not_needed_when_the_file_has_all(bert, tmp_path, monkeypatch):
    first = CachedText(BERTText(str(bert[0]), length=20), tmp_path / "contexts.pt")
    first.encode_all(["脾脏增大", ""])
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = CachedText(BERTText(str(bert[0]), device="cuda", length=20), tmp_path / "contexts.pt")
    assert torch.equal(again("脾脏增大"), first("脾脏增大"))
    with pytest.raises(RuntimeError, match="transformers"):
        again("脾脏缺如")


@pytest.mark.parametrize("content", ["empty", "text", "cut", "weights", "tensor", "list", "folder"])
def test_damaged_and_foreign_files(tmp_path, content):
    path = tmp_path / "contexts.pt"
    CachedText(Counting(), path).encode_all(PROMPTS)
    whole = path.read_bytes()
    if content in ("weights", "tensor", "list"):
        torch.save({"weights": {"conv.weight": torch.ones(2)}, "tensor": torch.ones(2), "list": []}[content], path)
    elif content == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"A photo of a polyp.", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(
        ValueError, match=rf"{path} is no cache of texts, or a damaged one \(.+\): name another file, or"
    ):
        CachedText(Counting(), path)


def test_a_file_needs_a_description(tmp_path):
    with pytest.raises(ValueError, match="has no description"):
        CachedText(lambda text: torch.ones(1), tmp_path / "contexts.pt")


def test_a_failed_write_harms_nothing(tmp_path, monkeypatch):
    path = tmp_path / "contexts.pt"
    CachedText(Counting(), path)("a")

    def full(*args):
        raise OSError(28, "No space left on device")

    contexts = CachedText(Counting(), path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write"):
        contexts("b")
    monkeypatch.undo()
    encoder = Counting()
    CachedText(encoder, path)("a")
    assert encoder.calls == []
    assert [file.name for file in tmp_path.iterdir()] == ["contexts.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def test_a_case_gets_its_context():
    words = HashedWords()
    case = {"prompt": "a polyp", "seed": 3}
    result = Contextd(words)(case)
    assert case == {"prompt": "a polyp", "seed": 3}, "the input stays"
    assert torch.equal(result.pop("context"), words("a polyp"))
    assert result == case


def test_names_and_default():
    words = HashedWords()
    transform = Contextd(words, key="report", output="tokens", default="a lung")
    assert torch.equal(transform({})["tokens"], words("a lung"))
    assert torch.equal(transform({"report": ""})["tokens"], words(""))


def test_a_prompt_that_is_no_text():
    with pytest.raises(CaseError, match=r"case c7: prompt is \['a'\], expected text"):
        Contextd(HashedWords())({"name": "c7", "prompt": ["a"]})


def test_denials_in_parts_of_the_bowel_are_one_and_say_nothing_beside_a_tumour() -> None:
    encode = AttributeEncoder()
    assert torch.equal(encode("No mass is seen in the colon or rectum."), encode("No tumour."))
    there = "A mass of 3.0 cm in the sigmoid colon."
    assert torch.equal(encode(f"{there} No mass in the rectum."), encode(there))
    assert not torch.equal(encode("No mass in the liver."), encode("No tumour."))


# ---------------------------------------------------------------------------------------------------------------------
# Phrases


def test_phrases_that_share_words_are_near():
    encode = PhraseEncoder()
    near = torch.cosine_similarity(encode("well-defined margin,"), encode("ill-defined margin,"), 0)
    far = torch.cosine_similarity(encode("well-defined margin,"), encode("liver"), 0)
    assert near > 0.5 > 0.3 > far.abs()
    assert torch.equal(encode("Hypodense LESION,"), encode(" lesion  hypodense"))
    assert not torch.equal(encode("hypodense lesion,"), encode("hyperdense lesion,"))


def test_phrases_have_one_length():
    encode = PhraseEncoder()
    for text in ("liver", "57.0 HU,", "a mass of about -30 HU", "presence of increased density areas,stone,"):
        assert encode(text).shape == (64,)
        assert encode(text).dtype == torch.float32
        assert abs(encode(text).norm() - 8) < 1e-5
    assert encode("").tolist() == encode(" ,").tolist() == [0.0] * 64
    assert PhraseEncoder(width=512)("liver").shape == (512,)


def test_phrases_are_the_same_on_each_machine():
    liver = PhraseEncoder()("liver")[17:29] > 0
    assert "".join("-+"[int(sign)] for sign in liver) == "-+++---++--+"


def test_near_ct_values_are_near():
    encode = PhraseEncoder()
    values = [-900, -500, -120, -30, 0, 30, 57, 90, 140, 300, 900]
    vectors = torch.stack([encode(f"{value:.1f} HU,") for value in values])
    alike = torch.cosine_similarity(vectors[:, None], vectors[None], 2)
    for row, others in enumerate(alike):
        left, right = others[: row + 1], others[row:]
        assert (left.diff() > 0).all(), "the nearer, the more alike"
        assert (right.diff() < 0).all()
    assert torch.equal(encode("57 HU"), encode("57.0 HU,"))
    assert torch.equal(encode("\u221230 HU"), encode("-30.0 hu"))
    assert (vectors[:, 17:] == 0).all(), "a number alone is no word"
    assert torch.equal(encode("5000 HU"), encode("1000 HU"))


def test_a_phrase_with_a_number_has_both():
    both = PhraseEncoder()("hypodense 57 HU")
    assert (both[:17] != 0).any()
    assert (both[17:] != 0).all()


def test_contexts_of_several_texts():
    encode = PhraseEncoder()
    rows = contexts_of(["liver", "57.0 HU,"], encode, 4)
    assert torch.equal(rows[0], encode("liver"))
    assert torch.equal(rows[1], encode("57.0 HU,"))
    assert not rows[2:].any()
    assert torch.equal(contexts_of(["liver", "57.0 HU,"], encode, None), rows[:2])
    assert contexts_of([], encode).shape == (10, 64)
    assert not contexts_of([], encode).any()
    assert contexts_of([], encode, None).shape == (0, 64)
    with pytest.raises(ValueError, match=r"3 texts for 2 rows.*'c'"):
        contexts_of(["a", "b", "c"], encode, 2)


def test_phrases_may_be_cached(tmp_path):
    cached = CachedText(PhraseEncoder(), tmp_path / "texts.pt")
    rows = contexts_of(["liver", "stone,"], cached)
    assert torch.equal(contexts_of(["liver", "stone,"], CachedText(PhraseEncoder(), tmp_path / "texts.pt")), rows)
    assert PhraseEncoder(64).description != PhraseEncoder(65).description


def test_phrases_need_room():
    with pytest.raises(ValueError, match="at least 32"):
        PhraseEncoder(width=31)
