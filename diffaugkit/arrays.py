"""Arrays from tensors and from images of any layout, and checks of labels and of groups."""

import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# What calls us on behalf of a caller: wrappers of methods, model selection, decorators.
_BETWEEN = {"diffaugkit", "sklearn", "joblib", "torch", "contextlib", "functools"}


def to_numpy(X):
    """Return tensors, on any device and of any precision, as arrays; leave all else as it is."""
    if not hasattr(X, "detach"):
        return X
    X = X.detach().cpu()
    # NumPy knows no bfloat16.
    return (X.float() if str(X.dtype) == "torch.bfloat16" else X).numpy()


def refuse_missing(values, name, what="labels", cure="drop those samples first"):
    """Raise a ValueError that names the rows where there is no value: NaN, None, NA or NaT."""
    import pandas as pd

    if isinstance(values, list | tuple):
        # Else NumPy makes the string "nan" of a NaN among strings.
        values = np.asarray(values, dtype=object)
    missing = np.atleast_1d(pd.isna(to_numpy(values)))
    rows = np.flatnonzero(missing.any(axis=tuple(range(1, missing.ndim))))
    if len(rows):
        listed = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
        raise ValueError(f"{name} has missing {what} (NaN or None) in rows {listed}: {cure}.")


def check_groups(groups, n):
    """Return the group of each of `n` rows as an array of shape (n,), None if there are none."""
    from sklearn.utils import column_or_1d

    if groups is None:
        return None
    refuse_missing(groups, "groups", "values", "name them or drop those rows")
    given, groups = groups, column_or_1d(to_numpy(groups))
    if len(groups) != n:
        raise ValueError(
            f"groups and X have inconsistent lengths: {len(groups)} and {n}. Give one group for "
            "each row."
        )
    refuse_mixed(given if isinstance(given, list | tuple) else groups, "groups")
    return groups


def refuse_mixed(names, what):
    """Refuse names that are strings and numbers: NumPy would make 1 and "1" the same string."""
    is_plain = isinstance(names, list | tuple) or getattr(names, "dtype", None) == np.dtype("O")
    if is_plain and len({isinstance(name, str) for name in names}) > 1:
        raise TypeError(f"{what} must be all strings or all numbers, but they are both.")


@contextmanager
def many_classes():
    """Silence scikit-learn's warning of many classes: few samples of each are what we are for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes")
        yield


def some(names):
    """List at most five names, and how many more there are."""
    names = [str(name) for name in names]
    more = f", ... and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def warn(message, category=UserWarning):
    """Warn of the line that called the library, whatever lies between: our files, scikit-learn's.

    A warning is shown once for each line, and that line is where its reader can change something.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def channel_last(images: Any, image_shape: Sequence[int] | None = None) -> np.ndarray:
    """Return images of any layout as an array (n, h, w, c), values as they are.

    Arrays are channel-last unless only their second axis may be that of channels, tensors
    channel-first unless only their last may; (n, h, w) is greyscale, and (n, h * w * c) needs
    `image_shape`. Lists of arrays, tensors or PIL images are stacked.
    """
    first = hasattr(images, "detach")
    if isinstance(images, list | tuple):
        first = len(images) > 0 and all(hasattr(image, "detach") for image in images)
        images = np.stack([np.asarray(to_numpy(image)) for image in images])
    images = np.asarray(to_numpy(images))
    if images.ndim == 2 and image_shape is not None:
        shape = tuple(image_shape)
        if len(shape) not in (2, 3) or math.prod(shape) != images.shape[1]:
            raise ValueError(
                f"image_shape={image_shape} must be (h, w) or (h, w, c) with a product of "
                f"{images.shape[1]}, the number of columns."
            )
        return images.reshape(len(images), *(shape if len(shape) == 3 else (*shape, 1)))
    if images.ndim == 3:
        return images[..., None]
    if images.ndim != 4:
        raise ValueError(
            f"images must be of shape (n, h, w, c), (n, c, h, w) or (n, h, w), got "
            f"{images.shape}; give image_shape for flattened images."
        )
    early = may_be_channels(images.shape[1], images.shape[2:])
    late = may_be_channels(images.shape[3], images.shape[1:3])
    if not early and not late:
        raise ValueError(
            f"images must have 1 to 4 channels, or fewer than pixels on a side, got shape "
            f"{images.shape}."
        )
    return np.moveaxis(images, 1, -1) if early and (first or not late) else images


def may_be_channels(n_channels, sides):
    """Tell channels from a side: up to four, or, of fluorescence say, fewer than both sides."""
    return 1 <= n_channels <= 4 or 4 < n_channels < min(sides)


def guess_range(images: np.ndarray) -> tuple[float, float]:
    """Return the values of black and white.

    (0, 255) for uint8; else (0, 1) or (-1, 1) if all values lie in it, else the least and the
    largest value.
    """
    if images.dtype == np.uint8:
        return 0.0, 255.0
    return standard_range(float(images.min()), float(images.max()))


def standard_range(low: float, high: float) -> tuple[float, float]:
    """Return (0, 1) or (-1, 1) if the least and the largest value lie in it, else the two."""
    for known in ((0.0, 1.0), (-1.0, 1.0)):
        if known[0] <= low and high <= known[1]:
            return known
    return low, high


def embedder(estimator, method):
    """Return a function X -> embedding; in a Pipeline the last step's method after the others."""
    embed = getattr(estimator, method, None)
    if embed is not None:
        return embed
    steps = getattr(estimator, "steps", None)
    embed = getattr(steps[-1][1], method, None) if steps else None
    if embed is None:
        owner = type(steps[-1][1] if steps else estimator).__name__
        raise ValueError(f"{owner} has no method {method!r}; name one that embeds by method=.")
    if len(steps) == 1:
        return embed
    return lambda X: embed(estimator[:-1].transform(X))


def strips(shape, n_pixels=2**22):
    """Yield slices of rows, of a few million pixels each, that cover an image of a shape."""
    step = max(1, n_pixels // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)
