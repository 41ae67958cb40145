"""Training of a unified model: text and image losses over packed documents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import Callback, LightningModule
from torch import Tensor
from torchmetrics import Metric

from unimodal.decoding import check_guidance, decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document
from unimodal.environment import can_compile, check_precision
from unimodal.evaluation.benchmark import Benchmark
from unimodal.export import load_tokenizer_weights, load_weights, read_info, read_weights
from unimodal.importers import load_text
from unimodal.model import UnifiedModel
from unimodal.packing import FILLING, Lanes, PackedSequence
from unimodal.shards import is_sharded, together
from unimodal.stored import tokenizer_fingerprint
from unimodal.text import TextTokenizer
from unimodal.training import stages
from unimodal.training.ema import EMA
from unimodal.training.optimizers import MuonAdamW, check_rates, parameter_groups, scheduled, split_matrices
from unimodal.training.scores import ValidationScores
from unimodal.training.sharding import shard

if TYPE_CHECKING:
    from unimodal.data.module import DocumentData
    from unimodal_generators.base import LossBreakdown


class UnifiedTraining(LightningModule):
    """AdamW on the sum of text cross-entropy and image loss, each a mean over the targets of the whole optimizer step.

    Learned routers (backbone.moe) add their loss, a mean over its tokens, whose weights are in `Moe`: it is trained on and
    logged as train/router, and is no part of validation.

    Args:
        model: what is trained; its image tokenizer stays frozen.
        lr: peak learning rate.
        muon_lr: peak learning rate of Muon on the matrices of the backbone's layers; None trains them by AdamW too.
        betas: of AdamW.
        weight_decay: on matrices; none on norms, biases and embeddings.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what follows the warm-up.
        lr_floor: what the schedule falls to, as a share of `lr`.
        text_weight: of the text loss.
        image_weight: of the image loss.
        ema_decay: of the weights' moving average, which is validated and exported; 0 keeps no history.
        tokenizer_weights: an export of the image tokenizer, trained before.
        vision_weights: of model.vision: a file in timm's format, or `hub` (`hub:TAG`) to have timm download its own.
        init: an export of a whole model to start from, text tokenizer included.
        compile: whether training runs through `torch.compile`, layer by layer; needs a C++ compiler.
        checkpoint_layers: whether each layer's activations are computed again in backward rather than kept.
        init_from: a folder of a text model in Hugging Face's format, which every expert begins as; its tokenizer is taken.
        freeze: what does not learn: EXPERT, EXPERT.PART (attention, mlp, norms), shared, embedding, head, generator ...
        benchmarks: asked in full at every validation; each logs its tasks and their mean.
        image_metrics: at every validation, of images drawn for held-out captions against the captions' own images.
    """

    part = "model"

    def __init__(
        self,
        model: UnifiedModel,
        lr: float,
        muon_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        lr_floor: float = 0.05,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        ema_decay: float = 0.999,
        tokenizer_weights: Path | None = None,
        vision_weights: str | None = None,
        init: Path | None = None,
        compile: bool = False,
        checkpoint_layers: bool = False,
        init_from: Path | None = None,
        freeze: Sequence[str] = (),
        benchmarks: Sequence[Benchmark] = (),
        image_metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__()
        self._validated = (benchmarks, image_metrics)  # in a tuple: metrics are no part of what is trained
        self.model = model
        check_guidance(model, model.generator.sampling)  # here: the first validation may be hours away
        for height, width in model.sequence.image_sizes:
            model.generator.check_sampling(model.generator.sampling, [model.tokenizer.layout.grid(height, width)])
        self.compiles = compile
        model.backbone.checkpointing = checkpoint_layers
        if muon_lr is not None and muon_lr <= 0:
            raise ValueError(f"muon_lr: expected a number above 0, got {muon_lr}")
        check_rates(lr, betas, weight_decay, warmup_steps, lr_floor)
        self.lr, self.muon_lr, self.betas, self.weight_decay = lr, muon_lr, betas, weight_decay
        self.warmup_steps, self.schedule, self.lr_floor = warmup_steps, schedule, lr_floor
        for name, weight in (("text_weight", text_weight), ("image_weight", image_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected a number of 0 or more, got {weight}")
        self.loss_weights = {"text": text_weight, "image": image_weight, "router": 1.0}
        self.ema_decay = ema_decay
        self._behind: tuple[Lanes, Lanes] | None = None  # where the data stands, and what was left out, after this step
        self._kinds: dict[str, int] = {}  # tokens by kind of document since they were last logged
        self._sums: dict[str, tuple[float, int]] = {}
        self.predicted: list[Document] = []
        if tokenizer_weights is not None:
            load_tokenizer_weights(model.tokenizer, Path(tokenizer_weights), "tokenizer_weights")
        if vision_weights is not None:
            if model.vision is None:
                raise ValueError(f"vision_weights: expected model.vision to load them into, got {vision_weights} alone")
            model.vision.load(vision_weights)
        for name, given in (("init_from", init_from), ("vision_weights", vision_weights)):
            if init is not None and given is not None:  # `init` is a whole model
                raise ValueError(f"{name}: expected none beside init {init}, got {given}")
        self._start, self._tokenizer = (init, init_from), tokenizer_weights
        if init_from is not None and not Path(init_from).is_dir():
            raise ValueError(f"init_from: expected a folder, got {init_from}, which does not exist")
        for folder in filter(None, self._start):
            if init is not None:
                read_info(Path(folder))
            model.text = TextTokenizer.load(Path(folder) / "tokenizer.json")
        if not model.backbone.deferred:
            self._load_start()
        stages.freeze(model, freeze)

    def _load_start(self) -> None:
        """The weights that training begins with, where others than new ones are asked for."""
        init, init_from = self._start
        if init is not None:
            new = [f"generator.{name}" for name in self.model.generator.new_weights]
            tokenizer = None if self._tokenizer is None else tokenizer_fingerprint(self.model.tokenizer)
            load_weights(self.model, read_weights(Path(init), "init"), str(init), "init", may_lack=new)
            if tokenizer not in (None, tokenizer_fingerprint(self.model.tokenizer)):
                raise ValueError(f"tokenizer_weights: expected those of init {init}, or none, got {self._tokenizer}")
        if init_from is not None:
            load_text(self.model.backbone, init_from)

    def configure_model(self) -> None:
        """Cut the model where the strategy is `Sharded`; others hold it whole. Refuse a precision there is not."""
        precision = self.trainer.precision
        check_precision(precision, sharded=self._device_mesh is not None)
        if self._device_mesh is not None and not is_sharded(self.model):
            deferred = self.model.backbone.deferred
            shard(
                self.model, self._device_mesh, self.trainer.strategy.root_device,
                torch.bfloat16 if precision == "bf16-mixed" else None, fill=self._start[0] is None,
            )  # fmt: skip
            if deferred:
                self._load_start()

    def configure_callbacks(self) -> list[Callback]:
        """The moving average comes with the module, and the benchmarks that it is scored by."""
        return [EMA(self.ema_decay), *([ValidationScores(*self._validated)] if any(self._validated) else [])]

    def train_text(self, data: "DocumentData") -> None:
        """Train the text tokenizer on the data's corpus."""
        self.model.text = TextTokenizer.train(data.corpus(), self.model.backbone.config.vocabulary)

    def setup(self, stage: str) -> None:
        """Train the text tokenizer, unless an export or a checkpoint brings one; compile."""
        if not self.model.has_text:
            self.train_text(self.trainer.datamodule)  # type: ignore[attr-defined]
        if stage == "fit" and self.compiles:
            possible, why = can_compile()
            if not possible:
                raise ValueError(f"model.compile: expected false where torch.compile cannot work ({why}), got true")
            self.model.backbone.compile()

    def training_step(self, batch: PackedSequence, batch_idx: int) -> Tensor:
        """Weighted losses over the global counts; Lightning then averages over ranks and accumulation."""
        losses: LossBreakdown = self.model(batch)
        self._behind = batch.position, batch.left_out
        for kind, tokens in batch.kinds.items():
            self._kinds[kind] = self._kinds.get(kind, 0) + tokens
        shares = self.trainer.world_size * self.trainer.accumulate_grad_batches
        loss = torch.zeros((), device=self.device)
        for name, term in losses.items():
            loss = loss + self.loss_weights[name] * term.sum * (shares / max(batch.step_counts[name], 1))
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if last and every and (self.trainer.global_step + 1) % every == 0:
            for name, term in losses.items():
                if term.count:
                    self.log(f"train/{name}", term.sum.detach() / term.count, batch_size=term.count)
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
            for kind, tokens in self._kinds.items():
                self.log(f"tokens/{kind or 'document'}", tokens / sum(self._kinds.values()), batch_size=1)
            self._kinds = {}
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """After a step, and only then, the data of it is consumed."""
        super().optimizer_step(*args, **kwargs)
        if self._behind is not None:
            data: DocumentData = self.trainer.datamodule  # type: ignore[attr-defined]
            data.position, data.left_out = self._behind

    def validation_step(self, batch: PackedSequence, batch_idx: int) -> None:
        """Add up held-out losses by kind of document."""
        for name, term in self.model(batch).items():
            if term.count and batch.kind != FILLING:
                value, count = self._sums.get(f"{batch.kind}/{name}", (0.0, 0))
                self._sums[f"{batch.kind}/{name}"] = (value + float(term.sum), count + term.count)

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._sums = {}

    def on_validation_epoch_end(self) -> None:
        """Held-out loss by kind of document over all ranks, and their weighted mean."""
        sums, total = _over_ranks(self._sums), 0.0
        stage = "test" if self.trainer.testing else "val"
        for key, (value, count) in sorted(sums.items()):
            self.log(f"{stage}/{key}", value / count, sync_dist=True)
            total += self.loss_weights[key.rpartition("/")[2]] * value / count
        self.log(f"{stage}/loss", total / max(len(sums), 1), prog_bar=True, sync_dist=True)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: list[tuple[int, Document]], batch_idx: int) -> None:
        """Numbered held-out prompts, continued; `Samples` writes `predicted` into the run folder."""
        self.predicted += continue_prompts(self.model, [d for _, d in batch], [number for number, _ in batch])

    def configure_optimizers(self) -> Any:
        """AdamW, or Muon and AdamW, with warm-up and schedule by optimizer step."""
        optimizer: torch.optim.Optimizer
        if self.muon_lr is None:
            groups = parameter_groups(self.model, self.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        else:
            matrices, groups = split_matrices(self.model, self.model.backbone.layers, self.weight_decay)
            optimizer = MuonAdamW(
                matrices, groups, lr=self.lr, muon_lr=self.muon_lr, betas=self.betas, weight_decay=self.weight_decay
            )
        return scheduled(
            optimizer, self.trainer.max_steps, warmup_steps=self.warmup_steps, schedule=self.schedule,
            floor=self.lr_floor,
        )  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The text tokenizer travels with the weights."""
        checkpoint["text_tokenizer"] = self.model.text.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back with them. A run goes on with the optimizers that it has."""
        states = checkpoint.get("optimizer_states") if self.trainer.state.fn == "fit" else None
        if states and (had := "momentum" in states[0]["param_groups"][0]) != (self.muon_lr is not None):
            expected = "a rate" if had else "none"
            raise ValueError(f"muon_lr: expected {expected}, as the run had that goes on, got {self.muon_lr}")
        self.model.text = TextTokenizer.from_json(checkpoint["text_tokenizer"])


def continue_prompts(model: UnifiedModel, prompts: Sequence[Document], seeds: Sequence[int]) -> list[Document]:
    """Held-out prompts as a user would have them continued: a caption is drawn, all else goes on with text."""
    drawing = DecodingSettings("image", max_tokens=0, max_images=1)
    writing = DecodingSettings("text", max_tokens=min(model.sequence.context_length, 48), max_images=4)
    written: dict[int, Document] = {}
    for settings in (drawing, writing):
        chosen = [i for i, p in enumerate(prompts) if (p.kind == "text_to_image") == (settings is drawing)]
        with together(model):
            made = decode(model, [prompts[i] for i in chosen], settings, [seeds[i] for i in chosen])
        written |= zip(chosen, made)
    return [written[i] for i in range(len(prompts))]


def _over_ranks(sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Sums and counts of every rank, added up; ranks may lack a kind."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    parts: list[dict[str, tuple[float, int]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, sums)
    keys = {key for part in parts for key in part}
    found = {key: [part[key] for part in parts if key in part] for key in keys}
    return {key: (sum(v for v, _ in values), sum(n for _, n in values)) for key, values in found.items()}
