"""Slides become tiles: where tissue is found, what is read and how much, and which way they go."""

import importlib
import multiprocessing
import os
import pickle
import struct
import sys
import time
import tracemalloc
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GroupKFold, cross_val_score

from diffaugkit import AttentionMILClassifier, SelfSupervisedEncoder
from diffaugkit import slides as readers
from diffaugkit.slides import FileSlide, Slide, open_slide, thumbnail
from diffaugkit.tissue import TissueTiles, tissue_mask

GLASS, PINK, PURPLE = (241, 240, 243), (225, 150, 190), (110, 60, 140)


def painted(height=256, width=384, box=(64, 192, 128, 320), seed=0):
    """A slide of glass with one piece of tissue, pink with purple nuclei, and some noise."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), GLASS, np.int16)
    top, bottom, left, right = box
    tissue = image[top:bottom, left:right]
    tissue[:] = PINK
    tissue[rng.random(tissue.shape[:2]) < 0.3] = PURPLE
    return np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slide():
    return painted()


def cut(image, tiles):
    """The tiles of a table, cut from the array."""
    size = tiles.shape[2]
    return [image[r : r + size, c : c + size] for r, c in tiles.table[["row", "column"]].to_numpy()]


# ---- where tissue is ----------------------------------------------------------------------------


def test_table_has_the_tiles_with_tissue_and_their_share(slide):
    tiles = TissueTiles([slide], 64, min_tissue=0.5)
    table = tiles.table
    assert list(table) == ["slide", "row", "column", "height", "width", "level", "tissue"]
    assert set(zip(table["row"], table["column"], strict=True)) == {
        (row, column) for row in (64, 128) for column in (128, 192, 256)
    }
    assert (table["tissue"] > 0.95).all()
    assert (table[["height", "width"]] == 64).all(axis=None)
    assert (table["level"] == 0).all()


def test_share_is_that_of_the_tile():
    image = painted(128, 128, (0, 128, 0, 96))
    table = TissueTiles([image], 64, min_tissue=0).table
    np.testing.assert_allclose(table["tissue"], [1, 0.5, 1, 0.5], atol=0.04)
    assert len(TissueTiles([image], 64, min_tissue=0.6)) == 2


def test_the_last_tiles_end_at_the_border():
    table = TissueTiles([painted(100, 150, (0, 100, 0, 150))], 64, stride=50).table
    assert sorted(set(table["row"])) == [0, 36]
    assert sorted(set(table["column"])) == [0, 50, 86]


def test_a_slide_of_nothing_but_tissue_keeps_all_tiles():
    image = painted(256, 256, (0, 256, 0, 256))
    image[128:] = np.clip(image[128:].astype(int) - 60, 0, 255)  # dark and pale halves
    assert len(TissueTiles([image], 64)) == 16
    real = pytest.importorskip("skimage.data").immunohistochemistry()[:256, :192]
    assert len(TissueTiles([real], 64)) == 12


@pytest.mark.parametrize("glass", [(255, 255, 255), (241, 240, 243), (200, 200, 200), (0, 0, 0)])
def test_a_blank_slide_is_an_error_that_names_it(glass):
    noise = np.random.default_rng(0).integers(-4, 5, (128, 128, 3))
    blank = np.clip(np.array(glass) + noise, 0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match=r"No tile of slide b7 has min_tissue=0.5 of tissue"):
        TissueTiles([blank], 64, slide_ids=["b7"])
    assert len(TissueTiles([blank], 64, min_tissue=0)) == 4


def test_a_blank_slide_among_others_is_a_warning(slide):
    blank = np.full((128, 128, 3), 244, np.uint8)
    with pytest.warns(UserWarning, match="No tile of slide b .*: left out"):
        tiles = TissueTiles([slide, blank], 64, slide_ids=["a", "b"])
    assert set(tiles.groups) == {"a"}
    assert list(tiles.slide_ids) == ["a", "b"]


def test_yellow_glass_black_borders_and_dust_are_no_tissue():
    image = np.full((256, 256, 3), (236, 230, 212), np.uint8)
    image[:64] = 0
    image[100:110, 30:40] = (60, 62, 61)
    image[128:, 128:] = painted(128, 128, (0, 128, 0, 128))
    table = TissueTiles([image], 64).table
    assert sorted(zip(table["row"], table["column"], strict=True)) == [
        (row, column) for row in (128, 192) for column in (128, 192)
    ]


def test_small_pieces_go_and_small_holes_are_filled():
    image = np.full((60, 60, 3), 240, np.uint8)
    image[10:50, 10:50] = PINK
    image[25:31, 25:31] = 240
    image[3:6, 3:6] = PINK
    mask = tissue_mask(image, min_speck=25, min_hole=60)
    assert mask[28, 28]
    assert not mask[4, 4]
    plain = tissue_mask(image)
    assert not plain[28, 28]
    assert plain[4, 4]


def test_threshold_of_the_user(slide):
    assert len(TissueTiles([slide], 64, tissue_threshold=0.2)) == 6
    with pytest.raises(ValueError, match=r"tissue_threshold=0\.9"):
        TissueTiles([slide], 64, tissue_threshold=0.9)
    everything = TissueTiles([slide], 64, tissue_threshold=None)
    assert len(everything) == 24
    assert everything.table["tissue"].isna().all()


# ---- what is read -------------------------------------------------------------------------------


def as_npy(image, folder):
    np.save(folder / "slide.npy", image)
    return np.load(folder / "slide.npy", mmap_mode="r")


def as_memmap(image, folder):
    (folder / "raw.bin").write_bytes(bytes(16) + image.tobytes())
    return np.memmap(folder / "raw.bin", np.uint8, "r", 16, image.shape)


def as_file(image, folder, suffix, **options):
    path = folder / f"slide.{suffix}"
    Image.fromarray(image).save(path, **options)
    return path


def as_tiff(image, folder, **options):
    tifffile.imwrite(folder / "slide.tif", image, photometric="rgb", **options)
    return str(folder / "slide.tif")


KINDS = {
    "array": lambda image, folder: image,
    "part of an array": lambda image, folder: np.pad(image, ((9, 5), (3, 8), (0, 0)))[9:-5, 3:-8],
    "npy": as_npy,
    "memmap": as_memmap,
    "PIL": lambda image, folder: Image.fromarray(image),
    "RGBA": lambda image, folder: Image.fromarray(image).convert("RGBA"),
    "png": lambda image, folder: as_file(image, folder, "png"),
    "mapped tiff": as_tiff,
    "alpha tiff": lambda image, folder: as_tiff(
        np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]), folder, extrasamples=[2]
    ),
    "planar tiff": lambda image, folder: as_tiff(
        image.transpose(2, 0, 1), folder, planarconfig="separate"
    ),
    "packed tiff": lambda image, folder: as_file(image, folder, "tiff", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_pixels_of_the_slide(kind, slide, tmp_path):
    tiles = TissueTiles([KINDS[kind](slide, tmp_path)], 50, stride=40)
    expected = np.stack(cut(slide, tiles))
    assert tiles.shape == (len(expected), 3, 50, 50)
    assert tiles[0].dtype == torch.uint8
    np.testing.assert_array_equal(np.asarray(tiles).transpose(0, 2, 3, 1), expected)
    np.testing.assert_array_equal(tiles.read(-1), expected[-1])
    np.testing.assert_array_equal(tiles[[3, 0]].permute(0, 2, 3, 1), expected[[3, 0]])
    again = pickle.loads(pickle.dumps(tiles))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(tiles))


@pytest.mark.parametrize("kind", ["npy", "memmap", "mapped tiff", "png"])
def test_files_are_pickled_by_their_names(kind, tmp_path):
    image = painted(512, 512, (0, 512, 0, 512))
    tiles = TissueTiles([KINDS[kind](image, tmp_path)], 256)
    assert not tiles.in_memory
    assert len(pickle.dumps(tiles)) < 5000


def resident():
    """Bytes of the process in memory, where the system tells."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split("VmRSS:")[1].split()[0]) if status.exists() else 0


def test_a_large_map_is_read_in_part(tmp_path):
    side = 20_000
    image = np.memmap(tmp_path / "large.bin", np.uint8, "w+", shape=(side, side, 3))
    image[9000:9800, 5000:5600] = painted(800, 600, (0, 800, 0, 600))
    before = resident()
    start = time.perf_counter()
    tracemalloc.start()
    tiles = TissueTiles([image], 256, min_tissue=0.3)
    tiles[:2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = time.perf_counter() - start
    assert 4 <= len(tiles) <= 16
    assert peak < 120e6  # of 1.2 GB
    assert resident() - before < 200e6
    assert seconds < 20
    assert tiles.table["row"].between(8700, 9800).all()
    np.testing.assert_array_equal(tiles.read(0), cut(image, tiles)[0])


def test_pictures_that_are_kept_have_a_bound(tmp_path, monkeypatch):
    images = [painted(seed=seed) for seed in range(3)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    monkeypatch.setattr(readers, "_KEPT_BYTES", 2 * images[0].nbytes)
    tiles = TissueTiles(paths, 64)
    rows = np.random.default_rng(0).permutation(len(tiles))
    expected = np.concatenate(
        [cut(i, tiles.take(tiles.groups == str(k))) for k, i in enumerate(images)]
    )
    np.testing.assert_array_equal(tiles[rows].permute(0, 2, 3, 1), expected[rows])
    assert len(readers._DECODED) <= 2


# ---- resolution ---------------------------------------------------------------------------------


def test_microns_per_pixel_rescale():
    image = np.zeros((240, 360, 3), np.uint8)
    image[..., 0] = np.arange(360) / 2
    image[..., 1] = np.arange(240)[:, None] / 2
    tiles = TissueTiles([image], 40, mpp=0.75, slide_mpp=0.25, tissue_threshold=None)
    assert tiles.table["row"].unique().tolist() == [0, 120]
    assert (tiles.table[["height", "width"]] == 120).all(axis=None)
    means = image[120:, :120].reshape(40, 3, 40, 3, 3).mean(axis=(1, 3))
    found = tiles.read(3).astype(float)
    np.testing.assert_allclose(found[1:-1, 1:-1], means[1:-1, 1:-1], atol=1.5)


def test_nearly_the_same_resolution_is_not_rescaled(slide):
    tiles = TissueTiles([slide], 64, mpp=0.5, slide_mpp=[0.498], tissue_threshold=None)
    assert tiles.table["column"].unique().tolist() == [0, 64, 128, 192, 256, 320]
    np.testing.assert_array_equal(tiles.read(1), slide[:64, 64:128])


def test_resolutions_by_the_names_of_slides(slide):
    options = {"mpp": 4.0, "slide_ids": [1, 2], "tissue_threshold": None}
    sides = {1: 16, 2: 8}
    for known in (
        [2.0, 4.0],
        {1: 2.0, 2: 4.0, 9: None},
        pd.Series([4.0, 2.0], index=[2, 1]),
    ):
        table = TissueTiles([slide, slide], 8, slide_mpp=known, **options).table
        assert table.groupby("slide")["height"].unique().map(list).to_dict() == {
            name: [side] for name, side in sides.items()
        }
    # A column of numbers holds NaN for None: what the slide says stays.
    own = open_slide(slide)
    own.mpp = (2.0, 2.0)
    for unknown in ([None, 4.0], np.array([np.nan, 4.0]), pd.Series({2: 4.0, 1: None})):
        table = TissueTiles([own, slide], 8, slide_mpp=unknown, **options).table
        assert set(zip(table["slide"], table["height"], strict=True)) == set(sides.items())
    for known, missing in (
        ({0: 2.0, 1: 4.0}, "not so 2: it has 0, 1"),
        ({"1": 2.0, "2": 4.0}, "not so 1, 2: it has '1', '2'"),
        (pd.Series([2.0, 4.0]), "not so 2: it has 0, 1"),
        (pd.Series([2.0, 4.0, 2.0], index=[1, 2, 2]), "not so 2: it has 1, 2"),
    ):
        with pytest.raises(ValueError, match=f"slide_mpp must name each slide once.*{missing}"):
            TissueTiles([slide, slide], 8, slide_mpp=known, **options)


def test_a_slide_of_your_own_with_two_levels_of_pixels_that_are_no_squares():
    class Gradient(Slide):
        """Values tell where a pixel was read: (row, column, level)."""

        levels = ((400, 800), (100, 200))
        mpp = (0.5, 0.25)
        asked = ()

        def read(self, level, top, left, height, width):
            self.asked = (*self.asked, (level, height, width))
            rows, columns = np.mgrid[top : top + height, left : left + width]
            place = np.stack([rows, columns, np.full_like(rows, 50 * level)], axis=-1)
            return place.astype(np.uint8)

    own = Gradient()
    tiles = TissueTiles([own], 20, level=1, tissue_threshold=None)
    assert tiles.shape[0] == 50
    assert tiles.table.iloc[11][["row", "column", "height", "level"]].tolist() == [80, 80, 80, 1]
    assert tiles.read(11)[0, 0].tolist() == [20, 20, 50]
    scaled = TissueTiles([own], 20, mpp=2.0, tissue_threshold=None)
    # 2 microns are 4 pixels down and 8 across, so the level of every fourth pixel suffices.
    assert scaled.table.iloc[1][["row", "column", "height", "width"]].tolist() == [0, 160, 80, 160]
    own.asked = ()
    # Columns 40 to 79 of the level as 20 averages of two, which are 40.5, 42.5, ... 60.5.
    assert scaled.read(6)[10, 10].tolist() in ([30, 60, 50], [30, 61, 50])
    assert own.asked[0] == (1, 20, 40)


def test_resolution_that_is_not_known_or_too_fine(slide, tmp_path):
    with pytest.raises(ValueError, match=r"Slide 0 does not say how many microns .*slide_mpp="):
        TissueTiles([slide], 64, mpp=0.5)
    with pytest.raises(ValueError, match=r"Slide 0 has 0.5 microns per pixel at its finest level"):
        TissueTiles([slide], 64, mpp=0.25, slide_mpp=0.5)
    path = as_tiff(slide, tmp_path, resolution=(40000, 20000), resolutionunit="CENTIMETER")
    assert open_slide(path).mpp == (0.5, 0.25)


# ---- where tiles go -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort():
    slides = [painted(96, 128, (0, 96, 0, 128), seed) for seed in range(4)]
    return TissueTiles(slides, 16, slide_ids=list("abcd"))


def test_an_encoder_learns_from_tiles_as_from_an_array(cohort):
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, batch_size=32, random_state=0)
    X = np.stack([cohort.read(i) for i in range(len(cohort))])
    features = encoder.fit(cohort).transform(cohort)
    assert encoder.image_shape_ == (16, 16, 3)
    np.testing.assert_array_equal(features, encoder.transform(X))
    np.testing.assert_array_equal(features, encoder.fit(X).transform(X))
    np.testing.assert_allclose(encoder.transform(cohort.take([7])), features[[7]], atol=1e-5)
    bags = AttentionMILClassifier(max_epochs=1, random_state=0)
    bags.fit(features, [0, 1, 0, 1], groups=cohort.groups)
    assert bags.predict_proba(features, groups=cohort.groups).shape == (4, 2)


def test_take_selects_and_reads_nothing(cohort):
    some = cohort.take(cohort.groups == "c")
    assert set(some.groups) == {"c"}
    assert some.shape == (48, 3, 16, 16)
    assert len(cohort) == 192
    np.testing.assert_array_equal(some.read(5), cohort.read(96 + 5))
    assert cohort.take(slice(190, None)).table["slide"].tolist() == ["d", "d"]
    assert cohort.take([-1]).table["row"].tolist() == [80]
    assert cohort.take([]).shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        cohort.take([192])


def test_cross_validation_by_slide_splits_tiles_not_pixels(cohort):
    class Kind(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            assert isinstance(X, TissueTiles)
            assert len(set(X.groups)) == 3
            self.classes_ = np.unique(y)
            return self

        def predict(self, X):
            assert isinstance(X, TissueTiles)
            return np.where(X.groups < "c", 0, 1)

    y = np.isin(cohort.groups, ["c", "d"]).astype(int)
    scores = cross_val_score(Kind(), cohort, y, groups=cohort.groups, cv=GroupKFold(4))
    assert scores.tolist() == [1.0] * 4


def test_torch_loads_tiles(cohort):
    batches = list(torch.utils.data.DataLoader(cohort, 100, generator=torch.Generator()))
    assert [len(batch) for batch in batches] == [100, 92]
    assert torch.equal(batches[1][0], cohort[100])


def first_tile(tiles):
    return tiles.read(0)


def test_forked_workers_read(tmp_path, slide):
    tiles = TissueTiles([as_file(slide, tmp_path, "png")], 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        with multiprocessing.get_context("fork").Pool(1) as pool:
            (found,) = pool.map(first_tile, [tiles])
    np.testing.assert_array_equal(found, tiles.read(0))


def test_plot_shows_the_tiles_of_a_slide(cohort):
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = cohort.plot("b")
    assert len(ax.collections[0].get_paths()) == 48
    assert ax.get_title() == "b: 48 tiles"
    ax = cohort.plot("b", np.arange(192))
    assert ax.collections[0].get_array().tolist() == list(range(48, 96))
    with pytest.raises(ValueError, match=r"values has shape \(3,\), but there are 192 tiles"):
        cohort.plot(values=[1, 2, 3])
    with pytest.raises(ValueError, match=r"There is no slide 'x': slide_ids are a, b, c, d"):
        cohort.plot("x")
    assert cohort.thumbnail("a", 32).shape == (24, 32, 3)
    # Without a name the first slide that has tiles.
    assert cohort.plot().get_title() == "a: 48 tiles"
    assert cohort.take(cohort.groups >= "c").plot().get_title() == "c: 48 tiles"
    assert cohort.take([]).plot().get_title() == "a: 0 tiles"
    plt.close("all")


# ---- whole-slide files --------------------------------------------------------------------------


def pyramid(path, image):
    """Write a tiled TIFF of three levels, 0.5 microns per pixel."""
    with tifffile.TiffWriter(path) as file:
        for factor in (1, 2, 4):
            file.write(
                image[::factor, ::factor],
                tile=(64, 64),
                photometric="rgb",
                subfiletype=int(factor > 1),
                resolution=(20000 / factor, 20000 / factor),
                resolutionunit="CENTIMETER",
            )
    return path


@pytest.fixture(params=["tiffslide", "openslide"])
def package(request, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setattr(readers, "_READERS", {request.param: readers._READERS[request.param]})
    return request.param


def test_whole_slide_files(package, tmp_path):
    image = painted(520, 776, (128, 384, 256, 640))
    path = pyramid(tmp_path / "s1.tif", image)
    opened = open_slide(path)
    assert isinstance(opened, FileSlide)
    assert opened.levels == [(520, 776), (260, 388), (130, 194)]
    assert opened.mpp == pytest.approx((0.5, 0.5))
    assert thumbnail(opened, 100).shape == (67, 100, 3)

    tiles = TissueTiles([str(path)], 64)
    assert tiles.slide_ids.tolist() == ["s1"]
    assert len(tiles) == 24
    np.testing.assert_array_equal(np.asarray(tiles).transpose(0, 2, 3, 1), cut(image, tiles))
    border = TissueTiles([path], 64, min_tissue=0)
    np.testing.assert_array_equal(border.read(-1), image[-64:, -64:])

    coarse = TissueTiles([path], 32, level=1)
    assert (coarse.table["height"] == 64).all()
    row, column = coarse.table[["row", "column"]].to_numpy()[5] // 2
    half = image[::2, ::2]
    np.testing.assert_array_equal(coarse.read(5), half[row : row + 32, column : column + 32])
    same = TissueTiles([path], 32, mpp=1.0)
    assert (same.table["level"] == 1).all()
    np.testing.assert_array_equal(same.read(5), coarse.read(5))
    scaled = TissueTiles([path], 32, mpp=1.5)
    assert (scaled.table["height"] == 96).all()
    assert (scaled.table["level"] == 1).all()
    assert scaled.read(0).shape == (32, 32, 3)


def test_whole_slide_files_go_to_other_processes(package, tmp_path):
    image = painted(520, 776, (128, 384, 256, 640))
    tiles = TissueTiles([pyramid(tmp_path / "s1.tif", image)], 64)
    expected = tiles.read(0)
    again = pickle.loads(pickle.dumps(tiles))
    assert again._slides[0]._reader is None
    np.testing.assert_array_equal(again.read(0), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            (found,) = pool.map_async(first_tile, [tiles]).get(timeout=60)
    np.testing.assert_array_equal(found, expected)


def test_whole_slide_files_that_cannot_be_read(package, tmp_path):
    (tmp_path / "s2.svs").write_bytes(b"no slide at all")
    with pytest.raises(ValueError, match=f"Slide s2 cannot be read: {package}: "):
        TissueTiles([tmp_path / "s2.svs"], 64)
    if package == "tiffslide":  # openslide shows grey as colour
        tifffile.imwrite(tmp_path / "grey.tif", painted()[..., 0], tile=(64, 64))
        with pytest.raises(ValueError, match="Slide grey cannot be read: it has 1 channel"):
            TissueTiles([tmp_path / "grey.tif"], 64)


def test_what_the_scanner_left_out_is_glass(tmp_path, monkeypatch):
    class OpenSlide:
        """Like the class of openslide: transparent but for columns 32 to 95."""

        level_dimensions, level_downsamples = ((128, 64), (64, 32)), (1.0, 2.0)
        properties = types.MappingProxyType({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})

        def __init__(self, path):
            assert path.endswith("s.mrxs")

        def read_region(self, corner, level, size):
            columns = corner[0] + np.arange(size[0]) * self.level_downsamples[level]
            region = np.zeros((size[1], size[0], 4), np.uint8)
            region[:, (columns >= 32) & (columns < 96)] = (*PINK, 255)
            return Image.fromarray(region)

    monkeypatch.setitem(sys.modules, "tiffslide", None)
    monkeypatch.setitem(sys.modules, "openslide", types.SimpleNamespace(OpenSlide=OpenSlide))
    (tmp_path / "s.mrxs").touch()
    tiles = TissueTiles([tmp_path / "s.mrxs"], 32)
    assert tiles.table[["row", "column"]].to_numpy().tolist() == [
        [0, 32],
        [0, 64],
        [32, 32],
        [32, 64],
    ]
    assert open_slide(tmp_path / "s.mrxs").mpp == (0.5, 0.25)
    everything = TissueTiles([tmp_path / "s.mrxs"], 32, min_tissue=0)
    assert (everything.read(0) == 255).all()
    assert (everything.read(1) == PINK).all()


def test_more_files_than_a_process_may_open(package, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 64
    limit = 4 * (open_files + 5)
    # More files than the limit has room for beside those that are open.
    paths = [pyramid(tmp_path / f"{number}.tif", painted(seed=number)) for number in range(8)]
    for number in range(8, limit - open_files + 10):
        paths.append(tmp_path / f"{number}.tif")
        os.link(paths[number % 8], paths[-1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        tiles = TissueTiles(paths, 128, tissue_threshold=None)
        rows = np.random.default_rng(0).permutation(len(tiles))
        found = tiles[rows]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for tile, row in zip(found, rows, strict=True):
        number, at = divmod(row, 6)
        top, left = 128 * (at // 3), 128 * (at % 3)
        expected = painted(seed=number % 8)[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(tile.permute(1, 2, 0), expected)


@pytest.mark.parametrize("layout", ["strips", "tiles", "planes"])
def test_resolution_of_ome_tiff(layout, tmp_path):
    def resolution(**sizes):
        image, options = painted(), {"tile": (64, 64)} if layout != "strips" else {}
        metadata = {"axes": "YXS", **sizes}
        if layout == "planes":  # grey ones, as many as colours
            image, metadata["axes"] = image.transpose(2, 0, 1), "CYX"
        options["photometric"] = "minisblack" if layout == "planes" else "rgb"
        path = tmp_path / "s.ome.tif"
        # Where both are told, the tags may be those of a screen.
        both = {"resolution": (300, 300), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, image, metadata=metadata, **options, **both)
        return open_slide(path).mpp

    if layout != "strips":
        pytest.importorskip("tiffslide")
    x, y = "PhysicalSizeX", "PhysicalSizeY"
    assert resolution(**{x: 0.25, y: 0.5}) == (0.5, 0.25)  # the default are microns
    microns = {f"{axis}Unit": "µm" for axis in (x, y)}
    assert resolution(**{x: 0.25, y: 0.5}, **microns) == (0.5, 0.25)
    assert resolution(**{x: 0.25, y: 5e-4, f"{y}Unit": "mm"}) == pytest.approx((0.5, 0.25))
    assert resolution(**{x: 250, y: 500, f"{x}Unit": "nm", f"{y}Unit": "nm"}) == (0.5, 0.25)
    tags = pytest.approx((1e4 / 300, 1e4 / 300))
    for unknown in ({}, {x: 1, y: 1, f"{x}Unit": "pixel"}, {x: 0, y: 1}, {x: 0.25}):
        assert resolution(**unknown) == tags


def test_a_thumbnail_decodes_few_pixels_twice():
    class Wide(Slide):
        """Counts the pixels of the 256 x 256 tiles of the file that its regions touch."""

        levels = ((2048, 65536),)
        decoded = 0

        def read(self, level, top, left, height, width):
            rows = -(-(top + height) // 256) - top // 256
            columns = -(-(left + width) // 256) - left // 256
            self.decoded += rows * columns * 256**2
            y, x = np.arange(top, top + height), np.arange(left, left + width)
            return np.stack(np.broadcast_arrays(y[:, None] / 8, x / 256, 128), -1).astype(np.uint8)

    slide = Wide()
    small = thumbnail(slide, 1024).astype(int)
    assert slide.decoded < 1.4 * 2048 * 65536
    assert small.shape == (32, 1024, 3)
    rows, columns = np.arange(32) * 8 + 3.5, np.arange(1024) / 4
    np.testing.assert_allclose(small[..., 0], np.tile(rows[:, None], 1024), atol=1.1)
    np.testing.assert_allclose(small[..., 1], np.tile(columns, (32, 1)), atol=1.1)


def test_a_region_of_another_form_is_refused():
    class Floats(Slide):
        """Gives colours from 0 to 1."""

        levels = ((64, 64),)

        def read(self, level, top, left, height, width):
            return np.full((height, width, 3), 0.7)

    with pytest.raises(ValueError, match="Slide 0 cannot be read: it has a region of float64"):
        TissueTiles([Floats()], 32)
    with pytest.raises(ValueError, match=r"row 0, column 32 of slide 0 .* a region of float64"):
        TissueTiles([Floats()], 32, tissue_threshold=None).read(1)


@pytest.mark.parametrize("kind", ["png", "palette", "tRNS", "memory"])
def test_what_is_transparent_in_a_picture_is_glass(kind, tmp_path):
    pixels = np.full((32, 64, 4), (*PINK, 255), np.uint8)
    pixels[:, :32, 3] = 0  # what was cut out keeps its colour below
    image, path = Image.fromarray(pixels), tmp_path / "s.png"
    if kind == "palette":
        pixels = np.repeat([[0, 1]], 32, axis=1).repeat(32, axis=0).astype(np.uint8)
        image = Image.fromarray(pixels, mode=None).convert("P")
        image.putpalette([*PINK, *PINK])
        image.save(path, transparency=0)
    elif kind == "tRNS":
        pixels[:, :32] = (*PURPLE, 0)
        Image.fromarray(pixels[..., :3]).save(path, transparency=PURPLE)
    else:
        image.save(path)
    tiles = TissueTiles([image if kind == "memory" else path], 32, min_tissue=0)
    assert (tiles.read(0) == 255).all()
    assert (tiles.read(1) == PINK).all()
    assert TissueTiles([image if kind == "memory" else path], 32).table["column"].tolist() == [32]


def test_tiff_of_other_inks_depths_and_resolutions(tmp_path):
    image = painted()
    path = tmp_path / "s.tif"
    inks = Image.fromarray(image).convert("CMYK")
    inks.save(path)
    tiles = TissueTiles([path], 64)
    np.testing.assert_array_equal(
        np.stack(cut(np.asarray(inks.convert("RGB")), tiles))[0], tiles.read(0)
    )
    tifffile.imwrite(path, image.astype(np.uint16), photometric="rgb", tile=(64, 64))
    with pytest.raises(ValueError, match="Slide s cannot be read: it has uint16 pixels"):
        TissueTiles([path], 64)
    # A writer that knows no resolution may say 0.
    tifffile.imwrite(path, image, photometric="rgb", resolution=(0, 0), resolutionunit=3)
    assert open_slide(path).mpp is None


@pytest.mark.parametrize("mode", ["P", "YCbCr"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_of_palettes_and_other_colours(mode, compression, tmp_path):
    if mode == "YCbCr" and compression is None and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read the plain YCbCr that it writes")
    image = Image.fromarray(np.full((32, 64, 3), PINK, np.uint8))
    options = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
    image.convert(mode, **options).save(tmp_path / "s.tif", compression=compression)
    tiles = TissueTiles([tmp_path / "s.tif"], 32)
    np.testing.assert_allclose(tiles.read(1), np.broadcast_to(PINK, (32, 32, 3)), atol=2)
    Image.merge("LAB", image.split()).save(tmp_path / "lab.tif", compression=compression)
    with pytest.raises(ValueError, match="Slide lab cannot be read: it has mode LAB, but"):
        TissueTiles([tmp_path / "lab.tif"], 32)


def test_a_png_of_16_bits_is_refused(tmp_path):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress((b"\0" + bytes(32 * 6)) * 32)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    (tmp_path / "s.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(ValueError, match="Slide s cannot be read: it has 16 bits a channel, but"):
        TissueTiles([tmp_path / "s.png"], 32, tissue_threshold=None)


def test_several_threads_decode_a_picture_once(tmp_path, monkeypatch):
    Image.fromarray(GOOD).save(tmp_path / "s.png")
    tiles = TissueTiles([tmp_path / "s.png"], 32, tissue_threshold=None)
    decoded, decode = [], readers._rgb

    def slow(image):
        decoded.append(image)
        time.sleep(0.1)
        return decode(image)

    monkeypatch.setattr(readers, "_rgb", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tiles.read, range(4)))
    np.testing.assert_array_equal(found, cut(GOOD, tiles))
    assert len(decoded) == 1


def test_without_a_reader(tmp_path, monkeypatch):
    image = painted(520, 776, (128, 384, 256, 640))
    for package in readers._READERS:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        importlib.import_module(package)
    tiles = TissueTiles([pyramid(tmp_path / "s.tif", image)], 64)  # Pillow decodes it as a whole
    np.testing.assert_array_equal(tiles.read(3), cut(image, tiles)[3])
    (tmp_path / "s2.svs").write_bytes(b"no slide at all")
    with pytest.raises(ImportError, match=r"s2\.svs needs a reader .*diffaugkit\[slides\]"):
        TissueTiles([tmp_path / "s2.svs"], 64)


# ---- errors -------------------------------------------------------------------------------------

GOOD = painted(64, 64, (0, 64, 0, 64))


@pytest.mark.parametrize(
    ("slides", "options", "message"),
    [
        ([GOOD], {"tile_size": 65}, r"Slide 0 has 64 x 64 pixels .* less than tile_size=65"),
        ([GOOD], {"tile_size": 0}, "tile_size=0 must be an int of at least 1"),
        ([GOOD], {"tile_size": 16.0}, "tile_size=16.0 must be an int"),
        ([GOOD], {"stride": 0}, "stride=0 must be"),
        ([GOOD], {"level": 1}, r"level=1, but slide 0 has 1 level\(s\), from 0"),
        ([GOOD], {"level": -1}, "level=-1 must be"),
        ([GOOD], {"level": 1, "mpp": 0.5}, "level=1 and mpp=0.5 exclude each other"),
        ([GOOD], {"mpp": -1}, "mpp=-1 must be microns per pixel"),
        ([GOOD], {"min_tissue": 50}, "min_tissue=50 must be a share from 0 to 1"),
        ([GOOD], {"tissue_threshold": "li"}, "tissue_threshold='li' must be \"otsu\""),
        ([GOOD], {"slide_mpp": 0}, "slide_mpp=0 must be"),
        ([GOOD], {"slide_mpp": [0.5, 0.5]}, "slide_mpp has 2 entries for 1 slides"),
        ([GOOD, GOOD], {"slide_ids": ["a", "a"]}, "Slide names must be unique, but a is not"),
        ([GOOD], {"slide_ids": ["a", "b"]}, r"slide_ids has shape \(2,\), but there are 1 slides"),
        ([GOOD, GOOD], {"slide_ids": ["a", np.nan]}, "slide_ids has missing names .* in rows 1"),
        ([GOOD, GOOD], {"slide_ids": ["a", None]}, "slide_ids has missing names .*name every"),
        (["x/s.svs", "y/s.svs"], {}, "but s is not: give slide_ids="),
        ([], {}, "slides is empty"),
        (["nowhere/s.svs"], {}, r"Slide s cannot be read: there is no file nowhere.s\.svs"),
        ([GOOD, GOOD[..., :1]], {}, r"Slide 1 cannot be read: it has shape \(64, 64, 1\), but"),
        ([GOOD[..., [0, 1, 2, 0]]], {}, r"Slide 0 cannot be read: it has shape \(64, 64, 4\), but"),
        ([GOOD / 255], {}, "Slide 0 cannot be read: it has float64 pixels, but slides are RGB"),
        ([Image.new("L", (64, 64))], {}, "Slide 0 cannot be read: it has mode L, but"),
    ],
)
def test_errors_say_what_is_wrong(slides, options, message):
    with pytest.raises(ValueError, match=message):
        TissueTiles(slides, **{"tile_size": 16, **options})


def test_values_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"slides is 32: give a path, a picture or a Slide, or a"):
        TissueTiles(32)
    with pytest.raises(TypeError, match="slide_ids must be all strings or all numbers"):
        TissueTiles([GOOD, GOOD], 16, slide_ids=[3, "x"])


@pytest.mark.parametrize("suffix", ["png", "tif", "gif"])
def test_pages_beside_the_first_are_warned_of(tmp_path, suffix):
    pages = [Image.fromarray(GOOD), Image.fromarray(255 - GOOD)]
    pages[0].save(tmp_path / f"s.{suffix}", save_all=True, append_images=pages[1:])
    message = r"s\.\w+ holds 2 pages or frames, of which the first"
    with pytest.warns(UserWarning, match=message) as seen:
        tiles = TissueTiles([tmp_path / f"s.{suffix}"], 16, tissue_threshold=None)
    assert seen[0].filename == __file__
    if suffix != "gif":  # which has 256 colours
        np.testing.assert_array_equal(tiles[[0]][0].permute(1, 2, 0), GOOD[:16, :16])


def test_files_that_are_none(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="Slide broken cannot be read: it is no image that Pillow"):
        TissueTiles([tmp_path / "broken.png"], 16)
    (tmp_path / "broken.tif").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="Slide broken cannot be read: it is no TIFF"):
        TissueTiles([tmp_path / "broken.tif"], 16)
    with pytest.raises(ValueError, match="is a folder: give the paths of the slides in it"):
        TissueTiles(tmp_path, 16)


def test_a_picture_beyond_the_limit_of_pillow_says_what_to_do(tmp_path, monkeypatch):
    Image.fromarray(GOOD).save(tmp_path / "s.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match=r"Slide s cannot be read: .*tiled TIFF.*MAX_IMAGE_PIXELS"):
        TissueTiles([tmp_path / "s.png"], 16)


@pytest.mark.parametrize(
    "image", [GOOD / 255, GOOD[..., 0], np.dstack([GOOD, GOOD[..., :1]]), GOOD[:0], GOOD[:, :0]]
)
def test_a_mask_of_what_is_no_rgb_is_refused(image):
    with pytest.raises(ValueError, match=r"must be RGB of 8 bits, \(h, w, 3\) uint8"):
        tissue_mask(image)


def test_a_file_that_breaks_later_is_named_with_the_tile(tmp_path):
    Image.fromarray(GOOD).save(tmp_path / "s.png")
    tiles = TissueTiles([tmp_path / "s.png"], 16)
    readers._DECODED.clear()
    (tmp_path / "s.png").unlink()
    with pytest.raises(ValueError, match="The tile at row 0, column 16 of slide s cannot be read"):
        tiles.read(1)
