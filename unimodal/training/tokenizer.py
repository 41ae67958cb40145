"""Training of a visual tokenizer: reconstruct the image, keep the codebook in use.

Letters: B images, H height, W width (pixels); K entries of a codebook, Q codebooks (one, where it is left out).
"""

import math
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio
from torchvision.utils import make_grid, save_image

from unimodal.training.optimizers import Schedule, parameter_groups, scheduled
from unimodal_tokenizers.base import ImageTokenizer, Reconstruction, TrainableTokenizer
from unimodal_tokenizers.frozen import FrozenEncoder
from unimodal_tokenizers.quantizers import TextCodebook, codebook_perplexity, codebook_usage

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

    loss = l1_weight |x - y| + l2_weight |x - y|^2 + sum over the tokenizer's terms of their weight * term

    with y the reconstruction and both norms averaged over pixels and channels. The tokenizer names its terms and says the
    weight each has by default; they are logged by name, unweighted.
    Every validation writes `samples/reconstruction_step_<n>.png` into the run's folder.
    """

    part = "tokenizer"  # what an export of this run holds

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        lr: float,
        l1_weight: float,
        l2_weight: float,
        weights: dict[str, float] | None = None,
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        lr_floor: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        samples: int = 16,
        encoder_weights: Path | None = None,
        text_embeddings: Path | None = None,
    ) -> None:
        """Args:

        tokenizer: what is trained.
        lr: the highest learning rate of AdamW.
        l1_weight: weight of the mean absolute error.
        l2_weight: weight of the mean squared error.
        weights: of the tokenizer's own terms, by name, where they are not to be its defaults.
        schedule: how the learning rate falls after the warm-up.
        warmup_steps: optimizer steps over which it rises.
        lr_floor: its last value, as a share of `lr`.
        weight_decay: of AdamW; never on norms, biases and codebooks.
        betas: of AdamW.
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
        for name in weights or {}:
            if name not in tokenizer.weights:
                known = ", ".join(tokenizer.weights) or "none"
                raise ValueError(f"weights: expected terms of {type(tokenizer).__name__} ({known}), got {name}")
        own = {f"weights.{name}": weight for name, weight in (weights or {}).items()}
        for name, weight in {"l1_weight": l1_weight, "l2_weight": l2_weight, **own}.items():
            if weight < 0:
                raise ValueError(f"{name}: expected at least 0, got {weight}")
        if l1_weight == l2_weight == 0:
            raise ValueError("l1_weight, l2_weight: expected at least one above 0, got 0 and 0: nothing to reconstruct")
        self.tokenizer = tokenizer
        self.l1_weight, self.l2_weight = l1_weight, l2_weight
        self.weights = {**tokenizer.weights, **(weights or {})}
        self.lr, self.lr_floor, self.weight_decay, self.betas = lr, lr_floor, weight_decay, betas
        self.schedule, self.warmup_steps, self.samples = schedule, warmup_steps, samples
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3))  # clamps; the mean over images
        books = tokenizer.layout.codebooks
        self.counts = CodebookCounts(books[0], len(books)) if books else None

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images and their reconstruction, in [-1, 1]."""
        return self.tokenizer.decode(self.tokenizer.encode(images)).float().clamp(-1, 1)

    def training_step(self, batch: Float[Tensor, "B 3 H W"], batch_idx: int) -> Float[Tensor, ""]:
        """One batch: every term logged by itself, and how the batch used the codebook."""
        result = self.tokenizer(batch)
        terms = self._terms(batch, result)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items() if name != "loss"})
        self.log("train/loss", terms["loss"].detach(), prog_bar=True)
        if result.counts is not None:
            self.log("train/codebook_usage", codebook_usage(result.counts))
            self.log("train/codebook_perplexity", codebook_perplexity(result.counts), prog_bar=True)
        return terms["loss"]

    def validation_step(self, batch: Float[Tensor, "B 3 H W"], batch_idx: int) -> None:
        """The same terms on held-out images, PSNR in dB, and a picture of the first of them."""
        reconstruction = self._evaluate(batch, "val")
        dry = self.trainer.sanity_checking or self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if batch_idx == 0 and not dry:
            self._draw(batch, reconstruction, f"samples/reconstruction_step_{self.global_step}.png")

    def predict_step(self, batch: Float[Tensor, "B 3 H W"], batch_idx: int) -> None:
        """A picture of a batch of held-out images beside their reconstructions, in `predictions/`."""
        self._draw(batch, self.tokenizer(batch).images.float(), f"predictions/reconstruction_{batch_idx:04d}.png")

    def _draw(self, images: Float[Tensor, "B 3 H W"], reconstruction: Float[Tensor, "B 3 H W"], name: str) -> None:
        if self.samples and self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / name
            write_reconstructions(images[: self.samples], reconstruction[: self.samples], path)

    def test_step(self, batch: Float[Tensor, "B 3 H W"], batch_idx: int) -> None:
        """The same terms and PSNR on test images."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Usage and perplexity of the codebook over all validation images."""
        self._log_codebook("val")

    def on_test_epoch_end(self) -> None:
        """Usage and perplexity of the codebook over all test images."""
        self._log_codebook("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without decay on norms, biases and codebooks; the learning rate moves every step."""
        groups = parameter_groups(self.tokenizer, self.weight_decay)
        return scheduled(
            torch.optim.AdamW(groups, lr=self.lr, betas=self.betas), self.trainer.max_steps,
            warmup_steps=self.warmup_steps, schedule=self.schedule, floor=self.lr_floor,
        )  # fmt: skip

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then that of what learns without gradients."""
        super().optimizer_step(*args, **kwargs)
        self.tokenizer.after_step()

    def _terms(self, x: Float[Tensor, "B 3 H W"], result: Reconstruction) -> dict[str, Tensor]:
        """The terms of the loss by name, unweighted but for their sum, `loss`."""
        y = result.images.float()
        terms = {"l1": F.l1_loss(y, x), "l2": F.mse_loss(y, x)}
        loss = self.l1_weight * terms["l1"] + self.l2_weight * terms["l2"]
        for name, term in result.terms.items():
            loss = loss + self.weights[name] * term
        return {**terms, **result.terms, "loss": loss}

    def _evaluate(self, x: Float[Tensor, "B 3 H W"], stage: str) -> Float[Tensor, "B 3 H W"]:
        """Log one batch of held-out images; their reconstruction."""
        result = self.tokenizer(x)
        terms, y = self._terms(x, result), result.images.float()
        self.psnr.update(y, x)
        if self.counts is not None and result.counts is not None:
            self.counts.update(result.counts)
        self.log_dict({f"{stage}/{name}": term for name, term in terms.items()}, batch_size=len(x), sync_dist=True)
        self.log(f"{stage}/psnr", self.psnr, prog_bar=True, batch_size=len(x))
        return y

    def _log_codebook(self, stage: str) -> None:
        """Log how the images of the whole epoch used the codebook, if there is one, and start counting anew."""
        if self.counts is None:
            return
        counts = self.counts.compute()
        self.log(f"{stage}/codebook_usage", codebook_usage(counts), prog_bar=True)
        self.log(f"{stage}/codebook_perplexity", codebook_perplexity(counts))
        self.counts.reset()


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
