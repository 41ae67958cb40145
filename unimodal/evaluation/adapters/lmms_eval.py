"""Our models in lmms-eval (0.7): `lmms_eval --model unimodal --model_args run=runs/mine --tasks mme`.

lmms-eval finds the model by the entry point `lmms_eval.models` of this distribution, which names `manifest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from unimodal.decoding import decode
from unimodal.documents import Document
from unimodal.evaluation.adapters.requests import (
    cut,
    decoding_settings,
    image_document,
    stop_strings,
    unknown_arguments,
)
from unimodal.evaluation.harness import answer_seed
from unimodal.evaluation.likelihood import log_likelihoods
from unimodal.export import load_run

_MAX_TOKENS = 256  # where a task names no limit


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told."""
    return ModelManifest("unimodal", simple_class_path=f"{__name__}.UnimodalModel")


class UnimodalModel(lmms):
    """A trained model as lmms-eval asks it.

    Args:
        run: run folder, or an export.
        weights: "ema" or "raw".
        device: cpu, cuda, cuda:1 ...; None takes a GPU where there is one.
        batch_size: documents decoded at once; changes no answer.
        seed: of answers that are sampled.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        weights: str = "ema",
        device: str | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size: expected a whole number from 1, got {batch_size}")
        self.batch_size, self.seed = int(batch_size), int(seed)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._join_processes()
        self.model = load_run(Path(run), weights).to(self.device)
        self._warned: set[str] = set()

    def _join_processes(self) -> None:
        """Share the work where `accelerate launch` started several processes."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator, self.device = accelerator, accelerator.device
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Texts that continue each context."""
        answers: list[str] = [""] * len(requests)
        seeds = self._seeds(requests)
        # Sorted by settings, because a batch shares them.
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers") as bar:
            for _, same in groupby(order, key=lambda i: repr(requests[i].args[1])):
                for chunk in _chunks(list(same), self.batch_size):
                    arguments = dict(requests[chunk[0]].args[1])
                    self._warn(arguments)
                    prompts = [self._document(requests[i].args[0], *requests[i].args[2:6]) for i in chunk]
                    settings = decoding_settings(arguments, _MAX_TOKENS)
                    done = decode(self.model, prompts, settings, [seeds[i] for i in chunk])
                    for i, before, after in zip(chunk, prompts, done, strict=True):
                        text = "".join(part.text for part in after.parts[len(before.parts) :])
                        answers[i] = cut(text, stop_strings(arguments))
                        self.cache_hook.add_partial("generate_until", (requests[i].args[0], arguments), answers[i])
                    bar.update(len(chunk))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(loss, greedy) of each continuation: lmms-eval takes the least, and its models give the mean loss a token.

        Requests about one context, as those of a multiple choice question, are scored together. A pair is handed over
        inside a GenerationResult, because lmms-eval 0.7.3 makes a bare one into the text "(1.5, False)" and then fails.
        """
        results: list[GenerationResult] = []
        groups = [list(same) for _, same in groupby(requests, key=lambda r: (r.args[0], *r.args[3:6]))]
        with tqdm(total=len(requests), disable=self.rank != 0, desc="likelihoods") as bar:
            for chunk in _chunks(groups, self.batch_size):
                prompts = [self._document(same[0].args[0], *same[0].args[2:6]) for same in chunk]
                choices = [[self._continuation(request) for request in same] for same in chunk]
                for row in log_likelihoods(self.model, prompts, choices):
                    results += [GenerationResult((-found.mean, found.greedy)) for found in row]
                bar.update(sum(map(len, chunk)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "unimodal: tasks of several rounds are not offered, only generate_until and loglikelihood"
        )

    def _document(self, context: str, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Document:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"{task}: expected images, got {type(visual).__name__} (no video or audio is read)")
        return image_document(context, visuals)

    def _continuation(self, request: Instance) -> str:
        target = request.args[1]
        if not callable(target):
            return str(target)
        doc_id, task, split = request.args[3:6]
        return str(target(self.task_dict[task][split][doc_id]))

    def _seeds(self, requests: Sequence[Instance]) -> list[int]:
        """A seed a request that no batch or process changes; a repeated request gets another."""
        seen: Counter[str] = Counter()
        seeds = []
        for request in requests:
            doc_id, task, split = request.args[3:6]
            name = f"{task}/{split}/{doc_id}"
            seeds.append(answer_seed(self.seed, name, seen[name]))
            seen[name] += 1
        return seeds

    def _warn(self, arguments: dict[str, Any]) -> None:
        for name in unknown_arguments(arguments):
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(f"unimodal: the task's {name}={arguments[name]!r} means nothing to this model")


def _chunks(things: list[Any], size: int) -> Iterator[list[Any]]:
    yield from (things[i : i + size] for i in range(0, len(things), size))
