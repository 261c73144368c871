"""Images in memory as Rows, and the one place where pixel values change their scale.

Notation: (n, h, w, c) as the caller's arrays lie, (B, C, H, W) as every batch of the library does.
The permutation is a view, and bytes stay bytes until a loss function calls :func:`to_unit` on the
device.
"""

import copy

import numpy as np

from diffaugkit.arrays import may_be_channels, standard_range
from diffaugkit.rows import ResidentRows, Rows

__all__ = [
    "ImageRows",
    "from_unit",
    "resolve_image_shape",
    "scan_pixels",
    "to_unit",
]

BYTES, WORDS = (0, 255), (0, 65535)
_LAYOUTS = ("channels_last", "channels_first", "grey", "flat")


class ImageRows(ResidentRows):
    """Rows of images that lie in memory as one array or tensor; nothing is copied but float64.

    Arrays are channel-last and tensors channel-first, whatever their sizes: a rule without a guess.
    uint8 stays uint8. Other integers, bool and float64 become float32 once.

    Parameters
    ----------
    array : ndarray or tensor
        (n, h, w, c) array, (n, c, h, w) tensor, (n, h, w) of either for greyscale, or (n, h*w*c)
        of either together with `image_shape`.
    image_shape : tuple of (int, int, int) or None, default=None
        (h, w, c) of flattened images; one entry may be -1, which is worked out from the width.
    layout : {"channels_last", "channels_first", "grey", "flat"} or None, default=None
        How `array` lies, where it is not as said above.
    pixel_range : tuple of (low, high) or None, default=None
        Values of black and white. None looks: (0, 255) for uint8, (0, 65535) for uint16, else
        (0, 1) or (-1, 1) if the values lie in it, else their least and greatest.
    feature_names : ndarray of str or None, default=None
        Names of the columns of flattened images.

    Raises
    ------
    ValueError
        If the channel axis is neither 1 to 4 long nor shorter than both sides, if `image_shape`
        does not fit the width, or if a value is NaN or infinite; the message names the row.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.image_rows import ImageRows
    >>> rows = ImageRows(np.zeros((5, 8, 6, 3), np.uint8))
    >>> rows.shape, rows.pixel_range, rows.layout, rows[[4, 0]].dtype
    ((5, 3, 8, 6), (0, 255), 'channels_last', torch.uint8)
    """

    def __init__(
        self, array, *, image_shape=None, layout=None, pixel_range=None, feature_names=None
    ):
        is_tensor = hasattr(array, "detach")
        if is_tensor:
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
        array = np.asarray(array)
        layout = layout or _layout_of(array, is_tensor, image_shape)
        if layout not in _LAYOUTS:
            raise ValueError(f"layout={layout!r} must be one of {', '.join(_LAYOUTS)}.")
        array = _permuted(array, layout, image_shape)
        kind = array.dtype.newbyteorder("=")  # files of other machines have words turned round
        if kind != np.uint8:
            array = _float32(array)
        super().__init__(array, feature_names)
        self.dtype, self.layout = array.dtype, layout
        if pixel_range is None and kind in (np.uint8, np.uint16):
            pixel_range = BYTES if kind == np.uint8 else WORDS
        elif pixel_range is None:
            pixel_range, self.value_range = scan_pixels(self)
        self.pixel_range = tuple(pixel_range)

    @staticmethod
    def like(rows, images):
        """Make Rows of the library's own images, in the layout and scale of others.

        Parameters
        ----------
        rows : Rows of shape (n', C, H, W)
            Whose layout and pixel range hold.
        images : ndarray, tensor or Rows of shape (n, C, H, W)
            Pixels as `rows` would give them. They are not looked at again.

        Returns
        -------
        Rows of shape (n, C, H, W)
        """
        if isinstance(images, Rows):
            made = copy.copy(images)
            made.pixel_range = rows.pixel_range
        else:
            made = ImageRows(images, layout="channels_first", pixel_range=rows.pixel_range)
        made.layout = rows.layout
        return made


def to_unit(batch, pixel_range):
    """Scale pixels to [-1, 1], where networks and diffusion work.

    Parameters
    ----------
    batch : tensor of any shape
        Pixels as Rows give them, on any device.
    pixel_range : tuple of (low, high) or None
        ``rows.pixel_range``: `low` becomes -1 and `high` 1. None, of latents, changes no value.

    Returns
    -------
    tensor of the same shape, float32
        A new tensor, but for the range (-1, 1) of float32, which is returned as it is.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.image_rows import to_unit
    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8), (0, 255))
    tensor([-1.,  1.])
    """
    unit = batch.float()
    if pixel_range is None or tuple(pixel_range) == (-1, 1):
        return unit
    low, high = pixel_range
    # Low first: in float32 a large offset would swallow the small differences between pixels.
    unit = unit - low if low else unit
    return unit * (2 / ((high - low) or 1)) - 1


def from_unit(x, pixel_range, layout="channels_last"):
    """Undo :func:`to_unit`, and give the images back as the caller's own lie.

    Parameters
    ----------
    x : tensor or ndarray of shape (B, C, H, W)
        Images in [-1, 1]; values outside are clipped.
    pixel_range : tuple of (low, high) or None
        Values of black and white; None changes no value.
    layout : {"channels_last", "channels_first", "grey", "flat"}, default="channels_last"
        The order of the axes: (B, H, W, C), (B, C, H, W), (B, H, W) or (B, H*W*C).

    Returns
    -------
    ndarray
        uint8, rounded, for the range (0, 255), also where it was learned from floats that fill it;
        float32 for every other.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.image_rows import from_unit
    >>> from_unit(torch.tensor([-1.0, 0.2, 1.3]).reshape(1, 1, 1, 3), (0, 255), "grey")
    array([[[  0, 153, 255]]], dtype=uint8)
    """
    import torch

    if layout not in _LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(_LAYOUTS)}.")
    pixels, words = torch.as_tensor(x).detach().float(), False
    if pixel_range is not None:
        low, high = pixel_range
        if (low, high) != (-1, 1):
            pixels = (pixels + 1) * ((high - low) / 2) + low
        pixels = pixels.clamp(low, high)
        if (low, high) == BYTES:
            pixels = pixels.round().to(torch.uint8)
        words = isinstance(high, int) and (low, high) == WORDS
    if layout in ("channels_last", "flat"):
        pixels = pixels.permute(0, 2, 3, 1)
    if layout == "flat":
        pixels = pixels.flatten(1)
    elif layout == "grey":
        if pixels.shape[1] != 1:
            raise ValueError(f'layout="grey" has one channel, but x has {pixels.shape[1]}.')
        pixels = pixels[:, 0]
    pixels = np.ascontiguousarray(pixels.cpu().numpy())
    return np.rint(pixels).astype(np.uint16) if words else pixels


def resolve_image_shape(image_shape, shape, *, is_flat=False):
    """Work out the -1 of an ``image_shape``, and compare it with the data.

    Parameters
    ----------
    image_shape : sequence of (int, int, int)
        (h, w, c), of which one may be -1.
    shape : tuple of int
        (h, w, c) of the data, or (d,), the width of flattened images.
    is_flat : bool, default=False
        Whether `shape` is a width.

    Returns
    -------
    tuple of (int, int, int)
        (h, w, c).

    Raises
    ------
    ValueError
        If `image_shape` is not three numbers, or does not fit.

    Examples
    --------
    >>> from diffaugkit.image_rows import resolve_image_shape
    >>> resolve_image_shape((8, -1, 3), (8 * 6 * 3,), is_flat=True)
    (8, 6, 3)
    """
    try:
        asked = tuple(int(size) for size in image_shape)
        asked = asked if asked == tuple(image_shape) else ()  # 4.5 is no number of pixels
    except (TypeError, ValueError):
        asked = ()
    if len(asked) != 3 or asked.count(-1) > 1 or any(size < 1 and size != -1 for size in asked):
        raise ValueError(
            f"image_shape={image_shape!r} must be (height, width, channels), three numbers of at "
            "least 1, of which one may be -1."
        )
    if not is_flat:
        if any(size not in (-1, found) for size, found in zip(asked, shape, strict=True)):
            raise ValueError(
                f"image_shape={image_shape!r} does not fit X, whose images are {tuple(shape)} "
                "(height, width, channels). Images that are not flattened need no image_shape."
            )
        return tuple(shape)
    (width,) = shape
    known = int(np.prod([size for size in asked if size != -1]))
    if width % known or (-1 not in asked and width != known) or not width:
        raise ValueError(
            f"image_shape={image_shape!r} does not fit X, whose rows have {width} values: height * "
            "width * channels must be that number."
        )
    return tuple(width // known if size == -1 else size for size in asked)


def scan_pixels(rows):
    """Look once, in blocks, at all pixels of floating-point images.

    Parameters
    ----------
    rows : Rows of shape (n, C, H, W)
        The images.

    Returns
    -------
    pixel_range : tuple of (float, float)
        (0, 1) or (-1, 1) if the values lie in it, else `value_range`.
    value_range : tuple of (float, float)
        Least and greatest value.

    Raises
    ------
    ValueError
        For NaN and infinity, with the number of the row.
    """
    low, high = np.inf, -np.inf
    for part, block in rows.blocks():
        if not block.size:
            continue
        least, most = float(block.min()), float(block.max())
        if not np.isfinite(least + most):
            finite = np.isfinite(block.reshape(len(block), -1))
            row = int(np.argmin(finite.all(axis=1)))
            what = "NaN" if np.isnan(block[row]).any() else "infinity or a too large value"
            raise ValueError(
                f"Input X contains {what} in {rows._named(part.start + row)}. Leave that image "
                "out, or fill the pixels."
            )
        low, high = min(low, least), max(high, most)
    if low > high:
        low = high = 0.0
    return standard_range(low, high), (low, high)


def _layout_of(array, is_tensor, image_shape):
    """Tell how an array lies by its number of axes and its kind."""
    shape = array.shape
    if array.ndim == 2 and image_shape is not None:
        return "flat"
    if array.ndim == 3:
        if shape[2] in (3, 4) and shape[1] > 4:
            raise ValueError(
                f"X has shape {shape}, which looks like one colour image. Give it an axis of its "
                f"own, X[None], for a set of one; a set of greyscale images is (n, h, w)."
            )
        return "grey"
    if array.ndim != 4:
        raise ValueError(
            f"X has shape {shape}, but images are (n, h, w, c) arrays, (n, c, h, w) tensors, "
            "(n, h, w) greyscale, or (n, h*w*c) with image_shape=(h, w, c)."
        )
    return "channels_first" if is_tensor else "channels_last"


def _permuted(array, layout, image_shape):
    """View the caller's array as (n, C, H, W)."""
    if layout == "flat":
        shape = resolve_image_shape(image_shape, array.shape[1:], is_flat=True)
        return array.reshape(len(array), *shape).transpose(0, 3, 1, 2)
    if layout == "grey":
        array = array[:, None]
    else:
        first = layout == "channels_first"
        axis, other = (1, 3) if first else (3, 1)
        n_channels, sides = array.shape[axis], array.shape[2:] if first else array.shape[1:3]
        if not may_be_channels(n_channels, sides):
            kind = "a channel-first tensor" if first else "a channel-last array"
            swap = ".permute(0, 3, 1, 2)" if first else ".transpose(0, 2, 3, 1)"
            fix = f"; give X{swap}" if 1 <= array.shape[other] <= 4 else ""
            raise ValueError(
                f"X has shape {array.shape}: {kind} has 1 to 4 channels on axis {axis}, or fewer "
                f"than rows and columns, not {n_channels}{fix}."
            )
        array = array if first else array.transpose(0, 3, 1, 2)
    if image_shape is not None:
        resolve_image_shape(image_shape, (*array.shape[2:], array.shape[1]))
    return array


def _float32(array):
    """Convert to native float32 where it is not; what does not fit becomes infinite."""
    if array.dtype.kind not in "biufO":
        raise ValueError(f"X has dtype {array.dtype}, but pixels are real numbers.")
    try:
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"X holds values that are no numbers ({error}).") from error
