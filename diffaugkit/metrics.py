"""Scores of embeddings and of generated samples, as NumPy functions in scikit-learn's form."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn import config_context
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    pairwise_distances_chunked,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import check_array, check_consistent_length, column_or_1d, gen_batches
from sklearn.utils.multiclass import check_classification_targets

#: A copy ratio below this value means that the generator nearly copies its sources.
NEAR_COPY = 0.3

# ------------------------------------------------------------------ labels and embeddings


def clustering_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of samples whose cluster is matched with their class, under the best matching.

    Clusters and classes are paired one to one by the Hungarian algorithm, so that the names of
    the clusters do not matter. Surplus clusters (or classes) stay unpaired and count as errors.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class labels, of any discrete kind.
    y_pred : array-like of shape (n_samples,)
        Cluster labels.

    Returns
    -------
    accuracy : float in (0, 1]
        1 for the same partition, up to the names.

    Raises
    ------
    ValueError
        If the lengths differ, or labels are missing or continuous.

    Examples
    --------
    >>> from diffaugkit.metrics import clustering_accuracy
    >>> clustering_accuracy(["b", "b", "t", "t"], [1, 1, 0, 1])
    0.75
    """
    _, true = _check_labels(y_true, name="y_true")
    _, predicted = _check_labels(y_pred, n=len(true), name="y_pred")
    counts = contingency_matrix(true, predicted)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(true))


def knn_accuracy(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int = 10, cv: Any = 10, random_state: Any = 0
) -> float:
    """Cross-validated accuracy of a k-nearest-neighbour vote in `X`.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding; Euclidean distance, features as they are.
    y : array-like of shape (n_samples,)
        Class labels.
    n_neighbors : int, default=10
        Voters; at most the number of samples outside a fold.
    cv : int >= 2 or splitter, default=10
        Number of stratified, shuffled folds (the paper's ten), or any scikit-learn splitter.
    random_state : int, RandomState instance or None, default=0
        Shuffles the folds. A fixed default keeps methods on the same folds.

    Returns
    -------
    accuracy : float in [0, 1]
        Mean over the folds.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import knn_accuracy
    >>> round(knn_accuracy(*load_iris(return_X_y=True)), 2)
    0.96
    """
    X = _check_matrix(X, "X")
    _check_neighbors(n_neighbors)
    if isinstance(cv, Integral) and cv >= 2 and len(X) - -(-len(X) // cv) < n_neighbors:
        raise ValueError(
            f"n_neighbors={n_neighbors} needs as many training samples, but {cv} folds of "
            f"{len(X)} samples leave {len(X) - -(-len(X) // cv)}; lower n_neighbors."
        )
    return _cross_validate(KNeighborsClassifier(n_neighbors), X, y, cv, random_state)


def linear_svm_accuracy(
    X: ArrayLike, y: ArrayLike, *, cv: Any = 10, random_state: Any = 0
) -> float:
    """Cross-validated accuracy of a linear, one-vs-one support vector machine on standardised `X`.

    The protocol of the DiffAug paper (section 4.1 and appendix D.1): ten folds, 90 % of the
    samples train and 10 % test.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding; standardised on the training part of each fold.
    y : array-like of shape (n_samples,)
        Class labels, at least two classes.
    cv : int >= 2 or splitter, default=10
        Number of stratified, shuffled folds, or any scikit-learn splitter.
    random_state : int, RandomState instance or None, default=0
        Shuffles the folds.

    Returns
    -------
    accuracy : float in [0, 1]
        Mean over the folds.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import linear_svm_accuracy
    >>> round(linear_svm_accuracy(*load_iris(return_X_y=True)), 2)
    0.97
    """
    model = make_pipeline(StandardScaler(), SVC(kernel="linear", random_state=0))
    return _cross_validate(model, _check_matrix(X, "X"), y, cv, random_state)


def linear_probe_accuracy(
    X: ArrayLike, y: ArrayLike, *, cv: Any = 10, random_state: Any = 0
) -> float:
    """Cross-validated accuracy of multinomial logistic regression on standardised `X`.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding; standardised on the training part of each fold.
    y : array-like of shape (n_samples,)
        Class labels, at least two classes.
    cv : int >= 2 or splitter, default=10
        Number of stratified, shuffled folds, or any scikit-learn splitter.
    random_state : int, RandomState instance or None, default=0
        Shuffles the folds.

    Returns
    -------
    accuracy : float in [0, 1]
        Mean over the folds.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import linear_probe_accuracy
    >>> linear_probe_accuracy(*load_iris(return_X_y=True)) > 0.94
    True
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return _cross_validate(model, _check_matrix(X, "X"), y, cv, random_state)


def kmeans_scores(X: ArrayLike, y: ArrayLike, random_state: Any = 0) -> dict[str, float]:
    """Agreement of k-means clusters of `X` with the classes `y`.

    As many clusters as classes, the best of ten starts.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding, features as they are.
    y : array-like of shape (n_samples,)
        Class labels.
    random_state : int, RandomState instance or None, default=0
        Seed of the starts.

    Returns
    -------
    scores : dict
        `accuracy` (:func:`clustering_accuracy`), `ari` (adjusted Rand index, 0 by chance) and
        `nmi` (normalised mutual information), each 1 at best.

    Raises
    ------
    ValueError
        If shapes disagree or values are not finite.

    Examples
    --------
    >>> from diffaugkit.metrics import kmeans_scores
    >>> kmeans_scores([[0.0], [0.1], [5.0], [5.1]], ["a", "a", "b", "b"])
    {'accuracy': 1.0, 'ari': 1.0, 'nmi': 1.0}
    """
    X = _check_matrix(X, "X")
    classes, codes = _check_labels(y, n=len(X))
    clusters = KMeans(len(classes), n_init=10, random_state=random_state).fit_predict(X)
    return {
        "accuracy": clustering_accuracy(codes, clusters),
        "ari": float(adjusted_rand_score(codes, clusters)),
        "nmi": float(normalized_mutual_info_score(codes, clusters)),
    }


def label_consistency(
    generated: ArrayLike,
    labels: ArrayLike,
    real: ArrayLike,
    real_labels: ArrayLike,
    n_neighbors: int = 10,
) -> float:
    """Share of generated samples whose nearest real samples vote for the label they should have.

    Parameters
    ----------
    generated : array-like of shape (n_generated, n_features)
        Generated samples, or their embedding.
    labels : array-like of shape (n_generated,)
        Label that each one should have: that of its source.
    real : array-like of shape (n_real, n_features)
        Real samples, in the same space.
    real_labels : array-like of shape (n_real,)
        Their labels.
    n_neighbors : int, default=10
        Voters.

    Returns
    -------
    consistency : float in [0, 1]
        If `real` holds the sources, then a copy has its own source among its voters; compare with
        :func:`quality_report`, which leaves the source out.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, there are fewer real samples than voters, or a
        label does not occur among the real ones.

    Examples
    --------
    >>> from diffaugkit.metrics import label_consistency
    >>> real, kinds = [[0.0], [1.0], [8.0], [9.0]], ["b", "b", "t", "t"]
    >>> label_consistency([[0.4], [8.6]], ["b", "b"], real, kinds, n_neighbors=1)
    0.5
    """
    generated, real = _check_pair(generated, real)
    classes, real_codes = _check_labels(real_labels, n=len(real), name="real_labels")
    names, codes = _check_labels(labels, n=len(generated), name="labels")
    unknown = sorted(set(names.tolist()) - set(classes.tolist()), key=str)
    if unknown:
        raise ValueError(
            f"labels of generated samples that no real sample has: {unknown[:5]}; give both in "
            "the same coding."
        )
    _check_neighbors(n_neighbors, len(real))
    votes = KNeighborsClassifier(n_neighbors).fit(real, real_codes).predict(generated)
    return float(np.mean(classes[votes] == names[codes]))


# ------------------------------------------------------------------ generated against real


def frechet_distance(real: ArrayLike, generated: ArrayLike) -> float:
    r"""Frechet distance between Gaussians fitted to two samples (Heusel et al. 2017, Eq. 6).

    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    in float64, with unbiased covariances. It is squared, as FID is. The value falls with the
    number of samples: compare only at equal numbers, and state them.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples or their embedding, at least 2.
    generated : array-like of shape (n_generated, n_features)
        Generated ones in the same space, at least 2.

    Returns
    -------
    distance : float >= 0
        In squared units of the features; 0 for the same mean and covariance.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are fewer than 2 samples.

    Examples
    --------
    >>> from diffaugkit.metrics import frechet_distance
    >>> round(frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]), 6)
    9.0
    """
    generated, real = _check_pair(generated, real, min_samples=2)
    mean1, factor1 = _gaussian_factor(real)
    mean2, factor2 = _gaussian_factor(generated)
    # With C = R'R, tr (C1 C2)^(1/2) is the sum of singular values of R1 R2'. Unlike a root of the
    # product it never squares the condition number, and needs no jitter for singular covariances.
    overlap = np.linalg.svd(factor1 @ factor2.T, compute_uv=False).sum()
    shift = np.sum((mean1 - mean2) ** 2)
    return max(float(shift + np.sum(factor1**2) + np.sum(factor2**2) - 2.0 * overlap), 0.0)


def kernel_distance(real: ArrayLike, generated: ArrayLike) -> float:
    r"""Unbiased squared maximum mean discrepancy with a cubic kernel (KID, Binkowski et al. 2018).

    The kernel is :math:`(x \cdot y / d + 1)^3` for d features. All pairs are used rather than
    the random subsets of the usual implementation: the same expectation, no variance added.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples or their embedding, at least 2.
    generated : array-like of shape (n_generated, n_features)
        Generated ones in the same space, at least 2.

    Returns
    -------
    distance : float
        0 in expectation for equal distributions, so that it can come out slightly negative.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are fewer than 2 samples.

    Examples
    --------
    >>> from diffaugkit.metrics import kernel_distance
    >>> kernel_distance([[0.0], [0.0]], [[1.0], [1.0]])
    7.0
    """
    generated, real = _check_pair(generated, real, min_samples=2)
    n, m = len(real), len(generated)
    within_real = (_kernel_sum(real, real) - _kernel_diagonal(real)) / (n * (n - 1))
    within_generated = (_kernel_sum(generated, generated) - _kernel_diagonal(generated)) / (
        m * (m - 1)
    )
    return float(within_real + within_generated - 2.0 * _kernel_sum(real, generated) / (n * m))


def precision_recall(
    real: ArrayLike, generated: ArrayLike, n_neighbors: int = 5
) -> tuple[float, float]:
    """Precision and recall of a generator (Kynkaanniemi et al. 2019, Eqs. 1 and 2).

    A point is covered by a set if it lies within the ball of any member, whose radius is the
    distance to the member's k-th nearest other member. Precision is the share of generated
    points covered by the real set (fidelity), recall the share of real points covered by the
    generated set (diversity).

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples or their embedding, more than `n_neighbors`.
    generated : array-like of shape (n_generated, n_features)
        Generated ones in the same space, more than `n_neighbors`. Both values depend on the
        numbers of samples: best take as many generated as real ones.
    n_neighbors : int, default=5
        k. The paper uses 3 on 50 000 images; sets of a few thousand are less noisy with 5.

    Returns
    -------
    precision, recall : tuple of float in [0, 1]
        (1, 1) for identical sets.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    Examples
    --------
    >>> from diffaugkit.metrics import precision_recall
    >>> precision_recall([[0.0], [1.0], [9.0]], [[0.2], [0.4], [0.6]], n_neighbors=1)
    (1.0, 0.3333333333333333)
    """
    generated, real = _check_pair(generated, real)
    for name, points in (("real", real), ("generated", generated)):
        _check_neighbors(n_neighbors, len(points) - 1, f"{name} samples besides itself")
    return (
        float(np.mean(_covered(generated, by=real, k=n_neighbors))),
        float(np.mean(_covered(real, by=generated, k=n_neighbors))),
    )


def copy_ratio(generated: ArrayLike, source: ArrayLike, real: ArrayLike) -> float:
    r"""Nearness of generated samples to their own source: 0 for copies, about 1 for new samples.

    .. math:: \mathrm{median}_i \; \frac{|g_i - s_i|}{\min_{r_j \ne s_i} |g_i - r_j|}

    over the generated samples :math:`g_i`, their sources :math:`s_i` and the real samples
    :math:`r_j`: 0 if every sample repeats its source, 1 if it lies as near to another real
    sample as to its source, larger if it is nearer to others. Below 0.3 samples are near-copies,
    from which an encoder learns little. Real samples *equal* to the source count as the source:
    a copy of a duplicated cell is still a copy.

    Parameters
    ----------
    generated : array-like of shape (n_generated, n_features)
        Generated samples, in the space of `real`.
    source : int array-like of shape (n_generated,) or array-like of shape (n_generated, n_features)
        The real sample from which each one was generated: row numbers of `real`, or the rows.
    real : array-like of shape (n_real, n_features)
        All real samples, sources included; at least two different ones.

    Returns
    -------
    ratio : float >= 0
        Infinite if at least half of the samples are exact copies of another real sample.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, a source is not a row of `real`, or all real
        samples are equal.

    Examples
    --------
    >>> from diffaugkit.metrics import copy_ratio
    >>> real = [[0.0], [1.0], [4.0]]
    >>> copy_ratio([[0.0], [1.0]], [0, 1], real)
    0.0
    >>> copy_ratio([[0.25]], [[0.0]], real)
    0.3333333333333333
    """
    generated, real = _check_pair(generated, real)
    source = _source_rows(source, real, len(generated))
    group = _equal_rows(real)
    first = np.unique(group, return_index=True)[1]
    if len(first) < 2:
        raise ValueError("copy_ratio needs at least two different rows in real.")
    neighbors = NearestNeighbors(n_neighbors=2).fit(real[first])
    nearest = neighbors.kneighbors(generated, return_distance=False)
    is_source = nearest[:, 0] == group[source]
    other = first[np.where(is_source, nearest[:, 1], nearest[:, 0])]
    # Recomputed pair by pair: the search expands the square and so loses digits near zero.
    to_source = _paired_distance(generated, real, source)
    to_other = _paired_distance(generated, real, other)
    with np.errstate(divide="ignore"):
        return float(np.median(to_source / to_other))


def spread_ratio(generated: ArrayLike, real: ArrayLike) -> float:
    r"""Spread of the generated samples over that of the real ones.

    .. math:: \sqrt{\mathrm{tr}\,\mathrm{cov}(g) / \mathrm{tr}\,\mathrm{cov}(r)}

    Parameters
    ----------
    generated : array-like of shape (n_generated, n_features)
        Generated samples, at least 2.
    real : array-like of shape (n_real, n_features)
        Real samples in the same space, at least 2.

    Returns
    -------
    ratio : float >= 0
        1 for equal total variance, below 1 for a generator that loses variety.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, there are fewer than 2 samples, or the real
        ones are all equal.

    Examples
    --------
    >>> from diffaugkit.metrics import spread_ratio
    >>> spread_ratio([[0.0], [1.0]], [[0.0], [2.0]])
    0.5
    """
    generated, real = _check_pair(generated, real, min_samples=2)
    total = np.var(real, axis=0, ddof=1, dtype=np.float64).sum()
    if total == 0:
        raise ValueError("spread_ratio is undefined: all rows of real are equal.")
    return float(np.sqrt(np.var(generated, axis=0, ddof=1, dtype=np.float64).sum() / total))


# ------------------------------------------------------------------ the report


@dataclass(frozen=True)
class QualityReport:
    """What :func:`quality_report` found; `print` it, or stack rows of `to_frame()`.

    Parameters
    ----------
    label_consistency : float in [0, 1] or None
        Share of generated samples that real neighbours give the label of their source; None
        without labels or sources.
    real_label_consistency : float in [0, 1] or None
        The same for held-out real samples: the value to compare with. None without labels.
    spread_ratio : float >= 0
        See :func:`spread_ratio`; 1 is best.
    precision, recall : float in [0, 1]
        See :func:`precision_recall`.
    copy_ratio : float >= 0 or None
        See :func:`copy_ratio`; below 0.3 near-copies. None without sources.
    frechet_distance : float >= 0
        See :func:`frechet_distance`.
    kernel_distance : float
        See :func:`kernel_distance`.
    n_generated : int
        Number of generated samples; the distances depend on it.

    Examples
    --------
    >>> from diffaugkit.metrics import QualityReport
    >>> report = QualityReport(0.9, 0.92, 1.0, 0.8, 0.7, 0.2, 0.1, 0.0, 100)
    >>> report.near_copies
    True
    """

    label_consistency: float | None
    real_label_consistency: float | None
    spread_ratio: float
    precision: float
    recall: float
    copy_ratio: float | None
    frechet_distance: float
    kernel_distance: float
    n_generated: int

    @property
    def near_copies(self) -> bool:
        """Whether the generator nearly copies its sources (copy ratio below 0.3)."""
        return self.copy_ratio is not None and self.copy_ratio < NEAR_COPY

    def to_frame(self):
        """Return the report as a pandas DataFrame of one row, one column per value."""
        import pandas as pd

        return pd.DataFrame([asdict(self)])

    def __str__(self) -> str:
        """Return a table: value, and how to read it."""
        baseline = self.real_label_consistency
        reading = {
            "label_consistency": "" if baseline is None else f"held-out real: {baseline:.3f}",
            "spread_ratio": "best 1",
            "precision": "best 1 (fidelity)",
            "recall": "best 1 (diversity)",
            "copy_ratio": "near-copies!" if self.near_copies else "0 = copies, 1 = new samples",
            "frechet_distance": "best 0",
            "kernel_distance": "best 0",
        }
        lines = [f"Quality of {self.n_generated} generated samples"]
        for name, note in reading.items():
            value = getattr(self, name)
            text = "-" if value is None else f"{value:.4g}" if "dist" in name else f"{value:.3f}"
            lines.append(f"  {name.replace('_', ' '):<18}{text:>10}   {note}".rstrip())
        return "\n".join(lines)


def quality_report(
    generated: ArrayLike,
    source: ArrayLike | None,
    real: ArrayLike,
    *,
    embed: Callable | None = None,
    labels: ArrayLike | None = None,
    n_neighbors: int = 10,
    random_state: Any = 0,
) -> QualityReport:
    """Check generated samples against the real ones before they are used.

    Label consistency is cross-fitted: the real samples are split into folds, and the real *and*
    the generated samples of a fold (those whose source lies in it) are judged by the other folds
    alone. So no sample has its own source among its voters, and copies score exactly what real
    samples score.

    Parameters
    ----------
    generated : array-like of shape (n_generated, n_features)
        Generated samples, more than 5.
    source : int array-like of shape (n_generated,), array-like of shape (n_generated, n_features) \
or None
        Row numbers of `real`, or the rows themselves, from which the samples were generated. None
        for unconditional samples: no copy ratio and no label consistency then.
    real : array-like of shape (n_real, n_features)
        Real samples, more than 5.
    embed : callable, default=None
        Maps samples to the embedding in which label consistency is measured, as
        `encoder.transform`. None: in the space of the samples. All else is measured there anyway.
    labels : array-like of shape (n_real,), default=None
        Labels of the real samples. None leaves label consistency out.
    n_neighbors : int, default=10
        Voters for the label.
    random_state : int, RandomState instance or None, default=0
        Shuffles the folds: ten, or fewer where no class has ten samples.

    Returns
    -------
    report : QualityReport
        Printable; its fields are floats.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, there are too few samples, or a source is not a
        row of `real`.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.metrics import quality_report
    >>> real = np.random.default_rng(0).normal(size=(50, 3))
    >>> report = quality_report(real, np.arange(50), real, labels=real[:, 0] > 0)
    >>> report.copy_ratio, report.spread_ratio, report.precision
    (0.0, 1.0, 1.0)
    >>> report.label_consistency == report.real_label_consistency
    True
    """
    generated, real = _check_pair(generated, real, min_samples=2)
    if source is not None:
        source = _source_rows(source, real, len(generated))
    consistency = real_consistency = None
    if labels is not None:
        codes = _check_labels(labels, n=len(real), name="labels")[1]
        real_e, generated_e = (x if embed is None else embed(x) for x in (real, generated))
        generated_e, real_e = _check_pair(generated_e, real_e)
        if (len(generated_e), len(real_e)) != (len(generated), len(real)):
            raise ValueError("embed must return one row per sample.")
        consistency, real_consistency = _cross_fitted_consistency(
            generated_e, source, real_e, codes, n_neighbors, random_state
        )
    precision, recall = precision_recall(real, generated)
    return QualityReport(
        label_consistency=consistency,
        real_label_consistency=real_consistency,
        spread_ratio=spread_ratio(generated, real),
        precision=precision,
        recall=recall,
        copy_ratio=None if source is None else copy_ratio(generated, source, real),
        frechet_distance=frechet_distance(real, generated),
        kernel_distance=kernel_distance(real, generated),
        n_generated=len(generated),
    )


# ------------------------------------------------------------------ helpers


def _check_matrix(X, name, min_samples=1):
    """Return X as a finite, dense matrix; float32 stays so, all else becomes float64."""
    shape = getattr(X, "shape", None) or np.shape(X)
    if len(shape) != 2:
        raise ValueError(
            f"{name} must be a matrix (n_samples, n_features), got shape {tuple(shape)}; flatten "
            "images, or pass their embeddings."
        )
    return check_array(
        X, dtype=[np.float64, np.float32], ensure_min_samples=min_samples, input_name=name
    )


def _check_pair(generated, real, min_samples=1):
    generated = _check_matrix(generated, "generated", min_samples)
    real = _check_matrix(real, "real", min_samples)
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated has {generated.shape[1]} features, but real has {real.shape[1]}; both "
            "must lie in the same space."
        )
    # One dtype, or the distance routines convert the larger matrix again and again.
    dtype = np.result_type(generated, real)
    return generated.astype(dtype, copy=False), real.astype(dtype, copy=False)


def _check_labels(y, n=None, name="y"):
    """Return (classes, codes) of discrete labels."""
    y = column_or_1d(np.asarray(y))
    if len(y) == 0:
        raise ValueError(f"{name} is empty.")
    if n is not None and len(y) != n:
        raise ValueError(f"{name} has {len(y)} labels for {n} samples.")
    if y.dtype.kind in "fO" and any(v is None or v != v for v in y.tolist()):
        raise ValueError(f"{name} has missing labels (NaN or None); drop those samples first.")
    check_classification_targets(y)
    return np.unique(y, return_inverse=True)


def _check_neighbors(n_neighbors, available=None, what="real samples"):
    if not isinstance(n_neighbors, Integral) or n_neighbors < 1:
        raise ValueError(f"n_neighbors must be an int >= 1, got {n_neighbors!r}.")
    if available is not None and n_neighbors > available:
        raise ValueError(f"n_neighbors={n_neighbors}, but there are only {available} {what}.")


def _folds(codes, cv, random_state):
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


def _cross_validate(model, X, y, cv, random_state):
    codes = _check_labels(y, n=len(X))[1]
    with warnings.catch_warnings():
        # Rare cell types are normal, and shall not drown the table of results in warnings.
        warnings.filterwarnings("ignore", message="The least populated class")
        scores = cross_val_score(
            model, X, codes, cv=_folds(codes, cv, random_state), error_score="raise"
        )
    return float(scores.mean())


def _cross_fitted_consistency(generated, source, real, codes, n_neighbors, random_state):
    """Return the consistency of generated samples (None without source) and of real ones."""
    folds = _folds(codes, int(min(10, np.bincount(codes).max())), random_state)
    hit = np.zeros(len(real), dtype=bool)
    generated_hit = np.zeros(len(generated), dtype=bool)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for train, test in folds.split(real, codes):
            _check_neighbors(n_neighbors, len(train), "real samples outside a fold")
            model = KNeighborsClassifier(n_neighbors).fit(real[train], codes[train])
            hit[test] = model.predict(real[test]) == codes[test]
            rows = [] if source is None else np.flatnonzero(np.isin(source, test))
            if len(rows):
                generated_hit[rows] = model.predict(generated[rows]) == codes[source[rows]]
    return (None if source is None else float(generated_hit.mean())), float(hit.mean())


def _gaussian_factor(X):
    """Return the mean and R (at most d x d) with R'R = cov(X), by a QR over blocks of rows.

    Blocks keep the float64 copy small; QR, unlike a covariance, keeps all digits.
    """
    n, d = X.shape
    mean = X.mean(axis=0, dtype=np.float64)
    factor = np.empty((0, d))
    for rows in gen_batches(n, max(4096, 2 * d)):
        factor = np.linalg.qr(np.vstack([factor, X[rows] - mean]), mode="r")
    return mean, factor / np.sqrt(n - 1)


def _kernel_sum(X, Y):
    total, Y = 0.0, Y.astype(np.float64, copy=False)
    for rows in gen_batches(len(X), max(1, 8_000_000 // len(Y))):
        kernel = X[rows].astype(np.float64) @ Y.T
        kernel /= X.shape[1]
        kernel += 1.0
        # Cubed by products in place: a power with an int exponent is ten times slower.
        total += np.einsum("ij,ij,ij->", kernel, kernel, kernel)
    return total


def _kernel_diagonal(X):
    norms = np.einsum("ij,ij->i", X, X, dtype=np.float64)
    return np.sum((norms / X.shape[1] + 1.0) ** 3)


def _covered(points, *, by, k):
    """Return for each point whether it lies in the ball of any member of `by`."""
    # The members are their own first neighbours, hence k + 1.
    radius = NearestNeighbors(n_neighbors=k + 1).fit(by).kneighbors(by)[0][:, -1]
    # Distances come from an expanded square with errors of about 1e-8 of the norms; without this
    # allowance a point on the rim of a ball, or on a member of radius 0, would fall out by chance.
    scale = np.sqrt(np.einsum("ij,ij->i", by, by, dtype=np.float64).max())
    radius = radius + 1e-7 * scale
    with config_context(working_memory=128):
        blocks = pairwise_distances_chunked(
            points, by, reduce_func=lambda distance, _: (distance <= radius).any(axis=1)
        )
        return np.concatenate(list(blocks))


def _equal_rows(X):
    """Return one group number per row, shared by equal rows."""
    groups = {}
    return np.array([groups.setdefault(_row_key(row), len(groups)) for row in X])


def _row_key(row):
    """Return 16 bytes that stand for the row, so that a table of rows is no copy of the data."""
    # Adding 0.0 turns -0.0, which has other bytes, into 0.0.
    return blake2b((row + 0.0).tobytes(), digest_size=16).digest()


def _source_rows(source, real, n_generated):
    """Return the sources as row numbers of `real`."""
    source = np.asarray(source)
    check_consistent_length(source, range(n_generated))
    if source.ndim == 1 and source.dtype.kind in "iu":
        if source.min() < 0 or source.max() >= len(real):
            raise ValueError(
                f"source rows must lie in 0 to {len(real) - 1}, got {source.min()} to "
                f"{source.max()}."
            )
        return source
    if source.ndim != 2:
        raise ValueError("source must be int row numbers of real, or an array of its rows.")
    source = _check_matrix(source, "source")
    if source.shape[1] != real.shape[1]:
        raise ValueError(f"source has {source.shape[1]} features, but real has {real.shape[1]}.")
    # Compared in the coarser of both dtypes, so that a float32 copy of the rows is still found.
    dtype = min(source.dtype, real.dtype, key=lambda kind: kind.itemsize)
    known = {}
    for i, row in enumerate(real.astype(dtype, copy=False)):
        known.setdefault(_row_key(row), i)
    rows = [known.get(_row_key(row), -1) for row in source.astype(dtype, copy=False)]
    if -1 in rows:
        raise ValueError(
            f"source row {rows.index(-1)} is not a row of real; pass the row numbers instead."
        )
    return np.array(rows)


def _paired_distance(generated, real, rows):
    distance = np.empty(len(generated))
    for part in gen_batches(len(generated), 4096):
        difference = generated[part].astype(np.float64) - real[rows[part]]
        distance[part] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return distance
