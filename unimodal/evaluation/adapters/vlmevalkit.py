"""Our models in VLMEvalKit (open-compass). It is on no package index, so this is checked against its source alone.

In a checkout of VLMEvalKit, with this package installed beside it, write into `vlmeval/config.py`

    from unimodal.evaluation.adapters.vlmevalkit import UnimodalModel
    supported_VLM["my-model"] = partial(UnimodalModel, run="runs/mine")

at its end, and start `python run.py --data MMBench_DEV_EN --model my-model`. Prompts are those that VLMEvalKit builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from unimodal.decoding import decode
from unimodal.documents import Document, Part
from unimodal.evaluation.adapters.requests import decoding_settings, unknown_arguments
from unimodal.export import load_run
from unimodal.images import load_image


class UnimodalModel(BaseModel):
    """A trained model as VLMEvalKit asks it.

    Args:
        run: run folder, or an export.
        weights: "ema" or "raw".
        device: cpu, cuda, cuda:1 ...; None takes a GPU where there is one.
        max_new_tokens: most tokens of an answer.
        arguments: of decoding, as VLMEvalKit's models take them: do_sample, temperature, top_k, top_p.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self, run: str, weights: str = "ema", device: str | None = None, max_new_tokens: int = 256, **arguments: Any
    ) -> None:
        super().__init__()
        if unknown := unknown_arguments(arguments):
            raise ValueError(f"arguments: expected some of decoding, got {', '.join(unknown)}")
        self.settings = decoding_settings({**arguments, "max_new_tokens": max_new_tokens}, max_new_tokens)
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_run(Path(run), weights).to(found)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to texts and image files in order.

        Args:
            message: {"type": "text" or "image", "value": text or file name} each.
            dataset: which benchmark asks; no answer depends on it.
        """
        prompt = message_document(message)
        (done,) = decode(self.model, [prompt], self.settings, [0])
        return "".join(part.text for part in done.parts[len(prompt.parts) :])


def message_document(message: Sequence[Mapping[str, str]]) -> Document:
    """A message of VLMEvalKit as a prompt.

    Raises:
        ValueError: a part that is neither text nor image, or an image that is missing or broken.
    """
    parts = []
    for part in message:
        if part["type"] not in ("text", "image"):
            raise ValueError(f"message: expected text or image, got {part['type']}")
        content = load_image(part["value"]) if part["type"] == "image" else part["value"]
        parts.append(Part(content, learn=False))
    return Document(tuple(parts))
