"""The bytes of a JPEG as tokens: nothing is learned (JPEG-LM, arXiv 2408.08459).

Quality and colour sampling are fixed, and so are Pillow's Huffman tables: all images of one size have the same header, which
is left out. Of the scan itself the zero byte behind every 255 is left out, which only tells it from a marker. Any bytes then
are a scan: what a model draws always decodes, however wrong.

Letters: B images, H height, W width (pixels); N tokens of an image, n those of a prefix, T of all images end to end; D = 9.
"""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from torch import Tensor

from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout
from unimodal_tokenizers.quantizers.base import check_ids

END = 256
"""The id that fills up what an image needs fewer bytes than: it is no byte."""
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


class CodecTokenizer(ImageTokenizer):
    """An image as the bytes of its JPEG, then `END` up to N ids. Any prefix decodes: what is missing of the scan is grey."""

    end = END

    def __init__(self, image: tuple[int, int], length: int, quality: int = 25, colours: Literal[1, 3] = 3) -> None:
        """Args:

        image: (height, width) in pixels of every image.
        length: ids of an image, N. An image whose JPEG has more bytes is refused: `unimodal tokenize` leaves it out, and
            training from pixels ends with it.
        quality: of the JPEG, from 1 to 95.
        colours: 3 (YCbCr 4:2:0), or 1 for data that is grey.
        """
        super().__init__()
        if min(image) < 1:
            raise ValueError(f"image: expected a height and width of at least 1 pixel, got {list(image)}")
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if not 1 <= quality <= 95:
            raise ValueError(f"quality: expected from 1 to 95, got {quality}")
        if colours not in (1, 3):
            raise ValueError(f"colours: expected 1 or 3, got {colours}")
        h, w = image
        self.quality, self.mode = quality, "L" if colours == 1 else "RGB"
        self.layout = TokenLayout("sequence", dim=9, stride=1, codebooks=(END + 1,), length=length, image=(h, w))
        file = self._file(Image.new(self.mode, (w, h)))
        start = file.index(START_OF_SCAN) + 2
        self.header = file[: start + int.from_bytes(file[start : start + 2], "big")]  # which says its own length

    def extra_repr(self) -> str:
        """What the header follows from; there are no weights."""
        return f"quality={self.quality}, mode={self.mode}"

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Int64[Tensor, "B N"]:
        """Images `(B, 3, H, W)` in [-1, 1] (clamped) to ids; `rng` is not used.

        Raises:
            ValueError: images of another size, or whose JPEG has more than N bytes.
        """
        self.layout.grid(*images.shape[-2:])
        rows = [self._ids(image) for image in images]
        return torch.stack(rows).to(images.device) if rows else images.new_empty(0, self.layout.length).long()

    def check_image(self, image: Float[Tensor, "3 H W"]) -> None:
        """Nothing, if the image has tokens.

        Raises:
            ValueError: an image of another size, or whose JPEG has more than N bytes.
        """
        super().check_image(image)
        self._ids(image)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Ids, or a prefix of them, to images in [-1, 1]; `rngs` are not used.

        Raises:
            ValueError: ids that are none, or not as many as the grid has.
        """
        if tokens.dim() != 2 or grid != Grid(1, tokens.shape[1]) or tokens.shape[1] > self.layout.length:
            expected = f"(B, n) with n up to {self.layout.length}"
            raise ValueError(f"tokens: expected ids {expected}, got shape {tuple(tokens.shape)} of {grid}")
        rows = tokens.cpu()
        self._check(rows)
        pixels = [self._pixels(row) for row in rows.numpy()]
        h, w = self.layout.image
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, h, w, 3)
        return stacked.to(tokens.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, 3) -> (B, 3, H, W)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)` to their nine bits as -1 and 1, the highest first: it says that the image has ended.

        Raises:
            ValueError: ids that are none.
        """
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected ids (T,), got shape {tuple(tokens.shape)}")
        self._check(tokens)
        bits = torch.arange(8, -1, -1, device=tokens.device)
        return (tokens[:, None] >> bits & 1).float() * 2 - 1  # (T, 9)

    def _check(self, tokens: Shaped[Tensor, "*T"]) -> None:
        if tokens.dtype != torch.int64:
            raise ValueError(f"tokens: expected integer ids, got {tokens.dtype}")
        check_ids(tokens, END + 1)

    def _file(self, image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality, subsampling="4:2:0", optimize=False, progressive=False)
        return file.getvalue()

    def _ids(self, image: Float[Tensor, "3 H W"]) -> Int64[Tensor, " N"]:
        pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        file = self._file(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).convert(self.mode))  # (H, W, 3)
        scan = file[len(self.header) : -len(END_OF_IMAGE)].replace(b"\xff\x00", b"\xff")
        if len(scan) > self.layout.length:
            raise ValueError(
                f"length: expected as many ids as a JPEG of quality {self.quality} has bytes, here {len(scan)}, "
                f"got {self.layout.length}"
            )
        ids = torch.full((self.layout.length,), END, dtype=torch.int64)
        ids[: len(scan)] = torch.tensor(list(scan), dtype=torch.int64)
        return ids

    def _pixels(self, ids: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, "H W 3"]:
        ends = np.flatnonzero(ids == END)
        scan = bytes(ids[: ends[0] if len(ends) else None].astype(np.uint8))
        if not scan:  # of which libjpeg makes a pattern
            return np.full((*self.layout.image, 3), 128, dtype=np.uint8)
        file = self.header + scan.replace(b"\xff", b"\xff\x00") + END_OF_IMAGE
        return np.array(Image.open(io.BytesIO(file)).convert("RGB"))
