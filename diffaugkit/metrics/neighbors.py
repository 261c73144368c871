"""Scores by nearest neighbours: DINO's weighted k-NN vote, and retrieval.

DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294): L2-normalised features, votes
exp(similarity / 0.07), k of 10, 20, 100 and 200. Gen-SIS reports k = 10 and 20.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import average_precision_score
from sklearn.utils import gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from diffaugkit.arrays import many_classes
from diffaugkit.metrics.checks import (
    check_known,
    check_labels,
    check_matrix,
    check_neighbors,
    check_temperature,
    in_columns_of,
    unit_rows,
)

# Similarities that are held at once; some ten arrays of this size, most of 8 bytes, come with them.
_BLOCK = 2_000_000
# Cosines nearer than this are one.
_ROUNDING = 1e-12


class WeightedKNNClassifier(ClassifierMixin, BaseEstimator):
    r"""DINO's k-nearest-neighbour classifier: cosine similarities vote with a temperature.

    Features are L2-normalised. Of a sample's `n_neighbors` most similar training samples each
    votes for its class with the weight :math:`\exp(s / \tau)`, s the cosine similarity.

    Parameters
    ----------
    n_neighbors : int, default=20
        Voters k; more than there are training samples means all of them. DINO tries 10, 20, 100
        and 200, and 20 is its usual best.
    temperature : float > 0, default=0.07
        :math:`\tau`. Small values leave the vote to the nearest, large ones make all equal.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Classes seen in fit.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features,)
        Their names, where `X` had names.

    See Also
    --------
    weighted_knn_accuracy : Accuracy on a test set, for several k at once.
    knn_accuracy : Cross-validated accuracy of the plain vote by Euclidean distance.

    References
    ----------
    M. Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021,
    section 4.1; the vote is that of Z. Wu et al., CVPR 2018.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_val_score
    >>> from diffaugkit.metrics import WeightedKNNClassifier
    >>> scores = cross_val_score(WeightedKNNClassifier(), *load_iris(return_X_y=True))
    >>> print(f"{scores.mean():.2f}")
    0.98
    """

    def __init__(self, n_neighbors=20, temperature=0.07):
        self.n_neighbors = n_neighbors
        self.temperature = temperature

    def fit(self, X, y):
        """Keep the normalised features and their classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Features.
        y : array-like of shape (n_samples,)
            Classes.

        Returns
        -------
        self : WeightedKNNClassifier
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        check_neighbors(self.n_neighbors)
        check_temperature(self.temperature)
        self.classes_, self._codes = np.unique(y, return_inverse=True)
        self._features = unit_rows(X)
        return self

    def predict_proba(self, X):
        """Return each class's share of the votes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Rows sum to 1.
        """
        return self._votes(X, [self.n_neighbors])[0]

    def predict(self, X):
        """Return the class with the most votes; of equal ones the first.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Features.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        # Argument checks come first: an unfitted classifier has no classes.
        votes = self.predict_proba(X)
        return self.classes_[votes.argmax(axis=1)]

    def _votes(self, X, all_k):
        """Return the shares of the votes for each number of voters, from one search."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        X, n = unit_rows(X), len(self._features)
        all_k = [min(k, n) for k in all_k]
        votes = np.zeros((len(all_k), len(X), len(self.classes_)))
        for rows in gen_batches(len(X), max(16, _BLOCK // n)):
            similarity = X[rows] @ self._features.T
            nearest = _most_similar(similarity, max(all_k))
            similarity = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
            # Less the largest, which cancels in the shares: exp overflows at tiny temperatures.
            weight = np.exp((similarity - similarity[:, :1]) / self.temperature)
            codes = self._codes[nearest]
            for out, k in zip(votes[:, rows], all_k, strict=True):
                np.add.at(out, (np.arange(len(out))[:, None], codes[:, :k]), weight[:, :k])
        return votes / votes.sum(axis=2, keepdims=True)


def weighted_knn_accuracy(
    features: ArrayLike,
    y: ArrayLike,
    features_test: ArrayLike,
    y_test: ArrayLike,
    k: int | Iterable[int] = 20,
    temperature: float = 0.07,
) -> float | dict[int, float]:
    """Accuracy of DINO's weighted k-NN vote on a test set.

    Time grows with the product of both numbers of samples; memory does not.

    Parameters
    ----------
    features : array-like of shape (n_samples, n_features)
        Features of the training samples; normalised here.
    y : array-like of shape (n_samples,)
        Their classes.
    features_test : array-like of shape (n_test, n_features)
        Features of the test samples.
    y_test : array-like of shape (n_test,)
        Their classes; one that no training sample has counts as an error.
    k : int or iterable of int, default=20
        Voters, clipped to `n_samples`. Several, such as DINO's (10, 20, 100, 200), cost one search.
    temperature : float > 0, default=0.07
        See :class:`WeightedKNNClassifier`.

    Returns
    -------
    accuracy : float in [0, 1], or dict of k to float

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or `k` or `temperature` is not positive.

    Examples
    --------
    >>> from diffaugkit.metrics import weighted_knn_accuracy
    >>> X, y = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], ["a", "a", "b"]
    >>> weighted_knn_accuracy(X, y, [[1.0, 0.2], [0.1, 1.0]], ["a", "b"], k=(1, 2))
    {1: 1.0, 2: 1.0}
    """
    all_k = list(k) if isinstance(k, Iterable) else [k]
    if not all_k:
        raise ValueError("k must hold at least one number of neighbours.")
    for each in all_k:
        check_neighbors(each)
    model = WeightedKNNClassifier(max(all_k), temperature)
    features_test = check_matrix(in_columns_of(features_test, features), "features_test")
    features = check_matrix(features, "features")
    with many_classes():
        model.fit(features, _labels(y, "y", len(features)))
    y_test = _labels(y_test, "y_test", len(features_test))
    check_known(y_test, model.classes_)
    votes = model._votes(features_test, all_k)
    accuracy = [float(np.mean(model.classes_[v.argmax(axis=1)] == y_test)) for v in votes]
    many = isinstance(k, Iterable)
    return dict(zip(all_k, accuracy, strict=True)) if many else accuracy[0]


def retrieval_map(
    features: ArrayLike,
    y: ArrayLike | None = None,
    query_features: ArrayLike | None = None,
    query_labels: ArrayLike | None = None,
    *,
    relevance: ArrayLike | None = None,
    average: str | None = "macro",
) -> float | np.ndarray:
    """Average precision of retrieval by cosine similarity.

    For each query the database is sorted by similarity, most similar first; samples of the
    query's class are relevant. Average precision is that of scikit-learn: the mean, over the
    relevant samples, of the precision at their rank, ties at their last rank. Time grows with the
    product of queries and database (20 000 of both take a minute): draw some thousand queries of
    large sets, and keep the database.

    Parameters
    ----------
    features : array-like of shape (n_samples, n_features)
        Features of the database; normalised here.
    y : array-like of shape (n_samples,), default=None
        Classes of the database: instances of landmarks, or originals of copies.
    query_features : array-like of shape (n_queries, n_features), default=None
        Features of the queries. None: each sample of the database queries all others.
    query_labels : array-like of shape (n_queries,), default=None
        Classes of the queries.
    relevance : int array-like of shape (n_queries, n_samples), default=None
        In place of classes: 1 relevant, 0 not, -1 left out of the ranking, as the junk images of
        the Revisited Oxford and Paris sets.
    average : {"macro", "micro", None}, default="macro"
        "macro" is mAP, the mean over the queries that have a relevant sample. "micro" ranks all
        pairs of query and sample together (the micro-AP of copy detection, for which similarities
        must also compare between queries); it holds all of them in memory. None gives the values
        of the queries.

    Returns
    -------
    average_precision : float in (0, 1], or ndarray of shape (n_queries,)
        The array has NaN for queries without a relevant sample.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, classes are lacking, or no query has a relevant
        sample.

    Examples
    --------
    >>> from diffaugkit.metrics import retrieval_map
    >>> X = [[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]
    >>> round(retrieval_map(X, ["a", "a", "b", "b"]), 3)
    0.833
    >>> retrieval_map(X, ["a", "a", "b", "b"], [[0.0, 2.0]], ["b"])
    1.0
    """
    if average not in ("macro", "micro", None):
        raise ValueError(f"average must be 'macro', 'micro' or None, got {average!r}.")
    # In double precision: cosines of one embedding are close, and rounding must not make them ties.
    database = unit_rows(check_matrix(features, "features").astype(np.float64))
    own = query_features is None
    queries = database
    if not own:
        queries = check_matrix(in_columns_of(query_features, features), "query_features")
        queries = unit_rows(queries.astype(np.float64))
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"query_features has {queries.shape[1]} features, but features has "
            f"{database.shape[1]}; both must lie in the same space."
        )
    relevant = _relevance(y, query_labels, relevance, own, len(database), len(queries))
    values, pooled = np.empty(len(queries)), []
    for rows in gen_batches(len(queries), max(1, _BLOCK // len(database))):
        similarity = queries[rows] @ database.T
        wanted = relevant(rows)
        if own:
            wanted[np.arange(len(wanted)), np.arange(rows.start, rows.stop)] = -1
        if average == "micro":
            pooled.append((wanted[wanted >= 0], similarity[wanted >= 0]))
        else:
            values[rows] = _average_precision(wanted, similarity)
    if average == "micro":
        wanted, similarity = (np.concatenate(part) for part in zip(*pooled, strict=True))
        if wanted.any():
            return float(average_precision_score(wanted, np.round(similarity, 12)))
    elif average is None:
        return values
    elif not np.isnan(values).all():
        return float(np.nanmean(values))
    raise ValueError("no query has a relevant sample; check the classes of both sets.")


# ------------------------------------------------------------------ helpers


def _labels(y, name, n):
    with many_classes():
        classes, codes = check_labels(y, n, name)
    return classes[codes]


def _most_similar(similarity, k):
    """Return the columns of the k largest values of each row, largest first."""
    if k < similarity.shape[1]:
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    else:
        top = np.broadcast_to(np.arange(k), similarity.shape)
    order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)


def _relevance(y, query_labels, relevance, own, n, n_queries):
    """Return a function of a slice of queries: 1 relevant, 0 not, -1 left out, per sample."""
    if relevance is not None:
        if y is not None or query_labels is not None:
            raise ValueError("give classes (y, query_labels) or relevance, not both.")
        given = np.asarray(relevance)
        if given.shape != (n_queries, n) or not np.isin(given, (-1, 0, 1)).all():
            raise ValueError(
                f"relevance must be of shape ({n_queries}, {n}), one row per query, and hold only "
                f"-1, 0 and 1; got shape {given.shape}."
            )
        return lambda rows: given[rows].astype(np.int8)
    if y is None or (query_labels is None) != own:
        raise ValueError(
            "y gives the classes of features, and query_labels those of query_features: give both "
            "where there are query_features, y alone where there are none, or relevance."
        )
    y = _labels(y, "y", n)
    query_labels = y if own else _labels(query_labels, "query_labels", n_queries)
    return lambda rows: (query_labels[rows][:, None] == y).astype(np.int8)


def _average_precision(wanted, similarity):
    """Return the average precision of each row; NaN where nothing is relevant."""
    # What is left out goes behind all others, where it is counted by no rank.
    similarity = np.where(wanted < 0, -np.inf, similarity)
    order = np.argsort(-similarity, axis=1)
    hit = np.take_along_axis(wanted, order, axis=1) == 1
    ranked = np.take_along_axis(similarity, order, axis=1)
    rank = np.arange(1, hit.shape[1] + 1)
    precision = hit.cumsum(axis=1) / rank
    # Equal similarities have no order among them: all count at the last rank of their group.
    last = np.ones(hit.shape, dtype=bool)
    # Products of equal rows may differ by rounding, with their places.
    with np.errstate(invalid="ignore"):  # those left out, -inf, are no rank
        last[:, :-1] = ranked[:, :-1] - ranked[:, 1:] > _ROUNDING
    end = np.where(last, rank - 1, hit.shape[1])
    end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
    total = hit.sum(axis=1)
    summed = np.sum(hit * np.take_along_axis(precision, end, axis=1), axis=1)
    return np.divide(summed, total, out=np.full(len(hit), np.nan), where=total > 0)
