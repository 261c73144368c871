"""Images that are decoded as they are read: files, folders, PIL images, Datasets and tar shards.

What can be known without decoding is checked before any work: that every file is there, is an
image, is not cut off, and has the size and the kind of the others. Formats that do not say where
they end (BMP, PPM) are decoded for that. The kinds are greyscale ("1", "L", "LA"), colour
("RGB", palettes, "CMYK" and the like, converted to RGB as torchvision does, an alpha channel is
dropped), 16-bit greyscale (float32, pixel range (0, 65535)) and 32-bit float greyscale. Files of
several images, such as stacks of channels, and of colours of 16 bits are refused. A camera's
orientation mark is ignored, as torchvision does.
"""

import io
import os
import re
import tarfile
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from diffaugkit.arrays import may_be_channels
from diffaugkit.image_rows import BYTES, WORDS, scan_pixels
from diffaugkit.rows import Rows

__all__ = ["DatasetRows", "FileImageRows", "ShardRows", "list_images"]

# What a mode of Pillow is read as: "L", "RGB", "I;16" (16-bit greyscale) or "F".
_READ_AS = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "P", "CMYK", "YCbCr", "HSV"), "RGB"),
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I"), "I;16"),
    "F": "F",
}
_KINDS = {"L": "greyscale", "RGB": "colour", "I;16": "16-bit greyscale", "F": "float greyscale"}
# torchvision's list for ImageFolder, so that the same files are found.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# The last bytes of a whole file, for two formats that say where they end.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_MOST_THREADS = 8
# Below this many pixels an image is decoded faster than a thread is handed its work.
_SMALL_IMAGE = 64 * 64
# Images of a shard that are read together in a shuffled epoch.
_SHARD_SHUFFLE_BLOCK = 256


class _DecodedRows(Rows):
    """Rows of images that are made one by one; a kind of source says where from.

    Parameters
    ----------
    n : int
        Number of images.
    size : tuple of (int, int)
        Width and height, Pillow's order.
    kind : str
        A value of ``_READ_AS``.
    """

    def __init__(self, n, size, kind):
        super().__init__((n, 3 if kind == "RGB" else 1, size[1], size[0]))
        self._kind = kind
        self.layout = "channels_last"
        if kind in ("L", "RGB"):
            self.dtype, self.pixel_range = np.dtype(np.uint8), BYTES
        elif kind == "I;16":
            self.pixel_range = WORDS

    @abstractmethod
    def _sources(self, positions):
        """Yield (place in `positions`, what ``_decode`` takes), in the order that reads best."""

    @abstractmethod
    def _decode(self, source):
        """Make pixels (H, W) or (H, W, C)."""

    @abstractmethod
    def _named(self, position):
        """Name the image at a position, for an error."""

    def _n_threads(self):
        """How many threads decode a batch."""
        return min(_MOST_THREADS, os.cpu_count() or 1)

    def _read(self, index):
        if isinstance(index, slice):
            index = np.arange(index.start, index.stop)
        _, channels, height, width = self.shape
        out = np.empty((len(index), height, width, channels), self.dtype)

        def place(work):
            at, source = work
            try:
                pixels = self._decode(source)
            except Exception as error:
                raise _unreadable(self._named(index[at]), error) from error
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            if pixels.shape != out.shape[1:]:
                raise ValueError(
                    f"{_capital(self._named(index[at]))} has shape {pixels.shape} (height, width, "
                    f"channels), but the first image has {out.shape[1:]}: all must have one size "
                    "and number of channels. Resize, crop or convert them first."
                )
            out[at] = pixels

        threads = min(self._n_threads(), len(index))
        if threads < 2 or height * width < _SMALL_IMAGE:
            for work in self._sources(index):
                place(work)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(place, self._sources(index)):
                    pass  # what went wrong in a thread is raised here
        return out.transpose(0, 3, 1, 2)

    def _look_at_values(self):
        """Find the scale of floating-point images; NaN is refused by its file's name."""
        if self.pixel_range is None:
            self.pixel_range, self.value_range = scan_pixels(self)


class FileImageRows(_DecodedRows):
    """Rows of image files or PIL images, decoded with Pillow as they are read.

    The headers of all files are read here, their pixels batch by batch in a few threads.

    Parameters
    ----------
    images : sequence of str, path-like or PIL.Image.Image
        The files, or the images themselves: all of one size and one kind.

    Raises
    ------
    ImportError
        Without Pillow.
    ValueError
        If a file is missing, broken, of several frames or pages, or of another size or kind than
        the first, by its name.

    Examples
    --------
    >>> from PIL import Image
    >>> from diffaugkit.image_files import FileImageRows
    >>> rows = FileImageRows([Image.new("RGB", (6, 8)), Image.new("RGB", (6, 8), "white")])
    >>> rows.shape, rows[[1, 0]][:, 0, 0, 0].tolist()
    ((2, 3, 8, 6), [255, 0])
    """

    def __init__(self, images):
        _pillow()
        self._items = [
            os.fspath(item) if isinstance(item, str | os.PathLike) else item for item in images
        ]
        if not self._items:
            raise ValueError("X holds no images.")
        self.in_memory = not any(isinstance(item, str) for item in self._items)
        size, kind = _common(
            _mapped(self._header, range(len(self._items)), not self.in_memory), self._named
        )
        super().__init__(len(self._items), size, kind)
        self._look_at_values()

    def _header(self, position):
        item = self._items[position]
        name = self._named(position)
        if not isinstance(item, str):
            if not hasattr(item, "getbands"):
                raise ValueError(
                    f"{_capital(name)} is {_described(item)}; lists of images hold paths or PIL "
                    "images."
                )
            _refuse_frames(_n_frames(item), name)
            try:
                _refuse_long_words(item)
            except Exception as error:
                raise _unreadable(name, error) from error
            return _kind_of(item, name)
        try:
            with Path(item).open("rb") as file:
                return _checked_header(file, name)
        except OSError as error:
            raise _unreadable(name, error) from error

    def _sources(self, positions):
        return ((at, self._items[position]) for at, position in enumerate(positions))

    def _decode(self, source):
        if not isinstance(source, str):
            return _pixels(source, self._kind)
        with _pillow().open(source) as image:
            return _pixels(image, self._kind)

    def _named(self, position):
        item = self._items[position]
        return f"image file {item}" if isinstance(item, str) else f"the image in row {position}"

    def _n_threads(self):
        # An image that Pillow has not loaded yet must not be loaded by two threads at once.
        return 1 if self.in_memory else super()._n_threads()


class DatasetRows(_DecodedRows):
    """Rows of a map-style Dataset, torch's or alike, which is asked for items as they are read.

    Every item is looked at once here, as only that tells sizes and pixel values. Give the dataset
    without random transforms: the estimators make their views themselves.

    Parameters
    ----------
    dataset : object with ``__len__`` and ``__getitem__``
        Its items are images or ``(image, label, ...)``, of which the label is left out. An image is
        a PIL image, a tensor (C, H, W) or (H, W), or an ndarray (H, W, C) or (H, W).

    Raises
    ------
    ValueError
        If an item is no image, cannot be read, or is of another size or type than the first; the
        message has its number.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.image_files import DatasetRows
    >>> images, labels = torch.rand(5, 3, 8, 6), torch.arange(5)
    >>> rows = DatasetRows(torch.utils.data.TensorDataset(images, labels))
    >>> rows.shape, rows.pixel_range
    ((5, 3, 8, 6), (0.0, 1.0))
    """

    def __init__(self, dataset):
        n = len(dataset)
        if not n:
            raise ValueError("X is a Dataset without items.")
        self._dataset = dataset
        self.in_memory = False  # where its items come from is its own affair
        try:
            first = self._item(0)
        except Exception as error:
            raise _unreadable(self._named(0), error) from error
        height, width = first.shape[:2]
        kind = {np.uint8: "L", np.uint16: "I;16"}.get(first.dtype.type, "F")
        super().__init__(n, (width, height), kind)
        self._type = first.dtype
        self.shape = (n, 1 if first.ndim == 2 else first.shape[2], height, width)
        if self.pixel_range is None:
            self._look_at_values()
        else:
            for _ in self.blocks():
                pass

    def _item(self, position):
        """Image of an item as (H, W) or (H, W, C)."""
        item = self._dataset[int(position)]
        image = item[0] if isinstance(item, tuple | list) else item
        if hasattr(image, "getbands"):
            _refuse_frames(_n_frames(image), self._named(position))
            return _pixels(image, _kind_of(image, self._named(position))[1])
        if hasattr(image, "detach"):
            image = image.detach().cpu()
            image = image.permute(1, 2, 0) if image.ndim == 3 else image
            image = (image.float() if image.is_floating_point() else image).numpy()
        if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
            raise ValueError(
                f"it is {_described(image)}; items are PIL images, tensors (C, H, W) or arrays "
                "(H, W, C), alone or first in a tuple"
            )
        if image.ndim == 3 and not may_be_channels(image.shape[2], image.shape[:2]):
            raise ValueError(
                f"it has {image.shape[2]} channels; tensors are (C, H, W) and arrays (H, W, C) "
                "with 1 to 4, or fewer than rows and columns"
            )
        return image

    def _sources(self, positions):
        return enumerate(positions)

    def _decode(self, source):
        image = self._item(source)
        if image.dtype != self._type:
            raise ValueError(f"its pixels are {image.dtype}, those of item 0 {self._type}")
        return image

    def _named(self, position):
        return f"item {position} of the Dataset"

    def _n_threads(self):
        return 1  # nothing says that the caller's code may run twice at once


class ShardRows(_DecodedRows):
    """Rows of WebDataset shards: tar archives of images, read at random by their offsets.

    The headers of the archives are read once. After that any image costs one read of its own
    bytes, so processes that train together read their own images only, and cross-validation, exact
    resume and any order work as for arrays. A shuffled epoch keeps 256 neighbours together.

    Parameters
    ----------
    shards : str, path-like or sequence of them
        A pattern as ``"train-{0000..0015}.tar"``, one archive or several, not compressed. Members
        with one name before the first dot are one sample. Two images in it are refused; members
        that are no images (labels) are left out, and so are samples without an image.

    Attributes
    ----------
    keys : ndarray of str of shape (n,)
        Names of the samples, to align labels with.

    Raises
    ------
    ValueError
        If a shard is missing, truncated, compressed or empty, or a member is a link, no image, or
        of another size or kind than the first; the message names shard and member.
    """

    shuffle_block = _SHARD_SHUFFLE_BLOCK

    def __init__(self, shards):
        _pillow()
        shards = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
        self._paths = [path for shard in shards for path in expand_shards(os.fspath(shard))]
        scans = list(_mapped(_scan_shard, self._paths, len(self._paths) > 1))
        counts = [len(scan) for scan in scans]
        members = [member for scan in scans for member in scan]
        if not members:
            raise ValueError(f"X has no images: none in {', '.join(self._paths)}.")
        self._shard = np.repeat(np.arange(len(scans)), counts)
        self._start, self._length = np.array([member[1:3] for member in members]).T
        self.keys = np.array([_key(member[0]) for member in members])
        size, kind = _common((member[3] for member in members), self._named)
        super().__init__(len(members), size, kind)
        self.in_memory = False
        self._look_at_values()

    def _sources(self, positions):
        shards, starts = self._shard[positions], self._start[positions]
        order = np.lexsort((starts, shards))
        for some in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if not len(some):
                continue
            path = self._paths[shards[some[0]]]
            try:
                file = Path(path).open("rb")
            except OSError as error:
                raise _unreadable(f"shard {path}", error) from error
            with file:
                for at in some:
                    file.seek(starts[at])
                    yield at, io.BytesIO(file.read(self._length[positions[at]]))

    def _decode(self, source):
        with _pillow().open(source) as image:
            return _pixels(image, self._kind)

    def _named(self, position):
        path = self._paths[self._shard[position]]
        # Names are looked up for an error only: millions of them would fill the memory.
        try:
            with tarfile.open(path, "r:") as tar:
                name = next(m.name for m in tar if m.offset_data == self._start[position])
        except (OSError, tarfile.TarError, StopIteration):
            name = self.keys[position]
        return f"member {name} of shard {path}"


def list_images(folder):
    """List the image files of a folder, a sub-folder for each label.

    The order and the labels are those of torchvision's ImageFolder, but that names which begin with
    a dot are left out. Arrays of paths work under cross-validation, where a folder cannot.

    Parameters
    ----------
    folder : str or path-like
        Where to look, to any depth; links that lead back up are left out.

    Returns
    -------
    paths : ndarray of str of shape (n,)
        The files, sorted.
    labels : ndarray of str of shape (n,)
        Names of the sub-folders of `folder` that they lie in; "" for files in `folder` itself.

    Raises
    ------
    ValueError
        If the folder does not exist or holds no images.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from diffaugkit.image_files import list_images
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "cat").mkdir()
    ...     Path(folder, "cat", "1.png").touch()
    ...     list_images(folder)[1].tolist()
    ['cat']
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    # A link to nothing is listed too: reading it names it, where leaving it out would be silent.
    found = [(str(path), "") for path in inside if _is_image_file(path.name) and not path.is_dir()]
    # A link back up would list the same files again, under another label.
    above = (folder.resolve(), *folder.resolve().parents)
    for place in (path for path in inside if path.is_dir() and path.resolve() not in above):
        for root, names in sorted(_walk(place)):
            paths = (str(Path(root) / name) for name in sorted(names) if _is_image_file(name))
            found += [(path, place.name) for path in paths]
    if not found:
        raise ValueError(f"Folder {folder} holds no images ({', '.join(_SUFFIXES)}).")
    paths, labels = zip(*found, strict=True)
    return np.array(paths), np.array(labels)


def _walk(place):
    """Yield the folders below one, itself included, and the names of their files."""
    for root, folders, names in os.walk(place, followlinks=True):
        own = Path(root).resolve()
        above = (own, *own.parents)
        # A link back up would list the same files again, forty times over.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (Path(root) / name).resolve() not in above
        ]
        yield root, names


def expand_shards(pattern):
    """Write out the ``{0000..0015}`` of a pattern of shards.

    Parameters
    ----------
    pattern : str
        Path with any number of ranges.

    Returns
    -------
    list of str

    Examples
    --------
    >>> from diffaugkit.image_files import expand_shards
    >>> expand_shards("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    if re.match(r"\w+://|pipe:", pattern):
        raise ValueError(f"Shards are read from local files: download {pattern} first.")
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    if not all(ranges):
        raise ValueError(f"The range of shards in {pattern} ends before it begins.")
    return [
        "".join(text + number for text, number in zip(parts[::3], [*numbers, ""], strict=True))
        for numbers in product(*ranges)
    ]


def _pillow():
    """Pillow's Image, which is an extra."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'Decoding images needs Pillow: pip install "diffaugkit[images]".'
        ) from error
    return Image


def _unreadable(name, error):
    said = str(error).rstrip(".") or type(error).__name__
    if type(error).__name__ == "UnidentifiedImageError":
        said = "it is no image that Pillow knows"
    if type(error).__name__ == "DecompressionBombError":
        said = (
            f"{said.partition(',')[0]}; raise PIL.Image.MAX_IMAGE_PIXELS to decode it all the same"
        )
    return ValueError(f"{_capital(name)} cannot be read: {said}.")


def _described(value):
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def _is_image_file(name):
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _mapped(function, values, threaded):
    """Like ``map``, in order, in a few threads where the work waits for the disk."""
    if not threaded or len(values) < 2:
        yield from map(function, values)
        return
    with ThreadPoolExecutor(min(_MOST_THREADS, len(values))) as pool:
        # In pieces: an error in the first file must not wait for the last.
        for start in range(0, len(values), 1024):
            yield from pool.map(function, values[start : start + 1024])


def _kind_of(image, name):
    """Size and kind of a Pillow image."""
    if image.mode not in _READ_AS:
        raise ValueError(
            f"{_capital(name)} has mode {image.mode}, which has no plain reading as grey or "
            'colour: convert it with image.convert("RGB").'
        )
    _refuse_other_bytes(image, name)
    return image.size, _READ_AS[image.mode]


def _refuse_other_bytes(image, name):
    """Refuse what Pillow decodes as bytes but the file holds in another form."""
    if _READ_AS.get(image.mode) not in ("L", "RGB"):
        return
    bits = _bits(image)
    if bits > 8:
        raise ValueError(
            f"{_capital(name)} has several channels of {bits} bits, of which Pillow would keep 8: "
            "read the files as arrays, TIFF with tifffile.imread and PNG with imagecodecs.imread, "
            "and give one array."
        )
    # SampleFormat: 2 marks integers with a sign.
    if image.format == "TIFF" and 2 in image.tag_v2.get(339, ()):
        raise ValueError(
            f"{_capital(name)} holds bytes with a sign (int8), of which Pillow would read -1 as "
            "255: read the files with tifffile.imread, and give arrays."
        )


def _bits(image):
    """Count the bits of a channel in the file of a Pillow image; 8 where nothing says more."""
    if image.format == "TIFF":
        return max(8, *image.tag_v2.get(258, (8,)))
    # Of an image not yet decoded: "RGB;16B" in PNG, ("RGB", 65535) with the white of PPM.
    stored = image.tile[0][3] if getattr(image, "tile", None) else ""
    if image.format == "PPM" and isinstance(stored, tuple):
        return max(8, stored[1].bit_length())
    return 16 if ";16" in str(stored) else 8


def _n_frames(image):
    """Count the images of a Pillow image; smaller copies of one are no images of their own."""
    # MPO is a photo with its preview.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return 1
    if image.format != "TIFF":
        return image.n_frames
    at, n = image.tell(), 0
    for frame in range(image.n_frames):
        image.seek(frame)
        # NewSubfileType: 1 marks the levels of a pyramid, 4 a mask of transparency.
        n += not image.tag_v2.get(254, 0) & 5
    image.seek(at)
    return n


def _refuse_frames(n, name, form="arrays (h, w, c), up to 4 frames as channels"):
    if n > 1:
        raise ValueError(
            f"{_capital(name)} holds {n} frames or pages, of which only the first would be read: "
            f"read the files with tifffile.imread and give {form}, or save the frame that you want "
            "as a file of its own."
        )


def _checked_header(file, name):
    """Size and kind of an image in an open file; a file that ends too early is refused."""
    Image = _pillow()
    try:
        with Image.open(file) as image:
            n_frames = _n_frames(image)
            if _may_be_cut(image, file) or image.mode == "I":
                file.seek(0)
                with Image.open(file) as again:
                    again.load()
                    _refuse_long_words(again)
    except Exception as error:  # a broken header can raise anything
        raise _unreadable(name, error) from error
    _refuse_frames(n_frames, name)
    return _kind_of(image, name)


def _may_be_cut(image, file):
    """Whether only decoding can tell that an open file is whole."""
    size = file.seek(0, os.SEEK_END)
    if image.format in _ENDS:
        # Some cameras write more behind the end.
        file.seek(-min(64, size), os.SEEK_END)
        return _ENDS[image.format] not in file.read()
    if image.format == "TIFF":
        ends = [
            start + length
            for starts, lengths in ((273, 279), (324, 325))  # of its strips, or of its tiles
            for start, length in zip(
                image.tag_v2.get(starts, ()), image.tag_v2.get(lengths, ()), strict=False
            )
        ]
        return not ends or max(ends) > size
    return image.format != "WEBP"  # which Pillow opens as a whole


def _common(headers, named):
    """Compare all headers, and give the size and kind that they have."""
    first = None
    for position, (size, kind) in enumerate(headers):
        if first is None:
            first = size, kind
        if kind != first[1]:
            cure = 'Convert the files with PIL: image.convert("RGB") or image.convert("L")'
            if {kind, first[1]} - {"L", "RGB"}:
                # PIL would clip them: nearly all pixels white, or black.
                cure = (
                    "Scale them in NumPy and give arrays: np.asarray(image) / 65535 for 16 bits, "
                    "/ 255 for 8"
                )
            raise ValueError(
                f"{_capital(named(position))} is {_KINDS[kind]}, but {named(0)} is "
                f"{_KINDS[first[1]]}: all images must be of one kind. {cure}."
            )
        if size != first[0]:
            raise ValueError(
                f"{_capital(named(position))} has {size[0]} x {size[1]} pixels (width x height), "
                f"but {named(0)} has {first[0][0]} x {first[0][1]}: all images must have one "
                "size. Resize or crop them first."
            )
    return first


def _capital(name):
    return name[0].upper() + name[1:]


def _pixels(image, kind):
    """Decode a Pillow image; its own pixels where the mode fits, else converted ones."""
    if _READ_AS.get(image.mode) != kind:
        raise ValueError(f"its mode is {image.mode} now, which is not {_KINDS[kind]}")
    if kind in ("L", "RGB"):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns where the transparency is dropped at once
        return np.asarray(image if image.mode == kind else image.convert(kind))
    _refuse_long_words(image)
    values = np.asarray(image)
    return values.astype(np.uint16 if kind == "I;16" else np.float32, copy=False)


def _refuse_long_words(image):
    """Refuse 32-bit integers that are no 16-bit grey values."""
    if image.mode == "I":
        low, high = image.getextrema() or (0, 0)  # None of an image without pixels
        if not 0 <= low <= high <= WORDS[1]:
            raise ValueError("its 32-bit integers are not 16-bit grey values (0 to 65535)")


def _key(name):
    """Name of the sample that a member of a shard belongs to: up to the first dot of its file."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _scan_shard(path):
    """List ``(name, offset, length, (size, kind))`` of the images of a shard."""
    found, before = [], {}
    name = "the beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name
                if not _is_image_file(name.rpartition("/")[2]):
                    continue
                if member.islnk() or member.issym():
                    raise ValueError(
                        f"Member {name} of shard {path} is a link to {member.linkname}, which "
                        "holds no image itself: write the shard with the files in place of links "
                        "(GNU tar: --dereference --hard-dereference)."
                    )
                if not member.isfile():
                    continue
                key = _key(name)
                if key in before:
                    raise ValueError(
                        f"Sample {key} of shard {path} has two images, {before[key]} and {name}: "
                        "write shards with one image a sample."
                    )
                before[key] = name
                title = f"member {name} of shard {path}"
                header = _checked_header(tar.extractfile(member), title)
                found.append((name, member.offset_data, member.size, header))
                tar.members = []  # tarfile would keep all of them
            end = tar.offset
        with Path(path).open("rb") as file:
            file.seek(end)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"Shard {path} cannot be read at {name}: {error}. It may be truncated or compressed; "
            "shards are plain .tar files."
        ) from error
    if not whole:
        raise ValueError(
            f"Shard {path} is truncated or broken after {name}: the mark that ends a tar archive "
            "is missing. Copy or write it anew."
        )
    return found
