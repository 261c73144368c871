"""Whole images from tiles: overlapping windows, blended strip by strip in bounded memory."""

import math

import torch

from diffaugkit.image_rows import to_unit
from diffaugkit.runtime import progress_bar
from diffaugkit.segmentation_data import cut, tile_starts

__all__ = ["blending_window", "predict_strips"]

# Pixels that are read at once: files lie in tiles, and of those that a strip cuts the next strip
# decodes the rest again.
_READ_PIXELS = 2**23


def blending_window(tile, stride, kind="hann"):
    """Weights of a tile's pixels, 1 in the middle and falling to the borders where tiles overlap.

    Where two tiles of one row overlap their weights sum to 1. The middle is the prediction of one
    tile alone as long as tiles overlap by less than half.

    Parameters
    ----------
    tile, stride : tuple of (int, int)
        Height and width of a tile, and the distances of tiles.
    kind : {"hann", "linear"}, default="hann"
        Form of the slope.

    Returns
    -------
    Tensor of shape (height, width), float32
        Above 0 everywhere.

    Examples
    --------
    >>> blending_window((1, 4), (1, 2), "linear").tolist()
    [[0.25, 0.75, 0.75, 0.25]]
    """
    sides = []
    for length, step in zip(tile, stride, strict=True):
        up = ((torch.arange(length) + 0.5) / max(length - step, 0.5)).clamp(max=1)
        if kind == "hann":
            up = torch.sin(up * (math.pi / 2)).square()
        sides.append(torch.minimum(up, up.flip(0)))
    return sides[0][:, None] * sides[1]


def predict_strips(
    images, predict, *, tile, stride, window="hann", batch_size=8, lattice=1, verbose=0
):
    """Predict images of any size by tiles, and give back strips of rows as they are finished.

    Only the strip that is being worked on is in memory. Tiles go through the network in batches of
    one size, so that no image depends on the images beside it.

    Parameters
    ----------
    images : ImageList
        The images.
    predict : callable
        ``predict(x) -> Tensor (B, K, h, w)``, probabilities on the CPU, for tiles x (B, C, h, w) in
        [-1, 1].
    tile, stride : tuple of (int, int)
        Height and width of a tile, and the distances of tiles. Smaller images are mirrored.
    window : {"hann", "linear"}, default="hann"
        How tiles blend.
    batch_size : int, default=8
        Tiles of a batch.
    lattice : int, default=1
        The last tiles, which end at the border, begin at a multiple of this many pixels, and stick
        out by what is missing, mirrored.
    verbose : int, default=0
        Above 0 shows a progress bar.

    Yields
    ------
    number : int
        The image.
    rows : slice
        The rows of the image.
    probabilities : Tensor of shape (K, n_rows, W), float32
    """
    weight = blending_window(tile, stride, window)
    waiting, strips = [], {}

    def run():
        x = torch.stack([part for *_, part in waiting])
        missing = batch_size - len(x)
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
        for (number, top, left, _), found in zip(waiting, predict(x), strict=False):
            if number not in strips:
                for last in list(strips):
                    yield from _numbered(last, strips.pop(last).rest())
                strips[number] = _Strip(images.size(number), weight, lattice)
            yield from _numbered(number, strips[number].add(found, top, left))
        bar.update(len(waiting))
        waiting.clear()

    grids = [_grid(images.size(number), tile, stride, lattice) for number in range(len(images))]
    n_tiles = sum(len(tops) * len(lefts) for tops, lefts in grids)
    with progress_bar(verbose, n_tiles, "prediction", "tile", leave=False) as bar:
        for number, (tops, lefts) in enumerate(grids):
            scale = images.pixel_range(number)
            for top, rows in _read_strips(images, number, tops, tile[0]):
                for left in lefts:
                    part = torch.from_numpy(cut(rows, 0, left, tile).copy())
                    waiting.append((number, top, left, to_unit(part, scale)))
                    if len(waiting) == batch_size:
                        yield from run()
        if waiting:
            yield from run()
    for number, strip in strips.items():
        yield from _numbered(number, strip.rest())


def _grid(size, tile, stride, lattice):
    """Where tiles begin, down and across."""
    sides = [_whole(*s, lattice) for s in zip(size, tile, strict=True)]
    return [tile_starts(*s) for s in zip(sides, tile, stride, strict=True)]


def _read_strips(images, number, tops, height):
    """Yield the pixels (C, height, W) from each of the tops on, fewer at the border."""
    full, width = images.size(number)
    n_rows = max(height, _READ_PIXELS // width)
    start = end = 0
    for top in tops:
        if min(top + height, full) > end:
            start, end = top, min(top + n_rows, full)
            rows = images.region(number, start, 0, end - start, width)
        yield top, rows[:, top - start : top - start + height]


def _whole(side, tile, lattice):
    """Side of an image with what the last tile sticks out by."""
    return tile + max(0, -(-(side - tile) // lattice) * lattice)


def _numbered(number, found):
    return ((number, *part) for part in found)


class _Strip:
    """Weighted sums of the rows of one image that tiles can still reach."""

    def __init__(self, size, weight, lattice):
        self.size, self.weight, self.top = size, weight, 0
        self.full = _whole(size[1], weight.shape[1], lattice)
        self.sums = self.weights = None

    def add(self, found, top, left):
        """Add a tile (K, h, w); yield the rows above it, which are finished."""
        height, width = self.weight.shape
        if self.sums is None:
            self.sums = torch.zeros(len(found), height, self.full)
            self.weights = torch.zeros(height, self.full)
        if top > self.top:
            yield from self._finish(top - self.top)
        self.sums[:, :, left : left + width] += found * self.weight
        self.weights[:, left : left + width] += self.weight

    def rest(self):
        """Yield the last rows."""
        yield from self._finish(self.size[0] - self.top)

    def _finish(self, n_rows):
        rows, width = slice(self.top, self.top + n_rows), self.size[1]
        yield rows, self.sums[:, :n_rows, :width] / self.weights[:n_rows, :width]
        for table in (self.sums, self.weights):
            kept = table[..., n_rows:, :].clone()
            table.zero_()
            table[..., : kept.shape[-2], :] = kept
        self.top += n_rows
