"""Images of several sizes with their masks, patches of them, and how patches are changed.

The gate knows sets of one size; a segmenter takes images of any. Here they become a list, each one
read as a whole or in part, and patches at a regular distance become Rows, which the loop shuffles:
random patches with a stride. Functions on batches draw from torch's generators, per sample.
"""

import copy
import os

import numpy as np
import torch

from diffaugkit.augmentations import recolor
from diffaugkit.image_files import (
    _n_frames,
    _pillow,
    _refuse_frames,
    _refuse_other_bytes,
    _unreadable,
)
from diffaugkit.image_rows import BYTES, ImageRows
from diffaugkit.rows import Rows
from diffaugkit.slides import SlideRows

__all__ = [
    "IGNORED",
    "ImageList",
    "PatchRows",
    "erase_boxes",
    "read_masks",
    "swap_cells",
    "tile_starts",
    "vary_pairs",
]

# Code of a pixel without a label, in masks of bytes.
IGNORED = 255
# Decoded files that a fit keeps in memory, in values; beyond, each patch decodes its image.
_KEPT_VALUES = 2**31


class ImageList:
    """Images that may differ in size, in the order of the caller.

    Parameters
    ----------
    parts : list of Rows of shape (n, C, H, W)
        Each of images of one size.
    pixel_ranges : list of (low, high)
        Black and white of each part.
    """

    def __init__(self, parts, pixel_ranges):
        self._parts, self._ranges = parts, pixel_ranges
        self._places = [(at, row) for at, part in enumerate(parts) for row in range(len(part))]
        self._last = None, None

    def __len__(self):
        """Count the images."""
        return len(self._places)

    def take(self, numbers):
        """Select images, which are numbered anew; their common range stays that of all."""
        some = copy.copy(self)
        some._places, some._last = [self._places[number] for number in numbers], (None, None)
        return some

    def size(self, number):
        """Height and width of an image."""
        return self._parts[self._places[number][0]].shape[2:]

    def pixel_range(self, number):
        """Values of black and white of an image."""
        return self._ranges[self._places[number][0]]

    @property
    def n_channels(self):
        """Channels, the same of all images."""
        return self._parts[0].shape[1]

    @property
    def dtype(self):
        """Bytes where all images are of bytes, else float32."""
        return np.result_type(*{part.dtype for part in self._parts})

    @property
    def layout(self):
        """How the images lie; see `Rows`."""
        return self._parts[0].layout

    def read(self, number):
        """Pixels (C, H, W) of an image: a view where they lie in memory, so never write to it."""
        part, row = self._places[number]
        rows = self._parts[part]
        if rows.resident:
            return rows.tensor[row].numpy()
        if self._last[0] != number:
            self._last = number, rows.block([row])[0]
        return self._last[1]

    def region(self, number, top, left, height, width):
        """Pixels of a box (C, height, width), or of what of it lies inside; as from `read`.

        Of a slide nothing else is read.
        """
        part = self._places[number][0]
        rows = self._parts[part]
        if not isinstance(rows, SlideRows):
            return self.read(number)[:, top : top + height, left : left + width]
        height, width = min(height, rows.shape[2] - top), min(width, rows.shape[3] - left)
        try:
            return rows.region(top, left, height, width)
        except Exception as error:  # a broken file can raise anything
            raise _unreadable(f"the slide in row {part}", error) from error

    def loaded(self):
        """Decode what lies in files, if it fits: patches are read many times."""
        if all(part.resident for part in self._parts):
            return self
        if sum(len(part) * part.n_features for part in self._parts) > _KEPT_VALUES:
            return self
        some = copy.copy(self)
        some._parts = [
            part if part.resident else ImageRows.like(part, np.asarray(part))
            for part in self._parts
        ]
        return some

    def common_range(self):
        """Give the one pixel range of all images, (low, high).

        Raises
        ------
        ValueError
            If some are integers of one type and others of another, or floats.
        """
        found = set(map(tuple, self._ranges))
        if len(found) == 1:
            return found.pop()
        if any(isinstance(high, int) for _, high in found):
            raise ValueError(
                f"X mixes images with pixels in {' and '.join(map(str, sorted(found)))}: give all "
                "in one type."
            )
        low, high = min(low for low, _ in found), max(high for _, high in found)
        if 0 <= low and high <= 1:
            return 0.0, 1.0
        return (-1.0, 1.0) if -1 <= low and high <= 1 else (low, high)


def read_masks(masks, images):
    """Read masks of any container as integer arrays of the size of their images.

    Parameters
    ----------
    masks : array-like of shape (n, H, W), (n, H * W) or (n,), or list of arrays, pictures or paths
        Labels of pixels; one more axis of length 1, for the channel, is dropped. Lists may hold
        masks of several sizes.
    images : ImageList
        Whose sizes they must have.

    Returns
    -------
    list of ndarray of shape (H, W)
        Integers or bools.

    Raises
    ------
    ValueError
        For masks of another number or size than the images, values that are not whole numbers,
        bool masks beside labels above 1, files that cannot be read, JPEG files, or files of several
        frames or pages; the message names the row.
    """
    if hasattr(masks, "detach"):
        masks = masks.detach().cpu().numpy()
    if hasattr(masks, "to_numpy"):
        masks = masks.to_numpy()
    if isinstance(masks, str | os.PathLike):
        raise ValueError(f"masks={str(masks)!r}: give a list of the paths, aligned with X.")
    if len(masks) != len(images):
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: X has {len(images)} "
            f"images, but masks has {len(masks)}: one each."
        )
    found = [_read_mask(mask, images.size(row), row) for row, mask in enumerate(masks)]
    bools = [row for row, mask in enumerate(found) if mask.dtype == bool]
    for row, mask in enumerate(found if bools else ()):
        # Files of 1 bit beside files of 8 bits: True is label 1, and 255 would be another class.
        if mask.dtype != bool and mask.max(initial=0) > 1:
            raise ValueError(
                f"The mask in row {bools[0]} is of bools (1 bit), but that in row {row} holds "
                f"label {mask.max()}: True would be label 1. Save all masks in one form, or give "
                "arrays: [mask > 0 for mask in masks] for object and background."
            )
    return found


def _read_mask(mask, size, row):
    if isinstance(mask, str | bytes | os.PathLike):
        file = os.fsdecode(mask)
        try:
            picture = _pillow().open(file)
        except Exception as error:  # a broken file can raise anything
            raise _unreadable(f"the mask in row {row}, {file},", error) from error
        with picture:
            return _read_mask(picture, size, row)
    if hasattr(mask, "getbands"):
        file = getattr(mask, "filename", "")
        name = f"the mask in row {row}" + (f", {file}," if file else "")
        _refuse_other_bytes(mask, name)
        try:
            n_frames = _n_frames(mask)
            mask.load()
        except Exception as error:
            raise _unreadable(name, error) from error
        _refuse_frames(n_frames, name, "an array (h, w) of labels for each image")
        # A TIFF may hold JPEG inside.
        inside = mask.info.get("compression")
        if getattr(mask, "format", None) == "JPEG" or inside in ("jpeg", "tiff_jpeg"):
            raise ValueError(
                f"{name[0].upper()}{name[1:]} is a JPEG, whose compression changes labels: save "
                "masks as PNG or TIFF."
            )
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy()
    mask = np.asarray(mask)
    if mask.ndim == 3 and 1 in (mask.shape[2], mask.shape[0]):  # as images have it, or as tensors
        mask = mask.squeeze(axis=2 if mask.shape[2] == 1 else 0)
    if mask.ndim < 2 and mask.size == size[0] * size[1]:
        mask = mask.reshape(size)
    if mask.shape != tuple(size):
        raise ValueError(
            f"The mask in row {row} has shape {mask.shape}, but its image is {size[0]} x {size[1]} "
            "pixels: masks hold one label per pixel."
        )
    if mask.dtype.kind == "O":
        try:
            mask = mask.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Unknown label type: the mask in row {row} holds values that are no numbers "
                f"({error})."
            ) from error
    if mask.dtype.kind not in "biuf":
        raise ValueError(
            f"Unknown label type: the mask in row {row} has dtype {mask.dtype}; labels are whole "
            "numbers."
        )
    if mask.dtype.kind == "f":
        whole = np.rint(mask)
        if not np.array_equal(whole, mask) or float(np.abs(mask).max(initial=0)) > 2**53:
            raise ValueError(
                f"Unknown label type: the mask in row {row} holds NaN, infinity or fractions; "
                "labels are whole numbers."
            )
        mask = whole.astype(np.int64)
    return mask


class PatchRows(Rows):
    """Patches of images at regular distances, as Rows; images may differ in size.

    The last patch of a row ends at the border. Images smaller than a patch are mirrored at the
    bottom and on the right; of masks such pixels have no label.

    Parameters
    ----------
    images : ImageList or list of ndarray (H, W) uint8
        Images, or masks.
    numbers : sequence of int
        Which of them to cut.
    patch : tuple of (int, int)
        Height and width.
    stride : tuple of (int, int)
        Distances down and right.

    Examples
    --------
    >>> import numpy as np
    >>> rows = PatchRows([np.zeros((10, 6), np.uint8)], [0], patch=(4, 4), stride=(4, 4))
    >>> rows.shape, rows.places.tolist()
    ((6, 1, 4, 4), [[0, 0, 0], [0, 0, 2], [0, 4, 0], [0, 4, 2], [0, 6, 0], [0, 6, 2]])
    """

    def __init__(self, images, numbers, patch, stride):
        self._images, self._patch = images, patch
        self._is_mask = not isinstance(images, ImageList)
        places = []
        for number in numbers:
            size = images[number].shape if self._is_mask else images.size(number)
            starts = [tile_starts(*sizes) for sizes in zip(size, patch, stride, strict=True)]
            places += [(number, top, left) for top in starts[0] for left in starts[1]]
        self.places = np.array(places, dtype=np.int64)
        channels = 1 if self._is_mask else images.n_channels
        super().__init__((len(places), channels, *patch))
        if self._is_mask:
            self.dtype, self.pixel_range = np.dtype(np.uint8), BYTES
        else:
            self.layout, self.pixel_range = images.layout, images.common_range()
            self.dtype = images.dtype

    def _read(self, index):
        out = np.empty((*self.places[index].shape[:1], *self.shape[1:]), self.dtype)
        for at, (number, top, left) in enumerate(self.places[index]):
            if self._is_mask:
                out[at] = cut(self._images[number][None], top, left, self._patch, IGNORED)
            else:
                found = self._images.region(number, top, left, *self._patch)
                out[at] = cut(found, 0, 0, self._patch)
        return out


def cut(image, top, left, patch, fill=None):
    """Cut a patch (C, h, w) from an image (C, H, W); beyond the border mirrored, or filled."""
    found = image[:, top : top + patch[0], left : left + patch[1]]
    missing = [(0, 0), *((0, p - f) for p, f in zip(patch, found.shape[1:], strict=True))]
    if not any(after for _, after in missing):
        return found
    if fill is None:
        return np.pad(found, missing, mode="symmetric")
    return np.pad(found, missing, constant_values=fill)


def tile_starts(size, tile, stride):
    """First positions of tiles that cover 0 to size - 1; the last one ends at the border.

    Examples
    --------
    >>> tile_starts(10, 4, 3), tile_starts(11, 4, 3), tile_starts(3, 4, 3)
    ([0, 3, 6], [0, 3, 6, 7], [0])
    """
    if size <= tile:
        return [0]
    starts = list(range(0, size - tile, stride))
    return [*starts, size - tile]


# ---- batches -------------------------------------------------------------------------------------


def vary_pairs(images, masks, recipe=None, *, color=True):
    """Flip and turn images with their masks, and change the colours of the images, per sample.

    The paper's recipe: each flip for half of the samples; for 30 % brightness (factor 0.5 to 1.5)
    and contrast (0.6 to 1.4); for 30 % a 3 x 3 Gaussian blur of sigma 1 to 2.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)
        In [-1, 1].
    masks : Tensor of shape (B, 1, H, W)
        Moved with the images, never blended.
    recipe : ImageRecipe or None, default=None
        None is the paper's. Of any other the flips, quarter turns and colours hold, those of local
        crops; patches are crops already.
    color : bool, default=True
        Whether colours change too.

    Returns
    -------
    images, masks : Tensor
    """
    flips = (0.5, 0.5) if recipe is None else (recipe.vertical_flip, recipe.flip)
    flipped = [_draw(images) < share for share in flips]
    if recipe is not None and recipe.quarter_turns:
        square = images.shape[2] == images.shape[3]
        turns = (_draw(images) * 4).long() if square else 2 * (_draw(images) * 2).long()
        # A quarter turn is a transposition and a flip.
        swapped = turns % 2 == 1
        if square:
            images = torch.where(swapped, images.transpose(2, 3), images)
            masks = torch.where(swapped, masks.transpose(2, 3), masks)
        flipped = [flipped[0] ^ (turns >= 2), flipped[1] ^ ((turns == 1) | (turns == 2))]
    for axis, which in zip((2, 3), flipped, strict=True):
        images = torch.where(which, images.flip(axis), images)
        masks = torch.where(which, masks.flip(axis), masks)
    if not color:
        return images, masks
    if recipe is not None:
        return recolor(images, recipe, 2), masks
    unit = (images + 1) / 2
    bright = (unit * (0.5 + _draw(unit))).clamp(0, 1)
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    changed = (mean + (bright - mean) * (0.6 + 0.8 * _draw(unit))).clamp(0, 1)
    unit = torch.where(_draw(unit) < 0.3, changed, unit)
    beside = torch.exp(-0.5 / (1 + _draw(unit)).square())
    blurred = unit
    for axis in (2, 3):
        before = torch.cat([blurred.narrow(axis, 0, 1), blurred], axis).narrow(
            axis, 0, blurred.shape[axis]
        )
        after = torch.cat([blurred, blurred.narrow(axis, -1, 1)], axis).narrow(
            axis, 1, blurred.shape[axis]
        )
        blurred = (blurred + beside * (before + after)) / (1 + 2 * beside)
    return torch.where(_draw(unit) < 0.3, blurred, unit) * 2 - 1, masks


def erase_boxes(images, n_boxes=4):
    """Erase boxes of a quarter of the sides, for inpainting (Pathak et al. 2016).

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)
        In [-1, 1].
    n_boxes : int, default=4
        Boxes per image; they may overlap.

    Returns
    -------
    erased : Tensor of shape (B, C, H, W)
        0, the middle grey, inside the boxes.
    holes : Tensor of shape (B, 1, H, W), bool
    """
    n, _, height, width = images.shape
    inside = []
    for side in (height, width):
        box = max(1, side // 4)
        start = torch.randint(side - box + 1, (n, n_boxes, 1), device=images.device)
        at = torch.arange(side, device=images.device)
        inside.append((at >= start) & (at < start + box))  # (B, boxes, side)
    holes = (inside[0][..., None] & inside[1][:, :, None]).any(dim=1)[:, None]
    return images.masked_fill(holes, 0), holes


def swap_cells(images):
    """Exchange pairs of small cells, for context restoration (Chen et al. 2019).

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)

    Returns
    -------
    Tensor of shape (B, C, H, W)
        A quarter of the cells of a grid, whose side is an eighth of the image's, have changed
        places with another. What the grid does not cover stays.
    """
    n, channels, height, width = images.shape
    side = max(1, min(height, width) // 8)
    rows, columns = height // side, width // side
    cells = images[:, :, : rows * side, : columns * side]
    cells = cells.reshape(n, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    cells = cells.flatten(1, 2)
    pairs = rows * columns // 8
    order = torch.rand(n, rows * columns, device=images.device).argsort(dim=1)
    one, other = order[:, :pairs], order[:, pairs : 2 * pairs]
    source = torch.arange(rows * columns, device=images.device).repeat(n, 1)
    source = source.scatter(1, one, other).scatter(1, other, one)
    swapped = cells[torch.arange(n, device=images.device)[:, None], source]
    swapped = swapped.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    out = images.clone()
    out[:, :, : rows * side, : columns * side] = swapped.reshape(
        n, channels, rows * side, columns * side
    )
    return out


def _draw(images):
    """Draw one number per sample in [0, 1), to broadcast."""
    return torch.rand(len(images), 1, 1, 1, device=images.device)
