"""The one gate for input: whatever ``X`` was, after :func:`check_X` there are only :class:`Rows`.

Rows are random access to samples: ``len(rows)``, ``rows.shape`` and ``rows[indices]``, which gives
a dense float32 tensor of the asked rows and of nothing else. Sparse and on-disk matrices stay what
they are until a batch is read, so that memory does not follow the size of the data.
"""

import tempfile
import warnings
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.validation import check_array, check_non_negative, validate_data

__all__ = [
    "BackedRows",
    "DenseRows",
    "MappedRows",
    "PrincipalComponents",
    "Rows",
    "SparseRows",
    "check_X",
    "looks_like_counts",
    "principal_components",
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
# Up to this size an exact eigendecomposition is cheaper than Krylov iteration.
_EXACT_PCA_LIMIT = 1000
# The same where every pass over the data reads a disk or computes the rows anew.
_ONE_PASS_PCA_LIMIT = 3000
# Components that are computed at least: 20 and then 50 of the same rows must not cost twice.
_LEADING_COMPONENTS = 50
# Values up to which dense data are centred once for all products, not again for each.
_CENTRED_VALUES = 2**27


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


class Rows(ABC):
    """Random access to ``n`` samples of ``d`` features, read as dense float32 batches.

    Parameters
    ----------
    shape : tuple of (int, int)
        Number of rows and of features.
    feature_names : ndarray of str or None, default=None
        Names of the features (genes), in the order of the columns.

    Attributes
    ----------
    shape : tuple of (int, int)
        Number of rows ``n`` and of features ``d``.
    feature_names : ndarray of shape (d,) or None
        Names of the features where the input had some.
    resident : bool
        Whether the data lie in memory as one dense float32 tensor already (``rows.tensor``).
    in_memory : bool
        Whether reading a row touches no disk.
    shuffle_block : int
        How many neighbouring rows a shuffled epoch should keep together: 1 where any row costs the
        same, 1 024 where neighbours are read from disk at once.
    origin : {"dense", "sparse", "anndata"}
        The kind of container that the caller gave.
    """

    resident = False
    in_memory = True
    shuffle_block = 1
    origin = "dense"

    def __init__(self, shape, feature_names=None):
        self.shape = (int(shape[0]), int(shape[1]))
        self.feature_names = feature_names
        self._memo = {}

    @abstractmethod
    def _read(self, index):
        """Rows of a slice or of non-negative int64 positions: float32 (B, d), ndarray or CSR."""

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
        ndarray or csr_array of shape (B, d), float32
            It may share memory with the caller's data: never write to it.
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
        """Read rows as a float32 tensor (B, d) that belongs to the reader; one int gives (d,)."""
        import torch

        if isinstance(index, int | np.integer):
            return self[[int(index)]][0]
        block = self.block(index)
        if sp.issparse(block):
            return torch.from_numpy(block.toarray())
        if isinstance(index, slice):
            block = block.copy()  # a slice of an array in memory is a view of the caller's data
        return torch.from_numpy(np.ascontiguousarray(block))

    def __array__(self, dtype=None, copy=None):
        """Make all rows dense at once, for callers who ask for just that."""
        if copy is False:
            raise ValueError(f"{type(self).__name__} cannot become an array without a copy.")
        out = np.empty(self.shape, dtype=np.float32)
        for rows, block in self.blocks():
            out[rows] = block.toarray() if sp.issparse(block) else block
        return out if dtype is None else out.astype(dtype, copy=False)

    def slices(self, batch_size=None):
        """Yield slices that cover all rows in order (by default about a million values)."""
        step = batch_size or min(max(_BLOCK_VALUES // max(self.shape[1], 1), 64), 8192)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def blocks(self, batch_size=None):
        """Yield ``(slice, block)`` in order; see :meth:`block`."""
        for rows in self.slices(batch_size):
            yield rows, self.block(rows)

    def batches(self, batch_size=4096):
        """Yield ``(slice, tensor of shape (B, d))`` in order."""
        for rows in self.slices(batch_size):
            yield rows, self[rows]

    def __getstate__(self):
        """Leave out what was computed from the data and can be computed again."""
        return {**self.__dict__, "_memo": {}}


class DenseRows(Rows):
    """Rows of a dense array or tensor in memory; float32 is shared, never copied."""

    resident = True

    def __init__(self, array, feature_names=None):
        if hasattr(array, "detach"):
            array = array.detach().cpu().float().numpy()
        array = np.asarray(array, dtype=np.float32)
        if any(stride < 0 for stride in array.strides):
            array = np.ascontiguousarray(array)  # torch knows no negative strides
        super().__init__(array.shape, feature_names)
        self._array = array

    @property
    def tensor(self):
        """All rows as one float32 tensor (n, d) that shares the caller's memory: read only."""
        import torch

        with warnings.catch_warnings():
            # Read-only arrays (joblib's memory maps) are welcome: nothing here writes to them.
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(self._array)

    def _read(self, index):
        return self._array[index]

    def __array__(self, dtype=None, copy=None):
        """Give the array itself where no other dtype is asked."""
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
            self.dtype = self._data.dtype
        else:
            self._data, self.dtype = matrix, matrix.dtype

    def _read(self, index):
        if isinstance(index, slice):
            stored = (
                np.arange(index.start, index.stop) if self._index is None else self._index[index]
            )
        else:
            stored = index if self._index is None else self._index[index]
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
    rows : Rows of shape (n, d')
        What is read.
    fn : callable
        ``fn(tensor of shape (B, d')) -> tensor of shape (B, d)``, acting row by row. Give a
        function of a module or a ``functools.partial`` of one where the result must pickle.
    n_features : int
        The width ``d`` of what ``fn`` returns.
    feature_names : ndarray of str or None, default=None
        Names of the new features.
    native : bool, default=False
        Hand ``fn`` a block of :meth:`Rows.block` (ndarray or CSR) instead of a tensor, and take
        the same back.
    """

    def __init__(self, rows, fn, n_features, feature_names=None, *, native=False):
        super().__init__((len(rows), n_features), feature_names)
        self._rows, self._fn, self._native = rows, fn, native
        self.in_memory, self.shuffle_block = rows.in_memory, rows.shuffle_block
        self.origin = rows.origin

    def _read(self, index):
        block = self._fn(self._rows.block(index) if self._native else self._rows[index])
        block = block.detach().cpu().float().numpy() if hasattr(block, "detach") else block
        return block.astype(np.float32, copy=False)


class _FileRows(Rows):
    """Dense float32 rows in a temporary file, which goes when this object does."""

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


def _tidy(csr, columns=None):
    """float32 CSR with one entry per cell and the asked columns; the input is left as it is."""
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    if columns is not None:
        csr = csr[:, columns]
    if csr.dtype == np.float32:
        return csr
    return sp.csr_array((_float32(csr.data), csr.indices, csr.indptr), shape=csr.shape)


# --------------------------------------------------------------------------------------------------
# The gate
# --------------------------------------------------------------------------------------------------


def check_X(
    estimator,
    X,
    *,
    reset,
    layer=None,
    allow_counts=True,
    ensure_min_samples=1,
    ensure_min_features=1,
    ensure_non_negative=False,
):
    """Check vectors of any container and turn them into :class:`Rows`.

    Nothing is copied but a dense array whose dtype is not float32 (one float32 copy) and a sparse
    one that is not CSR. The caller's object is never modified. Genes of an AnnData are aligned by
    name to what the estimator was fitted with, surplus genes are ignored; a DataFrame must come
    with the columns of ``fit`` in their order, as everywhere in scikit-learn.

    Parameters
    ----------
    estimator : estimator
        Gets ``n_features_in_`` and ``feature_names_in_`` if ``reset``, is compared with them if
        not. It keeps both attributes when the check fails.
    X : array-like, tensor, DataFrame, sparse matrix, AnnData or Rows of shape (n, d)
        The samples. Rows were checked when they were made: only names and width are compared.
    reset : bool
        True in ``fit``, False afterwards.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``; other containers have none and ignore it.
    allow_counts : bool, default=True
        False raises where :func:`looks_like_counts` is true, for estimators that expect
        normalised values.
    ensure_min_samples, ensure_min_features : int, default=1
        Fewest rows and columns that the estimator can use.
    ensure_non_negative : bool, default=False
        Whether negative values are an error.

    Returns
    -------
    Rows of shape (n, d)
        Random access to the samples as float32.

    Raises
    ------
    ValueError
        For NaN, infinity, an empty, one-dimensional or complex input, a wrong width, missing or
        repeated genes, columns that hold no numbers, raw counts or negative values where these
        are refused.
    TypeError
        For a container that cannot be read row by row (Dask, sparse tensors).

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.decomposition import PCA
    >>> from diffaugkit.data import check_X
    >>> rows = check_X(PCA(), np.arange(6.0).reshape(3, 2), reset=True)
    >>> rows.shape, rows[[2, 0]].tolist()
    ((3, 2), [[4.0, 5.0], [0.0, 1.0]])
    """
    learned = ("n_features_in_", "feature_names_in_")
    before = {name: vars(estimator)[name] for name in learned if name in vars(estimator)}
    limits = {
        "ensure_min_samples": ensure_min_samples,
        "ensure_min_features": ensure_min_features,
        "ensure_non_negative": ensure_non_negative,
    }
    try:
        if isinstance(X, Rows):
            _check_names_of_rows(estimator, X, reset)
            _check_limits(estimator, X, **limits)
            return X
        if _is_a(X, "anndata", "AnnData"):
            rows = _check_anndata(estimator, X, reset, layer, limits)
        else:
            rows = _check_array(estimator, X, reset, limits)
        if not allow_counts and looks_like_counts(rows):
            name = type(estimator).__name__
            raise ValueError(
                f"X looks like raw counts (non-negative integers, some of them large), but {name} "
                "expects normalised values. Put a CellPreprocessor in front: "
                f"make_pipeline(CellPreprocessor(), {name}())."
            )
    except BaseException:
        # A failed fit must leave what an earlier one learned.
        for name in learned:
            vars(estimator).pop(name, None)
        vars(estimator).update(before)
        raise
    return rows


def looks_like_counts(rows):
    """Tell whether rows hold raw counts, judged on a sample of at most 512 of them.

    Counts are non-negative whole numbers of which some are large: above 10 where the caller gave
    an AnnData or a sparse matrix, above 255 for a plain dense array, because small integers there
    are as likely to be grades, digits or the pixels of an 8-bit image.

    Parameters
    ----------
    rows : Rows of shape (n, d)
        The data.

    Returns
    -------
    bool
        Whether the sample looks like raw counts.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from diffaugkit.data import SparseRows, looks_like_counts
    >>> looks_like_counts(SparseRows(sp.csr_array([[0, 12], [3, 0]])))
    True
    """
    smallest, largest, whole = sample_range(rows)
    return bool(whole and smallest >= 0 and largest > (255 if rows.origin == "dense" else 10))


def sample_range(rows):
    """Look at up to 512 rows: least and greatest value, and whether all are whole numbers."""
    if not len(rows):
        return 0.0, 0.0, True
    if len(rows) <= 512:
        block = rows.block(slice(None))
    else:
        # Eight runs over the whole length: cells are often sorted by batch, and runs read fast.
        starts = np.linspace(0, len(rows) - 64, 8).astype(int)
        block = rows.block((starts[:, None] + np.arange(64)).ravel())
    values = block.data if sp.issparse(block) else block
    if not values.size:
        return 0.0, 0.0, True
    low, high = float(values.min()), float(values.max())
    if sp.issparse(block):
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high, bool(np.all(values == np.rint(values)))


def _is_a(X, package, name):
    """Whether X is an instance of package's class, without importing the package."""
    return any(
        base.__name__ == name and base.__module__.split(".")[0] == package
        for base in type(X).__mro__
    )


def _names_frame(names):
    """Make a frame without rows: scikit-learn compares its columns, and nothing is read."""
    import pandas as pd

    return pd.DataFrame(columns=np.asarray(names, dtype=object))


def _set_names(estimator, rows_shape, names, reset):
    """Set or check width and names by scikit-learn's own rules and messages."""
    stand_in = np.empty((0, rows_shape[1])) if names is None else _names_frame(names)
    validate_data(estimator, stand_in, reset=reset, skip_check_array=True)


def _check_names_of_rows(estimator, rows, reset):
    names = rows.feature_names
    if not reset:
        known = getattr(estimator, "feature_names_in_", None)
        if known is None or names is None:
            # Rows without names come from our own steps: no reason to warn.
            width = getattr(estimator, "n_features_in_", rows.shape[1])
            if rows.shape[1] != width:
                raise ValueError(
                    f"X has {rows.shape[1]} features, but {type(estimator).__name__} is expecting "
                    f"{width} features as input."
                )
            return
    _set_names(estimator, rows.shape, names, reset)


def _check_limits(
    estimator, rows, *, ensure_min_samples, ensure_min_features, ensure_non_negative=False
):
    """Raise scikit-learn's own messages for Rows, which its checks cannot read."""
    name = type(estimator).__name__
    counts = (len(rows), rows.shape[1])
    least = (ensure_min_samples, ensure_min_features)
    for kind, count, minimum in zip(("sample", "feature"), counts, least, strict=True):
        if count < minimum:
            raise ValueError(
                f"Found array with {count} {kind}(s) (shape={rows.shape}) while a minimum of "
                f"{minimum} is required by {name}."
            )
    if ensure_non_negative:
        for _, block in rows.blocks():
            check_non_negative(block, f"X in {name}")


def _checked(check, X, limits, **more):
    """Run a scikit-learn check with the dtype that costs least: sparse values stay as they are."""
    sparse = sp.issparse(X)
    if sparse and np.issubdtype(X.dtype, np.complexfloating):
        raise ValueError(f"Complex data not supported\n{X!r}\n")
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="overflow encountered in cast")
        array = check(
            X,
            accept_sparse="csr",
            dtype="numeric" if sparse else np.float32,
            **limits,
            **more,
        )
    if sparse and array.data.size:
        largest = max(abs(float(array.data.min())), abs(float(array.data.max())))
        if largest > float(np.finfo(np.float32).max):
            raise ValueError("Input X contains a value too large for dtype('float32').")
    return array


def _check_array(estimator, X, reset, limits):
    """Arrays, tensors, sparse matrices and DataFrames: scikit-learn's check."""
    if _is_a(X, "torch", "Tensor"):
        import torch

        if X.layout != torch.strided:
            raise TypeError(
                f"X is a sparse tensor ({X.layout}); give a scipy.sparse CSR matrix or X.to_dense()"
            )
        X = X.detach().cpu()
        X = (X.float() if X.is_floating_point() else X).numpy()

    def check(X, **options):
        return validate_data(estimator, X, reset=reset, **options)

    try:
        array = _checked(check, X, limits)
    except (TypeError, ValueError) as error:
        columns = _columns_without_numbers(X)
        if not columns or not ("convert" in str(error) or isinstance(error, TypeError)):
            raise
        raise ValueError(
            f"X has columns that hold no numbers: {_some(columns)} ({error}). "
            "Drop or encode them, for example X.select_dtypes('number')."
        ) from error
    names = getattr(estimator, "feature_names_in_", None) if hasattr(X, "columns") else None
    if sp.issparse(array):
        return SparseRows(array, feature_names=names)
    return DenseRows(array, feature_names=names)


def _columns_without_numbers(X):
    """Names of DataFrame columns with at least one value that is no number."""
    if not _is_a(X, "pandas", "DataFrame"):
        return []
    import pandas as pd

    numeric = X.select_dtypes(["number", "bool"]).columns
    return [
        name
        for name in X.columns
        if name not in numeric and pd.to_numeric(X[name], errors="coerce").isna().any()
    ]


def _some(names, most=5):
    """List at most five names, and how many more there are."""
    names = [str(name) for name in names]
    more = f", ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_anndata(estimator, adata, reset, layer, limits):
    """AnnData in memory or on disk: genes by name, the matrix as it lies."""
    # A view of a matrix on disk would be read as a whole by `adata.X`: go to what it views.
    parent = adata._adata_ref if adata.is_view else adata
    if layer is not None and layer not in parent.layers:
        raise ValueError(
            f"layer={layer!r} is not in the AnnData, which has the layers "
            f"{_some(parent.layers) or '(none)'}; layer=None reads .X."
        )
    matrix = parent.X if layer is None else parent.layers[layer]
    if matrix is None:
        raise ValueError(
            "The AnnData has no .X; name the matrix to read with layer=, one of: "
            f"{_some(parent.layers) or '(none)'}."
        )
    if type(matrix).__module__.split(".")[0] == "dask":
        raise TypeError(
            "The AnnData holds a Dask array, which cannot be read row by row. Load it with "
            "adata.to_memory(), or open the file with anndata.read_h5ad(path, backed='r')."
        )
    columns, names = _align_genes(estimator, adata, reset)
    _set_names(estimator, (adata.n_obs, len(names)), names, reset)
    on_disk = hasattr(matrix, "group") or type(matrix).__module__.split(".")[0] in ("h5py", "zarr")
    if on_disk:
        index = None
        if adata.is_view:
            index = np.arange(parent.n_obs)[adata._oidx]
            kept = np.arange(parent.n_vars)[adata._vidx]
            columns = kept if columns is None else kept[columns]
            if np.array_equal(columns, np.arange(parent.n_vars)):
                columns = None
        rows = BackedRows(matrix, index, columns, names)
        _check_backed(estimator, rows, limits)
        return rows
    matrix = adata.X if layer is None else adata.layers[layer]
    matrix = matrix if sp.issparse(matrix) else np.asarray(matrix)
    matrix = _checked(check_array, matrix, limits, estimator=estimator, input_name="X")
    if sp.issparse(matrix):
        rows = SparseRows(matrix, columns, names)
    else:
        rows = DenseRows(matrix if columns is None else matrix[:, columns], names)
    rows.origin = "anndata"
    return rows


def _align_genes(estimator, adata, reset):
    """Columns of ``adata`` in the order of ``fit`` (None: as they are), and their names."""
    import pandas as pd

    found = pd.Index(adata.var_names.astype(str))
    wanted = None if reset else getattr(estimator, "feature_names_in_", None)
    needed = found if wanted is None else found[found.isin(wanted)]
    if not needed.is_unique:
        repeated = needed[needed.duplicated()].unique()
        raise ValueError(
            f"Gene names must be unique, but these are repeated: {_some(repeated)}. "
            "Call adata.var_names_make_unique() first."
        )
    if wanted is None:
        return None, found.to_numpy(dtype=object)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"The AnnData lacks {len(missing)} of the {len(wanted)} genes that "
            f"{type(estimator).__name__} was fitted with: {_some(missing)}. Genes are matched by "
            "adata.var_names; are they of the same kind (symbols or Ensembl identifiers)?"
        )
    if len(found) == len(wanted) and np.array_equal(found, wanted):
        return None, wanted
    first = {name: position for position, name in reversed(list(enumerate(found)))}
    return np.array([first[name] for name in wanted], dtype=np.int64), wanted


def _check_backed(estimator, rows, limits):
    """Read a matrix on disk once, in blocks, before any work is spent on it."""
    small = {key: value for key, value in limits.items() if key != "ensure_non_negative"}
    _check_limits(estimator, rows, **small)
    name = type(estimator).__name__
    if np.issubdtype(rows.dtype, np.complexfloating) or rows.dtype.kind not in "biuf":
        raise ValueError(f"The matrix on disk has dtype {rows.dtype}; real numbers are needed.")
    signed = limits["ensure_non_negative"] and rows.dtype.kind in "if"
    if rows.dtype.kind != "f" and not signed:
        return
    for _, block in rows.blocks():
        assert_all_finite(block, estimator_name=name, input_name="X")
        if signed:
            check_non_negative(block, f"X in {name}")


# --------------------------------------------------------------------------------------------------
# Principal components
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The linear map between features and principal components.

    Attributes
    ----------
    mean : ndarray of shape (d,), float64
        Mean of the features.
    components : ndarray of shape (k, d), float64
        Orthonormal axes by falling variance; the largest loading of each is positive.
    explained_std : ndarray of shape (k,), float64
        Standard deviation (over n - 1) of the scores on each axis.
    """

    mean: np.ndarray
    components: np.ndarray
    explained_std: np.ndarray
    _shift: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        """Precompute the scores of the mean: blocks are shifted by them, not centred."""
        object.__setattr__(self, "_shift", self.mean @ self.components.T)

    def transform(self, X):
        """Scores of rows or of a tensor.

        Parameters
        ----------
        X : Rows or tensor of shape (n, d)
            Samples in the space of the features.

        Returns
        -------
        Rows or tensor of shape (n, k), float32
            Rows for Rows: one array for rows in memory, a temporary file for rows on disk.
            The scores of the Rows that these components were computed from are kept with them.
        """
        if not isinstance(X, Rows):
            X, mean, components = self._on_device_of(X)
            return ((X - mean) @ components.T).float()
        known = [pcs for pcs in X._memo.values() if isinstance(pcs, PrincipalComponents)]
        whole = next((pcs for pcs in known if self._begins(pcs)), None)
        if whole is None:
            return self._scores_of(X)
        if whole not in X._memo:
            X._memo[whole] = whole._scores_of(X)
        scores, k = X._memo[whole], len(self.components)
        if k == scores.shape[1]:
            return scores
        if scores.resident:
            return DenseRows(np.asarray(scores)[:, :k])
        return MappedRows(scores, partial(_first_columns, k=k), k, native=True)

    def inverse(self, Z):
        """Features of scores.

        Parameters
        ----------
        Z : tensor of shape (n, k)
            Scores.

        Returns
        -------
        tensor of shape (n, d), float32
            The point of the feature space on the span of the components.
        """
        Z, mean, components = self._on_device_of(Z)
        return (Z @ components + mean).float()

    def _on_device_of(self, tensor):
        """Give tensor, mean and components on its device, in double precision where it has one."""
        import torch

        dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
        mean, components = (
            torch.as_tensor(array, dtype=dtype, device=tensor.device)
            for array in (self.mean, self.components)
        )
        return tensor.detach().to(dtype), mean, components

    def _first(self, k):
        """Take the k leading components."""
        if k >= len(self.components):
            return self
        return PrincipalComponents(self.mean, self.components[:k], self.explained_std[:k])

    def _begins(self, other):
        """Whether these are the leading components of ``other``."""
        return np.array_equal(self.components, other.components[: len(self.components)]) and (
            np.array_equal(self.mean, other.mean)
        )

    def _scores_of(self, rows):
        shape = (len(rows), len(self.components))
        if rows.in_memory:
            out = np.empty(shape, dtype=np.float32)
            for part, block in rows.blocks():
                out[part] = self._scores(block)
            return DenseRows(out)
        with tempfile.NamedTemporaryFile(prefix="diffaugkit-", delete=False) as file:
            scores = _FileRows(file.name, shape)  # from here on the file cannot be left over
            for _, block in rows.blocks():
                file.write(self._scores(block).tobytes())
        return scores

    def _scores(self, block):
        # In double precision, so that a row's scores do not depend on the rows beside it.
        return (block.astype(np.float64) @ self.components.T - self._shift).astype(np.float32)


def _first_columns(block, k):
    return block[:, :k]


def principal_components(rows, n_components, *, random_state=0):
    """Principal components of rows, in memory that does not grow with their number.

    Exact (covariance, or Gram matrix where there are fewer rows than features) up to 1 000 rows or
    features, whichever is fewer, and up to 3 000 features of data on disk, which one pass reads;
    beyond that by randomised block Krylov iteration [1]_ in single precision, ended by a
    Rayleigh-Ritz step in double precision. The leading 20 scores of cells in memory then agree with
    the exact ones to 1e-4; data on disk are read at most 12 times, which leaves 1e-2 or so. At
    least 50 components are computed, once for the same Rows, and kept with them: asking for fewer
    gives the leading ones of these.

    Parameters
    ----------
    rows : Rows of shape (n, d)
        The data, n >= 2.
    n_components : int
        Number of components; clipped to ``min(n - 1, d)`` and to the numerical rank of the data
        (at least 1), so that no axis is noise to be blown up by whitening.
    random_state : int or RandomState, default=0
        Start of the randomised iteration; an int makes it reproducible.

    Returns
    -------
    PrincipalComponents
        Mean, axes and standard deviations, with ``transform`` and ``inverse``.

    References
    ----------
    .. [1] C. Musco and C. Musco, "Randomized block Krylov methods for stronger and faster
       approximate singular value decomposition", NeurIPS 2015, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.data import DenseRows, principal_components
    >>> rows = DenseRows(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    >>> pcs = principal_components(rows, 1)
    >>> pcs.components.round(2).tolist(), pcs.explained_std.round(2).tolist()
    ([[0.6, 0.8]], [5.0])
    """
    n, d = rows.shape
    if n < 2:
        raise ValueError(f"Principal components need at least 2 rows, got {n}.")
    k = max(1, min(int(n_components), n - 1, d))
    one_pass = n > d and d <= (_EXACT_PCA_LIMIT if _cheap_to_read(rows) else _ONE_PASS_PCA_LIMIT)
    exact = one_pass or min(n, d) <= _EXACT_PCA_LIMIT
    memoise = exact or isinstance(random_state, int | np.integer)
    seed = None if exact else random_state
    if memoise:
        for key, known in rows._memo.items():
            if isinstance(known, PrincipalComponents) and key[1] == seed and key[2] >= k:
                return known._first(k)
    n_computed = min(max(k, _LEADING_COMPONENTS), n - 1, d)
    if one_pass:
        mean, variances, components = _covariance_components(rows, n_computed)
    else:
        mean = sum(block.astype(np.float64).sum(axis=0) for _, block in rows.blocks()) / n
        if exact:
            variances, components = _gram_components(rows, mean, n_computed)
        else:
            random_state = check_random_state(random_state)
            variances, components = _krylov_components(rows, mean, n_computed, random_state)
    # What is left of a constant after rounding is no variance.
    eps = np.finfo(float).eps
    variances = np.where(variances > n * (8 * eps * np.linalg.norm(mean)) ** 2, variances, 0.0)
    rank = max(1, int(np.sum(variances > variances[0] * max(n, d) * eps)))
    variances, components = variances[:rank], components[:rank]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.where(components[np.arange(rank), largest] < 0, -1.0, 1.0)[:, None]
    pcs = PrincipalComponents(mean, components, np.sqrt(variances / (n - 1)))
    if memoise:
        rows._memo["components", seed, n_computed] = pcs
    return pcs._first(k)


def _cheap_to_read(rows):
    """Whether another pass over the rows costs next to nothing."""
    return rows.resident or isinstance(rows, SparseRows)


def _centred(block, mean):
    return (block.toarray() if sp.issparse(block) else block).astype(np.float64) - mean


def _top_eigenpairs(matrix, k):
    """Find the k largest eigenvalues, falling, of a symmetric matrix (lower half), and vectors."""
    size = len(matrix)
    values, vectors = scipy.linalg.eigh(
        matrix, lower=True, subset_by_index=(size - k, size - 1), overwrite_a=True
    )
    return values[::-1], vectors[:, ::-1].T


def _covariance_components(rows, k):
    """From the (d, d) scatter matrix, summed over blocks, with the mean, in one pass."""
    n, d = rows.shape
    scatter, total, shift = np.zeros((d, d), order="F"), np.zeros(d), None
    for _, block in rows.blocks():
        if shift is None:
            # Near the mean, so that moving to the mean afterwards costs no digits.
            shift = np.asarray(block.astype(np.float64).mean(axis=0)).ravel()
        centred = _centred(block, shift)
        total += centred.sum(axis=0)
        scatter = scipy.linalg.blas.dsyrk(
            1.0, centred.T, beta=1.0, c=scatter, overwrite_c=True, lower=1
        )
    scatter -= np.outer(total, total / n)
    return shift + total / n, *_top_eigenpairs(scatter, k)


def _gram_components(rows, mean, k):
    """From the (n, n) inner products of the rows, for more features than rows."""
    n, d = rows.shape
    gram = np.zeros((n, n), order="F")
    for left, block in rows.blocks():
        centred = _centred(block, mean)
        for right, other in rows.blocks():
            if right.start <= left.start:
                gram[left, right] = centred @ _centred(other, mean).T
    values, vectors = _top_eigenpairs(gram, k)
    components = np.zeros((k, d))
    for part, block in rows.blocks():
        components += vectors[:, part] @ _centred(block, mean)
    # Axes without variance are cut by the caller; here they only must not divide by zero.
    lengths = np.linalg.norm(components, axis=1, keepdims=True)
    empty = lengths[:, 0] == 0
    components[empty, 0] = lengths[empty] = 1.0
    return values, components / lengths


def _krylov_components(rows, mean, k, random_state):
    """From products with thin matrices only: sparse blocks stay sparse, nothing is (d, d).

    Block Lanczos iteration with full reorthogonalisation. Narrow blocks reach a high degree of the
    polynomial, so the accuracy, with the fewest operations; where a pass over the data is dear,
    wide ones reach it in the fewest passes.
    """
    d = rows.shape[1]
    cheap = _cheap_to_read(rows)
    width, n_blocks = (16, 48) if cheap else (k + max(10, k // 2), 10)
    most = min(width * n_blocks, d)
    multiply = _scatter_product(rows, mean)
    # Single precision halves the time; what it costs in digits, the last step below gives back.
    basis, products = (np.empty((d, most), np.float32, order="F") for _ in range(2))
    Q, m = random_state.standard_normal((d, min(width, most))).astype(np.float32), 0
    for number in range(1, n_blocks + 1):
        for _ in range(2):  # twice is enough for full orthogonality
            Q = np.linalg.qr(Q - basis[:, :m] @ (basis[:, :m].T @ Q))[0]
        new = slice(m, m + Q.shape[1])
        basis[:, new], products[:, new] = Q, multiply(Q)
        m = new.stop
        last = m == most or number == n_blocks
        if last or (m >= 2 * k and (number % 6 == 0 or not cheap)):
            small = basis[:, :m].T @ products[:, :m]
            values, vectors = _top_eigenpairs(small.astype(np.float64), min(k, m))
            vectors = vectors.T.astype(np.float32)
            axes = basis[:, :m] @ vectors
            misfits = np.linalg.norm(products[:, :m] @ vectors - axes * values, axis=0)
            if last or np.all(misfits <= np.maximum(1e-4 * values, 1e-6 * values[0])):
                break
        Q = products[:, new][:, : most - m]
    axes = np.linalg.qr(axes.astype(np.float64))[0]
    small, shift = np.zeros((axes.shape[1],) * 2), mean @ axes
    for _, block in rows.blocks():
        scores = block.astype(np.float64) @ axes - shift
        small += scores.T @ scores
    values, vectors = _top_eigenpairs(small, len(small))
    return values, vectors @ axes.T


def _scatter_product(rows, mean):
    """Make the function Q -> A Q, float32, of the scatter matrix A = (X - mean)^T (X - mean)."""
    mean_32 = mean.astype(np.float32)
    centred = None
    if rows.resident and rows.shape[0] * rows.shape[1] <= _CENTRED_VALUES:
        centred = np.asarray(rows) - mean_32

    def multiply(Q):
        if centred is not None:
            return centred.T @ (centred @ Q)
        product, wide = np.zeros(Q.shape), Q.astype(np.float64)
        shift = mean @ wide
        for _, block in rows.blocks():
            if sp.issparse(block):
                block = block.astype(np.float64)
                scores = block @ wide - shift
                product += block.T @ scores - np.outer(mean, scores.sum(axis=0))
            else:
                block = block - mean_32
                product += block.T @ (block @ Q)
        return product

    return multiply
