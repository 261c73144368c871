"""Distances between generated and real samples: distribution, coverage, nearness to sources."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import pdist, squareform
from sklearn import config_context
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_consistent_length, check_random_state, gen_batches

from diffaugkit.metrics.checks import (
    about_center,
    check_labels,
    check_matrix,
    check_neighbors,
    check_pair,
    extract_features,
)

# Samples that `effective_diversity` compares: its cost grows with their cube.
_MOST_DIVERSE = 1_000


def frechet_distance(
    real: Any,
    generated: Any,
    *,
    extractor: Any = None,
    labels: ArrayLike | None = None,
    generated_labels: ArrayLike | None = None,
) -> float | dict[Any, float]:
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
    extractor : fitted estimator with `transform`, callable or None, default=None
        Maps samples to the features that are compared: a fitted encoder, a callable on batches
        (n, ...) -> (n, d), or :func:`~diffaugkit.metrics.inception_extractor`. Samples may then be
        of any kind that it reads, such as 4-D images. None compares them as they are.
    labels, generated_labels : array-like of shape (n_real,), (n_generated,), default=None
        Classes of both sets, for one distance per class. Each class has fewer samples than the
        whole, so its value is larger for the same quality: compare it with the same class of
        another model, not with the whole.

    Returns
    -------
    distance : float >= 0, or dict of class to float
        In squared units of the features; 0 for the same mean and covariance. With labels a dict
        of the classes in sorted order.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, there are fewer than 2 samples (of a class), or
        only one of `labels` and `generated_labels` is given, or they name other classes.

    Examples
    --------
    >>> from diffaugkit.metrics import frechet_distance
    >>> round(frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]), 6)
    9.0

    One value per class:

    >>> frechet_distance([[0.0], [2.0]] * 2, [[3.0], [5.0]] * 2, labels=["a", "a", "b", "b"],
    ...                  generated_labels=["a", "a", "b", "b"])
    {'a': 9.0, 'b': 9.0}
    """
    return _compare(_frechet, real, generated, extractor, labels, generated_labels)


def kernel_distance(
    real: Any,
    generated: Any,
    *,
    extractor: Any = None,
    labels: ArrayLike | None = None,
    generated_labels: ArrayLike | None = None,
) -> float | dict[Any, float]:
    r"""Unbiased squared maximum mean discrepancy with a cubic kernel (KID, Binkowski et al. 2018).

    The kernel is :math:`(x \cdot y / d + 1)^3` for d features. All pairs are used rather than
    the random subsets of the usual implementation: the same expectation, no variance added. Time
    grows with the square of the number of samples (20 000 of both take seconds, 300 000 an hour),
    memory does not: draw a few thousand rows of large sets. The kernel has no scale of its own, and
    columns of values in the hundreds, cubed, drown the rest: standardise raw tables first.

    Parameters
    ----------
    real, generated, extractor, labels, generated_labels
        As for :func:`frechet_distance`. Unlike that one this distance does not grow as samples get
        fewer, it only gets noisier.

    Returns
    -------
    distance : float, or dict of class to float
        0 in expectation for equal distributions, so that it can come out slightly negative. With
        labels a dict of the classes in sorted order.

    Raises
    ------
    ValueError
        As for :func:`frechet_distance`.

    Examples
    --------
    >>> from diffaugkit.metrics import kernel_distance
    >>> kernel_distance([[0.0], [0.0]], [[1.0], [1.0]])
    7.0
    """
    return _compare(kernel_estimate, real, generated, extractor, labels, generated_labels)


def precision_recall(
    real: ArrayLike, generated: ArrayLike, n_neighbors: int = 5
) -> tuple[float, float]:
    """Precision and recall of a generator (Kynkaanniemi et al. 2019, Eqs. 1 and 2).

    A point is covered by a set if it lies within the ball of any member, whose radius is the
    distance to the member's k-th nearest other member. Precision is the share of generated
    points covered by the real set (fidelity), recall the share of real points covered by the
    generated set (diversity). Time grows with the square of the number of samples (20 000 of both
    take seconds, 300 000 an hour), memory does not: draw a few thousand rows of large sets.

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
    real, generated = check_pair(real, generated)
    for name, points in (("real", real), ("generated", generated)):
        check_neighbors(n_neighbors, len(points) - 1, f"{name} samples besides itself")
    return (
        float(np.mean(_balls_around(generated, of=real, k=n_neighbors)[0] > 0)),
        float(np.mean(_balls_around(real, of=generated, k=n_neighbors)[0] > 0)),
    )


def density_coverage(
    real: ArrayLike, generated: ArrayLike, n_neighbors: int = 5
) -> tuple[float, float]:
    r"""Density and coverage of a generator (Naeem et al. 2020, Eqs. 4 and 6).

    .. math::
        rac{1}{kM} \sum_{j=1}^{M} \sum_{i=1}^{N} \mathbb{1}[g_j \in B(r_i)]
        \quad	ext{and}\quad
        rac{1}{N} \sum_{i=1}^{N} \mathbb{1}[\exists j: g_j \in B(r_i)]

    over the real samples :math:`r_i`, the generated ones :math:`g_j`, and the balls :math:`B(r_i)`
    that reach to the k-th nearest other real sample. They answer the weak point of
    :func:`precision_recall`, outliers: the wide ball of a generated one is enough there for the
    recall of all real samples in it, and that of a real one for the precision of all generated
    samples in it. Here no ball is around a generated sample, and the ball of a real one is one of
    about k. Time grows with the square of the number of samples, memory does not.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples or their embedding, more than `n_neighbors`.
    generated : array-like of shape (n_generated, n_features)
        Generated ones in the same space, at least 1. The coverage depends on the numbers of
        samples: best take as many generated as real ones.
    n_neighbors : int, default=5
        k, the paper's.

    Returns
    -------
    density : float >= 0
        About 1 for samples of the same distribution; above 1 where they keep to its dense parts.
    coverage : float in [0, 1]
        About ``1 - 2 ** -k`` for samples of the same distribution, 0.97 with k = 5.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    References
    ----------
    Naeem, Oh, Uh, Choi and Yoo 2020, "Reliable Fidelity and Diversity Metrics for Generative
    Models", ICML.

    Examples
    --------
    >>> from diffaugkit.metrics import density_coverage
    >>> density_coverage([[0.0], [1.0], [9.0]], [[0.2], [0.4], [0.6]], n_neighbors=1)
    (2.0, 0.6666666666666666)
    """
    real, generated = check_pair(real, generated)
    check_neighbors(n_neighbors, len(real) - 1, "real samples besides itself")
    around, holds = _balls_around(generated, of=real, k=n_neighbors)
    return float(around.mean() / n_neighbors), float(holds.mean())


def copy_ratio(real: ArrayLike, generated: ArrayLike, source: ArrayLike) -> float:
    r"""Nearness of generated samples to their own source: 0 for copies, about 1 for new samples.

    .. math:: \mathrm{median}_i \; \frac{|g_i - s_i|}{\min_{r_j \ne s_i} |g_i - r_j|}

    over the generated samples :math:`g_i`, their sources :math:`s_i` and the real samples
    :math:`r_j`: 0 if every sample repeats its source, 1 if it lies as near to another real
    sample as to its source, larger if it is nearer to others. Below 0.3 samples are near-copies,
    from which an encoder learns little. Real samples *equal* to the source count as the source:
    a copy of a duplicated cell is still a copy. Time grows with the product of both numbers: of
    many generated samples some thousands are enough, but the real ones should all be there.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        All real samples, sources included; at least two different ones.
    generated : array-like of shape (n_generated, n_features)
        Generated samples, in the same space.
    source : int array-like of shape (n_generated,) or array-like of shape (n_generated, n_features)
        The real sample from which each one was generated: row numbers of `real`, or the rows.

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
    >>> copy_ratio(real, [[0.0], [1.0]], [0, 1])
    0.0
    >>> copy_ratio(real, [[0.25]], [[0.0]])
    0.3333333333333333
    """
    real, generated = check_pair(real, generated)
    source = source_rows(source, real, len(generated))
    group = _equal_rows(real)
    first = np.unique(group, return_index=True)[1]
    if len(first) < 2:
        raise ValueError("copy_ratio needs at least two different rows in real.")
    points, by = about_center(generated, real[first])
    neighbors = NearestNeighbors(n_neighbors=2).fit(by)
    nearest = neighbors.kneighbors(points, return_distance=False)
    is_source = nearest[:, 0] == group[source]
    other = first[np.where(is_source, nearest[:, 1], nearest[:, 0])]
    # Recomputed pair by pair: the search expands the square and so loses digits near zero.
    to_source = _paired_distance(generated, real, source)
    to_other = _paired_distance(generated, real, other)
    with np.errstate(divide="ignore"):
        return float(np.median(to_source / to_other))


def nearest_training_samples(
    real: Any, generated: Any, *, extractor: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the real sample nearest to each generated one: what a model may have memorised.

    Look at the pairs (`SampleGridDisplay` draws them), and compare the distances with those
    between real samples, as :func:`quality_report` does: generated samples that lie much nearer
    to a real one than real ones lie to each other repeat their training data. Time grows with the
    product of both numbers (300 000 of both take minutes).

    Parameters
    ----------
    real : array-like of shape (n_real, n_features), or what `extractor` reads
        Samples that the generator was trained on.
    generated : array-like of shape (n_generated, n_features), or what `extractor` reads
        Generated samples.
    extractor : fitted estimator with `transform`, callable or None, default=None
        As in :func:`frechet_distance`.

    Returns
    -------
    distance : ndarray of shape (n_generated,)
        Euclidean distance to the nearest real sample, in the space of the features; 0 for a copy.
    index : ndarray of shape (n_generated,)
        Its row in `real`.

    Raises
    ------
    ValueError
        If shapes disagree or values are not finite.

    Examples
    --------
    >>> from diffaugkit.metrics import nearest_training_samples
    >>> nearest_training_samples([[0.0], [1.0], [4.0]], [[0.2], [4.0]])
    (array([0.2, 0. ]), array([0, 2]))
    """
    real, generated = check_pair(
        extract_features(extractor, real, "real"),
        extract_features(extractor, generated, "generated"),
    )
    points, by = about_center(generated, real)
    index = NearestNeighbors(n_neighbors=1).fit(by).kneighbors(points, return_distance=False)
    # Recomputed pair by pair: the search expands the square and so loses digits near zero.
    return _paired_distance(generated, real, index[:, 0]), index[:, 0]


def spread_ratio(real: ArrayLike, generated: ArrayLike) -> float:
    r"""Spread of the generated samples over that of the real ones.

    .. math:: \sqrt{\mathrm{tr}\,\mathrm{cov}(g) / \mathrm{tr}\,\mathrm{cov}(r)}

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples, at least 2.
    generated : array-like of shape (n_generated, n_features)
        Generated samples in the same space, at least 2.

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
    >>> spread_ratio([[0.0], [2.0]], [[0.0], [1.0]])
    0.5
    """
    real, generated = check_pair(real, generated, min_samples=2)
    total = np.var(real, axis=0, ddof=1, dtype=np.float64)
    # The mean of equal values is theirs up to rounding.
    total = total[total > (8 * np.finfo(np.float64).eps * real[0]) ** 2].sum()
    if total == 0:
        raise ValueError("spread_ratio is undefined: all rows of real are equal.")
    return float(np.sqrt(np.var(generated, axis=0, ddof=1, dtype=np.float64).sum() / total))


def effective_diversity(real: ArrayLike, generated: ArrayLike, *, random_state: Any = 0) -> float:
    r"""Effective number of different generated samples, over that of as many real ones.

    A ratio of Vendi scores (Friedman and Dieng 2023, Eq. 1), :math:`\exp(-\sum_i \lambda_i \log
    \lambda_i)` with the eigenvalues :math:`\lambda` of K / n: n for n samples that have nothing in
    common, 1 for n equal ones. The kernel K is Gaussian, as wide as the median distance of a real
    sample to its nearest other one, so that near-copies of each other count as one.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples or their embedding, at least 2.
    generated : array-like of shape (n_generated, n_features)
        Generated ones in the same space, at least 2.
    random_state : int, RandomState instance or None, default=0
        Draws equal numbers of both, at most 1 000: the score grows with their number.

    Returns
    -------
    ratio : float > 0
        1 is as diverse as the real samples, less is a generator that repeats itself; above 1 it
        spreads more widely than they do.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, there are fewer than 2 samples, or the real
        ones are all equal.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.metrics import effective_diversity
    >>> real = np.random.default_rng(0).normal(size=(100, 5))
    >>> effective_diversity(real, real)
    1.0
    >>> round(effective_diversity(real, real[:10].repeat(10, axis=0)), 2)
    0.16
    """
    real, generated = check_pair(real, generated, min_samples=2)
    if (real == real[0]).all():
        raise ValueError("effective_diversity is undefined: all rows of real are equal.")
    n = min(len(real), len(generated), _MOST_DIVERSE)
    rng = check_random_state(random_state)
    within, between = (
        squareform(pdist(X[np.sort(rng.permutation(len(X))[:n])].astype(np.float64)))
        for X in (real, generated)
    )
    nearest = np.where(within > 0, within, np.inf).min(axis=1)
    # Of rows that are nearly all equal, equal ones may be drawn.
    width = np.median(nearest) if within.any() else np.sqrt(np.var(real, axis=0).sum())
    return float(_vendi(between, width) / _vendi(within, width))


# ------------------------------------------------------------------ helpers


def _compare(score, real, generated, extractor, labels, generated_labels):
    """Return the score of both sets under the extractor, or one for each class."""
    real = extract_features(extractor, real, "real")
    generated = extract_features(extractor, generated, "generated")
    real, generated = check_pair(real, generated, min_samples=2)
    if labels is None and generated_labels is None:
        return score(real, generated)
    if labels is None or generated_labels is None:
        raise ValueError("give both labels and generated_labels, or neither.")
    classes, codes = check_labels(labels, n=len(real), name="labels")
    names, generated_codes = check_labels(
        generated_labels, n=len(generated), name="generated_labels"
    )
    classes, names = classes.tolist(), names.tolist()
    if classes != names:
        odd = sorted(set(classes).symmetric_difference(names), key=str)
        raise ValueError(
            f"labels and generated_labels must name the same classes, but {odd[:5]} are in one of "
            "them only; drop those samples first."
        )
    values = {}
    for code, name in enumerate(classes):
        own, other = real[codes == code], generated[generated_codes == code]
        if min(len(own), len(other)) < 2:
            raise ValueError(
                f"class {name!r} has {len(own)} real and {len(other)} generated samples, but a "
                "minimum of 2 is required; generate more of it or drop it."
            )
        values[name] = score(own, other)
    return values


def _vendi(distance, width):
    """Exponential of the entropy of the eigenvalues of a kernel."""
    share = np.linalg.eigvalsh(np.exp(-0.5 * np.square(distance / width)) / len(distance))
    share = share[share > 0]
    return np.exp(-np.sum(share * np.log(share)))


def _frechet(real, generated):
    mean1, factor1 = _gaussian_factor(real)
    mean2, factor2 = _gaussian_factor(generated)
    # With C = R'R, tr (C1 C2)^(1/2) is the sum of singular values of R1 R2'. Unlike a root of the
    # product it never squares the condition number, and needs no jitter for singular covariances.
    overlap = np.linalg.svd(factor1 @ factor2.T, compute_uv=False).sum()
    shift = np.sum((mean1 - mean2) ** 2)
    return max(float(shift + np.sum(factor1**2) + np.sum(factor2**2) - 2.0 * overlap), 0.0)


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


def kernel_estimate(real, generated, source=None):
    """Unbiased kernel distance; with sources but for each sample with its own.

    They are rows of `real`, and -1 for those that are not among them.
    """
    n, m = len(real), len(generated)
    within_real = (_kernel_sum(real, real) - _kernel_diagonal(real, real)) / (n * (n - 1))
    within_generated = (
        _kernel_sum(generated, generated) - _kernel_diagonal(generated, generated)
    ) / (m * (m - 1))
    between, n_pairs = _kernel_sum(real, generated), n * m
    if source is not None:
        # Such a pair is no more independent than a sample and itself.
        own = source >= 0
        between -= _kernel_diagonal(real[source[own]], generated[own])
        n_pairs -= np.sum(own)
    return float(within_real + within_generated - 2.0 * between / n_pairs)


def _kernel_sum(X, Y):
    total, Y = 0.0, Y.astype(np.float64, copy=False)
    for rows in gen_batches(len(X), max(1, 8_000_000 // len(Y))):
        kernel = X[rows].astype(np.float64) @ Y.T
        kernel /= X.shape[1]
        kernel += 1.0
        # Cubed by products in place: a power with an int exponent is ten times slower.
        total += np.einsum("ij,ij,ij->", kernel, kernel, kernel)
    return total


def _kernel_diagonal(X, Y):
    products = np.einsum("ij,ij->i", X, Y, dtype=np.float64)
    return np.sum((products / X.shape[1] + 1.0) ** 3)


def _balls_around(points, *, of, k):
    """Return in how many balls of the members `of` each point lies, and whether each ball has one.

    The radius of a ball is the distance of the member to its k-th nearest other member.
    """
    points, members = about_center(points, of)
    # The members are their own first neighbours, hence k + 1.
    radius = NearestNeighbors(n_neighbors=k + 1).fit(members).kneighbors(members)[0][:, -1]
    # Distances come from an expanded square with errors of about 1e-8 of the norms; without this
    # allowance a point on the rim of a ball, or on a member of radius 0, would fall out by chance.
    radius += 1e-7 * np.sqrt(np.einsum("ij,ij->i", members, members, dtype=np.float64))
    holds = np.zeros(len(members), dtype=bool)

    def count(distance, _):
        inside = distance <= radius
        np.logical_or(holds, inside.any(axis=0), out=holds)
        return np.count_nonzero(inside, axis=1)

    with config_context(working_memory=128):
        blocks = pairwise_distances_chunked(points, members, reduce_func=count)
        return np.concatenate(list(blocks)), holds


def nearest_others(X, rows):
    """Return the distance of these rows of X to the nearest other row of it."""
    points, by = about_center(X[rows], X)
    nearest = NearestNeighbors(n_neighbors=2).fit(by).kneighbors(points, return_distance=False)
    other = np.where(nearest[:, 0] == rows, nearest[:, 1], nearest[:, 0])
    return _paired_distance(X[rows], X, other)


def _equal_rows(X):
    """Return one group number per row, shared by equal rows."""
    groups = {}
    return np.array([groups.setdefault(_row_key(row), len(groups)) for row in X])


def _row_key(row):
    """Return 16 bytes that stand for the row, so that a table of rows is no copy of the data."""
    # Adding 0.0 turns -0.0, which has other bytes, into 0.0.
    return blake2b((row + 0.0).tobytes(), digest_size=16).digest()


def source_rows(source, real, n_generated):
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
    source = check_matrix(source, "source")
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
