"""Training of a visual tokenizer: reconstruct the image, keep the codebook in use, deceive an adversary.

Letters: B images, H height, W width (pixels); K entries of a codebook, Q codebooks (one, where it is left out).
"""

import math
import os
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio
from torchvision.utils import make_grid, save_image

from unimodal.data.image_stream import ImageBatch, taken_apart
from unimodal.environment import check_precision
from unimodal.metrics.perceptual import Perceptual
from unimodal.training.adversary import Adversary
from unimodal.training.ema import EMA
from unimodal.training.logs import spared
from unimodal.training.optimizers import Schedule, check_rates, parameter_groups, scheduled
from unimodal_tokenizers.base import ImageTokenizer, Reconstruction, TrainableTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.quantizers import TextCodebook, codebook_perplexity, codebook_usage
from unimodal_tokenizers.semantic import TextEncoder

PICTURE_SIDE = 64  # pixels an image has at least in a reconstruction grid; small ones are enlarged


class CodebookCounts(Metric):
    """How many tokens chose each of K entries, over all batches and processes."""

    full_state_update = False
    counts: Tensor

    def __init__(self, entries: int, codebooks: int = 1) -> None:
        """Args:

        entries: size K of a codebook.
        codebooks: how many of them, Q; counts of one are `(K,)`, of several `(Q, K)`.
        """
        super().__init__()
        shape = (entries,) if codebooks == 1 else (codebooks, entries)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Int64[Tensor, "*Q K"]) -> None:
        """Add the counts of one batch."""
        self.counts = self.counts + counts  # not in place: validation leaves an inference tensor behind

    def compute(self) -> Int64[Tensor, "*Q K"]:
        """The sums."""
        return self.counts


Part = TypeVar("Part", bound=nn.Module)


def _only(kind: type[Part], tokenizer: nn.Module, key: str, path: Path) -> Part:
    """The one module of that kind that a file is for."""
    found = [module for module in tokenizer.modules() if isinstance(module, kind)]
    if len(found) != 1:
        name = type(tokenizer).__name__
        raise ValueError(f"{key}: expected none for this {name} ({len(found)} {kind.__name__}), got {path}")
    return found[0]


class TokenizerTraining(L.LightningModule):
    """Trains a tokenizer on images `(B, 3, H, W)` in [-1, 1].

    loss = error + sum_i w_i term_i + adversary.weight lambda (-mean D(y))
    error = l1_weight |x - y| + l2_weight |x - y|^2 + perceptual_weight perceptual(x, y)

    with y the reconstruction, norms averaged over pixels and channels, and term_i what the tokenizer's own loss is made of
    (codebook, commitment, entropy, kl ...). An adversary's discriminator D learns in the same optimizer step, so that a step
    is one of the tokenizer, and `trainer.accumulate_grad_batches` and `trainer.gradient_clip_val` are kept; each of the two
    has its gradient clipped by itself. Every term is logged as `train/NAME` without its weight.
    Every validation writes `samples/reconstruction_step_<n>.png` into the run's folder.

    What torch's own generator draws in training depends on (seed, batch, process) alone, so that a resumed run draws the
    same; the project's tokenizers draw from counters among their buffers, by a `seed` of theirs.
    """

    part = "tokenizer"  # what an export of this run holds

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        lr: float,
        l1_weight: float,
        l2_weight: float,
        weights: dict[str, float] | None = None,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        adversary: Adversary | None = None,
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        lr_floor: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        ema_decay: float = 0.0,
        samples: int = 16,
        encoder_weights: Path | None = None,
        text_embeddings: Path | None = None,
    ) -> None:
        """Args:

        tokenizer: what is trained.
        lr: the highest learning rate of AdamW.
        l1_weight: weight of the mean absolute error.
        l2_weight: weight of the mean squared error.
        weights: of the tokenizer's own terms, by name; those not named keep the tokenizer's.
        perceptual: a distance as a frozen network sees it.
        perceptual_weight: its weight.
        adversary: a discriminator to deceive.
        schedule: how the learning rate falls after the warm-up.
        warmup_steps: optimizer steps over which it rises.
        lr_floor: its last value, as a share of `lr`.
        weight_decay: of AdamW; never on norms, biases and codebooks (a linear map that makes one is none).
        betas: of AdamW.
        ema_decay: of the tokenizer's moving average, which is validated and exported; 0 for none.
        samples: images in the reconstruction grid of each validation; 0 for none.
        encoder_weights: of the tokenizer's frozen encoder (a representation's, or a semantic head's teacher): safetensors
            with timm's names.
        text_embeddings: of the tokenizer's `TextCodebook`: safetensors with one matrix.
        """
        super().__init__()
        if not isinstance(tokenizer, TrainableTokenizer):
            name = type(tokenizer).__name__
            raise ValueError(f"tokenizer: expected one that is trained (a TrainableTokenizer), got {name}")
        if encoder_weights is not None:
            _only(FrozenEncoder, tokenizer, "encoder_weights", encoder_weights).load(encoder_weights)
        if text_embeddings is not None:
            _only(TextCodebook, tokenizer, "text_embeddings", text_embeddings).load(text_embeddings)
        given = ("encoder_weights", FrozenEncoder, encoder_weights), ("text_embeddings", TextCodebook, text_embeddings)
        for key, kind, path in given:
            if path is None and any(isinstance(module, kind) for module in tokenizer.modules()):
                rank_zero_warn(f"model.{key}: none given: what the {kind.__name__} holds of it is random, and stays so")
        own = _own_weights(tokenizer, weights or {})
        error = {"l1_weight": l1_weight, "l2_weight": l2_weight, "perceptual_weight": perceptual_weight}
        for name, weight in [*error.items(), *((f"weights.{name}", weight) for name, weight in own.items())]:
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {weight}")
        if l1_weight == l2_weight == 0 and tokenizer.needs_error:
            raise ValueError("l1_weight, l2_weight: expected at least one above 0, got 0 and 0: nothing to reconstruct")
        check_rates(lr, betas, weight_decay, warmup_steps, lr_floor)
        self.tokenizer, self.perceptual, self.adversary = tokenizer, perceptual, adversary
        self.error_weights = {name.removesuffix("_weight"): weight for name, weight in error.items()}
        self.own_weights, self.ema_decay = own, ema_decay
        self.lr, self.lr_floor, self.weight_decay, self.betas = lr, lr_floor, weight_decay, betas
        self.schedule, self.warmup_steps, self.samples = schedule, warmup_steps, samples
        self.reads_texts = any(isinstance(module, TextEncoder) for module in tokenizer.modules())
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3))  # clamps; the mean over images
        books = tokenizer.layout.codebooks
        self.counts = CodebookCounts(books[0], len(books)) if books else None

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images and their reconstruction, in [-1, 1]."""
        return self.tokenizer.decode(self.tokenizer.encode(images)).float().clamp(-1, 1)

    def configure_model(self) -> None:
        """Refuse a precision there is not."""
        check_precision(self.trainer.precision)

    def configure_callbacks(self) -> list[Callback]:
        """The moving average comes with the module."""
        return [EMA(self.ema_decay)] if self.ema_decay else []

    # ---- training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw from here as if nothing had been drawn before: random states are in no checkpoint."""
        seed, number = int(os.environ.get("PL_GLOBAL_SEED", "0")), self.trainer.fit_loop.total_batch_idx
        state = np.random.SeedSequence((seed, number, self.global_rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]) >> 1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Float[Tensor, ""]:
        """One batch: every term logged by itself, and how the batch used the codebook."""
        x, result = self._reconstructed(batch)
        terms = self._terms(x, result)
        error, loss = self._sums(terms)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        if result.counts is not None:
            self._log_codebook(result.counts, "train")
        return loss if self.adversary is None else loss + self._contest(self.adversary, x, result, error)

    def _contest(
        self, adversary: Adversary, x: Float[Tensor, "B 3 H W"], result: Reconstruction, error: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """What the adversary adds to the loss: the tokenizer's term, and the discriminator's own."""
        if self.global_step < adversary.start_step:
            return adversary.idle()
        y = result.images.float()
        generator = adversary.of_generator(y)
        balance = adversary.balance(error, generator, self.tokenizer.last_layer)
        discriminator = adversary.of_discriminator(x, y)
        found = {"generator": generator.detach(), "discriminator": discriminator.detach(), "adaptive_weight": balance}
        self.log_dict({f"train/{name}": value for name, value in found.items()})
        return adversary.weight * balance * generator + discriminator

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A discriminator that has not started yet has no gradient, rather than one of zeros that AdamW would count."""
        if self.adversary is not None and self.global_step < self.adversary.start_step:
            for parameter in self.adversary.parameters():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Tokenizer and discriminator by themselves: a steep discriminator must not shorten the tokenizer's steps."""
        if self.adversary is None or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in (self.tokenizer, self.adversary):
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(part.parameters(), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(part.parameters(), gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """After a step, what learns without gradients moves."""
        super().optimizer_step(*args, **kwargs)
        self.tokenizer.after_step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without decay on norms, biases and codebooks; the learning rate moves every step.

        The discriminator's parameters are a group of the same optimizer, with a rate and betas of its own and no decay.
        """
        groups = parameter_groups(self.tokenizer, self.weight_decay)
        if self.adversary is not None:
            lr = self.lr if self.adversary.lr is None else self.adversary.lr
            trained = [p for p in self.adversary.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": lr, "betas": self.adversary.betas, "weight_decay": 0.0})
        return scheduled(
            torch.optim.AdamW(groups, lr=self.lr, betas=self.betas), self.trainer.max_steps,
            warmup_steps=self.warmup_steps, schedule=self.schedule, floor=self.lr_floor,
        )  # fmt: skip

    # ---- validation

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The same terms on held-out images (an adversary's excepted), PSNR in dB, and a picture of the first of them."""
        x, reconstruction = self._evaluate(batch, "val")
        dry = self.trainer.sanity_checking or self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if batch_idx == 0 and not dry:
            self._draw(x, reconstruction, f"samples/reconstruction_step_{self.global_step}.png")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """A picture of a batch of held-out images beside their reconstructions, in `predictions/`."""
        x, result = self._reconstructed(batch)
        self._draw(x, result.images.float(), f"predictions/reconstruction_{batch_idx:04d}.png")

    def _draw(self, images: Float[Tensor, "B 3 H W"], reconstruction: Float[Tensor, "B 3 H W"], name: str) -> None:
        if self.samples and self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / name
            with spared(str(path), "this picture is lost"):
                write_reconstructions(images[: self.samples], reconstruction[: self.samples], path)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The same terms and PSNR on test images."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Usage and perplexity of the codebooks over all validation images."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Usage and perplexity of the codebooks over all test images."""
        self._log_epoch("test")

    def _evaluate(self, batch: ImageBatch, stage: str) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]]:
        """Log one batch of held-out images; those, and their reconstruction."""
        x, result = self._reconstructed(batch)
        terms, y = self._terms(x, result), result.images.float()
        self.psnr.update(y, x)
        if self.counts is not None and result.counts is not None:
            self.counts.update(result.counts)
        logged = {f"{stage}/{name}": term for name, term in {**terms, "loss": self._sums(terms)[1]}.items()}
        self.log_dict(logged, batch_size=len(x), sync_dist=True)
        self.log(f"{stage}/psnr", self.psnr, prog_bar=True, batch_size=len(x))
        return x, y

    def _log_epoch(self, stage: str) -> None:
        """Log how the images of the whole epoch used the codebooks, if there are any, and start counting anew."""
        if self.counts is not None and self.counts.update_called:
            self._log_codebook(self.counts.compute(), stage)
            self.counts.reset()

    # ---- both

    def _reconstructed(self, batch: ImageBatch) -> tuple[Float[Tensor, "B 3 H W"], Reconstruction]:
        """The images, and what the tokenizer makes of them, and of their texts if it reads them."""
        x, texts = taken_apart(batch)
        if not self.reads_texts:
            return x, self.tokenizer(x)
        if texts is None:
            raise ValueError("data.captions: expected true, because the tokenizer reads texts, got images alone")
        return x, self.tokenizer(x, texts)

    def _terms(self, x: Float[Tensor, "B 3 H W"], result: Reconstruction) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by name, unweighted: those of the error, then the tokenizer's own."""
        y = result.images.float()
        terms = {"l1": F.l1_loss(y, x), "l2": F.mse_loss(y, x)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x, y).mean()
        return {**terms, **result.terms}

    def _sums(self, terms: Mapping[str, Float[Tensor, ""]]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The error, and the loss: the weighted sums of the first terms and of all."""
        weighted = {name: (self.error_weights | self.own_weights)[name] * term for name, term in terms.items()}
        error = reduce(add, [term for name, term in weighted.items() if name in self.error_weights])
        return error, reduce(add, [term for name, term in weighted.items() if name not in self.error_weights], error)

    def _log_codebook(self, counts: Int64[Tensor, "*Q K"], stage: str) -> None:
        """Usage and perplexity, of several codebooks their means and each one's."""
        named = {"": counts}
        if counts.dim() == 2:
            named |= {f"_{q}": one for q, one in enumerate(counts)}
        for ending, one in named.items():
            self.log(f"{stage}/codebook_usage{ending}", codebook_usage(one), prog_bar=stage == "val" and not ending)
            self.log(f"{stage}/codebook_perplexity{ending}", codebook_perplexity(one))


def _own_weights(tokenizer: TrainableTokenizer, given: Mapping[str, float]) -> dict[str, float]:
    """The tokenizer's weights of its terms, changed where a recipe names them."""
    for name in given:
        if name not in tokenizer.weights:
            known = ", ".join(tokenizer.weights) or "none"
            raise ValueError(f"weights: expected terms of {type(tokenizer).__name__} ({known}), got {name}")
    return {**tokenizer.weights, **given}


def write_reconstructions(
    images: Float[Tensor, "B 3 H W"], reconstructions: Float[Tensor, "B 3 H W"], path: Path
) -> None:
    """A PNG of two rows, images in [-1, 1] above their reconstructions, small ones enlarged without smoothing."""
    rows = torch.cat([images.float(), reconstructions.float()])  # (2 B, 3, H, W)
    factor = math.ceil(PICTURE_SIDE / min(images.shape[-2:]))
    rows = F.interpolate(rows, scale_factor=factor, mode="nearest")  # (2 B, 3, H factor, W factor)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(rows.clamp(-1, 1), nrow=len(images), padding=4, normalize=True, value_range=(-1, 1), pad_value=0.5)
    save_image(grid, path)
