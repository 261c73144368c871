"""Display of masks: image, truth and prediction side by side, regions outlined on the image."""

import os
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from scipy.optimize import linear_sum_assignment

from diffaugkit.arrays import guess_range, to_numpy
from diffaugkit.image_plotting import _draw, _image_shape, _method, _read, _rgb

# The colours of Okabe and Ito (2008), which colour-blind readers tell apart, for labels 1, 2, ...
_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
)
# Pixels of a tile below which it is enlarged, so that an outline is thin beside what it encloses.
_LEAST_SIDE = 160


class SegmentationDisplay:
    """Images, their true masks and the predicted ones, a row for each image.

    Parameters
    ----------
    X : images, n of them
        (n, h, w, c) or (n, h, w) arrays, (n, c, h, w) tensors, lists of arrays, PIL images or
        paths, which may differ in size, a folder, or (n, h * w * c) with `image_shape`; uint8 or
        float. Channels as for :class:`SampleGridDisplay`.
    y_pred : bool or int array-like of shape (n, h, w) or (n, h * w), or list of (h, w) or of paths
        Predicted label of each pixel.
    y_true : as `y_pred`, or None, default=None
        True labels; None leaves their column out.
    labels : array-like of shape (n,), default=None
        Names of the rows.
    background : int or None, default=0
        Label that gets no colour. None colours every predicted one, as for the segments of
        :class:`~diffaugkit.zero_shot_segmenter.ZeroShotSegmenter`, whose numbers mean nothing; in
        `y_true` 0 then still is the background.
    image_shape : (h, w) or (h, w, c) or None, default=None
        Shape of flattened images.
    pixel_range : (low, high) or None, default=None
        Values of black and white. None: (0, 255) for uint8; else (0, 1) or (-1, 1) if the images
        lie in it, else their least and largest value.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the mosaic, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    image_ : matplotlib AxesImage
        The mosaic.

    Raises
    ------
    ValueError
        If masks are not of the size of the images, or their numbers do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.segmentation_plotting import SegmentationDisplay
    >>> X = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    >>> masks = np.arange(128).reshape(2, 8, 8) % 2
    >>> display = SegmentationDisplay.from_predictions(X, masks, masks)
    >>> [text.get_text() for text in display.ax_.get_xticklabels()]
    ['image', 'truth', 'prediction']
    """

    def __init__(
        self,
        X,
        y_pred,
        y_true=None,
        labels=None,
        *,
        background=0,
        image_shape=None,
        pixel_range=None,
    ):
        self.X = X
        self.y_pred = y_pred
        self.y_true = y_true
        self.labels = labels
        self.background = background
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    @classmethod
    def from_predictions(
        cls,
        X,
        y_true,
        y_pred,
        labels=None,
        *,
        background=0,
        image_shape=None,
        pixel_range=None,
        ax=None,
        **plot_params,
    ):
        """Plot masks beside their images.

        Parameters
        ----------
        X, y_true, y_pred, labels, background, image_shape, pixel_range
            As for the class.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : SegmentationDisplay
            The plotted display.

        Raises
        ------
        ValueError
            As for the class.
        """
        display = cls(
            X,
            y_pred,
            y_true,
            labels,
            background=background,
            image_shape=image_shape,
            pixel_range=pixel_range,
        )
        return display.plot(ax=ax, **plot_params)

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        labels=None,
        *,
        background=0,
        image_shape=None,
        pixel_range=None,
        ax=None,
        **plot_params,
    ):
        """Segment images with a fitted estimator and plot the masks.

        Parameters
        ----------
        estimator : fitted estimator
            Anything whose ``predict(X)`` gives a label per pixel.
        X : images
            One row each: take some, not all.
        y : array-like of shape (n, h, w) or (n, h * w), list of (h, w), or None, default=None
            True labels.
        labels, background, image_shape, pixel_range
            As for the class. None takes the estimator's `image_shape_` for flattened images.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : SegmentationDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator cannot predict; as for the class.
        """
        return cls.from_predictions(
            X,
            y,
            _method(estimator, "predict")(X),
            labels,
            background=background,
            image_shape=_image_shape(estimator, image_shape),
            pixel_range=pixel_range,
            ax=ax,
            **plot_params,
        )

    def plot(self, ax=None, *, alpha=0.3, outline=True, colours=_COLOURS, match=False):
        """Draw images and masks.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        alpha : float in [0, 1], default=0.3
            How much colour lies on a region: 0 outlines only, 1 hides the image.
        outline : bool, default=True
            Whether the inner edge of each region is drawn in its full colour.
        colours : sequence of colours, default: Okabe and Ito's seven
            Of labels 1, 2, ...; again from the first where there are more labels. Without a
            background label 0 has the first.
        match : bool, default=False
            Give each predicted segment the colour of the true region that it is matched with
            (Hungarian method, best Dice), and no colour to the rest: for segments without names.

        Returns
        -------
        self : SegmentationDisplay
            With `ax_` and `figure_`.
        """
        from matplotlib.colors import to_rgb

        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}.")
        images = _images(self.X, self.image_shape)
        if not images:
            raise ValueError("there are no images to draw.")
        ranges = [self.pixel_range] * len(images) if self.pixel_range else _ranges(images)
        pairs = zip(images, ranges, strict=True)
        tiles = _stacked([_rgb(image[None], value_range)[0] for image, value_range in pairs])
        sizes = [image.shape[:2] for image in images]
        predicted = _masks(self.y_pred, "y_pred", sizes)
        palette = np.array([to_rgb(colour) for colour in colours])
        blocks, names = [tiles], ["image"]
        background = self.background
        if self.y_true is not None:
            known = 0 if background is None else background
            true = _masks(self.y_true, "y_true", sizes)
            blocks.append(_painted(tiles, _stacked(true), known, palette, alpha, outline))
            names.append("truth")
        if match:
            if self.y_true is None:
                raise ValueError("match=True needs y_true, whose regions give the colours.")
            background = known
            pairs = zip(true, predicted, strict=True)
            predicted = [_named(t, p, known) for t, p in pairs]
        blocks.append(_painted(tiles, _stacked(predicted), background, palette, alpha, outline))
        names.append("prediction")
        blocks[0] = _enlarged(tiles)
        beyond = np.ones(tiles.shape[:3], bool)
        for row, size in enumerate(sizes):
            beyond[row][_middle(size, tiles.shape[1:3])] = False
        for block in blocks:
            block[_enlarged(beyond)] = 1.0  # white around images smaller than the largest
        self.figure_, self.ax_, self.image_ = _draw(
            ax, [block[:, None] for block in blocks], names, self.labels
        )
        if ax is None:
            # Regions want more room than the thumbnails of a grid of samples.
            self.figure_.set_size_inches(1.8 * self.figure_.get_size_inches())
        return self


def _images(X, image_shape):
    """Read images as a list of (h, w, c); those that come as a list may differ in size."""
    if isinstance(X, str | os.PathLike) and Path(X).is_dir():
        from diffaugkit.image_files import list_images

        X = list_images(X)[0]
    if not isinstance(X, list | tuple) and len(getattr(X, "shape", ())) != 1:
        return list(_read(X, image_shape))
    return [_read([image], image_shape)[0] for image in X]


def _ranges(images):
    """Black and white of each image: bytes have their own, all others share one."""
    others = [image.ravel() for image in images if image.dtype != np.uint8]
    shared = guess_range(np.concatenate(others)) if others else None
    return [guess_range(image) if image.dtype == np.uint8 else shared for image in images]


def _masks(masks, name, sizes):
    """Read masks as a list of (h, w), int64, one for each of `sizes`."""
    masks = masks if isinstance(masks, list | tuple) else np.atleast_1d(to_numpy(masks))
    if len(masks) != len(sizes):
        raise ValueError(f"{name} must hold {len(sizes)} masks, one per image, got {len(masks)}.")
    found = []
    for row, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
        if isinstance(mask, str | os.PathLike):
            from diffaugkit.segmentation_data import _read_mask

            mask = _read_mask(mask, size, row)
        mask = np.asarray(to_numpy(mask))
        if mask.shape == (size[0] * size[1],):
            mask = mask.reshape(size)
        if mask.shape != size:
            raise ValueError(
                f"{name} must hold a label for each pixel of X: its mask {row} has shape "
                f"{mask.shape}, but the image {size}."
            )
        if mask.dtype.kind not in "biu":
            raise ValueError(f"{name} must hold bool or int labels, got {mask.dtype}.")
        found.append(mask.astype(np.int64))
    return found


def _middle(size, whole):
    """Place of an image of `size` (h, w) in the middle of a larger one."""
    starts = [(n - m) // 2 for m, n in zip(size, whole, strict=True)]
    return tuple(slice(start, start + m) for start, m in zip(starts, size, strict=True))


def _stacked(arrays):
    """Stack arrays (h, w, ...), smaller ones in the middle, their borders repeated."""
    whole = np.max([array.shape[:2] for array in arrays], axis=0)
    out = []
    for array in arrays:
        # No new label beside a region: an outline is drawn where labels change.
        for axis, place in enumerate(_middle(array.shape[:2], whole)):
            array = array.take(np.arange(whole[axis]) - place.start, axis, mode="clip")
        out.append(array)
    return np.stack(out)


def _enlarged(array):
    """Repeat the pixels of tiles (n, h, w, ...), so that one of the result is a thin line."""
    factor = max(1, -(-_LEAST_SIDE // min(array.shape[1:3])))
    return array.repeat(factor, axis=1).repeat(factor, axis=2)


def _painted(tiles, masks, background, palette, alpha, outline):
    """Lay colours on enlarged tiles (n, h, w, 3), the edges of regions in full."""
    first = 0 if background is None else 1
    tiles, masks = _enlarged(tiles), _enlarged(masks)
    colour = palette[(masks - first) % len(palette)]
    share = np.full(masks.shape, alpha)
    if outline:
        share[_edges(masks, max(1, round(min(masks.shape[1:]) / 80)))] = 1.0
    if background is not None:
        share[masks == background] = 0.0
    return (1 - share[..., None]) * tiles + share[..., None] * colour


def _edges(masks, width):
    """Pixels with another label at most `width` to the side, above or below."""
    least, greatest = (
        [filter_1d(masks, 2 * width + 1, axis, mode="nearest") for axis in (1, 2)]
        for filter_1d in (minimum_filter1d, maximum_filter1d)
    )
    return np.not_equal(least, greatest).any(axis=0)


def _named(true, predicted, background):
    """Give each segment the label of the true region that it is matched with, or none."""
    from diffaugkit.metrics.segmentation import _dice, _overlaps  # and with it pandas

    labels, segments, shared = _overlaps(true, predicted)
    dice = _dice(shared, shared.sum(axis=1), shared.sum(axis=0))
    labels, dice = labels[labels != background], dice[labels != background]
    named = np.full_like(true, background)
    for i, j in zip(*linear_sum_assignment(dice, maximize=True), strict=True):
        if dice[i, j] > 0:
            named[predicted == segments[j]] = labels[i]
    return named
