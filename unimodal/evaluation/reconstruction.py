"""How much of an image a tokenizer keeps: PSNR, SSIM, LPIPS, rFID, bits a pixel, and how its codebooks are used.

Everything is measured on 8-bit images, the originals as the tokenizer was given them and the reconstructions as they are
written: `originals/` and `reconstructions/` of the results hold both.

Letters: B images, H height, W width (pixels), T tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from unimodal.documents import Document
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.evaluation.fingerprint import model_record
from unimodal.evaluation.harness import report
from unimodal.evaluation.image_files import ImageFiles, Loading, image_paths, listing_sha256
from unimodal.evaluation.image_sets import ResizeName, checked_weights, make_features
from unimodal.evaluation.results import Summary
from unimodal.evaluation.set_scores import Family, SetOptions, SetScores, score_folder
from unimodal.export import load_tokenizer
from unimodal.files import write_atomically
from unimodal.images import fit_image, png_bytes
from unimodal.metrics.perceptual import LPIPS
from unimodal.packing import to_tensor
from unimodal_tokenizers.base import ImageTokenizer, ImageTokens, TokenLayout, bits_per_token
from unimodal_tokenizers.quantizers import codebook_perplexity, codebook_usage

PICTURES = ("originals", "reconstructions")
"""Folders of the results."""
BEST_PSNR = 100.0
"""dB that stand for two images which are the same."""
SMALLEST = 6
"""Pixels of a side that SSIM's window of 11, mirrored at the edges, asks for."""
MOST_COUNTED = 2**24
"""Entries of a codebook whose use is counted; larger ones (binary codes) have more entries than images have tokens."""


class ImageReconstruction(Benchmark):
    """Images through a tokenizer and back.

    Args:
        tokenizer: run folder, or an export, of the tokenizer.
        size: WIDTHxHEIGHT that images are scaled and cropped to; none: the tokenizer's where it has one, else their own,
            cropped to multiples of the stride.
        lpips_weights: file of torchvision's network for LPIPS; none: no LPIPS.
        lpips_network: alex, vgg or squeeze, whichever the file is of.
        inception_weights: file pt_inception-2015-12-05-6726825d.pth for rFID, or torch-fidelity to download its own.
        resize: Inception's: tf1 (torch-fidelity, ADM), clean (clean-fid), pytorch (pytorch-fid), crop8 (COCO).
            torchmetrics' default, which is antialiased, is none of them.
        allow_few: rFID of fewer images than there are features; it is then called not comparable.
        most_broken: share of the images that may be unreadable, or refused by the tokenizer; they are skipped, counted and
            named.
        workers: processes that read images; none given: one less than there are cores, at most 16.
        device: where networks run: auto, cpu, cuda ...
    """

    name = "reconstruction"
    overall = "items"

    def __init__(
        self,
        tokenizer: Path,
        size: str | None = None,
        lpips_weights: Path | None = None,
        lpips_network: Literal["alex", "vgg", "squeeze"] = "vgg",
        inception_weights: str | None = None,
        resize: ResizeName = "tf1",
        allow_few: bool = False,
        most_broken: float = 0.01,
        workers: int | None = None,
        device: str = "auto",
    ) -> None:
        if not 0 <= most_broken < 1:
            raise ValueError(f"--most-broken: expected a share from 0 to below 1, got {most_broken}")
        self.folder, self.size, self.most_broken = tokenizer, parse_size(size), most_broken
        self.loading = Loading(workers=workers, device=device)
        self.lpips = None if lpips_weights is None else LPIPS(lpips_weights, lpips_network).to(self.loading.place)
        self.options = SetOptions(allow_few=allow_few)
        self.family: Family | None = None
        if inception_weights is not None:
            features = make_features("inception", checked_weights("inception", inception_weights), resize)
            self.family = Family(features, ("frechet",))
        self.images_sha256 = ""
        self.broken: list[str] = []
        self._items: list[Item] = []
        self._set: SetScores | None = None

    def items(self) -> Sequence[Item]:
        """An image an item, once a folder was measured."""
        return self._items

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Never: `measure` scores a reconstruction beside its original."""
        raise ValueError(f"{self.name}: expected --images with originals, got answers of a model")

    def spec(self) -> dict[str, Any]:
        """Sizes, how each number is made, and which images there were."""
        return {
            "size": "own" if self.size is None else list(self.size),
            "images_sha256": self.images_sha256,
            "psnr": "8 bit, mean over images",
            "ssim": "torchmetrics, data_range 1, gaussian 11, sigma 1.5, edges mirrored",
            "lpips": None if self.lpips is None else self.lpips.spec(),
            "rfid": None if self._set is None else dict(self._set.spec),
            "most_broken": self.most_broken,
            "broken": len(self.broken),
        }

    def measure(self, images: Path, out: Path, batch: int, weights: str = "ema") -> Summary:
        """Reconstruct every image of a folder, score it and write the results.

        Raises:
            ValueError: no image, too many broken ones, images too small for what is measured.
        """
        for folder in PICTURES:
            if (out / folder).exists():
                raise ValueError(f"--out: {out} holds the {folder} of another evaluation; take another folder")
        place = self.loading.place
        tokenizer = load_tokenizer(self.folder, weights).to(place)
        if self.size is None and tokenizer.layout.kind == "sequence":  # it has one size
            self.size = tokenizer.layout.image
        if self.size is not None:  # or every image would be a broken one
            try:
                tokenizer.layout.grid(*self.size)
            except ValueError as error:
                raise ValueError(f"--size: {error}") from error
        paths = image_paths(images)
        self.images_sha256 = listing_sha256(paths, images)
        rows, tally = [], Tally(tokenizer.layout, tokenizer.end)
        try:
            with tqdm(total=len(paths), desc="images", unit="image", leave=False, disable=None) as bar:
                for numbers, group in self._read(paths, images, tokenizer, batch):
                    originals = [pixels.to(place) for pixels in group]
                    made, tokens = reconstruct(tokenizer, originals)
                    tally.add(tokens, sum(pixels[0].numel() for pixels in group))
                    for number, x, y in zip(numbers, originals, made, strict=True):
                        rows.append(self._row(number, paths[number].relative_to(images).as_posix(), x, y, out))
                    bar.update(len(group))
        except ValueError:  # so that the same command can be given again once the images are mended
            for folder in PICTURES:
                shutil.rmtree(out / folder, ignore_errors=True)
            raise
        self._items = [Item(row["id"], "images", Document(())) for row in rows]
        measures: dict[str, float] = {name: _mean(rows, name) for name in ("psnr", "ssim", "lpips") if name in rows[0]}
        measures |= {**self._rfid(out), **tally.measures(), "broken": float(len(self.broken))}
        if self.broken:
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.broken)
            write_atomically(out / "broken.jsonl", lines.encode())
        made_by = {"model": model_record(self.folder, weights), "sampling": None, "seed": None}
        return report(self, rows, out, out, made_by, measures)

    def _read(
        self, paths: Sequence[Path], root: Path, tokenizer: ImageTokenizer, batch: int
    ) -> Iterator[tuple[list[int], list[UInt8[Tensor, "3 _ _"]]]]:
        """Numbers and pixels of what could be read and has tokens, some at a time."""
        loader = DataLoader(
            ImageFiles(paths, Fitted(self.size, tokenizer.layout.stride)),
            batch_size=batch,
            num_workers=min(self.loading.processes, len(paths)),
            collate_fn=list,
        )
        most = math.floor(self.most_broken * len(paths))
        for start, found in zip(range(0, len(paths), batch), loader, strict=True):
            # Here and not in a worker, which would need a copy of the tokenizer.
            checked = [checked_image(tokenizer, paths[start + i], one) for i, one in enumerate(found)]
            self.broken += [what for what in checked if isinstance(what, str)]
            if len(self.broken) > most:
                raise ValueError(
                    f"--images: expected at most {most} of {len(paths)} in {root} to be unreadable or refused by the "
                    f"tokenizer (--most-broken {self.most_broken}), got {len(self.broken)}: {self.broken[-1]}"
                )
            whole = [(start + i, one) for i, one in enumerate(checked) if not isinstance(one, str)]
            if whole:
                yield [number for number, _ in whole], [one for _, one in whole]

    def _row(self, number: int, name: str, x: UInt8[Tensor, "3 H W"], y: UInt8[Tensor, "3 H W"], out: Path) -> Row:
        files = [f"{folder}/{number:06d}.png" for folder in PICTURES]
        for file, image in zip(files, (x, y), strict=True):
            array = image.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
            write_atomically(out / file, png_bytes(Image.fromarray(array)))
        similar = structural_similarity(x, y)
        found = {"psnr": peak_signal_to_noise(x, y), "ssim": similar}
        if self.lpips is not None:
            one, other = (image[None].float() / 127.5 - 1 for image in (x, y))
            with torch.no_grad():
                found["lpips"] = float(self.lpips(one, other))
        # Structures that are inverted make SSIM negative; a score is a share.
        return {
            "id": f"{number:06d}", "sample": 0, "task": "images", "score": min(max(similar, 0.0), 1.0), "asked": name,
            "reason": "  ".join(f"{key} {value:.3f}" for key, value in found.items()), "files": files, **found,
        }  # fmt: skip

    def _rfid(self, out: Path) -> dict[str, float]:
        """Inception's Frechet distance between originals and reconstructions, as the files hold them."""
        if self.family is None:
            return {}
        made = [out / "reconstructions" / f"{item.id}.png" for item in self._items]
        self._set = score_folder(
            made, [self.family], out / "originals", root=out, options=self.options, loading=self.loading
        )
        return {name.replace("fid", "rfid", 1): value for name, value in self._set.measures.items()}


@dataclass
class Fitted:
    """An image as a tokenizer takes it: of one size, or its own, cropped in the middle to multiples of the stride."""

    size: tuple[int, int] | None  # (height, width)
    stride: int

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """ValueError where nothing is left."""
        own = image.height // self.stride * self.stride, image.width // self.stride * self.stride
        if self.size is None and 0 in own:
            raise ValueError(f"image: expected at least the stride's {self.stride} pixels a side, got {image.size}")
        size = self.size or own
        if self.size is None:  # cropped, never scaled
            left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
            image = image.crop((left, top, left + size[1], top + size[0]))
        return torch.from_numpy(fit_image(image, [size]).copy()).permute(2, 0, 1).contiguous()  # (3, H, W)


def checked_image(tokenizer: ImageTokenizer, path: Path, image: UInt8[Tensor, "3 _ _"] | str) -> Tensor | str:
    """The image, or what is wrong with it and with which file: it could not be read, or has no tokens."""
    if isinstance(image, Tensor):
        try:
            tokenizer.check_image(as_input(image))
        except ValueError as error:
            image = str(error)
    return image if isinstance(image, Tensor) or path.name in image else f"{path}: {image}"


def as_input(image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """8 bits as a tokenizer takes them."""
    return to_tensor([image.permute(1, 2, 0).cpu().numpy()])[0].to(image.device)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--size: expected WIDTHxHEIGHT such as 256x256, got {text}")
    return int(height), int(width)


@torch.no_grad()
def reconstruct(
    tokenizer: ImageTokenizer, images: Sequence[UInt8[Tensor, "3 _ _"]]
) -> tuple[list[UInt8[Tensor, "3 _ _"]], ImageTokens]:
    """8-bit images through the tokenizer and back to 8 bits, and the tokens between."""
    tokens = tokenizer.encode_each([as_input(image) for image in images])
    made = [((y.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) for y in tokenizer.decode_each(tokens)]
    return made, tokens


def peak_signal_to_noise(x: UInt8[Tensor, "3 H W"], y: UInt8[Tensor, "3 H W"]) -> float:
    """10 log10(255^2 / mean |x - y|^2) in dB; `BEST_PSNR` where nothing differs."""
    error = float((x.double() - y.double()).square().mean())
    return min(10 * math.log10(255**2 / error), BEST_PSNR) if error else BEST_PSNR


def structural_similarity(x: UInt8[Tensor, "3 H W"], y: UInt8[Tensor, "3 H W"]) -> float:
    """SSIM (Wang et al. 2004, eq. 13), mean over pixels and channels; ValueError for images too small for its window."""
    side = min(x.shape[1:])
    if side < SMALLEST:
        raise ValueError(f"ssim: expected images of at least {SMALLEST} pixels a side, got {side}")
    found = ssim(y[None].float() / 255, x[None].float() / 255, data_range=1.0)
    assert isinstance(found, Tensor)
    return float(found)


@dataclass
class Tally:
    """What a set of images came to in tokens."""

    layout: TokenLayout
    end: int | None = None  # the tokenizer's: what stands behind it is not counted
    tokens: int = 0
    pixels: int = 0
    counts: list[Tensor] = field(default_factory=list)  # of each codebook, (K,)

    def add(self, tokens: ImageTokens, pixels: int) -> None:
        """The tokens of images of so many pixels."""
        values = (tokens if self.end is None else tokens.until(self.end)).values.cpu()
        self.tokens, self.pixels = self.tokens + len(values), self.pixels + pixels
        books = self.layout.codebooks
        if not books or max(books) > MOST_COUNTED:
            return
        self.counts = self.counts or [torch.zeros(entries, dtype=torch.int64) for entries in books]
        for count, ids in zip(self.counts, values.view(-1, len(books)).unbind(1), strict=True):
            count += torch.bincount(ids, minlength=len(count))

    def measures(self) -> Mapping[str, float]:
        """Bits a pixel, or numbers a pixel of a continuous tokenizer; of each codebook, usage and perplexity."""
        rate = self.tokens / self.pixels
        if not self.layout.codebooks:
            return {"numbers_per_pixel": rate * self.layout.dim}
        found = {"bits_per_pixel": rate * bits_per_token(self.layout)}
        for q, count in enumerate(self.counts):
            ending = f"_{q}" if len(self.counts) > 1 else ""
            found[f"codebook_usage{ending}"] = float(codebook_usage(count))
            found[f"codebook_perplexity{ending}"] = float(codebook_perplexity(count))
        return found


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
