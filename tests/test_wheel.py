"""What is shipped: the three packages and nothing else, whichever way the wheel is built."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "unimodal": ROOT,
    "unimodal_tokenizers": ROOT / "tokenizers",
    "unimodal_generators": ROOT / "generators",
}

pytestmark = pytest.mark.slow


def build(out: Path, *options: str) -> Path:
    """The one wheel that `python -m build` leaves in `out`."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(build(tmp_path_factory.mktemp("direct"), "--wheel"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(direct: dict[str, bytes]) -> None:
    expected = {
        path.relative_to(base).as_posix()
        for package, base in PACKAGES.items()
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in direct if ".dist-info/" not in name}
    assert shipped == expected
    assert {name for name in shipped if name.endswith((".yaml", ".yml"))} == set()
    assert {name.partition("/")[0] for name in shipped} == set(PACKAGES)


def test_the_wheel_carries_licence_types_and_console_script(direct: dict[str, bytes]) -> None:
    (entry_points,) = [data for name, data in direct.items() if name.endswith(".dist-info/entry_points.txt")]
    assert b"unimodal = unimodal.cli:main" in entry_points
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in direct)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(direct)


def test_a_wheel_made_from_the_source_archive_is_the_same(direct: dict[str, bytes], tmp_path: Path) -> None:
    assert contents(build(tmp_path)) == direct
