"""Caption scores: equal to pycocoevalcap run on the whole set at once."""

import contextlib
import io
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from unimodal.metrics.captions import CaptionScorer, caption_scores, check_metric, from_fields, to_fields, tokenise

WORDS = "a the dog cat red ball runs sits on under mat quickly , . and two"


def corpus(seed: int, images: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(1, 14)))

    references = {f"i{n}": [sentence() for _ in range(rng.randint(1, 5))] for n in range(images)}
    return references, {image: sentence() for image in references}


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's (black) DOG, isn't it?", "a man 's black dog is n't it"),
        ('He said: "no" -- twice...', "he said no twice"),
        ("A dog. It runs.", "a dog it runs"),
        ("one;two", "one two"),
        ("3.5 cats\non  a t-shirt", "3.5 cats on a t-shirt"),
        ("", ""),
        (".", ""),
    ],
)
def test_tokens(caption: str, words: str) -> None:
    assert tokenise(caption) == words


@pytest.mark.parametrize(("seed", "images"), [(0, 7), (1, 40), (2, 1)])
def test_equals_the_library_on_the_whole_set(seed: int, images: int) -> None:
    references, captions = corpus(seed, images)
    scorer = CaptionScorer(references)
    order = list(captions)
    random.Random(3).shuffle(order)  # any order and any portions
    scores = {image: scorer.score(image, captions[image]) for image in order}
    gts = {image: [tokenise(t) for t in texts] for image, texts in references.items()}
    res = {image: [tokenise(text)] for image, text in captions.items()}
    cider, ciders = Cider().compute_score(gts, res)
    rouge, rouges = Rouge().compute_score(gts, res)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(gts, res)
    found = caption_scores(scores.values())
    assert [scores[image].cider for image in gts] == pytest.approx(list(ciders), abs=1e-12)
    assert [scores[image].rouge_l for image in gts] == pytest.approx(list(rouges), abs=1e-12)
    assert found["cider"] == pytest.approx(cider, abs=1e-12)
    assert found["rouge_l"] == pytest.approx(rouge, abs=1e-12)
    assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, rel=1e-9, abs=1e-12)


def test_a_copy_is_perfect_and_rare_words_weigh_more() -> None:
    references = {"x": ["a red dog runs on the mat"], "y": ["a red cat sits on the mat"], "z": ["two old boats at sea"]}
    scorer = CaptionScorer(references)
    copies = [scorer.score(image, texts[0].upper() + "!") for image, texts in references.items()]
    assert caption_scores(copies) == pytest.approx(
        {"cider": 10, "bleu1": 1, "bleu2": 1, "bleu3": 1, "bleu4": 1, "rouge_l": 1}, rel=1e-6
    )
    assert scorer.score("x", "dog runs").cider > scorer.score("x", "the mat").cider


def test_brevity_is_punished_against_the_nearest_reference() -> None:
    scorer = CaptionScorer({"x": ["a b c d", "a b c d e f g h"]})
    assert scorer.score("x", "a b c d e").reference_words == 4
    assert scorer.score("x", "a b c d e f g").reference_words == 8
    assert caption_scores([scorer.score("x", "a b")])["bleu1"] == pytest.approx(2.718281828 ** (1 - 4 / 2), rel=1e-6)


def test_fields_come_back() -> None:
    references, captions = corpus(0, 3)
    score = CaptionScorer(references).score("i0", captions["i0"])
    assert from_fields({"other": 1, **to_fields(score)}) == score


@pytest.mark.parametrize(("name", "reason"), [("METEOR", "Java"), ("spice", "Java"), ("bleu5", "got 'bleu5'")])
def test_what_is_not_offered_says_why(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_metric(name)
    check_metric("cider")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="references: expected at least one image"):
        CaptionScorer({"x": []})
    with pytest.raises(ValueError, match="image: expected one of the 1 with references, got 'y'"):
        CaptionScorer({"x": ["a"]}).score("y", "a")
    with pytest.raises(ValueError, match="scores: expected at least one caption"):
        caption_scores([])
