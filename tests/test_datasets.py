"""Data that ship inside dependencies, and downloads from a server of our own."""

import functools
import hashlib
import io
import re
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from diffaugkit.datasets import (
    fetch_cifar10,
    fetch_pneumonia,
    load_digits,
    load_pbmc,
    load_tissue_tiles,
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_digits_are_images_of_eight_bits():
    X, y = load_digits()
    assert X.shape == (1797, 8, 8)
    assert X.dtype == np.uint8
    assert (X.min(), X.max()) == (0, 255)
    assert np.bincount(y).min() >= 174


def test_pbmc_are_counts():
    pytest.importorskip("scanpy")
    adata = load_pbmc()
    values = adata.X.data
    assert adata.shape == (700, 765)
    assert (values == np.rint(values)).all()
    assert values.min() >= 0
    counts = adata.obs["bulk_labels"].value_counts(sort=False).to_numpy()
    assert (np.diff(counts) <= 0).all()  # commonest first
    assert adata.obs["bulk_labels"].nunique() == 10


@pytest.mark.parametrize(("size", "stride", "n"), [(64, None, 64), (100, 50, 81), (512, None, 1)])
def test_tissue_tiles_lie_where_they_say(size, stride, n):
    data = pytest.importorskip("skimage.data")
    X, places, stain = load_tissue_tiles(size, stride, return_stain=True)
    assert X.shape == (n, size, size, 3)
    assert stain.shape == (n, size, size)
    picture = data.immunohistochemistry()
    for tile, (row, column) in zip(X, places, strict=True):
        np.testing.assert_array_equal(tile, picture[row : row + size, column : column + size])


@pytest.mark.parametrize("stride", [0, -32])
def test_tiles_do_not_go_backwards(stride):
    pytest.importorskip("skimage")
    with pytest.raises(ValueError, match=f"stride={stride} must be at least 1"):
        load_tissue_tiles(32, stride)


def test_a_tile_larger_than_the_picture_is_refused():
    pytest.importorskip("skimage")
    with pytest.raises(ValueError, match="tile_size=513 must be in 1 to 512"):
        load_tissue_tiles(513)


def test_cifar10_is_fetched_once_and_checked(server, tmp_path):
    pytest.importorskip("pooch")
    folder, address = server
    rng, records = np.random.default_rng(0), {}
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            records[name] = rng.integers(0, 256, size=(4, 3073), dtype=np.uint8)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = records[name].size
            archive.addfile(member, io.BytesIO(records[name].tobytes()))
    known = hashlib.sha256((folder / "cifar.tar.gz").read_bytes()).hexdigest()
    options = {"data_home": tmp_path / "home", "url": f"{address}/cifar.tar.gz"}
    X, y, X_test, y_test = fetch_cifar10(known_hash=known, **options)
    assert X.shape == (20, 32, 32, 3)
    assert X_test.shape == (4, 32, 32, 3)
    third = records["data_batch_3"]
    np.testing.assert_array_equal(y[8:12], third[:, 0])
    np.testing.assert_array_equal(y_test, records["test_batch"][:, 0])
    # The published layout: 1 024 red values, then green, then blue, row by row.
    np.testing.assert_array_equal(X[9, 5, 7], third[1, 1 + 5 * 32 + 7 :: 1024][:3])

    (folder / "cifar.tar.gz").unlink()
    np.testing.assert_array_equal(fetch_cifar10(known_hash=known, **options)[0], X)


def test_a_file_that_is_not_the_published_one_is_refused(server, tmp_path):
    pytest.importorskip("pooch")
    folder, address = server
    np.savez(folder / "pneumonia.npz", train_images=np.zeros(1))
    with pytest.raises(ValueError, match="hash"):
        fetch_pneumonia(data_home=tmp_path / "home", url=f"{address}/pneumonia.npz")
    assert not list((tmp_path / "home").glob("*.npz"))


def test_without_a_network_the_file_can_be_put_there_by_hand(server, tmp_path, monkeypatch):
    pytest.importorskip("pooch")
    folder, address = server
    parts = [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
    np.savez(folder / "p.npz", **{name: np.zeros((2, 1), np.uint8) for name in parts})
    content = (folder / "p.npz").read_bytes()
    options = {"url": f"{address}/q.npz", "known_hash": hashlib.sha256(content).hexdigest()}
    monkeypatch.setenv("DIFFAUGKIT_DATA_HOME", str(tmp_path / "home"))
    with pytest.raises(
        OSError, match=r"q\.npz could not be downloaded to .*404.*put it there"
    ) as failed:
        fetch_pneumonia(**options)
    named = re.search(r"to (\S+q\.npz)", str(failed.value))[1]
    Path(named).write_bytes(content)
    assert fetch_pneumonia(**options)[0].shape == (2, 1)


def test_pneumonia_is_read_without_running_code(server, tmp_path):
    pytest.importorskip("pooch")
    folder, address = server
    parts = {
        f"{part}_{kind}": np.full((3, *shape), number, np.uint8)
        for number, part in enumerate(("train", "val", "test"))
        for kind, shape in (("images", (28, 28)), ("labels", (1,)))
    }
    np.savez(folder / "p.npz", **parts)
    known = hashlib.sha256((folder / "p.npz").read_bytes()).hexdigest()
    options = {"data_home": tmp_path / "home", "url": f"{address}/p.npz", "known_hash": known}
    X, y, X_test, y_test = fetch_pneumonia(**options)
    assert X.shape == X_test.shape == (3, 28, 28)
    assert (X_test == 2).all()
    assert y.tolist() == [0, 0, 0]
    assert y_test.dtype == np.int64
