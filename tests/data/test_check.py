"""`unimodal data check`: what it counts, what it draws, and what it refuses."""

import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_formats import image_folder, img2dataset, mmc4_jsonl, obelics_tar, png, write_jsonl, write_tar
from PIL import Image

from unimodal.attention.visibility import dense_mask
from unimodal.cli import main
from unimodal.data import FolderSource, HuggingFaceSource, JsonlSource, TarSource
from unimodal.data.check import KEPT, Bar, Octaves, examine, histograms, open_path, read_recipe, report
from unimodal.data.check_page import COLOURS, mask_image
from unimodal.data.source import BrokenDocument
from unimodal.documents import Document, Part
from unimodal.packing import SequencedDocument, pack
from unimodal.text import TextTokenizer
from unimodal_generators.base import TokenKind

CONFIGS = Path(__file__).parents[2] / "lightning_configs"
FLOW = CONFIGS / "models" / "digits_mot_flow.yaml"


RNG = np.random.default_rng(0)


def whole_kinds(documents: list[SequencedDocument]) -> np.ndarray:
    """Of every token."""
    return np.concatenate([np.full(s.length, int(s.kind)) for document in documents for s in document.segments])


def damaged(folder: Path) -> Path:
    img2dataset(folder, shards=1, each=6)
    write_tar(folder / "bad.tar", {"0.png": png(1, 1, 1), "0.txt": b"pixel", "1.png": b"", "1.txt": b"empty"})
    return folder


def test_a_path_is_opened_by_what_is_there(tmp_path: Path) -> None:
    assert isinstance(open_path(str(img2dataset(tmp_path / "a"))), TarSource)
    assert isinstance(open_path(str(tmp_path / "a" / "00000.tar")), TarSource)
    path = mmc4_jsonl(tmp_path / "b" / "c" / "docs.jsonl")
    assert isinstance(open_path(str(path)), JsonlSource)
    (tmp_path / "d").mkdir()
    for n in range(3):
        (tmp_path / "d" / f"{n}.png").write_bytes(png(n))
        (tmp_path / "d" / f"{n}.txt").write_text("a")
    folder = open_path(str(tmp_path / "d"))
    assert isinstance(folder, FolderSource)
    assert len(folder) == 3  # nothing is held out
    for form in ("jsonl", "csv"):
        assert isinstance(open_path(str(image_folder(tmp_path / form, form))), HuggingFaceSource)
        assert isinstance(
            open_path(str(image_folder(tmp_path / "split" / form / "train", form).parent)), HuggingFaceSource
        )
    write_jsonl(tmp_path / "d" / "metadata.jsonl", [{"image": f"{n}.png", "caption": "a"} for n in range(3)])
    assert isinstance(open_path(str(tmp_path / "d")), FolderSource)  # names no images in that layout


def test_counts_and_names(tmp_path: Path) -> None:
    found = examine("pairs", TarSource(str(damaged(tmp_path))), None, sample=None, drawn=3)
    assert (found.total, found.read, found.skipped) == (8, 8, 2)
    assert sorted(name.rpartition("/")[2] for name in found.broken) == ["bad.tar: 0", "bad.tar: 1"]
    assert found.parts == {"texts given": 6, "images learned": 6}
    assert found.sides.bars == [Bar("8-15", 6)]
    assert found.shapes == {"square": 6}
    assert found.named == 2
    assert len(found.drawn) == 3
    shown = report(found, None)
    assert "pairs: 8 documents (TarSource, Pairs), 8 read, 2 broken" in shown
    assert "bad.tar: 1: 1.png: expected an image, got an empty file" in shown
    assert examine("pairs", TarSource(str(tmp_path)), None, sample=3, drawn=1).read == 3


def test_histograms_hold_every_value_once() -> None:
    bars = [Bar("0", 1), Bar("1", 2), Bar("2-3", 2), Bar("4-7", 1), Bar("8-15", 1)]
    assert Octaves([0, 1, 1, 2, 3, 4, 9]).bars == bars
    assert Octaves().bars == []
    values = np.random.default_rng(0).integers(0, 10**7, 500).tolist()
    assert sum(bar.count for bar in Octaves(values).bars) == 500


class Lines:
    """Many documents, each of which is made when it is asked for; every third is broken."""

    kind = "lines"

    def __len__(self) -> int:
        return 12_000

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if index % 3 == 0:
            raise BrokenDocument(f"pair {index // 6}", f"expected another, got {index}")
        return Document((Part(f"text {index}"),), self.kind)

    def corpus(self) -> Iterable[str]:
        yield "text"


def test_a_document_that_was_read_costs_no_memory(tmp_path: Path) -> None:
    """Well below 200 bytes: of one that is broken, a hash of its name."""
    examine("warm", Lines(), None, 100, drawn=3)
    with (tmp_path / "broken.txt").open("w") as file:
        tracemalloc.start()
        try:
            found = examine("lines", Lines(), None, None, drawn=3, broken=file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (found.read, found.skipped, found.named, len(found.broken)) == (12_000, 4000, 2000, KEPT)
    assert peak / 12_000 < 80
    assert len((tmp_path / "broken.txt").read_text().splitlines()) == 2000
    assert f"and {2000 - 20} more, in broken.txt" in report(found, None)
    assert [bar.count for bar in histograms(found)["characters of a document"]] == [66, 7934]  # up to seven, and more


@pytest.mark.parametrize(
    "recipe", ["digits_mot_flow", "digits_vq_ar", "digits_var_nextscale", "digits_janus_decoupled"]
)
def test_tokens_and_mask_are_those_the_recipe_packs(recipe: str, tmp_path: Path) -> None:
    source = TarSource(str(obelics_tar(tmp_path)))
    model = read_recipe([CONFIGS / "models" / f"{recipe}.yaml"]).model
    model.text = TextTokenizer.train(source.corpus(), 300)
    assert model.device.type == "meta"
    found = examine("web", source, model, None, drawn=1)
    (drawn,) = found.drawn
    assert drawn.sequenced is not None
    packed = pack([drawn.sequenced], model.backbone.config.experts, model.generator.reads)
    assert len(packed) == drawn.sequenced.length
    each = [model.sequencer.document(source.document(i, RNG), (0, 0, i)) for i in range(len(source))]
    whole = pack(each, model.backbone.config.experts, model.generator.reads)
    assert found.tokens == Counter({kind: n for kind in TokenKind if (n := int((whole_kinds(each) == kind).sum()))})
    assert found.tokens.total() == len(whole)
    assert found.targets == whole.counts["text"] + whole.counts["image"]
    assert found.lengths.bars == Octaves(document.length for document in each).bars
    assert "tokens of a document" in histograms(found)
    picture = mask_image(drawn.sequenced, model.backbone.config.experts, model.generator.reads)
    frame = picture.shape[0] - len(packed)
    visible = dense_mask(packed.table.tokens(torch.device("cpu"))).numpy()
    assert ((picture[frame:, frame:] != 240).any(axis=2) == visible).all()
    kinds = [kind for segment in drawn.sequenced.segments for kind in [segment.kind] * segment.length]
    assert picture[0, frame:].tolist() == [list(COLOURS[kind]) for kind in kinds]
    assert TokenKind.LEARNED in kinds


def test_the_command_writes_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = damaged(tmp_path / "pairs"), tmp_path / "out"
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "<script>alert(1)</script>"}] * 3)
    command = ["data", "check", str(pairs), str(text), "--config", str(FLOW), "--out", str(out)]
    assert main(command) == 0
    assert "images at 8 x 8" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert "<script" not in page
    assert 'src="http' not in page
    assert page.count('alt="attention mask"') == 6
    assert str(pairs / "bad.tar") in page
    assert len((out / "broken.txt").read_text().splitlines()) == 2
    assert main([*command[:4], "--out", str(out)]) == 0
    assert "attention mask" not in (out / "index.html").read_text()


def test_a_recipe_that_names_sources_needs_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"class_path": "unimodal.data.TarSource", "init_args": {"paths": str(img2dataset(tmp_path / "pairs"))}}
    mixture = {"class_path": "unimodal.data.MixtureData", "init_args": {"sources": {"mine": {"source": source}}}}
    path = write_jsonl(tmp_path / "data.yaml", [{"data": mixture}])  # JSON is YAML
    command = ["data", "check", "--config", str(FLOW), "--config", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "mine: 8 documents" in capsys.readouterr().out


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.yaml").write_text("data: {}\n")
    (tmp_path / "a.txt").write_text("a")
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    pairs = str(img2dataset(tmp_path / "pairs"))
    for args, message in (
        ([], "PATH: expected files or folders"),
        ([str(tmp_path / "a.txt")], "PATH: expected a folder, or files .tar"),
        ([str(tmp_path / "gone.tar")], "paths: expected .tar"),
        ([pairs, "--sample", "0"], "--sample: expected at least 1"),
        ([pairs, "--config", "gone.yaml"], "--config: expected a YAML file, got gone.yaml"),
        ([pairs, "--config", str(tmp_path / "odd.yaml")], "--config: expected model.init_args.model"),
    ):
        out = tmp_path / "out"
        assert main(["data", "check", *args, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert message in said
        assert not out.exists()
