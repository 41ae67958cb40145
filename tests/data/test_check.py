"""`unimodal data check`: what it counts, what it draws, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_formats import image_folder, img2dataset, mmc4_jsonl, obelics_tar, png, write_jsonl, write_tar
from PIL import Image

from unimodal.attention.visibility import dense_mask
from unimodal.cli import main
from unimodal.data import FolderSource, HuggingFaceSource, JsonlSource, TarSource
from unimodal.data.check import Bar, examine, histograms, octaves, open_path, read_recipe, report
from unimodal.data.check_page import COLOURS, mask_image
from unimodal.packing import pack
from unimodal.text import TextTokenizer
from unimodal_generators.base import TokenKind

CONFIGS = Path(__file__).parents[2] / "lightning_configs"
FLOW = CONFIGS / "models" / "digits_mot_flow.yaml"


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
        assert isinstance(open_path(str(image_folder(tmp_path / "split" / form / "train", form).parent)), HuggingFaceSource)
    write_jsonl(tmp_path / "d" / "metadata.jsonl", [{"image": f"{n}.png", "caption": "a"} for n in range(3)])
    assert isinstance(open_path(str(tmp_path / "d")), FolderSource)  # names no images in that layout


def test_counts_and_names(tmp_path: Path) -> None:
    found = examine("pairs", TarSource(str(damaged(tmp_path))), None, sample=None, drawn=3)
    assert (found.total, found.read, found.skipped) == (8, 8, 2)
    assert sorted(name.rpartition("/")[2] for name in found.broken) == ["bad.tar: 0", "bad.tar: 1"]
    assert found.parts == {"texts given": 6, "images learned": 6}
    assert found.sides == [(8, 8)] * 6
    assert len(found.drawn) == 3
    shown = report(found, None)
    assert "pairs: 8 documents (TarSource, Pairs), 8 read, 2 broken" in shown
    assert "bad.tar: 1: 1.png: expected an image, got an empty file" in shown
    assert examine("pairs", TarSource(str(tmp_path)), None, sample=3, drawn=1).read == 3


def test_histograms_hold_every_value_once() -> None:
    assert octaves([0, 1, 1, 2, 3, 4, 9]) == [Bar("0", 1), Bar("1", 2), Bar("2-3", 2), Bar("4-7", 1), Bar("8-15", 1)]
    assert octaves([]) == []
    values = np.random.default_rng(0).integers(0, 10**7, 500).tolist()
    assert sum(bar.count for bar in octaves(values)) == 500


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
    assert found.lengths[0] == len(packed) == drawn.sequenced.length
    assert found.targets[0] == packed.counts["text"] + packed.counts["image"]
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
