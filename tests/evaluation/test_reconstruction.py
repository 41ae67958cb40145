"""`unimodal evaluate reconstruction`: numbers against independent ones, sizes, broken images, and what it leaves."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.ndimage import gaussian_filter

from unimodal.cli import main
from unimodal.evaluation import reconstruction
from unimodal.evaluation.fingerprint import model_record
from unimodal.evaluation.reconstruction import Tally
from unimodal.export import ExportInfo, build, load_tokenizer, save_export
from unimodal.metrics.features import PixelFeatures
from unimodal.metrics.perceptual import LPIPS
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

VQ = {
    "class_path": "unimodal_tokenizers.GridTokenizer",
    "init_args": {
        "quantizer": {
            "class_path": "unimodal_tokenizers.quantizers.ResidualQuantizer",
            "init_args": {"entries": 16, "codebooks": 2, "dim": 4},
        },
        "channels": [8, 8],
        "blocks": 1,
    },
}
PATCH = {"class_path": "unimodal_tokenizers.PatchTokenizer", "init_args": {"patch": 2, "colours": 3}}


def export(folder: Path, config: dict[str, Any], name: str) -> Path:
    torch.manual_seed(0)
    tokenizer = build(config, "tokenizer")
    save_export(folder, tokenizer, config, ExportInfo("tokenizer", "raw", name, "unknown"))
    return folder


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("vq") / "export", VQ, "tiny")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of two sizes, which no stride divides."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i in range(5):
        array = rng.integers(0, 256, (25, 20 + 5 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / ("sub" if i == 3 else "") / f"{i}.png")
    return folder


def run(*arguments: object) -> int:
    return main(["evaluate", "reconstruction", *map(str, arguments), "--workers", "0", "--device", "cpu"])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(*arguments: object, names: str) -> None:
        capsys.readouterr()
        assert run(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert names in line, line

    return check


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one channel (Wang et al. 2004, eq. 13), the image mirrored at its edges."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5, mode="mirror")

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    top, bottom = (
        (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4),
        (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4),
    )
    return float((top / bottom).mean())


def test_numbers_are_those_of_other_libraries(vq: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--tokenizer", vq, "--images", pictures, "--out", out, "--batch", 2) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["asked"] for row in rows] == ["0.png", "1.png", "2.png", "4.png", "sub/3.png"]
    for row in rows:
        x, y = (np.asarray(Image.open(out / file)) for file in row["files"])
        source = np.asarray(Image.open(pictures / row["asked"]))
        left = (source.shape[1] - x.shape[1]) // 2
        assert np.array_equal(x, source[: x.shape[0], left : left + x.shape[1]])  # cropped to the stride, never scaled
        a, b = x / 255, y / 255
        assert row["psnr"] == pytest.approx(-10 * np.log10(np.mean((a - b) ** 2)), abs=1e-6)
        assert row["ssim"] == pytest.approx(np.mean([similarity(a[..., c], b[..., c]) for c in range(3)]), abs=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    measures = {name: number["value"] for name, number in summary["measures"].items()}
    assert summary["overall"] == pytest.approx(np.mean([max(row["ssim"], 0) for row in rows]))
    assert measures["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    # Two ids of 16 entries for every 2 x 2 pixels.
    assert measures["bits_per_pixel"] == pytest.approx(2 * 4 / 4)
    ids = []
    tokenizer = load_tokenizer(vq)
    for row in rows:
        pixels = torch.from_numpy(np.asarray(Image.open(out / row["files"][0])).copy()).permute(2, 0, 1)[None]
        ids.append(tokenizer.encode(pixels.float() / 127.5 - 1).values)
    for q, column in enumerate(torch.cat(ids).unbind(1)):
        share = torch.bincount(column, minlength=16) / len(column)
        assert measures[f"codebook_usage_{q}"] == pytest.approx(float((share > 0).float().mean()))
        entropy = -sum(p * math.log(p) for p in share.tolist() if p)
        assert measures[f"codebook_perplexity_{q}"] == pytest.approx(math.exp(entropy), rel=1e-4)
    record = summary["fingerprint"]
    assert "gaussian 11, sigma 1.5" in record["benchmark"]["ssim"]
    assert len(record["model"]["sha256"]) == 64
    page = (out / "index.html").read_text()
    assert page.index("originals/000000.png") < page.index("reconstructions/000000.png")


def test_lpips_is_that_of_the_pictures_it_wrote(vq: Path, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    weights = ["--lpips-weights", tmp_path / "squeeze.pth", "--lpips-network", "squeeze"]
    assert run("--tokenizer", vq, "--images", pictures, "--out", tmp_path / "out", "--size", "40x32", *weights) == 0
    distance = LPIPS(tmp_path / "squeeze.pth", "squeeze")
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        pair = [np.array(Image.open(tmp_path / "out" / file)) for file in row["files"]]
        x, y = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1 for pixels in pair)
        found.append(float(distance(x, y)))
        assert row["lpips"] == pytest.approx(found[-1], rel=1e-3)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["measures"]["lpips"]["value"] == pytest.approx(np.mean(found), rel=1e-3)
    assert summary["fingerprint"]["benchmark"]["lpips"]["network"] == "squeeze"


def test_a_tokenizer_that_loses_nothing_is_said_to(pictures: Path, tmp_path: Path) -> None:
    patch, out = export(tmp_path / "patch", PATCH, "patch"), tmp_path / "out"
    assert run("--tokenizer", patch, "--images", pictures, "--out", out, "--size", "10x8") == 0
    summary = json.loads((out / "summary.json").read_text())
    measures = {name: number["value"] for name, number in summary["measures"].items()}
    assert measures == {"psnr": 100.0, "ssim": pytest.approx(1), "numbers_per_pixel": 3.0, "broken": 0.0}
    assert Image.open(out / "originals" / "000002.png").size == (10, 8)


def test_rfid_compares_originals_with_reconstructions(
    vq: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pixels in the place of Inception, against the distance that the image-set benchmark finds."""
    monkeypatch.setattr(reconstruction, "make_features", lambda *_: PixelFeatures(2))
    monkeypatch.setattr(reconstruction, "checked_weights", lambda *_: "none")
    out, few = tmp_path / "out", ["--allow-few"]
    given = ["--tokenizer", vq, "--images", pictures, "--inception-weights", "torch-fidelity", *few]
    assert run(*given, "--out", out) == 0
    sets = [
        np.stack(
            [
                PixelFeatures(2).prepare(Image.open(path)).numpy().ravel() / 255
                for path in sorted((out / name).iterdir())
            ]
        )
        for name in ("originals", "reconstructions")
    ]
    means, (c, d) = [one.mean(0) for one in sets], [np.cov(one.T) for one in sets]
    roots = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    ours = json.loads((out / "summary.json").read_text())
    (mine,) = (n["value"] for name, n in ours["measures"].items() if "frechet" in name)
    assert mine == pytest.approx(((means[0] - means[1]) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots, abs=1e-5)
    features = ours["fingerprint"]["benchmark"]["rfid"]["features"]
    assert features[0]["name"] == "pixels12"  # settings are recorded


def test_broken_images_are_skipped_counted_and_named(
    vq: Path, pictures: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:200])
    given = ["--tokenizer", vq, "--images", pictures]
    refused(*given, "--out", tmp_path / "out", "--batch", "1", names="2.png: expected a whole image")
    assert not list((tmp_path / "out").rglob("*.*"))  # of the two that were written before it was met
    assert run(*given, "--out", tmp_path / "out", "--most-broken", "0.2") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["000000", "000001", "000003", "000004"]
    (named,) = (tmp_path / "out" / "broken.jsonl").read_text().splitlines()
    assert "2.png" in json.loads(named)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["measures"]["broken"]["value"] == 1
    assert summary["label"] == "complete"


def test_an_image_that_the_tokenizer_refuses_is_a_broken_one(
    pictures: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """Noise, whose JPEG has more bytes than the tokenizer has ids; the rest of the images is grey."""
    for path in pictures.rglob("*.png"):
        if path.name != "3.png":
            Image.new("RGB", (16, 16), (90, 90, 90)).save(path)
    settings = {"image": [16, 16], "length": 24, "quality": 25}
    codec = export(
        tmp_path / "codec", {"class_path": "unimodal_tokenizers.CodecTokenizer", "init_args": settings}, "codec"
    )
    given = ["--tokenizer", codec, "--images", pictures, "--out", tmp_path / "out"]
    refused(*given, names="sub/3.png: length: expected as many ids")
    refused(*given, "--size", "16x8", names="--size: image size: expected 16x16")
    assert run(*given, "--most-broken", "0.5") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["measures"]["broken"]["value"], summary["answers"]) == (1, 4)
    (named,) = (tmp_path / "out" / "broken.jsonl").read_text().splitlines()
    assert json.loads(named).startswith(f"{pictures / 'sub' / '3.png'}: length: expected")


def test_an_image_smaller_than_the_stride_is_named(vq: Path, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 9)).save(pictures / "0.png")
    given = ["--tokenizer", vq, "--images", pictures, "--out", tmp_path / "out"]
    assert run(*given, "--most-broken", "0.5") == 0
    (named,) = (tmp_path / "out" / "broken.jsonl").read_text().splitlines()
    assert json.loads(named).startswith(f"{pictures / '0.png'}: image: expected at least the stride's 2 pixels")


def test_options_of_a_model_that_answers_are_refused(
    vq: Path, pictures: Path, tmp_path: Path, refused: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tokenizer", vq, "--images", pictures, "--out", tmp_path / "out"]
    others = ["--guidance", "3", "--seed=0", "--part", "1/2", "--compile", "--no-score", "--top-k", "2", "--run", vq]
    names = "--guidance, --seed, --part, --compile, --no-score, --top-k, --run: a folder of images is reconstructed"
    refused(*given, *others, names=names)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", "reconstruction", "--help"])
    shown = capsys.readouterr().out
    assert "folder of images to reconstruct" in shown
    assert not any(option in shown for option in ("--guidance", "--seed", "--part", "answers by another"))


def test_results_say_which_weights_an_export_has(vq: Path, pictures: Path, tmp_path: Path) -> None:
    for weights in ("raw", "ema"):
        folder = Path(shutil.copytree(vq, tmp_path / weights))
        record = json.loads((folder / "export.json").read_text()) | {"weights": weights}
        (folder / "export.json").write_text(json.dumps(record))
        assert model_record(folder, "ema")["weights"] == weights
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert model_record(folder, "raw")["weights"] == "raw"


def test_published_weights_are_to_be_imported_first(
    pictures: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    given = ["--images", pictures, "--out", tmp_path / "out", "--tokenizer", folder]
    refused(*given, names=f"got the published weights {folder}; `unimodal import tokenizer {folder} --out EXPORT`")
    (folder / "config.json").unlink()
    refused(*given, names="holds no export yet")


def test_wrong_arguments_are_one_line(vq: Path, pictures: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    out = tmp_path / "out"
    refused("--tokenizer", vq, "--out", out, names="--images: expected a folder of images to reconstruct, got none")
    refused("--images", pictures, "--out", out, names="tokenizer")
    refused("--tokenizer", tmp_path / "none", "--images", pictures, "--out", out, names="tokenizer: expected a folder")
    refused(
        "--tokenizer", vq, "--images", pictures, "--out", out, "--size", "9x8", names="--size: image size: expected"
    )
    refused("--tokenizer", vq, "--images", pictures, "--out", out, "--size", "9", names="--size: expected WIDTHxHEIGHT")
    refused("--tokenizer", vq, "--images", pictures, "--out", out, "--limit", "3", names="--limit")
    refused("--tokenizer", vq, "--images", pictures, "--out", out, "--most-broken", "1", names="--most-broken")
    weights = ["--lpips-weights", tmp_path / "vgg.pth"]
    refused("--tokenizer", vq, "--images", pictures, "--out", out, *weights, names="vgg.pth")
    assert run("--tokenizer", vq, "--images", pictures, "--out", out) == 0
    refused("--tokenizer", vq, "--images", pictures, "--out", out, names="originals of another evaluation")


def test_tokens_behind_the_end_of_an_image_are_none() -> None:
    tally = Tally(TokenLayout("sequence", dim=4, stride=2, codebooks=(5,), length=3, image=(2, 6)), end=4)
    tally.add(ImageTokens(torch.tensor([0, 4, 4, 1, 2, 0, 4, 3, 3]), (Grid(1, 3),) * 3), 36)
    measures = tally.measures()
    assert measures["bits_per_pixel"] == pytest.approx((2 + 3 + 1) * math.log2(5) / 36)
    assert measures["codebook_usage"] == pytest.approx(4 / 5)  # 0, 1, 2 and the end; what stands behind it is not there


def test_tokens_of_a_binary_codebook_too_large_to_count_still_have_a_rate() -> None:
    tally = Tally(TokenLayout("discrete", dim=4, stride=2, codebooks=(2**30,)))
    tally.add(ImageTokens(torch.tensor([0, 2**29]), (Grid(1, 2),)), 8)
    assert tally.measures() == {"bits_per_pixel": 2 * 30 / 8}
