"""What a recipe says of how documents become sequences."""

from dataclasses import dataclass
from typing import Literal

from unimodal.image_sizes import NativeSizes


@dataclass(frozen=True)
class SequenceRules:
    """How a recipe lays documents out.

    Args:
        image_sizes: (height, width) in pixels an image may have; others are resized and cropped to the nearest shape.
        context_length: most tokens of one document.
        drop_text: share of training documents whose text is dropped, which is what guidance by text needs.
        drop_images: share of training documents whose given images (those that are not learned) are dropped but for their
            boundary tokens, which is what guidance by images needs.
        learn_end: whether a document that ends in a drawn image goes on to learn that it ends there (BAGEL does not).
        context: what an image is to what follows it: its clean tokens, features of `vision`, or the one and then the other
            (BAGEL). Learned tokens that are their own context (`repeats` false: next-token generators) stand for the clean
            form of a drawn image and always stay; `understanding` then is of given images alone (Janus).
        causal_features: features see those before them only (Janus's decoder), rather than each other.
        write_size: whether an image's size in pixels is written before it, between its boundary tokens (Emu3, arXiv
            2409.18869): learned where the image is, so that a model with several sizes chooses one.
        native: images of training documents and prompts keep their own size; `image_sizes` are those that can be drawn.
    """

    image_sizes: list[tuple[int, int]]
    context_length: int
    drop_text: float = 0.0
    drop_images: float = 0.0
    learn_end: bool = True
    context: Literal["clean", "understanding", "both"] = "clean"
    causal_features: bool = False
    write_size: bool = False
    native: NativeSizes | None = None

    def __post_init__(self) -> None:
        if not self.image_sizes:
            raise ValueError("sequence.image_sizes: expected at least one [height, width], got none")
        if self.causal_features and self.context == "clean":
            raise ValueError("sequence.causal_features: expected a context with features, got clean")
        for name in ("drop_text", "drop_images"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"sequence.{name}: expected a share from 0 to below 1, got {getattr(self, name)}")
