"""Training from token files: the documents of another data module, whose images were encoded beforehand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unimodal.data.module import DocumentData
from unimodal.data.source import Source
from unimodal.data.stream import Weighted
from unimodal.data.token_files import PROMPTS, TokenFiles
from unimodal.documents import Document, read_jsonl
from unimodal.stored import tokenizer_fingerprint


class TokenData(DocumentData):
    """Token files that `unimodal tokenize` wrote, read in the place of the data they were made of.

    Args:
        root: the folder of token files.
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        weights: shares of kinds of documents, by name; those not named keep the shares that they were written with.
        validation_documents: most documents of each kind in validation.
        prompts: documents of each kind that are continued in validation, as many as were kept at the most.
        seed: of every draw; linked to `seed_everything`.
        workers: 0 packs in the training process, 1 beside it.
    """

    def __init__(
        self,
        root: Path,
        batch_tokens: int,
        weights: dict[str, float] | None = None,
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers)
        self.files = TokenFiles(Path(root))
        self.weights = weights or {}
        kinds = [source.kind for source in self.files.plan.sources["train"]]
        for kind in self.weights:
            if kind not in kinds:
                raise ValueError(f"data.weights: expected some of {', '.join(dict.fromkeys(kinds))}, got {kind}")

    def setup(self, stage: str) -> None:
        """Refuse tokens that the model's tokenizer did not make."""
        assert self.trainer is not None
        model: Any = self.trainer.lightning_module.model
        made, own = self.files.plan.tokenizer, tokenizer_fingerprint(model.tokenizer)
        if made["fingerprint"] != own:
            raise ValueError(
                f"data.root: {self.files.root} holds tokens of another tokenizer than model.tokenizer (recipe "
                f"{made['recipe']}, {made['fingerprint'][:12]}), expected {own[:12]}; is tokenizer_weights given?"
            )

    def training_sources(self) -> list[Weighted]:
        """As they were written."""
        sources = self.files.sources("train")
        return [Weighted(source, self.weights.get(source.kind, source.weight)) for source in sources]

    def validation_sources(self) -> list[Source]:
        """Likewise."""
        return list(self.files.sources("val"))

    def corpus(self) -> Iterable[str]:
        """The other data module's."""
        return self.files.corpus()

    def prompts(self) -> list[Document]:
        """Held-out documents cut before their first target, with their images as pixels."""
        found: list[Document] = []
        for document in read_jsonl(self.files.root / PROMPTS):
            if sum(other.kind == document.kind for other in found) < self.prompt_count:
                found.append(document)
        return found
