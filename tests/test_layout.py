"""Guards of the layout: folder names that collide, the direction of imports, pins, the headers of recipes."""

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = {"tokenizers": "unimodal_tokenizers", "generators": "unimodal_generators"}
PACKAGES = {
    "unimodal": ROOT / "unimodal",
    "unimodal_tokenizers": ROOT / "tokenizers/unimodal_tokenizers",
    "unimodal_generators": ROOT / "generators/unimodal_generators",
}
OUR_FOLDERS = ("unimodal", "tokenizers", "generators", "experiments", "tests")
HEADER_KEYS = ("What", "Paper", "Command", "Measured")


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names of every absolute import of a file, wherever it stands; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path.read_text(encoding="utf-8"))}


def offenders(files: list[Path], banned: set[str]) -> dict[str, set[str]]:
    """Files that import something banned, and what."""
    found = {str(path.relative_to(ROOT)): imported_roots(path) & banned for path in files}
    return {name: modules for name, modules in found.items() if modules}


def may_import_lightning(path: Path) -> bool:
    place = path.relative_to(ROOT).as_posix()
    return re.match(r"unimodal/(training/|data/|cli(_\w+)?\.py|cli/)|experiments/|tests/", place) is not None


FETCHERS = {
    "from_pretrained", "load_dataset", "urlopen", "urlretrieve", "hf_hub_download", "snapshot_download",
    "load_state_dict_from_url", "get_dataset_config_names",
}  # fmt: skip


def fetched_literals(source: str) -> Iterator[str]:
    """Calls of what may download that name, in the code itself, what to download: a string, or one that begins so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in FETCHERS:
            given = [*node.args[:1], *(k.value for k in node.keywords if k.arg in ("repo_id", "path", "url"))]
            named = [v.values[0] if isinstance(v, ast.JoinedStr) and v.values else v for v in given]
            if any(isinstance(v, ast.Constant) and isinstance(v.value, str) for v in named):
                yield ast.unparse(node)


# --- names that collide


def test_tokenizers_is_hugging_face_s_package() -> None:
    import tokenizers

    installed = importlib.metadata.distribution("tokenizers").locate_file("tokenizers/__init__.py")
    assert tokenizers.__file__ is not None, "`import tokenizers` found the folder of this repository"
    assert Path(tokenizers.__file__).resolve() == Path(str(installed)).resolve()


@pytest.mark.parametrize(("container", "package"), CONTAINERS.items())
def test_a_container_folder_holds_its_one_package_and_no_module(container: str, package: str) -> None:
    entries = (ROOT / container).iterdir()
    importable = {p.name for p in entries if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert importable == {package}, f"{container}/ may hold {package}/ only (plus a README)"


def test_no_folder_of_tests_is_a_package() -> None:
    packages = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py"))
    assert packages == [], "a package tests/<name>/ would hide the installed package <name>"


# --- the direction of imports


def test_import_finder_sees_every_form() -> None:
    source = (
        "import a.b as c, d\nfrom e.f import g\nfrom . import h\n"
        "def late():\n    import i\nif TYPE_CHECKING:\n    from j import k\n"
    )
    assert set(imported_modules(source)) == {"a.b", "d", "e.f", "e.f.g", "i", "j", "j.k"}


def test_tokenizers_import_neither_other_package() -> None:
    files = python_files(PACKAGES["unimodal_tokenizers"])
    assert files
    assert offenders(files, {"unimodal", "unimodal_generators", "experiments"}) == {}


def test_generators_import_nothing_of_the_model() -> None:
    files = python_files(PACKAGES["unimodal_generators"])
    assert files
    assert offenders(files, {"unimodal", "experiments"}) == {}


def test_the_model_does_not_import_experiments() -> None:
    files = python_files(PACKAGES["unimodal"])
    assert files
    assert offenders(files, {"experiments", "tests"}) == {}


def test_networks_do_not_import_lightning() -> None:
    files = [path for path in python_files(*(ROOT / name for name in OUR_FOLDERS)) if not may_import_lightning(path)]
    assert files
    assert offenders(files, {"lightning"}) == {}


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("unimodal/training/module.py", True),
        ("unimodal/data/loader.py", True),
        ("unimodal/cli.py", True),
        ("unimodal/cli_generate.py", True),
        ("experiments/digits/__main__.py", True),
        ("unimodal/model.py", False),
        ("unimodal/client.py", False),
        ("unimodal/backbone/data/x.py", False),
        ("tokenizers/unimodal_tokenizers/data/x.py", False),
    ],
)
def test_where_lightning_is_allowed(place: str, allowed: bool) -> None:
    assert may_import_lightning(ROOT / place) is allowed


def test_only_one_lightning_is_imported() -> None:
    files = python_files(*(ROOT / name for name in OUR_FOLDERS))
    assert offenders(files, {"pytorch_lightning", "lightning_fabric"}) == {}


# --- packaging and recipes


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *project["build-system"]["requires"],
    ]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    missing = {canonical(re.split(r"[^\w.-]", line)[0]) for line in wanted} - {canonical(name) for name in pins}
    assert missing == set()


def header(text: str) -> dict[str, str]:
    """The `# Key: value` lines of the comment that opens a file."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"# (\w+):\s*(.*)", line)
        if match:
            found[match[1]] = match[2].strip()
    return found


def test_header_is_the_opening_comment_only() -> None:
    assert header("# What: a\n# more words\n# Paper: b\n\n# Command: c\n") == {"What": "a", "Paper": "b"}
    assert header("seed: 1\n# What: a\n") == {}


def test_every_recipe_opens_with_what_paper_command_and_measured() -> None:
    recipes = sorted((ROOT / "lightning_configs").rglob("*.y*ml"))
    assert recipes, "lightning_configs/ holds no recipe"
    lacking = {}
    for path in recipes:
        found = header(path.read_text(encoding="utf-8"))
        missing = [key for key in HEADER_KEYS if not found.get(key) or "not measured yet" in found[key]]
        if missing:
            lacking[str(path.relative_to(ROOT))] = missing
    assert lacking == {}


# --- what is downloaded


def test_literal_finder_sees_every_form() -> None:
    source = 'a.from_pretrained("x/y", b=1)\nurlopen(f"https://{c}")\nhf_hub_download(filename=d, repo_id="e")\n'
    assert len(list(fetched_literals(source + "a.from_pretrained(name)\nload_dataset(path, split='train')\n"))) == 3


def test_no_code_of_others_is_run_and_only_what_the_user_names_is_fetched() -> None:
    sources = {p: p.read_text(encoding="utf-8") for p in python_files(*PACKAGES.values(), ROOT / "experiments")}
    assert [str(path) for path, text in sources.items() if "trust_remote_code" in text] == []
    assert {str(path): found for path, text in sources.items() if (found := list(fetched_literals(text)))} == {}
