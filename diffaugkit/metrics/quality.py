"""The report on generated samples, and scorers of generators for scikit-learn's searches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from diffaugkit.arrays import embedder, to_numpy
from diffaugkit.metrics.checks import (
    check_labels,
    check_neighbors,
    check_pair,
    extract_features,
    stratified_folds,
)
from diffaugkit.metrics.generation import (
    copy_ratio,
    frechet_distance,
    kernel_distance,
    kernel_estimate,
    nearest_training_samples,
    precision_recall,
    source_rows,
    spread_ratio,
)

#: A copy ratio below this value means that the generator nearly copies its sources.
NEAR_COPY = 0.3


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
        See :func:`kernel_distance`; a sample and its own source are no pair, as they are alike
        whatever the generator.
    n_generated : int
        Number of generated samples; the distances depend on it: state it with them.
    n_real : int or None, default=None
        Number of real samples, on which the distances depend as well.
    nearest_distance : float >= 0 or None, default=None
        Median distance of a generated sample to its nearest real one; see
        :func:`nearest_training_samples`.
    real_nearest_distance : float >= 0 or None, default=None
        Median distance of a real sample to its nearest other one. Generated samples that lie much
        nearer than this repeat their training data, whatever their sources were.

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
    n_real: int | None = None
    nearest_distance: float | None = None
    real_nearest_distance: float | None = None

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
        baseline, between = self.real_label_consistency, self.real_nearest_distance
        reading = {
            "label_consistency": "" if baseline is None else f"held-out real: {baseline:.3f}",
            "spread_ratio": "best 1",
            "precision": "best 1 (fidelity)",
            "recall": "best 1 (diversity)",
            "copy_ratio": "near-copies!" if self.near_copies else "0 = copies, 1 = new samples",
            "nearest_distance": "" if between is None else f"between real: {between:.4g}",
            "frechet_distance": "best 0; falls with the number of samples",
            "kernel_distance": "best 0",
        }
        against = "" if self.n_real is None else f" against {self.n_real} real ones"
        lines = [f"Quality of {self.n_generated} generated samples{against}"]
        for name, note in reading.items():
            value = getattr(self, name)
            text = "-" if value is None else f"{value:.4g}" if "dist" in name else f"{value:.3f}"
            lines.append(f"  {name.replace('_', ' '):<18}{text:>10}   {note}".rstrip())
        return "\n".join(lines)


def quality_report(
    real: Any,
    generated: Any,
    source: ArrayLike | None = None,
    *,
    extractor: Any = None,
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
    real : array-like of shape (n_real, n_features)
        Real samples, more than 5.
    generated : array-like of shape (n_generated, n_features)
        Generated samples, more than 5.
    source : int array-like of shape (n_generated,), array-like of shape (n_generated, n_features) \
or None, default=None
        Row numbers of `real`, or the rows themselves, from which the samples were generated. None
        for unconditional samples: no copy ratio and no label consistency then.
    extractor : fitted estimator with `transform`, callable or None, default=None
        Maps samples to the features in which all is measured, as in :func:`frechet_distance`.
        Samples may then be of any kind that it reads, such as images, and `source` holds row
        numbers.
    embed : callable, default=None
        Maps samples to the embedding in which label consistency is measured, as
        `encoder.transform`. None: in the space of the samples, or of the features. All else is
        measured there anyway.
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
    >>> report = quality_report(real, real, np.arange(50), labels=real[:, 0] > 0)
    >>> report.copy_ratio, report.spread_ratio, report.precision
    (0.0, 1.0, 1.0)
    >>> report.label_consistency == report.real_label_consistency
    True
    """
    if extractor is not None:
        if source is not None and np.ndim(source) != 1:
            raise ValueError("with an extractor, give source as int row numbers of real.")
        generated = extract_features(extractor, generated, "generated")
        real = extract_features(extractor, real, "real")
    real, generated = check_pair(real, generated, min_samples=2)
    if source is not None:
        source = source_rows(source, real, len(generated))
    consistency = real_consistency = None
    if labels is not None:
        codes = check_labels(labels, n=len(real), name="labels")[1]
        real_e, generated_e = (x if embed is None else embed(x) for x in (real, generated))
        real_e, generated_e = check_pair(real_e, generated_e)
        if (len(generated_e), len(real_e)) != (len(generated), len(real)):
            raise ValueError("embed must return one row per sample.")
        consistency, real_consistency = _cross_fitted_consistency(
            generated_e, source, real_e, codes, n_neighbors, random_state
        )
    precision, recall = precision_recall(real, generated)
    between_real = NearestNeighbors(n_neighbors=1).fit(real).kneighbors()[0]
    return QualityReport(
        label_consistency=consistency,
        real_label_consistency=real_consistency,
        spread_ratio=spread_ratio(real, generated),
        precision=precision,
        recall=recall,
        copy_ratio=None if source is None else copy_ratio(real, generated, source),
        frechet_distance=frechet_distance(real, generated),
        kernel_distance=kernel_estimate(real, generated, source),
        n_generated=len(generated),
        n_real=len(real),
        nearest_distance=float(np.median(nearest_training_samples(real, generated)[0])),
        real_nearest_distance=float(np.median(between_real)),
    )


# ------------------------------------------------------------------ scorers


class _GenerationScorer:
    """What :func:`make_generation_scorer` makes; a class, so that it can be pickled."""

    def __init__(self, score_func, extractor, method, n_samples, greater_is_better, kwargs):
        self.score_func, self.extractor, self.method = score_func, extractor, method
        self.n_samples, self.greater_is_better, self.kwargs = n_samples, greater_is_better, kwargs

    def __call__(self, estimator, X, y=None):
        """Return the score of what the estimator generates against `X`, larger being better."""
        generated = self._generate(estimator, X)
        real = extract_features(self.extractor, X, "X")
        generated = extract_features(self.extractor, generated, "generated")
        value = self.score_func(real, generated, **self.kwargs)
        return float(value) if self.greater_is_better else -float(value)

    def _generate(self, estimator, X):
        generate = getattr(estimator, self.method, None)
        if generate is None:
            raise ValueError(
                f"{type(estimator).__name__} has no method {self.method!r}, so that it cannot be "
                "scored as a generator; name its own by make_generation_scorer(method=...)."
            )
        if self.method == "sample":
            n = X.shape[0] if hasattr(X, "shape") else len(X)
            generated = generate(n if self.n_samples is None else self.n_samples)
        else:
            generated = generate(X)
        # scikit-learn's mixtures return the component of each sample too.
        return to_numpy(generated[0] if isinstance(generated, tuple) else generated)

    def __repr__(self):
        """Return the call that makes this scorer."""
        return f"make_generation_scorer({self.score_func.__name__}, method={self.method!r})"


def make_generation_scorer(
    score_func: Callable,
    *,
    extractor: Any = None,
    method: str = "sample",
    n_samples: int | None = None,
    greater_is_better: bool = False,
    **kwargs: Any,
) -> Callable:
    """Make a scorer of generators for `GridSearchCV` and `cross_val_score`.

    The scorer lets the fitted estimator generate, and compares with the held-out samples.

    Parameters
    ----------
    score_func : callable
        ``score_func(real, generated, **kwargs)``, such as :func:`frechet_distance`.
    extractor : fitted estimator with `transform`, callable or None, default=None
        As in :func:`frechet_distance`. Give a fixed one when encoders are tuned: distances in the
        space of each candidate's own encoder do not compare.
    method : str, default="sample"
        How to generate: "sample" is called with a number, any other method, such as "augment",
        with the held-out samples.
    n_samples : int or None, default=None
        How many to sample. None takes as many as there are held-out samples: the Frechet distance
        falls with the number, so that folds of other sizes have other values.
    greater_is_better : bool, default=False
        Whether a large value is good. Distances are not, and come out negative.
    **kwargs : dict
        Passed to `score_func`.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y=None) -> float``; it can be pickled if its parts can.

    See Also
    --------
    frechet_scorer, kernel_scorer : Made by it, on the samples as they are.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.model_selection import GridSearchCV
    >>> from diffaugkit.metrics import kernel_distance, make_generation_scorer
    >>> scorer = make_generation_scorer(kernel_distance, n_samples=200)
    >>> model = GaussianMixture(random_state=0)
    >>> search = GridSearchCV(model, {"n_components": [1, 3]}, scoring=scorer)
    >>> search.fit(load_iris().data).best_params_
    {'n_components': 3}
    """
    return _GenerationScorer(score_func, extractor, method, n_samples, greater_is_better, kwargs)


#: Negative :func:`frechet_distance` of as many samples as are held out.
frechet_scorer = make_generation_scorer(frechet_distance)
#: Negative :func:`kernel_distance` of as many samples as are held out.
kernel_scorer = make_generation_scorer(kernel_distance)


class _EmbeddingScorer:
    """What :func:`make_embedding_scorer` makes; a class, so that it can be pickled."""

    def __init__(self, score_func, method, kwargs):
        self.score_func, self.method, self.kwargs = score_func, method, kwargs

    def __call__(self, estimator, X, y):
        """Return the score of the embedding of `X` for the classes `y`."""
        embedding = np.asarray(to_numpy(embedder(estimator, self.method)(X)))
        return float(self.score_func(embedding, y, **self.kwargs))

    def __repr__(self):
        """Return the call that makes this scorer."""
        return f"make_embedding_scorer({self.score_func.__name__}, method={self.method!r})"


def make_embedding_scorer(
    score_func: Callable, *, method: str = "transform", **kwargs: Any
) -> Callable:
    """Make a scorer of encoders from a function of embedding and classes.

    Parameters
    ----------
    score_func : callable
        ``score_func(embedding, y, **kwargs)``, larger being better: :func:`retrieval_map`,
        :func:`knn_accuracy` and the like.
    method : str, default="transform"
        Method of the estimator that embeds.
    **kwargs : dict
        Passed to `score_func`.

    Returns
    -------
    scorer : callable
        ``scorer(estimator, X, y) -> float``, over the held-out samples alone.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.decomposition import PCA
    >>> from diffaugkit.metrics import make_embedding_scorer, retrieval_map
    >>> X, y = load_iris(return_X_y=True)
    >>> make_embedding_scorer(retrieval_map)(PCA(2).fit(X), X, y) > 0.7
    True
    """
    return _EmbeddingScorer(score_func, method, kwargs)


# ------------------------------------------------------------------ helpers


def _cross_fitted_consistency(generated, source, real, codes, n_neighbors, random_state):
    """Return the consistency of generated samples (None without source) and of real ones."""
    most = int(np.bincount(codes).max())
    if most < 2:
        raise ValueError(
            f"Each of the {len(codes)} samples has a label of its own: the consistency of labels "
            "needs some that several samples share."
        )
    folds = stratified_folds(codes, min(10, most), random_state)
    hit = np.zeros(len(real), dtype=bool)
    generated_hit = np.zeros(len(generated), dtype=bool)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for train, test in folds.split(real, codes):
            check_neighbors(n_neighbors, len(train), "real samples outside a fold")
            model = KNeighborsClassifier(n_neighbors).fit(real[train], codes[train])
            hit[test] = model.predict(real[test]) == codes[test]
            rows = [] if source is None else np.flatnonzero(np.isin(source, test))
            if len(rows):
                generated_hit[rows] = model.predict(generated[rows]) == codes[source[rows]]
    return (None if source is None else float(generated_hit.mean())), float(hit.mean())
