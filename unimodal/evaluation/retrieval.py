"""Captions for an image and images for a caption, by how likely a model finds each caption behind each image.

Letters: N images, M their captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unimodal.documents import GENERATED, Part
from unimodal.evaluation.benchmark import Answer, Item, Row, Verdict
from unimodal.evaluation.questions import Questions, answer_texts, asked, image_prompt
from unimodal.evaluation.readers import read_captions
from unimodal.metrics.retrieval import ranks

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal.model import UnifiedModel

KS = (1, 5, 10)


class Retrieval(Questions):
    """Recall at 1, 5 and 10 both ways among the first images of a split and all their captions.

    An item is an image: the model ranks all M captions for it, and all N images for each of its captions. Its answer is the
    number of wrong ones in front, `{"text": 0, "image": [2, 0, ...]}`: of captions before the best of its own, of images
    before it for each of its own; what is just as likely comes before. Its score is the mean of both hits at 1.

    No correction is made for captions that are likely behind any image: they stand in the way of others for an image, and
    not at all where images are ranked for a caption.
    """

    name = "retrieval"
    overall: ClassVar[Literal["tasks", "items"]] = "items"

    def __init__(
        self,
        annotations: Path,
        image_folder: Path,
        candidates: int = 100,
        split: str = "test",
        wording: str = "",
        by: Literal["mean", "total"] = "mean",
    ) -> None:
        """Name the files.

        Args:
            annotations: a Karpathy split such as dataset_coco.json or dataset_flickr30k.json.
            image_folder: the images, or the folder that holds COCO's val2014.
            candidates: N, the first images of the split. Likelihoods grow with its square: a --batch of N needs N x M, a
                smaller one up to twice as many. Recalls over other numbers of candidates do not compare.
            split: of the file.
            wording: what is written behind the image before the caption, which then begins with a space; nothing: the
                image alone.
            by: log-likelihood of a caption and the end behind it: the mean a token, which does not favour short captions,
                or the total.
        """
        if candidates < 2:
            raise ValueError(f"candidates: expected at least 2 images, got {candidates}")
        self.files, self.image_folder, self.candidates = (annotations,), image_folder, candidates
        self.split, self.wording, self.by = split, wording, by
        if by == "total":
            self.name = f"{self.name}-total"

    def read(self) -> list[Item]:
        """An item an image."""
        texts = (self.wording,) if self.wording else ()
        found = read_captions(self.files[0], self.image_folder, self.split, self.candidates)
        if len(found) < self.candidates:
            raise ValueError(
                f"candidates: expected at most {len(found)}, the images of the split, got {self.candidates}"
            )
        return [
            Item(question.id, "retrieval", image_prompt(question.image, *texts), {"captions": list(question.answers)})
            for question in found
        ]

    def answer(
        self, model: UnifiedModel, items: Sequence[Item], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[tuple[Part, ...]]:
        """Both kinds of ranks for each item; the more items at once, the fewer likelihoods are computed twice."""
        places = {item.id: i for i, item in enumerate(self._items)}
        owner = torch.tensor([i for i, item in enumerate(self._items) for _ in item.truth["captions"]])  # (M,)
        mine = [places[item.id] for item in items]
        scores = self._scores(model, mine, owner)
        found: list[tuple[Part, ...]] = []
        for i in mine:
            own = owner == i  # (M,)
            text = ranks(scores[i][None], own[None])
            image = ranks(scores[:, own].T, torch.arange(len(scores)).eq(i).expand(int(own.sum()), -1))
            found.append((Part(json.dumps({"text": int(text), "image": image.tolist()}), role=GENERATED),))
        return found

    def _scores(self, model: UnifiedModel, mine: Sequence[int], owner: Tensor) -> Float[Tensor, "N M"]:
        """How likely each caption is behind each image, where either belongs to `mine`; nan elsewhere."""
        from unimodal.evaluation.likelihood import log_likelihoods

        captions = [text.strip() for item in self._items for text in item.truth["captions"]]
        captions = [f" {text}" if self.wording else text for text in captions]
        wanted = torch.isin(owner, torch.tensor(mine)).expand(len(self._items), -1).clone()
        wanted[list(mine)] = True
        scores = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        for rows in torch.arange(len(scores)).split(max(1, len(mine))) if mine else ():
            columns = [wanted[i].nonzero()[:, 0].tolist() for i in rows]
            documents = [asked(self._items[i])[0] for i in rows]
            found = log_likelihoods(model, documents, [[captions[j] for j in some] for some in columns], end=True)
            for i, some, listed in zip(rows, columns, found, strict=True):
                scores[i, some] = torch.tensor([getattr(one, self.by) for one in listed], dtype=torch.float64)
        return scores

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Mean of whether one of its captions comes first for the image, and it for each of its captions."""
        verdicts = []
        for answer in answers:
            text, images = _read_ranks(answer)
            score = ((text < 1) + sum(rank < 1 for rank in images) / len(images)) / 2
            reason = f"{text} wrong captions come first for the image, and {images} wrong images for its captions"
            verdicts.append(Verdict(score, reason if score < 1 else "", {"text_rank": text, "image_ranks": images}))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Recalls at 1, 5 and 10: of a caption for an image, and of the image for a caption."""
        texts = [row["text_rank"] for row in rows]
        images = [rank for row in rows for rank in row["image_ranks"]]
        return {
            f"{name}_recall@{k}": sum(rank < k for rank in found) / len(found)
            for name, found in (("text", texts), ("image", images))
            for k in KS
        }

    def spec(self) -> dict[str, Any]:
        """Files, number of candidates, wording and how captions are ranked."""
        captions = sum(len(item.truth["captions"]) for item in self._items)
        return {
            **super().spec(),
            "answer": "ranks by the log-likelihood of a caption and the end behind it",
            "split": self.split,
            "candidates": {"images": len(self._items), "captions": captions},
            "wording": self.wording,
            "by": self.by,
        }


def _read_ranks(answer: Answer) -> tuple[int, list[int]]:
    """Wrong captions in front for the image, and wrong images in front for each of its captions."""
    (text,) = answer_texts(answer)
    wanted = len(answer.item.truth["captions"])
    try:
        match json.loads(text):
            case {"text": int(rank), "image": [*ranked]} if len(ranked) == wanted:
                if all(type(one) is int and one >= 0 for one in (rank, *ranked)):
                    return rank, ranked
    except json.JSONDecodeError:
        pass
    form = f'{{"text": number, "image": [{wanted} numbers]}} of wrong ones in front'
    raise ValueError(f"answer {answer.item.id}: expected {form}, got {text[:80]!r}")
