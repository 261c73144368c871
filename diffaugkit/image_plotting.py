"""Displays of images: generated beside real ones, interpolations, attention of a transformer.

Each display is one mosaic on one axes, so that it can stand in a figure with others.
"""

import os
from numbers import Integral

import numpy as np

from diffaugkit.arrays import channel_last, guess_range, to_numpy


class SampleGridDisplay:
    """Generated images beside their sources, and beside what the model may have memorised.

    Parameters
    ----------
    generated : images, n_rows * n_per_row of them
        Generated images, all of the first source, then of the second, as `augment` returns them:
        (n, h, w, c) or (n, h, w) arrays, (n, c, h, w) tensors, lists of PIL images or of paths, a
        folder, or (n, h * w * c) with `image_shape`; uint8 or float. Of two channels, or more than
        four, the first three are drawn, as red, green and blue.
    source : images, n_rows of them, or None, default=None
        The real image of each row. None: the generated images alone fill the grid.
    labels : array-like of shape (n_rows,), default=None
        Names of the rows.
    nearest : images, n_rows of them, or None, default=None
        The training image that lies nearest to any generated one of the row: a copy shows.
    image_shape : (h, w) or (h, w, c) or None, default=None
        Shape of flattened images.
    pixel_range : (low, high) or None, default=None
        Values of black and white. None: (0, 255) for uint8; else (0, 1) or (-1, 1) if the source
        lies in it, else its least and largest value.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the grid, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    image_ : matplotlib AxesImage
        The mosaic.

    Raises
    ------
    ValueError
        If images are of different sizes, or their numbers do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.plotting import SampleGridDisplay
    >>> source = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    >>> display = SampleGridDisplay(np.repeat(source, 3, axis=0), source, ["cat", "dog"]).plot()
    >>> [text.get_text() for text in display.ax_.get_yticklabels()]
    ['cat', 'dog']
    """

    def __init__(
        self,
        generated,
        source=None,
        labels=None,
        nearest=None,
        *,
        image_shape=None,
        pixel_range=None,
    ):
        self.generated = generated
        self.source = source
        self.labels = labels
        self.nearest = nearest
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        n_per_sample=4,
        real=None,
        extractor=None,
        random_state=None,
        image_shape=None,
        pixel_range=None,
        ax=None,
        **plot_params,
    ):
        """Generate images from some sources with a fitted estimator and plot them.

        Parameters
        ----------
        estimator : fitted estimator
            Anything with ``augment(X, n_per_sample)``.
        X : images
            Sources, one row each: take some, not all.
        y : array-like of shape (n_samples,), default=None
            Names of the rows.
        n_per_sample : int, default=4
            Generated images in a row.
        real : images or None, default=None
            Training images, for the column of the nearest one.
        extractor : fitted estimator with `transform`, callable or None, default=None
            Features in which near is measured, as in
            :func:`~diffaugkit.metrics.frechet_distance`. None: the pixels.
        random_state : int or None, default=None
            Passed to `augment` if given.
        image_shape, pixel_range
            As for the class. None takes the estimator's `image_shape_` for flattened images.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : SampleGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator cannot augment.
        """
        augment = _method(estimator, "augment")
        seed = {} if random_state is None else {"random_state": random_state}
        generated = augment(X, n_per_sample, **seed)
        shape = _image_shape(estimator, image_shape)
        nearest = None
        if real is not None:
            n_rows = len(generated) // n_per_sample
            nearest = _nearest_images(generated, real, n_rows, extractor, shape)
        display = cls(generated, X, y, nearest, image_shape=shape, pixel_range=pixel_range)
        return display.plot(ax=ax, **plot_params)

    def plot(self, ax=None, *, n_columns=8):
        """Draw the grid.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        n_columns : int, default=8
            Images in a row where there is no source.

        Returns
        -------
        self : SampleGridDisplay
            With `ax_` and `figure_`.
        """
        if not isinstance(n_columns, Integral) or n_columns < 1:
            raise ValueError(f"n_columns must be an int >= 1, got {n_columns!r}.")
        generated = _read(self.generated, self.image_shape)
        reference = generated
        if self.source is not None:
            reference = _read(self.source, self.image_shape)
        value_range = self.pixel_range or guess_range(reference)

        def beside(images):
            own = self.pixel_range or _range_beside(images, reference, value_range)
            return _rgb(images, own)

        tiles = beside(generated)
        blocks, names = [], []
        if self.source is None:
            n_rows, n_per_row = -(-len(tiles) // n_columns), min(n_columns, len(tiles))
            # The last row is filled up with white.
            blank = np.ones((n_rows * n_per_row - len(tiles), *tiles.shape[1:]))
            tiles = np.concatenate([tiles, blank])
        else:
            n_rows = len(reference)
            if not n_rows or len(tiles) % n_rows or not len(tiles):
                raise ValueError(
                    f"generated has {len(tiles)} images for {n_rows} sources; it must have the "
                    "same number for each source, ordered by source."
                )
            n_per_row = len(tiles) // n_rows
            blocks, names = [_rgb(reference, value_range)[:, None]], ["source"]
        blocks.append(tiles.reshape(n_rows, n_per_row, *tiles.shape[1:]))
        names += ["generated"]
        if self.nearest is not None:
            nearest = beside(_read(self.nearest, self.image_shape))
            blocks.append(nearest[:, None])
            names += ["nearest real"]
        # One block needs no name; of several columns the heading stands over the middle.
        names = names if len(blocks) > 1 else [""]
        self.figure_, self.ax_, self.image_ = _draw(ax, blocks, names, self.labels)
        return self


class InterpolationDisplay:
    """Strips of images generated between two real ones (Gen-SIS, Figs. 3 and 5).

    Parameters
    ----------
    X_a, X_b : images, n_pairs of each
        Ends of the strips; kinds as for :class:`SampleGridDisplay`.
    generated : sequence of images, n_pairs for each alpha
        Images generated at every alpha.
    alphas : array-like of shape (n_alphas,)
        Shares of `X_a`.
    labels : array-like of shape (n_pairs,), default=None
        Names of the rows.
    image_shape, pixel_range
        As for :class:`SampleGridDisplay`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the strips, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    image_ : matplotlib AxesImage
        The mosaic.

    Raises
    ------
    ValueError
        If images are of different sizes, or their numbers do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.plotting import InterpolationDisplay
    >>> a, b = np.zeros((1, 8, 8)), np.ones((1, 8, 8))
    >>> display = InterpolationDisplay(a, b, [(a + b) / 2], [0.5]).plot()
    >>> [text.get_text() for text in display.ax_.get_xticklabels()]
    ['real a', '0.5', 'real b']
    """

    def __init__(
        self, X_a, X_b, generated, alphas, labels=None, *, image_shape=None, pixel_range=None
    ):
        self.X_a = X_a
        self.X_b = X_b
        self.generated = generated
        self.alphas = alphas
        self.labels = labels
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X_a,
        X_b,
        alphas=(1.0, 0.75, 0.5, 0.25, 0.0),
        *,
        labels=None,
        random_state=None,
        image_shape=None,
        pixel_range=None,
        ax=None,
        **plot_params,
    ):
        """Generate between pairs of images with a fitted estimator and plot the strips.

        The seed is the same for every alpha, so that only the embedding changes along a strip.

        Parameters
        ----------
        estimator : fitted estimator
            Anything with ``interpolate(X_a, X_b, alpha)``, alpha being the share of `X_a`.
        X_a, X_b : images
            Ends, pair by pair: take some, not all.
        alphas : sequence of float in [0, 1], default=(1, 0.75, 0.5, 0.25, 0)
            Shares of `X_a`. 1 and 0 are the reconstructions of the ends.
        labels : array-like of shape (n_pairs,), default=None
            Names of the rows.
        random_state : int or None, default=None
            Passed to `interpolate` if given.
        image_shape, pixel_range
            As for the class. None takes the estimator's `image_shape_` for flattened images.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : InterpolationDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator cannot interpolate.
        """
        interpolate = _method(estimator, "interpolate")
        seed = {} if random_state is None else {"random_state": random_state}
        generated = [interpolate(X_a, X_b, float(alpha), **seed) for alpha in alphas]
        shape = _image_shape(estimator, image_shape)
        display = cls(
            X_a, X_b, generated, alphas, labels, image_shape=shape, pixel_range=pixel_range
        )
        return display.plot(ax=ax, **plot_params)

    def plot(self, ax=None):
        """Draw the strips.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        self : InterpolationDisplay
            With `ax_` and `figure_`.
        """
        if len(self.generated) != len(self.alphas) or not len(self.alphas):
            raise ValueError(
                f"generated must hold one set of images for each of the {len(self.alphas)} alphas "
                f"and at least one, got {len(self.generated)}."
            )
        ends = [_read(X, self.image_shape) for X in (self.X_a, self.X_b)]
        ranges = [self.pixel_range or guess_range(X) for X in ends]
        if (ends[0].dtype == np.uint8) == (ends[1].dtype == np.uint8):
            # One scale, of which each end may fill a part; bytes and floats have two.
            ranges = 2 * [(min(r[0] for r in ranges), max(r[1] for r in ranges))]
        a, b = (_rgb(X, own)[:, None] for X, own in zip(ends, ranges, strict=True))
        between = [_read(X, self.image_shape) for X in self.generated]
        between = [
            _rgb(X, self.pixel_range or _range_beside(X, ends[0], ranges[0])) for X in between
        ]
        if {len(part) for part in between} | {len(b)} != {len(a)}:
            raise ValueError("X_a, X_b and each set of generated images must be as many.")
        names = ["real a", [f"{alpha:.3g}" for alpha in self.alphas], "real b"]
        blocks = [a, np.stack(between, axis=1), b]
        self.figure_, self.ax_, self.image_ = _draw(ax, blocks, names, self.labels)
        self.ax_.set_xlabel("share of a in the embedding")
        return self


class AttentionDisplay:
    """Images beside the attention of each head of a vision transformer.

    Parameters
    ----------
    images : images, n_samples of them
        What the encoder saw; kinds as for :class:`SampleGridDisplay`.
    attention : array-like of shape (n_samples, n_heads, h, w)
        Attention of the CLS token to the patches, at any size: enlarged bilinearly.
    labels : array-like of shape (n_samples,), default=None
        Names of the rows.
    image_shape, pixel_range
        As for :class:`SampleGridDisplay`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the maps, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    image_ : matplotlib AxesImage
        The mosaic.
    colorbar_ : matplotlib Colorbar
        The scale that all maps share.

    Raises
    ------
    ValueError
        If the attention does not fit the images, or is not finite.
    TypeError
        For the attention of a U-Net, that of
        :class:`~diffaugkit.EmbeddingConditionedDiffusion`: a map for each position, not for heads.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.plotting import AttentionDisplay
    >>> display = AttentionDisplay(np.zeros((2, 8, 8, 3)), np.eye(4).reshape(2, 2, 2, 2)).plot()
    >>> [text.get_text() for text in display.ax_.get_xticklabels()]
    ['image', 'head 1', 'head 2']
    """

    def __init__(self, images, attention, labels=None, *, image_shape=None, pixel_range=None):
        self.images = images
        self.attention = attention
        self.labels = labels
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        *,
        labels=None,
        image_shape=None,
        pixel_range=None,
        ax=None,
        **plot_params,
    ):
        """Plot the attention of a fitted encoder.

        Parameters
        ----------
        estimator : fitted estimator
            Anything with ``attention_maps(X)`` that returns (n_samples, n_heads, h, w), as
            :class:`~diffaugkit.SelfSupervisedEncoder` with a vision transformer.
        X : images
            Images, one row each: take some, not all.
        labels : array-like of shape (n_samples,), default=None
            Names of the rows.
        image_shape, pixel_range
            As for the class. None takes the estimator's `image_shape_` for flattened images.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : AttentionDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator has no attention maps.
        TypeError
            If they are those of a U-Net; see the class.
        """
        maps = _method(estimator, "attention_maps")(X)
        shape = _image_shape(estimator, image_shape)
        display = cls(X, maps, labels, image_shape=shape, pixel_range=pixel_range)
        return display.plot(ax=ax, **plot_params)

    def plot(self, ax=None, *, cmap="magma", vmax=None):
        """Draw images and maps.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        cmap : str or Colormap, default="magma"
            Colours of the maps.
        vmax : float or None, default=None
            Attention of the brightest colour; 0 is the darkest. None: the largest of all maps.

        Returns
        -------
        self : AttentionDisplay
            With `ax_` and `figure_`.
        """
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from scipy.ndimage import zoom

        images = _read(self.images, self.image_shape)
        if isinstance(self.attention, dict):
            raise TypeError(
                "attention is a dict of maps by resolution, those of a U-Net, which have no CLS "
                "token: this display is for a SelfSupervisedEncoder with a vision transformer."
            )
        attention = np.asarray(to_numpy(self.attention), dtype=np.float64)
        if attention.ndim != 4 or len(attention) != len(images) or not attention.size:
            raise ValueError(
                f"attention must be of shape ({len(images)}, n_heads, h, w), one entry per image, "
                f"got {attention.shape}."
            )
        if not np.isfinite(attention).all():
            raise ValueError("attention must be finite.")
        h, w = images.shape[1:3]
        factors = (1, 1, h / attention.shape[2], w / attention.shape[3])
        maps = zoom(attention, factors, order=1, mode="nearest", grid_mode=True)
        scale = ScalarMappable(Normalize(0.0, attention.max() if vmax is None else vmax), cmap)
        colours = scale.to_rgba(maps.reshape(-1, w))[:, :, :3].reshape(*maps.shape, 3)
        tiles = _rgb(images, self.pixel_range or guess_range(images))
        names = ["image", [f"head {i + 1}" for i in range(attention.shape[1])]]
        blocks = [tiles[:, None], colours]
        self.figure_, self.ax_, self.image_ = _draw(ax, blocks, names, self.labels, margin=1.0)
        self.colorbar_ = self.figure_.colorbar(
            scale, ax=self.ax_, label="attention", shrink=0.8, pad=0.02
        )
        return self


# ------------------------------------------------------------------ helpers


def _method(estimator, name):
    method = getattr(estimator, name, None)
    if method is None:
        raise ValueError(f"{type(estimator).__name__} has no method {name!r}.")
    return method


def _image_shape(estimator, image_shape):
    """Return the shape given, or that which the estimator was fitted on."""
    return getattr(estimator, "image_shape_", None) if image_shape is None else image_shape


def _nearest_images(generated, real, n_rows, extractor, image_shape):
    """Return for each row the real image nearest to any of the row's generated ones."""
    from diffaugkit.metrics import nearest_training_samples

    known = _read(real, image_shape)
    if extractor is None:
        made, known_range = _read(generated, image_shape), guess_range(known)
        pairs = (known, known_range), (made, _range_beside(made, known, known_range))
        # Bytes beside floats from 0 to 1 would lie far from their own copies.
        flat = [
            (X.reshape(len(X), -1).astype(np.float32) - low) / (high - low or 1.0)
            for X, (low, high) in pairs
        ]
        distance, index = nearest_training_samples(*flat)
    else:
        distance, index = nearest_training_samples(real, generated, extractor=extractor)
    distance, index = distance.reshape(n_rows, -1), index.reshape(n_rows, -1)
    rows = index[np.arange(n_rows), distance.argmin(axis=1)]
    return known[rows]


def _read(images, image_shape=None):
    """Return images of any kind as an array (n, h, w, c): paths are read as estimators do."""
    some = [images] if isinstance(images, str | os.PathLike) else images
    if not len(some):
        raise ValueError("There are no images to draw.")
    is_table = hasattr(images, "columns")  # its entries are the names of these
    if not is_table and isinstance(next(iter(some)), str | os.PathLike):
        from diffaugkit.image_inputs import rows_of_images

        images = rows_of_images(images)[:]  # a tensor (n, c, h, w)
    return channel_last(images, image_shape)


def _range_beside(images, reference, known):
    """Black and white of images beside a reference, of which they are known.

    Estimators read bytes and floats in [0, 1] alike, and generate what they were fitted on.
    """
    is_bytes = images.dtype == np.uint8
    if is_bytes == (reference.dtype == np.uint8):
        return known
    own = guess_range(images)
    return own if is_bytes or own in ((0.0, 1.0), (-1.0, 1.0)) else known


def _rgb(images, value_range):
    """Return (n, h, w, 3) in [0, 1]; grey is repeated, transparent pixels lie on white.

    Of two channels, or more than four, the first three are red, green and blue.
    """
    low, high = value_range
    images = np.clip((images.astype(np.float64) - low) / (high - low or 1.0), 0.0, 1.0)
    if images.shape[-1] == 4:
        alpha = images[..., 3:]
        images = images[..., :3] * alpha + 1.0 - alpha
    elif images.shape[-1] == 2:
        images = np.concatenate([images, np.zeros_like(images[..., :1])], axis=-1)
    elif images.shape[-1] > 4:
        images = images[..., :3]
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _draw(ax, blocks, names, labels, margin=0.0):
    """Draw blocks of tiles (rows, columns, h, w, 3) side by side, wider gaps between blocks.

    The name of a block is one heading over its middle, or one for each of its columns; `margin`
    is the width in inches of what is drawn beside the mosaic later.
    """
    shapes = {(len(block), *block.shape[2:4]) for block in blocks}
    if len(shapes) > 1:
        raise ValueError(
            f"all images must have one size, and all columns as many rows: got (rows, height, "
            f"width) of {sorted(shapes)}."
        )
    n_rows, h, w = shapes.pop()
    if labels is not None and len(labels) != n_rows:
        raise ValueError(f"labels must name the {n_rows} rows, got {len(labels)}.")
    gap = max(1, round(0.05 * w))
    starts, ticks, texts, x = [], [], [], 0
    for block, name in zip(blocks, names, strict=True):
        own = x + np.arange(block.shape[1]) * (w + gap)
        starts.append(own)
        middle = own + (w - 1) / 2
        ticks += [middle.mean()] if isinstance(name, str) else middle.tolist()
        texts += [name] if isinstance(name, str) else name
        x = own[-1] + w + 3 * gap
    tops = np.arange(n_rows) * (h + gap)
    mosaic = np.ones((tops[-1] + h, x - 3 * gap, 3))
    for block, own in zip(blocks, starts, strict=True):
        for top, row in zip(tops, block, strict=True):
            for left, tile in zip(own, row, strict=True):
                mosaic[top : top + h, left : left + w] = tile

    if ax is None:
        import matplotlib.pyplot as plt

        n_columns = sum(block.shape[1] for block in blocks)
        side = min(1.1, 14.0 / max(n_columns, n_rows * h / w))
        longest = 0 if labels is None else max(len(str(label)) for label in labels)
        height, width = (0.4 + n * side / w for n in mosaic.shape[:2])
        width += margin + 0.085 * longest
        figure, ax = plt.subplots(figsize=(width, height), layout="compressed")
    else:
        figure = ax.figure
    # Few pixels are shown as they are; many are averaged when there is no room for all.
    image = ax.imshow(mosaic, interpolation="nearest" if max(h, w) <= 64 else "antialiased")
    ax.set_xticks(ticks, texts)
    ax.set_yticks(tops + (h - 1) / 2 if labels is not None else [], labels)
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    return figure, ax, image
