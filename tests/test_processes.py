"""Commands that several processes run: the same files for any number of them, one line when something is wrong."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (once, before processes are forked)
import pytest
from forking import ended, fork_ranks

from unimodal import commands, processes
from unimodal.cli import main
from unimodal.data.digits import caption
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.digits import evaluate_digits
from unimodal.export import open_model
from unimodal.processes import Processes, current, joined_processes, launched

RECIPE = Path(__file__).parents[1] / "lightning_configs" / "models" / "digits_mot_flow.yaml"
TINY = """
model:
  init_args:
    model:
      generator: {init_args: {sampling: {steps: 1, solver: euler, guidance: 1.0, shift: 1.0}}}
      backbone: {width: 16, depth: 1, heads: 1, kv_heads: 1, mlp_width: 16, vocabulary: 300}
data:
  init_args: {batch_tokens: 256, validation_documents: 1, prompts: 1}
trainer:
  {max_steps: 1, limit_val_batches: 0, precision: 32-true, accelerator: cpu, enable_progress_bar: false, logger: false}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.yaml").write_text(TINY)
    options = ["-c", str(RECIPE), "-c", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(folder / "run")]
    assert main(["fit", *options]) == 0
    return folder / "run"


def launch(count: int, folder: Path, work: Callable[[], int]) -> tuple[list[int], str]:
    """What `count` processes with the environment of torchrun end with, and all that they write to standard error."""
    folder.mkdir(parents=True, exist_ok=True)

    def told_apart() -> int:
        rank = os.environ["RANK"]
        sys.stdout, sys.stderr = (folder / f"{rank}.out").open("w"), (folder / f"{rank}.err").open("w")
        return work()

    codes = ended(fork_ranks(told_apart, count))
    return codes, "".join((folder / f"{rank}.err").read_text() for rank in range(count))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_are_the_same_bytes_for_any_number_of_processes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a handwritten six\na handwritten two\n")
    given = [
        "generate",
        "image",
        "--run",
        str(run),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "-n",
        "3",
        "--batch",
        "2",
    ]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    expected = content(tmp_path / "one")
    assert expected.keys() == {"images.jsonl", *(f"{i:05d}.png" for i in range(6))}
    assert len(set(expected.values())) == 4  # both prompts have the same seeds, and nothing was learned
    for count in (2, 3):
        out = tmp_path / str(count)
        codes, said = launch(count, tmp_path / f"logs{count}", lambda out=out: main([*given, "--out", str(out)]))
        assert codes == [0] * count, said
        assert content(out) == expected
        printed = [(tmp_path / f"logs{count}" / f"{rank}.out").read_text() for rank in range(count)]
        assert printed == [f"6 images in {out} (ema weights)\n", *[""] * (count - 1)]
    assert not list(tmp_path.glob(".writing*"))


def test_fewer_prompts_than_processes(run: Path, tmp_path: Path) -> None:
    given = ["generate", "image", "--run", str(run), "--prompt", "a handwritten six", "-n", "2"]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    codes, said = launch(3, tmp_path / "logs", lambda: main([*given, "--out", str(tmp_path / "three")]))
    assert codes == [0, 0, 0]
    assert "1 batches for 3 processes: --batch 1 keeps all at work" in said
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_a_document_is_written_by_one(run: Path, tmp_path: Path) -> None:
    given = ["generate", "document", "--run", str(run), "--prompt", "a handwritten", "--max-tokens", "4"]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    codes, said = launch(2, tmp_path / "logs", lambda: main([*given, "--out", str(tmp_path / "two")]))
    assert codes == [0, 0], said
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert (tmp_path / "logs" / "1.out").read_text() == ""


def test_digits_are_scored_alike_for_any_number_of_processes(run: Path, tmp_path: Path) -> None:
    model = open_model(run, device="cpu")

    def quick(
        model: Any, asked: Sequence[Document], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[Document]:  # fmt: skip
        """The model draws; to read takes long, so its text is made of the seed."""
        if settings.start == "image":
            return decode(model, asked, settings, seeds)
        return [d.extended([Part(caption(s % 10), role=GENERATED)]) for d, s in zip(asked, seeds, strict=True)]

    def score(out: Path) -> int:
        evaluate_digits(model, out, asked=40, sums=3, batch=20, decode_fn=quick)
        return 0

    def shared(out: Path) -> int:
        with joined_processes():
            return score(out)

    score(tmp_path / "1")
    assert {"scores.json", "samples.png", "index.html"} <= content(tmp_path / "1").keys()
    for count in (2, 3):
        out = tmp_path / str(count)
        codes, said = launch(count, tmp_path / f"logs{count}", lambda out=out: shared(out))
        assert codes == [0] * count, said
        assert content(out) == content(tmp_path / "1")


def test_a_benchmark_is_asked_by_all_and_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    given = ["evaluate", "digits-sums", "--run", str(run), "--limit", "5", "--batch", "2", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    expected = content(tmp_path / "one")
    for attempt in range(2):
        codes, said = launch(2, tmp_path / f"logs{attempt}", lambda: main([*given, "--out", str(tmp_path / "two")]))
        assert codes == [0, 0], said
        assert content(tmp_path / "two") == expected
        next((tmp_path / "two" / "answers").glob("*/samples/*")).unlink()


# ---- what goes wrong


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_in_one_process_stops_all_with_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    own = commands.decode

    def fails(*args: object) -> object:
        if os.environ.get("RANK") == str(wrong) and max(args[3]) >= 2:  # type: ignore[call-overload]
            raise ValueError("the weights: expected\nnumbers, got none")
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(commands, "decode", fails)
    given = ["generate", "image", "--run", str(run), "--prompt", "six", "-n", "6", "--batch", "1", "--device", "cpu"]
    codes, said = launch(2, tmp_path / "logs", lambda: main([*given, "--out", str(tmp_path / "out" / "new")]))
    assert codes == [2, 2]
    assert said == "unimodal: the weights: expected numbers, got none\n"
    assert not (tmp_path / "out" / "new").exists()
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("place", ["decode", "open_model"])
def test_a_failure_that_is_nobodys_argument_stops_all_and_is_raised_where_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, place: str
) -> None:
    own = getattr(commands, place)

    def fails(*args: object) -> object:
        if os.environ.get("RANK") == str(wrong):
            raise RuntimeError("CUDA out of memory.\nTried much")
        return own(*args)

    monkeypatch.setattr(commands, place, fails)
    given = ["generate", "image", "--run", str(run), "--prompt", "six", "-n", "6", "--batch", "1", "--device", "cpu"]

    def work() -> int:
        try:
            return main([*given, "--out", str(tmp_path / "out" / "new")])
        except RuntimeError as error:
            return 7 if str(error) == "CUDA out of memory.\nTried much" else 99

    codes, said = launch(2, tmp_path / "logs", work)
    assert codes == [7 if rank == wrong else 2 for rank in range(2)]
    assert said == ("unimodal: process 1 of 2 failed: RuntimeError: CUDA out of memory. Tried much\n" if wrong else "")
    assert not (tmp_path / "out" / "new").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["image", "--prompt", " "], "prompt: expected text, got an empty one"),
        (["image", "--prompt", "six", "--batch", "many"], "--batch: invalid int value"),
        (["document", "--prompt", " "], "--prompt: expected text or images, got an empty one"),
    ],
)
def test_a_wrong_argument_is_one_line(run: Path, tmp_path: Path, given: list[str], said: str) -> None:
    command = ["generate", *given, "--run", str(run), "--out", str(tmp_path / "out")]
    codes, found = launch(2, tmp_path / "logs", lambda: main(command))
    assert codes[0] == 2
    assert found.count("\n") == 1
    assert said in found


def test_what_only_the_main_process_finds_wrong_ends_the_others(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    command = ["generate", "image", "--run", str(run), "--prompt", "six", "--out", str(tmp_path / "out")]
    codes, said = launch(2, tmp_path / "logs", lambda: main(command))
    assert codes == [2, 2]
    assert said == f"unimodal: --out: expected a folder, got {tmp_path / 'out'}, which is a file\n"


# ---- one process


def test_without_a_launcher_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else
    assert not launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    one = current()
    assert one.main
    assert one.alone()
    assert one.agree(lambda: 5) == 5
    asked: list[list[int]] = []
    found = list(one.in_order([1, 2, 3], 2, lambda some: asked.append(list(some)) or [10 * i for i in some]))  # type: ignore[func-returns-value]
    assert found == [(1, 10), (2, 20), (3, 30)]
    assert asked == [[1, 2], [3]]


def test_each_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [Processes(r, 8, r).device("auto") for r in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert Processes(9, 16, 1).device("cuda") == "cuda:1"
    assert Processes(1, 8, 1).device("cpu") == "cpu"
    assert Processes(1, 8, 1).device("cuda:2") == "cuda:2"
    assert Processes().device("auto") == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [Processes(1, 2, 1).device(asked) for asked in ("auto", "cuda")] == ["auto", "cuda"]
