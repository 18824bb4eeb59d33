"""BiomedCLIP's text tower: a tiny random build of the same architecture, made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.biomedclip import BiomedCLIPText, TextTower, read_tower
from common.checkpoints import CheckpointError
from common.text import CachedText

WIDTH, HEADS, LAYERS, HIDDEN, OUT = 24, 3, 2, 40, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"0123456789,.-", *(f"##{c}" for c in LETTERS)]
VOCABULARY += ["liver", "kidney", "left", "hypo", "##dense", "lesion"]
TEXTS = ["liver", "kidney left", "hypodense lesion,", "57.0 hu,", "", "a longer text about a liver and a kidney, left"]
CONFIG = {
    "model_cfg": {
        "embed_dim": OUT,
        "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "image_size": 224},
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    }
}


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    """Hugging Face's BERT with random weights: what open_clip runs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY) + 7,  # a few rows to spare, as BiomedCLIP has
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    network = transformers.BertModel(config, add_pooling_layer=False).eval()
    for name, value in network.named_parameters():  # biases and norms are no longer 0 and 1
        torch.nn.init.normal_(value, 0.0, 0.3) if "bias" in name or "LayerNorm" in name else None
    return network


@pytest.fixture(scope="module")
def proj() -> torch.nn.Sequential:
    torch.manual_seed(1)
    hidden = (WIDTH + OUT) // 2
    first, second = torch.nn.Linear(WIDTH, hidden, bias=False), torch.nn.Linear(hidden, OUT, bias=False)
    return torch.nn.Sequential(first, torch.nn.GELU(), second)


def weights(bert: torch.nn.Module, proj: torch.nn.Module, prefix: str = "text.") -> dict[str, torch.Tensor]:
    state = {f"transformer.{name}": value for name, value in bert.state_dict().items()}
    state |= {f"proj.{name}": value for name, value in proj.state_dict().items()}
    return {f"{prefix}{name}": value.clone() for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(bert: torch.nn.Module, proj: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """open_clip's layout: also what is no text tower."""
    folder = tmp_path_factory.mktemp("biomedclip")
    clip = {"logit_scale": torch.tensor(1.0), "visual.trunk.norm.weight": torch.ones(3), **weights(bert, proj)}
    clip["text.transformer.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(clip, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def encoder(folder: Path, **settings) -> BiomedCLIPText:
    return BiomedCLIPText(folder, **{"length": 32, "heads": HEADS} | settings)


def test_vectors_are_those_of_hugging_faces_bert_and_the_projection(folder, bert, proj):
    """Padded to 32 with a mask, as open_clip and the reference do; ours reads the text alone."""
    ours = encoder(folder)
    for text in TEXTS:
        tokens = torch.zeros(1, 32, dtype=torch.long)
        tokens[0, : len(ours.tokens(text))] = torch.tensor(ours.tokens(text))
        with torch.no_grad():
            expected = proj(bert(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0])[0]
        assert ours(text).shape == (OUT,)
        assert ours(text).dtype == torch.float32
        assert (ours(text) - expected).abs().max() < 2e-6


def test_padding_says_nothing(folder):
    ours = encoder(folder)
    tower = ours.loaded[1]
    rows = [torch.tensor(ours.tokens(text)) for text in TEXTS]
    with torch.no_grad():
        together = tower(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    assert (together - torch.stack([ours(text) for text in TEXTS])).abs().max() < 2e-6


def test_tokens(folder):
    ours = encoder(folder)
    number = {word: index for index, word in enumerate(VOCABULARY)}
    assert ours.tokens("") == [2, 3]
    assert ours.tokens("  Liver ") == ours.tokens("LIVER") == [2, number["liver"], 3]
    assert ours.tokens("hypodense\n lesion,") == [
        *(2, number["hypo"], number["##dense"], number["lesion"], number[","], 3)
    ]
    assert ours.tokens("x" * 101) == [2, 1, 3], "words above 100 characters are unknown"
    assert len(ours.tokens("x" * 20)) == 22


def test_a_long_text_is_cut_and_told_once(folder, caplog):
    ours = encoder(folder, length=4)
    for _ in range(2):
        assert ours.tokens("liver kidney left") == [*encoder(folder).tokens("liver kidney")[:-1], 3]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'liver kidney left' has more than 4 tokens, cut off: 'left'"
    ]


def test_weights_from_a_checkpoint_of_lesion_diffusion(folder, bert, proj, tmp_path):
    state = weights(bert, proj, "cond_stage_model.model.") | {"model.out.2.bias": torch.zeros(1)}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "LMNet.ckpt")
    ours = encoder(folder, weights=tmp_path / "LMNet.ckpt")
    assert torch.equal(ours("liver"), encoder(folder)("liver"))
    assert ours.description != encoder(folder).description


def test_safetensors_and_half_precision(copied, bert, proj):
    (copied / "open_clip_pytorch_model.bin").unlink()
    save_file(weights(bert, proj), copied / "open_clip_model.safetensors")
    assert torch.equal(encoder(copied)("liver"), encoder(copied)("liver"))
    half = {name: value.half() for name, value in weights(bert, proj).items()}
    save_file(half, copied / "open_clip_model.safetensors")
    assert encoder(copied)("liver").dtype == torch.float32


def test_nothing_is_loaded_before_the_first_new_text(folder, tmp_path):
    first = CachedText(encoder(folder), tmp_path / "texts.pt")
    vector = first("liver")
    lazy = encoder(folder)
    assert torch.equal(CachedText(lazy, tmp_path / "texts.pt")("liver"), vector)
    assert "loaded" not in vars(lazy)


def test_size_of_the_published_tower():
    with torch.device("meta"):
        tower = TextTower(30522, 512, 768, 12, 12, 3072, (640, 512))
    assert sum(p.numel() for p in tower.parameters()) == 109_710_848


def test_heads_are_64_wide(bert, proj, tmp_path):
    torch.save(weights(bert, proj), tmp_path / "tower.pt")
    assert read_tower(tmp_path / "tower.pt").encoder.layers[0].self_attn.num_heads == 1
    assert not any(p.requires_grad for p in read_tower(tmp_path / "tower.pt").parameters())


def test_a_missing_or_wrong_folder_says_what_to_do(copied, tmp_path):
    advice = "huggingface.co/microsoft/BiomedCLIP.*PhraseEncoder"
    with pytest.raises(FileNotFoundError, match=f"does not exist.*{advice}"):
        encoder(tmp_path / "nowhere")("liver")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"holds none of.*{advice}"):
        encoder(tmp_path / "empty")("liver")
    (copied / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"neither tokenizer.json nor vocab.txt.*{advice}"):
        encoder(copied)("liver")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {"visual.weight": torch.ones(1)}, "holds no BERT"),
        (lambda state: {k: v for k, v in state.items() if "layer.1.output" not in k}, "4 missing"),
        (lambda state: {k: v for k, v in state.items() if "proj.2" not in k}, "lacks weights"),
        (lambda state: {k: v for k, v in state.items() if "layer.0.attention.self.key" not in k}, "lacks weights"),
        (lambda state: {k: v[:, :-1] if k.endswith("proj.2.weight") else v for k, v in state.items()}, "another shape"),
        (lambda state: state | {"text.proj.2.bias": torch.ones(OUT)}, "unexpected"),
    ],
)
def test_other_weights_are_refused(bert, proj, tmp_path, change, reason):
    torch.save(change(weights(bert, proj)), tmp_path / "tower.pt")
    with pytest.raises(ValueError, match=reason):
        read_tower(tmp_path / "tower.pt", HEADS)


def test_other_files_are_refused(copied):
    (copied / "open_clip_pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        encoder(copied)("liver")


def test_another_tower_or_tokenizer_is_refused(copied):
    clip = json.loads((copied / "open_clip_config.json").read_text())
    clip["model_cfg"]["text_cfg"]["hf_pooler_type"] = "mean_pooler"
    (copied / "open_clip_config.json").write_text(json.dumps(clip))
    with pytest.raises(ValueError, match="another text tower"):
        encoder(copied)("liver")
    (copied / "open_clip_config.json").unlink()
    (copied / "vocab.txt").write_text("\n".join([*VOCABULARY, *(f"more{i}" for i in range(8))]) + "\n")
    with pytest.raises(ValueError, match="different models"):
        encoder(copied)("liver")


def test_lengths(folder):
    with pytest.raises(ValueError, match="leaves no room"):
        encoder(folder, length=2)
    with pytest.raises(ValueError, match="reads 32 tokens"):
        encoder(folder, length=33)("liver")


def test_vectors_and_tokens_are_those_of_open_clip(folder, bert, proj, tmp_path):
    """Where the package open_clip can be imported, which needs a torchvision that fits torch."""
    hf_model = pytest.importorskip("open_clip.hf_model", exc_type=(ImportError, RuntimeError))
    from open_clip.tokenizer import HFTokenizer

    theirs = hf_model.HFTextEncoder("", OUT, bert.config, "cls_last_hidden_state_pooler", "mlp").eval()
    missing, unexpected = theirs.load_state_dict(weights(bert, proj, ""), strict=False)
    assert all("pooler" in name for name in missing)
    assert not unexpected
    ours = encoder(folder)
    ours.loaded[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(bert.config.to_json_string())
    tokens = HFTokenizer(str(tmp_path), context_length=32)(TEXTS)
    for text, row in zip(TEXTS, tokens, strict=True):
        assert ours.tokens(text) == row[row != 0].tolist()
        with torch.no_grad():
            assert (ours(text) - theirs(row[None])[0]).abs().max() < 2e-6
