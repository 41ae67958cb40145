"""What every generator must be able to do, whatever it learns and however it samples: one list, one suite.

Equality of training and decoding, batches, guidance and limits are asked of all of them in tests/test_equivalence.py and
tests/test_decoding.py; here they learn.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from generator_cases import WHOLE
from PIL import Image
from shape_checks import first_checked

from unimodal.decoding import decode, stream
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal_generators import Queries

Make = Callable[..., UnifiedModel]
NAMES = ("one", "two plus", "three three three", "seven")
DRAWING = DecodingSettings("image", max_tokens=0, max_images=1)
STEPS = 180


def picture(seed: int) -> Image.Image:
    """Four squares of flat gray levels: every tokenizer of these tests can hold them."""
    levels = np.random.default_rng(seed).integers(0, 16, (2, 2)).repeat(4, 0).repeat(4, 1) * 17
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def captioned() -> list[Document]:
    return [Document((Part(name, learn=False), Part(picture(i))), "text_to_image") for i, name in enumerate(NAMES)]


def losses(model: UnifiedModel, documents: Sequence[Document], steps: int) -> Iterator[float]:
    """Image losses of so many steps of training."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20) * (1 - 0.98 * i / steps))
    for step in first_checked(range(steps)):
        sequenced = [model.sequencer.document(d, (0, step, i), train=True) for i, d in enumerate(documents * 4)]
        found = model(pack(sequenced, model.backbone.config.experts, model.generator.reads))
        means = {name: term.sum / max(term.count, 1) for name, term in found.items()}
        optimizer.zero_grad()
        torch.stack(list(means.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        yield float(means["image"].detach())
    model.eval()


@pytest.fixture(scope="module", params=WHOLE)
def taught(request: pytest.FixtureRequest, make: Make) -> tuple[UnifiedModel, list[float]]:
    """A model that has seen four captioned images again and again, and its losses."""
    model = make(request.param, noise=0.0, drop_text=0.1)
    slow = {
        "unet": 250,
        "next_scale": 250,
        "token_random": 500,
        "token_raster": 500,
    }  # a head of its own for each token
    steps = slow.get(request.param, STEPS)
    return model, list(losses(model, captioned(), steps))


@pytest.mark.slow
def test_the_loss_falls(taught: tuple[UnifiedModel, list[float]]) -> None:
    _, found = taught
    assert np.mean(found[-20:]) < 0.35 * np.mean(found[:5])


@pytest.mark.slow
def test_four_images_are_learned_by_heart(taught: tuple[UnifiedModel, list[float]]) -> None:
    """The image asked for comes back, nearer to its own original than to the three others, and near."""
    model, _ = taught
    if isinstance(model.generator, Queries):
        pytest.skip("its second network needs other rates: tests/generators/test_queries.py does this")
    prompts = [Document(document.parts[:1], "text_to_image") for document in captioned()] * 2
    drawn = [np.asarray(d.images[0], dtype=float) for d in decode(model, prompts, DRAWING, range(8))]
    originals = [np.asarray(picture(i), dtype=float) for i in range(4)]
    for i, image in enumerate(drawn):
        assert image.shape == (8, 8, 3)
        distances = [np.abs(image - original).mean() for original in originals]
        assert int(np.argmin(distances)) == i % 4
        assert distances[i % 4] < 25  # of 255


@pytest.mark.slow
def test_drawing_goes_on_with_text_and_another_image(taught: tuple[UnifiedModel, list[float]]) -> None:
    """Interleaved decoding: an image joins the context and the document goes on, streamed or not."""
    model, _ = taught
    settings = DecodingSettings("image", max_tokens=6, max_images=2, temperature=1.0)
    prompts = [Document((Part(name, learn=False),)) for name in NAMES[:2]]
    whole = decode(model, prompts, settings, [0, 1])
    for i, document in enumerate(whole):
        assert document.parts[1].is_image
        pieces = [p for p in stream(model, prompts, settings, [0, 1]) if p.document == i]
        assert [p.image.tobytes() for p in pieces if p.image] == [image.tobytes() for image in document.images]
        assert "".join(p.text for p in pieces) == "".join(p.text for p in document.parts[1:] if p.is_text)
