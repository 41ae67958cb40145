"""The installation check and the choice of precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unimodal import environment

ROOT = Path(__file__).resolve().parents[1]

SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16 amx_bf16 amx_tile\nbugs\t\t: spectre_v1\n"
COOPER_LAKE = "processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16\n"
SKYLAKE = "processor\t: 0\nmodel name\t: amx_bf16 in a name is no flag\nflags\t\t: fpu sse2 avx2 avx512f\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("cpuinfo", "precision", "why"),
    [
        (SAPPHIRE_RAPIDS, "bf16-mixed", "amx_bf16"),
        (COOPER_LAKE, "bf16-mixed", "avx512_bf16"),
        (SKYLAKE, "32-true", "neither"),
        (ARM, "32-true", "neither"),
        (COOPER_LAKE + "\n" + SKYLAKE, "32-true", "neither"),
        ("", "32-true", "neither"),
    ],
    ids=["amx", "avx512_bf16", "skylake", "arm", "one core of two", "empty"],
)
def test_cpu_precision_follows_its_instructions(cpuinfo: str, precision: str, why: str) -> None:
    chosen, reason = environment.choose_precision(cpuinfo)
    assert chosen == precision
    assert why in reason


@pytest.mark.usefixtures("no_cuda")
def test_a_system_without_cpuinfo_gets_full_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "absent")
    assert environment.choose_precision()[0] == "32-true"


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_cuda_precision_counts_no_emulation(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    chosen, reason = environment.choose_precision(SKYLAKE if native else SAPPHIRE_RAPIDS)
    assert chosen == precision
    assert "a card" in reason


def test_compiling_needs_the_compiler_that_torch_will_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not environment.has_cpp_compiler()
    assert environment.can_compile() == (False, "no C++ compiler")
    compiler = tmp_path / "my-cxx"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", "my-cxx")
    assert environment.has_cpp_compiler()
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not environment.can_compile()[0]
    (tmp_path / "Python.h").touch()
    assert environment.can_compile() == (True, "C++ compiler my-cxx")


def _check(*extra_paths: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(path) for path in (*extra_paths, ROOT))
    command = [sys.executable, "-m", "unimodal.environment"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}
    )


def _fake(folder: Path, *, torch_version: str, cuda: str | None, torchvision: str) -> Path:
    """A folder whose torch and torchvision import before the real ones."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(f"from . import version\n__version__ = {torch_version!r}\n")
    (folder / "torch/version.py").write_text(f"cuda = {cuda!r}\n")
    (folder / "torchvision.py").write_text(torchvision)
    return folder


def test_this_installation_is_sound() -> None:
    result = _check()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("python 3.")
    assert f"torch {torch.__version__}" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "cuda", "named"), [("2.15.0+cpu", None, "CPU only"), ("2.11.0+cu130", "13.0", "CUDA 13.0")]
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU-only and CUDA wheels side by side")
def test_a_mismatched_pair_is_named_in_one_line(tmp_path: Path, version: str, cuda: str | None, named: str) -> None:
    fails = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    result = _check(_fake(tmp_path, torch_version=version, cuda=cuda, torchvision=fails))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for part in (f"torch {version} ({named})", "torchvision", "run make again"):
        assert part in result.stderr


def test_another_failure_of_torchvision_is_not_disguised(tmp_path: Path) -> None:
    fails = "raise RuntimeError('something else')\n"
    result = _check(_fake(tmp_path, torch_version="2.15.0", cuda="13.2", torchvision=fails))
    assert result.returncode == 1
    assert "something else" in result.stderr


def test_the_module_itself_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "lightning", "transformers", "numpy"}
    code = f"import sys, unimodal.environment; print(*({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""
