"""Moments gathered in pieces equal those made at once; files of others are read, and bad ones refused."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unimodal.files import file_sha256
from unimodal.metrics.moments import (
    SPATIAL,
    Moments,
    StreamingMoments,
    load_features,
    load_statistics,
    npz_keys,
    save_statistics,
)


def features(n: int = 200, width: int = 6) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 3).astype(np.float32))


def stream(parts: list[torch.Tensor]) -> StreamingMoments:
    streaming = StreamingMoments(parts[0].shape[1])
    for part in parts:
        streaming.update(part)
    return streaming


def same(a: Moments, b: Moments, rtol: float = 1e-10) -> None:
    assert a.n == b.n
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.cov, b.cov, rtol=rtol, atol=1e-12)


# ---- streaming


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [7, 93, 0, 100], [199, 1]])
def test_any_split_into_batches_gives_the_moments_of_all_at_once(sizes: list[int]) -> None:
    values = features()
    once = Moments(200, values.double().mean(0).numpy(), np.cov(values.double().numpy(), rowvar=False))
    same(stream(list(values.split(sizes))).moments(), once)
    same(Moments.of(values), once)


def test_halves_of_two_processes_merge() -> None:
    values = features()
    one, other = stream([values[:60]]), stream([values[60:]])
    one.merge(other)
    same(one.moments(), Moments.of(values))


def test_float32_features_are_summed_in_float64() -> None:
    values = features() + 1000
    same(stream(list(values.split(10))).moments(), Moments.of(values), rtol=1e-8)


def test_memory_does_not_grow_with_the_number_of_features() -> None:
    streaming = StreamingMoments(2048)
    held = sum(x.numel() for x in vars(streaming).values() if isinstance(x, torch.Tensor))
    assert held == 2048 * 2048 + 2048  # whether 2 or 50,000 features came
    small = stream([features(3)])
    before = {name: x.shape for name, x in vars(small).items() if isinstance(x, torch.Tensor)}
    small.update(features())
    assert {name: x.shape for name, x in vars(small).items() if isinstance(x, torch.Tensor)} == before


def test_bad_moments_are_refused() -> None:
    mean, cov = np.zeros(3), np.eye(3)
    for bad, message in (
        ((1, mean, cov), "n: expected at least 2"),
        ((5, mean[None], cov), r"mean: expected shape \(D,\)"),
        ((5, mean, cov[:2]), r"cov: expected shape \(3, 3\)"),
        ((5, mean + np.nan, cov), "expected finite numbers"),
        ((5, mean, cov + np.triu(np.ones((3, 3)), 1)), "expected a symmetric matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments(*bad)
    with pytest.raises(ValueError, match="expected at least 2, got 1"):
        stream([features(1)]).moments()
    with pytest.raises(ValueError, match=r"features: expected \(N, D\) with N >= 2"):
        Moments.of(features(1))


# ---- files


def test_ours_come_back_with_their_provenance(tmp_path: Path) -> None:
    path, moments = tmp_path / "a" / "reference.npz", Moments.of(features())
    save_statistics(path, moments, {"features": {"name": "pixels3"}, "images": 200}, features().numpy())
    found = load_statistics(path)
    same(found.moments, moments)
    assert found.provenance == {"features": {"name": "pixels3"}, "images": 200}
    assert found.sha256 == file_sha256(path)
    assert found.features is not None
    assert (found.features == features().numpy()).all()
    assert (load_features(path) == features().numpy()).all()
    with np.load(path) as file:  # what pytorch-fid and clean-fid read
        assert file["mu"].shape == (6,)
        assert file["sigma"].shape == (6, 6)
        assert json.loads(str(file["provenance"]))["images"] == 200


def test_files_of_pytorch_fid_and_clean_fid_are_read(tmp_path: Path) -> None:
    moments = Moments.of(features())
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", mu=moments.mean, sigma=moments.cov)
        found = load_statistics(tmp_path / "theirs.npz")
        np.testing.assert_array_equal(found.moments.cov, moments.cov)
        assert (found.moments.n, found.provenance, found.features) == (None, {}, None)


def test_adms_reference_is_read_without_its_images(tmp_path: Path) -> None:
    pooled, spatial = Moments.of(features()), Moments.of(features(50, 4))
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(path, arr_0=images, mu=pooled.mean, sigma=pooled.cov, mu_s=spatial.mean, sigma_s=spatial.cov)
    assert load_statistics(path).moments.width == 6
    assert load_statistics(path, SPATIAL).moments.width == 4
    assert npz_keys(path) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=images)
    with pytest.raises(ValueError, match=r"expected statistics \(mu, sigma\), got images .*evaluate statistics"):
        load_statistics(samples)


def test_files_without_statistics_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "kid.npz", feats=np.ones((3, 2)))
    np.savez(tmp_path / "other.npz", a=1)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "words.npz", mu=np.zeros(3), sigma=np.eye(3), provenance=np.array("{"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, message in (
        ("kid.npz", "got features alone"),
        ("other.npz", "expected the arrays mu and sigma, got a"),
        ("bad.npz", r"bad.npz: cov: expected shape \(3, 3\)"),
        ("words.npz", "expected JSON in provenance"),
        ("one.npy", "got one array"),
        ("none.npz", "none.npz: expected a file of statistics, got no such file"),
        ("img512.pkl", "EDM2 keeps statistics so"),
    ):
        with pytest.raises(ValueError, match=message):
            load_statistics(tmp_path / name)
    with pytest.raises(ValueError, match="expected features under the key feats, got a"):
        load_features(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"expected a name ending in \.npz"):
        save_statistics(tmp_path / "x.pkl", Moments.of(features()), {})


class Bomb:
    fired = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Bomb, "fired", True)


def test_damaged_and_pickled_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    moments = Moments.of(features())
    np.savez(tmp_path / "pickled.npz", mu=moments.mean, sigma=np.array([Bomb()], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mu=moments.mean, sigma=moments.cov)
    whole = buffer.getvalue()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        start = archive.getinfo("sigma.npy").header_offset + 60
    (tmp_path / "flipped.npz").write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("pickled", "pickle", "short", "flipped", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: .*damaged or pickled"):
            load_statistics(tmp_path / f"{name}.npz")
    assert not Bomb.fired


def test_equal_features_have_moments() -> None:
    gathered = StreamingMoments(48)
    for _ in range(7):
        gathered.update(features(1, 48).repeat(3, 1).double() + 1e3)
    found = gathered.moments()
    assert np.array_equal(found.cov, found.cov.T)
    np.testing.assert_allclose(found.cov, 0, atol=1e-6)
