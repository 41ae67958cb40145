"""What was exported as a text model loads in transformers and computes the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from text_models import FULL, MODELS, edit, ids, imported, logits, same, tensors, theirs, write

from unimodal.backbone import Backbone, BackboneConfig, Experts, Lora
from unimodal.importers import huggingface, save_text
from unimodal.text import TextTokenizer

# --- and back


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_an_export_loads_in_transformers_and_is_the_source(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model = write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", experts=FULL, added_tokens=4)
    save_text(made, tmp_path / "out", shard_bytes=shard_bytes, context_length=128)
    source, written = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert source.keys() == written.keys()
    assert all(torch.equal(source[key], written[key]) for key in source)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() is (shard_bytes == 4000)
    assert not (tmp_path / "out" / "model.safetensors").exists() or shard_bytes == 10**9
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    assert torch.equal(theirs(loaded.eval(), ids()), theirs(transformers_again(tmp_path / "hf"), ids()))
    back = imported(tmp_path / "out", experts=FULL)
    assert replace(back.config, rope_scaling=None) == replace(made.config, added_tokens=0, rope_scaling=None)
    kept = {key: value for key, value in made.state_dict().items() if not key.endswith("added")}
    assert same(back.state_dict(), kept)


def transformers_again(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_older_transformers_would_find_the_same_rope(tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS["llama3"])
    save_text(imported(tmp_path / "hf"), tmp_path / "out")
    edit(tmp_path / "out", rope_parameters="none")
    loaded = transformers_again(tmp_path / "out")
    assert torch.equal(theirs(loaded, ids()), theirs(transformers_again(tmp_path / "hf"), ids()))
    assert loaded.config.max_position_embeddings == 256  # factor times the original length


def test_each_expert_is_exported_by_name(qwen3: Path) -> None:
    made = imported(qwen3, experts=FULL)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".experts.image." in name:
                parameter += 0.1 * torch.randn_like(parameter)
    for index, expert in enumerate(("text", "image")):
        out = qwen3.parent / expert
        save_text(made, out, expert)
        expected = logits(made, ids(), index)
        torch.testing.assert_close(theirs(transformers_again(out), ids()), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits(made, ids(), 0), logits(made, ids(), 1))
    with pytest.raises(ValueError, match="expert: expected one of text, image, got audio"):
        save_text(made, qwen3.parent / "audio", "audio")
    save_text(imported(qwen3), qwen3.parent / "dense")  # its one set of weights is everybody's
    assert not (qwen3.parent / "audio").exists()


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_adapters_are_merged_into_what_they_adapt(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", experts=Experts(lora=Lora(2, 4.0)))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    save_text(made, tmp_path / "text")
    save_text(made, tmp_path / "image", "image")
    assert same(tensors(tmp_path / "text"), tensors(tmp_path / "hf"))
    expected = logits(made, ids(), 1)
    assert (expected - logits(made, ids(), 0)).abs().max() > 0.1
    torch.testing.assert_close(theirs(transformers_again(tmp_path / "image"), ids()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied"])
def test_added_rows_are_dropped_or_appended(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", MODELS[name])
    made = imported(tmp_path / "hf", added_tokens=5, experts=FULL)
    save_text(made, tmp_path / "dropped")
    save_text(made, tmp_path / "appended", added=True)
    assert transformers_again(tmp_path / "dropped").config.vocab_size == 50
    loaded = transformers_again(tmp_path / "appended")
    assert loaded.config.vocab_size == 55
    tokens = torch.cat([ids(20), torch.arange(50, 55)])
    torch.testing.assert_close(theirs(loaded, tokens), logits(made, tokens), atol=1e-5, rtol=1e-5)
    index = tmp_path / "sharded"
    save_text(made, index, added=True, shard_bytes=4000)
    record = json.loads((index / "model.safetensors.index.json").read_text())
    assert record["metadata"]["total_size"] == sum(t.nbytes for t in tensors(index).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "backbone.qkv_bias: expected false with qk_norm"),
        ({"embedding_scale": 4.0}, "backbone.embedding_scale: none of"),
        (
            {"qk_norm": False, "heads": 3, "kv_heads": 3, "head_dim": 6},
            "backbone.heads: Llama's divide width 16, got 3",
        ),
    ],
)
def test_what_no_architecture_computes_is_not_exported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 8, "vocabulary": 9}
    made = Backbone(BackboneConfig(**{**shape, "positions": "sequential", **changes}))
    with pytest.raises(ValueError, match=message):
        save_text(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_appears_complete_or_not_at_all(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = imported(qwen3), qwen3.parent / "out" / "deep"
    monkeypatch.setattr(huggingface, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_text(made, out)
    monkeypatch.undo()
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    save_text(made, out)  # an empty folder is as good as none
    assert sorted(p.name for p in out.parent.iterdir()) == ["deep"]
    with pytest.raises(ValueError, match="export: expected a new or empty folder"):
        save_text(made, out)
    (out.parent / "file").write_text("")
    with pytest.raises(ValueError, match="export: expected a new or empty folder"):
        save_text(made, out.parent / "file")


def test_the_tokenizer_goes_along(qwen3: Path) -> None:
    made, text = imported(qwen3, added_tokens=4), TextTokenizer.train(["grün ist grün"], 270)
    save_text(made, qwen3.parent / "out", tokenizer=text.placed(300))
    loaded = transformers.AutoTokenizer.from_pretrained(qwen3.parent / "out")
    assert loaded.encode("grün, 数字 <|im_end|>") == text.encode("grün, 数字 <|im_end|>")
    assert TextTokenizer.load(qwen3.parent / "out" / "tokenizer.json").special == text.special
    assert transformers.AutoConfig.from_pretrained(qwen3.parent / "out").eos_token_id is None  # its row was dropped
