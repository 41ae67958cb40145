"""Images that take the places their tokens need (`Autoregressive.stops`): learned, drawn and read alike."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import generator_cases
import pytest
import torch
import yaml
from conftest import picture
from generator_cases import Case, GrayLevels
from PIL import Image

from unimodal.cli import main
from unimodal.decoding import Session, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Run, pack
from unimodal.stored import StoredImage
from unimodal_generators import Autoregressive
from unimodal_generators.base import Branch
from unimodal_tokenizers import CodecTokenizer, Grid, ImageTokens, TokenLayout
from unimodal_tokenizers.base import ImageTokenizer

ROOT = Path(__file__).parents[1]
END = 3
Make = Callable[..., UnifiedModel]


class Brightness(ImageTokenizer):
    """As many ids of 0, 1 or 2 as an image is bright, up to 8, then ends; an untrained model soon draws an end."""

    end = END

    def __init__(self) -> None:
        super().__init__()
        self.layout = TokenLayout("sequence", dim=1, stride=1, codebooks=(END + 1,), length=8, image=(8, 8))

    def encode_batch(self, images: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
        count = ((images.mean((1, 2, 3)) + 1) * 4.5).long().clamp(0, 8)  # (B,)
        rows = torch.arange(8).expand(len(images), -1)
        return torch.where(rows < count[:, None], (rows + count[:, None]) % 3, END)

    def decode_batch(
        self, tokens: torch.Tensor, grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        said = (tokens != END).sum(1) / 4.5 - 1
        return said[:, None, None, None].expand(-1, 3, 8, 8)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.float()[:, None]


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level,) * 3)


def built(make: Make, monkeypatch: pytest.MonkeyPatch, positions: str = "sequential", **settings: Any) -> UnifiedModel:
    case = Case(functools.partial(Autoregressive, stops=True, **settings), Brightness)
    monkeypatch.setitem(generator_cases.CASES, "ends", case)
    return make("ends", image_sizes=[(8, 8)], backbone={"positions": positions}).double()


def stored(model: UnifiedModel, image: Image.Image, learn: bool = True) -> StoredImage:
    pixels = torch.full((1, 3, 8, 8), image.getpixel((0, 0))[0] / 127.5 - 1, dtype=torch.float64)  # type: ignore[index]
    return StoredImage(model.tokenizer.encode(pixels), (8, 8), learn)


def trained(model: UnifiedModel, document: Document) -> tuple[torch.Tensor, Any]:
    """Hidden states in the order of reading, and the documents they are of."""
    one = model.sequencer.document(document, (0, 0, 0), train=False)
    packed, states = pack([one], model.backbone.config.experts, model.generator.reads), []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        model(packed)
    handle.remove()
    return states[0][packed.inverse], one


def test_a_given_image_takes_the_places_of_its_tokens_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dark images of one id each fit, where two of eight would not; what is too much is counted as it is."""
    built(make, monkeypatch)
    model = make("ends", image_sizes=[(8, 8)], context_length=20).double()
    dark = Document((Part(gray(0), learn=False), Part(gray(0), learn=False)), "image_to_text")
    read = decode(model, [dark], DecodingSettings(max_tokens=4, max_images=0), [0])
    assert read[0].parts[:2] == dark.parts
    bright = Document((Part(gray(255), learn=False), Part(gray(255), learn=False)), "image_to_text")
    with pytest.raises(ValueError, match=r"prompt 0: it has 21 tokens, more than .*context_length 20"):
        decode(model, [bright], DecodingSettings(max_tokens=4, max_images=0), [0])


def test_tokens_up_to_their_end() -> None:
    rows = [[0, END, END], [END, END, END], [0, 1, 2]]
    tokens = ImageTokens(torch.tensor(rows).flatten(), (Grid(1, 3),) * 3).until(END)
    assert [one.values.tolist() for one in tokens.split()] == [[0, END], [END], [0, 1, 2]]
    assert tokens.grids == (Grid(1, 2), Grid(1, 1), Grid(1, 3))


@pytest.mark.parametrize("positions", ["sequential", "block", "mrope", "rope2d"])
@pytest.mark.parametrize("settings", [{}, {"inputs": "codes"}, {"vocabulary": "shared"}])
def test_what_is_drawn_is_what_training_would_have_said(
    settings: dict[str, Any], positions: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images at once, of their own lengths: the greedy ids, and the state behind each, of a training sequence."""
    model = built(make, monkeypatch, positions, **settings)
    prompts = ["a handwritten seven", "two", "one more"]
    special, greedy = model.text.special, model.generator.sampling.override(temperature=0.0, guidance=1.0)
    ids = [(special.bos, *model.text.encode(p), special.boi) for p in prompts]
    runs = [Run(one, (False,) * len(one)) for one in ids]
    session = Session.start(model, 3, [Branch()], 40)
    grid = Grid(1, 8)
    with torch.no_grad():
        session.append_text(runs)
        *_, drawn = model.generator.sample(session, [grid] * 3, greedy, [torch.Generator() for _ in prompts])
        session.append_text([Run((special.eoi,), (True,))] * 3)
    for i, (prompt, tokens) in enumerate(zip(prompts, drawn.split(), strict=True)):
        ids = tokens.values
        assert (ids[:-1] != END).all()
        assert len(ids) == 8 or ids[-1] == END
        whole = torch.cat([ids, ids.new_full((8 - len(ids),), END)])
        image = StoredImage(ImageTokens(whole, (grid,)), (8, 8))
        hidden, document = trained(model, Document((Part(prompt, learn=False), image, Part(" done"))))
        first = 1 + len(model.text.encode(prompt)) + 1  # where the image begins
        assert [s.block.grid for s in document.segments if s.block] == [tokens.grids[0]]
        logits = model.generator.head.logits(hidden[first - 1 : first - 1 + len(ids)], ids.new_empty(len(ids), 0))
        assert torch.equal(logits.argmax(-1), ids)
        torch.testing.assert_close(session.last[0, i], hidden[first + len(ids)], atol=1e-10, rtol=1e-8)


def test_images_together_are_those_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance, text behind, and an image that is given: whoever draws on while others have ended."""
    model = built(make, monkeypatch)
    prompts = [
        Document((Part(gray(g)), Part(p, learn=False))) for g, p in ((40, "a seven"), (200, "two"), (90, "more"))
    ]
    image = model.generator.sampling.override(guidance=2.0)
    settings = DecodingSettings(start="image", max_tokens=6, max_images=3, temperature=1.0, image=image)
    together = decode(model, prompts, settings, [1, 2, 3])
    alone = [decode(model, [p], settings, [s])[0] for p, s in zip(prompts, (1, 2, 3), strict=True)]
    assert [[i.tobytes() for i in d.images] for d in together] == [[i.tobytes() for i in d.images] for d in alone]
    texts = [[[p.content for p in d.parts if p.is_text] for d in each] for each in (together, alone)]
    assert texts[0] == texts[1]
    assert len({i.tobytes() for d in together for i in d.images}) > 1


def test_a_given_image_is_read_at_its_own_length(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(make, monkeypatch)
    for level in (0, 100, 255):
        hidden, document = trained(model, Document((stored(model, gray(level), learn=False), Part(" done"))))
        settings = DecodingSettings(max_tokens=1, max_images=0, temperature=0.0)
        given = Document((Part(gray(level), learn=False),))
        (written,) = decode(model, [given], settings, [0])
        (block,) = [s.block for s in document.segments if s.block]
        first = model.backbone.logits(hidden[2 + block.length])  # behind eoi
        special = model.text.special
        first[[special.boi, special.eoi, special.bos]] = -torch.inf
        expected = model.text.decode([int(first.argmax())])
        assert "".join(str(p.content) for p in written.parts[1:]) in (expected, "")


def test_pixels_in_training_and_tokens_without_an_end_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(make, monkeypatch)
    with pytest.raises(ValueError, match=r"generator.stops: true needs images stored as tokens .* got pixels"):
        model.sequencer.document(Document((Part(picture(0)),)), (0, 0, 0))
    monkeypatch.setitem(generator_cases.CASES, "ends", Case(functools.partial(Autoregressive, stops=True), GrayLevels))
    with pytest.raises(
        ValueError, match=r"generator\.stops: expected false with a GrayLevels, whose images have one length"
    ):
        make("ends")


@pytest.mark.slow
def test_jpegs_of_their_own_lengths_are_trained_from_token_files_and_drawn(tmp_path: Path) -> None:
    """As the recipe's header has it, for a few steps."""
    recipe = yaml.safe_load((ROOT / "lightning_configs" / "models" / "digits_jpeg_ar.yaml").read_text())
    codec = tmp_path / "codec.yaml"
    codec.write_text(yaml.safe_dump(recipe["model"]["init_args"]["model"]["tokenizer"]))
    data = tmp_path / "digits.yaml"
    data.write_text(yaml.safe_dump({"data": recipe["data"]}))
    assert main(["import", "tokenizer", str(codec), "--out", str(tmp_path / "codec")]) == 0
    tokens = ["--tokenizer", str(tmp_path / "codec"), "--data", str(data), "--size", "8x8"]
    assert main(["tokenize", *tokens, "--out", str(tmp_path / "tokens")]) == 0
    run = tmp_path / "run"
    options = ["--model.model.generator.stops", "true", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    options += [
        "--trainer.default_root_dir",
        str(run),
        "--trainer.accelerator",
        "cpu",
        "--data",
        "unimodal.data.TokenData",
    ]
    options += ["--data.root", str(tmp_path / "tokens"), "--data.batch_tokens", "512"]
    fit = ["fit", "-c", str(ROOT / "lightning_configs" / "models" / "digits_jpeg_ar.yaml")]
    assert main([*fit, *options, "--trainer.enable_progress_bar", "false"]) == 0
    assert (
        main(["generate", "image", "--run", str(run), "--prompt", "a handwritten seven", "--out", str(tmp_path / "o")])
        == 0
    )
    assert list((tmp_path / "o").rglob("*.png"))
    assert CodecTokenizer.end == 256
