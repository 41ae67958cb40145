"""What records of published data sets become: order, what is learned, and mistakes that name their field."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_formats import (
    caption_rows,
    edit_tar,
    img2dataset,
    llava,
    mmc4_jsonl,
    mmc4_record,
    obelics_record,
    obelics_tar,
    parquet_rows,
    png,
    shade,
    write_jsonl,
    write_tar,
)  # fmt: skip

from unimodal.data import (
    Conversation,
    Edit,
    Interleaved,
    JsonlSource,
    Mmc4,
    Pairs,
    ParquetSource,
    Parts,
    TarSource,
    Text,
)
from unimodal.data.records import Layout, RawImage, Record, RecordSource, no_files
from unimodal.data.source import Ordered, Source
from unimodal.documents import Document

RNG = np.random.default_rng(0)


def shown(document: Document) -> list[tuple[str | int, bool]]:
    """Texts, shades of images, and whether each is learned."""
    return [(part.text if part.is_text else shade(part.image), part.learn) for part in document.parts]


def read(source: RecordSource, index: int = 0) -> list[tuple[str | int, bool]]:
    return shown(source.document(index, RNG))


def test_pairs_of_img2dataset(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path)
    drawn = TarSource(str(folder))
    assert isinstance(drawn, Source)
    assert isinstance(drawn, Ordered)
    assert drawn.layout == Pairs()
    assert [read(drawn, i) for i in range(len(drawn))] == [[(f"shade {i}", False), (i, True)] for i in range(8)]
    described = TarSource(str(folder), Pairs("image_to_text"))
    assert read(described, 5) == [(5, False), ("shade 5", True)]
    assert (drawn.kind, described.kind) == ("text_to_image", "image_to_text")
    assert list(drawn.corpus()) == [f"shade {i}" for i in range(8)]


def test_interleaved_of_obelics(tmp_path: Path) -> None:
    source = TarSource(str(obelics_tar(tmp_path)))
    assert source.layout == Interleaved()
    assert read(source, 2) == [("before 2", True), (2, True), ("between", True), (102, True), ("grün", True)]
    given = TarSource(str(tmp_path), Interleaved(learn_images=False))
    assert [learn for _, learn in read(given)] == [True, False, True, False, True]


def test_obelics_joins_neighbouring_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"images": [None, None, None], "texts": ["a", "b", None]}])
    assert read(JsonlSource(str(path))) == [("a\n\nb", True)]


def test_mmc4_places_an_image_before_its_sentence(tmp_path: Path) -> None:
    source = JsonlSource(str(mmc4_jsonl(tmp_path / "a.jsonl")))
    assert source.layout == Mmc4()
    assert read(source, 4) == [("first 4.", True), (4, True), ("second. third.", True)]
    choosy = JsonlSource(str(tmp_path / "a.jsonl"), Mmc4(similarity=0.5))
    assert read(choosy) == [("first 0. second. third.", True)]
    inside = write_tar(tmp_path / "b.tar", {"7.json": json.dumps(mmc4_record(7, {})).encode(), "7.a.png": png(7)})
    assert read(TarSource(str(inside)))[1] == (7, True)


def test_conversations_learn_the_answers_only(tmp_path: Path) -> None:
    folder = llava(tmp_path)
    source = JsonlSource(str(folder / "llava.json"), images=str(folder / "images"))
    assert source.layout == Conversation()
    assert read(source, 3) == [
        ("User: ", False), (3, False), ("Which shade?\nAssistant:", False), (" Shade 3.\n", True),
        ("User: Sure?\nAssistant:", False), (" Quite.\n", True),
    ]  # fmt: skip
    roles = [part.role for part in source.document(0, RNG).parts]
    assert roles == ["user", "user", "user", "assistant", "user", "assistant"]


def test_conversations_in_messages_with_a_system_turn_and_a_loose_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    turns = [("system", "Be short."), ("user", "Which?"), ("assistant", "Nine.")]
    record = {"image": ["a.png"], "messages": [{"role": who, "content": text} for who, text in turns]}
    source = JsonlSource(str(write_jsonl(tmp_path / "a.jsonl", [record])))
    assert read(source) == [
        (9, False), ("Be short.\n", False), ("User: Which?\nAssistant:", False), (" Nine.\n", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names", [("source_img", "instruction", "target_img"), ("original_image", "edit_prompt", "edited_image")]
)
def test_edits_of_rows(tmp_path: Path, names: tuple[str, str, str]) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        dict(zip(names, ({"bytes": png(n)}, f"darker {n}", {"bytes": png(n + 100)}), strict=True)) for n in range(4)
    ]
    source = ParquetSource(str(parquet_rows(tmp_path / "a.parquet", rows)))
    assert source.layout == Edit()
    assert read(source, 3) == [(3, False), ("darker 3", False), (103, True)]


def test_edits_of_tars(tmp_path: Path) -> None:
    source = TarSource(str(edit_tar(tmp_path)))
    assert source.layout == Edit()
    assert read(source, 2) == [(2, False), ("darker 2", False), (102, True)]


def test_own_documents_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(5))
    parts = [{"text": "q", "learn": False, "role": "user"}, {"image": "a.png"}]
    own = JsonlSource(str(write_jsonl(tmp_path / "own.jsonl", [{"kind": "x", "parts": parts}])))
    assert own.layout == Parts()
    assert read(own) == [("q", False), (5, True)]
    text = JsonlSource(str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a b", "url": "z"}])))
    assert text.layout == Text()
    assert read(text) == [("a b", True)]


def test_parquet_has_every_key_in_every_part(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows: list[dict[str, object]] = [
        {"parts": [{"text": "a", "image": None}, {"text": None, "image": {"bytes": png(3)}}]}
    ]
    assert read(ParquetSource(str(parquet_rows(tmp_path / "a.parquet", rows)))) == [("a", True), (3, True)]
    pairs = ParquetSource(str(parquet_rows(tmp_path / "b.parquet", caption_rows())))
    assert [read(pairs, i) for i in range(8)] == [[(f"shade {i}", False), (i, True)] for i in range(8)]


def record(**fields: object) -> Record:
    return Record("r", fields, no_files)


IMAGE = RawImage("i", lambda: b"")
GOOD_TURNS = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        (Pairs(), {"txt": "a"}, "image: expected one, got the fields txt"),
        (Pairs(), {"jpg": IMAGE, "txt": b"\xff"}, "txt: expected UTF-8"),
        (Pairs(), {"jpg": IMAGE, "txt": " "}, "caption: expected text, got an empty one"),
        (
            Pairs(),
            {"image": "http://a/b.png", "txt": "a"},
            "the address 'http://a/b.png', and addresses are not fetched",
        ),
        (Pairs(), {"image": "b.png", "txt": "a"}, "expected an image in the record itself, got the file name 'b.png'"),
        (Pairs(), {"image": 3, "txt": "a"}, "image: expected an image, got 3"),
        (Text(), {"text": None}, "text: expected text, got None"),
        (Interleaved(), {"images": [IMAGE], "texts": []}, "expected one length, got 1 and 0"),
        (Interleaved(), {"images": [IMAGE], "texts": ["a"]}, r"images\[0\] and texts\[0\]: expected one of them"),
        (Interleaved(), {"images": "a", "texts": []}, "images: expected a list, got 'a'"),
        (Interleaved(), obelics_record("https://a", IMAGE, 0), r"images\[1\]: expected an image, got the address"),
        (
            Mmc4(),
            mmc4_record(0, {"matched_text_index": 3}),
            r"image_info\[0\].matched_text_index: expected 0 to 2, got 3",
        ),
        (Mmc4(), mmc4_record(0, {"matched_sim": "x"}), r"image_info\[0\].matched_sim: expected a number"),
        (Conversation(), {"conversations": [{"from": "cat", "value": "a"}]}, r"conversations\[0\].from: .* got 'cat'"),
        (Conversation(), {"conversations": GOOD_TURNS[:1], "image": IMAGE}, "expected an answer, got none"),
        (Conversation(), {"conversations": GOOD_TURNS}, "image: expected one for each of 1 <image>, got 0"),
        (Edit(), {"source_img": IMAGE, "instruction": "a"}, "target: expected one"),
        (Parts(), {"parts": [{"text": "a", "image": "b"}]}, r"parts\[0\]: expected either text or image, got both"),
        (Parts(), {"parts": [{"text": "a", "size": 1}]}, r"parts\[0\]: expected keys among .* got 'size'"),
    ],
)
def test_a_record_of_another_layout_names_the_field(layout: Layout, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.parts(record(**fields))


def test_base64_that_is_none_is_named() -> None:
    parts = Mmc4().parts(record(**mmc4_record(0, {"image_base64": "*"})))
    image = parts[1].content
    assert isinstance(image, RawImage)
    with pytest.raises(ValueError, match=r"image_info\[0\].image_base64: expected base64"):
        image.read()


def test_a_layout_that_cannot_be_guessed_is_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"b": 1, "a": 2}])
    with pytest.raises(
        ValueError, match=r"layout: expected one to be named for .*a.jsonl:1, which has the fields a, b"
    ):
        JsonlSource(str(path))
    with pytest.raises(ValueError, match=r"layout\.question: expected {} once"):
        Conversation(question="User:")
