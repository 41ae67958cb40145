"""What a design costs, counted on packs of its own data: FLOPs, tokens, documents, parameters. Nothing is trained for it.

FLOPs are useful ones (`unimodal.training.flops`): what is computed and thrown away does not count, frozen weights count
without their gradient.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import jsonargparse
import torch
import yaml
from lightning import LightningDataModule

from experiments.designs.table import Changes
from unimodal.data.module import DocumentData
from unimodal.data.stream import Mixture, Packing, PackStream
from unimodal.export import build
from unimodal.files import write_atomically
from unimodal.model import UnifiedModel
from unimodal.text import TextTokenizer
from unimodal.training import stages
from unimodal.training.flops import useful_flops

PACKS = 16
"""How many are counted; each is one optimizer step."""
COUNTING = 1
"""To be raised where packs or what is counted of them change: what was kept before is then counted anew."""


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step on average, and of the model.

    Attributes:
        flops: forward and backward.
        tokens: of the packed sequence, every copy of an image.
        documents: in it.
        parameters: of the model without its tokenizer.
        learning: of them, those that are trained.
    """

    flops: float
    tokens: float
    documents: float
    parameters: int
    learning: int


@dataclass
class Costs:
    """What was counted before: counting takes seconds a design, and where runs are scored follows from it.

    Attributes:
        folder: of files that keep it, one a recipe; None: it is kept as long as this is.
    """

    folder: Path | None = None
    _known: dict[str, Cost] = field(default_factory=dict)

    def of(self, config: Changes) -> Cost:
        """Of a recipe, whatever its seed."""
        settings = yaml.safe_dump({key: value for key, value in config.items() if key != "seed_everything"})
        name = hashlib.sha256(f"{COUNTING} {PACKS} {settings}".encode()).hexdigest()[:16]
        if name not in self._known:
            self._known[name] = self._held(name, settings)
        return self._known[name]

    def _held(self, name: str, settings: str) -> Cost:
        if self.folder is None:
            return cost(yaml.safe_load(settings))
        held = self.folder / f"{name}.json"
        if not held.is_file():
            write_atomically(held, json.dumps(asdict(cost(yaml.safe_load(settings)))).encode())
        return Cost(**json.loads(held.read_text(encoding="utf-8")))


def cost(config: Changes) -> Cost:
    """Of a recipe as `unimodal fit` would read it; weights are drawn anew, which changes none of these numbers."""
    torch.manual_seed(0)
    settings = config["model"]["init_args"]
    model = build(settings["model"], "model")
    assert isinstance(model, UnifiedModel)
    data = open_data(config)
    model.text = TextTokenizer.train(data.corpus(), model.backbone.config.vocabulary)
    stages.freeze(model, settings.get("freeze", ()))
    packing = Packing(model.sequencer, model.backbone.config.experts, model.generator.reads, data.batch_tokens)
    packs = list(islice(PackStream(Mixture(data.training_sources(), data.seed), packing), PACKS))
    own = [p for name, p in model.named_parameters() if not name.startswith("tokenizer.")]
    return Cost(
        flops=sum(useful_flops(model, pack).total for pack in packs) / PACKS,
        tokens=sum(len(pack) for pack in packs) / PACKS,
        documents=sum(pack.documents for pack in packs) / PACKS,
        parameters=sum(p.numel() for p in own),
        learning=sum(p.numel() for p in own if p.requires_grad),
    )


def open_data(config: Changes) -> DocumentData:
    """The data of a recipe."""
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    assert isinstance(data, DocumentData)
    return data
