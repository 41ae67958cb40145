"""Short answers: every rule of the official programs, and where they are odd."""

import itertools
import random
import re

import pytest
import torch

from unimodal.metrics.vqa import (
    MME_COGNITION,
    MME_PERCEPTION,
    MMEScores,
    VQAAccuracy,
    YesNoMetric,
    choice_letter,
    gqa_correct,
    mme_answer,
    mme_scores,
    mme_totals,
    normalise_answer,
    pope_answer,
    rotations,
    states_yes_or_no,
    vqa_accuracy,
    yes_no_scores,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("YES", "yes"),  # case
        (" a\nb\tc ", "b c"),  # line ends and tabs are spaces; "a" is an article
        ("The cat on a mat, an old one", "cat on mat old 1"),
        ("zero one two three four five six seven eight nine ten none", "0 1 2 3 4 5 6 7 8 9 10 0"),
        ("eleven", "eleven"),
        ("red, blue", "red blue"),  # a comma that touches a space goes
        ("red,blue", "red blue"),  # one that does not becomes a space
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("1,000", "1000"),  # digit, comma, digit
        ("1,000-2,000", "10002000"),  # ... and then every mark is deleted
        ("what?", "what"),
        ("(left) [right] {up}", "left right up"),
        ("5:30", "5:30"),  # a colon is none of the marks
        ("no.", "no"),
        ("3.5", "3.5"),  # a period before a digit stays
        ("st. 5.", "st 5"),
        ("u.s.a.", "usa"),
        ("." * 40, "." * 8),  # 32 periods at most
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes missing are not put back
        ("yall'll", "y'all'll"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),  # the table's own slip
        ("Im", "im"),  # the table has it with a capital, which never comes
        ("its", "its"),
        ("", ""),
    ],
)
def test_normalising(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_articles_go_before_contractions_come() -> None:
    """An article is dropped by its word; "an't" is none."""
    assert normalise_answer("a an the then") == "then"


@pytest.mark.parametrize(("n", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_one_annotator_is_left_out_at_a_time(n: int, score: float) -> None:
    """Three that agree are 0.9, not the shortcut's 1: leaving out one of them leaves two."""
    humans = ["cat"] * n + [f"other{i}" for i in range(10 - n)]
    assert vqa_accuracy("cat", humans) == pytest.approx(score)
    if n in (1, 2, 3):
        assert vqa_accuracy("cat", humans) != pytest.approx(min(n / 3, 1))


def test_against_the_subsets_written_out() -> None:
    rng = random.Random(0)
    for _ in range(300):
        humans = [rng.choice(["Yes", "yes", "no.", "a dog", "dog", "two", "2"]) for _ in range(10)]
        answer = rng.choice(["yes", "no", "dog", "2"])
        subsets = list(itertools.combinations(humans, 9))
        if len(set(humans)) > 1:
            subsets = [tuple(map(normalise_answer, s)) for s in subsets]
        expected = sum(min(sum(h == answer for h in subset) / 3, 1) for subset in subsets) / len(subsets)
        assert vqa_accuracy(answer, humans) == pytest.approx(expected)


def test_unanimous_annotators_are_taken_by_the_letter() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["many"]) == 1
    assert vqa_accuracy(" 2\n", ["2"] * 10) == 1


def test_no_annotator() -> None:
    with pytest.raises(ValueError, match="humans: expected at least one"):
        vqa_accuracy("x", [])


def test_vqa_metric_is_the_mean_over_updates() -> None:
    metric = VQAAccuracy()
    metric.update(["cat"], [["cat"] * 3 + ["dog"] * 7])
    metric.update(["dog", "cow"], [["cat"] * 3 + ["dog"] * 7, ["cat"] * 10])
    assert float(metric.compute()) == pytest.approx((0.9 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("answer", "right"), [("left", True), (" Left. ", True), ("to the left", False), ("the left", False), ("", False)]
)
def test_gqa(answer: str, right: bool) -> None:
    assert gqa_correct(answer, "left") is right


# ---- yes and no


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, there is none", "no"),  # the comma goes first
        ("There is not one", "no"),
        ("Yes. But no dog", "yes"),  # the first sentence alone
        ("NO", "yes"),  # as the official program has it: three spellings, the rest is yes
        ("nothing", "yes"),
        ("perhaps", "yes"),
        ("no\n", "yes"),  # words are parted at spaces alone
    ],
)
def test_reading_as_pope_does(text: str, said: str) -> None:
    assert pope_answer(text) == said


def test_what_pope_takes_for_a_yes_without_a_word_of_it() -> None:
    assert [states_yes_or_no(text) for text in ("perhaps", "YES", "is not", "nothing", "")] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_pope_by_hand() -> None:
    """3 hits, 1 false alarm, 2 misses, 4 rejections."""
    said = ["yes"] * 4 + ["no"] * 6
    truth = ["yes", "yes", "yes", "no"] + ["yes", "yes"] + ["no"] * 4
    scores = yes_no_scores(said, truth)
    assert scores.accuracy == 0.7
    assert scores.precision == 0.75
    assert scores.recall == 0.6
    assert scores.f1 == pytest.approx(2 / 3)  # 2 * 3 / (2 * 3 + 1 + 2)
    assert scores.yes_ratio == 0.4  # of what was said, not of what is true
    metric = YesNoMetric()
    for said_one, truth_one in zip(said, truth, strict=True):
        metric.update([f"{said_one}, it seems."], [truth_one])
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(vars(scores))


def test_ratios_without_a_denominator_are_nought() -> None:
    scores = yes_no_scores(["no", "no"], ["no", "no"])
    assert (scores.precision, scores.recall, scores.f1, scores.accuracy) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("said", "truth", "message"),
    [([], [], "at least 1"), (["yes"], ["yes", "no"], "of 2"), (["maybe"], ["yes"], "expected yes or no, got 'maybe'")],
)
def test_pope_refuses(said: list[str], truth: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yes_no_scores(said, truth)


# ---- MME


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"), (" no.", "no"), ("No, it is", "no"), ("Oh yes", "other"), ("I know", "other"),
        ("a yes", "other"), ("know", "no"), ("yesno", "yes"), ("", "other"),
    ],
)  # fmt: skip
def test_reading_as_mme_does(text: str, said: str) -> None:
    """The first four letters count, wherever in them the word lies: "know" says no, "a yes" has only half of it."""
    assert mme_answer(text) == said


def test_mme_scores() -> None:
    scores = mme_scores([(True, True), (True, False), (False, False), (False, True)])
    assert (scores.accuracy, scores.accuracy_plus) == (0.5, 0.25)
    assert scores.score == 75
    with pytest.raises(ValueError, match="at least one image"):
        mme_scores([])


def test_mme_totals_need_every_subtask() -> None:
    perfect = {name: MMEScores(1.0, 1.0) for name in (*MME_PERCEPTION, *MME_COGNITION)}
    assert mme_totals(perfect) == {"perception": 2000, "cognition": 800}
    assert mme_totals({name: s for name, s in perfect.items() if name != "OCR"}) == {"cognition": 800}


# ---- multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" (B) ", "B"), ("B.", "B"), ("B:", "B"), ("B. a dog", "B"), ("(B) a dog", "B"), ("B) a dog", "B"),
        ("The answer is B", "B"), ("The answer is (B).", "B"), ("Answer: B", "B"),
        ("E", None),  # of four options
        ("b", None), ("a dog", None), ("A dog", None), ("The answer is A dog", None), ("Because of B", None),
        ("A. cat B. dog", None), ("A. cat\nB. dog", None), ("A. cat. The answer is B", None), ("A or B", None),
        ("A. I saw the U.S.A. ", "A"), ("B. The answer is B.", "B"), ("", None), ("BB", None), ("(B", "B"),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert choice_letter(text, 4) == letter


def test_rotations() -> None:
    assert rotations("ABC") == [("A", "B", "C"), ("B", "C", "A"), ("C", "A", "B")]
    assert rotations(["x"]) == [("x",)]


def test_states_add_up_over_ranks() -> None:
    """What torchmetrics does between ranks: states are summed."""
    metrics = [VQAAccuracy(), VQAAccuracy()]
    metrics[0].update(["a b"], [["a b"] * 10])
    metrics[1].update(["x", "y"], [["z"] * 10] * 2)
    whole = VQAAccuracy()
    whole.total = torch.stack([m.total for m in metrics]).sum()
    whole.count = torch.stack([m.count for m in metrics]).sum()
    whole._update_count = 1
    assert float(whole.compute()) == pytest.approx(1 / 3)
    assert all(str(function).find("sum") >= 0 for m in metrics for function in m._reductions.values())


def test_every_contraction_that_is_put_back_reads_like_its_key() -> None:
    """The table is made from the written forms: each key is its value with one apostrophe less, but for one slip."""
    from unimodal.metrics import vqa

    table = vqa._CONTRACTIONS
    odd = {
        key for key, value in table.items() if key.replace("'", "") != value.replace("'", "") or len(key) >= len(value)
    }
    assert odd == {"somebody'd"}
    assert all(re.fullmatch(r"[a-z']+", key) for key in table)
