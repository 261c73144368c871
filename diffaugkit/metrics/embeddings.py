"""Scores of an embedding against known classes: clusters, and cross-validated classifiers."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from diffaugkit.metrics.checks import (
    about_center,
    check_labels,
    check_matrix,
    check_neighbors,
    check_pair,
    stratified_folds,
)


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
    _, true = check_labels(y_true, name="y_true")
    _, predicted = check_labels(y_pred, n=len(true), name="y_pred")
    counts = contingency_matrix(true, predicted)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(true))


def knn_accuracy(
    X: ArrayLike, y: ArrayLike, *, n_neighbors: int = 10, cv: Any = 10, random_state: Any = 0
) -> float:
    """Cross-validated accuracy of a k-nearest-neighbour vote in `X`.

    Time grows with the square of the number of samples (of more than 15 features; 300 000 samples
    take minutes); memory does not.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding; Euclidean distance, features as they are.
    y : array-like of shape (n_samples,)
        Class labels.
    n_neighbors : int, default=10
        Voters; at most the number of samples outside a fold.
    cv : int >= 2 or splitter, default=10
        Number of stratified, shuffled folds (the paper's ten), any scikit-learn splitter, or
        folds: ``list(GroupKFold(5).split(X, y, groups))`` keeps groups together.
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

    See Also
    --------
    weighted_knn_accuracy : DINO's vote by cosine similarity, on a test set.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import knn_accuracy
    >>> round(knn_accuracy(*load_iris(return_X_y=True)), 2)
    0.96
    """
    X = check_matrix(X, "X")
    X = about_center(X, X)[0]
    check_neighbors(n_neighbors)
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

    The protocol of the DiffAug paper (section 3.2 and appendix D.1): ten folds, 90 % of the
    samples train and 10 % test. Time grows at least with the square of the number of samples:
    beyond some 20 000 draw rows, or take :func:`linear_probe_accuracy`, whose time is linear.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        Embedding; standardised on the training part of each fold.
    y : array-like of shape (n_samples,)
        Class labels, at least two classes.
    cv : int >= 2 or splitter, default=10
        Number of stratified, shuffled folds, any scikit-learn splitter, or folds:
        ``list(GroupKFold(5).split(X, y, groups))`` keeps groups together.
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
    return _cross_validate(model, check_matrix(X, "X"), y, cv, random_state)


def linear_probe_accuracy(
    X: ArrayLike, y: ArrayLike, *, cv: Any = 10, random_state: Any = 0
) -> float:
    """Cross-validated accuracy of multinomial logistic regression on standardised `X`.

    Parameters
    ----------
    X, y, cv, random_state
        As for :func:`linear_svm_accuracy`.

    Returns
    -------
    accuracy : float in [0, 1]
        Mean over the folds.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are too few samples.

    See Also
    --------
    linear_probe : DINO's protocol: a test set, SGD, and a sweep of learning rates and layers.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import linear_probe_accuracy
    >>> linear_probe_accuracy(*load_iris(return_X_y=True)) > 0.94
    True
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return _cross_validate(model, check_matrix(X, "X"), y, cv, random_state)


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
    X = check_matrix(X, "X")
    classes, codes = check_labels(y, n=len(X))
    clusters = KMeans(len(classes), n_init=10, random_state=random_state).fit_predict(X)
    return {
        "accuracy": clustering_accuracy(codes, clusters),
        "ari": float(adjusted_rand_score(codes, clusters)),
        "nmi": float(normalized_mutual_info_score(codes, clusters)),
    }


def label_consistency(
    real: ArrayLike,
    labels: ArrayLike,
    generated: ArrayLike,
    generated_labels: ArrayLike,
    n_neighbors: int = 10,
) -> float:
    """Share of generated samples whose nearest real samples vote for the label they should have.

    Time grows with the product of both numbers of samples; memory does not.

    Parameters
    ----------
    real : array-like of shape (n_real, n_features)
        Real samples, or their embedding.
    labels : array-like of shape (n_real,)
        Their labels.
    generated : array-like of shape (n_generated, n_features)
        Generated samples, in the same space.
    generated_labels : array-like of shape (n_generated,)
        Label that each one should have: that of its source.
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
    >>> label_consistency(real, kinds, [[0.4], [8.6]], ["b", "b"], n_neighbors=1)
    0.5
    """
    real, generated = check_pair(real, generated)
    classes, real_codes = check_labels(labels, n=len(real), name="labels")
    names, codes = check_labels(generated_labels, n=len(generated), name="generated_labels")
    unknown = sorted(set(names.tolist()) - set(classes.tolist()), key=str)
    if unknown:
        raise ValueError(
            f"generated_labels that no real sample has: {unknown[:5]}; give both in "
            "the same coding."
        )
    check_neighbors(n_neighbors, len(real))
    points, by = about_center(generated, real)
    votes = KNeighborsClassifier(n_neighbors).fit(by, real_codes).predict(points)
    return float(np.mean(classes[votes] == names[codes]))


# ------------------------------------------------------------------ helpers


def _cross_validate(model, X, y, cv, random_state):
    codes = check_labels(y, n=len(X))[1]
    with warnings.catch_warnings():
        # Rare cell types are normal, and shall not drown the table of results in warnings.
        warnings.filterwarnings("ignore", message="The least populated class")
        scores = cross_val_score(
            model, X, codes, cv=stratified_folds(codes, cv, random_state), error_score="raise"
        )
    return float(scores.mean())
