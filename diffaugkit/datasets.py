"""Data to begin with: ``load_*`` reads what ships inside a dependency, ``fetch_*`` downloads.

Nothing is downloaded unless a ``fetch_*`` function is called; what it fetches is checked against a
published checksum and kept in a folder of the user's cache.
"""

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np

__all__ = ["fetch_cifar10", "fetch_pneumonia", "load_digits", "load_pbmc", "load_tissue_tiles"]

_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_PNEUMONIA = "https://zenodo.org/records/10519652/files/pneumoniamnist.npz"
_PNEUMONIA_MD5 = "28209eda62fecd6e6a2d98b1501bb15f"


def load_digits():
    """Handwritten digits of scikit-learn as images.

    Returns
    -------
    X : ndarray of shape (1797, 8, 8), uint8
        Grey values in 0 to 255.
    y : ndarray of shape (1797,), int64
        Digits 0 to 9.

    Examples
    --------
    >>> from diffaugkit.datasets import load_digits
    >>> X, y = load_digits()
    >>> X.shape, X.dtype, int(X.max())
    ((1797, 8, 8), dtype('uint8'), 255)
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def load_pbmc():
    """Read 700 peripheral blood cells that ship inside scanpy, as raw counts.

    scanpy holds log(1 + counts per 10 000) to three decimals, and the totals: the whole numbers
    that the sequencer counted come back exactly.

    Returns
    -------
    AnnData of shape (700, 765)
        ``.X`` raw counts (CSR, float32), ``.obs["bulk_labels"]`` 10 cell types, commonest first.

    Raises
    ------
    ImportError
        Without scanpy (``pip install "diffaugkit[cells]"``).

    Examples
    --------
    >>> from diffaugkit.datasets import load_pbmc
    >>> load_pbmc().shape
    (700, 765)
    """
    import anndata
    import scanpy
    from scipy.sparse import csr_matrix

    pbmc = scanpy.datasets.pbmc68k_reduced()
    totals = pbmc.obs["n_counts"].to_numpy()[:, None]
    counts = np.rint(np.expm1(pbmc.raw.X.toarray()) * totals / 10_000).astype(np.float32)
    labels = pbmc.obs["bulk_labels"]
    labels = labels.cat.reorder_categories(list(labels.value_counts().index))
    adata = anndata.AnnData(csr_matrix(counts), obs=labels.to_frame())
    adata.var_names = pbmc.raw.var_names
    return adata


def load_tissue_tiles(tile_size=32, stride=None, *, return_stain=False):
    """Tiles of the immunohistochemistry picture that ships inside scikit-image.

    Colon tissue (512 x 512 pixels), nuclei in blue by haematoxylin, FHL2 protein in brown by DAB.

    Parameters
    ----------
    tile_size : int, default=32
        Side of a tile in pixels, at most 512.
    stride : int or None, default=None
        Distance of tiles; None puts them side by side.
    return_stain : bool, default=False
        Give the haematoxylin of each pixel too, by colour deconvolution (Ruifrok and Johnston
        2001): a ground truth for nuclei.

    Returns
    -------
    X : ndarray of shape (n_tiles, tile_size, tile_size, 3), uint8
    position : ndarray of shape (n_tiles, 2), int64
        Row and column of each tile's upper left corner.
    stain : ndarray of shape (n_tiles, tile_size, tile_size), float32
        Only with `return_stain`.

    Raises
    ------
    ImportError
        Without scikit-image.
    ValueError
        If a tile is larger than the picture, or `stride` is below 1.

    Examples
    --------
    >>> from diffaugkit.datasets import load_tissue_tiles
    >>> load_tissue_tiles(64)[0].shape
    (64, 64, 64, 3)
    """
    from skimage.color import rgb2hed
    from skimage.data import immunohistochemistry

    picture = immunohistochemistry()
    if not 1 <= tile_size <= min(picture.shape[:2]):
        raise ValueError(f"tile_size={tile_size} must be in 1 to {min(picture.shape[:2])}.")
    stride = tile_size if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride={stride} must be at least 1, or None.")

    def tiles(array):
        windows = np.lib.stride_tricks.sliding_window_view(array, (tile_size, tile_size), (0, 1))
        return windows[::stride, ::stride]

    cut = tiles(picture)  # (rows, columns, 3, tile, tile)
    places = np.indices(cut.shape[:2]).reshape(2, -1).T * stride
    X = np.ascontiguousarray(np.moveaxis(cut, 2, -1)).reshape(-1, tile_size, tile_size, 3)
    if not return_stain:
        return X, places
    stain = tiles(rgb2hed(picture)[..., 0].astype(np.float32)).reshape(-1, tile_size, tile_size)
    return X, places, np.ascontiguousarray(stain)


def fetch_cifar10(*, data_home=None, url=_CIFAR10, known_hash=_CIFAR10_SHA256):
    """Download CIFAR-10 (Krizhevsky 2009), 170 MB, once.

    Parameters
    ----------
    data_home : path-like or None, default=None
        Folder to keep it in; None takes ``$DIFFAUGKIT_DATA_HOME`` or the user's cache.
    url, known_hash : str
        Where it is and its checksum, for mirrors: ``"algorithm:hex"`` or the hex of a SHA-256.

    Returns
    -------
    X, X_test : ndarray of shape (50000, 32, 32, 3) and (10000, 32, 32, 3), uint8
    y, y_test : ndarray of shape (50000,) and (10000,), int64
        In the order ``X, y, X_test, y_test``.

    Raises
    ------
    ImportError
        Without pooch.
    OSError
        Without a network, or room on the disk; the message says where to put the file by hand.
    ValueError
        If the file is not the one that was published.
    """
    path = _fetch(url, known_hash, data_home)
    parts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name).name
            if name.endswith(".bin"):
                raw = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073)
                images = raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                parts[name] = np.ascontiguousarray(images), raw[:, 0].astype(np.int64)
    train = [parts[name] for name in sorted(parts) if name.startswith("data_batch")]
    X, y = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return X, y, *parts["test_batch.bin"]


def fetch_pneumonia(*, data_home=None, url=_PNEUMONIA, known_hash=f"md5:{_PNEUMONIA_MD5}"):
    """Download PneumoniaMNIST (Yang et al. 2023, MedMNIST v2; CC BY 4.0), 4 MB, once.

    Parameters
    ----------
    data_home, url, known_hash
        As for :func:`fetch_cifar10`.

    Returns
    -------
    X, y, X_test, y_test : ndarray
        Chest X-rays (4 708 and 624, 28 x 28, uint8) and labels, 1 for pneumonia. They are sorted
        by class: shuffle before splitting.
    """
    path = _fetch(url, known_hash, data_home)
    with np.load(path, allow_pickle=False) as file:
        return tuple(
            array
            for part in ("train", "test")
            for array in (file[f"{part}_images"], file[f"{part}_labels"].ravel().astype(np.int64))
        )


def _fetch(url, known_hash, data_home):
    """Path of a file that was downloaded now or before, with its checksum checked both times."""
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            'fetch_* needs pooch: pip install "diffaugkit[images]", or download the file yourself.'
        ) from error
    home = data_home or os.environ.get("DIFFAUGKIT_DATA_HOME") or pooch.os_cache("diffaugkit")
    path = Path(home).expanduser() / _file_name(url)
    try:
        return pooch.retrieve(url, known_hash, path=path.parent, fname=path.name)
    except OSError as error:  # those of requests are some, too
        raise OSError(
            f"{url} could not be downloaded to {path}: {error}. Without a network, bring the file "
            "from elsewhere and put it there, under that name."
        ) from error


def _file_name(url):
    # Two mirrors of one name must not overwrite each other.
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url).name}"
