"""Text <-> ids: nothing is lost, nothing is smuggled in."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from unimodal.text import TextTokenizer

CORPUS = ["a handwritten seven", "a handwritten three", "three plus seven equals ten"]
TOKENIZER = TextTokenizer.train(CORPUS, 300)
SPELT = [
    "<bos>", "<eos>", "<boi>", "<eoi>", "<s>", "</s>", "<unk>", "<pad>", "[CLS]", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>", "<image>", "<|vision_start|>",
]  # fmt: skip


@given(text=st.text(max_size=40))
@example(text="")
@example(text=" ")
@example(text="  two  spaces\t\n\r\n ")
@example(text="\x00\x7f\u0085\ufeff\u200b\u2028")
@example(text="grün, 数字 and \U0001f600\U0001f468\u200d\U0001f469")
@example(text="e\u0301 is not \u00e9, \ufb01 is not fi")
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_string_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.special.bos for i in ids)


@pytest.mark.parametrize("text", SPELT)
@pytest.mark.parametrize("around", ["{}", " {} ", "a{}b", "{0}{0}"])
def test_no_text_spells_a_special_id(text: str, around: str) -> None:
    special = TOKENIZER.special
    text = around.format(text)
    ids = TOKENIZER.encode(text)
    assert not {special.bos, special.eos, special.boi, special.eoi} & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_control_tokens_of_a_vocabulary_cannot_be_spelt_either() -> None:
    """A vocabulary from elsewhere may hold <|im_start|>: text that looks like it stays text."""
    bpe = Tokenizer.from_str(TOKENIZER.to_json())
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPELT])
    tokenizer = TextTokenizer.from_json(bpe.to_str())
    held = {bpe.token_to_id(text) for text in SPELT}
    assert len(tokenizer) == len(TOKENIZER) + len(SPELT)
    for text in SPELT:
        ids = tokenizer.encode(f"say {text} now")
        assert not held & set(ids)
        assert max(ids) < tokenizer.special.bos
        assert tokenizer.decode(ids) == f"say {text} now"


def test_special_ids_lie_behind_the_vocabulary() -> None:
    special = TOKENIZER.special
    n = TOKENIZER.bpe.get_vocab_size()
    assert (special.bos, special.eos, special.boi, special.eoi) == (n, n + 1, n + 2, n + 3)
    assert len(TOKENIZER) == n + 4 <= 300


def test_special_ids_and_broken_bytes_are_decoded_quietly() -> None:
    special, ids = TOKENIZER.special, TOKENIZER.encode("seven")
    assert TOKENIZER.decode([special.bos, *ids, special.boi, special.eoi, special.eos]) == "seven"
    assert TOKENIZER.decode([]) == ""
    half = TOKENIZER.encode("\U0001f600")[:1]
    assert "\ufffd" in TOKENIZER.decode(half)


def test_merges_are_learned() -> None:
    assert len(TOKENIZER.encode("a handwritten seven")) < len("a handwritten seven") / 2
    untrained = TextTokenizer.train([], 300)
    assert len(untrained) == 260
    assert len(untrained.encode("seven")) == 5


@given(text=st.text(max_size=20))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_copy_encodes_alike(text: str) -> None:
    copy = TextTokenizer.from_json(TOKENIZER.to_json())
    assert copy.encode(text) == TOKENIZER.encode(text)
    assert copy.special == TOKENIZER.special


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = TextTokenizer.load(path)
    assert len(loaded) == len(TOKENIZER)
    assert loaded.special == TOKENIZER.special
    for text in [*CORPUS, *SPELT, "数字 \U0001f600"]:
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_training_twice_gives_the_same() -> None:
    assert TextTokenizer.train(CORPUS, 300).to_json() == TOKENIZER.to_json()


@pytest.mark.parametrize("entries", [0, 4, 256, 259])
def test_a_vocabulary_without_room_for_every_byte_is_refused(entries: int) -> None:
    with pytest.raises(ValueError, match=rf"vocabulary: expected at least 260 .*, got {entries}"):
        TextTokenizer.train(CORPUS, entries)


def test_the_smallest_vocabulary_encodes_everything() -> None:
    smallest = TextTokenizer.train(CORPUS, 260)
    assert len(smallest) == 260
    assert smallest.decode(smallest.encode("数字 \U0001f600")) == "数字 \U0001f600"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text tokenizer: .*nowhere.*does not exist"):
        TextTokenizer.load(tmp_path / "nowhere" / "tokenizer.json")


@pytest.mark.parametrize("damage", ["cut", "empty", "json", "binary"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path, whole = tmp_path / "tokenizer.json", TOKENIZER.to_json()
    content = {
        "cut": whole[: len(whole) // 2].encode(),
        "empty": b"",
        "json": json.dumps({"model": "none"}).encode(),
        "binary": b"\xff\xfe\x00\x80",
    }[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text tokenizer: .*tokenizer\.json is no tokenizer\.json"):
        TextTokenizer.load(path)
