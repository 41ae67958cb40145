"""LlamaFusion (arXiv 2412.15188): with its experts frozen, a text model reads text after training exactly as before."""

import copy
from pathlib import Path
from unittest.mock import Mock

import lightning
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import Backbone, Experts
from unimodal.documents import Document
from unimodal.importers import load_text, read_config
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal.sequence_rules import SequenceRules
from unimodal.text import TextTokenizer
from unimodal.training import UnifiedTraining
from unimodal_generators import Flow
from unimodal_tokenizers.patch import PatchTokenizer

VOCABULARY = 300
FULL = Experts(attention=True, mlp=True, norms=True)
CORPUS = ["a handwritten seven", "three plus seven equals ten"]


def write(folder: Path, tied: bool) -> Path:
    """A random Qwen3 with its tokenizer."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    TextTokenizer.train(CORPUS, 290).save(folder / "tokenizer.json")
    return folder


def imported(folder: Path) -> Backbone:
    """The text model alone: dense, without special tokens."""
    made = Backbone(read_config(folder, positions="block"))
    load_text(made, folder)
    return made


def fused(folder: Path, tied: bool, backend: str) -> UnifiedTraining:
    """A mixture of transformers begun from the text model, whose text expert and tables do not learn."""
    torch.manual_seed(1)
    config = read_config(folder, positions="block", experts=FULL, added_tokens=4, attention=backend)
    rules = SequenceRules(image_sizes=[(8, 8), (4, 8)], context_length=192, drop_text=0.1)
    model = UnifiedModel(PatchTokenizer(2), Flow, config, rules)
    names = ["text", "embedding", *([] if tied else ["head"])]
    return UnifiedTraining(model, lr=1e-2, weight_decay=0.3, warmup_steps=0, init_from=folder, freeze=names)


def learn(module: UnifiedTraining, documents: list[Document], steps: int = 4) -> list[float]:
    """Steps of the module's own optimizer over documents with images, text before and behind them; their losses."""
    model, losses = module.model, []
    module._trainer = Mock(
        spec=lightning.Trainer,
        world_size=1,
        accumulate_grad_batches=1,
        log_every_n_steps=1000,
        max_steps=100,
        global_step=0,
    )
    optimizer = module.configure_optimizers()["optimizer"]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    for step in range(steps):
        sequenced = [model.sequencer.document(d, (0, 0, i)) for i, d in enumerate(documents)]
        packed = pack(sequenced, FULL, model.generator.reads)
        optimizer.zero_grad()
        loss = module.training_step(packed.announce(packed.counts), step + 1)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def read(made: Backbone, ids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Hidden states of one document of text, and its scores over the imported vocabulary."""
    n, no = len(ids), np.array([False])
    table = SegmentTable(document=np.zeros(1, int), length=np.array([n]), bidirectional=no, private=no)
    attention = packed_attention(backend, table, torch.arange(n), n)
    splits = [n] + [0] * (len(made.config.experts.names) - 1)
    hidden = made(made.embedding(ids), torch.arange(n)[:, None], splits, attention)
    return hidden, made.logits(hidden)[:, :VOCABULARY]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_is_read_as_before_bit_for_bit(
    tied: bool, backend: str, dtype: torch.dtype, mixed: list[Document], tmp_path: Path
) -> None:
    folder = write(tmp_path / "qwen3", tied)
    alone, module = imported(folder), fused(folder, tied, backend)
    backbone = module.model.backbone
    ids = torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(backbone.state_dict())
    losses = learn(module, mixed)
    assert losses[-1] < losses[0]
    hidden, scores = read(alone.to(dtype), ids, backend)
    trained_hidden, trained_scores = read(backbone.to(dtype), ids, backend)
    assert hidden.dtype == dtype
    assert torch.equal(trained_hidden, hidden)
    assert torch.equal(trained_scores, scores)
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name].to(dtype))}
    images = {name for name in before if ".experts.image." in name}
    added = {"embedding.added"} if tied else {"embedding.added", "head.added"}
    assert moved == images | added


def test_unfrozen_text_is_read_otherwise(mixed: list[Document], tmp_path: Path) -> None:
    """What the test above would see: the same training without `freeze`."""
    folder = write(tmp_path / "qwen3", tied=True)
    module = fused(folder, True, "sdpa")
    for parameter in module.model.backbone.parameters():
        parameter.requires_grad_(True)
    learn(module, mixed, steps=1)
    ids = torch.arange(20)
    assert not torch.equal(read(module.model.backbone, ids, "sdpa")[0], read(imported(folder), ids, "sdpa")[0])
