"""From slides to tiles: where tissue lies, which tiles hold it, and those as images."""

import copy
import math
import os
from collections import Counter
from collections.abc import Iterable
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from scipy import ndimage

from diffaugkit.arrays import refuse_missing, refuse_mixed, some, warn
from diffaugkit.image_files import _capital, _DecodedRows, _unreadable
from diffaugkit.segmentation_data import tile_starts
from diffaugkit.slides import NEAR, Slide, open_slide, read_box, thumbnail

__all__ = ["TissueTiles", "tissue_mask"]

# Pixels of a thumbnail: at most this many along its longer side, and along a tile.
_LONGEST, _PER_TILE = 2048, 32
# Values up to which a pixel is nearly black.
_DARK = 64
# Parts of a tile's area below which a speck is dust, and a hole in the tissue is tissue.
_SPECK, _HOLE = 1 / 8, 1 / 2
# Glass has at most this saturation; the quarters of its pixels lie this near to each other.
_GLASS, _EVEN = 0.15, 0.03
# How far above the glass the saturation of tissue begins: noise of glass, shrunk, ends at 0.02.
_ABOVE_GLASS = 0.04, 0.06
# How much finer than the slide tiles may be asked for, as scanners differ a little.
_ENLARGED = 0.8


class TissueTiles(_DecodedRows):
    """Tiles of slides that hold tissue, as images that are read when they are needed.

    Estimators take it as X. It never reads a slide as a whole: where tissue lies is found on a
    thumbnail, and a tile is read alone.

    Parameters
    ----------
    slides : list of str, path-like, ndarray of shape (h, w, 3) uint8, or PIL images; or one of them
        Whole-slide files (SVS, NDPI, tiled TIFF and what else tiffslide or openslide read, the
        extra ``diffaugkit[slides]``), pictures (PNG, JPEG, TIFF), arrays and memory maps. Also a
        :class:`~diffaugkit.slides.Slide` of your own, for other formats.
    tile_size : int, default=256
        Side of a tile in pixels.
    stride : int or None, default=None
        Distance of tiles in pixels; None puts them side by side. The last tile of a row ends at
        the border of the slide, so that nothing is left out.
    level : int, default=0
        Level of the slides to cut, 0 the finest.
    mpp : float or None, default=None
        Microns per pixel of the tiles, instead of `level`: tiles are read from the next finer level
        and rescaled, so that slides of several scanners show cells at one size. 0.5 is what is
        called 20x, 0.25 is 40x.
    min_tissue : float in [0, 1], default=0.5
        Share of tissue that a tile must have; 0 keeps all.
    tissue_threshold : "otsu", float in [0, 1] or None, default="otsu"
        Saturation above which a pixel is tissue; see :func:`tissue_mask`. None keeps all tiles, for
        slides whose background is not glass (fluorescence).
    slide_ids : sequence of str or int, or None, default=None
        Names of the slides. None: names of files without the suffix, and numbers for what has no
        file.
    slide_mpp : float, sequence, mapping or Series of float, or None, default=None
        Microns per pixel of the slides at level 0, where they do not know it, or not rightly: a
        sequence in the order of `slides`, a mapping or Series by the names of the slides. None or
        NaN in it keeps what the slide says.

    Attributes
    ----------
    table : DataFrame
        A row for each tile: slide, row and column of its upper left corner, height and width, all
        four in pixels of level 0; the level it is read from, and its share of tissue, NaN without a
        `tissue_threshold`.
    groups : ndarray of shape (n_tiles,)
        Name of the slide of each tile: ``groups=`` of cross-validation and of
        :class:`~diffaugkit.mil.AttentionMILClassifier`.
    slide_ids : ndarray of shape (n_slides,)
        Names of all slides, those without tiles included.
    shape : tuple of int
        (n_tiles, 3, tile_size, tile_size), as every batch of the library lies.

    Raises
    ------
    ValueError
        For a slide, by its name, that is missing, broken, not RGB of 8 bits, smaller than a tile,
        of unknown resolution where `mpp` is given, or too coarse for it; for names that are not
        unique; where no slide has tissue.
    ImportError
        Without a reader for whole-slide files, or without Pillow or scikit-image.

    Warns
    -----
    UserWarning
        Where a slide has no tile with enough tissue.

    See Also
    --------
    SelfSupervisedEncoder : Makes embeddings of the tiles.
    AttentionMILClassifier : Labels slides from the embeddings of their tiles.

    Notes
    -----
    ``tiles[i]`` is a uint8 tensor (3, h, w), torch's order, and ``tiles[[2, 0]]`` a batch of them;
    ``tiles.read(i)`` is an array (h, w, 3). Tiles can be pickled, and split by cross-validation,
    which reads nothing (:meth:`take`). Ordinary pictures are decoded as a whole, and kept up to a
    GiB; of more than that, a shuffled epoch decodes again and again. Write them once as memory maps
    or tiled TIFF.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.tissue import TissueTiles
    >>> slide = np.full((64, 96, 3), 240, np.uint8)  # glass
    >>> slide[:, 32:] = [200, 90, 150]
    >>> tiles = TissueTiles([slide], 32, slide_ids=["a"])
    >>> tiles
    TissueTiles(1 slide, 4 tiles of 32 x 32)
    >>> tiles.table[["slide", "row", "column"]].to_numpy().tolist()
    [['a', 0, 32], ['a', 0, 64], ['a', 32, 32], ['a', 32, 64]]
    """

    def __init__(
        self,
        slides,
        tile_size=256,
        *,
        stride=None,
        level=0,
        mpp=None,
        min_tissue=0.5,
        tissue_threshold="otsu",
        slide_ids=None,
        slide_mpp=None,
    ):
        if isinstance(slides, str | os.PathLike | Slide) or hasattr(slides, "getbands"):
            slides = [slides]
        elif len(getattr(slides, "shape", ())) == 3:
            slides = [slides]
        elif not isinstance(slides, Iterable):
            raise TypeError(f"slides is {slides!r}: give a path, a picture or a Slide, or a list.")
        slides = list(slides)
        if not slides:
            raise ValueError("slides is empty: give at least one.")
        _check_numbers(tile_size, stride, level, mpp, min_tissue, tissue_threshold)
        self.slide_ids = _named_slides(slides, slide_ids)
        known = _per_slide(slide_mpp, self.slide_ids)
        self._slides, self._grids, parts, blank = [], [], [], []
        for number, item in enumerate(slides):
            try:
                slide = open_slide(item)
            except ImportError:
                raise
            except Exception as error:  # a broken file can raise anything
                raise _unreadable(self._titled(number), error) from error
            if known[number] is not None:
                slide = copy.copy(slide)  # the caller's own stays as it is
                slide.mpp = known[number], known[number]
            self._slides.append(slide)
            self._grids.append(_Grid(slide, self._titled(number), tile_size, stride, level, mpp))
            try:
                places, share = self._grids[-1].with_tissue(slide, tissue_threshold, min_tissue)
            except ImportError:
                raise
            except Exception as error:
                raise _unreadable(self._titled(number), error) from error
            parts.append((np.full(len(places), number), *places.T, share))
            if not len(places):
                blank.append(number)
        self._slide, self._top, self._left, self._share = map(
            np.concatenate, zip(*parts, strict=True)
        )
        self._warn_of(blank, tissue_threshold, min_tissue)
        super().__init__(len(self._slide), (tile_size, tile_size), "RGB")
        self.in_memory = all(slide.in_memory for slide in self._slides)

    def __repr__(self):
        """Count slides and tiles."""
        n = len(self._slides)
        return (
            f"{type(self).__name__}({n} slide{'s' * (n != 1)}, {len(self)} "
            f"tile{'s' * (len(self) != 1)} of {self.shape[2]} x {self.shape[3]})"
        )

    @property
    def groups(self):
        """Name of the slide of each tile, (n_tiles,)."""
        return self.slide_ids[self._slide]

    @property
    def table(self):
        """A row for each tile: slide, row, column, height, width, level, tissue."""
        import pandas as pd

        sides = np.array([grid.extent for grid in self._grids])[self._slide]
        levels = np.array([grid.level for grid in self._grids])[self._slide]
        return pd.DataFrame(
            {
                "slide": self.groups,
                "row": self._top,
                "column": self._left,
                "height": np.rint(sides[:, 0]).astype(np.int64),
                "width": np.rint(sides[:, 1]).astype(np.int64),
                "level": levels,
                "tissue": self._share,
            }
        )

    def read(self, index):
        """Read one tile.

        Parameters
        ----------
        index : int
            Row of the table.

        Returns
        -------
        ndarray of shape (tile_size, tile_size, 3), uint8
        """
        return np.ascontiguousarray(self.block([index])[0].transpose(1, 2, 0))

    def take(self, indices, axis=0):
        """Select tiles without reading them.

        Parameters
        ----------
        indices : int array-like, bool mask of shape (n_tiles,) or slice
            Rows of the table, such as ``tiles.groups == "a"``.
        axis : {0}, default=0
            For scikit-learn.

        Returns
        -------
        TissueTiles
            With the slides of these.
        """
        if axis != 0:
            raise ValueError(f"axis={axis!r}: tiles are along axis 0.")
        if not isinstance(indices, slice):
            indices = np.asarray(indices) if np.size(indices) else np.zeros(0, int)
        rows = np.arange(len(self))[indices]
        taken = copy.copy(self)
        for name in ("_slide", "_top", "_left", "_share"):
            setattr(taken, name, getattr(self, name)[rows])
        taken.shape, taken._memo = (len(rows), *self.shape[1:]), {}
        return taken

    @property
    def iloc(self):
        """Selection by position: by this attribute scikit-learn's splits know that `take` works."""
        return _Positions(self)

    def thumbnail(self, slide_id, longest=1024):
        """Make a small picture of a slide.

        Parameters
        ----------
        slide_id : str or int
            Name of the slide.
        longest : int, default=1024
            Most pixels of a side.

        Returns
        -------
        ndarray of shape (h, w, 3), uint8
        """
        return thumbnail(self._slides[self._number(slide_id)], longest)

    def plot(self, slide_id=None, values=None, *, ax=None, cmap="viridis", alpha=0.5):
        """Draw a slide and the tiles that were kept.

        Parameters
        ----------
        slide_id : str, int or None, default=None
            Name of the slide; None takes the first that has tiles.
        values : array-like of shape (n_tiles,) or None, default=None
            Number of each tile, such as its attention, to colour it by. None outlines the tiles.
        ax : matplotlib Axes or None, default=None
            Where to draw; None makes a figure.
        cmap : str or Colormap, default="viridis"
            Colours of `values`.
        alpha : float in [0, 1], default=0.5
            How much of the slide colours cover.

        Returns
        -------
        matplotlib Axes
            In pixels of level 0.
        """
        import matplotlib.pyplot as plt
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        if values is not None and np.shape(values) != (len(self),):
            raise ValueError(
                f"values has shape {np.shape(values)}, but there are {len(self)} tiles: one each."
            )
        if slide_id is None:
            number = self._slide.min() if len(self) else 0
        else:
            number = self._number(slide_id)
        if ax is None:
            ax = plt.figure(layout="constrained").add_subplot()
        height, width = self._slides[number].levels[0]
        ax.imshow(thumbnail(self._slides[number], 1024), extent=(0, width, height, 0))
        inside = np.flatnonzero(self._slide == number)
        down, across = self._grids[number].extent
        boxes = [Rectangle((self._left[i], self._top[i]), across, down) for i in inside]
        if values is None:
            found = PatchCollection(boxes, facecolor="none", edgecolor="#0072b2", linewidth=0.8)
            ax.add_collection(found)
        elif boxes:
            found = PatchCollection(boxes, cmap=cmap, alpha=alpha, linewidth=0)
            found.set_array(np.asarray(values, float)[inside])
            ax.add_collection(found)
            ax.figure.colorbar(found, ax=ax)
        ax.set(title=f"{self.slide_ids[number]}: {len(inside)} tiles", xticks=[], yticks=[])
        return ax

    # ---- reading ---------------------------------------------------------------------------------

    def _sources(self, positions):
        # Slide by slide and row by row, as the pixels lie in the files.
        order = np.lexsort((self._left[positions], self._top[positions], self._slide[positions]))
        for at in order:
            position = positions[at]
            read = partial(self._tile, position)
            if not self._slides[self._slide[position]].cheap:
                # Here, not in the threads: each of them would decode the same picture.
                try:
                    pixels = read()
                except Exception as error:
                    raise _unreadable(self._named(position), error) from error
                read = partial(np.asarray, pixels)
            yield at, read

    def _decode(self, source):
        return source()

    def _tile(self, position):
        number = self._slide[position]
        return self._grids[number].read(
            self._slides[number], self._top[position], self._left[position]
        )

    def _named(self, position):
        return (
            f"the tile at row {self._top[position]}, column {self._left[position]} of "
            f"{self._titled(self._slide[position])}"
        )

    def _titled(self, number):
        return f"slide {self.slide_ids[number]!s}"

    def _number(self, slide_id):
        found = np.flatnonzero(self.slide_ids == slide_id)
        if not len(found):
            raise ValueError(
                f"There is no slide {slide_id!r}: slide_ids are {some(self.slide_ids)}."
            )
        return found[0]

    def _warn_of(self, blank, threshold, min_tissue):
        if not blank:
            return
        names = ", ".join(str(self.slide_ids[number]) for number in blank)
        said = (
            f"No tile of slide {names} has min_tissue={min_tissue} of tissue "
            f"(tissue_threshold={threshold!r})"
        )
        fix = (
            "Lower min_tissue or tile_size for small pieces of tissue, or give a lower "
            "tissue_threshold for pale ones; None keeps all tiles."
        )
        if len(blank) == len(self._slides):
            raise ValueError(f"{said}. {fix}")
        warn(f"{said}: left out. {fix}")


class _Positions:
    """``tiles.iloc[key]``."""

    def __init__(self, tiles):
        self._tiles = tiles

    def __getitem__(self, key):
        return self._tiles.take(key)


class _Grid:
    """Where the tiles of one slide lie, and how they are read."""

    def __init__(self, slide, title, tile_size, stride, level, mpp):
        size = slide.levels[0]
        if mpp is None:
            if level >= len(slide.levels):
                raise ValueError(
                    f"level={level}, but {title} has {len(slide.levels)} level(s), from 0."
                )
            factor, full = slide.downsample(level), slide.levels[level]
        else:
            factor = _factor(slide, title, mpp)
            level = slide.best_level(factor)
            own = slide.downsample(level)
            if all(abs(f / d - 1) <= NEAR for f, d in zip(factor, own, strict=True)):
                factor = own  # so near that the tiles of the level itself do
            full = tuple(
                math.floor(side / f * (1 + 1e-9)) for side, f in zip(size, factor, strict=True)
            )
        if min(full) < tile_size:
            at = f"level {level}" if mpp is None else f"{mpp} microns per pixel"
            raise ValueError(
                f"{_capital(title)} has {full[0]} x {full[1]} pixels (height x width) at {at}, "
                f"less than tile_size={tile_size}."
            )
        self.level, self.tile_size, self.factor = level, tile_size, factor
        # Height and width of a tile in pixels of level 0.
        self.extent = tuple(f * tile_size for f in factor)
        starts = [tile_starts(side, tile_size, stride or tile_size) for side in full]
        # Corners in pixels of level 0, down and across.
        self._corners = [
            np.rint(np.array(s) * f).astype(np.int64) for s, f in zip(starts, factor, strict=True)
        ]

    def with_tissue(self, slide, threshold, min_tissue):
        """Corners (n, 2) of the tiles with enough tissue, in order, and their shares of it."""
        places = np.stack(np.meshgrid(*self._corners, indexing="ij"), axis=-1).reshape(-1, 2)
        if threshold is None:
            return places, np.full(len(places), np.nan)
        longest = math.ceil(max(slide.levels[0]) * _PER_TILE / min(self.extent))
        small = thumbnail(slide, max(1, min(_LONGEST, longest)))
        ratio = [s / full for s, full in zip(small.shape, slide.levels[0], strict=False)]
        area = math.prod(f * side for f, side in zip(ratio, self.extent, strict=True))
        mask = tissue_mask(small, threshold, min_speck=_SPECK * area, min_hole=_HOLE * area)
        share = self._shares(mask, ratio)
        kept = share >= min_tissue - 1e-9
        return places[kept], share[kept]

    def _shares(self, mask, ratio):
        """Mean of the mask over each tile, whose borders lie between pixels, (n,)."""
        for axis in (0, 1):
            sums = np.concatenate([np.zeros_like(mask[:1], np.float64), mask.cumsum(axis=0)])
            low = self._corners[axis] * ratio[axis]
            high = np.minimum(low + self.extent[axis] * ratio[axis], len(sums) - 1)

            def until(ends, sums=sums):
                whole = np.minimum(ends.astype(np.int64), len(sums) - 2)
                part = (ends - whole)[:, None]
                return sums[whole] * (1 - part) + sums[whole + 1] * part

            mask = ((until(high) - until(low)) / (high - low)[:, None]).T
        return mask.ravel()  # turned twice, so down before across again

    def read(self, slide, top, left):
        """Pixels of the tile with a corner."""
        scale = slide.downsample(self.level)
        place = [value / s for value, s in zip((top, left, *self.extent), scale * 2, strict=True)]
        return read_box(slide, self.level, *place, self.tile_size)


def tissue_mask(image, threshold="otsu", *, min_speck=0, min_hole=0):
    """Find tissue on a picture of a slide: what has more colour than the glass.

    The saturation of the picture, slightly blurred, is compared with a threshold. Grey and black
    are not tissue, so dust and what a scanner left black are none; marks of a coloured pen are
    taken for tissue, and colourless stroma beside a DAB stain is not found.

    Parameters
    ----------
    image : ndarray of shape (h, w, 3), uint8
        A thumbnail.
    threshold : "otsu" or float in [0, 1], default="otsu"
        "otsu" is Otsu's threshold, held from 0.04 to 0.06 above the glass. It alone would cut a
        slide of nothing but tissue in two halves, pale and dark, and tell noise on blank glass from
        noise. Glass is what Otsu's threshold leaves below if it is even, and has little colour
        (median saturation up to 0.15, quartiles within 0.03); else 0 is taken.
    min_speck, min_hole : float, default=0
        Pixels below which a piece of tissue is left out, and a hole is filled.

    Returns
    -------
    ndarray of shape (h, w), bool

    Raises
    ------
    ValueError
        If the image is not RGB of 8 bits, or has no pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.tissue import tissue_mask
    >>> image = np.full((40, 40, 3), 240, np.uint8)
    >>> image[10:30, 10:30] = [200, 90, 150]
    >>> bool(tissue_mask(image)[:, 20].sum() > 18)
    True
    """
    image = np.asarray(image)
    right = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not right or not image.size:
        raise ValueError(
            f"image has shape {image.shape} of {image.dtype}; it must be RGB of 8 bits, (h, w, 3) "
            "uint8, with h and w of at least 1."
        )
    saturation, lit = _saturation(image)
    if threshold == "otsu":
        threshold = _threshold(saturation[lit]) if lit.any() else 1.0
    mask = saturation > threshold
    del saturation  # of the largest thumbnails the numbers are 17 MB
    return ~_without_small(~_without_small(mask, min_speck), min_hole)


def _saturation(image):
    """Saturation of the blurred picture (h, w) float32, and which pixels are not nearly black."""
    high = low = None
    for channel in range(3):
        smooth = ndimage.gaussian_filter(image[..., channel], 1, output=np.float32)
        high = smooth if high is None else np.maximum(high, smooth)
        low = smooth if low is None else np.minimum(low, smooth)
    # Of near black the ratio is noise: a floor under the brightness makes it small.
    return (high - low) / np.maximum(high, _DARK), high > _DARK


def _threshold(saturation):
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError(
            'tissue_threshold="otsu" needs scikit-image: pip install "diffaugkit[images]". Or '
            "give a number, such as 0.07."
        ) from error
    found = threshold_otsu(saturation)
    low, glass, high = np.quantile(saturation[saturation <= found], [0.25, 0.5, 0.75])
    if glass > _GLASS or high - low > _EVEN:
        glass = 0.0
    return np.clip(found, glass + _ABOVE_GLASS[0], glass + _ABOVE_GLASS[1])


def _without_small(mask, area):
    """Leave out the connected pieces of fewer than `area` pixels."""
    labels, _ = ndimage.label(mask)
    small = np.bincount(labels.ravel()) < area
    small[0] = False
    return mask & ~small[labels]


def _factor(slide, title, mpp):
    """Pixels of level 0, down and across, of one pixel at `mpp`."""
    if slide.mpp is None:
        raise ValueError(
            f"{_capital(title)} does not say how many microns a pixel has: give slide_mpp=, or "
            "level= instead of mpp=."
        )
    factor = tuple(mpp / known for known in slide.mpp)
    if min(factor) < _ENLARGED:
        raise ValueError(
            f"{_capital(title)} has {max(slide.mpp):.4g} microns per pixel at its finest level: "
            f"mpp={mpp} would enlarge it, which adds no detail. If the file is wrong, give "
            "slide_mpp=."
        )
    return factor


def _check_numbers(tile_size, stride, level, mpp, min_tissue, threshold):
    for name, value, least in (("tile_size", tile_size, 1), ("level", level, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r} must be an int of at least {least}.")
    if stride is not None and (not isinstance(stride, Integral) or stride < 1):
        raise ValueError(f"stride={stride!r} must be an int of at least 1, or None.")
    if mpp is not None and not (isinstance(mpp, Real) and 0 < mpp < math.inf):
        raise ValueError(f"mpp={mpp!r} must be microns per pixel, a number above 0, or None.")
    if mpp is not None and level:
        raise ValueError(f"level={level} and mpp={mpp} exclude each other: give one.")
    if not isinstance(min_tissue, Real) or not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue={min_tissue!r} must be a share from 0 to 1.")
    share = isinstance(threshold, Real) and 0 <= threshold <= 1
    if threshold is not None and not share and threshold != "otsu":
        raise ValueError(
            f'tissue_threshold={threshold!r} must be "otsu", a saturation from 0 to 1, or None.'
        )


def _named_slides(slides, slide_ids):
    """Names of the slides, unique."""
    given = slide_ids is not None
    if not given:
        paths = [isinstance(slide, str | os.PathLike) for slide in slides]
        slide_ids = [
            Path(slide).stem if is_path else number
            for number, (slide, is_path) in enumerate(zip(slides, paths, strict=True))
        ]
        if any(paths):
            slide_ids = list(map(str, slide_ids))
    # Else NumPy would make the name "nan" of a missing one.
    refuse_missing(slide_ids, "slide_ids", "names", "name every slide")
    refuse_mixed(slide_ids, "slide_ids")
    names = np.asarray(slide_ids)
    if names.shape != (len(slides),):
        raise ValueError(
            f"slide_ids has shape {names.shape}, but there are {len(slides)} slides: one each."
        )
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        fix = "" if given else ": give slide_ids= for files of one name in several folders"
        raise ValueError(f"Slide names must be unique, but {unique[counts > 1][0]} is not{fix}.")
    return names


def _per_slide(slide_mpp, slide_ids):
    """One resolution for each slide, or None."""
    import pandas as pd

    n = len(slide_ids)
    if slide_mpp is None or isinstance(slide_mpp, Real):
        values = [slide_mpp] * n
    elif hasattr(slide_mpp, "items"):
        # A mapping or a Series: a list of it would be its keys, or the order of another table.
        names, counts = slide_ids.tolist(), Counter(slide_mpp.keys())
        missing = [repr(name) for name in names if counts[name] != 1]
        if missing:
            raise ValueError(
                f"slide_mpp must name each slide once, by slide_ids, but not so {some(missing)}: "
                f"it has {some(map(repr, counts))}. Give a list for the order of slides."
            )
        values = [slide_mpp[name] for name in names]
    else:
        values = list(slide_mpp)
    if len(values) != n:
        raise ValueError(f"slide_mpp has {len(values)} entries for {n} slides: one each.")
    # A column of a table, or an array of numbers, turns None into NaN.
    missing = pd.Series(values, dtype=object).isna()
    values = [None if gone else value for value, gone in zip(values, missing, strict=True)]
    for value in values:
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise ValueError(f"slide_mpp={value!r} must be microns per pixel, above 0.")
    return values
