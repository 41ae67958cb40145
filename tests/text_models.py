"""Text models of transformers at width 16, written to folders, and what this project makes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from unimodal.attention import SegmentTable, packed_attention
from unimodal.backbone import Backbone, Experts
from unimodal.importers import load_text, read_config

FULL = Experts(attention=True, mlp=True, norms=True)
SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama without groups, tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "attention_bias": False, "rope_parameters": LLAMA3},
    "llama linear": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "llama with one key head, wide heads": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2.5 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2.5 yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen3, heads that do not divide": {
        "model_type": "qwen3", "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1,
    },
    "qwen3 yarn": {
        "model_type": "qwen3", "head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024,
            "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3,
        },
    },
    "qwen3 yarn by mscale": {
        "model_type": "qwen3", "head_dim": 4, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
}  # fmt: skip


def original(settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """Random weights everywhere, norms and biases included."""
    torch.manual_seed(0)
    kind = settings["model_type"]
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **{k: v for k, v in settings.items() if v != kind}})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def write(folder: Path, settings: dict[str, Any], size: str = "5GB") -> transformers.PreTrainedModel:
    model = original(settings)
    model.save_pretrained(folder, max_shard_size=size)
    return model


def ids(n: int = 40) -> Tensor:
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(3))


def empty(folder: Path, meta: bool = False, **changes: Any) -> Backbone:
    """A backbone that fits, with other weights or none."""
    torch.manual_seed(1)
    with torch.device("meta" if meta else "cpu"):
        return Backbone(read_config(folder, **{"positions": "sequential", **changes}))


def imported(folder: Path, meta: bool = False, **changes: Any) -> Backbone:
    made = empty(folder, meta, **changes)
    load_text(made, folder)
    return made


@torch.no_grad()
def hidden(made: Backbone, tokens: Tensor, backend: str = "reference", expert: int = 0) -> Tensor:
    """One causal document of text, read by one expert."""
    n, no = len(tokens), np.array([False])
    table = SegmentTable(document=np.zeros(1, int), length=np.array([n]), bidirectional=no, private=no)
    splits = [n if e == expert else 0 for e in range(len(made.config.experts.names))]
    attention = packed_attention(backend, table, torch.arange(n), n)
    return made(made.embedding(tokens), torch.arange(n)[:, None], splits, attention)


@torch.no_grad()
def logits(made: Backbone, tokens: Tensor, expert: int = 0) -> Tensor:
    return made.logits(hidden(made, tokens, expert=expert))


@torch.no_grad()
def theirs(model: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens[None]).logits[0]


def state(made: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def edit(folder: Path, **changes: Any) -> None:
    """Other values in config.json; None as a string removes a key."""
    record = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v != "none"}))
