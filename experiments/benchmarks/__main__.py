"""Speed and memory on this CPU against other libraries, each row in one process with its peer."""

import sys
from pathlib import Path

from experiments.benchmarks import (
    attention,
    blocks,
    decoding,
    evaluation,
    geneval,
    memory,
    padding,
    runner,
    tokenizers,
    training,
    watching,
)
from experiments.benchmarks.cases import Case
from experiments.benchmarks.machine import probe
from experiments.benchmarks.results import Goal

GOALS: dict[str, Goal | None] = {
    "train_fp32": Goal(3.9, "x"),
    "train_bf16": Goal(5.0, "x"),
    "flops_share_fp32": Goal(0.85, ""),
    "flops_share_bf16_1t": Goal(0.60, ""),
    "flops_share_bf16_2t": Goal(0.52, ""),
    "mot_tax": Goal(1.02, "x", at_most=True),
    "attention_fp32": Goal(1.7, "x"),
    "attention_bf16": Goal(3.0, "x"),
    "packing": Goal(7.0, "x"),
    "padding": Goal(2.0, "x"),
    "mask_plan_ms": Goal(1.0, "ms", at_most=True),
    "t2i_fp32": Goal(6.0, "x"),
    "t2i_bf16": Goal(15.0, "x"),
    "guidance": Goal(1.9, "x", at_most=True),
    "decode_b1": Goal(2.5, "x"),
    "decode_b8": Goal(1.8, "x"),
    "cache_step": Goal(5.0, "x"),
    "pack_growth": Goal(1.10, "x", at_most=True),
    "loss_memory": Goal(4.0, "x"),
    "recompiles": Goal(0, "graphs", at_most=True),
    "plan_overhead": None,
    "watching_overhead": Goal(1.01, "x", at_most=True),
    "fid_features": Goal(0.95, ""),
    "geneval_scoring": Goal(3.0, "x"),
    "code_search": Goal(1.0, "x"),
    "code_search_any_length": Goal(1.0, "x"),
    "vq_encode_share": Goal(0.95, ""),
}
CASES: dict[str, Case] = {
    **training.CASES, **blocks.CASES, **attention.CASES, **decoding.CASES, **memory.CASES,
    **evaluation.CASES, **geneval.CASES, **tokenizers.CASES, **padding.CASES, **watching.CASES,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Every row that needs no GPU."""
    return runner.main(
        argv, command="experiments.benchmarks", about=__doc__, goals=GOALS, cases=CASES, device="cpu",
        out=Path("out/bench.json"), probe=probe,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
