"""Text <-> ids: nothing is lost, nothing is smuggled in."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
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


# --- special tokens behind the rows of an imported embedding


@pytest.mark.parametrize("start", [296, 320])
def test_special_tokens_lie_where_they_are_put(start: int, tmp_path: Path) -> None:
    placed = TOKENIZER.placed(start)
    special = placed.special
    assert (special.bos, special.eos, special.boi, special.eoi) == (start, start + 1, start + 2, start + 3)
    assert len(placed) == start + 4
    assert placed.encode("three plus \U0001f600") == TOKENIZER.encode("three plus \U0001f600")
    assert placed.decode([special.bos, *TOKENIZER.encode("seven"), start - 1, special.eos]) == "seven"
    placed.save(tmp_path / "tokenizer.json")
    for copy in (TextTokenizer.from_json(placed.to_json()), TextTokenizer.load(tmp_path / "tokenizer.json")):
        assert copy.special == special
        assert copy.to_json() == placed.to_json()
        assert copy.encode("grün") == TOKENIZER.encode("grün")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("seven").ids == TOKENIZER.encode("seven")


def test_saving_elsewhere_leaves_no_old_place_behind(tmp_path: Path) -> None:
    TOKENIZER.placed(400).save(tmp_path / "tokenizer.json")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert TextTokenizer.load(tmp_path / "tokenizer.json").special == TOKENIZER.special


def test_special_tokens_never_lie_among_the_entries() -> None:
    n = TOKENIZER.entries
    with pytest.raises(ValueError, match=f"special_start: expected at least the BPE's {n} entries, got {n - 1}"):
        TOKENIZER.placed(n - 1)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"special_start": "400"}', '{"special_start": 3}', "{"])
def test_a_damaged_place_is_named(content: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens.json").write_text(content)
    with pytest.raises(ValueError, match=r"text tokenizer: .*tokenizer\.json"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_ids_that_are_no_token_are_known() -> None:
    n = TOKENIZER.entries
    assert TOKENIZER.unused(n + 4) == []
    assert TOKENIZER.unused(n + 6) == [n + 4, n + 5]
    assert TOKENIZER.placed(n + 2).unused(n + 7) == [n, n + 1, n + 6]
    holes = TextTokenizer(Tokenizer(models.BPE(vocab={"a": 0, "b": 3}, merges=[])))
    assert holes.entries == 4
    assert holes.unused(10) == [1, 2, 8, 9]


def test_a_tokenizer_from_elsewhere_neither_cuts_nor_fills_up() -> None:
    bpe = Tokenizer.from_str(TOKENIZER.to_json())
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    text = "three plus seven equals ten"
    assert TextTokenizer.from_json(bpe.to_str()).encode(text) == TOKENIZER.encode(text)


def test_a_model_puts_special_tokens_into_added_rows(make: Callable[..., UnifiedModel]) -> None:
    model = make(backbone={"added_tokens": 5})
    assert model.text.special.bos == 300
    assert TOKENIZER.special_start is None  # the tokenizer it was given is as it was
    assert make().text.special.bos == make().text.entries  # without added rows nothing moves
    model.text = TextTokenizer.from_json(model.text.to_json())
    assert model.text.special.eoi == 303
    with pytest.raises(ValueError, match=r"backbone\.vocabulary: expected at least the text tokenizer's 30\d entries"):
        model.text = TextTokenizer.train([*CORPUS, "many other words of many letters"], 310)
    with pytest.raises(ValueError, match=r"backbone\.added_tokens: expected 0, or at least 4 .*, got 3"):
        make(backbone={"added_tokens": 3})


@pytest.mark.parametrize("added", [0, 6])
def test_decoding_never_chooses_an_id_that_is_no_token(
    added: int, make: Callable[..., UnifiedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(backbone={"added_tokens": added})
    model.text = TextTokenizer.train(CORPUS[:1], 280)  # fewer entries than rows
    rows = model.backbone.config.rows
    gap = model.text.unused(rows)
    assert len(gap) == rows - model.text.bpe.get_vocab_size() - 4
    seen: list[int] = []
    original = model.backbone.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return original(hidden).index_fill(1, torch.tensor(gap), 1e4)  # what is no token is by far the likeliest

    def encoded(ids: Sequence[int]) -> str:
        seen.extend(ids)
        return TextTokenizer.decode(model.text, ids)

    monkeypatch.setattr(model.backbone, "logits", logits)
    monkeypatch.setattr(model.text, "decode", encoded)
    settings = DecodingSettings(max_tokens=12, max_images=0, temperature=1.0)
    decode(model, [Document((Part("seven", learn=False),))] * 3, settings, [0, 1, 2])
    assert len(seen) > 12
    assert not set(seen) & set(gap)
