"""What this machine offers: which torch, which precision, whether `torch.compile` can work.

`python -m unimodal.environment` prints one line about the installation. It exits with 2 and one line if torch and
torchvision were not built for each other. Importing this file is cheap: torch is imported only when asked about.
"""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # x86 instructions that multiply bf16 matrices


class BrokenInstallationError(RuntimeError):
    """Installed packages that cannot work together; the message names them and the cure."""


def describe_installation() -> str:
    """The versions of python, torch and torchvision in one line; `BrokenInstallationError` if they do not fit."""
    import torch

    ours = f"torch {torch.__version__} ({_build(torch)})"
    try:
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision::" not in str(error):  # e.g. "operator torchvision::nms does not exist"
            raise
        raise BrokenInstallationError(
            f"{ours} stands beside a torchvision {_version_of('torchvision')} made for another build of torch, so its "
            "operators cannot load; install both from one index: remove .venv, drop any index of CPU-only wheels from "
            "pip's settings, and run make again"
        ) from error
    return f"python {platform.python_version()}, {ours}, torchvision {torchvision.__version__}"


def _build(torch: ModuleType) -> str:
    """What a build of torch computes on."""
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if getattr(torch.version, "hip", None) is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU only" if sys.platform == "linux" else sys.platform


def _version_of(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Instruction sets that every processor of a `/proc/cpuinfo` text has ("flags" on x86, "Features" on ARM)."""
    rows = [line.partition(":") for line in cpuinfo.splitlines()]
    sets = [frozenset(value.split()) for name, _, value in rows if name.strip() in ("flags", "Features")]
    return frozenset.intersection(*sets) if sets else frozenset()


def choose_precision(cpuinfo: str | None = None) -> tuple[str, str]:
    """Lightning's precision string for this machine, and the reason in words.

    bf16 only where the hardware multiplies it; elsewhere it is emulated and slower than fp32. `cpuinfo` replaces the
    text of `/proc/cpuinfo`.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", f"{name} computes in bf16"
        return "32-true", f"{name} has no bf16"
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    flags = cpu_flags(cpuinfo)
    for flag in BF16_FLAGS:
        if flag in flags:
            return "bf16-mixed", f"no CUDA device; the processor has {flag}"
    return "32-true", f"no CUDA device; the processor reports neither {' nor '.join(BF16_FLAGS)}"


def usable_device(asked: str) -> "torch.device":
    """What `--device` names; auto is CUDA where there is one.

    Raises:
        ValueError: torch does not know it, or this machine has none.
    """
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as it is unknown, not built for, or meta
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--device: {asked} cannot be used ({reason})") from None
    return device


def check_precision(precision: str, sharded: bool = False) -> None:
    """ValueError for a precision that training does not have: weights, averages and codebooks are single."""
    known = ("32-true", "bf16-mixed", *(() if sharded else ("16-mixed",)))
    if precision not in known:
        raise ValueError(f"trainer.precision: expected {' or '.join(known)}, got {precision}")


def cpp_compiler() -> str | None:
    """The C++ compiler `torch.compile` would call, None if absent: $CXX, else clang++ on macOS and g++ elsewhere."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def has_cpp_compiler() -> bool:
    """Whether that compiler is installed."""
    return cpp_compiler() is not None


def can_compile() -> tuple[bool, str]:
    """Whether `torch.compile` can build CPU code (it needs a compiler and Python's C headers), and why in words."""
    compiler = cpp_compiler()
    if compiler is None:
        return False, "no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "no C headers of Python (on Debian and Ubuntu: python3-dev)"
    return True, f"C++ compiler {Path(compiler).name}"


def main() -> int:
    """Print the installation's line; the exit code says whether it is sound."""
    try:
        print(describe_installation())
    except BrokenInstallationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
