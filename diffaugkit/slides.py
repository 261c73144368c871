"""Slides: pictures too large for the memory, of which only the regions that are asked for are read.

Three kinds. An array, which may be a memory map, is cut. A whole-slide file is read region by
region by tiffslide or openslide, whichever is installed. An ordinary picture has to be decoded as a
whole; what was decoded last is kept, up to a bound, and so are open files. Files are opened by the
process that reads them, so slides can be pickled and go to forked workers.
"""

import contextlib
import importlib
import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import product
from mmap import mmap
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from diffaugkit.arrays import warn
from diffaugkit.image_files import _bits, _n_frames, _pillow, _unreadable
from diffaugkit.image_rows import BYTES
from diffaugkit.rows import Rows

__all__ = ["Slide", "SlideRows", "find_slide", "open_slide", "read_box", "thumbnail"]

# Formats that tiffslide and openslide do not know, and that Pillow decodes as a whole.
_PICTURES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".gif")
# Pillow's names of what becomes RGB.
_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
# Names that only whole-slide files have: Pillow would decode as a whole, or show their preview.
_WHOLE_SLIDES = (
    *(".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".qptiff"),
    *(".scn", ".svs", ".svslide", ".vms", ".vmu"),
)
# Pixels from which on a TIFF is read in part; smaller ones are decoded faster than opened.
_LARGE_TIFF = 2**24
# TIFF's numbers of palettes, CMYK and L*a*b*, and of the compressions that know nothing of colours.
_NO_RGB, _LOSSLESS = (3, 5, 8), (1, 5, 8, 32773, 32946, 50000)
# The packages that read whole-slide files, the preferred one first, and their classes.
_READERS = {"tiffslide": "TiffSlide", "openslide": "OpenSlide"}
# Decoded pictures that a process keeps, in bytes.
_KEPT_BYTES = 2**30
_DECODED = OrderedDict()
# Whole-slide files that a process has open, the one used last at the end, and how many it keeps.
_OPEN, _MOST_OPEN = weakref.WeakKeyDictionary(), 256
_LOCK = threading.Lock()
# Pixels of a slide that are read together for a thumbnail.
_BLOCK_PIXELS = 2**23
# Microns of the units of OME-XML that a pixel of a slide may be given in.
_MICRONS = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4}
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
        Image = _pillow()
        try:
            with Image.open(path) as image:
                _check_picture(image)
                self.levels = [(image.height, image.width)]
                _warn_of_pages(path, _n_frames(image))
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{str(error).partition(',')[0]}. Write it as a tiled TIFF, which is read in part, "
                "or raise PIL.Image.MAX_IMAGE_PIXELS to decode it as a whole"
            ) from error

    def read(self, level, top, left, height, width):
        return self._pixels()[top : top + height, left : left + width]

    def _pixels(self):
        kept = _DECODED
        # Two files of one name, one after the other, are two pictures.
        key = self._path, Path(self._path).stat().st_mtime_ns
        with _LOCK:
            if key not in kept:
                with _pillow().open(self._path) as image:
                    pixels = _rgb(image)
                if pixels.shape[:2] != self.levels[0]:
                    raise ValueError("the file has changed since it was opened")
                room = _KEPT_BYTES - pixels.nbytes
                while kept and sum(one.nbytes for one in kept.values()) > room:
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
        self._reader, self._n_users = None, 0
        with self._opened() as reader:
            self.levels = [(height, width) for width, height in reader.level_dimensions]
            self._downsamples = list(reader.level_downsamples)
            found = [reader.properties.get(f"{package}.mpp-{axis}") for axis in "yx"]
            self.mpp = _ome_mpp(reader.properties.get("tiff.ImageDescription"))
        if self.mpp is None and all(found):
            self.mpp = tuple(float(value) for value in found)

    @contextlib.contextmanager
    def _opened(self):
        with _LOCK:
            if self._reader is None:
                kind = getattr(importlib.import_module(self._package), _READERS[self._package])
                self._reader = kind(self._path)
            self._n_users += 1
            _OPEN.pop(self, None)
            _OPEN[self] = True  # the last, as used last
            idle = [slide for slide in _OPEN if not slide._n_users]
            for slide in idle[: max(0, len(_OPEN) - _most_open())]:
                slide._close()
        try:
            yield self._reader
        finally:
            with _LOCK:
                self._n_users -= 1

    def _close(self):
        _OPEN.pop(self, None)
        reader, self._reader = self._reader, None
        reader.close()

    def read(self, level, top, left, height, width):
        scale = self._downsamples[level]
        # Both packages take the corner in pixels of level 0, and round down.
        corner = math.ceil(left * scale), math.ceil(top * scale)
        with self._opened() as reader:
            region = np.asarray(reader.read_region(corner, level, (width, height)))
        shape = region.shape[2:] or (1,)
        _check_form(shape[0] in (3, 4), f"{shape[0]} channels")
        _check_form(region.dtype == np.uint8, f"{region.dtype} pixels")
        if shape[0] == 4 and region[..., 3].min() < 255:
            # What the scanner left out is transparent: it shows as glass.
            alpha = region[..., 3:] / np.float32(255)
            return np.rint(region[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return region[..., :3]

    def __getstate__(self):
        return {**self.__dict__, "_reader": None, "_n_users": 0}


def _most_open():
    """How many files to keep open: others of the process need theirs, and each takes memory."""
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_OPEN
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(_MOST_OPEN, limit // 4) if limit > 0 else _MOST_OPEN  # -1 is none


def _forget():
    """Drop what a fork copied: it would share its places in the files with the parent's."""
    global _LOCK
    _LOCK = threading.Lock()
    for slide in list(_OPEN):
        slide._reader, slide._n_users = None, 0
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


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
        _check_picture(slide)
        return ArraySlide(_rgb(slide))
    array = np.asanyarray(slide)
    _check_form(array.ndim == 3 and array.shape[2] == 3, f"shape {array.shape}")
    _check_form(array.dtype == np.uint8, f"{array.dtype} pixels")
    return ArraySlide(array)


def find_slide(item):
    """Open what is better read in part than decoded as a whole: of anything else it is None.

    Parameters
    ----------
    item : object
        An image, a path or a Slide.

    Returns
    -------
    Slide or None
        For a Slide, for whole-slide files, which are known by their names, and for large RGB files
        of TIFF with one page beside the levels of a pyramid.

    Raises
    ------
    ValueError
        If the file is missing or cannot be read, by its name.
    ImportError
        If it needs a reader of whole-slide files, and none is installed.
    """
    if isinstance(item, Slide):
        return item
    if not isinstance(item, str | os.PathLike):
        return None
    suffix = Path(item).suffix.lower()
    whole = suffix in _WHOLE_SLIDES or (suffix in (".tif", ".tiff") and _is_large_rgb(item))
    if not whole:
        return None
    try:
        return open_slide(item)
    except ImportError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise _unreadable(f"slide {item}", error) from error


def _is_large_rgb(path):
    try:
        from PIL.TiffImagePlugin import TiffImageFile  # unlike Image.open, it has no limit of size

        with TiffImageFile(path) as image:
            large = image.width * image.height >= _LARGE_TIFF
            return large and image.mode in ("RGB", "YCbCr") and _n_frames(image) == 1
    except Exception:  # whatever is wrong, who reads it as a picture says
        return False


class SlideRows(Rows):
    """A slide as a set of one image, its finest level, of which any part can be read.

    Parameters
    ----------
    slide : Slide
        The slide.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.slides import SlideRows, open_slide
    >>> rows = SlideRows(open_slide(np.zeros((300, 200, 3), np.uint8)))
    >>> rows.shape, rows.region(290, 0, 10, 20).shape
    ((1, 3, 300, 200), (3, 10, 20))
    """

    dtype, pixel_range, layout = np.dtype(np.uint8), BYTES, "channels_last"

    def __init__(self, slide):
        super().__init__((1, 3, *slide.levels[0]))
        self._slide, self.in_memory = slide, slide.in_memory

    def region(self, top, left, height, width):
        """Read pixels (3, height, width) of a place inside."""
        return _region(self._slide, 0, top, left, height, width).transpose(2, 0, 1)

    def _read(self, index):
        return self.region(0, 0, *self.shape[2:])[None][index]


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
    pixels = _region(slide, level, y0, x0, y1 - y0, x1 - x0)
    if pixels.shape[:2] == (size, size) and box == whole:
        return pixels
    Image = _pillow()
    bottom, right = min(box[0][1], y1) - y0, min(box[1][1], x1) - x0
    inside = (box[1][0] - x0, box[0][0] - y0, right, bottom)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=inside))


def thumbnail(slide, longest=2048):
    """Make a small picture of a slide, from the coarsest level that suffices, part by part.

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
    down, across = full[0] / height, full[1] / width
    # Arrays lie row by row. Files lie in tiles: of those that a block cuts, its neighbour decodes
    # the rest again, so blocks are as good as square.
    by_row = isinstance(slide, ArraySlide)
    columns = width if by_row else max(1, round(math.sqrt(_BLOCK_PIXELS) / across))
    rows = max(1, round(_BLOCK_PIXELS / (down * across * min(columns, width))))
    # Two rows speak for all that an array has in a row of the thumbnail: fewer pages are read.
    skip = max(1, int(down) // 2) if by_row else 1
    out = np.empty((height, width, 3), np.uint8)
    for row, column in product(range(0, height, rows), range(0, width, columns)):
        part = out[row : row + rows, column : column + columns]
        top, left = row * down, column * across
        bottom, right = top + len(part) * down, left + part.shape[1] * across
        y, x = math.floor(top), math.floor(left)
        end_y, end_x = min(math.ceil(bottom), full[0]), min(math.ceil(right), full[1])
        block = _region(slide, level, y, x, end_y - y, end_x - x)
        box = left - x, top - y, min(right, end_x) - x, min(bottom, end_y) - y
        image = Image.fromarray(np.ascontiguousarray(block[skip // 2 :: skip]))
        size = part.shape[1::-1]
        part[:] = image.resize(size, Image.Resampling.BOX, box=box if skip == 1 else None)
    return out


def _region(slide, level, top, left, height, width):
    """Read a region, and refuse what a class of the user's own may give instead."""
    pixels = np.asarray(slide.read(level, top, left, height, width))
    right = pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    _check_form(right, f"a region of {pixels.dtype} pixels and shape {pixels.shape}")
    return pixels


def _rgb(image):
    """Pixels (h, w, 3) of a PIL image; what is transparent shows as glass."""
    if image.mode != "RGBA" and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    glass = _pillow().new("RGB", image.size, "white")
    glass.paste(image, mask=image)
    return np.asarray(glass)


def _check_picture(image):
    _check_form(image.mode in _MODES, f"mode {image.mode}")
    bits = _bits(image)
    _check_form(bits == 8, f"{bits} bits a channel")  # of which Pillow would keep 8


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
            # The readers take pixels as they lie for RGB, but for YCbCr inside JPEG.
            if page.photometric in _NO_RGB or (
                page.photometric == 6 and page.compression in _LOSSLESS
            ):
                return PictureSlide(path)
            # RGB, row by row: what has alpha or planes is read by Pillow.
            if not page.is_memmappable or page.shape[2:] != (3,) or page.photometric != 2:
                return None
            others = [other for other in file.pages if not other.subfiletype & 5]
            _warn_of_pages(path, sum(other.shape == page.shape for other in others))
            tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]
            unit, description = page.tags.get("ResolutionUnit"), page.description
        slide = open_slide(tifffile.memmap(path, page=0, mode="r"))
    except tifffile.TiffFileError as error:
        raise ValueError(f"it is no TIFF ({error})") from error
    slide.mpp = _ome_mpp(description)
    # Centimetres are what scanners write; inches are the 72 or 96 dots of screens.
    in_cm = unit is not None and unit.value == 3 and all(tag and tag.value[0] for tag in tags)
    if slide.mpp is None and in_cm:
        slide.mpp = tuple(1e4 * tag.value[1] / tag.value[0] for tag in tags)
    return slide


def _warn_of_pages(path, n):
    if n > 1:
        warn(
            f"{path} holds {n} pages or frames, of which the first is the slide: save another one "
            "as a file of its own, or read it with tifffile.imread and give the array."
        )


def _ome_mpp(description):
    """Microns per pixel, down and across, that the OME-XML of a TIFF tells; None without."""
    if not str(description).rstrip().endswith("OME>"):
        return None
    try:
        pixels = ElementTree.fromstring(description).find(".//{*}Pixels")
        found = tuple(
            float(pixels.get(f"PhysicalSize{axis}"))
            # Of the two letters that look like this one, writers take either.
            * _MICRONS[pixels.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ")]
            for axis in "YX"
        )
    except (ElementTree.ParseError, AttributeError, KeyError, TypeError, ValueError):
        return None  # not said, or in units of the microscope's stage
    return found if all(0 < value < math.inf for value in found) else None
