"""The one gate for input: whatever ``X`` was, after :func:`check_X` there are only ``Rows``."""

import contextlib
import copy
import functools
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.utils import assert_all_finite
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_array, check_non_negative, validate_data

from diffaugkit.arrays import some, to_numpy, warn
from diffaugkit.image_inputs import check_image_shape, is_a, reading_range, rows_of_images
from diffaugkit.image_rows import ImageRows, resolve_image_shape
from diffaugkit.rows import BackedRows, DenseRows, Rows, SparseRows

__all__ = [
    "check_X",
    "keep_names_of_rows",
    "looks_like_counts",
    "sample_range",
    "unchanged_on_failure",
    "warn_if_dim",
]

# Files of tables, and what reads them.
_READERS = {
    ".csv": "pandas.read_csv",
    ".h5": "scanpy.read_10x_h5",
    ".h5ad": "anndata.read_h5ad",
    ".loom": "anndata.io.read_loom",
    ".npy": "numpy.load",
    ".npz": "numpy.load",
    ".parquet": "pandas.read_parquet",
    ".tsv": "pandas.read_table",
    ".zarr": "anndata.read_zarr",
}

# Images that fill a smaller part of their scale than this are warned of: with digits at a sixteenth
# a generator had a Frechet distance of 44 in place of 1, at a quarter 3. So many are looked at.
_LEAST_SPAN, _LOOKED_AT = 1 / 8, 64
# What an estimator that takes images keeps of those that it was fitted on.
_OF_IMAGES = ("image_shape_", "_pixel_range", "_layout")


@contextlib.contextmanager
def unchanged_on_failure(estimator):
    """Give the estimator its attributes back if the block fails or is interrupted."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def keep_names_of_rows(transform):
    """Let a ``transform`` with pandas output name its rows as an AnnData does, as obsm demands."""

    @functools.wraps(transform)
    def run(self, X):
        found, names = transform(self, X), getattr(X, "obs_names", None)
        pandas_output = _get_output_config("transform", self)["dense"] == "pandas"
        if names is None or not pandas_output or sp.issparse(found):
            return found
        import pandas as pd

        # scikit-learn, which makes a frame of every result, leaves the index of one alone.
        return pd.DataFrame(np.asarray(found), index=names)

    return run


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
    images=False,
    image_shape=None,
    min_image_size=1,
    judge_scale=True,
):
    """Check vectors or images of any container and turn them into :class:`Rows`.

    Nothing is copied but a dense array whose dtype is not float32, nor uint8 for images (one
    float32 copy), and a sparse one that is not CSR. The caller's object is never modified. Genes of
    an AnnData are aligned by name to what the estimator was fitted with, surplus genes are ignored;
    a DataFrame must come with the columns of ``fit`` in their order, as everywhere in scikit-learn.

    Parameters
    ----------
    estimator : estimator
        Gets ``n_features_in_`` and ``feature_names_in_`` if ``reset``, is compared with them if
        not. Where images are let in also ``image_shape_`` = (h, w, c), None for vectors,
        ``_pixel_range`` and ``_layout``. It keeps its attributes when the check fails.
    X : array-like, tensor, DataFrame, sparse matrix, AnnData or Rows of shape (n, d), or images
        The samples. Rows were checked when they were made: only names and shape are compared.
        Images are (n, h, w, c) arrays, (n, c, h, w) tensors, (n, h, w) greyscale, (n, h*w*c) with
        `image_shape`, lists or arrays of PIL images or of paths, a folder, WebDataset shards
        (``"name-{0000..0015}.tar"``), or a map-style Dataset.
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
    images : bool, default=False
        Whether the estimator takes images, too.
    image_shape : tuple of (int, int, int) or None, default=None
        (h, w, c) of flattened images; one entry may be -1, which is worked out from the width. None
        reads 2-D input as vectors.
    min_image_size : int, default=1
        Least height and width that the estimator can use, such as the size of a patch.
    judge_scale : bool, default=True
        Whether ``fit`` warns of dim images, see :func:`warn_if_dim`.

    Returns
    -------
    Rows of shape (n, d) or (n, C, H, W)
        Random access to the samples: vectors as float32, images as uint8 or float32. Their
        ``pixel_range`` is the scale to read them with.

    Raises
    ------
    ValueError
        For NaN, infinity, masked values, an empty, one-dimensional or complex input, a wrong
        width, missing or repeated genes, columns that hold no numbers, raw counts or negative
        values where these are refused; for images that cannot be read, are too small, or differ
        from those of ``fit`` in size or in the scale of their pixels.
    TypeError
        For a container that cannot be read row by row (Dask, sparse tensors, streams), and for a
        list of tables or a dict.

    Notes
    -----
    The scale of pixels after ``fit`` depends on the type of the data and on what was fitted, never
    on the other images of a batch. uint8 is 0 to 255 wherever the estimator knows what black and
    white are (fitted on uint8, or on floats within [0, 1] or [-1, 1]). Floats have the scale of the
    floats of ``fit``, and lie in [0, 1] for an estimator that was fitted on uint8. All other
    combinations are refused: a mistaken scale would show in the results only.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.decomposition import PCA
    >>> from diffaugkit.data import check_X
    >>> rows = check_X(PCA(), np.arange(6.0).reshape(3, 2), reset=True)
    >>> rows.shape, rows[[2, 0]].tolist()
    ((3, 2), [[4.0, 5.0], [0.0, 1.0]])
    """
    limits = {
        "ensure_min_samples": ensure_min_samples,
        "ensure_min_features": ensure_min_features,
        "ensure_non_negative": ensure_non_negative,
    }
    with unchanged_on_failure(estimator):  # what an earlier fit learned
        _refuse_table_files(X)
        _refuse_collections(X)
        _refuse_masked(X)
        if not images:
            _refuse_images(estimator, X)
        else:
            rows = _image_rows(estimator, X, reset, image_shape)
            if rows is not None:
                rows = _check_images(estimator, rows, reset, limits, min_image_size)
                if reset and judge_scale and not isinstance(X, Rows):
                    warn_if_dim(estimator, [rows], rows.pixel_range)
                return rows
            _check_vectors_for_images(estimator, X, reset)
        if isinstance(X, Rows):
            _check_names_of_rows(estimator, X, reset)
            _check_limits(estimator, X, **limits)
            rows = X
        elif is_a(X, "anndata", "AnnData"):
            rows = _check_anndata(estimator, X, reset, layer, limits)
        else:
            rows = _check_array(estimator, X, reset, limits)
        if not allow_counts:
            _check_counts(estimator, rows, reset, refuse=not isinstance(X, Rows))
    return rows


def _check_counts(estimator, rows, reset, refuse):
    # Where the values of fit were whole numbers but no counts, as some were negative or none was
    # large, single rows of the same table may look like counts.
    if not reset and (not refuse or getattr(estimator, "_whole_numbers", False)):
        return
    found = sample_range(rows)
    if refuse and _are_counts(rows, *found):
        name = type(estimator).__name__
        raise ValueError(
            f"X looks like raw counts (non-negative integers, some of them large), but {name} "
            "expects normalised values. Put a CellPreprocessor in front: "
            f"make_pipeline(CellPreprocessor(), {name}()), or, if they are no counts, a "
            "StandardScaler."
        )
    if reset:
        estimator._whole_numbers = found[2] > 0.5


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
    return _are_counts(rows, *sample_range(rows))


def _are_counts(rows, smallest, largest, whole):
    # Beyond 2 to the 24 every float32 is whole.
    large = (255 if rows.origin == "dense" else 10) < largest < 2**24
    return whole == 1 and smallest >= 0 and large


def sample_range(rows):
    """Look at up to 512 rows: least and greatest value, share of whole numbers beside zeros."""
    if not len(rows):
        return 0.0, 0.0, 1.0
    if len(rows) <= 512:
        block = rows.block(slice(None))
    else:
        # Eight runs over the whole length: cells are often sorted by batch, and runs read fast.
        starts = np.linspace(0, len(rows) - 64, 8).astype(int)
        block = rows.block((starts[:, None] + np.arange(64)).ravel())
    values = block.data if sp.issparse(block) else block
    if not values.size:
        return 0.0, 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if sp.issparse(block):
        low, high = min(low, 0.0), max(high, 0.0)
    values = values[values != 0]
    return low, high, float(np.mean(values == np.rint(values))) if values.size else 1.0


def warn_if_dim(estimator, parts, scale):
    """Warn of images that fill next to nothing of their scale.

    Cameras of 12 bits write words of 16: on the scale of the words all their images are black.

    Parameters
    ----------
    estimator : estimator
        Whose fit it is.
    parts : sequence of Rows of shape (n, C, H, W)
        The images. Of integers some are looked at; files of 8 bits, which fill them as a rule, are
        not decoded for that.
    scale : tuple of (low, high) or None
        The pixel range to read them with.
    """
    if scale is None:
        return
    seen = [_values_of(part) for part in _evenly(parts)]
    low, high = min(low for low, _ in seen), max(high for _, high in seen)
    if not 0 < high - low < _LEAST_SPAN * (scale[1] - scale[0]):
        return
    largest = 2 ** int(high).bit_length() - 1 if isinstance(scale[1], int) else high
    warn(
        f"The pixels of X lie between {low:g} and {high:g}, a small part of their scale, which is "
        f"{scale[0]:g} to {scale[1]:g}: for {type(estimator).__name__} such images are nearly one "
        "colour, and generated ones become noise. Divide by the largest value that your camera "
        f"gives, as X / {largest:g}, now and wherever the model is used."
    )


def _values_of(rows):
    """Least and greatest value of images; of integers those of some rows, one after the other."""
    if rows.value_range is not None:
        return rows.value_range
    if not rows.resident and rows.dtype == np.uint8:
        return rows.pixel_range
    blocks = [rows.block([row]) for row in _evenly(range(len(rows)))]
    return float(min(block.min() for block in blocks)), float(max(block.max() for block in blocks))


def _evenly(parts):
    places = np.linspace(0, len(parts) - 1, _LOOKED_AT).astype(int)
    return [parts[i] for i in np.unique(places)]


def _set_names(estimator, rows_shape, names, reset):
    """Set or check width and names by scikit-learn's own rules and messages."""
    # Without rows: the columns are compared, and nothing is read.
    stand_in = np.empty((0, math.prod(rows_shape[1:])))
    if names is not None:
        import pandas as pd

        stand_in = pd.DataFrame(columns=np.asarray(names, dtype=object))
    validate_data(estimator, stand_in, reset=reset, skip_check_array=True)


def _check_names_of_rows(estimator, rows, reset):
    names = rows.feature_names
    if not reset:
        known = getattr(estimator, "feature_names_in_", None)
        if known is None or names is None:
            # Rows without names come from our own steps: no reason to warn.
            width = getattr(estimator, "n_features_in_", rows.n_features)
            if rows.n_features != width:
                raise ValueError(
                    f"X has {rows.n_features} features, but {type(estimator).__name__} is "
                    f"expecting {width} features as input."
                )
            return
    _set_names(estimator, rows.shape, names, reset)


def _check_limits(
    estimator, rows, *, ensure_min_samples, ensure_min_features, ensure_non_negative=False
):
    """Raise scikit-learn's own messages for Rows, which its checks cannot read."""
    name = type(estimator).__name__
    counts = (len(rows), rows.n_features)
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


def _checked(check, X, limits, *, dtype=np.float32, **more):
    """Run a scikit-learn check with the dtype that costs least: sparse values stay as they are."""
    sparse = sp.issparse(X)
    if sparse and np.issubdtype(X.dtype, np.complexfloating):
        raise ValueError(f"Complex data not supported\n{X!r}\n")
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="overflow encountered in cast")
        array = check(
            X,
            accept_sparse="csr",
            dtype="numeric" if sparse else dtype,
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
    array, names = _validated(estimator, X, reset, limits)
    if sp.issparse(array):
        return SparseRows(array, feature_names=names)
    return DenseRows(array, feature_names=names)


def _validated(estimator, X, reset, limits, **more):
    """Array or CSR of two axes after scikit-learn's check, and the names of its columns."""
    if is_a(X, "torch", "Tensor"):
        import torch

        if X.layout != torch.strided:
            raise TypeError(
                f"X is a sparse tensor ({X.layout}); give a scipy.sparse CSR matrix or X.to_dense()"
            )
        X = to_numpy(X)

    def check(X, **options):
        return validate_data(estimator, X, reset=reset, **options)

    try:
        array = _checked(check, X, limits, **more)
    except (TypeError, ValueError) as error:
        columns = _columns_without_numbers(X)
        if not columns or not ("convert" in str(error) or isinstance(error, TypeError)):
            raise
        raise ValueError(
            f"X has columns that hold no numbers: {some(columns)} ({error}). "
            "Drop or encode them, for example X.select_dtypes('number')."
        ) from error
    names = getattr(estimator, "feature_names_in_", None) if hasattr(X, "columns") else None
    return array, names


def _columns_without_numbers(X):
    """Names of DataFrame columns with at least one value that is no number."""
    if not is_a(X, "pandas", "DataFrame"):
        return []
    import pandas as pd

    numeric = X.select_dtypes(["number", "bool"]).columns
    times = X.select_dtypes(["datetime", "datetimetz", "timedelta"]).columns
    return [
        name
        for name in X.columns
        if name in times
        or (name not in numeric and pd.to_numeric(X[name], errors="coerce").isna().any())
    ]


def _check_anndata(estimator, adata, reset, layer, limits):
    """AnnData in memory or on disk: genes by name, the matrix as it lies."""
    # A view of a matrix on disk would be read as a whole by `adata.X`: go to what it views.
    parent = adata._adata_ref if adata.is_view else adata
    if layer is not None and layer not in parent.layers:
        raise ValueError(
            f"layer={layer!r} is not in the AnnData, which has the layers "
            f"{some(parent.layers) or '(none)'}; layer=None reads .X."
        )
    matrix = parent.X if layer is None else parent.layers[layer]
    if matrix is None:
        raise ValueError(
            "The AnnData has no .X; name the matrix to read with layer=, one of: "
            f"{some(parent.layers) or '(none)'}."
        )
    _refuse_masked(matrix)
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
        _check_in_blocks(estimator, rows, limits)
        return rows
    matrix = adata.X if layer is None else adata.layers[layer]
    # Surplus genes are not looked at: they may hold anything.
    if not sp.issparse(matrix):
        matrix = np.asarray(matrix)
        matrix = matrix if columns is None else matrix[:, columns]
        columns = None
    if columns is not None:
        rows = SparseRows(matrix, columns, names)
        _check_in_blocks(estimator, rows, limits)
    else:
        matrix = _checked(check_array, matrix, limits, estimator=estimator, input_name="X")
        kind = SparseRows if sp.issparse(matrix) else DenseRows
        rows = kind(matrix, feature_names=names)
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
            f"Gene names must be unique, but these are repeated: {some(repeated)}. "
            "Call adata.var_names_make_unique() first."
        )
    if wanted is None:
        return None, found.to_numpy(dtype=object)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"The AnnData lacks {len(missing)} of the {len(wanted)} genes that "
            f"{type(estimator).__name__} was fitted with: {some(missing)}. Genes are matched by "
            "adata.var_names; are they of the same kind (symbols or Ensembl identifiers)?"
        )
    if len(found) == len(wanted) and np.array_equal(found, wanted):
        return None, wanted
    return found.get_indexer_for(wanted), wanted


def _check_in_blocks(estimator, rows, limits):
    """Read a matrix as it is stored once, in blocks, before any work is spent on it."""
    small = {key: value for key, value in limits.items() if key != "ensure_non_negative"}
    _check_limits(estimator, rows, **small)
    name = type(estimator).__name__
    dtype = rows.stored_dtype
    if np.issubdtype(dtype, np.complexfloating) or dtype.kind not in "biuf":
        raise ValueError(f"The matrix has dtype {dtype}; real numbers are needed.")
    signed = limits["ensure_non_negative"] and dtype.kind in "if"
    if dtype.kind != "f" and not signed:
        return
    for _, block in rows.blocks():
        assert_all_finite(block, estimator_name=name, input_name="X")
        if signed:
            check_non_negative(block, f"X in {name}")


# ---- images --------------------------------------------------------------------------------------


def _refuse_table_files(X):
    """Say what reads the file of a table."""
    if isinstance(X, str | os.PathLike):
        reader = _READERS.get(Path(X).suffix.lower())
        if reader is not None:
            raise ValueError(
                f"Expected 2D array: X is {str(X)!r}, the path of a table. Read it first, as "
                f"X = {reader}({str(X)!r})."
            )


def _refuse_collections(X):
    """Say how several tables become one, and that one of several arrays is to be picked."""
    if isinstance(X, Mapping) and not hasattr(X, "shape"):  # sparse DOK matrices are dicts, too
        raise TypeError(
            f"X is a {type(X).__name__} with the keys {some(X) or '(none)'}: give what one of them "
            "holds, X[key]."
        )
    if isinstance(X, list | tuple) and X:
        for package, table, join in (
            ("anndata", "AnnData", "anndata.concat(X, label='batch')"),
            ("pandas", "DataFrame", "pandas.concat(X)"),
        ):
            if is_a(X[0], package, table):
                raise TypeError(f"X is a list of {table}: join them first, as {join}.")


def _refuse_masked(X):
    """Refuse masked values: what lies beneath the mask would be read in silence."""
    listed = isinstance(X, list | tuple)
    for row, part in enumerate(X if listed else [X]):
        if isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part):
            where = f"Row {row} of X" if listed else "X"
            raise ValueError(
                f"{where} is a masked array with masked values, which are no numbers: leave their "
                "rows or columns out, or fill them, as X.filled(0)."
            )


def _refuse_images(estimator, X):
    """Say what to do where images are given to an estimator that takes vectors."""
    shape = getattr(X, "shape", ())
    if isinstance(X, str | os.PathLike) or (len(shape) in (3, 4) and not isinstance(X, Rows)):
        given = f"Expected 2D array: X is {str(X)!r}"
        if shape:
            given = f"Found array with dim {len(shape)}: X has shape {tuple(shape)}"
    elif isinstance(X, Rows) and X.is_image:
        given = f"X holds images (n, c, h, w) = {X.shape}"
    else:
        return
    name = type(estimator).__name__
    raise ValueError(
        f"{given}, but {name} takes vectors, of shape (n, d). For images, flatten them with "
        "X.reshape(len(X), -1), or give the embeddings of a SelfSupervisedEncoder."
    )


def _image_rows(estimator, X, reset, image_shape):
    """Turn any container of images into Rows; None where X holds vectors."""
    known, layout = None, None
    if not reset:
        known = getattr(estimator, "image_shape_", None)
        layout = getattr(estimator, "_layout", None)
    rows = rows_of_images(X, known, layout)
    if rows is not None:
        if image_shape is not None and known is None:
            resolve_image_shape(image_shape, rows.image_shape)
        return rows
    if isinstance(X, DenseRows) and image_shape is not None:
        return ImageRows(np.asarray(X), image_shape=image_shape, feature_names=X.feature_names)
    if image_shape is None:
        return None
    if sp.issparse(X) or isinstance(X, Rows) or is_a(X, "anndata", "AnnData"):
        kind = "sparse" if sp.issparse(X) else f"of type {type(X).__name__}"
        raise TypeError(
            f"X is {kind}, but image_shape={image_shape!r} says that its rows are flattened "
            "images: dense data is required. Give X.toarray(), or image_shape=None for vectors."
        )
    return _flattened_images(estimator, X, reset, image_shape)


def _flattened_images(estimator, X, reset, image_shape):
    """(n, h*w*c): scikit-learn's own check, then the shape."""
    # Files of other machines have words turned round.
    words = np.dtype(np.uint16)
    dtypes = [np.float32, np.uint8, words, words.newbyteorder()]
    # Finiteness is looked at where the row is known.
    array, names = _validated(estimator, X, reset, {}, dtype=dtypes, ensure_all_finite=False)
    if not reset and getattr(estimator, "image_shape_", None) is not None:
        image_shape = estimator.image_shape_
    return ImageRows(array, image_shape=image_shape, feature_names=names)


def _check_vectors_for_images(estimator, X, reset):
    """Vectors, for an estimator that takes images too."""
    if reset:
        for name in _OF_IMAGES:
            setattr(estimator, name, None)
        return
    known = getattr(estimator, "image_shape_", None)
    if known is not None:
        shape = getattr(X, "shape", None)
        raise ValueError(
            f"X{'' if shape is None else f' of shape {tuple(shape)}'} holds vectors, but "
            f"{type(estimator).__name__} was fitted on images (h, w, c) = {tuple(known)}. Give "
            "images, or set image_shape for flattened ones."
        )


def _check_images(estimator, rows, reset, limits, min_image_size):
    """Compare images with those of ``fit``, or learn from them what to compare with."""
    name, shape = type(estimator).__name__, rows.image_shape
    known = getattr(estimator, "image_shape_", None)
    if not reset and known is None and hasattr(estimator, "n_features_in_"):
        raise ValueError(
            f"X holds images (h, w, c) = {shape}, but {name} was fitted on vectors of "
            f"{estimator.n_features_in_} features."
        )
    if not reset and known is not None:
        check_image_shape(name, shape, known)
    _check_limits(estimator, rows, **limits)
    if min(shape[:2]) < min_image_size:
        raise ValueError(
            f"X holds images of {shape[0]} x {shape[1]} pixels, but {name} needs at least "
            f"{min_image_size} x {min_image_size} (a patch). Resize them, or choose smaller "
            "patches."
        )
    _check_names_of_rows(estimator, rows, reset)
    if reset:
        estimator.image_shape_ = shape
        estimator._pixel_range, estimator._layout = rows.pixel_range, rows.layout
        return rows
    scale = reading_range(name, rows, getattr(estimator, "_pixel_range", None))
    if scale != rows.pixel_range:
        rows = copy.copy(rows)  # the caller's keep their own
        rows.pixel_range = scale
    return rows
