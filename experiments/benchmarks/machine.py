"""What this machine could do at best: matrix products and copies, measured in the run that quotes them."""

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.timing import interleave, threads
from unimodal.environment import BF16_FLAGS, CPUINFO, can_compile, cpu_flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("torch", "transformers", "transfusion-pytorch", "xformers", "numpy")


def gemm(dtype: torch.dtype, n: int, device: str = "cpu") -> tuple[Callable[[], Tensor], float]:
    """One n x n x n matrix product of random numbers (zeros run faster on some hardware), and its FLOPs."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=rng).to(device, dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def gemm_peak(
    dtype: torch.dtype, n: int, repeats: int, device: str = "cpu", wait: Callable[[], object] = lambda: None
) -> float:
    """Most FLOPs a second that a matrix product reached."""
    run, flops = gemm(dtype, n, device)
    return flops / interleave({"gemm": run}, repeats, warmup=3, wait=wait)["gemm"].best


def copy_bandwidth(size: int, repeats: int, device: str = "cpu", wait: Callable[[], object] = lambda: None) -> float:
    """Bytes a second read and written together while `size` bytes are copied."""
    a = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2.0 * size / interleave({"copy": lambda: b.copy_(a)}, repeats, warmup=2, wait=wait)["copy"].best


def probe(quick: bool) -> dict[str, Any]:
    """The machine in numbers, for the head of a result file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n, size, repeats = (64, 2**16, 1) if quick else (1024, 2**29, 20)
    peaks, copies = {}, {}
    for count in sorted({1, min(2, cores)}):
        with threads(count):
            for name, dtype in DTYPES.items():
                peaks[f"{name}_{count}t"] = gemm_peak(dtype, n, repeats) / 1e9
            copies[f"{count}t"] = copy_bandwidth(size, repeats) / 1e9
    cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    return {
        "cpu": cpu_name(cpuinfo),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory() / 1e9, 1),
        "bf16_instructions": [flag for flag in BF16_FLAGS if flag in cpu_flags(cpuinfo)],
        "compiler": can_compile()[1],
        "gemm_peak_gflops": peaks,
        "gemm_n": n,
        "copy_gb_per_s": copies,
        "load_average": list(os.getloadavg()),
    }


def cpu_name(cpuinfo: str) -> str:
    """As the processor calls itself."""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> int:
    """Bytes of RAM, or of the container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def versions() -> dict[str, str | None]:
    """Of everything that was compared."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
