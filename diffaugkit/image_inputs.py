"""Which container of images X is, and on which scale its pixels are read after ``fit``."""

import os
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from diffaugkit.arrays import warn
from diffaugkit.image_files import DatasetRows, FileImageRows, ShardRows, list_images
from diffaugkit.image_rows import ImageRows
from diffaugkit.rows import Rows

__all__ = [
    "check_image_shape",
    "check_is_image",
    "is_a",
    "is_standard",
    "reading_range",
    "rows_of_images",
]

# Images that are all darker than this share of the brightest pixel of the fit were divided by it.
_LEAST_SHARE = 0.05


def is_a(X, package, name):
    """Tell whether X is an instance of a package's class, without importing the package.

    Parameters
    ----------
    X : object
        Anything.
    package, name : str
        The package and its class.

    Returns
    -------
    bool
    """
    return any(
        base.__name__ == name and base.__module__.split(".")[0] == package
        for base in type(X).__mro__
    )


def is_standard(pixel_range):
    """Tell whether the ends of a pixel range are black and white, not the values of some images."""
    return isinstance(pixel_range[1], int) or tuple(pixel_range) in ((0.0, 1.0), (-1.0, 1.0))


def rows_of_images(X, known_shape=None, known_layout=None):
    """Make Rows of any container that can only hold images.

    Parameters
    ----------
    X : object
        Anything: see :func:`~diffaugkit.data.check_X`.
    known_shape : tuple of (int, int, int) or None, default=None
        (h, w, c) of the images of ``fit``.
    known_layout : str or None, default=None
        The layout of the images of ``fit``. Arrays are channel-last; but where "channels_first" was
        fitted, an array of just that shape is what the estimator itself generated.

    Returns
    -------
    Rows of shape (n, C, H, W) or None
        None where X holds vectors.

    Raises
    ------
    ValueError
        If an image cannot be read or differs from the first, by its name or row.
    TypeError
        For a stream.
    """
    if isinstance(X, Rows):
        return X if X.is_image else None
    if isinstance(X, str | bytes | os.PathLike):
        return _images_at(_path(X))
    if hasattr(X, "getbands"):
        raise TypeError("X is one PIL image: give a list of images, [X] for one.")
    if is_a(X, "torch", "DataLoader"):
        raise TypeError("X is a DataLoader; batches are made here: give its dataset, X.dataset.")
    if is_a(X, "torch", "IterableDataset") or (hasattr(X, "__next__") and not hasattr(X, "shape")):
        raise TypeError(
            f"X is a stream ({type(X).__name__}), which has no order to come back to: give a list, "
            "a map-style Dataset, or the pattern of the shards as a str."
        )
    if _is_dataset(X):
        return DatasetRows(X)
    if is_a(X, "torch", "Tensor"):
        return _rows_of_array(X, known_shape, known_layout)
    X = _without_axis(X)
    if isinstance(X, list | tuple) or len(getattr(X, "shape", ())) == 1:
        return _rows_of_list(X, known_shape, known_layout)
    if hasattr(X, "shape") and not sp.issparse(X):
        return _rows_of_array(X, known_shape, known_layout)
    return None


def _without_axis(X):
    """Column of a table of one column that holds text or objects; anything else as it is."""
    if is_a(X, "pandas", "DataFrame") or isinstance(X, np.ndarray):
        if len(X.shape) == 2 and X.shape[1] == 1:
            column = np.asarray(X)[:, 0]
            return column if column.dtype.kind in "OUS" else X
    return X


def _rows_of_array(X, known_shape, known_layout):
    if len(X.shape) not in (3, 4):
        return None
    is_tensor = is_a(X, "torch", "Tensor")
    if is_tensor and str(X.layout) != "torch.strided":
        raise TypeError(f"X is a sparse tensor ({X.layout}); give X.to_dense().")
    first = None
    if known_layout == "channels_first" and not is_tensor:
        height, width, channels = known_shape
        shape = tuple(X.shape[1:])
        if shape == (channels, height, width) and shape != (height, width, channels):
            first = "channels_first"
    return ImageRows(X, layout=first)


def _is_dataset(X):
    """Tell a map-style Dataset: torch asks for two methods, not for its base class."""
    if is_a(X, "torch", "Dataset"):
        return True
    known = isinstance(X, list | tuple) or hasattr(X, "shape") or hasattr(X, "__array__")
    if known or not (hasattr(X, "__getitem__") and hasattr(X, "__len__") and len(X)):
        return False
    try:
        first = X[0]
    except (LookupError, TypeError):
        return False
    return _is_image(first[0] if isinstance(first, list | tuple) and first else first)


def _is_image(value):
    return hasattr(value, "getbands") or len(getattr(value, "shape", ())) in (2, 3)


def _rows_of_list(X, known_shape, known_layout):
    """Read lists and 1-D arrays: paths, shards, PIL images, or arrays to be stacked."""
    items = X if isinstance(X, list | tuple) else np.asarray(X)
    first = items[0] if len(items) else None
    if isinstance(first, tuple) and first and _is_image(first[0]):
        # Items of a torch Dataset, as cross-validation picks them: the image comes first.
        items = [item[0] for item in items]
        first = items[0]
    if isinstance(first, str | bytes | os.PathLike):
        items = [_path(item) if isinstance(item, bytes) else item for item in items]
        shards = [str(item).endswith(".tar") for item in items]
        return ShardRows(items) if all(shards) else FileImageRows(items)
    if hasattr(first, "getbands"):
        return FileImageRows(items)
    if isinstance(first, list | tuple) and first and isinstance(first[0], list | tuple):
        # Arrays as JSON has them.
        return _rows_of_array(np.asarray(items), known_shape, known_layout)
    if len(getattr(first, "shape", ())) not in (2, 3):
        return None
    shapes = [tuple(getattr(item, "shape", ())) for item in items]
    for row, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"The image in row {row} has shape {shape}, but that in row 0 has {shapes[0]}: "
                "all images must have one size and number of channels."
            )
    types = [str(item.dtype).removeprefix("torch.") for item in items]
    for row, kind in enumerate(types):
        # Stacked, bytes would be read on the scale of floats, or the other way round.
        if kind != types[0] and not kind.count("float") == types[0].count("float") == 1:
            raise ValueError(
                f"The image in row {row} is of {kind}, but that in row 0 of {types[0]}: all images "
                "must be of one type, as their scales may differ."
            )
    if hasattr(first, "detach"):
        import torch

        return _rows_of_array(torch.stack(list(items)), known_shape, known_layout)
    # One array is not stacked: it may be a memory map, of more than fits into memory.
    images = np.stack(items) if len(items) > 1 else np.asarray(first)[None]
    return _rows_of_array(images, known_shape, known_layout)


def _path(path):
    """Path as str; what a file holds is none."""
    if isinstance(path, bytes) and b"\0" in path:
        raise TypeError(
            "X holds what is in files, as bytes: give their paths, or images, as "
            "[PIL.Image.open(io.BytesIO(item)) for item in X]."
        )
    return os.fsdecode(path)


def _images_at(path):
    """Find a folder of images, or shards."""
    if path.endswith((".tar", ".tar.gz", ".tgz")):
        return ShardRows(path)
    if Path(path).is_dir():
        return FileImageRows(list_images(path)[0])
    fix = "give [X] for a single image" if Path(path).is_file() else "check the path"
    raise ValueError(
        f"X={path!r} is no folder of images and no .tar shard or pattern of shards: {fix}."
    )


def check_is_image(estimator, rows):
    """Refuse vectors, for an estimator of images alone."""
    if not rows.is_image:
        raise ValueError(
            f"{type(estimator).__name__} takes images, but X has vectors, shape {rows.shape}: give "
            "image_shape=(height, width, channels) if its rows are flattened images, or X[None] if "
            "it is one greyscale image."
        )


def check_image_shape(name, shape, known):
    """Refuse images of another shape (h, w, c) than the `known` one of the fit of `name`."""
    if tuple(known) != shape:
        raise ValueError(
            f"X holds images (h, w, c) = {shape}, but {name} was fitted on {tuple(known)}. Resize "
            "or convert them."
        )


def reading_range(name, rows, known):
    """Find the pixel range to read images with after ``fit``, by the rule in check_X's notes.

    Parameters
    ----------
    name : str
        Name of the estimator, for errors.
    rows : Rows of shape (n, C, H, W)
        The images.
    known : tuple of (low, high) or None
        The pixel range of ``fit``.

    Returns
    -------
    tuple of (low, high) or None

    Raises
    ------
    ValueError
        If the images have another scale than those of ``fit``.
    """
    own = rows.pixel_range
    if own is None or known is None:
        return own
    known = tuple(known)
    by_type = isinstance(known[1], int)
    standard = is_standard(known) and not by_type
    kind = "integers" if by_type else "floats"
    fitted = f"{name} was fitted on {kind} from {known[0]} to {known[1]}"
    if isinstance(own[1], int):
        if by_type or standard or own == known:
            return own
        raise ValueError(
            f"X holds {rows.dtype} pixels from {own[0]} to {own[1]}, but {fitted}, of which "
            "neither black nor white is known. Give floats of that scale, "
            "X.astype(np.float32)."
        )
    low, high = rows.value_range or own
    if by_type:
        if own == (0.0, 1.0):
            return own
        values = "floats" if np.dtype(rows.dtype).kind == "f" else rows.dtype
        bits = 8 if known[1] < 256 else 16
        raise ValueError(
            f"X holds {values} from {low:g} to {high:g}, but {fitted}. Give integers of "
            f"{bits} bits, X.astype(np.uint{bits}), or floats from 0 to 1."
        )
    # A little more than at fit is usual (a MinMaxScaler meets new data); twice as much is not.
    slack = (known[1] - known[0]) / 2
    outside = not (known[0] - slack <= low and high <= known[1] + slack)
    message = f"X holds floats from {low:g} to {high:g}, but {fitted}"
    if standard and outside:
        raise ValueError(f"{message}: give the same scale.")
    largest = max(abs(low), abs(high))
    if outside or 0 < largest < _LEAST_SHARE * max(map(abs, known)):
        # Other scales have no bounds of their own, and dark images are no mistake.
        warn(f"{message}. Is it the same scale?")
    return known
