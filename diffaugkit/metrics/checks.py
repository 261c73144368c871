"""What the metrics share: checks of matrices, labels and folds, and features by an extractor."""

from numbers import Integral, Real

import numpy as np
from sklearn.model_selection import StratifiedKFold
from sklearn.utils import check_array, column_or_1d, gen_batches
from sklearn.utils.multiclass import check_classification_targets

from diffaugkit.arrays import refuse_missing, some, to_numpy


def check_matrix(X, name, min_samples=1):
    """Return X as a finite, dense matrix; float32 stays so, all else becomes float64."""
    if hasattr(X, "obs_names"):
        raise TypeError(
            f"{name} is an {type(X).__name__}: give the matrix that is meant, such as adata.X or "
            "adata.obsm['X_pca']."
        )
    X = to_numpy(X)
    shape = getattr(X, "shape", None) or np.shape(X)
    if len(shape) != 2:
        raise ValueError(
            f"{name} must be a matrix (n_samples, n_features), got shape {tuple(shape)}; flatten "
            "images, or pass their embeddings."
        )
    return check_array(
        X, dtype=[np.float64, np.float32], ensure_min_samples=min_samples, input_name=name
    )


def in_columns_of(X, reference):
    """Return a table with its columns in the order of another of the same names, else as it is."""
    own, known = (list(getattr(table, "columns", ())) for table in (X, reference))
    same = len(own) == len(known) == len(set(own)) and set(own) == set(known)
    return X[known] if same and own != known else X


def check_pair(real, generated, min_samples=1):
    """Return (real, generated) as matrices of one width and one dtype."""
    generated = check_matrix(in_columns_of(generated, real), "generated", min_samples)
    real = check_matrix(real, "real", min_samples)
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated has {generated.shape[1]} features, but real has {real.shape[1]}; both "
            "must lie in the same space."
        )
    # One dtype, or the distance routines convert the larger matrix again and again.
    dtype = np.result_type(generated, real)
    return real.astype(dtype, copy=False), generated.astype(dtype, copy=False)


def check_labels(y, n=None, name="y"):
    """Return (classes, codes) of discrete labels."""
    refuse_missing(y, name)
    y = column_or_1d(np.asarray(y))
    if len(y) == 0:
        raise ValueError(f"{name} is empty.")
    if n is not None and len(y) != n:
        raise ValueError(f"{name} has {len(y)} labels for {n} samples.")
    check_classification_targets(y)
    return np.unique(y, return_inverse=True)


def check_known(y_test, classes):
    """Refuse test labels that are strings where those of training are numbers, or the reverse."""
    found, known = np.unique(y_test).tolist(), classes.tolist()
    if {isinstance(label, str) for label in found} ^ {isinstance(label, str) for label in known}:
        raise ValueError(
            f"The labels of y_test ({some(found)}) are of another kind than those of y "
            f"({some(known)}): give both as strings, or both as numbers."
        )


def check_neighbors(n_neighbors, available=None, what="real samples"):
    """Refuse a number of neighbours that is no number, or more than there are."""
    if not isinstance(n_neighbors, Integral) or n_neighbors < 1:
        raise ValueError(f"n_neighbors must be an int >= 1, got {n_neighbors!r}.")
    if available is not None and n_neighbors > available:
        raise ValueError(
            f"n_neighbors={n_neighbors}, but there are only {available} {what}: give more samples."
        )


def check_temperature(temperature):
    """Refuse a temperature that is no number, or not above 0."""
    if not isinstance(temperature, Real) or not temperature > 0:
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}.")


def stratified_folds(codes, cv, random_state):
    """Return a stratified splitter for an int `cv`; rare classes may miss some folds."""
    if not isinstance(cv, Integral):
        return cv
    if cv < 2:
        raise ValueError(f"cv must be at least 2, got {cv}.")
    largest = np.bincount(codes).max()
    if largest < cv:
        raise ValueError(
            f"cv={cv} folds need a class of as many samples, but the largest has {largest}; "
            "lower cv."
        )
    return StratifiedKFold(cv, shuffle=True, random_state=random_state)


def about_center(points, by):
    """Return both moved to the mean of `by`: distances lose the digits that an offset has."""
    center = by.mean(axis=0, dtype=np.float64)
    return (points - center).astype(points.dtype), (by - center).astype(by.dtype)


def unit_rows(X):
    """Return the rows scaled to length 1, so that their products are cosine similarities.

    A zero row has no direction and stays zero.
    """
    norm = np.sqrt(np.einsum("ij,ij->i", X, X, dtype=np.float64))[:, None]
    return np.divide(X, norm, out=np.zeros_like(X), where=norm > 0, casting="same_kind")


def extract_features(extractor, X, name="X"):
    """Return the features of samples of any kind under an extractor; without one, the samples.

    An estimator gets all samples by `transform`, which knows how to read them; any other callable
    gets them in batches.
    """
    if extractor is None:
        return X
    if hasattr(extractor, "transform"):
        features = np.asarray(to_numpy(extractor.transform(X)))
        n_samples = len(features)  # it reads what has no length of samples: folders, shards
    elif callable(extractor):
        n_samples = X.shape[0] if hasattr(X, "shape") else len(X)
        parts = [to_numpy(extractor(X[rows])) for rows in gen_batches(n_samples, 256)]
        features = np.concatenate([np.asarray(part) for part in parts])
    else:
        raise TypeError(
            f"extractor must be a fitted estimator with transform, or a callable, got "
            f"{type(extractor).__name__}; pass an encoder or metrics.inception_extractor(path)."
        )
    if features.ndim != 2 or len(features) != n_samples:
        raise ValueError(
            f"extractor must return one row of features per sample: it gave shape "
            f"{features.shape} for the {n_samples} samples of {name}; pool feature maps first."
        )
    return features
