"""What suites ask for, as documents and decoding settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part

PLACE = "<image>"
_DECODING = ("max_new_tokens", "temperature", "do_sample", "top_k", "top_p", "num_beams", "until")


def image_document(text: str, images: Sequence[Image.Image]) -> Document:
    """Images and text as one prompt.

    Images stand where the text says <image>, if it says so once an image; otherwise before the text, in order.
    """
    pieces = text.split(PLACE)
    if len(pieces) != len(images) + 1:
        pieces = [*[""] * len(images), text]
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if piece:
            parts.append(Part(piece, learn=False))
        if number < len(images):
            parts.append(Part(images[number], learn=False))
    return Document(tuple(parts))


def decoding_settings(arguments: Mapping[str, Any], max_tokens: int) -> DecodingSettings:
    """Settings of a text answer from the keyword arguments that suites use.

    Args:
        arguments: max_new_tokens, do_sample, temperature, top_k, top_p; others see `unknown_arguments`.
        max_tokens: used where the arguments name none.

    Raises:
        ValueError: more than one beam, which nothing here searches with.
    """
    if (beams := arguments.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams: expected 1 (there is no beam search), got {beams}")
    temperature = float(arguments.get("temperature") or 0.0)
    if arguments.get("do_sample") is False:
        temperature = 0.0
    top_p, top_k = arguments.get("top_p"), arguments.get("top_k")
    return DecodingSettings(
        "text",
        max_tokens=int(arguments.get("max_new_tokens") or max_tokens),
        max_images=0,
        temperature=temperature,
        top_k=int(top_k or 0),
        top_p=float(top_p) if top_p else 1.0,  # some tasks write 0 or null for none
    )


def unknown_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Names that mean nothing here."""
    return sorted(name for name in arguments if name not in _DECODING)


def stop_strings(arguments: Mapping[str, Any]) -> list[str]:
    """The strings that end an answer."""
    until = arguments.get("until") or []
    return [until] if isinstance(until, str) else [str(each) for each in until]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
