"""The one gate for input: whatever ``X`` was, after :func:`check_X` there are only ``Rows``."""

import warnings

import numpy as np
import scipy.sparse as sp
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import check_array, check_non_negative, validate_data

from diffaugkit.rows import BackedRows, DenseRows, Rows, SparseRows

__all__ = ["check_X", "looks_like_counts", "sample_range"]


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
    >>> from diffaugkit.data import looks_like_counts
    >>> from diffaugkit.rows import SparseRows
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
