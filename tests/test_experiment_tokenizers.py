"""The comparison of tokenizers: photographs, baselines, a row from end to end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.tokenizers import baselines, photographs
from experiments.tokenizers.__main__ import main, settings
from experiments.tokenizers.report import aims, table
from experiments.tokenizers.table import TABLE, Entry, chosen
from unimodal_tokenizers import CodecTokenizer, GridTokenizer, ImageTokenizer
from unimodal_tokenizers.quantizers import BSQ


def test_a_held_out_photograph_is_in_no_crop() -> None:
    everything = photographs.photographs()
    assert set(photographs.TEST) < set(everything)
    kept = photographs.training("coffee")
    assert len(kept) == len(everything) - 1
    assert all(pixels is not everything["coffee"] for pixels in kept)


def test_tiles_lie_beside_each_other() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    found = photographs.tiles(pixels, 2)
    slow = [pixels[y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_array_equal(found, np.stack(slow))


def test_crops_are_functions_of_their_number() -> None:
    crops = photographs.Crops(photographs.training("rocket"), 8)
    assert crops[3].tobytes() == crops[3].tobytes()
    assert crops[3].tobytes() != crops[4].tobytes()


def test_a_baseline_with_everything_changes_nothing() -> None:
    images = [torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(i)).byte() for i in range(16)]
    whole = baselines.fit("pca", 48, images)
    torch.testing.assert_close(baselines.through(whole, images[0]), images[0], rtol=0, atol=0)
    few = baselines.fit("k-means", 4, images)
    made = baselines.patches_of([baselines.through(few, image) for image in images])
    assert len(np.unique(made, axis=0)) <= 4


def test_names_are_known() -> None:
    assert [entry.name for entry in chosen(["fsq", "kl"])] == ["fsq", "kl"]
    with pytest.raises(ValueError, match=r"--only: expected among kl; .*, got vqq"):
        chosen(["vqq"])


def test_every_entry_can_be_built() -> None:
    for entry in TABLE:
        tokenizer = entry.build()
        assert set(entry.weights or {}) <= set(getattr(tokenizer, "weights", {})), entry.name
        assert tokenizer.layout.grid(photographs.SIDE, photographs.SIDE).length > 0


def test_a_setting_that_changed_makes_another_run() -> None:
    def said(build: Callable[[], ImageTokenizer], weights: dict[str, float] | None = None) -> dict[str, Any]:
        return settings(Entry("one", "paper", build, weights=weights))

    def grid(**given: Any) -> Callable[[], ImageTokenizer]:
        return lambda: GridTokenizer(BSQ(4, **given), channels=[8], blocks=1, groups=4)

    assert said(grid()) == said(grid())
    assert said(grid()) != said(grid(temperature=0.5))
    assert said(grid()) != said(grid(), {"entropy": 5.0})
    assert said(grid())["start_sha256"] == said(grid(temperature=0.5))["start_sha256"]
    codecs = [said(lambda q=q: CodecTokenizer((16, 16), 100, q)) for q in (40, 90)]
    assert codecs[0] != codecs[1]


def test_a_run_ends_in_a_report_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    small = {name: rng.integers(0, 256, (64, 128, 3), dtype=np.uint8) for name in (*photographs.TEST, "other")}
    monkeypatch.setattr(photographs, "photographs", lambda: small)
    monkeypatch.setattr("experiments.tokenizers.__main__.ENTRIES", 16)
    command = ["--out", str(tmp_path), "--steps", "1", "--only", "sequence", "codec", "--held-out", "coffee"]
    assert main(command) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"pca", "k-means", "sequence", "codec"}
    assert rows["sequence"]["bits_per_pixel"] == pytest.approx(64 * 10 / 64**2)
    assert rows["k-means"]["bits_per_pixel"] == pytest.approx(4 / 16)
    assert "| sequence | TiTok | 0.156 bits/pixel |" in (tmp_path / "report.md").read_text()
    assert rows["codec"]["steps"] == 0
    assert "train_seconds" not in rows["codec"]
    assert (tmp_path / "reconstructions.png").is_file()
    (path,) = tmp_path.glob("runs/sequence*/row.json")
    row = json.loads(path.read_text())
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    made = []
    monkeypatch.setattr("experiments.tokenizers.__main__.row_of", lambda *_: made.append(1) or (row, list(pictures)))
    assert main(command) == 0
    assert not made
    for key, other in (
        ("start_sha256", "0"),
        ("settings_sha256", "0"),
        ("precision", "64-true"),
    ):  # of an earlier version
        path.write_text(json.dumps(row | {key: other}))
        assert main(command) == 0
        assert json.loads(path.read_text()) == row
    assert len(made) == 3


def test_aims_are_told_from_rows() -> None:
    def row(name: str, psnr: float, used: float | None = None) -> dict[str, object]:
        common = {"ssim": 0.5, "steps": 1, "numbers_per_pixel": 0.25}
        more = {} if used is None else {"training_codebook_usage": used}
        return {"name": name, "held_out": "coffee", "psnr": psnr, **common, **more}

    rows = [row("pca", 20), row("kl", 23.5), row("k-means", 20), row("vq", 22, 0.95)]
    said = aims(rows)
    assert "- kl at least 3 dB above pca: 3.50 dB, met" in said
    assert "- vq at least 3 dB above k-means: 2.00 dB, not met" in said
    assert "- vq uses at least 90 %: 95.0 %, met" in said
    assert "- PSNR rises with residual depth 1, 2, 4: not measured" in said
    assert table(rows).splitlines()[2].startswith("| pca | baseline | 0.25 numbers/pixel | 20.00 (20.0) |")
