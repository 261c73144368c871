"""Slides: pictures too large for the memory, of which only the regions that are asked for are read.

Three kinds. An array, which may be a memory map, is cut. A whole-slide file is read region by
region by tiffslide or openslide, whichever is installed. An ordinary picture has to be decoded as a
whole; what was decoded last is kept, up to a bound. Files are opened by the process that reads
them, so slides can be pickled and go to forked workers.
"""

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from mmap import mmap
from pathlib import Path

import numpy as np

from diffaugkit.image_files import _pillow

__all__ = ["Slide", "open_slide", "read_box", "thumbnail"]

# Formats that tiffslide and openslide do not know, and that Pillow decodes as a whole.
_PICTURES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".gif")
# Pillow's names of what becomes RGB.
_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
# The packages that read whole-slide files, the preferred one first, and their classes.
_READERS = {"tiffslide": "TiffSlide", "openslide": "OpenSlide"}
# Decoded pictures that a process keeps, in bytes.
_KEPT_BYTES = 2**30
_DECODED = OrderedDict()
# Pixels of a slide that are read together for a thumbnail.
_BAND_PIXELS = 2**22
# A level whose pixels are this near to the size asked for is read without rescaling.
NEAR = 0.01
_EXTRA = 'pip install "diffaugkit[slides]"'


class Slide(ABC):
    """A large RGB picture at one or several levels of resolution.

    Subclass it to read a format of your own: ``__init__`` sets `levels`, and :meth:`read` gives a
    region. It should be possible to pickle it, and to use it after a fork: open files when reading.

    Attributes
    ----------
    levels : list of (int, int)
        Height and width at each level, the finest first.
    mpp : tuple of (float, float) or None
        Microns per pixel of level 0, down and across, where the slide knows them.
    cheap : bool
        Whether a region costs no more than its own pixels, so that threads may read several.
    in_memory : bool
        Whether reading touches no disk.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.slides import Slide
    >>> from diffaugkit.tissue import TissueTiles
    >>> class Pink(Slide):
    ...     levels = [(4000, 3000), (1000, 750)]
    ...
    ...     def read(self, level, top, left, height, width):
    ...         return np.full((height, width, 3), (220, 150, 190), np.uint8)
    >>> TissueTiles([Pink()], 500)
    TissueTiles(1 slide, 48 tiles of 500 x 500)
    """

    mpp = None
    cheap = True
    in_memory = False

    @abstractmethod
    def read(self, level, top, left, height, width):
        """Read a region.

        Parameters
        ----------
        level : int
            Number of the level.
        top, left, height, width : int
            The region, in pixels of the level; it lies inside.

        Returns
        -------
        ndarray of shape (height, width, 3), uint8
            It may be a view: callers never write to it.
        """

    def downsample(self, level):
        """Say how many pixels of level 0, down and across, a pixel of a level spans."""
        return tuple(s / size for s, size in zip(self.levels[0], self.levels[level], strict=True))

    def best_level(self, factor):
        """Find the coarsest level whose pixels span at most `factor` (down, across) of level 0."""
        fine = [
            at
            for at in range(len(self.levels))
            if all(d <= f * (1 + NEAR) for d, f in zip(self.downsample(at), factor, strict=True))
        ]
        return max(fine, key=self.downsample, default=0)


class ArraySlide(Slide):
    """A slide in memory, or in a memory map.

    Of a map only its place in the file is kept, and each read maps it anew: pages that were touched
    would else stay in the memory of the process, and a pickle would hold the pixels.
    """

    def __init__(self, array):
        self.levels, self._array, self._place = [array.shape[:2]], array, None
        self.in_memory = not isinstance(array, np.memmap)
        # Of a part of a map nothing tells where it begins, and what was written to a map of mode
        # "c" is in no file.
        whole = not self.in_memory and isinstance(array.base, mmap) and array.mode != "c"
        if whole and array.filename and array.flags.c_contiguous:
            self._array = None
            self._place = os.fspath(array.filename), array.dtype, "r", array.offset, array.shape

    def read(self, level, top, left, height, width):
        array = self._array if self._place is None else np.memmap(*self._place)
        return np.asarray(array[top : top + height, left : left + width])


class PictureSlide(Slide):
    """An ordinary picture file, decoded as a whole when a tile of it is read."""

    cheap = False

    def __init__(self, path):
        self._path = os.fspath(path)
        with _pillow().open(path) as image:
            _check_form(image.mode in _MODES, f"mode {image.mode}")
            self.levels = [(image.height, image.width)]

    def read(self, level, top, left, height, width):
        return self._pixels()[top : top + height, left : left + width]

    def _pixels(self):
        kept = _DECODED
        # Two files of one name, one after the other, are two pictures.
        key = self._path, Path(self._path).stat().st_mtime_ns
        if key not in kept:
            with _pillow().open(self._path) as image:
                pixels = _rgb(image)
            if pixels.shape[:2] != self.levels[0]:
                raise ValueError("the file has changed since it was opened")
            while kept and pixels.nbytes + sum(one.nbytes for one in kept.values()) > _KEPT_BYTES:
                kept.popitem(last=False)
            kept[key] = pixels
        kept.move_to_end(key)
        return kept[key]


class FileSlide(Slide):
    """A whole-slide file, read by tiffslide or by openslide.

    Parameters
    ----------
    path : str or path-like
        The file.
    package : {"tiffslide", "openslide"}
        The reader.
    """

    def __init__(self, path, package):
        self._path, self._package = os.fspath(path), package
        self._handle = None, None
        opened = self._opened()
        self.levels = [(height, width) for width, height in opened.level_dimensions]
        self._downsamples = list(opened.level_downsamples)
        found = [opened.properties.get(f"{package}.mpp-{axis}") for axis in "yx"]
        if all(found):
            self.mpp = tuple(float(value) for value in found)

    def _opened(self):
        # A handle that a fork copied would share its place in the file with the parent's.
        if self._handle[0] != os.getpid():
            reader = getattr(importlib.import_module(self._package), _READERS[self._package])
            self._handle = os.getpid(), reader(self._path)
        return self._handle[1]

    def read(self, level, top, left, height, width):
        scale = self._downsamples[level]
        # Both packages take the corner in pixels of level 0, and round down.
        corner = math.ceil(left * scale), math.ceil(top * scale)
        region = np.asarray(self._opened().read_region(corner, level, (width, height)))
        shape = region.shape[2:] or (1,)
        _check_form(shape[0] in (3, 4), f"{shape[0]} channels")
        _check_form(region.dtype == np.uint8, f"{region.dtype} pixels")
        if shape[0] == 4 and region[..., 3].min() < 255:
            # What the scanner left out is transparent: it shows as glass.
            alpha = region[..., 3:] / np.float32(255)
            return np.rint(region[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return region[..., :3]

    def __getstate__(self):
        return {**self.__dict__, "_handle": (None, None)}


def open_slide(slide):
    """Find out what a slide is, and read its size but no pixels.

    Parameters
    ----------
    slide : str, path-like, PIL image, ndarray of shape (h, w, 3) uint8, or Slide
        Whole-slide files and pictures by their path.

    Returns
    -------
    Slide

    Raises
    ------
    ValueError
        If a file is missing or cannot be read, or if the pixels are not RGB of 8 bits. The caller
        says which slide it was.
    ImportError
        If the file needs a reader of whole-slide files, and none is installed.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.slides import open_slide
    >>> open_slide(np.zeros((300, 200, 3), np.uint8)).levels
    [(300, 200)]
    """
    if isinstance(slide, Slide):
        return slide
    if isinstance(slide, str | os.PathLike):
        return _open_path(Path(slide))
    if hasattr(slide, "getbands"):
        _check_form(slide.mode in _MODES, f"mode {slide.mode}")
        return ArraySlide(_rgb(slide))
    array = np.asanyarray(slide)
    _check_form(array.ndim == 3 and array.shape[2] == 3, f"shape {array.shape}")
    _check_form(array.dtype == np.uint8, f"{array.dtype} pixels")
    return ArraySlide(array)


def read_box(slide, level, top, left, height, width, size):
    """Read a box whose borders may lie between pixels, rescaled to a square.

    Parameters
    ----------
    slide : Slide
        What to read from.
    level : int
        At which level.
    top, left, height, width : float
        The box, in pixels of the level.
    size : int
        Side of the result.

    Returns
    -------
    ndarray of shape (size, size, 3), uint8
        The pixels themselves where the box has `size` of them; else averaged over triangles
        (Pillow's bilinear filter), without aliasing.
    """
    full = slide.levels[level]
    box, whole = [], []
    for start, length, end in zip((top, left), (height, width), full, strict=True):
        length = min(length, end)
        start = min(start, end - length)
        if abs(length - size) < 1e-6:
            length, start = size, round(start)
        box.append((start, start + length))
        whole.append((math.floor(start), min(math.ceil(start + length), end)))
    (y0, y1), (x0, x1) = whole
    pixels = slide.read(level, y0, x0, y1 - y0, x1 - x0)
    if pixels.shape[:2] == (size, size) and box == whole:
        return pixels
    Image = _pillow()
    bottom, right = min(box[0][1], y1) - y0, min(box[1][1], x1) - x0
    inside = (box[1][0] - x0, box[0][0] - y0, right, bottom)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=inside))


def thumbnail(slide, longest=2048):
    """Make a small picture of a slide, from the coarsest level that suffices, band by band.

    Parameters
    ----------
    slide : Slide
        The slide.
    longest : int, default=2048
        Most pixels of a side.

    Returns
    -------
    ndarray of shape (h, w, 3), uint8

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.slides import open_slide, thumbnail
    >>> thumbnail(open_slide(np.zeros((300, 200, 3), np.uint8)), longest=30).shape
    (30, 20, 3)
    """
    Image = _pillow()
    factor = max(1, *(side / longest for side in slide.levels[0]))
    height, width = (max(1, round(side / factor)) for side in slide.levels[0])
    level = slide.best_level((factor, factor))
    full = slide.levels[level]
    ratio = full[0] / height
    step = max(1, round(_BAND_PIXELS / (ratio * full[1])))
    # Two rows speak for all that an array has in a row of the thumbnail: fewer pages are read.
    skip = max(1, int(ratio) // 2) if isinstance(slide, ArraySlide) else 1
    out = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, step):
        stop = min(start + step, height)
        top, bottom = start * ratio, min(stop * ratio, full[0])
        first = math.floor(top)
        band = slide.read(level, first, 0, min(math.ceil(bottom), full[0]) - first, full[1])
        band = np.ascontiguousarray(band[skip // 2 :: skip])
        box = (0, top - first, full[1], bottom - first) if skip == 1 else None
        shrunk = Image.fromarray(band).resize((width, stop - start), Image.Resampling.BOX, box=box)
        out[start:stop] = shrunk
    return out


def _rgb(image):
    """Pixels (h, w, 3) of a PIL image; what is transparent shows as glass."""
    if image.mode != "RGBA" and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    glass = _pillow().new("RGB", image.size, "white")
    glass.paste(image, mask=image)
    return np.asarray(glass)


def _check_form(right, found):
    if not right:
        raise ValueError(
            f"it has {found}, but slides are RGB of 8 bits: arrays (h, w, 3) uint8 (image[..., :3] "
            "drops an alpha channel), colour pictures"
        )


def _open_path(path):
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the paths of the slides in it")
    if path.suffix.lower() in _PICTURES:
        return PictureSlide(path)
    if path.suffix.lower() in (".tif", ".tiff"):
        mapped = _mapped_tiff(path)
        if mapped is not None:
            return mapped
    failures = []
    for package in _READERS:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:
            if getattr(error, "name", None) != package:  # it is there, but not what it needs
                failures.append(f"{package} cannot be imported: {str(error).rstrip('.')}")
            continue
        try:
            slide = FileSlide(path, package)
        except Exception as error:  # each format has errors of its own
            failures.append(f"{package}: {str(error).rstrip('.') or type(error).__name__}")
            continue
        slide.read(len(slide.levels) - 1, 0, 0, 1, 1)
        return slide
    try:
        return PictureSlide(path)
    except Exception as error:
        if not failures:
            raise ImportError(
                f"{path} needs a reader of whole-slide files, and neither tiffslide nor openslide "
                f"is installed: {_EXTRA}."
            ) from error
        raise ValueError("; ".join(failures)) from error


def _mapped_tiff(path):
    """Map an uncompressed TIFF in one piece into memory, where tifffile is installed."""
    try:
        import tifffile
    except ImportError:
        return None
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            _check_form(page.dtype == np.uint8, f"{page.dtype} pixels")
            if page.photometric == 5:
                return PictureSlide(path)  # CMYK, whose black the readers take for alpha
            # RGB, row by row: what has alpha or planes is read by Pillow.
            if not page.is_memmappable or page.shape[2:] != (3,) or page.photometric != 2:
                return None
            tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]
            unit = page.tags.get("ResolutionUnit")
        slide = open_slide(tifffile.memmap(path, page=0, mode="r"))
    except tifffile.TiffFileError as error:
        raise ValueError(f"it is no TIFF ({error})") from error
    # Centimetres are what scanners write; inches are the 72 or 96 dots of screens.
    if unit is not None and unit.value == 3 and all(tag and tag.value[0] for tag in tags):
        slide.mpp = tuple(1e4 * tag.value[1] / tag.value[0] for tag in tags)
    return slide
