"""Images at the gate: same pixels from every container, nothing copied, errors with names."""

import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.model_selection import KFold, cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from diffaugkit import batches as batches_module
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X
from diffaugkit.image_files import FileImageRows, list_images
from diffaugkit.image_rows import ImageRows, from_unit, to_unit
from diffaugkit.rows import DenseRows, MappedRows, Rows, TemporaryRows
from diffaugkit.segmentation_data import ImageList, read_masks
from diffaugkit.slides import open_slide

N, H, W = 12, 9, 7


class Pixels(TransformerMixin, BaseEstimator):
    """The smallest estimator that takes images: it gives their unit values, flattened."""

    def __init__(self, image_shape=None, min_image_size=1):
        self.image_shape = image_shape
        self.min_image_size = min_image_size

    def _rows(self, X, reset):
        return check_X(
            self,
            X,
            reset=reset,
            images=True,
            image_shape=self.image_shape,
            min_image_size=self.min_image_size,
        )

    def fit(self, X, y=None):
        self.rows_ = self._rows(X, True)
        return self

    def transform(self, X):
        if not hasattr(self, "n_features_in_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("Pixels is not fitted")
        rows = self._rows(X, False)
        return to_unit(rows[:], rows.pixel_range).flatten(1).numpy()

    def score(self, X, y=None):
        return float(len(self._rows(X, False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def gate(X, estimator=None, *, reset=True, **options):
    return check_X(estimator or Pixels(), X, reset=reset, images=True, **options)


@pytest.fixture(scope="module")
def truth():
    """(n, h, w, 3) bytes."""
    return np.random.default_rng(0).integers(0, 256, (N, H, W, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def grey(truth):
    return truth[..., 0].copy()


def write_folder(folder, images, suffix=".png", labels=None):
    """One file an image; a sub-folder a label."""
    paths = []
    for i, image in enumerate(images):
        place = Path(folder) / (labels[i] if labels is not None else "")
        place.mkdir(parents=True, exist_ok=True)
        paths.append(str(place / f"{i:04d}{suffix}"))
        Image.fromarray(image).save(paths[-1])
    return paths


def png(image, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def write_shards(folder, images, n_shards=3):
    parts = np.array_split(np.arange(len(images)), n_shards)
    for number, part in enumerate(parts):
        members = []
        for i in part:
            members += [(f"{i:05d}.png", png(images[i])), (f"{i:05d}.cls", b"1")]
        write_shard(Path(folder) / f"train-{number:04d}.tar", members)
    return str(Path(folder) / f"train-{{0000..{n_shards - 1:04d}}}.tar")


class Sequence:
    """A map-style Dataset that is not torch's: lazy columns of tables are such."""

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Items(Sequence, torch.utils.data.Dataset):
    """A Dataset of torch."""


def tensor_of(X):
    return torch.from_numpy(X.transpose(0, 3, 1, 2).copy())


MEMORY = {
    "array": lambda X: X.copy(),
    "read-only": lambda X: np.frombuffer(X.tobytes(), np.uint8).reshape(X.shape),
    "fortran": np.asfortranarray,
    "reversed": lambda X: X[::-1].copy()[::-1],
    "list of arrays": list,
    "tensor": tensor_of,
    "list of tensors": lambda X: list(tensor_of(X)),
}
DECODED = {
    "PIL images": lambda X, tmp: [Image.fromarray(x) for x in X],
    "array of PIL images": lambda X, tmp: _objects([Image.fromarray(x) for x in X]),
    "lazy PIL images": lambda X, tmp: [Image.open(path) for path in write_folder(tmp, X)],
    "paths": lambda X, tmp: write_folder(tmp, X),
    "Path objects": lambda X, tmp: tuple(map(Path, write_folder(tmp, X))),
    "array of paths": lambda X, tmp: np.array(write_folder(tmp, X)),
    "array of bytes": lambda X, tmp: np.array(write_folder(tmp, X), bytes),
    "column of paths": lambda X, tmp: np.array(write_folder(tmp, X))[:, None],
    "table of paths": lambda X, tmp: pd.DataFrame({"path": write_folder(tmp, X)}),
    "Series of paths": lambda X, tmp: pd.Series(write_folder(tmp, X), index=range(5, 5 + len(X))),
    "tiff": lambda X, tmp: write_folder(tmp, X, ".tif"),
    "folder": lambda X, tmp: write_folder(tmp, X) and str(tmp),
    "folder as bytes": lambda X, tmp: write_folder(tmp, X) and bytes(tmp),
    "folder as Path": lambda X, tmp: write_folder(tmp, X) and tmp,
    "Dataset of PIL": lambda X, tmp: Items([(Image.fromarray(x), 3) for x in X]),
    "Dataset of arrays": lambda X, tmp: Items(X),
    "Dataset of no base class": lambda X, tmp: Sequence([(Image.fromarray(x), 3) for x in X]),
    "column of PIL": lambda X, tmp: Sequence([Image.fromarray(x) for x in X]),
    "items with PIL images": lambda X, tmp: [(Image.fromarray(x), 3) for x in X],
    "Dataset of tensors": lambda X, tmp: torch.utils.data.TensorDataset(tensor_of(X)),
    "shards": lambda X, tmp: write_shards(tmp, X),
    "list of shards": lambda X, tmp: write_shards(tmp, X, 2) and sorted(tmp.glob("*.tar")),
    "list of shards as bytes": lambda X, tmp: (
        write_shards(tmp, X, 2) and [bytes(path) for path in sorted(tmp.glob("*.tar"))]
    ),
    "one shard": lambda X, tmp: write_shards(tmp, X, 1).replace("{0000..0000}", "0000"),
}


def _objects(items):
    out = np.empty(len(items), object)
    out[:] = items
    return out


def assert_same_pixels(rows, truth, dtype=torch.uint8):
    """Every way of reading gives the pixels of ``truth`` (n, h, w, c)."""
    expected = truth.transpose(0, 3, 1, 2)
    assert isinstance(rows, Rows)
    assert rows.is_image
    assert rows.shape == expected.shape
    assert rows.image_shape == truth.shape[1:]
    assert rows.n_features == truth[0].size
    assert len(rows) == len(truth)
    repeated = [5, 3, 3, 11, 0, 7, 8, -1]
    for index in (repeated, np.array(repeated), slice(3, 9), slice(10, 2, -3), slice(4, 4)):
        batch = rows[index]
        assert batch.dtype == dtype
        assert batch.is_contiguous()
        np.testing.assert_array_equal(batch.numpy(), expected[index])
    np.testing.assert_array_equal(rows[7].numpy(), expected[7])
    np.testing.assert_array_equal(rows[np.arange(N) % 3 == 0].numpy(), expected[::3])
    assert rows[[]].shape == (0, *expected.shape[1:])
    dense = np.asarray(rows)
    assert dense.dtype == expected.dtype
    np.testing.assert_array_equal(dense, expected)
    seen = torch.cat([batch for _, batch in rows.batches(batch_size=5)])
    np.testing.assert_array_equal(seen.numpy(), expected)
    with pytest.raises(IndexError):
        rows[[N]]


def content(X):
    if isinstance(X, list | tuple):
        return [content(x) for x in X]
    if isinstance(X, Image.Image):
        return X.mode, X.size, hashlib.sha256(X.tobytes()).hexdigest()
    return str(X.dtype), X.shape, hashlib.sha256(bytes(np.ascontiguousarray(X))).hexdigest()


# ---- containers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMORY)
def test_images_in_memory(name, truth):
    X = MEMORY[name](truth)
    before = content(X)
    estimator = Pixels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = gate(X, estimator)
        assert rows.tensor.dtype == torch.uint8
    assert_same_pixels(rows, truth)
    assert rows.resident
    assert rows.in_memory
    assert rows.pixel_range == (0, 255)
    assert rows.layout == ("channels_first" if "tensor" in name else "channels_last")
    np.testing.assert_array_equal(rows.tensor.numpy(), truth.transpose(0, 3, 1, 2))
    assert estimator.image_shape_ == (H, W, 3)
    assert estimator.n_features_in_ == H * W * 3
    assert (estimator._pixel_range, estimator._layout) == ((0, 255), rows.layout)
    for _, batch in rows.batches():
        batch.fill_(7)  # what is read belongs to the reader
    assert content(X) == before
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(rows))), np.asarray(rows))
    assert gate(rows, estimator) is rows
    assert gate(rows, estimator, reset=False) is rows


@pytest.mark.parametrize("name", DECODED)
def test_images_that_are_decoded(name, truth, tmp_path):
    X = DECODED[name](truth, tmp_path)
    rows = gate(X)
    assert_same_pixels(rows, truth)
    assert not rows.resident
    in_memory = {"PIL images", "array of PIL images", "lazy PIL images", "items with PIL images"}
    assert rows.in_memory == (name in in_memory)
    assert (rows.pixel_range, rows.layout) == ((0, 255), "channels_last")
    assert rows.shuffle_block == (256 if "shard" in name else 1)
    assert_same_pixels(pickle.loads(pickle.dumps(rows)), truth)
    if name == "PIL images":
        assert content(X) == content([Image.fromarray(x) for x in truth])


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL images", "paths", "Dataset", "shards"])
def test_greyscale(kind, grey, tmp_path):
    X = {
        "array": lambda: grey,
        "tensor": lambda: torch.from_numpy(grey),
        "PIL images": lambda: [Image.fromarray(x) for x in grey],
        "paths": lambda: write_folder(tmp_path, grey, ".pgm"),
        "Dataset": lambda: Items(grey),
        "shards": lambda: write_shards(tmp_path, grey),
    }[kind]()
    rows = gate(X)
    assert_same_pixels(rows, grey[..., None])
    assert rows.layout == ("grey" if kind in ("array", "tensor") else "channels_last")


@pytest.mark.parametrize("shape", [(H, W, 3), (-1, W, 3), (H, -1, 3), (H, W, -1)])
@pytest.mark.parametrize("kind", ["array", "tensor", "DataFrame", "DenseRows", "list"])
def test_flattened(kind, shape, truth):
    flat = truth.reshape(N, -1)
    X = {
        "array": flat,
        "tensor": torch.from_numpy(flat),
        "DataFrame": pd.DataFrame(flat, columns=[f"p{i}" for i in range(flat.shape[1])]),
        "DenseRows": DenseRows(flat),
        "list": flat.tolist(),
    }[kind]
    estimator = Pixels(image_shape=shape).fit(X)
    floats = kind in ("DenseRows", "list")
    dtype = torch.float32 if floats else torch.uint8
    assert_same_pixels(estimator.rows_, truth.astype(np.float32) if floats else truth, dtype)
    assert estimator.rows_.layout == "flat"
    assert estimator.image_shape_ == (H, W, 3)
    assert estimator.n_features_in_ == flat.shape[1]
    assert hasattr(estimator, "feature_names_in_") == (kind == "DataFrame")
    if kind == "array":
        assert np.shares_memory(estimator.rows_.tensor.numpy(), flat)
        with pytest.raises(ValueError, match="X has 3 features, but Pixels is expecting 189 feat"):
            estimator.transform(flat[:, :3])


def test_words_turned_round(truth):
    words = (truth.astype(np.uint16) * 100).astype(">u2")
    for X, options in ((words, {}), (words.reshape(N, -1), {"image_shape": (H, W, 3)})):
        rows = gate(X, **options)
        assert rows.pixel_range == (0, 65535)
        np.testing.assert_array_equal(rows[:].numpy(), words.transpose(0, 3, 1, 2))


def test_nothing_is_copied(truth):
    floats = (truth / 255).astype(np.float32)
    channels_first = tensor_of(truth)
    for X in (truth, floats, truth[::2], truth[..., 0], truth[:, ::2, 1:], channels_first):
        rows = gate(X)
        assert np.shares_memory(rows.tensor.numpy(), np.asarray(X))
        assert np.shares_memory(rows.block(slice(2, 4)), np.asarray(X))
        batches = make_batches(rows, batch_size=4, device="cpu")
        assert np.shares_memory(batches.sources[0].numpy(), np.asarray(X))
    assert np.shares_memory(gate([truth[3]]).tensor.numpy(), truth)  # a list of one
    doubles = gate(truth / 255)
    assert doubles.tensor.dtype == torch.float32
    np.testing.assert_array_equal(doubles.tensor.numpy(), floats.transpose(0, 3, 1, 2))


def test_batches_hold_bytes(truth):
    batches = make_batches(gate(truth), np.arange(N), batch_size=5, seed=0, device="cpu")
    for images, index in batches.epoch(0):
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), truth.transpose(0, 3, 1, 2)[index])


def test_modes_of_pillow(tmp_path):
    """Palettes, CMYK and alpha become RGB, bilevel grey; 16 bits keep all their values."""
    colour = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    for mode in ("RGBA", "P", "CMYK", "YCbCr"):
        image = colour.convert(mode)
        rows = FileImageRows([image, colour])
        np.testing.assert_array_equal(
            rows[0].permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB"))
        )
    bilevel = Image.fromarray(np.eye(4) > 0)
    assert FileImageRows([bilevel])[0].unique().tolist() == [0, 255]
    assert FileImageRows([colour.convert("LA")]).shape == (1, 1, 4, 4)
    words = np.array([[0, 1, 300], [65535, 256, 77]], np.uint16)
    for suffix in (".png", ".tif"):
        rows = gate(write_folder(tmp_path, [words], suffix))
        np.testing.assert_array_equal(rows[0].numpy(), words[None])
        assert rows.dtype == np.float32
        assert rows.pixel_range == (0, 65535)
    for order in ("<u2", ">u2"):
        assert gate((words[None] // 2).astype(order)).pixel_range == (0, 65535)
    floats = np.array([[-3.5, 0.25]], np.float32)
    rows = gate(write_folder(tmp_path, [floats], ".tif"))
    np.testing.assert_array_equal(rows[0].numpy(), floats[None])
    assert rows.pixel_range == (-3.5, 0.25)
    with pytest.raises(ValueError, match="image in row 1 has mode LAB"):
        FileImageRows([colour, Image.new("LAB", (4, 4))])
    # Of colour in 16 bits Pillow keeps the upper 8: faint images would be all but black.
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "faint.tif", np.full((4, 4, 3), 300, "u2"), photometric="rgb")
    with pytest.raises(ValueError, match=r"faint\.tif has several channels of 16 bits"):
        gate([tmp_path / "faint.tif"])


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
@pytest.mark.parametrize("planes", [False, True])
def test_colour_of_16_bits_is_refused_however_it_lies(planes, options, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    X = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3)).astype(np.uint8)
    given = X[0].transpose(2, 0, 1) if planes else X[0]
    options = {**options, "photometric": "rgb", "planarconfig": 2 if planes else 1}
    path = tmp_path / "x.tif"
    for bigtiff in (False, True):
        tifffile.imwrite(path, given, bigtiff=bigtiff, **options)
        np.testing.assert_array_equal(gate([path])[:].permute(0, 2, 3, 1), X)
    # Planes without compression were read as noise.
    tifffile.imwrite(path, given.astype(np.uint16) * 257, **options)
    for images in ([path], [Image.open(path)], Items([Image.open(path)])):
        with pytest.raises(ValueError, match=r"has several channels of 16 bits.*give one array"):
            gate(images)
    with pytest.raises(ValueError, match="it has 16 bits a channel, but slides are RGB of 8"):
        open_slide(Image.open(path))


def test_other_bytes_are_refused(tmp_path):
    (tmp_path / "x.ppm").write_bytes(b"P6\n4 4\n1023\n" + bytes(4 * 4 * 3 * 2))
    with pytest.raises(ValueError, match=r"x\.ppm has several channels of 10 bits"):
        gate([tmp_path / "x.ppm"])
    with pytest.raises(ValueError, match="it has 10 bits a channel"):
        open_slide(tmp_path / "x.ppm")
    (tmp_path / "x.ppm").write_bytes(b"P6\n4 4\n15\n" + bytes([15] * 48))
    assert gate([tmp_path / "x.ppm"])[0].unique().tolist() == [255]
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", np.full((4, 4), -1, np.int8))
    with pytest.raises(ValueError, match=r"x\.tif holds bytes with a sign.*tifffile\.imread"):
        gate([tmp_path / "x.tif"])
    with pytest.raises(ValueError, match=r"mask in row 0, .*x\.tif, holds bytes with a sign"):
        read_masks([tmp_path / "x.tif"], ImageList([gate(np.zeros((1, 4, 4), np.uint8))], [0, 255]))


def test_folders_as_in_torchvision(truth, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    labels = [["b", "a", "c/deep"][i % 3] for i in range(N)]
    write_folder(tmp_path, truth, ".PNG", labels)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    theirs = datasets.ImageFolder(tmp_path)
    paths, found = list_images(tmp_path)
    assert paths.tolist() == [path for path, _ in theirs.samples]
    assert found.tolist() == [theirs.classes[label] for _, label in theirs.samples]
    hidden = tmp_path / "a" / ".ipynb_checkpoints"
    hidden.mkdir()
    for path in (hidden / "x.png", tmp_path / "a" / "._x.png", tmp_path / ".x.png"):
        path.write_bytes(b"")
    assert list_images(str(tmp_path))[0].tolist() == paths.tolist()
    write_folder(tmp_path, truth[:1])
    assert list_images(tmp_path)[1].tolist() == ["", *found]


def test_links_in_folders(truth, tmp_path):
    write_folder(tmp_path / "images", truth, ".png", ["a/deep", "b"] * (N // 2))
    write_folder(tmp_path / "elsewhere", truth[:2], ".png")
    paths = list_images(tmp_path / "images")[0].tolist()
    # A link back up listed every image some forty times.
    back = {"a/up": "images", "a/deep/self": "images/a/deep", "again": "images", "parent": "."}
    for place, target in {**back, "b/sibling": "elsewhere"}.items():
        (tmp_path / "images" / place).symlink_to(tmp_path / target, target_is_directory=True)
    more = [str(path) for path in sorted((tmp_path / "images/b/sibling").iterdir())]
    assert sorted(list_images(tmp_path / "images")[0]) == sorted([*paths, *more])
    # What points nowhere is named, in the folder itself as below.
    for place in ("x.png", "a/x.png"):
        link = tmp_path / "images" / place
        link.symlink_to(tmp_path / "nothing")
        with pytest.raises(ValueError, match=r"x\.png cannot be read"):
            gate(tmp_path / "images")
        link.unlink()


def test_cross_validation_on_arrays_of_paths(truth, tmp_path):
    write_folder(tmp_path, truth, labels=["ab"[i % 2] for i in range(N)])
    paths, labels = list_images(tmp_path)
    for X in (paths, paths.astype(object), paths.tolist()):
        assert cross_val_score(Pixels(), X, labels, cv=3).tolist() == [4.0, 4.0, 4.0]
    train, test = next(KFold(3).split(paths))
    expected = Pixels().fit(np.stack([np.asarray(Image.open(p)) for p in paths[train]]))
    got = Pixels().fit(paths[train]).transform(paths[test])
    images = np.stack([np.asarray(Image.open(p)) for p in paths[test]])
    np.testing.assert_array_equal(got, expected.transform(images))


# ---- scales --------------------------------------------------------------------------------------

UNIT_TOLERANCE = 2e-7


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, st.tuples(*map(st.integers, (1, 5, 5, 1), (3, 7, 7, 4)))),
    st.sampled_from(["channels_last", "channels_first", "grey", "flat"]),
)
def test_round_trip_of_bytes_is_exact(array, kind):
    if kind == "channels_first":
        X, options = tensor_of(array), {}
    elif kind == "flat":
        X, options = array.reshape(len(array), -1), {"image_shape": array.shape[1:]}
    else:
        X, options = (array[..., 0] if kind == "grey" else array), {}
    rows = gate(X, **options)
    assert rows.layout == kind
    unit = to_unit(rows[:], rows.pixel_range)
    assert unit.dtype == torch.float32
    expected = np.asarray(rows).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(unit.numpy(), expected, rtol=0, atol=UNIT_TOLERANCE)
    back = from_unit(unit, rows.pixel_range, rows.layout)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, np.asarray(X))


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(0.015625, 1e4, width=32),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_of_floats(low, span, seed):
    X = np.random.default_rng(seed).uniform(low, low + span, (3, 5, 6, 2)).astype(np.float32)
    rows = gate(X)
    unit = to_unit(rows[:], rows.pixel_range)
    assert -1 - 1e-6 <= unit.min() <= unit.max() <= 1 + 1e-6
    back = from_unit(unit, rows.pixel_range, rows.layout)
    assert back.dtype == np.float32
    largest = max(map(abs, rows.pixel_range)) + rows.pixel_range[1] - rows.pixel_range[0]
    np.testing.assert_allclose(back, X, rtol=0, atol=2 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 1)),
        (0.2, 0.9, (0, 1)),
        (-0.1, 0.9, (-1, 1)),
        (-1, 1, (-1, 1)),
        (0, 16, (0, 16)),
        (-3, 1.5, (-3, 1.5)),
        (5, 5, (5, 5)),
    ],
)
def test_pixel_range_of_floats(low, high, expected):
    X = np.full((4, 6, 5, 3), low, np.float32)
    X[-1] = high
    rows = gate(X)
    assert rows.pixel_range == expected
    assert rows.value_range == pytest.approx((low, high))
    unit = to_unit(rows[:], rows.pixel_range)
    assert unit.isfinite().all()
    np.testing.assert_allclose(from_unit(unit, rows.pixel_range), X, atol=1e-6)


def test_unit_keeps_what_it_is_given():
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for pixel_range in ((0, 1), (-1, 1), (-2.5, 3.0), None):
        unit = to_unit(x, pixel_range)
        from_unit(unit, pixel_range)
        assert torch.equal(x, before)
    assert to_unit(x.double(), None).dtype == torch.float32
    assert from_unit(torch.full((1, 1, 1, 1), 9.0), (-2, 3)).item() == 3
    assert from_unit(torch.full((1, 1, 1, 1), 9.0), None).item() == 9
    with pytest.raises(ValueError, match="layout='rows' must be one of"):
        from_unit(x, (0, 1), "rows")
    with pytest.raises(ValueError, match="has one channel, but x has 2"):
        from_unit(x.reshape(1, 2, 4, 4), (0, 1), "grey")


def test_scales_after_fit(truth):
    """Bytes and floats of a picture give the same unit values; another scale is an error."""
    unit = truth.transpose(0, 3, 1, 2).reshape(N, -1) / 127.5 - 1
    zero_one, symmetric = (truth / 255).astype(np.float32), (truth / 127.5 - 1).astype(np.float32)
    for fitted in (truth, zero_one):
        estimator = Pixels().fit(fitted)
        for X in (truth, zero_one, tensor_of(truth), tensor_of(zero_one)):
            np.testing.assert_allclose(estimator.transform(X), unit, atol=1e-6)
        for X in (zero_one * 255, zero_one * 700):
            with pytest.raises(ValueError, match=r"X holds floats from 0 to .* was fitted on"):
                estimator.transform(X)
    estimator = Pixels().fit(truth)
    with pytest.raises(ValueError, match=r"floats from -1 to 1, but .* fitted on integers from 0"):
        estimator.transform(symmetric)
    # The values decide, never the batch: a bright image alone is read as among the others.
    estimator = Pixels().fit(symmetric)
    bright = np.maximum(symmetric, 0)
    np.testing.assert_allclose(estimator.transform(bright), np.maximum(unit, 0), atol=1e-6)
    np.testing.assert_allclose(estimator.transform(truth), unit, atol=1e-6)
    assert gate(bright).pixel_range == (0, 1)
    # A learned range is the estimator's own; bytes do not say where they would lie in it.
    estimator = Pixels().fit(symmetric * 3 + 1)
    np.testing.assert_allclose(estimator.transform(symmetric[:1] * 3 + 1), unit[:1], atol=1e-6)
    np.testing.assert_allclose(
        estimator.transform(bright[:1]), (np.maximum(unit[:1], 0) - 1) / 3, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"uint8 pixels from 0 to 255, but .* floats from -2"):
        estimator.transform(truth)
    # A MinMaxScaler meets values a little outside.
    estimator = Pixels().fit(zero_one)
    assert estimator.transform(zero_one * 1.2 - 0.1).min() == pytest.approx(-1.2, abs=1e-6)


def test_rows_given_keep_their_own_scale(truth):
    rows = gate(np.maximum(truth / 127.5 - 1, 0))
    estimator = Pixels().fit(truth / 127.5 - 1)
    read = gate(rows, estimator, reset=False)
    assert (rows.pixel_range, read.pixel_range) == ((0, 1), (-1, 1))
    assert read.tensor.data_ptr() == rows.tensor.data_ptr()


def test_layouts_of_transform(truth):
    """Same height, width and channels: the layout is free."""
    unit = Pixels().fit(truth).transform(truth)
    estimator = Pixels().fit(tensor_of(truth))
    np.testing.assert_array_equal(estimator.transform(truth), unit)
    generated = from_unit(
        torch.from_numpy(unit).view(N, 3, H, W), estimator._pixel_range, estimator._layout
    )
    assert generated.shape == (N, 3, H, W)
    np.testing.assert_array_equal(estimator.transform(generated), unit)
    np.testing.assert_array_equal(Pixels().fit(truth).transform(list(tensor_of(truth))), unit)


# ---- errors --------------------------------------------------------------------------------------


def _broken(paths, how):
    path = Path(paths[4])
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image at all")
    else:
        path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".ppm", ".webp"])
@pytest.mark.parametrize("how", ["missing", "empty", "text", "truncated"])
def test_broken_files_are_named_at_the_gate(how, suffix, truth, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3)).astype(np.uint8)
    paths = write_folder(tmp_path, images, suffix)
    path = _broken(paths, how)
    with pytest.raises(ValueError, match=rf"Image file .*{path.name} cannot be read: "):
        gate(paths)


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
def test_cut_tiff_files_are_named_at_the_gate(options, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    paths = [str(tmp_path / f"{row}.tif") for row in range(3)]
    for path, image in zip(paths, images, strict=True):
        tifffile.imwrite(path, image, photometric="rgb", **options)
    np.testing.assert_array_equal(gate(paths)[:].numpy(), images.transpose(0, 3, 1, 2))
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes()[:-800])
    shard = [(Path(path).name, Path(path).read_bytes()) for path in paths]
    for X in (paths, write_shard(tmp_path / "a.tar", shard)):
        with pytest.raises(ValueError, match=r"2\.tif.* cannot be read: "):
            gate(X)


def test_whole_tiff_files_are_not_decoded_at_the_gate(truth, tmp_path, monkeypatch):
    paths = write_folder(tmp_path, truth, ".tif")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert gate(paths).shape == (N, 3, H, W)


def test_long_integers_are_refused_at_the_gate(grey, tmp_path):
    paths = write_folder(tmp_path, grey.astype(np.int32), ".tif")
    assert gate(paths).pixel_range == (0, 65535)
    np.testing.assert_array_equal(gate(paths)[:][:, 0].numpy(), grey)
    Image.fromarray(np.full((H, W), 70_000, np.int32)).save(paths[4])
    with pytest.raises(ValueError, match=r"0004\.tif cannot be read: its 32-bit integers are not"):
        gate(paths)
    with pytest.raises(ValueError, match="image in row 1 cannot be read: its 32-bit integers"):
        gate([Image.open(paths[3]), Image.open(paths[4])])


def test_a_file_that_breaks_later_is_named(truth, tmp_path):
    paths = write_folder(tmp_path, np.repeat(np.repeat(truth, 10, 1), 10, 2))
    rows = gate(paths)  # large enough for threads
    path = _broken(paths, "truncated")
    assert rows[[0, 1]].shape == (2, 3, 10 * H, 10 * W)
    with pytest.raises(ValueError, match=f"Image file .*{path.name} cannot be read: "):
        rows[:]
    Image.fromarray(truth[0]).save(path)
    with pytest.raises(ValueError, match=rf"{path.name} has shape \(9, 7, 3\)"):
        rows[:]


def test_bytes_behind_the_end_are_welcome(truth, tmp_path):
    paths = write_folder(tmp_path, truth[:3], ".jpg")
    rows = gate(paths)
    with Path(paths[1]).open("ab") as file:
        file.write(b"a camera's own notes" * 20)
    np.testing.assert_array_equal(np.asarray(gate(paths)), np.asarray(rows))


def test_several_frames_are_refused(truth, grey, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    stack, slices = tmp_path / "stack.tif", tmp_path / "slices.tif"
    tifffile.imwrite(stack, grey[:5], photometric="minisblack")
    tifffile.imwrite(slices, np.zeros((16, 20, 5), np.uint16))  # by default 16 pages of 20 x 5
    pictures = [Image.fromarray(x) for x in truth]
    options = {"save_all": True, "append_images": pictures[1:3]}
    for suffix in ("gif", "png", "webp"):
        pictures[0].save(tmp_path / f"moves.{suffix}", **options)
    for name, n in (
        ("stack.tif", 5),
        ("slices.tif", 16),
        ("moves.gif", 3),
        ("moves.png", 3),
        ("moves.webp", 3),
    ):
        path = tmp_path / name
        message = rf"{name} holds {n} frames or pages.*tifffile\.imread and give arrays \(h, w, c\)"
        with pytest.raises(ValueError, match=message):
            gate([path])
        with pytest.raises(ValueError, match=f"in row 0 holds {n} frames"):
            gate([Image.open(path)])
    with pytest.raises(ValueError, match="Item 1 of the Dataset holds 5 frames"):
        gate(Items([pictures[0], Image.open(stack)]))
    shard = write_shard(tmp_path / "a.tar", [("0.tif", stack.read_bytes())])
    with pytest.raises(ValueError, match=r"Member 0\.tif of shard .* holds 5 frames"):
        gate(shard)
    # One frame taken out, the levels of a pyramid, and the preview of a photo are welcome.
    image = Image.open(stack)
    image.seek(3)
    np.testing.assert_array_equal(gate([image.copy()])[0][0].numpy(), grey[3])
    with tifffile.TiffWriter(tmp_path / "levels.tif") as file:
        file.write(truth[0], photometric="rgb")
        file.write(truth[0, ::2, ::2], photometric="rgb", subfiletype=1)
    pictures[0].save(tmp_path / "photo.mpo", **options)
    Path(tmp_path / "photo.mpo").rename(tmp_path / "photo.jpg")
    for path in (tmp_path / "levels.tif", tmp_path / "photo.jpg"):
        first = np.asarray(Image.open(path)).transpose(2, 0, 1)
        np.testing.assert_array_equal(gate([path])[0].numpy(), first)
        np.testing.assert_array_equal(gate([Image.open(path)])[0].numpy(), first)


def test_masks_of_two_forms_or_several_frames_are_refused(truth, tmp_path):
    from diffaugkit import DiffusionSegmenter

    segmenter = DiffusionSegmenter(None, max_epochs=1)
    masks = [truth[row, ..., 0] > 100 for row in range(4)]
    bits = write_folder(tmp_path / "bits", masks)
    paths = write_folder(tmp_path / "bytes", [255 * mask.astype(np.uint8) for mask in masks])
    for mixed in ([bits[0], *paths[1:]], [masks[0], *(2 * m.astype(int) for m in masks[1:])]):
        with pytest.raises(ValueError, match=r"row 0 is of bools .* in row 1 holds label (255|2)"):
            segmenter.fit(truth[:4], mixed)
    # In one form, and beside 0 and 1, bools are labels.
    images = ImageList([gate(truth[:4])], [(0, 255)])
    found = read_masks([bits[0], *masks[1:3], masks[3].astype(np.uint8)], images)
    np.testing.assert_array_equal(np.stack(found), masks)
    frames = [Image.fromarray(m.astype(np.uint8)) for m in masks]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:2])
    for mixed in (tmp_path / "two.tif", Image.open(tmp_path / "two.tif")):
        with pytest.raises(
            ValueError, match=r"mask in row 3, .*two\.tif, holds 2 frames.*\(h, w\)"
        ):
            segmenter.fit(truth[:4], [*masks[:3], mixed])


@pytest.mark.parametrize("how", ["missing", "empty", "text", "truncated"])
def test_masks_that_cannot_be_read_are_named(how, grey, tmp_path):
    paths = write_folder(tmp_path, grey)
    images = ImageList([gate(grey)], [(0, 255)])
    np.testing.assert_array_equal(read_masks(list(map(os.fsencode, paths)), images), grey)
    path = _broken(paths, how)
    message = rf"The mask in row 4, .*{path.name}, cannot be read: "
    with pytest.raises(ValueError, match=message):
        read_masks(paths, images)
    if how == "truncated":
        with pytest.raises(ValueError, match=message):
            read_masks([*paths[:4], Image.open(path), *paths[5:]], images)


def test_mixed_images_are_named(truth, grey, tmp_path):
    paths = write_folder(tmp_path, truth)
    Image.fromarray(truth[3][:4]).save(paths[3])
    with pytest.raises(
        ValueError, match=r"0003.png has 7 x 4 pixels .*, but image file .*0000.png has 7 x 9"
    ):
        gate(paths)
    Image.fromarray(grey[3]).save(paths[3])
    with pytest.raises(ValueError, match=r"0003.png is greyscale, but .*0000.png is colour.*conve"):
        gate(paths)
    # PIL would clip 16 bits and floats to white or black.
    for odd, kind in ((grey[3].astype(np.uint16), "16-bit"), (np.float32(grey[3]), "float")):
        mixed = write_folder(tmp_path / kind, [grey[0], grey[1]], ".tif")
        Image.fromarray(odd).save(mixed[1])
        with pytest.raises(
            ValueError, match=rf"is {kind} grey.*np\.asarray\(image\) / 65535"
        ) as raised:
            gate(mixed)
        assert "convert" not in str(raised.value)
    with pytest.raises(ValueError, match="The image in row 2 is a NoneType; lists of images hold"):
        gate([paths[0], paths[1], None])
    images = [Image.fromarray(x) for x in truth]
    images[5] = images[5].resize((20, 30))
    with pytest.raises(ValueError, match="The image in row 5 has 20 x 30 pixels"):
        gate(images)
    with pytest.raises(ValueError, match=r"image in row 2 has shape \(4, 7, 3\)"):
        gate([*truth[:2], truth[2][:4]])
    # Stacked, the second would be black beside the first.
    for as_given in (np.asarray, torch.from_numpy):
        mixed = [as_given(truth[0]), as_given(truth[1] / 255)]
        with pytest.raises(ValueError, match=r"image in row 1 is of float64, but .* 0 of uint8"):
            gate(mixed)
    assert gate([truth[0] / 255, np.float32(truth[1] / 255)]).pixel_range == (0, 1)
    for odd in (truth[0][:4], truth[0].astype(np.float32), grey[0], "text"):
        with pytest.raises(ValueError, match="Item 2 of the Dataset"):
            gate(Items([truth[0], truth[1], odd]))
    with pytest.raises(ValueError, match="Item 0 of the Dataset cannot be read: it has 9 channels"):
        gate(Items(tensor_of(truth).permute(0, 2, 3, 1)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["array", "tensor", "flat", "tiff", "Dataset"])
def test_not_finite(kind, value, truth, tmp_path):
    X = (truth[..., :1] / 255).astype(np.float32)
    X[8, 3, 2, 0] = value
    given, where, options = X, "row 8", {}
    if kind == "tensor":
        given = tensor_of(X)
    elif kind == "flat":
        given, options = X.reshape(N, -1), {"image_shape": (H, W, 1)}
    elif kind == "tiff":
        given, where = write_folder(tmp_path, X[..., 0], ".tif"), "image file .*0008.tif"
    elif kind == "Dataset":
        given, where = Items(X), "item 8 of the Dataset"
    word = "NaN" if np.isnan(value) else "infinity"
    with pytest.raises(ValueError, match=f"contains {word}.* in {where}"):
        gate(given, **options)


def test_clear_errors(truth, grey, tmp_path):
    cases = [
        (tensor_of(truth).numpy(), {}, r"channel-last .* not 7.*transpose\(0, 2, 3, 1\)"),
        (torch.from_numpy(truth), {}, r"channel-first .* axis 1, .*, not 9.*permute\(0, 3, 1, 2\)"),
        (np.zeros((2, 8, 8, 9)), {}, r"1 to 4 channels on axis 3, .*, not 9\."),
        (np.zeros((2, 8, 8, 8)), {}, r"1 to 4 channels on axis 3, .*, not 8\."),
        (np.zeros((2, 5, 8, 8)), {}, r"1 to 4 channels on axis 3, .*, not 8\."),
        (truth[0], {}, r"looks like one colour image.*X\[None\]"),
        (truth[None], {}, "Found array with dim 5|images are"),
        (truth[:0], {}, r"0 sample\(s\)"),
        (np.array([["a.png", "b.png"]]), {}, "could not convert|dtype"),
        ([], {}, "Expected 2D array|minimum|empty"),
        (truth.astype(complex), {}, "dtype complex128"),
        (truth.reshape(N, -1), {"image_shape": (8, 8, 3)}, "image_shape=.* rows have 189 values"),
        (truth.reshape(N, -1), {"image_shape": (-1, -1, 3)}, "of which one may be -1"),
        (truth.reshape(N, -1), {"image_shape": (H, W + 0.5, 3)}, "three numbers of at least 1"),
        (truth.reshape(N, -1), {"image_shape": 189}, "three numbers of at least 1"),
        (truth.reshape(N, -1), {"image_shape": (-1, 8, 3)}, "does not fit X, whose rows have 189"),
        (truth, {"image_shape": (8, 8, 3)}, r"does not fit X, whose images are \(9, 7, 3\)"),
        (truth, {"min_image_size": 8}, "9 x 7 pixels, but Pixels needs at least 8 x 8"),
        (str(tmp_path / "none"), {}, "no folder of images and no .tar shard"),
        (tmp_path, {}, "holds no images"),
        (str(tmp_path / "none-{00..01}.tar"), {}, "none-00.tar cannot be read"),
        ("s3://bucket/a-{00..01}.tar", {}, "local files: download"),
        ("a-{03..01}.tar", {}, r"range of shards in a-\{03\.\.01\}.tar ends before it begins"),
        (write_shard(tmp_path / "a.tar.gz", []), {}, "no images: none in .*tar.gz"),
    ]  # fmt: skip
    for X, options, message in cases:
        with pytest.raises(ValueError, match=message):
            gate(X, **options)
    path = write_folder(tmp_path, truth[:1])[0]
    with pytest.raises(ValueError, match=r"\[X\] for a single image"):
        gate(path)
    for X in (sp.csr_matrix(grey.reshape(N, -1)), gate(sp.csr_matrix(grey.reshape(N, -1)))):
        with pytest.raises(TypeError, match="dense data is required"):
            gate(X, image_shape=(H, W, 1))
    for X in (png(truth[0]), [png(truth[0])]):
        with pytest.raises(TypeError, match="in files, as bytes: give their paths, or images"):
            gate(X)
    with pytest.raises(TypeError, match="stream"):
        gate(iter([truth]))
    with pytest.raises(TypeError, match=r"X\.dataset"):
        gate(torch.utils.data.DataLoader([*truth]))
    with pytest.raises(TypeError, match="sparse tensor"):
        gate(tensor_of(truth).float().to_sparse())


def test_estimators_of_vectors_refuse_images(truth, tmp_path):
    for X in (truth, truth[..., 0], torch.from_numpy(truth), gate(truth)):
        with pytest.raises(ValueError, match=r"takes vectors, of shape \(n, d\)"):
            check_X(Pixels(), X, reset=True)
    with pytest.raises(ValueError, match="takes vectors"):
        check_X(Pixels(), tmp_path, reset=True)


def test_images_and_vectors_are_told_apart(truth):
    flat = truth.reshape(N, -1).astype(np.float32)
    estimator = Pixels().fit(truth)
    with pytest.raises(ValueError, match=r"\(9, 6, 3\), but Pixels was fitted on \(9, 7, 3\)"):
        estimator.transform(truth[:, :, :6])
    with pytest.raises(ValueError, match=r"\(12, 189\) holds vectors, but .* fitted on images"):
        estimator.transform(flat)
    estimator.fit(flat)
    assert isinstance(estimator.rows_, DenseRows)
    assert not estimator.rows_.is_image
    assert estimator.rows_.pixel_range is estimator.rows_.layout is None
    assert estimator.image_shape_ is estimator._pixel_range is estimator._layout is None
    with pytest.raises(ValueError, match=r"\(9, 7, 3\), but Pixels was fitted on vectors of 189"):
        estimator.transform(truth)


def test_a_failed_check_keeps_what_was_learned(truth):
    estimator = Pixels().fit(truth)
    known = dict(vars(estimator))
    for X in (truth[:0], np.full((2, 8, 8, 3), np.nan), [[np.nan]], truth[:, :2]):
        with pytest.raises(ValueError, match=r"minimum|NaN|needs at least 5 x 5"):
            gate(X, estimator, min_image_size=5)
        assert vars(estimator) == known


def test_check_estimator():
    check_estimator(Pixels(image_shape=(1, -1, 1)))
    check_estimator(Pixels(image_shape=(-1, 1, 1)))


# ---- shards --------------------------------------------------------------------------------------


def test_shards_are_read_once_by_all_ranks(truth, tmp_path, monkeypatch):
    images = np.arange(23 * 4 * 4, dtype=np.int64).reshape(23, 4, 4) % 251
    images[:, 0, 0] = np.arange(23)
    pattern = write_shards(tmp_path, images.astype(np.uint8), 4)
    rows = gate(pattern)
    rows.shuffle_block = 3
    assert rows.keys.tolist() == [f"{i:05d}" for i in range(23)]
    for world in (1, 2, 3):
        seen = []
        for rank in range(world):
            monkeypatch.setattr(batches_module, "process_rank", lambda at=(rank, world): at)
            read, decode = [], rows._decode
            with monkeypatch.context() as patch:
                patch.setattr(rows, "_decode", lambda s, d=decode, r=read: r.append(1) or d(s))
                batches = make_batches(rows, np.arange(23), batch_size=6, device="cpu")
                for batch, index in batches.epoch(1):
                    assert batch[:, 0, 0, 0].tolist() == index.tolist()
                    seen += index.tolist()
            assert len(read) <= -(-23 // world) + 4
        assert sorted(seen) == list(range(23))


def test_broken_shards_are_named(truth, tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    members = [(f"s/{i}.jpg", png(big[i], "JPEG")) for i in range(4)]
    path = Path(write_shard(tmp_path / "a.tar", members))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [(m.offset, m.offset_data, m.size) for m in tar]
    assert len(gate(path)) == 4
    middle, header, between = offsets[2][1] + 700, offsets[2][0] + 100, offsets[3][0]
    for cut in (middle, header, between):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"(?i)shard .*a.tar.*(s/1.jpg|s/2.jpg|end)"):
            gate(path)
    # A member whose middle is lost: found when it is read, by its name.
    _, start, size = offsets[1]
    path.write_bytes(whole)
    rows = gate(path)
    path.write_bytes(whole[:start] + b"\0" * size + whole[start + size :])
    with pytest.raises(ValueError, match=r"Member s/1.jpg of shard .*a.tar cannot be read"):
        rows[:]
    with pytest.raises(ValueError, match=r"Member s/1.jpg of shard .* cannot be read: it is no"):
        gate(path)
    write_shard(path, [("0.png", png(truth[0])), ("0.mask.png", png(truth[1]))])
    with pytest.raises(ValueError, match=r"Sample 0 of shard .* two images, 0.png and 0.mask.png"):
        gate(path)
    write_shard(path, [("0.png", png(truth[0])), ("1.png", png(truth[1][:3]))])
    with pytest.raises(ValueError, match=r"Member 1.png of shard .* has 7 x 3 pixels"):
        gate(path)
    # Archives of a Mac hold a file of its own beside each.
    write_shard(path, [("./0.png", png(truth[0])), ("./._0.png", b"Mac"), ("./._1.png", b"Mac")])
    assert len(gate(path)) == 1
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        write_shard(path, [("0.png", png(truth[0]))])
        with tarfile.open(path, "a") as tar:
            entry = tarfile.TarInfo("1.png")
            entry.type, entry.linkname = kind, "0.png"
            tar.addfile(entry)
        with pytest.raises(ValueError, match=r"Member 1\.png of shard .* link to 0\.png.*--deref"):
            gate(path)
    write_shard(path, [("0.txt", b"text")])
    with pytest.raises(ValueError, match="no images"):
        gate(path)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(write_folder(tmp_path, truth[:1])[0], "0.png")
    with pytest.raises(ValueError, match=r"shards are plain \.tar files"):
        gate(tmp_path / "b.tar")


# ---- memory and lazy Rows ------------------------------------------------------------------------


def test_memory_does_not_follow_the_folder(tmp_path):
    image = np.zeros((128, 128, 3), np.uint8)
    path = write_folder(tmp_path, [image])[0]
    peaks = []
    for n in (60, 240):
        tracemalloc.start()
        rows = gate([path] * n)
        for _ in rows.batches(16):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2e5  # 240 images are 11.8 MB
    assert peaks[1] < 5e6


def test_memory_of_the_pixel_range_is_bounded():
    X = np.random.default_rng(0).random((300, 64, 64, 3), np.float32)  # 14.7 MB
    tracemalloc.start()
    gate(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def double(batch):
    return batch * 2


def halves(batch):
    return batch.float()[:, :, ::2, ::2] / 255


def test_lazy_images_and_latents(truth, tmp_path):
    rows = gate(truth)
    latents = MappedRows(rows, halves, (3, 5, 4))
    assert latents.is_image
    assert latents.pixel_range is None
    expected = truth.transpose(0, 3, 1, 2)[:, :, ::2, ::2] / np.float32(255)
    np.testing.assert_array_equal(np.asarray(latents), expected)
    estimator = Pixels().fit(latents)
    assert estimator.image_shape_ == (5, 4, 3)
    np.testing.assert_array_equal(estimator.transform(latents), expected.reshape(N, -1))
    mirror = partial(torch.flip, dims=[3])
    mirrored = MappedRows(rows, mirror, (3, H, W), pixel_range=(0, 255))
    assert_same_pixels(mirrored, truth[:, :, ::-1])
    assert_same_pixels(pickle.loads(pickle.dumps(mirrored)), truth[:, :, ::-1])
    assert MappedRows(DenseRows(expected.reshape(N, -1)), double, 60).shape == (N, 60)
    path = tmp_path / "latents"
    path.write_bytes(expected.tobytes())
    stored = TemporaryRows(path, expected.shape)
    assert_same_pixels(stored, expected.transpose(0, 2, 3, 1), torch.float32)
    del stored
    assert not path.exists()


def test_rows_like_others(truth):
    rows = gate(truth.reshape(N, -1), image_shape=(H, W, 3))
    images = np.asarray(rows)[:5]
    for made in (ImageRows.like(rows, images), ImageRows.like(rows, torch.from_numpy(images))):
        assert (made.shape, made.layout, made.pixel_range) == ((5, 3, H, W), "flat", (0, 255))
        np.testing.assert_array_equal(np.asarray(made), images)
    lazy = MappedRows(rows, double, (3, H, W))
    made = ImageRows.like(rows, lazy)
    assert (made.layout, made.pixel_range, lazy.pixel_range) == ("flat", (0, 255), None)


def test_more_channels_than_four():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (6, 12, 10, 7)).astype(np.uint8)
    for images in (X, tensor_of(X)):
        rows = check_X(Pixels(), images, reset=True, images=True)
        assert rows.shape == (6, 7, 12, 10)
    assert gate(Items(list(X))).shape == gate(Items(list(tensor_of(X)))).shape == (6, 7, 12, 10)
    for images in (X, tensor_of(X)):
        rows = check_X(Pixels(), images, reset=True, images=True)
        np.testing.assert_array_equal(rows[:].permute(0, 2, 3, 1), X)


@pytest.mark.parametrize(
    ("dtype", "high", "largest"),
    [
        (np.uint16, 4095, 4095),
        (np.uint16, 3000, 4095),  # of a camera of 12 bits
        (np.uint16, 16383, None),
        (np.uint8, 20, 31),
        (np.uint8, 60, None),
        (np.float32, 0.06, 0.06),
        (np.float32, 0.5, None),
        (np.float32, 4095, None),  # floats beyond 1 have the scale of their values
        (np.uint8, 0, None),  # one colour is another matter
    ],
)
def test_dim_images_are_warned_of(dtype, high, largest, tmp_path):
    X = np.zeros((150, 6, 5), dtype)
    X[60:90, :3] = high
    forms = [X]
    if dtype != np.float32:
        for row, image in enumerate(X):
            Image.fromarray(image).save(tmp_path / f"{row:03}.png")
        forms.append(tmp_path)
    for number, images in enumerate(forms):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rows = check_X(Pixels(), images, reset=True, images=True)
            check_X(Pixels(), rows, reset=True, images=True)  # our own say nothing again
        # Files of bytes are not decoded to know.
        assert len(seen) == (largest is not None and not (number and dtype == np.uint8))
        if seen:
            assert f"between 0 and {high:g}, a small part" in str(seen[0].message)
            assert f"X / {largest:g}," in str(seen[0].message)
