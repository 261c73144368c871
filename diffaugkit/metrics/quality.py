"""The report on generated samples, and scorers of generators for scikit-learn's searches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import check_random_state

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
    effective_diversity,
    frechet_distance,
    kernel_distance,
    kernel_estimate,
    nearest_others,
    nearest_training_samples,
    precision_recall,
    source_rows,
    spread_ratio,
)

#: A copy ratio below this value means that the generator nearly copies its sources.
NEAR_COPY = 0.3
#: Samples of either kind that a report compares: all its values are estimates, most of them of a
#: cost that grows with the square.
REPORT_ROWS = 2_000


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
        Number of generated samples that were compared; the distances depend on it: state it with
        them.
    n_real : int or None, default=None
        Number of real samples that were compared, on which the distances depend as well.
        Neighbours are sought among all that were given.
    nearest_distance : float >= 0 or None, default=None
        Median distance of a generated sample to its nearest real one; see
        :func:`nearest_training_samples`.
    real_nearest_distance : float >= 0 or None, default=None
        Median distance of a real sample to its nearest other one. Generated samples that lie much
        nearer than this repeat their training data, whatever their sources were.
    effective_diversity : float > 0 or None, default=None
        See :func:`effective_diversity`; 1 is as diverse as the real samples.
    class_frechet_distance : dict of class to float, or None, default=None
        Frechet distance of each class of which there are two samples of either kind. None without
        labels or sources.

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
    effective_diversity: float | None = None
    class_frechet_distance: dict | None = None

    @property
    def near_copies(self) -> bool:
        """Whether the generator nearly copies its sources (copy ratio below 0.3)."""
        return self.copy_ratio is not None and self.copy_ratio < NEAR_COPY

    def to_frame(self):
        """Return the report as a pandas DataFrame of one row, one column per value and class."""
        import pandas as pd

        values = asdict(self)
        classes = values.pop("class_frechet_distance") or {}
        named = {f"frechet_distance_{name}": value for name, value in classes.items()}
        return pd.DataFrame([values | named])

    def plot(self, ax=None):
        """Draw as bars the values of which real samples have a known one, which is marked.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        matplotlib Axes
        """
        import matplotlib.pyplot as plt

        real = {
            "label_consistency": self.real_label_consistency,
            "precision": 1.0,
            "recall": 1.0,
            "effective_diversity": 1.0,
            "spread_ratio": 1.0,
            "copy_ratio": 1.0,
        }
        values = {name: value for name in real if (value := getattr(self, name)) is not None}
        if ax is None:
            ax = plt.figure(figsize=(6.0, 3.4), layout="constrained").add_subplot()
        places = np.arange(len(values))[::-1]
        alarm = [name == "copy_ratio" and self.near_copies for name in values]
        colors = np.where(alarm, "#d55e00", "#0072b2")
        # A copy ratio may be infinite: its bar ends at the edge.
        edge = 1.15 * max([1.0, *(value for value in values.values() if np.isfinite(value))])
        widths = np.minimum(list(values.values()), edge)
        bars = ax.barh(places, widths, color=colors, height=0.7)
        ax.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3)
        marks = np.array([real[name] for name in values], dtype=float)
        ax.vlines(marks, places - 0.45, places + 0.45, color="black", label="real samples")
        ax.set_yticks(places, [name.replace("_", " ") for name in values])
        ax.set_xlim(0, edge)
        ax.set_title(f"Quality of {self.n_generated} generated samples", loc="left")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        return ax

    def __str__(self) -> str:
        """Return a table: value, and how to read it."""
        baseline, between = self.real_label_consistency, self.real_nearest_distance
        reading = {
            "label_consistency": "" if baseline is None else f"held-out real: {baseline:.3f}",
            "spread_ratio": "best 1",
            "precision": "best 1 (fidelity)",
            "recall": "best 1 (diversity)",
            "effective_diversity": "1 = as diverse as real",
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
            lines.append(f"  {name.replace('_', ' '):<19}{text:>9}   {note}".rstrip())
        return "\n".join(lines)


def quality_report(
    real: Any,
    generated: Any,
    source: ArrayLike | None = None,
    *,
    extractor: Any = None,
    embed: Callable | tuple | None = None,
    labels: ArrayLike | None = None,
    n_neighbors: int = 10,
    max_samples: int | None = REPORT_ROWS,
    random_state: Any = 0,
) -> QualityReport:
    """Check generated samples against the real ones before they are used.

    Large sets are compared by a draw of `max_samples` rows of either kind. The neighbours of the
    drawn ones, for copies and for labels, are sought among all real samples: a copy of any of
    them is found. So the cost is linear in the number of samples.

    With `labels` like is compared with like: real samples of classes from which nothing was
    generated, as by an augmenter of the rare ones, are left out, unless fewer than 6 remain. They
    still vote, and copies of them are found.

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
    embed : callable, tuple of two array-likes or None, default=None
        Maps samples to the embedding in which label consistency is measured, as
        `encoder.transform`; or the embeddings of `real` and of `generated` themselves. None: in
        the space of the samples, or of the features. All else is measured there anyway.
    labels : array-like of shape (n_real,), default=None
        Labels of the real samples. None leaves label consistency out.
    n_neighbors : int, default=10
        Voters for the label.
    max_samples : int >= 6 or None, default=2000
        Rows of either kind that are drawn where there are more; None compares all, at a cost that
        grows with the square of their number (hours for a few hundred thousand).
    random_state : int, RandomState instance or None, default=0
        Draws the rows, and shuffles the folds: ten, or fewer where no class has ten samples.

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
    if max_samples is not None and not (isinstance(max_samples, Integral) and max_samples > 5):
        raise ValueError(f"max_samples must be an int of at least 6 or None, got {max_samples!r}.")
    if extractor is not None:
        if source is not None and np.ndim(source) != 1:
            raise ValueError("with an extractor, give source as int row numbers of real.")
        generated = extract_features(extractor, generated, "generated")
        real = extract_features(extractor, real, "real")
    real, generated = check_pair(real, generated, min_samples=2)
    if source is not None:
        source = source_rows(source, real, len(generated))
    compared = np.arange(len(real))
    if labels is not None:
        classes, codes = check_labels(labels, n=len(real), name="labels")
        if source is not None:
            of_generated = np.flatnonzero(np.isin(codes, codes[source]))
            compared = of_generated if len(of_generated) > 5 else compared
    # By one seed: equally many of both, as samples and their sources, are drawn alike.
    rows, picked = (report_rows(len(x), random_state, max_samples) for x in (compared, generated))
    rows = compared[rows]
    everything, real, generated = real, real[rows], generated[picked]
    place = None
    if source is not None:
        source = source[picked]
        place = np.full(len(everything), -1)
        place[rows] = np.arange(len(rows))
        place = place[source]
    consistency = real_consistency = by_class = None
    if labels is not None:
        if source is not None:
            by_class = {
                name: frechet_distance(real[codes[rows] == code], generated[codes[source] == code])
                for code, name in enumerate(classes.tolist())
                if min(np.sum(codes[rows] == code), np.sum(codes[source] == code)) > 1
            }
        real_e, generated_e = everything, generated
        if isinstance(embed, tuple):
            real_e, generated_e = embed[0], np.asarray(to_numpy(embed[1]))[picked]
        elif embed is not None:
            real_e, generated_e = embed(everything), embed(generated)
        real_e, generated_e = check_pair(real_e, generated_e)
        if (len(generated_e), len(real_e)) != (len(generated), len(everything)):
            raise ValueError("embed must return one row per sample.")
        consistency, real_consistency = _cross_fitted_consistency(
            generated_e, source, real_e, rows, codes, n_neighbors, random_state
        )
    precision, recall = precision_recall(real, generated)
    return QualityReport(
        label_consistency=consistency,
        real_label_consistency=real_consistency,
        spread_ratio=spread_ratio(real, generated),
        precision=precision,
        recall=recall,
        copy_ratio=None if source is None else copy_ratio(everything, generated, source),
        frechet_distance=frechet_distance(real, generated),
        kernel_distance=kernel_estimate(real, generated, place),
        n_generated=len(generated),
        n_real=len(real),
        nearest_distance=float(np.median(nearest_training_samples(everything, generated)[0])),
        real_nearest_distance=float(np.median(nearest_others(everything, rows))),
        effective_diversity=effective_diversity(real, generated),
        class_frechet_distance=by_class,
    )


def own_report(real, generated, source, labels, seed):
    """Return the report of an estimator on rows that it was given, however few they are."""
    n_neighbors = min(10, len(real) // 2)
    return quality_report(
        real, generated, source, labels=labels, n_neighbors=n_neighbors, random_state=seed
    )


def report_rows(n: int, random_state: Any, max_samples: int | None = REPORT_ROWS) -> np.ndarray:
    """Return the rows of `n` that a report compares, sorted: all, or a draw of `max_samples`."""
    if max_samples is None or n <= max_samples:
        return np.arange(n)
    return np.sort(check_random_state(random_state).permutation(n)[:max_samples])


# ------------------------------------------------------------------ scorers


class _GenerationScorer:
    """What :func:`make_generation_scorer` makes; a class, so that it can be pickled."""

    def __init__(
        self, score_func, extractor, method, n_samples, per_class, greater_is_better, kwargs
    ):
        self.score_func, self.extractor, self.method = score_func, extractor, method
        self.n_samples, self.per_class = n_samples, per_class
        self.greater_is_better, self.kwargs = greater_is_better, kwargs

    def __call__(self, estimator, X, y=None):
        """Return the score of what the estimator generates against `X`, larger being better."""
        n = X.shape[0] if hasattr(X, "shape") else len(X)
        generated, kwargs, extractor = self._generate(estimator, X, n), self.kwargs, self.extractor
        if self.per_class:
            if y is None:
                raise ValueError("per_class=True needs the classes y of the held-out samples.")
            labels = np.asarray(y)
            made = np.repeat(labels, len(generated) // n)
            kwargs = {**kwargs, "labels": labels, "generated_labels": made}
        is_matrix = hasattr(X, "__array__") and np.ndim(X) == 2
        is_matrix |= isinstance(X, list) and np.ndim(X[0]) == 1  # rows of numbers
        if extractor is None and not is_matrix and hasattr(estimator, "transform"):
            extractor = estimator  # reads images, sparse rows and AnnData, as it did in fit
        real = extract_features(extractor, X, "X")
        with warnings.catch_warnings():
            # Generated rows have the columns of the fit, without their names.
            warnings.filterwarnings("ignore", message="X does not have valid feature names")
            generated = extract_features(extractor, generated, "generated")
        value = self.score_func(real, generated, **kwargs)
        value = float(np.mean(list(value.values())) if self.per_class else value)
        return value if self.greater_is_better else -value

    def _generate(self, estimator, X, n):
        method = self.method
        if method == "auto":
            augments = self.per_class or not hasattr(estimator, "sample")
            method = "augment" if augments and hasattr(estimator, "augment") else "sample"
        if method == "sample" and self.per_class:
            raise ValueError(
                f"per_class=True needs to know the class of what {type(estimator).__name__} "
                "generates, which `sample` does not tell: it takes a method such as 'augment'."
            )
        generate = getattr(estimator, method, None)
        if generate is None:
            raise ValueError(
                f"{type(estimator).__name__} has no method {method!r}, so that it cannot be "
                "scored as a generator; name its own by make_generation_scorer(method=...)."
            )
        if method == "sample":
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
    method: str = "auto",
    n_samples: int | None = None,
    per_class: bool = False,
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
        As in :func:`frechet_distance`. None compares matrices as they are, and all else (images,
        sparse rows, AnnData) by the estimator's own `transform`. Give a fixed one when encoders
        are tuned: distances in the space of each candidate's own encoder do not compare.
    method : str, default="auto"
        How to generate: "sample" is called with a number, any other method, such as "augment",
        with the held-out samples. "auto" is "sample" where the estimator has it, else "augment".
    n_samples : int or None, default=None
        How many to sample. None takes as many as there are held-out samples: the Frechet distance
        falls with the number, so that folds of other sizes have other values.
    per_class : bool, default=False
        Score the mean over the classes `y` of the held-out samples; what is made from a sample
        ("auto" is then "augment") has its class.
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
    return _GenerationScorer(
        score_func, extractor, method, n_samples, per_class, greater_is_better, kwargs
    )


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


def _cross_fitted_consistency(generated, source, real, rows, codes, n_neighbors, random_state):
    """Return the consistency of generated samples (None without source) and of `rows` of real."""
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
            judged = np.intersect1d(rows, test)
            if len(judged):
                hit[judged] = model.predict(real[judged]) == codes[judged]
            made = [] if source is None else np.flatnonzero(np.isin(source, test))
            if len(made):
                generated_hit[made] = model.predict(generated[made]) == codes[source[made]]
    return (None if source is None else float(generated_hit.mean())), float(hit[rows].mean())
