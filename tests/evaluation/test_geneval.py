"""GenEval as a benchmark: the prompt file, the layout, rows that the official summary reads, and the known images."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from unimodal.documents import GENERATED, Part
from unimodal.evaluation import clip_colours, geneval
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.benchmark import Answer, Item
from unimodal.evaluation.command import Options, evaluate
from unimodal.evaluation.command import main as command
from unimodal.evaluation.geneval import (
    GenEval,
    GenEvalOtherDetector,
    Own,
    check_prompts,
    is_complete,
    official_table,
    read_prompts,
    read_results,
    result_totals,
)
from unimodal.evaluation.geneval_golden import PLAIN, beside_its_mirror, check, disc, portrait
from unimodal.evaluation.harness import score
from unimodal.evaluation.published import GENEVAL
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import TASKS, Judged, totals

LINES = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
    {
        "tag": "position",
        "include": [{"class": "bus", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a bus",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "bus", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red car and a blue bus",
    },
]  # fmt: skip
RGB = PLAIN | {"grey": (128, 128, 128)}


class FakeDetector:
    """Reads objects from an image's first row: one pixel each, (class, place, score), and colours its squares."""

    classes = ("dog", "cat", "car", "bus")

    def __init__(self):
        self.calls = []

    def detect(self, images, least, masks):
        self.calls.append((len(images), list(least), list(masks)))
        found = []
        for image, bound, with_mask in zip(images, least, masks, strict=True):
            pixels = np.asarray(image)
            some = []
            for label, place, certain in pixels[0].tolist():
                if certain / 255 > bound:
                    mask = np.zeros(pixels.shape[:2], bool)
                    mask[10:30, 20 * place : 20 * place + 20] = True
                    box = (20.0 * place, 10.0, 20.0 * place + 20, 30.0)
                    some.append(Detection(self.classes[label], box, certain / 255, mask if with_mask else None))
            found.append(some)
        return found

    def spec(self):
        return {"network": "fake"}


class NearestColours:
    """The plain colour nearest to the middle of the object's pixels."""

    def __init__(self, swapped=False):
        self.swapped, self.calls = swapped, []

    def names(self, objects):
        self.calls.append(len(objects))
        names = []
        for image, detection in objects:
            mean = np.median(np.asarray(image)[detection.mask], 0)[:: -1 if self.swapped else 1]
            names.append(min(RGB, key=lambda name: np.abs(np.array(RGB[name]) - mean).sum()))
        return names

    def spec(self):
        return {"network": "nearest"}


def drawn(*objects):
    """An image of (class, place, score, colour)."""
    pixels = np.full((40, 100, 3), 128, np.uint8)
    pixels[0] = 0
    for number, (label, place, certain, colour) in enumerate(objects):
        pixels[10:30, 20 * place : 20 * place + 20] = RGB[colour]
        pixels[0, number] = (FakeDetector.classes.index(label), place, round(255 * certain))
    return Image.fromarray(pixels)


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def benchmark(metadata):
    made = GenEval(metadata, prompts="other", golden=False, samples=2)
    made.detector, made.colours = FakeDetector(), NearestColours()
    return made


RIGHT = [
    [("dog", 0, 0.5, "grey")],
    [("cat", 0, 0.95, "grey"), ("cat", 2, 0.95, "grey"), ("cat", 3, 0.6, "grey")],
    [("car", 1, 0.5, "red")],
    [("dog", 0, 0.5, "grey"), ("bus", 4, 0.5, "grey")],
    [("car", 0, 0.5, "red"), ("bus", 4, 0.5, "blue")],
]
WRONG = [
    ([("dog", 0, 0.29, "grey")], "expected dog>=1, found 0"),
    ([("cat", n, 0.95, "grey") for n in (0, 2, 4)], "expected cat<3, found 3"),
    ([("car", 1, 0.5, "blue")], "expected red car>=1, found 0 red; and 1 blue"),
    ([("dog", 4, 0.5, "grey"), ("bus", 0, 0.5, "grey")], "expected dog left of target, found right of target"),
    ([("car", 0, 0.5, "red")], "expected bus>=1, found 0"),
]


def answers(benchmark, tmp_path):
    folder = AnswerFolder(tmp_path / "answers", draws=True, samples=2)
    for item, right, (wrong, _) in zip(benchmark.items(), RIGHT, WRONG, strict=True):
        folder.write(item, 0, [Part(drawn(*right), role=GENERATED)])
        folder.write(item, 1, [Part(drawn(*wrong), role=GENERATED)])
    return folder


# --- prompts


def test_items_are_the_files_lines_in_the_official_layout(benchmark, tmp_path):
    items = benchmark.items()
    assert [item.id for item in items] == [f"{n:05d}" for n in range(5)]
    assert [item.task for item in items] == [line["tag"] for line in LINES]
    assert [item.prompt.text for item in items] == [line["prompt"] for line in LINES]
    assert not any(part.learn for item in items for part in item.prompt.parts)
    answers(benchmark, tmp_path)
    assert json.loads((tmp_path / "answers/00003/metadata.jsonl").read_text()) == LINES[3]
    assert (tmp_path / "answers/00003/samples/00001.png").is_file()


def test_a_file_is_what_it_is_called(metadata):
    with pytest.raises(ValueError, match="expected the official file, SHA-256 5c48e081"):
        GenEval(metadata)
    with pytest.raises(ValueError, match="expected GenEval's tasks"):
        GenEval(metadata, prompts="rewritten")
    items = read_prompts(metadata)
    check_prompts(items, geneval.OFFICIAL_SHA256, "original")
    for prompts in ("rewritten", "other"):
        with pytest.raises(ValueError, match="expected original, which the official file holds"):
            check_prompts(items, geneval.OFFICIAL_SHA256, prompts)
    tags = [task for task in TASKS for _ in range(geneval.PROMPTS[task])]
    tagged = [Item(f"{number:05d}", tag, items[0].prompt) for number, tag in enumerate(tags)]
    check_prompts(tagged, "another", "rewritten")
    assert len(tagged) == 553


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tag": "colors", "prompt": "p", "include": [{"class": "square", "count": 1}]}, ":1: class: expected one of"),
        (
            {"tag": "colors", "prompt": "p", "include": [{"class": "dog", "count": 1, "color": "grey"}]},
            ":1: color: expected one of red",
        ),
        ({"tag": "colors", "prompt": "p"}, ":1: include: expected at least one"),
    ],
)
def test_lines_that_nothing_could_satisfy_are_refused(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match=r"--metadata: expected a file of prompts, got .*gone\.jsonl"):
        read_prompts(tmp_path / "gone.jsonl")
    path.write_text("")
    with pytest.raises(ValueError, match="expected a prompt a line"):
        read_prompts(path)


# --- judging


def test_answers_are_judged_with_reasons(benchmark, tmp_path):
    rows = score(benchmark, benchmark.items(), answers(benchmark, tmp_path), batch=100)
    assert [row["score"] for row in rows] == [1.0, 0.0] * 5
    assert [row["reason"] for row in rows[0::2]] == [""] * 5
    assert [row["reason"] for row in rows[1::2]] == [reason for _, reason in WRONG]
    measures = benchmark.measures(rows)
    assert measures == {"correct images": 0.5, "prompts with a correct image": 1.0}


def test_the_detector_and_the_classifier_are_asked_once_for_all_images(benchmark, tmp_path):
    score(benchmark, benchmark.items(), answers(benchmark, tmp_path), batch=100)
    ((images, least, masks),) = benchmark.detector.calls
    assert images == 10
    assert least == [0.3, 0.3, 0.9, 0.9] + [0.3] * 6
    assert masks == [False] * 4 + [True, True, False, False, True, True]  # only where colours are asked
    assert benchmark.colours.calls == [5]  # two cars; a car and a bus; a car


def test_batches_change_nothing(benchmark, tmp_path):
    folder = answers(benchmark, tmp_path)
    whole = score(benchmark, benchmark.items(), folder, batch=100)
    assert score(benchmark, benchmark.items(), folder, batch=1) == whole
    assert score(benchmark, benchmark.items(), folder, batch=3) == whole


def test_an_answer_of_no_image_is_refused(benchmark):
    with pytest.raises(ValueError, match="answer 00000: expected one image, got 0"):
        benchmark.judge([Answer(benchmark.items()[0], 0, (Part("text"),))])


def test_rows_have_the_official_fields_and_boxes(benchmark, tmp_path):
    row = score(benchmark, benchmark.items(), answers(benchmark, tmp_path))[4]
    assert row["filename"] == "00002/samples/00000.png"
    assert (row["tag"], row["prompt"], row["correct"]) == ("colors", "a photo of a red car", True)
    assert json.loads(row["metadata"]) == LINES[2]
    certain = 128 / 255
    assert json.loads(row["details"]) == {"car": [[20.0, 10.0, 40.0, 30.0, pytest.approx(certain)]]}
    assert row["boxes"] == [{"label": "car", "box": [20.0, 10.0, 40.0, 30.0], "score": certain, "colour": "red"}]
    json.dumps(row)


def test_the_fingerprint_names_everything_that_scores_depend_on(benchmark):
    spec = benchmark.spec()
    assert spec["prompts"] == "other"
    assert re.fullmatch("[0-9a-f]{64}", spec["metadata_sha256"])
    assert spec["thresholds"] == {"score": 0.3, "counting": 0.9, "most": 16, "overlap": 1.0, "position": 0.1}
    assert (spec["detector"], spec["colours"]) == ({"network": "fake"}, {"network": "nearest"})
    assert spec["self_test"] == "skipped"


def test_no_detector_is_an_error_at_once_where_images_are_scored(metadata, tmp_path):
    made = GenEval(metadata, prompts="other", golden=False)
    assert made.samples == 4
    wanted = "--detector: expected the folder that `unimodal import mask2former` wrote, got none"
    with pytest.raises(ValueError, match=wanted):
        made.judge([Answer(made.items()[0], 0, (Part(drawn()),))])
    options = Options(out=tmp_path / "out", run=tmp_path / "a run that would be read later")
    with pytest.raises(ValueError, match=wanted):
        evaluate(made, options)
    with pytest.raises(ValueError, match="later"):  # no detector is needed to draw
        evaluate(made, dataclasses.replace(options, score=False))
    with pytest.raises(ValueError, match="later"):
        evaluate(made, dataclasses.replace(options, part="1/2"))


def test_weights_that_are_missing_are_an_error_at_once(metadata, tmp_path):
    for cls in (GenEval, GenEvalOtherDetector):
        with pytest.raises(ValueError, match="--clip: expected openai, hf-hub:owner/name, a file or a folder"):
            cls(metadata, prompts="other", clip=str(tmp_path / "typo.pt"))
        with pytest.raises(ValueError, match="--detector"):
            cls(metadata, tmp_path / "none", prompts="other")


def test_less_than_one_image_a_prompt_is_refused(metadata):
    with pytest.raises(ValueError, match="--samples: expected at least 1"):
        GenEval(metadata, prompts="other", samples=0)


def test_another_detector_has_another_name(metadata, tmp_path, monkeypatch):
    monkeypatch.setattr(geneval, "read_metadata", lambda folder: {"source_sha256": "0" * 64})
    with pytest.raises(ValueError, match="scores of it have the name geneval-other-detector"):
        GenEval(metadata, tmp_path, prompts="other")
    assert GenEvalOtherDetector(metadata, tmp_path, prompts="other").name == "geneval-other-detector-other-prompts"
    monkeypatch.setattr(geneval, "read_metadata", lambda folder: {"source_sha256": "743b7d99" + "0" * 56})
    assert GenEval(metadata, tmp_path, prompts="other").name == "geneval-other-prompts"
    assert GenEval(metadata, tmp_path, prompts="other", golden=False).name == "geneval-other-prompts-unchecked"


def test_another_colour_classifier_has_another_name(metadata, tmp_path, monkeypatch):
    own = tmp_path / "ViT-L-14.pt"
    own.write_bytes(b"weights")
    for clip in (str(own), "hf-hub:apple/DFN2B-CLIP-ViT-L-14"):
        with pytest.raises(
            ValueError, match=r"OpenAI's weights.* got others; scores of them have the name geneval-other"
        ):
            GenEval(metadata, prompts="other", clip=clip)
        assert GenEvalOtherDetector(metadata, prompts="other", clip=clip).name == "geneval-other-detector-other-prompts"
    monkeypatch.setattr(clip_colours, "OFFICIAL_SHA256", hashlib.sha256(b"weights").hexdigest())
    for clip in (str(own), "openai", "hf-hub:timm/vit_large_patch14_clip_224.openai"):
        assert GenEval(metadata, prompts="other", clip=clip).name == "geneval-other-prompts"


def test_the_official_classifier_is_the_one_that_open_clip_downloads():
    known = open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")
    assert clip_colours.OFFICIAL_SHA256 in known["url"]
    assert f"hf-hub:{known['hf_hub'].rstrip('/')}" in clip_colours.HUB


# --- official result files


def test_result_files_read_as_the_official_summary_adds_them_up(benchmark, tmp_path):
    rows = score(benchmark, benchmark.items(), answers(benchmark, tmp_path))
    rows[2]["correct"], rows[0]["correct"] = False, False  # a prompt with no right image; tasks of unequal size below
    rows += [dict(rows[1], filename="00000/samples/00002.png", correct=True)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    found = result_totals(read_results(path))
    # The official summary, restated: groups by the metadata's text, tasks in order of appearance, their plain mean.
    official = [
        {k: row[k] for k in ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")} for row in rows
    ]
    by_prompt, by_tag = {}, {}
    for row in official:
        by_prompt.setdefault(row["metadata"], []).append(row["correct"])
        by_tag.setdefault(row["tag"], []).append(row["correct"])
    assert found.images == len(official)
    assert found.prompts == len(by_prompt) == 5
    assert found.correct_images == pytest.approx(sum(row["correct"] for row in official) / len(official))
    assert found.correct_prompts == pytest.approx(sum(any(v) for v in by_prompt.values()) / len(by_prompt)) == 0.8
    assert {tag: (t.correct, t.images) for tag, t in found.tasks.items()} == {
        t: (sum(v), len(v)) for t, v in by_tag.items()
    }
    assert found.overall == pytest.approx(sum(sum(v) / len(v) for v in by_tag.values()) / len(by_tag))
    assert found.overall != pytest.approx(found.correct_images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 1}, "correct: expected true or false, got 1"),
        ({"tag": None}, "tag: expected text"),
        ({"metadata": "{"}, "expected JSON in a text"),
        ({"details": "[]"}, "expected JSON objects"),
    ],
)
def test_other_lines_are_no_results(benchmark, tmp_path, change, message):
    row = score(benchmark, benchmark.items(), answers(benchmark, tmp_path))[0]
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=message):
        read_results(path)


def complete(right=1.0, samples=4):
    rows = []
    for task, number in geneval.PROMPTS.items():
        rows += [Judged(task, (task, n), (n < right * number)) for n in range(number) for _ in range(samples)]
    return rows


def test_the_table_is_ordered_by_tag_and_withholds_an_overall_of_half_a_set():
    rows = complete()
    assert is_complete(totals(rows))
    assert is_complete(totals(rows[::-1]))
    missing = rows[:-1]
    assert not is_complete(totals(missing))
    assert not is_complete(totals([row for row in rows if row.tag != "counting"]))
    own = [Own("all", totals(rows[::-1]), "geneval"), Own("half", totals(missing), None)]
    table = official_table(own, GENEVAL[:4]).splitlines()
    assert table[0] == "| model | SO | TO | CT | CL | POS | ATTR | overall | prompts | source |"
    assert table[2] == "| all | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.00000 | original | this run |"
    assert table[3].endswith("| - | not said | PARTIAL, 2211 images |")
    assert (
        table[4]
        == "| CLIP retrieval | - | - | - | - | - | - | 0.35 | original | GenEval's own README (djghosh13/geneval) |"
    )
    assert table[6].startswith("| Stable Diffusion 1.5 | 0.97 | 0.38 | 0.35 | 0.76 | 0.04 | 0.06 | 0.43 | original |")


def test_the_table_says_what_is_not_genevals_in_ones_own_rows(benchmark, tmp_path, capsys):
    rows = score(benchmark, benchmark.items(), answers(benchmark, tmp_path / "drawn"))
    names = {
        "a/out": ("geneval", "| original | PARTIAL, "),
        "b/out": ("geneval-other-detector-unchecked", "images, another detector or classifier, not self-tested |"),
        "c": ("geneval-rewritten-prompts", "| rewritten | PARTIAL, "),
        "d": ("geneval-other-prompts", "| other | PARTIAL, "),
    }
    for folder, (name, _) in names.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / folder / "summary.json").write_text(json.dumps({"benchmark": name}))
    official = tmp_path / "a" / "out" / "results.jsonl"
    asked = [*(str(tmp_path / folder) for folder in names), str(official)]
    assert command(["published", "geneval", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    for path, line, said in zip(asked, lines, [*(said for _, said in names.values()), "| not said |"], strict=False):
        assert line.startswith(f"| {path} |")
        assert said in line
    for other in ("fid", "geneval-shapes"):
        (tmp_path / "c" / "summary.json").write_text(json.dumps({"benchmark": other}))
        with pytest.raises(ValueError, match=f"expected results of geneval, got {other}"):
            command(["published", "geneval", str(tmp_path / "c")])
    (tmp_path / "c" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"expected a folder with summary\.json"):
        command(["published", "geneval", str(tmp_path / "c")])


def test_published_means_are_the_means_of_what_is_printed():
    full = [row for row in GENEVAL if len(row.scores) == 7]
    assert len(full) >= 26
    for row in full:
        mean = sum(row.scores[task] for task in TASKS) / 6
        assert mean == pytest.approx(row.scores["overall"], abs=0.0085), row.model
    assert all(row.source and 0 < row.scores["overall"] <= 1 for row in GENEVAL)
    keys = [(row.model, row.source, row.rewritten, row.scores["overall"]) for row in GENEVAL]
    assert len(set(keys)) == len(keys)


# --- known images


class Sighted:
    """Finds the portraits among the known images; `change` spoils what it says."""

    def __init__(self, change=lambda detections: detections):
        self.change = change

    def detect(self, images, least, masks):
        one, found = portrait(), []
        for image, bound in zip(images, least, strict=True):
            same = image.size == one.size and np.asarray(image).std() > 0
            number = 2 if image.width == 2 * one.width else int(same)
            people = [Detection("person", (0.0, 0.0, 9.0, 9.0), 0.99) for _ in range(number)]
            found.append([d for d in self.change(people) if d.score > bound])
        return found

    def spec(self):
        return {}


def rescored(factor):
    return lambda people: [Detection(d.label, d.box, d.score * factor) for d in people]


def test_right_detectors_and_classifiers_pass():
    check(Sighted(), NearestColours())
    check(Sighted(), NearestColours(), lambda: Sighted(rescored(0.99)))
    tie = Detection("tie", (0.0, 0.0, 9.0, 9.0), 0.95)
    check(Sighted(lambda people: [*people, tie] if people else []), NearestColours())
    assert beside_its_mirror(portrait()).size == (2 * portrait().width, portrait().height)


@pytest.mark.parametrize(
    ("detector", "colours", "message"),
    [
        (Sighted(rescored(0.5)), NearestColours(), "portrait: expected 1 person, found nothing"),
        (Sighted(lambda p: p[:1]), NearestColours(), "two portraits: expected 2 person, found 1 person"),
        (
            Sighted(lambda p: [*p, Detection("dog", (0.0, 0.0, 1.0, 1.0), 0.99)]),
            NearestColours(),
            "grey: .* found 1 dog",
        ),
        (Sighted(), NearestColours(swapped=True), "a red disc is called blue; a blue disc is called red"),
    ],
)
def test_every_slip_is_named(detector, colours, message):
    with pytest.raises(ValueError, match=f"known images came out wrong, so no score can be trusted: .*{message}"):
        check(detector, colours)


def test_another_device_must_agree_with_the_cpu():
    with pytest.raises(ValueError, match=r"the CPU finds person at 0\.99 in the portrait, this device does not"):
        check(Sighted(rescored(0.95)), NearestColours(), Sighted)


def test_known_images_come_first_and_stop_the_scores(benchmark, tmp_path):
    benchmark.golden = True
    with pytest.raises(ValueError, match="known images came out wrong"):
        score(benchmark, benchmark.items(), answers(benchmark, tmp_path))
    benchmark.detector = Sighted()
    benchmark.self_test()
    assert benchmark.spec()["self_test"] == "passed"
    benchmark.detector = FakeDetector()
    assert len(score(benchmark, benchmark.items(), answers(benchmark, tmp_path))) == 10


def test_discs_stand_on_a_ground_that_only_a_mask_hides():
    image, detection = disc(PLAIN["red"])
    pixels = np.asarray(image)
    assert (pixels[detection.mask] == PLAIN["red"]).all()
    assert not (pixels[~detection.mask] == PLAIN["red"]).all(1).any()
    assert detection.box == (23.0, 23.0, 202.0, 202.0)
    assert torch.from_numpy(detection.mask).sum() > 25000
