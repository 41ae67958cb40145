"""Which sizes images may have: buckets of one area and many shapes, and native sizes under a cap of tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeSizes:
    """Images keep their own size and shape, to the nearest multiple of `stride`; the largest are scaled down (NaViT).

    Args:
        tokens: most tokens of an image, each of `stride` x `stride` pixels.
        stride: pixels of a token's side, or a multiple of it that the tokenizers of a recipe share.
    """

    tokens: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("tokens", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"sequence.native.{name}: expected at least 1, got {getattr(self, name)}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of so many is brought to."""
        scale = min(1.0, (self.tokens * self.stride**2 / (height * width)) ** 0.5)
        rows, columns = (max(1, round(side * scale / self.stride)) for side in (height, width))
        while rows * columns > self.tokens:  # rounding up, or a side that cannot be less than one
            if rows >= columns:
                rows -= 1
            else:
                columns -= 1
        return rows * self.stride, columns * self.stride


def buckets(side: int, stride: int, ratio: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (height, width) for `sequence.image_sizes`: up to the area of a square of `side`, of every shape up to `ratio`.

    Args:
        side: pixels of the square, a multiple of `stride`.
        stride: pixels that every height and width is a multiple of.
        ratio: largest quotient of the longer and the shorter side.
    """
    if stride < 1 or side < stride or side % stride:
        raise ValueError(f"side: expected a multiple of stride {stride}, got {side}")
    if ratio < 1:
        raise ValueError(f"ratio: expected at least 1, got {ratio}")
    cells = (side // stride) ** 2
    found = set()
    for rows in range(1, cells + 1):
        columns = cells // rows
        if max(rows, columns) <= ratio * min(rows, columns):
            found |= {(rows * stride, columns * stride), (columns * stride, rows * stride)}
    # The square first: it is what is drawn where nothing else is asked for.
    return sorted(found, key=lambda size: (abs(size[0] - size[1]), size))
