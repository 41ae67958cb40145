"""What suites ask for, as prompts and settings; VLMEvalKit's model against a stand-in for its base class."""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimodal import export
from unimodal.decoding import decode
from unimodal.evaluation.adapters.requests import (
    cut,
    decoding_settings,
    image_document,
    stop_strings,
    unknown_arguments,
)
from unimodal.model import UnifiedModel

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def shape(text: str, *images: Image.Image) -> list[str | tuple[int, ...]]:
    return [part.text if part.is_text else part.image.getpixel((0, 0)) for part in image_document(text, images).parts]  # type: ignore[misc]


def test_images_stand_where_the_text_says() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    assert shape("what?", RED, BLUE) == [red, blue, "what?"]
    assert shape("a <image> b <image>", RED, BLUE) == ["a ", red, " b ", blue]
    assert shape("<image>\nwhat?", RED) == [red, "\nwhat?"]
    assert shape("only <image> one", RED, BLUE) == [red, blue, "only <image> one"]  # it cannot be meant as a place
    assert shape("none") == ["none"]
    assert not any(part.learn for part in image_document("x", [RED]).parts)


def test_settings() -> None:
    plain = decoding_settings({}, 7)
    assert (plain.start, plain.max_tokens, plain.max_images, plain.temperature) == ("text", 7, 0, 0)
    usual = decoding_settings({"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1, "top_k": None}, 7)
    assert (usual.max_tokens, usual.top_p, usual.top_k) == (16, 1, 0)
    drawn = decoding_settings({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}, 7)
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.7, 0.9, 5)
    assert decoding_settings({"do_sample": False, "temperature": 0.7}, 7).temperature == 0
    with pytest.raises(ValueError, match=r"num_beams: expected 1 .*, got 3"):
        decoding_settings({"num_beams": 3}, 7)
    assert unknown_arguments({"until": [], "image_aspect_ratio": "pad", "num_beams": 1}) == ["image_aspect_ratio"]


def test_stops() -> None:
    assert stop_strings({}) == stop_strings({"until": None}) == []
    assert stop_strings({"until": "\n"}) == ["\n"]
    assert cut("one\ntwo. three", [".", "\n", ""]) == "one"
    assert cut("one", ["."]) == "one"


class Base:
    """The parts of vlmeval.vlm.base.BaseModel that a model relies on."""

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)  # type: ignore[attr-defined]
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = Base  # type: ignore[attr-defined]
    sys.modules.pop("unimodal.evaluation.adapters.vlmevalkit", None)
    from unimodal.evaluation.adapters import vlmevalkit

    yield vlmevalkit
    sys.modules.pop("unimodal.evaluation.adapters.vlmevalkit", None)


def test_vlmevalkit(
    make: Callable[..., UnifiedModel], kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("flow")
    monkeypatch.setattr(kit, "load_run", lambda path, weights: model)
    BLUE.save(tmp_path / "x.png")
    asked = kit.UnimodalModel(run="mine", device="cpu", max_new_tokens=5)
    message = [{"type": "image", "value": str(tmp_path / "x.png")}, {"type": "text", "value": "what?"}]
    said = asked.generate(message, dataset="MMBench_DEV_EN")
    (done,) = decode(model, [image_document("what?", [BLUE])], decoding_settings({"max_new_tokens": 5}, 5), [0])
    assert said == "".join(part.text for part in done.parts[2:])
    with pytest.raises(ValueError, match="message: expected text or image, got video"):
        asked.generate_inner([{"type": "video", "value": "x.mp4"}])
    with pytest.raises(ValueError, match="arguments: expected some of decoding, got use_vllm"):
        kit.UnimodalModel(run="mine", use_vllm=True)


def test_vlmevalkit_names_a_run_that_is_not_there(kit: Any, tmp_path: Path) -> None:
    assert kit.load_run is export.load_run
    with pytest.raises(ValueError, match=r"run: expected a folder, got .*gone, which does not exist"):
        kit.UnimodalModel(run=str(tmp_path / "gone"))
