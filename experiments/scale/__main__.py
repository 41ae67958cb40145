"""Memory, traffic, storage and time of three models on 8, 64 and 512 GPUs: formulas, and one layer that is measured.

Writes results/sizing.json and the table of docs/scale.md.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unimodal import UnifiedModel
from unimodal.attention import choose_backend
from unimodal.backbone import BackboneConfig, Experts, deferred
from unimodal.documents import Document, Part
from unimodal.packing import PackedSequence, pack
from unimodal.sequence_rules import SequenceRules
from unimodal.text import TextTokenizer
from unimodal.training.flops import head_flops, layer_flops
from unimodal.training.plan import Probe, loss_bytes, model_weights
from unimodal.training.ranks import Ranks, Weights
from unimodal_generators import Flow
from unimodal_tokenizers import PatchTokenizer

RESULTS = Path(__file__).parent / "results" / "sizing.json"
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MARKS = "<!-- sizing: python -m experiments.scale -->", "<!-- end of sizing -->"
GPUS = (8, 64, 512)
TOKENS = 16384  # of a pack, which is a micro-batch of one GPU
PROBED = 2  # documents of the pack that a layer is measured with

# What the cards are said to do by NVIDIA's data sheet, and what is taken of it.
PEAK = 989e12  # bf16, dense, H100 SXM
SHARE = 0.4  # of the peak: assumed
CAST = 0.5  # of the size of layers' weights, which travel in bf16
ROOM = 80e9 * 0.9  # bytes of a card that tensors may take
MACHINE = 8  # GPUs
INSIDE, BETWEEN = 450e9, 50e9  # bytes a second that a GPU receives: NVLink, and one 400 Gb/s port
QWEN_7B = BackboneConfig(  # Qwen2.5-7B
    width=3584, depth=28, heads=28, kv_heads=4, mlp_width=18944, vocabulary=152064, positions="sequential",
    qkv_bias=True, tied_head=False,
)  # fmt: skip
MODELS = {
    "1B": BackboneConfig(  # Llama-3.2-1B
        width=2048, depth=16, heads=32, kv_heads=8, mlp_width=8192, vocabulary=128256, positions="sequential"
    ),
    "7B": QWEN_7B,
    "14B-MoT": replace(QWEN_7B, experts=Experts(attention=True, mlp=True, norms=True), qk_norm=True),  # BAGEL's two
}


@dataclass(frozen=True)
class Model:
    """What is known of a model before any GPU is chosen."""

    parameters: int
    weights: Weights
    flops: float  # useful, a token
    kept: float  # bytes a token that one layer keeps for backward
    held: float  # bytes that it keeps of its weights, whatever the pack: their copies in bf16
    layers: int
    width: int
    loss: int  # bytes while the loss is computed


@dataclass(frozen=True)
class Row:
    """One model on one number of GPUs."""

    model: str
    gpus: int
    replicas: int
    shards: int
    state_gb: float  # weights, gradients, moments and average of a rank
    gathered_gb: float
    activations_gb: float
    peak_gb: float
    fits: bool
    tokens_per_second: float
    traffic_gb: float  # received by a rank a step
    traffic_share: float  # of the time of its products, if nothing were hidden behind them
    checkpoint_gb: float
    days_per_trillion: float


def measure(config: BackboneConfig) -> Model:
    """Counts of the whole model, whose backbone gets no memory, and what one layer of it keeps."""
    with deferred():
        rules = SequenceRules(image_sizes=[(256, 256)], context_length=1024)
        model = UnifiedModel(PatchTokenizer(16), Flow, config, rules)
    model.text = TextTokenizer.train([], 260)
    packed = one_pack(model)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = Probe(model, packed, torch.device("cpu")).kept()
    held = 2 * sum(p.numel() for p in model.backbone.layers[0].parameters() if p.ndim == 2)  # copies in bf16
    layers, attention = layer_flops(model.backbone, packed)
    weights = model_weights(model)
    return Model(
        parameters=sum(p.numel() for p in model.parameters()), weights=weights,
        flops=(layers + attention + head_flops(model.backbone, packed)) / len(packed), kept=(kept - held) / len(packed),
        held=held, layers=config.depth, width=config.width,
        loss=loss_bytes(model, packed, torch.bfloat16),
    )  # fmt: skip


def one_pack(model: UnifiedModel) -> PackedSequence:
    """Documents of a text and a drawn image, which is in it twice: as it is learned, and clean."""
    image = Image.fromarray(np.zeros((256, 256, 3), np.uint8))
    written = Document((Part("a" * 250, learn=True), Part(image, learn=True)), "text_to_image")
    sequenced = [model.sequencer.document(written, (0, 0, i), train=False) for i in range(PROBED)]
    return pack(sequenced, model.backbone.config.experts, model.generator.reads)


def choose(model: Model, gpus: int) -> Ranks:
    """The fewest parts that fit: first within a machine, then over machines."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= gpus]
    fitting = [n for n in sizes if peak(model, Ranks(gpus // n, n)) <= ROOM]
    shards = fitting[0] if fitting else sizes[-1]
    return Ranks(gpus // shards, shards)


def state(model: Model, ranks: Ranks) -> float:
    """fp32 weights; gradients, two moments and the average of what is trained."""
    return model.weights.held(ranks) + 4 * model.weights.trained / ranks.shards


def activations(model: Model) -> float:
    """Layers computed again: the input of each, and one of them whole."""
    return TOKENS * (4 * model.width * model.layers + model.kept) + model.held + model.loss


def peak(model: Model, ranks: Ranks) -> float:
    """All of it."""
    return state(model, ranks) + model.weights.gathered(ranks) + activations(model)


def row(name: str, model: Model, gpus: int) -> Row:
    """Of one pack a GPU and step."""
    ranks = choose(model, gpus)
    products = TOKENS * model.flops * 4 / 3 / (PEAK * SHARE)  # seconds; layers go forward twice
    traffic = model.weights.traffic(ranks, 1, CAST)
    speed = INSIDE if gpus <= MACHINE else BETWEEN  # the slowest link of a ring sets its pace
    inside = model.weights.traffic(Ranks(1, ranks.shards), 1, CAST) if ranks.shards <= MACHINE else 0
    seconds = inside / INSIDE + (traffic - inside) / speed
    rate = gpus * TOKENS / products
    return Row(
        name, gpus, ranks.replicas, ranks.shards, state(model, ranks) / 1e9, model.weights.gathered(ranks) / 1e9,
        activations(model) / 1e9, peak(model, ranks) / 1e9, peak(model, ranks) <= ROOM, rate, traffic / 1e9,
        seconds / products, (model.weights.whole + 3 * model.weights.trained) / 1e9, 1e12 / rate / 86400,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ("model", "GPUs", "copies x parts", "state", "gathered", "activations", "peak a GPU", "tokens/s", "traffic",
            "of a step", "checkpoint", "days a trillion tokens")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        fits = "" if r.fits else " (does not fit)"
        lines.append(
            f"| {r.model} | {r.gpus} | {r.replicas} x {r.shards} | {r.state_gb:.1f} GB | {r.gathered_gb:.1f} GB | "
            f"{r.activations_gb:.1f} GB | {r.peak_gb:.1f} GB{fits} | {r.tokens_per_second:,.3g} | {r.traffic_gb:.1f} GB | "
            f"{r.traffic_share:.0%} | {r.checkpoint_gb:.0f} GB | {r.days_per_trillion:,.3g} |"
        )
    return "\n".join(lines)


def page(text: str, rows: list[Row]) -> str:
    """The page with its table in place."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    """Measure, compute, write."""
    argparse.ArgumentParser("python -m experiments.scale", description=__doc__).parse_args()
    measured = {name: measure(config) for name, config in MODELS.items()}
    rows = [row(name, model, gpus) for name, model in measured.items() for gpus in GPUS]
    settings = {
        "pack_tokens": TOKENS, "peak_flops": PEAK, "assumed_share": SHARE, "machine": MACHINE,
        "bytes_per_second_inside": INSIDE, "bytes_per_second_between": BETWEEN, "room_bytes": ROOM,
        "probed_on": f"CPU, bf16 autocast, {choose_backend('auto', torch.device('cpu'))}",
    }  # fmt: skip
    models = {name: {**vars(m), "weights": vars(m.weights)} for name, m in measured.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"settings": settings, "models": models, "rows": [vars(r) for r in rows]}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
