"""Prompts become what networks attend to: words as numbers, a CLIP encoder made on the spot, and the cache of both."""

from __future__ import annotations

import doctest
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common.text
from common.io import CaseError
from common.text import CachedText, CLIPText, Contextd, HashedWords

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
    assert len({encoder.description for encoder in encoders}) == 6
    assert CLIPText("a", device="cuda").description == CLIPText("a").description


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
