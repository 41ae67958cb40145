"""The shapes world: its rules hold, its words are true, its splits are apart; all read again, slowly, from the scenes."""

import hashlib
import importlib.util
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shape_checks
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.data import ShapesData
from unimodal.data.shapes import (
    BACKGROUND,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SHAPES_KINDS,
    Scene,
    ShapesSource,
    Thing,
    arrange,
    coverage,
    held_out,
    relations,
    render,
    valid,
)
from unimodal.data.shapes.captions import CAPTION_TASKS, captioned, described
from unimodal.data.shapes.edits import EDIT_OPERATIONS, edited
from unimodal.data.shapes.questions import asked
from unimodal.data.shapes.world import clearly, size_range
from unimodal.metrics import geneval
from unimodal.text import TextTokenizer

SPLITS = ("train", "test")
_spec = importlib.util.spec_from_file_location("shapes_readings", Path(__file__).with_name("shapes_readings.py"))
assert _spec is not None
assert _spec.loader is not None
readings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readings)
NUMBERS, holds, told, check_rules = readings.NUMBERS, readings.holds, readings.told, readings.check_rules


def drafts(kind, split, number, size=32, seed=3):
    source = ShapesSource(kind, split, size, number, seed)
    return [source.draft(i, np.random.default_rng()) for i in range(number)]


def check_caption(text: str, scene: Scene) -> None:
    """Everything named is there, nothing else is, and a relation holds between what it names."""
    named = told(text)
    assert sum(n for n, _, _ in named) == len(scene.things)
    wanted: Counter = Counter()
    for n, colour, shape in named:
        wanted[shape, colour] += n
    for (shape, colour), n in wanted.items():
        assert n == sum(t.shape == shape and colour in (None, t.colour) for t in scene.things), text
    said = re.search(r"left of|right of|above|below", text)
    if said:
        (_, c1, s1), (_, c2, s2) = named[:2]
        pairs = itertools.permutations(scene.things, 2)
        matching = [(a, b) for a, b in pairs if (a.shape, b.shape) == (s1, s2) and c1 in (None, a.colour)]
        matching = [(a, b) for a, b in matching if c2 in (None, b.colour)]
        assert matching
        assert all(holds(a, said[0], b) for a, b in matching)
    head = re.match(r"(?:a \w+ of )?(\w+) objects: ", text)
    if head:
        assert NUMBERS[head[1]] == len(scene.things)


@pytest.fixture
def unchecked():
    """Without the tests' own check of types, which would refuse a wrong word before the code does."""
    with shape_checks.unchecked():
        yield


# ---- shapes, pixels


def test_shapes_have_their_areas_and_touch_their_boxes():
    areas = {
        "circle": math.pi / 4,
        "square": 1,
        "triangle": 1 / 2,
        "diamond": 1 / 2,
        "cross": 5 / 9,
        "ring": 3 * math.pi / 16,
    }
    for shape, area in areas.items():
        assert coverage(shape, 60).mean() == pytest.approx(area, rel=6e-3)
    for shape, size in itertools.product(SHAPES, (8, 11, 32)):
        cover = coverage(shape, size)
        assert cover.shape == (size, size)
        assert 0 <= cover.min() <= cover.max() == 1
        assert all(side.max() > 0 for side in (cover[0], cover[-1], cover[:, 0], cover[:, -1]))
        np.testing.assert_array_equal(cover, cover[:, ::-1])  # no shape has a left and a right
    with pytest.raises(ValueError, match="read-only"):
        coverage("circle", 8)[0, 0] = 0
    with pytest.raises(ValueError, match="shape: expected one of circle"):
        coverage("blob", 8)


def test_shapes_and_colours_are_far_apart():
    for a, b in itertools.combinations(SHAPES, 2):
        one, other = coverage(a, 8), coverage(b, 8)
        assert np.abs(one - other).sum() > 0.2 * min(one.sum(), other.sum()), (a, b)
    assert tuple(COLOURS) == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    for a, b in itertools.combinations([*COLOURS.values(), BACKGROUND], 2):
        assert math.dist(a, b) > 100


def test_render_mixes_coverage_from_back_to_front():
    scene = Scene(
        (Thing("circle", "red", 12, 3, 4), Thing("star", "blue", 10, 9, 8), Thing("ring", "white", 9, 20, 20)), 32
    )
    pixels = np.asarray(render(scene))
    for y, x in itertools.product(range(32), repeat=2):
        value = np.array(BACKGROUND, float)
        for thing in scene.things:
            if 0 <= y - thing.y < thing.size and 0 <= x - thing.x < thing.size:
                cover = float(coverage(thing.shape, thing.size)[y - thing.y, x - thing.x])
                value = value * (1 - cover) + np.array(COLOURS[thing.colour], float) * cover
        assert np.abs(pixels[y, x] - value).max() <= 0.501


# ---- rules of scenes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from((32, 32, 40, 64, 101)),
    split=st.sampled_from(SPLITS),
    kind=st.sampled_from(SHAPES_KINDS),
)
def test_scenes_obey_the_rules(seed, size, split, kind):
    source = ShapesSource(kind, split, size)
    for content, _ in source.draft(0, np.random.default_rng(seed)):
        if isinstance(content, Scene):
            assert content.size == size
            assert 1 <= len(content.things) <= 6
            check_rules(content)
            assert any(thing.kind in HELD_OUT for thing in content.things) == (split == "test")


def test_valid_finds_every_broken_rule():
    thing = Thing("square", "red", 10, 4, 4)
    assert valid(Scene((thing,), 32))
    assert not valid(Scene((Thing("square", "red", 7, 4, 4),), 32))  # small
    assert not valid(Scene((Thing("square", "red", 10, 23, 4),), 32))  # outside
    assert not valid(Scene((thing, Thing("star", "red", 8, 15, 4)), 32))  # one pixel apart
    assert valid(Scene((thing, Thing("star", "red", 8, 16, 4)), 32))
    assert valid(Scene((thing, Thing("star", "blue", 8, 15, 4)), 32))
    assert valid(Scene((thing, Thing("square", "blue", 10, 10, 4)), 32))  # 60 % to be seen
    assert not valid(Scene((thing, Thing("square", "blue", 10, 9, 4)), 32))  # half
    across = Thing("square", "blue", 8, 11, 10)
    assert not valid(Scene((Thing("cross", "red", 24, 4, 4), across), 32))  # seen well enough, but in four parts


def test_arrange_gives_up_and_keeps_relations():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="found no room for 12 things on 32x32"):
        arrange([("square", "red")] * 12, 32, rng)
    for relation in ("left of", "right of", "above", "below"):
        scene, (a, b) = arrange([("circle", "red"), ("star", "blue")], 32, rng, [(0, relation, 1)])
        assert holds(a, relation, b)
        assert clearly(a, relation, b)
        assert {a, b} == set(scene.things)
    assert size_range(32, 4) == (8, 12)


def test_relations_equal_the_slow_rule():
    rng = np.random.default_rng(1)
    two = none = 0
    for _ in range(3000):
        sizes, places = rng.integers(8, 20, 2), rng.integers(0, 13, (2, 2))
        a, b = (Thing("circle", "red", int(s), int(x), int(y)) for s, (x, y) in zip(sizes, places, strict=True))
        found = relations(a, b)
        assert found == {r for r in ("left of", "right of", "above", "below") if holds(a, r, b)}
        two, none = two + (len(found) == 2), none + (not found)
        for r in found:
            main, other = abs(a.x - b.x + (a.size - b.size) / 2), abs(a.y - b.y + (a.size - b.size) / 2)
            main, other = (main, other) if r in ("left of", "right of") else (other, main)
            assert clearly(a, r, b) == (len(found) == 1 and main >= 2 * other)
    assert two > 10
    assert none > 50


def test_relations_are_those_that_scores_are_counted_by():
    """The world's rule and the metric's are two programs: every offset that is near a decision, and all around it."""
    found = Counter()
    for size, other in ((8, 8), (8, 15), (12, 23), (20, 20), (25, 10), (40, 35)):
        b = Thing("star", "blue", other, 60, 60)
        for x, y in itertools.product(range(30, 91), repeat=2):
            a = Thing("circle", "red", size, x, y)
            expected = geneval.relations(a.box, b.box)
            assert relations(a, b) == set(expected), (a, b)
            found[len(expected)] += 1
    assert min(found[n] for n in (0, 1, 2)) > 50


def test_bad_things_and_scenes_are_refused(unchecked):
    with pytest.raises(ValueError, match="shape: expected one of circle"):
        Thing("blob", "red", 8, 0, 0)
    with pytest.raises(ValueError, match="colour: expected one of red"):
        Thing("circle", "teal", 8, 0, 0)
    with pytest.raises(ValueError, match="size: expected 32 to 256 pixels, got 16"):
        Scene((), 16)
    with pytest.raises(ValueError, match="kind: expected one of text_to_image"):
        ShapesSource("video")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents: expected 1 or more, got 0"):
        ShapesSource("count", documents=0)
    with pytest.raises(ValueError, match="size: expected 32 to 256 pixels, got 8"):
        ShapesSource("count", size=8)
    with pytest.raises(IndexError, match="index: expected 0 to 4, got 5"):
        ShapesSource("count", documents=5).document(5, np.random.default_rng())


# ---- splits


def test_held_out_pairs_are_fixed_and_every_shape_and_colour_is_trained():
    assert len(HELD_OUT) == 18
    digest = hashlib.sha256("\n".join(sorted(" ".join(pair) for pair in HELD_OUT)).encode()).hexdigest()
    assert digest[:16] == "92f35fc469ba82b3"
    assert all(held_out(*pair) == (pair in HELD_OUT) for pair in itertools.product(SHAPES, COLOURS))
    for shape in SHAPES:
        assert 1 <= sum((shape, colour) in HELD_OUT for colour in COLOURS) <= 4
    for colour in COLOURS:
        assert 1 <= sum((shape, colour) in HELD_OUT for shape in SHAPES) <= 4


@pytest.mark.parametrize("kind", SHAPES_KINDS)
def test_training_never_shows_or_names_a_held_out_pair(kind):
    names = re.compile("|".join(f"{colour} {shape}" for shape, colour in HELD_OUT))
    shapes: set[str] = set()
    for draft in drafts(kind, "train", 150):
        for content, _ in draft:
            if isinstance(content, str):
                assert not names.search(content), content
                continue
            assert not any(thing.kind in HELD_OUT for thing in content.things)
            shapes |= {thing.shape for thing in content.things}
    assert shapes == set(SHAPES)


# ---- determinism


@pytest.mark.parametrize("kind", SHAPES_KINDS)
def test_a_seed_and_an_index_are_a_document(kind):
    one, other = (ShapesSource(kind, "train", 32, 10, seed=4) for _ in range(2))
    forward = [one.document(i, np.random.default_rng(99)) for i in range(10)]
    backward = [other.document(i, np.random.default_rng(i)) for i in reversed(range(10))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.text == b.text
        assert a.kind == kind
        assert [p.learn for p in a.parts] == [p.learn for p in b.parts]
        assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    assert len({(d.text, *(image.tobytes() for image in d.images)) for d in forward}) == 10
    endless = ShapesSource(kind, "train", 32, 10)
    a, b, c = (endless.draft(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_splits_and_seeds_do_not_lay_out_scenes_alike():
    def shapes(split, seed):
        scenes = [s for d in drafts("count", split, 20, seed=seed) for s, _ in d if isinstance(s, Scene)]
        return [sorted(t.shape for t in scene.things) for scene in scenes]

    train = shapes("train", 3)
    for other in (shapes("test", 3), shapes("train", 4)):
        assert sum(a == b for a, b in zip(train, other, strict=True)) < 5


# ---- words


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", CAPTION_TASKS)
def test_captions_are_true(task, split):
    wordings = set()
    for i in range(120):
        text, scene = captioned(task, split, (32, 64)[i % 2], np.random.default_rng((5, i)))
        check_caption(text, scene)
        bare = re.sub("^a (photo|picture) of ", "", text)
        wordings.add(text[: len(text) - len(bare)])
        named = told(bare)
        if task in ("single_object", "two_object"):
            assert bare == " and ".join(f"{'a' if s[0] not in 'aeiou' else 'an'} {s}" for _, _, s in named)
            assert len(named) == len(scene.things) == (1 if task == "single_object" else 2)
        if task == "counting":
            assert len(named) == 1
            assert 2 <= named[0][0] <= 4
        if task == "color_attr":
            (_, c1, s1), (_, c2, s2) = named
            assert c1 != c2
            assert s1 != s2
    assert wordings == {"", "a photo of ", "a picture of "}


def test_descriptions_name_every_colour():
    for i in range(200):
        text, scene = described("train", 32, np.random.default_rng((6, i)))
        check_caption(text, scene)
        assert all(colour for _, colour, _ in told(text))


def answer(question: str, scene: Scene) -> str:
    """What a slow reader answers."""
    things = scene.things

    def all_called(name: str) -> list[Thing]:
        words = name.split()
        return [t for t in things if t.shape == words[-1] and (len(words) == 1 or t.colour == words[0])]

    def called(name: str) -> Thing:
        (thing,) = all_called(name)
        return thing

    if m := re.fullmatch(r"is there an? (\w+) object\?", question):
        return "yes" if any(t.colour == m[1] for t in things) else "no"
    if m := re.fullmatch(r"is there (an?) (.+)\?", question):
        assert (m[1] == "an") == (m[2][0] in "aeiou")
        return "yes" if all_called(m[2]) else "no"
    if question == "how many objects are there?":
        number = len(things)
    elif m := re.fullmatch(r"how many (\w+) objects are there\?", question):
        number = sum(t.colour == m[1] for t in things)
    elif m := re.fullmatch(r"how many (\w+?)(?:(?<=cross)es|(?<!cros)s) are there\?", question):
        number = sum(t.shape == m[1] for t in things)
    elif m := re.fullmatch(r"what colour is the (\w+)\?", question):
        return called(m[1]).colour
    elif m := re.fullmatch(r"what shape is the (\w+) object\?", question):
        (thing,) = (t for t in things if t.colour == m[1])
        return thing.shape
    elif m := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question):
        return "yes" if holds(called(m[1]), m[2], called(m[3])) else "no"
    elif m := re.fullmatch(r"where is the (.+) seen from the (.+)\?", question):
        (one,) = [r for r in ("left of", "right of", "above", "below") if holds(called(m[1]), r, called(m[2]))]
        return one.removesuffix(" of")
    else:
        raise AssertionError(question)
    return ("zero", "one", "two", "three", "four", "five", "six")[number]


@pytest.mark.parametrize("split", SPLITS)
def test_questions_have_their_answers(split):
    about, yes = Counter(), Counter()
    for i in range(600):
        scene, question = asked(split, (32, 64)[i % 2], np.random.default_rng((7, i)))
        assert question.answer == " " + answer(question.text, scene), (question, scene)
        about[question.about] += 1
        if question.about in ("exists", "relation"):
            yes[question.about, question.answer] += 1
    assert set(about) == {"exists", "count", "colour", "shape", "relation", "where"}
    assert min(about.values()) > 40
    for kind in ("exists", "relation"):
        assert 0.35 < yes[kind, " yes"] / about[kind] < 0.65  # the answer cannot be guessed from the wording


@pytest.mark.parametrize("split", SPLITS)
def test_edits_change_what_they_say(split):
    seen = Counter()
    for i in range(250):
        edit = edited(split, 32, np.random.default_rng((8, i)))
        before, after = set(edit.before.things), set(edit.after.things)
        gone, new = before - after, after - before
        seen[edit.operation] += 1
        check_rules(edit.before)
        check_rules(edit.after)

        def called(name: str, edit=edit) -> Thing:
            words = name.split()
            (thing,) = [t for t in edit.before.things if t.shape == words[-1] and words[0] in (t.colour, t.shape)]
            return thing

        if m := re.fullmatch(r" make the (.+) (\w+)", edit.text):
            (old,), (now,) = gone, new
            assert (called(m[1]), m[2]) == (old, now.colour)
            assert (old.shape, old.box) == (now.shape, now.box)
        elif m := re.fullmatch(r" turn the (.+) into an? (\w+)", edit.text):
            (old,), (now,) = gone, new
            assert (called(m[1]), m[2]) == (old, now.shape)
            assert (old.colour, old.box) == (now.colour, now.box)
        elif m := re.fullmatch(r" remove the (.+)", edit.text):
            assert (gone, new) == ({called(m[1])}, set())
        elif m := re.fullmatch(r" add an? (\w+) (\w+) (left of|right of|above|below) the (.+)", edit.text):
            (now,) = new
            assert not gone
            assert (now.colour, now.shape) == (m[1], m[2])
            assert holds(now, m[3], called(m[4]))
        elif m := re.fullmatch(r" move the (.+) (left of|right of|above|below) the (.+)", edit.text):
            (old,), (now,) = gone, new
            assert old == called(m[1])
            assert (old.kind, old.size) == (now.kind, now.size)
            assert holds(now, m[2], called(m[3]))
            assert not clearly(old, m[2], called(m[3]))
            assert edit.before.things.index(old) == edit.after.things.index(now)
        else:
            raise AssertionError(edit.text)
    assert set(seen) == set(EDIT_OPERATIONS)
    assert min(seen.values()) > 10


def test_counts_and_steps():
    for draft in drafts("count", "train", 100):
        (scene, given_), (text, learned) = draft
        assert (given_, learned) == (False, True)
        assert Counter({s: n for n, _, s in told(text)}) == Counter(t.shape for t in scene.things)
        numbers = [n for n, _, _ in told(text)]
        assert numbers == sorted(numbers, reverse=True)
    longest = 0
    for draft in drafts("steps", "test", 100):
        contents = [content for content, _ in draft]
        assert [learn for _, learn in draft] == [False] + [True] * (len(draft) - 1)
        assert contents.pop() == " done"
        scenes = contents[1::2]
        longest = max(longest, len(scenes))
        ((_, colour, shape),) = told(contents[0])
        assert [t.kind for t in scenes[0].things] == [(shape, colour)]
        for text, before, after in zip(contents[2::2], scenes, scenes[1:], strict=False):
            m = re.fullmatch(r" then an? (\w+) (\w+) (left of|right of|above|below) it", text)
            assert m
            (new,) = set(after.things) - set(before.things)
            assert set(before.things) < set(after.things)
            assert (new.colour, new.shape) == (m[1], m[2])
            assert holds(new, m[3], before.things[-1])
    assert longest == 3


def test_which_parts_are_learned():
    learned = {
        "text_to_image": "TI", "image_to_text": "IT", "question": "ITT", "edit": "ITI", "count": "IT",
    }  # fmt: skip
    for kind, shape in learned.items():
        document = ShapesSource(kind, "train", 40, seed=1).document(3, np.random.default_rng())
        assert "".join("I" if part.is_image else "T" for part in document.parts) == shape
        assert [part.learn for part in document.parts] == [False] * (len(shape) - 1) + [True]
        assert all(image.size == (40, 40) for image in document.images)


def test_the_tokenizer_learns_every_word():
    texts = [text for kind in SHAPES_KINDS for text in ShapesSource(kind).corpus()]
    assert list(ShapesSource("edit").corpus()) == list(ShapesSource("edit", "test", 64, 7, 1).corpus())
    words = set(re.split(r"[ ,:?]+", " ".join(texts)))
    assert words >= {*COLOURS, *SHAPES, "two", "six", "above", "left", "photo", "remove", "crosses"}
    tokenizer = TextTokenizer.train(texts, 700)
    for split, kind in itertools.product(SPLITS, SHAPES_KINDS):
        for content in (c for d in drafts(kind, split, 30, 64) for c, _ in d if isinstance(c, str)):
            assert set(re.split(r"[ ,:?]+", content)) <= words | {""}
            assert len(tokenizer.encode(content)) <= 40


# ---- data module


def test_data_module_offers_the_kinds():
    data = ShapesData(256, size=40, documents=30, prompts=2)
    assert [w.source.kind for w in data.training_sources()] == list(SHAPES_KINDS)
    assert all(len(w.source) == 30 for w in data.training_sources())
    assert [s.kind for s in data.validation_sources()] == list(SHAPES_KINDS)
    assert [p.kind for p in data.prompts()] == [kind for kind in SHAPES_KINDS for _ in range(2)]
    assert all(not part.learn for p in data.prompts() for part in p.parts)
    assert all(p.parts for p in data.prompts())
