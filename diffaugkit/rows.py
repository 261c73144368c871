"""Rows: random access to samples, whatever container they came in.

``len(rows)``, ``rows.shape`` and ``rows[indices]``, which gives a dense tensor of the asked rows
and of nothing else. Sparse and on-disk matrices stay what they are until a batch is read, so that
memory does not follow the size of the data. Samples are vectors (B, d) or images (B, C, H, W).
"""

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from diffaugkit.arrays import to_numpy

__all__ = [
    "BackedRows",
    "DenseRows",
    "MappedRows",
    "PickedRows",
    "ResidentRows",
    "Rows",
    "SparseRows",
    "TemporaryRows",
]

# Values in a block of a pass over the data: 8 MB as float64. Larger ones leave the cache, and the
# elementwise steps take twice the time.
_BLOCK_VALUES = 2**20
# Values at most in one read from disk, unwanted rows between the wanted ones included.
_READ_VALUES = 2**23
# One more read from disk costs about as much as reading this many unwanted rows.
_MAX_GAP = 16
# The share of a shuffled epoch that is read as one piece from disk.
_BACKED_SHUFFLE_BLOCK = 1024


class Rows(ABC):
    """Random access to ``n`` samples, vectors or images, read as dense batches.

    Parameters
    ----------
    shape : tuple of (int, int) or of (int, int, int, int)
        Number of rows and of features (n, d), or (n, C, H, W) of images.
    feature_names : ndarray of str or None, default=None
        Names of the features (genes), in the order of the columns.

    Attributes
    ----------
    shape : tuple of int
        (n, d) for vectors, (n, C, H, W) for images.
    dtype : dtype
        What is read: float32, or uint8 for images of bytes.
    feature_names : ndarray of shape (d,) or None
        Names of the features where the input had some.
    pixel_range : tuple of (low, high) or None
        Values of black and white; None for vectors and for latents, which have no such scale. Two
        ints where the type says it, (0, 255) for uint8; two floats where the data were looked at.
    value_range : tuple of (float, float) or None
        Least and greatest value of floating-point images, where they were looked at.
    layout : {"channels_last", "channels_first", "grey", "flat"} or None
        How the caller's images lie; None for vectors.
    resident : bool
        Whether the data lie in memory as one dense tensor already (``rows.tensor``).
    in_memory : bool
        Whether reading a row touches no disk.
    shuffle_block : int
        How many neighbouring rows a shuffled epoch should keep together: 1 where any row costs the
        same, 1 024 where neighbours are read from disk at once.
    origin : {"dense", "sparse", "anndata"}
        The kind of container that the caller gave.
    """

    dtype = np.dtype(np.float32)
    pixel_range = None
    value_range = None
    layout = None
    resident = False
    in_memory = True
    shuffle_block = 1
    origin = "dense"

    def __init__(self, shape, feature_names=None):
        self.shape = tuple(int(size) for size in shape)
        self.feature_names = feature_names
        self._memo = {}

    @abstractmethod
    def _read(self, index):
        """Rows of a slice or of non-negative int64 positions: (B, ...) ndarray, or (B, d) CSR."""

    def _named(self, position):
        """Name a row, for an error."""
        return f"row {position}"

    @property
    def is_image(self):
        """Whether a row is an image (C, H, W), not a vector (d,)."""
        return len(self.shape) == 4

    @property
    def n_features(self):
        """Values of a row: d, or C * H * W."""
        return math.prod(self.shape[1:])

    @property
    def image_shape(self):
        """(h, w, c) of images, None for vectors."""
        return (*self.shape[2:], self.shape[1]) if self.is_image else None

    def __len__(self):
        """Count the rows."""
        return self.shape[0]

    def __repr__(self):
        """Name the kind and the shape."""
        return f"{type(self).__name__}(shape={self.shape})"

    def block(self, index):
        """Read rows in their own form, for code that can use sparsity.

        Parameters
        ----------
        index : slice, sequence of int, or bool mask of shape (n,)
            The rows to read, in any order, repeats allowed.

        Returns
        -------
        ndarray of shape (B, ...) or csr_array of shape (B, d)
            Of ``dtype``. It may share memory with the caller's data: never write to it.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(slice(start, max(start, stop)))
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        if index.dtype == bool:
            if len(index) != len(self):
                raise IndexError(f"The mask has {len(index)} entries for {len(self)} rows.")
            index = np.flatnonzero(index)
        index = index.astype(np.int64, casting="same_kind") if index.size else np.zeros(0, np.int64)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"Row index out of range for {len(self)} rows.")
        return self._read(np.where(index < 0, index + len(self), index))

    def __getitem__(self, index):
        """Read rows as a tensor (B, ...) that belongs to the reader; one int gives one row."""
        import torch

        if isinstance(index, tuple) and index[1:] == (Ellipsis,):
            index = index[0]  # what splitters of scikit-learn ask for
        if isinstance(index, int | np.integer):
            return self[[int(index)]][0]
        block = self.block(index)
        if sp.issparse(block):
            return torch.from_numpy(block.toarray())
        if isinstance(index, slice):
            block = block.copy()  # a slice of an array in memory is a view of the caller's data
        return torch.from_numpy(np.ascontiguousarray(block))

    def __iter__(self):
        """Yield the rows one by one; without it pandas takes Rows for no data at all."""
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None):
        """Make all rows dense at once, for callers who ask for just that."""
        if copy is False:
            raise ValueError(f"{type(self).__name__} cannot become an array without a copy.")
        out = np.empty(self.shape, dtype=self.dtype)
        for rows, block in self.blocks():
            out[rows] = block.toarray() if sp.issparse(block) else block
        return out if dtype is None else out.astype(dtype, copy=False)

    def slices(self, batch_size=None):
        """Yield slices that cover all rows in order (by default about a million values)."""
        fewest = 1 if self.is_image else 64
        step = batch_size or min(max(_BLOCK_VALUES // max(self.n_features, 1), fewest), 8192)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def blocks(self, batch_size=None):
        """Yield ``(slice, block)`` in order; see :meth:`block`."""
        for rows in self.slices(batch_size):
            yield rows, self.block(rows)

    def batches(self, batch_size=4096):
        """Yield ``(slice, tensor of shape (B, ...))`` in order."""
        for rows in self.slices(batch_size):
            yield rows, self[rows]

    def __getstate__(self):
        """Leave out what was computed from the data and can be computed again."""
        return {**self.__dict__, "_memo": {}}


class PickedRows(Rows):
    """Some rows of others, read as these are.

    Parameters
    ----------
    rows : Rows
        Where they are read.
    index : ndarray of int of shape (m,)
        Positions in `rows`, in ascending order, so that neighbours stay neighbours.
    """

    def __init__(self, rows, index):
        super().__init__((len(index), *rows.shape[1:]), rows.feature_names)
        self._rows, self._index = rows, np.asarray(index, dtype=np.int64)
        for name in ("dtype", "pixel_range", "value_range", "layout", "in_memory", "origin"):
            setattr(self, name, getattr(rows, name))
        self.shuffle_block = rows.shuffle_block

    def _read(self, index):
        return self._rows.block(self._index[index])

    def _named(self, position):
        return self._rows._named(int(self._index[position]))


class ResidentRows(Rows):
    """Rows of an array in memory, (n, d) or (n, C, H, W), which is shared."""

    resident = True

    def __init__(self, array, feature_names=None):
        if any(stride < 0 or stride % array.itemsize for stride in array.strides):
            # Torch knows no negative strides, and none of part of a value (fields of records).
            array = np.ascontiguousarray(array)
        super().__init__(array.shape, feature_names)
        self._array = array

    @property
    def tensor(self):
        """All rows as one tensor (n, ...) that shares the caller's memory: read only."""
        import torch

        with warnings.catch_warnings():
            # Read-only arrays (joblib's memory maps) are welcome: nothing here writes to them.
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(self._array)

    def _read(self, index):
        return self._array[index]


class DenseRows(ResidentRows):
    """Rows of a dense array or tensor in memory; float32 is shared, never copied."""

    def __init__(self, array, feature_names=None):
        super().__init__(np.asarray(to_numpy(array), dtype=np.float32), feature_names)

    def __array__(self, dtype=None, copy=None):
        """Give the array itself where no other dtype is asked."""
        if copy is None:  # which NumPy 1 does not know
            return np.asarray(self._array, dtype=dtype)
        return np.array(self._array, dtype=dtype, copy=copy)


class SparseRows(Rows):
    """Rows of a CSR matrix in memory (CSC is converted once); made dense per batch only.

    Parameters
    ----------
    matrix : sparse matrix or array of shape (n, d')
        Any real dtype; converted to float32 per batch.
    columns : ndarray of int of shape (d,) or None, default=None
        Columns of ``matrix`` to read, in this order; None reads all.
    feature_names : ndarray of str or None, default=None
        Names of the columns read.
    """

    origin = "sparse"

    def __init__(self, matrix, columns=None, feature_names=None):
        width = matrix.shape[1] if columns is None else len(columns)
        super().__init__((matrix.shape[0], width), feature_names)
        # A wrapper of our own around the caller's arrays: SciPy caches flags on the object.
        self._csr = sp.csr_array(matrix)
        self._columns = columns
        self.stored_dtype = self._csr.dtype

    def _read(self, index):
        return _tidy(self._csr[index], self._columns)


class BackedRows(Rows):
    """Rows of a matrix on disk (h5ad or zarr; CSR or dense), read in sorted order and restored.

    Neighbouring rows are read as one piece, so a batch of one block costs one read.

    Parameters
    ----------
    matrix : h5py.Dataset, zarr.Array or anndata's on-disk CSR dataset, of shape (n', d')
        The open matrix.
    index : ndarray of int of shape (n,) or None, default=None
        Rows of the file that belong to the data, in this order; None takes all.
    columns : ndarray of int of shape (d,) or None, default=None
        Columns of the file to read, in this order; None reads all.
    feature_names : ndarray of str or None, default=None
        Names of the columns read.

    Raises
    ------
    ValueError
        If the matrix is stored by columns (CSC), from which no row can be read without the rest.
    """

    in_memory = False
    shuffle_block = _BACKED_SHUFFLE_BLOCK
    origin = "anndata"

    def __init__(self, matrix, index=None, columns=None, feature_names=None):
        n, d = matrix.shape
        super().__init__(
            (n if index is None else len(index), d if columns is None else len(columns)),
            feature_names,
        )
        self._index, self._columns, self._n_stored = index, columns, d
        self._sparse = hasattr(matrix, "group")
        if self._sparse and matrix.format != "csr":
            raise ValueError(
                "The matrix on disk is stored by columns (CSC), from which rows cannot be read "
                "one by one. Load it with adata.to_memory(), or write it once as CSR: "
                "adata.X = adata.X.tocsr(); adata.write_h5ad(path)."
            )
        if self._sparse:
            # The row pointers are the 8 bytes a row that random access needs.
            self._indptr = np.asarray(matrix.group["indptr"][:], dtype=np.int64)
            self._data, self._indices = matrix.group["data"], matrix.group["indices"]
            self.stored_dtype = self._data.dtype
        else:
            self._data, self.stored_dtype = matrix, matrix.dtype

    def _read(self, index):
        stored = index if self._index is None else self._index[index]
        if isinstance(stored, slice):
            stored = np.arange(stored.start, stored.stop)
        wanted, inverse = np.unique(stored, return_inverse=True)
        in_order = len(wanted) == len(stored) and np.array_equal(wanted, stored)
        # Pieces end at multiples of a fixed length, which bounds what gaps can add to a read.
        longest = max(_READ_VALUES // max(self._n_stored, 1), 64)
        cuts = (np.diff(wanted) > _MAX_GAP) | (np.diff(wanted // longest) > 0)
        runs = np.split(wanted, np.flatnonzero(cuts) + 1)
        parts = [self._read_run(run) for run in runs if len(run)]
        if not parts:
            return np.zeros((0, self.shape[1]), np.float32)
        if self._sparse:
            block = parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")
            return _tidy(block if in_order else block[inverse], self._columns)
        block = parts[0] if len(parts) == 1 else np.concatenate(parts)
        block = block if in_order else block[inverse]
        return block if self._columns is None else block[:, self._columns]

    def _read_run(self, run):
        """Rows ``run`` (sorted, nearly contiguous) of the file in one read."""
        start, stop = int(run[0]), int(run[-1]) + 1
        if not self._sparse:
            piece = _float32(self._data[start:stop])
            return piece if len(piece) == len(run) else piece[run - start]
        pointers = self._indptr[start : stop + 1]
        values = slice(int(pointers[0]), int(pointers[-1]))
        piece = sp.csr_array(
            (_float32(self._data[values]), self._indices[values], pointers - pointers[0]),
            shape=(stop - start, self._n_stored),
        )
        return piece if stop - start == len(run) else piece[run - start]


class MappedRows(Rows):
    """Another Rows, transformed batch by batch as it is read.

    Parameters
    ----------
    rows : Rows of shape (n, ...)
        What is read.
    fn : callable
        ``fn(tensor of shape (B, ...)) -> tensor of shape (B, d)`` or (B, C, H, W), acting row by
        row. Give a function of a module or a ``functools.partial`` of one where the result must
        pickle.
    n_features : int or tuple of (int, int, int)
        What a row of ``fn``'s result is: the width ``d`` of a vector, or (C, H, W).
    native : bool, default=False
        Hand ``fn`` a block of :meth:`Rows.block` (ndarray or CSR) instead of a tensor, and take
        the same back.
    pixel_range : tuple of (low, high) or None, default=None
        Values of black and white in what ``fn`` returns. (0, 255) says that it returns uint8;
        everything else is read as float32. None for vectors and latents.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.rows import DenseRows, MappedRows
    >>> flat = DenseRows(np.ones((2, 6)))
    >>> rows = MappedRows(flat, lambda x: 2 * x.reshape(-1, 1, 2, 3), (1, 2, 3))
    >>> rows.shape, rows[0].sum().item()
    ((2, 1, 2, 3), 12.0)
    """

    def __init__(self, rows, fn, n_features, *, native=False, pixel_range=None):
        row = n_features if isinstance(n_features, tuple) else (n_features,)
        super().__init__((len(rows), *row))
        self._rows, self._fn, self._native = rows, fn, native
        self.in_memory, self.shuffle_block = rows.in_memory, rows.shuffle_block
        self.origin = rows.origin
        if self.is_image:
            self.layout = rows.layout or "channels_last"
            self.pixel_range = pixel_range
            if pixel_range == (0, 255):
                self.dtype = np.dtype(np.uint8)

    def _read(self, index):
        block = self._fn(self._rows.block(index) if self._native else self._rows[index])
        return to_numpy(block).astype(self.dtype, copy=False)


class TemporaryRows(Rows):
    """Dense float32 rows in a temporary file, which goes when this object does.

    Parameters
    ----------
    path : str or path-like
        The file: the values row by row, as ``tobytes`` gives them.
    shape : tuple of (int, int) or of (int, int, int, int)
        (n, d) of vectors, or (n, C, H, W) of latents.
    """

    in_memory = False

    def __init__(self, path, shape):
        super().__init__(shape)
        self._path = path
        weakref.finalize(self, Path(path).unlink, missing_ok=True)

    def _read(self, index):
        # Mapped anew for every read: pages of a lasting map count as memory of this process.
        return np.array(np.memmap(self._path, np.float32, mode="r", shape=self.shape)[index])

    def __reduce__(self):
        """Refuse: the file does not outlive this object."""
        raise TypeError("Rows in a temporary file cannot be pickled: the file goes with them.")


def _float32(values):
    """Convert to float32; what does not fit becomes infinite, which the gate refuses."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)


def _tidy(csr, columns):
    """float32 CSR with one entry per cell and the asked columns; the input is left as it is."""
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    if columns is not None:
        csr = csr[:, columns]
    if csr.dtype == np.float32:
        return csr
    return sp.csr_array((_float32(csr.data), csr.indices, csr.indptr), shape=csr.shape)
