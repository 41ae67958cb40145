"""Plain images for tokenizers: all of a document, each once an epoch wherever a run stops, and what is broken skipped."""

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from data_formats import img2dataset, obelics_tar, png, shade
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from PIL import Image
from stream_cases import Room, Thread
from torch import Tensor

from unimodal.cli import main
from unimodal.data import DigitImageData, FolderImageData, MixtureImageData, ShapesImageData, TarSource
from unimodal.data.broken import Exchange
from unimodal.data.digits import caption_digit, digit_images
from unimodal.data.folder import FolderSource
from unimodal.data.image_stream import BEHIND, HeldOutImages, ImagePosition, ImageStream
from unimodal.data.images import Pictures
from unimodal.data.mixture import Entry
from unimodal.data.shapes import HELD_OUT, Scene, ShapesSource, render
from unimodal.data.source import BrokenDocument, Source, identity
from unimodal.data.stream import Mixture, Weighted
from unimodal.documents import Document, Part
from unimodal.packing import to_tensor
from unimodal.training import TokenizerTraining

ROOT = Path(__file__).parents[2]
START = ImagePosition()


class Albums:
    """Documents with so many images, each of one colour that says whose it is and which: (document, image). -1: broken."""

    kind = "albums"

    def __init__(self, images: Sequence[int]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if self.images[index] < 0:
            raise BrokenDocument(f"album {index}", "expected pages, got none")
        pages = [Part(Image.new("RGB", (5, 4), (index, page, 9))) for page in range(self.images[index])]
        return Document((Part("an album"), *pages), self.kind)

    def corpus(self) -> Iterable[str]:
        return ()


def seen(batch: Tensor) -> list[tuple[int, int]]:
    """Whose images these are."""
    return [tuple(((image[:2, 0, 0] + 1) * 127.5).round().int().tolist()) for image in batch]  # type: ignore[misc]


def stream(source: Any, batch: int, position: ImagePosition = START, seed: int = 3, **options: Any) -> ImageStream:
    return ImageStream(Mixture([Weighted(source, 1.0)], seed), (4, 4), batch, position, **options)


State = tuple[ImagePosition, dict[str, Any]]
BEGIN: State = START, {}


def run(source: Albums, batch: int, ranks: int, accumulate: int, steps: int, state: State = BEGIN) -> Any:
    """The images of some steps on all ranks, and what a checkpoint has behind them, though more was read ahead."""
    room = Room(ranks)

    def of(rank: int) -> tuple[list[tuple[int, int]], ImagePosition, dict[str, Any]]:
        one = stream(
            source, batch, state[0], rank=rank, ranks=ranks, accumulate=accumulate, broken_share=1.0,
            left_out=state[1], exchange=Thread(room, rank),
        )  # fmt: skip
        batches = iter(one)
        used = [name for b in islice(batches, steps * accumulate) for name in seen(b)]
        list(islice(batches, accumulate + 1))  # what a loader holds ahead
        return used, one.behind(steps), one.left_out(steps)

    with ThreadPoolExecutor(ranks) as pool:
        used, positions, known = zip(*pool.map(of, range(ranks)), strict=True)
    assert all(one == known[0] for one in known)
    dealt = [
        tuple(lane for lanes in zip(*some, strict=True) for lane in lanes) for some in zip(*positions, strict=True)
    ]
    return [name for some in used for name in some], (ImagePosition(*dealt), known[0])


def given_until(source: Albums, position: ImagePosition, seed: int = 3) -> tuple[Counter[tuple[int, int]], list[int]]:
    """The slow way: every image of every document that is done with, and those that the others gave; these documents."""
    mixture, count = Mixture([Weighted(source, 1.0)], seed), len(position.lanes)
    unread = {
        n: g
        for lane, some in zip(position.lanes, position.given, strict=True)
        for n, g in zip(lane[1:], some, strict=True)
    }
    found: Counter[tuple[int, int]] = Counter()
    documents: list[int] = []
    for number in range(max(lane[0] for lane in position.lanes)):
        document = mixture.place(number).document
        begun = number < position.lanes[number % count][0]
        pages = unread.get(number, max(source.images[document], 0) if begun else 0)
        found.update((document, page) for page in range(pages))
        documents += [document] * (unread.get(number, int(begun)) > 0)
    return found, documents


ALBUMS = st.lists(st.integers(-1, 4), min_size=1, max_size=9).filter(lambda images: max(images) > 0)
PHASES = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 4)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(ALBUMS, PHASES)
def test_no_image_is_lost_or_doubled_whatever_a_run_goes_on_with(
    images: list[int], phases: list[tuple[int, int, int, int]]
) -> None:
    """Other batches, ranks and accumulations, again and again; texts and broken documents, counted once, between them."""
    source, state, used = Albums(images), BEGIN, Counter[tuple[int, int]]()
    for batch, ranks, accumulate, steps in phases:
        new, state = run(source, batch, ranks, accumulate, steps, state)
        used.update(new)
        given_, documents = given_until(source, state[0])
        assert used == given_
        kept, broken = state[1]["albums"], [document for document in documents if images[document] < 0]
        assert (kept["packed"], kept["broken"]) == (len(documents) - len(broken), len(broken))
        assert kept["items"] == sorted(set(broken))


def test_two_ranks_that_go_on_as_one_see_each_image_once_an_epoch() -> None:
    """Stopped within albums, and on with other batches."""
    source = Albums([1, 3, 0, 2, 5, -1, 1, 4, 2])
    everything = {(d, page) for d, pages in enumerate(source.images) for page in range(max(pages, 0))}
    assert len(everything) == 18
    began, state = run(source, 2, ranks=2, accumulate=1, steps=3)
    assert any(some for some in state[0].given), "no album was left open"
    rest, (_, known) = run(source, 3, ranks=1, accumulate=1, steps=8, state=state)
    taken = began + rest
    assert [Counter(taken[:18]), Counter(taken[18:])] == [Counter(everything)] * 2
    assert {key: known["albums"][key] for key in ("packed", "broken", "items")} == {
        "packed": 16, "broken": 2, "items": [5]
    }  # fmt: skip


def test_an_epoch_has_every_image_of_every_document_once() -> None:
    source = Albums([1, 3, 0, 2, 5, 1])
    everything = Counter((d, page) for d, pages in enumerate(source.images) for page in range(pages))
    for batch in (1, 3, 4, 12):
        taken = [name for b in islice(iter(stream(source, batch)), 24 // batch) for name in seen(b)]
        assert Counter(taken[:12]) == Counter(taken[12:24]) == everything
        assert taken[:12] != taken[12:24]


def test_a_stopped_run_goes_on_with_the_same_batches_and_any_number_of_workers() -> None:
    source = Albums([1, 3, 0, 2, 5, 1])
    whole = list(islice(iter(stream(source, 4, accumulate=2)), 20))
    first = stream(source, 4, accumulate=2)
    list(islice(iter(first), 7))  # one of the fourth step
    for workers in (0, 2):
        rest = islice(iter(stream(source, 4, first.behind(3), accumulate=2, workers=workers)), 14)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[6:], strict=True))
    ahead = stream(source, 4)
    list(islice(iter(ahead), BEHIND + 5))
    assert len(ahead._behind) == BEHIND


def test_two_ranks_see_what_one_sees_in_batches_of_twice_the_size() -> None:
    source = Pictures(9, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)), seed=1)
    one, ranks = iter(stream(source, 4)), [iter(stream(source, 2, rank=r, ranks=2)) for r in range(2)]
    for _ in range(8):
        assert Counter(seen(next(one))) == Counter(name for rank in ranks for name in seen(next(rank)))


def test_images_at_hand_come_in_the_order_of_seed_and_epoch() -> None:
    """The order of the runs whose numbers are in the recipes."""
    source = Pictures(9, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)), seed=5)
    expected = [int(i) for epoch in range(3) for i in np.random.default_rng((5, epoch)).permutation(9)]
    assert [d for b in islice(iter(stream(source, 3)), 9) for d, _ in seen(b)] == expected


# ---- what is broken


def test_what_is_broken_is_skipped_counted_and_named_and_too_much_stops(caplog: pytest.LogCaptureFixture) -> None:
    source = Albums([1, 2, -1, 1] * 5)
    kept = stream(source, 4, broken_share=0.25)
    with caplog.at_level(logging.WARNING):
        taken = [name for b in islice(iter(kept), 10) for name in seen(b)]
    assert Counter(taken[:20]) == Counter(taken[20:])
    assert len(set(taken)) == 20
    assert caplog.text.count("skipped album 2: expected pages") == 1
    assert kept.broken.skipped["albums"] >= 10
    with pytest.raises(
        ValueError, match=r"data: albums: .* of 20 documents cannot be read, more than data\.broken_share 0\.2"
    ):
        list(islice(iter(stream(source, 4, broken_share=0.2)), 10))


def stopped(source: Source, share: float) -> tuple[set[tuple[int, str]], dict[str, Any]]:
    """Of two ranks: how many batches of one image each of them gave, and what stopped it; and what they know then."""
    room, known = Room(2), []

    def of(rank: int) -> tuple[int, str]:
        one = stream(source, 1, rank=rank, ranks=2, broken_share=share, exchange=Thread(room, rank))
        known.append(one.broken)
        got: list[Tensor] = []
        try:
            for batch in islice(one, 30):
                got.append(batch)  # what came before it stopped counts
        except ValueError as error:
            return len(got), str(error)
        return len(got), ""

    with ThreadPoolExecutor(2) as pool:
        return set(pool.map(of, range(2))), known[0].state(known[0].mark())


def test_all_ranks_stop_with_one_rank_and_its_line() -> None:
    """Rank 0 of two reads the even numbers: it alone meets what is broken."""
    order = Mixture([Weighted(Albums([1] * 60), 1.0)], 3)

    def broken_at(*numbers: int) -> Albums:
        bad = [order.place(number).document for number in numbers]
        return Albums([-1 if document in bad else 1 for document in range(60)])

    ((steps, said),), _ = stopped(broken_at(30, 36, 42), share=0.04)
    assert 0 < steps < 30
    assert said.startswith(
        "data: albums: 3 of 60 documents cannot be read, more than data.broken_share 0.04; the last: "
    )
    assert stopped(broken_at(30, 36, 42), share=0.05)[0] == {(30, "")}
    # One each: together they are too many, and none by itself.
    ((steps, said),), known = stopped(broken_at(4, 5), share=0.02)
    assert (steps, len(known["albums"]["items"])) == (2, 2)
    assert "2 of 60 documents cannot be read" in said


def test_held_out_images_come_once_and_what_is_broken_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    sources = [Albums([2, -1, 0, 3]), Albums([1, 1])]
    loader = HeldOutImages(sources, (4, 4), 3, seed=0)
    with caplog.at_level(logging.WARNING):
        batches, again = list(loader), list(loader)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [name for b in batches for name in seen(b)] == [(0, 0), (0, 1), (3, 0), (3, 1), (3, 2), (0, 0), (1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert caplog.text.count("1 held-out documents left out, such as album 1") == 1
    with pytest.raises(ValueError, match="data: expected held-out documents with images, got none"):
        list(HeldOutImages([Albums([0, -1])], (4, 4), 3, seed=0))


def said(source: Any) -> list[tuple[str, int]]:
    """What is said of each image of a source, and the red of a corner of it."""
    documents = [source.document(i, np.random.default_rng(0)) for i in range(len(source))]
    return sorted((document.text, np.asarray(image)[0, 0, 0]) for document in documents for image in document.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_come_with_the_images_they_are_said_of(workers: int) -> None:
    albums = Albums([2, 1, 3])
    plain, captioned = (
        list(islice(stream(albums, 4, captions=captions, workers=workers), 3)) for captions in (False, True)
    )
    assert all(torch.equal(a, b.images) for a, b in zip(plain, captioned, strict=True))
    assert {text for batch in captioned for text in batch.texts} == {"an album"}
    assert [len(batch.texts) for batch in captioned] == [4, 4, 4]
    silent = Pictures(3, lambda index: Image.new("RGB", (5, 4)), 0)
    with pytest.raises(ValueError, match=r"image \d: data\.captions: expected text with the images, got none"):
        next(iter(stream(silent, 2, captions=True)))
    assert len(next(iter(stream(silent, 2)))) == 2


@pytest.mark.parametrize("kind", ["digits", "shapes", "folder", "mixture"])
def test_every_module_gives_captions_if_asked(kind: str, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"shade {i}\n")
    folder = FolderSource(tmp_path, "all")
    data = {
        "digits": lambda: DigitImageData(4, captions=True),
        "shapes": lambda: ShapesImageData(4, validation_scenes=8, captions=True),
        "folder": lambda: FolderImageData(tmp_path, (8, 8), 4, 0.5, captions=True),
        "mixture": lambda: MixtureImageData({"a": Entry(folder)}, (8, 8), 4, {"v": Entry(folder)}, captions=True),
    }[kind]()
    batches = list(data.val_dataloader())
    found = [(text, image) for batch in batches for text, image in zip(batch.texts, batch.images, strict=True)]
    (source,) = data.validation_sources()
    reds = [(text, round(float((image[0, 0, 0] + 1) * 127.5))) for text, image in found]
    assert sorted(reds) == said(source)
    texts = {text for text, _ in found}
    if kind == "digits":
        assert {caption_digit(text) for text in texts} == set(range(10))
    elif kind == "shapes":
        assert len(texts) > 1
    else:
        assert texts <= {f"shade {i}" for i in range(5)}
        assert all(text == f"shade {red}" for text, red in reds)


def test_a_caption_that_is_missing_is_a_broken_document(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        if i:
            (tmp_path / f"{i}.txt").write_text(f"shade {i}")
    data = FolderImageData(tmp_path, (8, 8), 1, 0.5, captions=True)
    found = [text for batch in data.val_dataloader() for text in batch.texts]
    for weighted in data.training_sources():
        for i in range(len(weighted.source)):
            with contextlib.suppress(BrokenDocument):
                found.append(weighted.source.document(i, np.random.default_rng(0)).text)
    assert sorted(found) == [f"shade {i}" for i in range(1, 6)]
    plain = FolderImageData(tmp_path, (8, 8), 1, 0.5)
    assert len(plain.training_sources()[0].source) + len(plain.validation_sources()[0]) == 6


def test_documents_without_images_end_in_a_line() -> None:
    with pytest.raises(ValueError, match="data: expected documents with images, got none"):
        next(iter(stream(Albums([0, 0, 0]), 2)))


# ---- the modules


def test_any_source_of_documents_has_images(tmp_path: Path) -> None:
    pairs, web = TarSource(str(img2dataset(tmp_path / "pairs"))), TarSource(str(obelics_tar(tmp_path / "web")))
    data = MixtureImageData({"pairs": Entry(pairs), "web": Entry(web)}, (4, 4), 4)
    shades = [
        shade(image)
        for source in [*(weighted.source for weighted in data.training_sources()), *data.validation_sources()]
        for i in range(len(source)) for image in source.document(i, np.random.default_rng(0)).images
    ]  # fmt: skip
    assert sorted(shades) == sorted([*range(8), *range(6), *range(100, 106)])
    held = [round(float((image[0, 0, 0] + 1) * 127.5)) for batch in data.val_dataloader() for image in batch]
    assert 0 < len(held) < len(shades)


def trained(sources: dict[str, Source], state: dict[str, Any] | None, steps: int = 0) -> MixtureImageData:
    """The data of a run that begins, or goes on from a state, behind so many steps of one batch; one more was read."""
    data = MixtureImageData({name: Entry(source) for name, source in sources.items()}, (4, 4), 2,
                            {"v": Entry(Albums([1]))}, broken_share=1.0)  # fmt: skip
    data.trainer = Mock(
        spec=Trainer, limit_train_batches=1.0, fast_dev_run=False, global_rank=0, world_size=1,
        accumulate_grad_batches=1, global_step=100,
    )  # fmt: skip
    if state is not None:
        data.load_state_dict(state)
    list(islice(data.train_dataloader(), steps + 1))
    data.trainer.global_step += steps  # type: ignore[misc]
    return data


def test_a_run_goes_on_with_its_own_sources_only(tmp_path: Path) -> None:
    one, other = (TarSource(str(img2dataset(tmp_path / name))) for name in ("one", "other"))
    albums = Albums([1, 2, -1])
    state = trained({"a": albums, "b": one}, None, 5).state_dict()
    assert state["sources"]["b"] == identity(one)
    assert trained({"a": albums, "b": other}, state).state_dict() == state  # copied to another place
    os.truncate(tmp_path / "other" / "00001.tar", (tmp_path / "other" / "00001.tar").stat().st_size - 512)
    changed = TarSource(str(tmp_path / "other"))
    assert len(changed) == len(one)
    expected = re.escape(f"expected, as in the checkpoint, {state['sources']['b']}; got ")
    with pytest.raises(
        ValueError, match=f"^data: b: {expected}TarSource, .*; an export .* can be trained on with others$"
    ):
        trained({"a": albums, "b": changed}, state)
    with pytest.raises(ValueError, match=f"^data: b: {expected}no such source; "):
        trained({"a": albums, "c": one}, state)
    old = {key: state[key] for key in ("lanes", "given", "counts", "seed")}  # of before such things were kept
    assert trained({"a": albums, "b": changed}, old).state_dict()["left_out"]["b"]["packed"] == 0
    with pytest.raises(
        ValueError, match="ckpt_path: expected a checkpoint that counts images by lanes, got one of an earlier"
    ):
        trained({"a": albums}, {"batches": 3, "seed": state["seed"]})


def test_the_ranks_of_a_run_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    between = Exchange()
    monkeypatch.setattr(Exchange, "over_ranks", lambda: between)
    assert trained({"a": Albums([1, 2])}, None).train_dataloader().exchange is between


def test_what_was_left_out_is_counted_on_as_if_never_stopped() -> None:
    sources: dict[str, Source] = {"a": Albums([1, 2, -1]), "b": Albums([3, 1, -1, 1, -1])}
    whole = trained(sources, None, 9).state_dict()
    assert min(kept["broken"] for kept in whole["left_out"].values()) > 0
    for stop in range(9):
        state = trained(sources, None, stop).state_dict()
        assert trained(sources, state, 9 - stop).state_dict() == whole


def test_scenes_are_those_of_the_world_and_held_out_ones_are_apart() -> None:
    data = ShapesImageData(batch_size=2, scenes=6, validation_scenes=4)
    (training,), (held,) = data.training_sources(), data.validation_sources()
    for images, name, count in ((training.source, "train", 6), (held, "test", 4)):
        source = ShapesSource("text_to_image", name, documents=count, seed=0)  # type: ignore[arg-type]
        assert len(images) == count
        for index in range(count):
            (scene,) = (s for s, _ in source.draft(index, np.random.default_rng()) if isinstance(s, Scene))
            drawn, again = (images.document(index, np.random.default_rng(i)).images[0] for i in range(2))
            assert drawn is again  # the second time it is kept
            assert np.array_equal(np.asarray(drawn), np.asarray(render(scene)))
            assert any(thing.kind in HELD_OUT for thing in scene.things) == (name == "test")


def test_the_seed_orders_the_scenes_and_does_not_change_them() -> None:
    one, other = (ShapesImageData(2, scenes=30, seed=seed).training_sources()[0].source for seed in (0, 1))
    for index in range(3):
        a, b = (source.document(index, np.random.default_rng()).images[0] for source in (one, other))
        assert a.tobytes() == b.tobytes()
    orders = [Mixture([Weighted(source, 1.0)], 0).place(0).document for source in (one, other)]
    assert orders[0] != orders[1]


def test_scans_are_as_they_were() -> None:
    (batch, *_) = DigitImageData(batch_size=7).val_dataloader()
    assert torch.equal(batch, to_tensor([np.asarray(image) for image in digit_images("test").images()[:7]]))


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for changed, said in (
        ({"batch_size": 0}, "data.batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "data.workers: expected at least 0, got -1"),
        ({"image_size": (0, 4)}, r"data.image_size: expected \(height, width\) of at least 1, got \[0, 4\]"),
        ({"broken_share": 2.0}, "data.broken_share: expected a share"),
    ):
        with pytest.raises(ValueError, match=said):
            FolderImageData(**{"root": tmp_path, "image_size": (4, 4), "batch_size": 2, **changed})
    with pytest.raises(ValueError, match=r"data\.sources: expected at least one"):
        MixtureImageData({}, (4, 4), 2)


# ---- a run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        (folder / f"{i:02d}.png").write_bytes(png(i))
        (folder / f"{i:02d}.txt").write_text(f"shade {i}")
    return folder


def fit(pictures: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, list[int]]:
    """The exit code, and the images that were trained on."""
    original, used = TokenizerTraining.training_step, []

    def step(self: Any, batch: Tensor, batch_idx: int) -> Any:
        used.extend(int(image) for image in ((batch[:, 0, 0, 0] + 1) * 127.5).round())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TokenizerTraining, "training_step", step)
    files = [
        ROOT / "lightning_configs" / "tokenizers" / "digits_vq.yaml",
        ROOT / "lightning_configs/data/folder_images.yaml",
    ]
    tiny = folder.parent / "tiny.yaml"
    model = {"tokenizer": {"init_args": {"channels": [8, 8]}}, "warmup_steps": 1}
    trainer = {"precision": "32-true", "accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 1000}
    tiny.write_text(yaml.safe_dump({"model": {"init_args": model}, "trainer": trainer}))
    given = [x for path in (*files, tiny) for x in ("-c", str(path))]
    code = main(["fit", *given, "--data.root", str(pictures), "--trainer.default_root_dir", str(folder), *options])
    monkeypatch.setattr(TokenizerTraining, "training_step", original)
    return code, used


def test_a_run_goes_on_with_another_batch_size_and_accumulation(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "pictures"
    broken.mkdir()
    for path in pictures.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 40 if path.name == "07.png" else None])
    source = FolderImageData(broken, (8, 8), 1).training_sources()[0].source
    held_in = {int(document.stem) for document in sorted(pictures.glob("*.png"))} - {7}
    held_out = {shade(i) for s in FolderImageData(pictures, (8, 8), 1).validation_sources() for d in range(len(s))
                for i in s.document(d, np.random.default_rng(0)).images}  # fmt: skip
    epoch = held_in - held_out
    assert len(source) == len(epoch) + 1, "the broken one is trained on"
    share = ["--data.broken_share", "0.1"]
    first = ["--data.batch_size", "5", "--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "3"]
    second = ["--data.batch_size", "3", "--trainer.max_steps", "11", "--ckpt_path", "last", "--data.workers", "1"]
    code, began = fit(broken, tmp_path / "run", monkeypatch, *share, *first)
    assert code == 0
    assert len(began) == 30
    code, rest = fit(broken, tmp_path / "run", monkeypatch, *share, *second)
    assert code == 0
    assert len(rest) == 24
    taken = began + rest
    kept = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["FolderImageData"]
    assert kept["sources"] == {source.kind: identity(source)}
    assert kept["left_out"][source.kind]["packed"] == len(taken)
    assert len(kept["left_out"][source.kind]["items"]) == 1
    assert set(taken[: len(epoch)]) == epoch
    assert len(set(taken[len(epoch) :])) == len(taken) - len(epoch)


def test_too_many_unreadable_images_end_a_run_in_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "pictures"
    broken.mkdir()
    for path in pictures.iterdir():
        (broken / path.name).write_bytes(
            path.read_bytes()[: 40 if path.suffix == ".png" and "2" in path.name else None]
        )
    capsys.readouterr()
    code, _ = fit(broken, tmp_path / "run", monkeypatch, "--trainer.max_steps", "20", "--data.batch_size", "8")
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"data: image: .*more than data\.broken_share 0\.01; the last: .*2.*png", line), line
