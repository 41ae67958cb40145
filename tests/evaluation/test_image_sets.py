"""A folder of images becomes numbers with the right names; protocols are kept whole; what is wrong is said at once."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unimodal.documents import Part
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.command import Options, evaluate
from unimodal.evaluation.image_files import (
    Loading,
    image_paths,
    listing_sha256,
)
from unimodal.evaluation.image_sets import ImageSets, evaluate_folder, make_features, save_statistics
from unimodal.evaluation.results import Summary
from unimodal.evaluation.set_protocols import PROTOCOLS, reference_kind
from unimodal.evaluation.set_scores import Family, SetOptions, read_reference, score_folder, write_statistics
from unimodal.images import load_image
from unimodal.metrics import distances, inception
from unimodal.metrics.features import LogitFeatures, PixelFeatures, TextImageFeatures, as_drawn
from unimodal.metrics.manifolds import precision_recall_density_coverage
from unimodal.metrics.moments import Moments, load_statistics

ALONE = Loading(batch=7, workers=0)
CUSTOM = PROTOCOLS["custom"]


def draw(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (8, 8), bright: float = 0.5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        ramp = rng.random(3) * bright * np.linspace(0.3, 1, size[0])[None, :, None] + rng.random((1, 1, 3)) * 0.5
        noise = rng.random((size[1], size[0], 3)) * 0.4
        Image.fromarray((255 * np.clip(ramp + noise, 0, 1)).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("sets") / "real", 40)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("sets") / "fake", 30, seed=1, bright=0.7)


def pixels(folder: Path, size: int = 2) -> np.ndarray:
    shrunk = [load_image(path).resize((size, size), Image.Resampling.BOX) for path in image_paths(folder)]
    return np.stack([np.asarray(image).transpose(2, 0, 1).ravel() / 255 for image in shrunk]).astype(np.float32)


PIXELS = Family(PixelFeatures(2), ("frechet", "kernel", "manifold"))
OPTIONS = SetOptions(subsets=4, subset_size=20)


# ---- numbers


def test_a_folder_against_a_folder(real: Path, fake: Path) -> None:
    found = score_folder(fake, [PIXELS], real, options=OPTIONS, loading=ALONE)
    a, b = pixels(real), pixels(fake)
    four = precision_recall_density_coverage(a, b)
    expected = {
        "frechet_pixels12": distances.frechet_distance(Moments.of(a), Moments.of(b)),
        "kernel_pixels12": distances.kernel_distance(a, b, 4, 20).mean,
        **{f"{name}_pixels12": value for name, value in four.by_name().items()},
    }
    assert dict(found.measures) == pytest.approx(expected, rel=1e-6)
    assert (found.samples, found.label) == (30, "complete")
    assert not {"fid", "kid", "precision"} & found.measures.keys()
    json.dumps(found.to_json())


@pytest.mark.parametrize("loading", [Loading(batch=1, workers=0), Loading(batch=64, workers=2)])
def test_batches_and_workers_do_not_matter(real: Path, fake: Path, loading: Loading) -> None:
    expected = score_folder(fake, [PIXELS], real, options=OPTIONS, loading=ALONE)
    found = score_folder(image_paths(fake), [PIXELS], real, options=OPTIONS, loading=loading)
    assert dict(found.measures) == pytest.approx(dict(expected.measures), rel=1e-9)


def test_every_kind_of_reference_gives_the_same_numbers(real: Path, fake: Path, tmp_path: Path) -> None:
    expected = dict(score_folder(fake, [PIXELS], real, options=OPTIONS, loading=ALONE).measures)
    images = np.stack([np.asarray(load_image(path)) for path in image_paths(real)])
    np.savez(tmp_path / "images.npz", arr_0=images)
    write_statistics(real, PixelFeatures(2), tmp_path / "kept.npz", keep_features=True, loading=ALONE)
    moments = Moments.of(pixels(real))
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=moments.mean, sigma=moments.cov, mu_s=[0.0], sigma_s=[[1.0]])
    np.savez(tmp_path / "feats.npz", feats=pixels(real))
    for name, kind in (("images", "images"), ("kept", "statistics"), ("adm", "adm"), ("feats", "features")):
        path = tmp_path / f"{name}.npz"
        assert reference_kind(path) == kind
        found = score_folder(fake, [PIXELS], path, options=OPTIONS, loading=ALONE)
        assert dict(found.measures) == pytest.approx(expected, rel=1e-6)
        assert found.spec["features"][0]["reference"]["sha256"]
    write_statistics(real, PixelFeatures(2), tmp_path / "alone.npz", loading=ALONE)
    only = score_folder(fake, [Family(PixelFeatures(2), ("frechet",))], tmp_path / "alone.npz", loading=ALONE)
    assert dict(only.measures) == pytest.approx({"frechet_pixels12": expected["frechet_pixels12"]}, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"kernel_pixels12, manifold_pixels12 compares features one by one, and .*alone"
    ):
        score_folder(fake, [PIXELS], tmp_path / "alone.npz", options=OPTIONS, loading=ALONE)


def test_statistics_made_otherwise_are_refused(real: Path, fake: Path, tmp_path: Path) -> None:
    family = Family(PixelFeatures(2), ("frechet",))
    path = tmp_path / "ours.npz"
    made = write_statistics(real, PixelFeatures(2), path, loading=ALONE)
    assert made.n == 40
    statistics = load_statistics(path)
    assert statistics.provenance["images"] == 40
    assert statistics.provenance["features"] == PixelFeatures(2).spec()
    other = replace(family, features=Renamed("pixels12", resize="another"))
    with pytest.raises(ValueError, match=r"ours\.npz was made with resize PIL box to 2x2, got another"):
        score_folder(fake, [other], path, loading=ALONE)
    np.savez(tmp_path / "theirs.npz", mu=made.mean, sigma=made.cov)
    with pytest.raises(ValueError, match=r"reference: pixels27 has 27 features, .*theirs\.npz has 12"):
        score_folder(fake, [Family(PixelFeatures(3), ("frechet",))], tmp_path / "theirs.npz", loading=ALONE)
    with pytest.raises(ValueError, match=r"out: expected a name ending in \.npz"):
        write_statistics(real, PixelFeatures(2), tmp_path / "x.pkl", loading=ALONE)


class Renamed(PixelFeatures):
    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(2)
        self.name, self.more = name, more

    def spec(self) -> dict[str, Any]:
        return super().spec() | self.more


def test_memory_does_not_grow_where_moments_are_enough(real: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("all features at once")

    monkeypatch.setattr(torch, "cat", refuse)
    family = Family(PixelFeatures(2), ("frechet",))
    assert read_reference(real, family, CUSTOM, ALONE).features is None
    score_folder(fake, [family], real, loading=ALONE)


# ---- too few


def test_fewer_images_than_features_are_an_error_unless_asked_for(real: Path, fake: Path) -> None:
    family = Family(PixelFeatures(4), ("frechet", "kernel"))  # 48 features, 30 images
    with pytest.raises(ValueError, match=r"images: expected at least 48 for frechet_pixels48, got 30; .*allow-few"):
        score_folder(fake, [family], real, options=OPTIONS, loading=ALONE)
    few = score_folder(fake, [family], real, options=SetOptions(4, 1000, allow_few=True), loading=ALONE)
    assert few.label == few.spec["label"] == "not comparable: 30 images for 48 features"
    assert set(few.measures) == {"frechet_pixels48_not_comparable", "kernel_pixels48_not_comparable"}
    enough = score_folder(fake, [family], real, options=SetOptions(4, 20, allow_few=True), loading=ALONE)
    assert set(enough.measures) == {"frechet_pixels48_not_comparable", "kernel_pixels48"}
    with pytest.raises(ValueError, match="images: expected at least 1000 for kernel_pixels12, got 30"):
        score_folder(fake, [PIXELS], real, loading=ALONE)


def test_a_reference_of_too_few_images_is_refused_before_the_images_are_read(
    real: Path, fake: Path, tmp_path: Path
) -> None:
    few = draw(tmp_path / "few", 8)
    with pytest.raises(ValueError, match="reference: expected at least 12 images for frechet_pixels12, got 8"):
        score_folder(fake, [PIXELS], few, options=OPTIONS, loading=ALONE)
    found = score_folder(fake, [PIXELS], few, options=replace(OPTIONS, allow_few=True), loading=ALONE)
    assert "frechet_pixels12_not_comparable" in found.measures


# ---- Inception: the name, and the score


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception.EmptyInception().state_dict(), path)
    return path


def test_only_inception_makes_a_fid(weights: Path, tmp_path: Path) -> None:
    few = draw(tmp_path / "few", 4, size=(40, 30))
    benchmark = ImageSets(metrics=["inception_score"], inception_weights=str(weights), workers=0, feature_batch=3)
    benchmark.options = replace(benchmark.options, splits=2)
    measures = benchmark.set_measures(image_paths(few), few)
    # A net that knows nothing, and whose numbers are not called as those of the published weights are.
    assert measures == {"inception_score_inception2048": pytest.approx(1, abs=0.01)}
    features = benchmark.families[0].features
    assert (features.measure("frechet"), features.measure("kernel")) == (
        "frechet_inception2048",
        "kernel_inception2048",
    )
    spec = benchmark.spec()
    assert (spec["features"][0]["resize"], spec["features"][0]["published_weights"]) == ("clean", False)
    json.dumps(spec)


class Tiny(LogitFeatures, TextImageFeatures):
    """Three mean colours as features, as logits, and as embeddings of texts that name a colour."""

    def __init__(self) -> None:
        super().__init__("tiny", 3, as_drawn, {"clip_score": "clip_score", "inception_score": "inception_score"})

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3)) / 255

    def logits(self, features: Tensor) -> Tensor:
        return features * 9

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(colour in text) for colour in ("red", "green", "blue")] for text in texts])

    def spec(self) -> dict[str, Any]:
        return {"name": self.name}


def test_captions_go_with_their_images(tmp_path: Path) -> None:
    colours = ["red", "lime", "blue", "red"]
    for number, colour in enumerate(colours):
        Image.new("RGB", (5 + number // 3, 4), colour).save(tmp_path / f"{number}.png")  # the last is of another size
    texts = ["red", "green", "blue", "green"]
    family = Family(Tiny(), ("clip_score", "inception_score"))
    found = score_folder(tmp_path, [family], captions=texts, options=SetOptions(splits=1), loading=Loading(3, 0))
    assert found.measures["clip_score"] == pytest.approx(75)
    p = np.exp(9 * np.eye(3)[[0, 1, 2, 0]])
    p /= p.sum(1, keepdims=True)
    kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert found.measures["inception_score"] == pytest.approx(np.exp(kl), rel=1e-5)
    with pytest.raises(ValueError, match="prompts: expected one for each of 4 images, got 3"):
        score_folder(tmp_path, [family], captions=texts[:3], loading=ALONE)
    with pytest.raises(ValueError, match="prompts: expected a file of captions for clip_score"):
        score_folder(tmp_path, [family], loading=ALONE)
    with pytest.raises(ValueError, match="clip_score: expected CLIP, got pixels12"):
        Family(PixelFeatures(2), ("clip_score",))
    with pytest.raises(ValueError, match="inception_score: expected Inception, got pixels12"):
        Family(PixelFeatures(2), ("inception_score",))
    with pytest.raises(ValueError, match="kinds: expected some of frechet"):
        Family(PixelFeatures(2), ("fid",))


# ---- protocols


def test_protocols_say_what_the_sources_say() -> None:
    facts = {name: (p.samples, p.size, p.resize, p.kinds) for name, p in PROTOCOLS.items()}
    assert facts == {
        "custom": (None, None, None, ()),
        "imagenet256-50k": (50_000, (256, 256), "tf1", ("adm",)),
        "coco30k": (30_000, (256, 256), "crop8", ("statistics",)),
        "mjhq30k": (30_000, (1024, 1024), "clean", ("folder", "statistics")),
    }
    assert PROTOCOLS["imagenet256-50k"].metrics == ("fid", "inception_score", "precision_recall")
    assert len(PROTOCOLS["mjhq30k"].categories) == 10
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.resize is None or protocol.resize in inception.RESIZES


@pytest.mark.parametrize("name", ["imagenet256-50k", "coco30k", "mjhq30k"])
def test_a_protocol_is_not_kept_by_half(name: str, fake: Path, real: Path, tmp_path: Path) -> None:
    protocol = PROTOCOLS[name]
    with pytest.raises(ValueError, match=rf"images: {name} has [35]0000, got 30"):
        protocol.check_images(image_paths(fake))
    with pytest.raises(ValueError, match=rf"0000\.png: expected {protocol.size[0]}x{protocol.size[1]} pixels, got 8x8"):  # type: ignore[index]
        replace(protocol, samples=30).check_images(image_paths(fake))
    other = "pytorch"
    with pytest.raises(ValueError, match=rf"resize: {name} has {protocol.resize}, got pytorch"):
        protocol.check_settings(protocol.metrics, other)
    with pytest.raises(ValueError, match=rf"metrics: {name} has fid.*, and fid.* is missing"):
        protocol.check_settings(["kid"], str(protocol.resize))
    protocol.check_settings([*protocol.metrics, "kid"], str(protocol.resize))
    moments = Moments.of(pixels(real))
    np.savez(tmp_path / "statistics.npz", mu=moments.mean, sigma=moments.cov)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    folders: dict[str, list[Path | str]] = {"imagenet256-50k": [real, "statistics.npz"], "coco30k": [real]}
    for path in [*folders.get(name, []), "images.npz"]:
        with pytest.raises(ValueError, match=rf"reference: {name} has .*, got "):
            protocol.check_reference(tmp_path / path)
    with pytest.raises(ValueError, match="metrics: expected some of fid, kid"):
        protocol.check_settings(["is"], str(protocol.resize))


def test_adms_file_has_its_ten_thousand_images(tmp_path: Path) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=np.zeros((3, 256, 256, 3), np.uint8), mu=[0.0], sigma=[[1.0]], mu_s=[0.0], sigma_s=[[1.0]])
    with pytest.raises(ValueError, match=r"has images \(10000, 256, 256, 3\) beside its statistics, got \(3, 256"):
        PROTOCOLS["imagenet256-50k"].check_reference(path)
    replace(PROTOCOLS["imagenet256-50k"], reference_samples=3).check_reference(path)


@pytest.mark.parametrize("name", ["coco30k", "mjhq30k"])
def test_statistics_of_some_of_the_reference_are_refused(name: str, real: Path, tmp_path: Path) -> None:
    """One category of the ten, say: our own files know how many images they are of."""
    write_statistics(real, PixelFeatures(2), tmp_path / "some.npz", loading=ALONE)
    protocol = PROTOCOLS[name]
    with pytest.raises(
        ValueError, match=rf"reference: {name} has (30000|40504) images, got statistics of 40 \(.*some\.npz"
    ):
        protocol.check_reference(tmp_path / "some.npz")
    replace(protocol, reference_samples=40).check_reference(tmp_path / "some.npz")


def test_answers_in_the_harness_layout_are_counted_by_their_prompts(real: Path, tmp_path: Path) -> None:
    """A missing image makes a set partial; it never shrinks what is divided by."""
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers"
    prompts.write_text("".join(f"a picture, number {i}\n" for i in range(20)))
    drawn = draw(tmp_path / "flat", 40, seed=3)
    options = {"metrics": ["pixels"], "pixel_size": 2, "subset_size": 20, "workers": 0}

    def scored(samples: int, images: Path) -> Summary:
        found = evaluate(
            ImageSets(real, prompts, samples=samples, **options), Options(out=tmp_path / "out", images=images)
        )
        assert found is not None
        return found

    folder, made = AnswerFolder(answers, draws=True, samples=2), ImageSets(real, prompts, samples=2, **options)
    files = image_paths(drawn)
    for i, item in enumerate(made.items()):
        for sample in range(2):
            folder.write(item, sample, [Part(Image.open(files[2 * i + sample]))])
    whole = scored(2, answers)
    assert (whole.label, whole.answers, whole.expected) == ("complete", 40, 40)
    assert whole.measures
    shutil.rmtree(answers / "00007")
    part = scored(2, answers)
    assert (part.label, part.answers, part.expected, part.measures) == ("PARTIAL", 38, 40, {})
    with pytest.raises(ValueError, match="samples: expected 1 for a folder whose images are told by their order alone"):
        scored(2, drawn)
    with pytest.raises(ValueError, match="prompts: expected one for each of 40 images, got 20"):
        scored(1, drawn)


def test_categories_are_scored_apart_and_must_be_full(tmp_path: Path) -> None:
    names = ("animals", "food")
    protocol = replace(PROTOCOLS["mjhq30k"], samples=40, size=(8, 8), categories=names, reference_samples=50)
    for seed, name in enumerate(names):
        draw(tmp_path / "real" / name, 25, seed)
        draw(tmp_path / "fake" / name, 20, seed + 5)
    family = Family(PixelFeatures(2), ("frechet",))
    found = score_folder(tmp_path / "fake", [family], tmp_path / "real", protocol=protocol, loading=ALONE)
    for name in names:
        a, b = (Moments.of(pixels(tmp_path / side / name)) for side in ("real", "fake"))
        assert found.measures[f"frechet_pixels12/{name}"] == pytest.approx(distances.frechet_distance(a, b), rel=1e-6)
    whole = [Moments.of(pixels(tmp_path / side)) for side in ("real", "fake")]
    assert found.measures["frechet_pixels12"] == pytest.approx(distances.frechet_distance(*whole), rel=1e-6)
    (tmp_path / "fake" / "food" / "0003.png").rename(tmp_path / "fake" / "animals" / "x.png")
    with pytest.raises(
        ValueError, match="images: mjhq30k has 20 images in each of animals, food, got animals 21, food 19"
    ):
        score_folder(tmp_path / "fake", [family], tmp_path / "real", protocol=protocol, loading=ALONE)
    with pytest.raises(ValueError, match="reference: mjhq30k has 51 images, got 50"):
        replace(protocol, reference_samples=51).check_reference(tmp_path / "real")
    shutil.move(tmp_path / "real" / "food", tmp_path / "real" / "meals")
    with pytest.raises(
        ValueError, match="reference: mjhq30k has 25 images in each of animals, food, got animals 25, meals"
    ):
        protocol.check_reference(tmp_path / "real")


# ---- the benchmark


def test_items_are_prompts_and_answers_find_theirs(real: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\na blue circle\n")
    benchmark = ImageSets(real, prompts, metrics=["pixels"], pixel_size=2, subset_size=20, workers=0)
    assert [(item.id, item.task, item.prompt.text) for item in benchmark.items()] == [
        ("00000", "images", "a red square"), ("00001", "images", "a blue circle"),
    ]  # fmt: skip
    assert not any(part.learn for item in benchmark.items() for part in item.prompt.parts)
    assert benchmark.settings(None).max_images == 1
    paths = [tmp_path / "answers" / item / "samples" / "00000.png" for item in ("00001", "00000")]
    found = benchmark._prompts_of(paths)
    assert found is not None
    assert [prompt.text for prompt in found] == ["a blue circle", "a red square"]
    plain = benchmark._prompts_of([tmp_path / "a.png", tmp_path / "b.png"])
    assert plain == benchmark.prompts
    with pytest.raises(ValueError, match="prompts: expected one for each of 3 images, got 2"):
        benchmark._prompts_of([tmp_path / "a.png"] * 3)


def test_verdicts_say_which_images_lie_among_the_real_ones(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = draw(tmp_path / "fake", 12, seed=3, bright=1.5)
    benchmark = ImageSets(real, metrics=["pixels"], pixel_size=2, subset_size=10, workers=0, allow_few=True)
    seen = []

    def counted(features: PixelFeatures, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return forward(features, pixels)

    forward = PixelFeatures.forward
    monkeypatch.setattr(PixelFeatures, "forward", counted)
    rows, paths = benchmark.take_folder(folder)
    measures = benchmark.set_measures(paths, folder)
    found = benchmark.verdicts(rows)
    assert sum(seen) == 40 + 12  # each image once, the real ones too
    scores = [row["score"] for row in found]
    assert 0 < np.mean(scores) < 1
    assert np.mean(scores) == pytest.approx(measures["precision_pixels12"])
    assert all(bool(row["reason"]) == (row["score"] == 0) for row in found)
    a, b = pixels(real), pixels(folder)
    radii = np.sort(np.linalg.norm(a[:, None] - a[None], axis=-1), axis=1)[:, 3]
    assert scores == [float((np.linalg.norm(a - image, axis=1) <= radii).any()) for image in b]
    assert [row["id"] for row in found] == [path.name for path in paths]
    plain = ImageSets(real, metrics=["pixels"], pixel_size=2, subset_size=10, workers=0, allow_few=True)
    assert plain.verdicts(rows) == rows


def test_the_fingerprint_does_not_know_how_the_folder_is_spelt(
    real: Path, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fake, tmp_path / "here" / "sub")
    monkeypatch.chdir(tmp_path)
    found = set()
    for spelt in (tmp_path / "here", Path("here"), Path("here/../here"), Path("./here")):
        benchmark = ImageSets(real, metrics=["pixels"], pixel_size=2, subset_size=20, workers=0)
        evaluate_folder(benchmark, spelt, tmp_path / "out")
        assert benchmark.scores is not None
        found.add(benchmark.scores.spec["images_sha256"])
        found.add(listing_sha256(image_paths(spelt), spelt))
    assert len(found) == 1
    assert score_folder(image_paths(Path("here/sub")), [PIXELS], real, options=OPTIONS, loading=ALONE).spec[
        "images_sha256"
    ] == listing_sha256(image_paths(fake), fake)


def test_any_folder_is_scored_with_one_call(real: Path, fake: Path, tmp_path: Path) -> None:
    benchmark = ImageSets(real, metrics=["pixels"], pixel_size=2, subset_size=20, workers=0)
    summary = evaluate_folder(benchmark, fake, tmp_path / "out")
    expected = score_folder(fake, [PIXELS], real, options=SetOptions(subset_size=20), loading=ALONE)
    assert {name: number.value for name, number in summary.measures.items()} == pytest.approx(dict(expected.measures))
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert record["label"] == "complete"
    assert record["fingerprint"]["benchmark"]["features"][0]["name"] == "pixels12"
    assert record["fingerprint"]["benchmark"]["scored"]["images_sha256"] == listing_sha256(image_paths(fake), fake)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 30


def test_missing_things_fail_when_the_benchmark_is_made(real: Path, tmp_path: Path, weights: Path) -> None:
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(2), sigma=np.eye(2))  # of how many images is not said
    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: ImageSets(),
            "inception_weights: expected a file of weights, or torch-fidelity to download .*, got none",
        ),
        (lambda: ImageSets(real, inception_weights="x.pth"), r"inception_weights: .* got x\.pth, which is missing"),
        (lambda: ImageSets(inception_weights=str(weights)), "reference: expected a folder of real images or an .npz"),
        (lambda: ImageSets(real, metrics=["fd_dinov2"], dino_weights="y.pth"), r"dino_weights: .*y\.pth"),
        (lambda: ImageSets(real, metrics=["cmmd"]), "cmmd_weights: .*or openai to download them, got none"),
        (lambda: ImageSets(metrics=["clip_score"], clip_weights="openai"), "prompts: expected a file of captions"),
        (lambda: ImageSets(real, metrics=["pixels"], samples=0), "samples: expected at least 1"),
        (lambda: ImageSets(real, metrics=["pixels"], workers=-1), "workers: expected 0 or more"),
        (lambda: ImageSets(real, metrics=["pixels"], feature_batch=0), "feature_batch: expected at least 1"),
        (lambda: ImageSets(real, metrics=["pixel"]), "metrics: expected some of fid, .*got pixel"),
        (lambda: ImageSets(tmp_path / "none.npz", metrics=["pixels"]), r"none\.npz: .*no such file"),
        (lambda: ImageSets(real, protocol="coco30k", inception_weights=str(weights)), "reference: coco30k has MS-COCO"),
        (
            lambda: ImageSets(statistics, protocol="coco30k", inception_weights=str(weights)),
            "inception_weights: coco30k has the published file, whose SHA-256 begins with 6726825d, got",
        ),
        (lambda: ImageSets(real, metrics=["pixels"]).items(), "prompts: expected a file of prompts to draw images of"),
        (lambda: make_features("inception", None), "inception_weights: expected a file"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_statistics_of_a_folder_as_a_command(real: Path, tmp_path: Path) -> None:
    made = save_statistics(real, tmp_path / "a.npz", "pixels", pixel_size=2, keep_features=True, workers=0)
    np.testing.assert_allclose(made.mean, pixels(real).mean(0), rtol=1e-6)
    images = np.stack([np.asarray(load_image(path)) for path in image_paths(real)])
    np.savez(tmp_path / "images.npz", arr_0=images)
    again = save_statistics(tmp_path / "images.npz", tmp_path / "b.npz", "pixels", pixel_size=2, workers=0)
    np.testing.assert_allclose(made.cov, again.cov)
    assert load_statistics(tmp_path / "a.npz").features is not None
    assert load_statistics(tmp_path / "b.npz").features is None
