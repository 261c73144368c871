"""Each score against a slow, obvious version of itself, closed forms, and what must not matter."""

import inspect
import pickle
import warnings
from itertools import permutations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn import config_context
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    LeaveOneOut,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder, metrics
from diffaugkit.metrics import (
    QualityReport,
    clustering_accuracy,
    copy_ratio,
    density_coverage,
    effective_diversity,
    frechet_distance,
    frechet_scorer,
    kernel_distance,
    kernel_scorer,
    kmeans_scores,
    knn_accuracy,
    label_consistency,
    linear_probe_accuracy,
    linear_svm_accuracy,
    make_embedding_scorer,
    make_generation_scorer,
    nearest_training_samples,
    precision_recall,
    quality_report,
    retrieval_map,
    spread_ratio,
)
from diffaugkit.metrics import generation as generation_metrics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def blobs():
    return make_blobs(120, n_features=4, centers=3, cluster_std=0.5, random_state=0)


# ------------------------------------------------------------------ labels and embeddings

labels = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(labels, st.permutations(range(5)))
def test_clustering_accuracy_ignores_the_names_of_clusters(y, names):
    assert clustering_accuracy(y, [names[v] for v in y]) == 1.0


@given(labels, st.randoms(use_true_random=False))
def test_clustering_accuracy_equals_a_search_over_all_matchings(y, random):
    predicted = [random.randrange(4) for _ in y]
    best = max(
        np.mean([names[p] == t for p, t in zip(predicted, y, strict=True)])
        for names in permutations(range(5))
    )
    accuracy = clustering_accuracy(y, predicted)
    assert accuracy == pytest.approx(best)
    assert accuracy == pytest.approx(clustering_accuracy(predicted, y))


def test_clustering_accuracy_surplus_clusters_count_as_errors():
    assert clustering_accuracy([0, 0, 0, 0], [0, 1, 2, 3]) == 0.25
    assert clustering_accuracy(["a", "b"], [0, 0]) == 0.5


def test_knn_accuracy_equals_a_brute_force_vote(blobs):
    X, y = make_blobs(90, centers=3, cluster_std=4.0, random_state=1)
    scores = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(X, y):
        nearest = np.argsort(cdist(X[test], X[train]), axis=1)[:, :7]
        votes = [np.bincount(v, minlength=3).argmax() for v in y[train][nearest]]
        scores.append(np.mean(votes == y[test]))
    accuracy = knn_accuracy(X, y, n_neighbors=7, cv=5, random_state=3)
    assert accuracy == pytest.approx(np.mean(scores), abs=1e-12)
    assert 0.5 < accuracy < 1.0


@pytest.mark.parametrize("score", [knn_accuracy, linear_svm_accuracy, linear_probe_accuracy])
def test_classifier_scores_know_easy_from_impossible(score, blobs):
    X, y = blobs
    assert score(X, y) == 1.0
    names = np.array(["T cell", "B cell", "NK"], dtype=object)
    assert score(pd.DataFrame(X.astype(np.float32)), pd.Series(names[y]).astype("category")) == 1.0
    assert score(normal(300, 4), np.arange(300) % 3) < 0.45
    assert score(X, y, cv=3, random_state=1) == score(X, y, cv=3, random_state=1)


def test_linear_scores_need_a_straight_border_and_standardise():
    X = normal(200, 2)
    straight, ring = X[:, 0] > 0.0, (X**2).sum(axis=1) > 1.4
    scale = np.array([1e-4, 1e4])
    assert linear_svm_accuracy(X * scale, straight) > 0.95
    assert linear_probe_accuracy(X * scale, straight) > 0.95
    assert linear_svm_accuracy(X, ring) < 0.7
    assert knn_accuracy(X, ring) > 0.85


def test_columns_of_tables_go_by_name():
    rng = np.random.default_rng(0)
    real = pd.DataFrame(rng.normal(size=(60, 4)) * [1, 2, 3, 9], columns=list("abcd"))
    y = (real["a"] > 0).astype(int)
    moved = real[list("dbca")] + 0.01
    assert label_consistency(real, y, moved, y, 1) > 0.95
    assert frechet_distance(real, moved) == pytest.approx(4e-4, rel=1e-3)


def test_neighbours_of_data_far_from_zero():
    X = np.random.default_rng(0).normal(size=(300, 30))
    y = (X[:, 0] > 0).astype(int)
    for offset in (1e8, -3e8):
        assert knn_accuracy(X + offset, y) == pytest.approx(knn_accuracy(X, y), abs=0.01)
        far = label_consistency(X[100:] + offset, y[100:], X[:100] + offset, y[:100])
        near = label_consistency(X[100:], y[100:], X[:100], y[:100])
        assert far == pytest.approx(near, abs=0.02)


def test_knn_accuracy_takes_a_splitter():
    X = [[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]
    assert knn_accuracy(X, [0, 0, 0, 1, 1, 1], n_neighbors=1, cv=LeaveOneOut()) == 1.0


def test_rare_classes_do_not_warn(blobs, recwarn):
    X, y = blobs
    y = np.r_[y[:-1], 7]
    assert knn_accuracy(X, y) == pytest.approx(119 / 120)
    assert not recwarn.list


def test_kmeans_scores(blobs):
    X, y = blobs
    assert kmeans_scores(X, y, random_state=0) == pytest.approx({"accuracy": 1, "ari": 1, "nmi": 1})
    scores = kmeans_scores(normal(300, 2), np.arange(300) % 3, random_state=0)
    assert scores["accuracy"] < 0.5
    assert abs(scores["ari"]) < 0.05


def test_label_consistency(blobs):
    X, y = blobs
    assert label_consistency(X, y, X + 0.01, y) == 1.0
    assert label_consistency(X, y, X, (y + 1) % 3) == 0.0
    rows = np.arange(0, 120, 2)
    expected = KNeighborsClassifier(3).fit(X, y).score(X[rows] + 2.0, y[rows])
    result = label_consistency(X, y, X[rows] + 2.0, y[rows], n_neighbors=3)
    assert result == pytest.approx(expected)


# ------------------------------------------------------------------ generated against real


def test_frechet_distance_closed_forms():
    X = normal(500, 6)
    assert frechet_distance(X, X) == pytest.approx(0.0, abs=1e-11)
    assert frechet_distance(X, X + 3.0) == pytest.approx(6 * 9.0, rel=1e-12)
    # Covariances C and 4 C commute: tr(C + 4 C - 2 * 2 C) = tr C, about the means' own shift.
    centred = X - X.mean(axis=0)
    trace = np.trace(np.cov(X.T))
    assert frechet_distance(centred, 2.0 * centred) == pytest.approx(trace, rel=1e-12)
    # 1-D: (m1 - m2)^2 + (s1 - s2)^2
    a, b = X[:, :1], 3.0 * X[:, 1:2] + 5.0
    known = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(known, rel=1e-12)


def test_frechet_distance_of_known_gaussians():
    # N(0, I) against N(1, 9 I) in 3 dimensions: 3 * 1 + 3 * (1 - 3)^2 = 15.
    distance = frechet_distance(normal(40_000, 3), 1.0 + 3.0 * normal(40_000, 3, seed=1))
    assert distance == pytest.approx(15.0, abs=0.3)


@pytest.mark.parametrize(("n", "rel"), [(9, 1e-5), (60, 1e-10), (5000, 1e-10)])
def test_frechet_distance_equals_the_matrix_root(n, rel):
    # n = 9 gives singular covariances, for which the root itself has but half of the digits;
    # n = 5000 gives more than one block of rows.
    mix = normal(20, 20, seed=2)
    real, generated = normal(n, 20), normal(n + 7, 20, seed=1) @ mix + 0.3
    c1, c2 = np.cov(real.T), np.cov(generated.T)
    shift = np.sum((real.mean(axis=0) - generated.mean(axis=0)) ** 2)
    # Symmetric form of the root, in which sqrtm stays real for singular covariances too.
    root = np.real(sqrtm(c1 + (1e-14 if n < 20 else 0.0) * np.eye(20)))
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0, None)).sum()
    known = shift + np.trace(c1) + np.trace(c2) - 2.0 * overlap
    assert frechet_distance(real, generated) == pytest.approx(known, rel=rel)
    assert frechet_distance(generated, real) == pytest.approx(known, rel=rel)


def test_frechet_distance_is_computed_in_float64():
    X = (normal(300, 5) + 1000.0).astype(np.float32)
    same = frechet_distance(X, X.astype(np.float64) + 0.5)
    assert same == pytest.approx(5 * 0.25, rel=1e-9)


@given(st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_distances_do_not_change_with_order_or_rotation(seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(30, 4)), rng.normal(size=(25, 4)) * 1.5
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for score in (frechet_distance, kernel_distance, precision_recall, density_coverage):
        value = score(real, generated)
        assert score(rng.permutation(real), rng.permutation(generated)) == pytest.approx(value)
        assert score(real @ rotation, generated @ rotation) == pytest.approx(value)
    source = rng.integers(30, size=25)
    value = copy_ratio(real, generated, source)
    order = rng.permutation(30)
    assert copy_ratio(real[order], generated, np.argsort(order)[source]) == pytest.approx(value)
    assert copy_ratio(2 * real + 1, 2 * generated + 1, source) == pytest.approx(value)


def slow_kernel_distance(X, Y):
    def kernel(a, b):
        return (np.dot(a, b) / X.shape[1] + 1.0) ** 3

    n, m = len(X), len(Y)
    xx = sum(kernel(X[i], X[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(Y[i], Y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in X for b in Y) / (n * m)
    return xx + yy - 2.0 * xy


def test_kernel_distance_equals_the_double_loop(monkeypatch):
    real, generated = normal(23, 5), normal(17, 5, seed=1) + 0.5
    assert kernel_distance(real, generated) == pytest.approx(
        slow_kernel_distance(real, generated), rel=1e-12
    )
    whole = kernel_distance(real, generated)
    # Blocks of one row must give what one block gives.
    monkeypatch.setattr(
        generation_metrics,
        "gen_batches",
        lambda n, _: (slice(i, i + 1) for i in range(n)),
        raising=True,
    )
    assert kernel_distance(real, generated) == pytest.approx(whole, rel=1e-12)


def test_kernel_distance_of_a_report_does_not_reward_nearness_to_sources():
    found, plain = [], []
    for seed in range(200):
        real, noise = normal(20, 3, seed=seed), normal(20, 3, seed=1000 + seed)
        generated = 0.8 * real + 0.6 * noise  # distributed as the real ones
        found.append(quality_report(real, generated, np.arange(20)).kernel_distance)
        plain.append(kernel_distance(real, generated))
    error = np.std(found) / np.sqrt(200)
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(plain) < -3 * error
    copies = quality_report(real, real, np.arange(20))
    assert copies.kernel_distance == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased():
    values = [
        kernel_distance(normal(20, 3, seed=i), normal(20, 3, seed=1000 + i)) for i in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0
    assert kernel_distance(normal(200, 3), normal(200, 3, seed=1) + 1.0) > 1.0


def slow_precision_recall(real, generated, k):
    def covered(points, by):
        radius = np.sort(cdist(by, by), axis=1)[:, k]
        return np.mean((cdist(points, by) <= radius * (1 + 1e-12)).any(axis=1))

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_equals_brute_force(k):
    real, generated = normal(150, 3), 0.5 * normal(120, 3, seed=1) + 0.8
    precision, recall = precision_recall(real, generated, n_neighbors=k)
    assert (precision, recall) == slow_precision_recall(real, generated, k)
    assert precision > recall > 0.0


def test_precision_recall_extremes():
    X = normal(60, 3)
    assert precision_recall(X, X) == (1.0, 1.0)
    assert precision_recall(X, X + 100.0) == (0.0, 0.0)
    # Duplicates give balls of radius zero, and values far from zero cost digits.
    repeated = np.repeat(X[:8], 7, axis=0).astype(np.float32) + 1000.0
    assert precision_recall(repeated, repeated) == (1.0, 1.0)
    assert precision_recall(X, X[::-1] * 1e-3)[0] == 1.0


@pytest.mark.parametrize("k", [1, 5])
def test_density_coverage_equals_brute_force(k):
    real, generated = normal(150, 3), 0.5 * normal(120, 3, seed=1) + 0.8
    radius = np.sort(cdist(real, real), axis=1)[:, k] * (1 + 1e-12)
    inside = cdist(generated, real) <= radius
    expected = inside.sum() / (k * 120), inside.any(axis=0).mean()
    assert density_coverage(real, generated, n_neighbors=k) == pytest.approx(expected, abs=1e-12)


def test_density_coverage_of_one_distribution():
    values = [
        density_coverage(normal(300, 4, seed=i), normal(300, 4, seed=1000 + i)) for i in range(20)
    ]
    # Lemma 2 of the paper: 1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)).
    n = np.arange(1, 6)
    assert np.mean(values, axis=0) == pytest.approx(
        [1.0, 1 - np.prod((300 - n) / (600 - n))], abs=0.01
    )


def test_outliers_do_not_raise_the_coverage():
    real = normal(200, 3)
    narrow = 0.05 * normal(199, 3, seed=1)
    outliers = np.vstack([narrow, [[30.0, 0, 0]]])
    assert precision_recall(real, narrow)[1] < 0.1
    assert precision_recall(real, outliers)[1] > 0.4
    assert density_coverage(real, outliers) == pytest.approx(
        [199 / 200 * density_coverage(real, narrow)[0], density_coverage(real, narrow)[1]]
    )


def slow_copy_ratio(real, generated, source):
    ratios = []
    for g, s in zip(generated, source, strict=True):
        others = [np.linalg.norm(g - r) for r in real if not np.array_equal(r, real[s])]
        ratios.append(np.linalg.norm(g - real[s]) / min(others))
    return np.median(ratios)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_copy_ratio_equals_the_definition(noise):
    real = np.r_[normal(60, 4), normal(60, 4)[:5]]
    source = np.random.default_rng(3).integers(65, size=101)
    generated = real[source] + noise * normal(101, 4, seed=4)
    value = copy_ratio(real, generated, source)
    assert value == pytest.approx(slow_copy_ratio(real, generated, source), rel=1e-10)
    assert copy_ratio(real, generated, real[source]) == value
    if noise == 0.0:
        assert value == 0.0


def test_copy_ratio_closed_forms():
    real = np.array([[0.0], [1.0], [10.0]])
    assert copy_ratio(real, [[0.5]], [0]) == 1.0
    assert copy_ratio(real, [[0.8]], [0]) == pytest.approx(4.0)
    assert copy_ratio(real, [[-1.0]], [0]) == 0.5
    assert copy_ratio(real, [[1.0]], [0]) == np.inf
    # A duplicate of the source is the source: a copy of a duplicated cell is still a copy.
    assert copy_ratio([[0.0], [-0.0], [3.0]], [[0.0]], [0]) == 0.0
    # Another precision of the same rows is recognised.
    wide = normal(9, 3)
    assert copy_ratio(wide, wide, wide.astype(np.float32)) == 0.0


def test_spread_ratio():
    X = normal(50, 3)
    assert spread_ratio(X, X) == 1.0
    assert spread_ratio(X, 3.0 * X + 7.0) == pytest.approx(3.0)
    Y = normal(40, 3, seed=1) * [1.0, 2.0, 3.0]
    known = np.sqrt(np.trace(np.cov(Y.T)) / np.trace(np.cov(X.T)))
    assert spread_ratio(X, Y) == pytest.approx(known)


# ------------------------------------------------------------------ extractors, classes, scorers


def channel_means(images):
    """An extractor that is a plain function of a batch of images."""
    assert len(images) <= 256
    return images.reshape(len(images), -1, 3).mean(axis=1)


class TensorMeans:
    """An extractor with a transform, that returns tensors."""

    def transform(self, images):
        return torch.from_numpy(channel_means(images[:256])).requires_grad_()


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance])
def test_distances_under_an_extractor(score):
    rng = np.random.default_rng(0)
    real, generated = rng.integers(255, size=(300, 4, 5, 3)), rng.integers(99, size=(250, 4, 5, 3))
    known = score(real.reshape(300, 20, 3).mean(axis=1), generated.reshape(250, 20, 3).mean(axis=1))
    # 300 images are more than one batch.
    assert score(real, generated, extractor=channel_means) == pytest.approx(known, rel=1e-12)
    few = real[:250], generated
    assert score(*few, extractor=TensorMeans()) == score(*few, extractor=channel_means)
    pca = PCA(2).fit(normal(40, 5))
    X, Y = normal(30, 5), normal(20, 5, seed=1)
    assert score(X, Y, extractor=pca) == score(pca.transform(X), pca.transform(Y))


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance])
def test_distances_per_class(score):
    X, Y = normal(60, 3), 1.5 * normal(50, 3, seed=1)
    x, y = (
        np.array(["b", "a", "c"])[np.arange(60) % 3],
        np.array(["c", "a", "b"])[np.arange(50) % 3],
    )
    values = score(X, Y, labels=x, generated_labels=y)
    assert list(values) == ["a", "b", "c"]
    for name in "abc":
        assert values[name] == score(X[x == name], Y[y == name])


def test_nearest_training_samples():
    real = normal(200, 4)
    generated = np.r_[normal(30, 4, seed=1), real[:5]]
    distance, index = nearest_training_samples(real, generated)
    all_pairs = cdist(generated, real)
    assert np.array_equal(index, all_pairs.argmin(axis=1))
    assert np.allclose(distance, all_pairs.min(axis=1), atol=1e-12)
    assert np.array_equal(distance[-5:], np.zeros(5))
    pca = PCA(2).fit(real)
    distance, index = nearest_training_samples(real, generated, extractor=pca)
    all_pairs = cdist(pca.transform(generated), pca.transform(real))
    assert np.array_equal(index, all_pairs.argmin(axis=1))


class Shifting:
    def augment(self, X):
        return np.asarray(X) + 1.0


class Copier(Shifting, GaussianMixture):
    """A mixture that can also augment."""


@pytest.mark.parametrize("scorer", [frechet_scorer, kernel_scorer])
def test_scorers_find_the_better_generator(scorer, blobs):
    X, _ = blobs
    model = GaussianMixture(random_state=0)
    search = GridSearchCV(model, {"n_components": [1, 3]}, scoring=scorer, cv=3)
    with config_context(enable_metadata_routing=True):
        assert search.fit(X).best_params_ == {"n_components": 3}
    fitted = search.best_estimator_
    score = {frechet_scorer: frechet_distance, kernel_scorer: kernel_distance}[scorer]
    assert scorer(fitted, X) == -score(X, fitted.sample(len(X))[0])
    assert pickle.loads(pickle.dumps(scorer))(fitted, X) == scorer(fitted, X)
    assert score.__name__ in repr(scorer)


def test_scorers_with_other_settings(blobs):
    X, _ = blobs
    model, pca = Copier(random_state=0).fit(X), PCA(2).fit(X)
    scorer = make_generation_scorer(frechet_distance, method="augment", extractor=pca)
    assert scorer(model, X) == -frechet_distance(X, X + 1.0, extractor=pca)
    scorer = make_generation_scorer(frechet_distance, n_samples=33)
    assert scorer(model, X) == -frechet_distance(X, model.sample(33)[0])
    # Real samples come first in every metric: three times their spread is 3, not a third.
    scorer = make_generation_scorer(spread_ratio, method="transform", greater_is_better=True)
    assert scorer(FunctionTransformer(lambda X: 3.0 * X), X) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="PCA has no method 'sample'"):
        frechet_scorer(pca, X)


@pytest.mark.parametrize("form", [sp.csr_matrix, ad.AnnData])
def test_scorers_read_what_the_generator_reads(blobs, form):
    X, y = (np.concatenate([part] * 2) for part in blobs)
    encoder = SelfSupervisedEncoder(hidden_sizes=(8,), max_epochs=1, n_pcs=3)
    model = EmbeddingConditionedDiffusion(encoder, width=8, max_epochs=2, random_state=0)
    for scorer in (frechet_scorer, make_generation_scorer(kernel_distance, per_class=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = cross_val_score(model, form(X), y, cv=3, scoring=scorer, error_score="raise")
        assert np.isfinite(scores).all()


def test_a_list_of_rows_is_scored_as_the_matrix():
    class Embedding(Shifting):
        def transform(self, X):
            return np.asarray(X)[:, :2]

    X = normal(50, 4)
    expected = -frechet_distance(X, X + 1.0)
    assert frechet_scorer(Embedding(), X.tolist()) == frechet_scorer(Embedding(), X) == expected
    assert frechet_scorer(Embedding(), list(X)) == expected


def test_scorer_of_the_classes(blobs):
    X, y = blobs
    model = Copier(random_state=0).fit(X)
    per_class = make_generation_scorer(frechet_distance, per_class=True)
    by_class = frechet_distance(X, X + 1.0, labels=y, generated_labels=y)
    assert per_class(model, X, y) == -np.mean(list(by_class.values()))
    with pytest.raises(ValueError, match="needs the classes"):
        per_class(model, X)
    # What is sampled has no class: it must not be given that of a row by its place.
    of_samples = make_generation_scorer(frechet_distance, method="sample", per_class=True)
    for scorer, generator in (
        (of_samples, model),
        (per_class, GaussianMixture(random_state=0).fit(X)),
    ):
        with pytest.raises(ValueError, match="needs to know the class"):
            scorer(generator, X, y)
    # What has no `sample` is asked to augment.
    assert frechet_scorer(Shifting(), X) == -frechet_distance(X, X + 1.0)


def test_scorers_of_encoders(blobs):
    X, y = blobs
    scorer = make_embedding_scorer(retrieval_map, average="micro")
    pca = PCA(2).fit(X)
    assert scorer(pca, X, y) == retrieval_map(pca.transform(X), y, average="micro")
    noisy = np.c_[X - X.mean(axis=0), 5.0 * normal(120, 6)]
    scorer = make_embedding_scorer(retrieval_map)
    search = GridSearchCV(PCA(), {"n_components": [1, 4, 10]}, scoring=scorer, cv=3).fit(noisy, y)
    assert len(search.cv_results_["mean_test_score"]) == 3
    folds = cross_val_score(PCA(4), noisy, y, scoring=scorer, cv=3)
    assert search.cv_results_["mean_test_score"][1] == pytest.approx(folds.mean())
    assert "retrieval_map" in repr(scorer)


# ------------------------------------------------------------------ the report


def test_quality_report_of_copies_is_that_of_the_real_samples():
    X, y = make_blobs(120, centers=3, cluster_std=3.0, random_state=1)
    report = quality_report(X, X, np.arange(120), labels=y)
    assert report.label_consistency == report.real_label_consistency
    assert 0.5 < report.real_label_consistency < 1.0
    assert (report.spread_ratio, report.precision, report.recall) == (1.0, 1.0, 1.0)
    assert report.copy_ratio == 0.0
    assert report.near_copies
    assert report.frechet_distance == pytest.approx(0.0, abs=1e-10)
    assert report.n_generated == report.n_real == 120
    # Copies are nearer to a real sample than real samples are to each other.
    assert report.nearest_distance == 0.0
    between = np.sort(cdist(X, X), axis=1)[:, 1]
    assert report.real_nearest_distance == pytest.approx(np.median(between))


def test_quality_report_equals_its_parts(blobs):
    X, y = blobs
    source = np.random.default_rng(0).integers(120, size=80)
    generated = X[source] + normal(80, 4)
    report = quality_report(X, generated, X[source], labels=y, n_neighbors=5, random_state=1)
    assert report.spread_ratio == spread_ratio(X, generated)
    assert (report.precision, report.recall) == precision_recall(X, generated)
    assert report.copy_ratio == copy_ratio(X, generated, source)
    assert report.frechet_distance == frechet_distance(X, generated)
    # What is alike whatever the generator, a sample and its own source, is left out.
    assert quality_report(X, generated).kernel_distance == kernel_distance(X, generated)
    assert report.real_label_consistency == 1.0
    assert report.label_consistency > 0.9
    assert report.label_consistency == pytest.approx(
        label_consistency(X, y, generated, y[source], n_neighbors=5), abs=0.05
    )
    assert not report.near_copies
    assert report.effective_diversity == effective_diversity(X, generated)
    assert report.class_frechet_distance == frechet_distance(
        X, generated, labels=y, generated_labels=y[source]
    )
    assert set(report.to_frame()) >= {"frechet_distance_0", "frechet_distance_2"}
    bars = report.plot().patches
    assert [bar.get_width() for bar in bars][2:4] == [report.recall, report.effective_diversity]
    # Copies of others than the sources that were named.
    ax = quality_report(X, X, np.roll(np.arange(len(X)), 1)).plot()
    assert "inf" in [text.get_text() for text in ax.texts]
    ax.figure.canvas.draw()


def test_quality_report_compares_with_the_classes_that_were_generated():
    X = np.concatenate([normal(200, 4), normal(20, 4) + 3])
    y = np.repeat(["usual", "rare"], [200, 20])
    source = 200 + np.arange(40) % 20
    generated = X[source] + 0.3 * normal(40, 4)
    report = quality_report(X, generated, source, labels=y, n_neighbors=5)
    alone = quality_report(X[200:], generated, source - 200)
    for name in ("frechet_distance", "precision", "recall", "spread_ratio", "n_real"):
        assert getattr(report, name) == getattr(alone, name), name
    assert report.n_real == 20
    # All classes vote, and copies of all are found.
    assert report.copy_ratio == copy_ratio(X, generated, source)
    every = quality_report(X, X, np.arange(220), labels=y, n_neighbors=5)
    assert report.real_label_consistency < every.real_label_consistency
    copies = quality_report(X, X[source], source, labels=y, n_neighbors=5)
    assert copies.label_consistency == copies.real_label_consistency
    # Too few of a class to be compared with.
    few = quality_report(X, generated, np.full(40, 219), labels=np.arange(220) == 219)
    assert few.n_real == 220


def test_effective_diversity():
    X = normal(200, 5)
    assert effective_diversity(X, X) == pytest.approx(1.0)
    assert effective_diversity(X, 3.0 * X) > 1.0
    # As many different samples, by the score's own definition on two of the eigenvalues.
    assert effective_diversity([[0.0], [1.0]], [[5.0], [5.0]]) == pytest.approx(1 / slow_vendi(1.0))
    few = [effective_diversity(X, X[:n].repeat(200 // n, axis=0)) for n in (100, 20, 4)]
    assert 1.0 > few[0] > few[1] > few[2]
    assert few[2] < 0.1
    with pytest.raises(ValueError, match="all rows of real are equal"):
        effective_diversity(np.ones((5, 2)), X[:5, :2])


def slow_vendi(distance):
    """Of two samples at a distance in units of the kernel's width."""
    k = np.exp(-(distance**2) / 2)
    share = np.array([1 + k, 1 - k]) / 2
    return np.exp(-np.sum(share * np.log(share)))


def test_quality_report_draws_rows_of_large_sets():
    X, y = make_blobs(2500, centers=4, n_features=3, cluster_std=2.0, random_state=0)
    X /= 20
    source = np.random.default_rng(1).integers(2500, size=2200)
    generated = X[source] + 0.005 * normal(2200, 3)
    report = quality_report(X, generated, source, labels=y)
    assert report.n_generated == report.n_real == 2000
    exact = quality_report(X, generated, source, labels=y, max_samples=None)
    assert (exact.n_generated, exact.n_real) == (2200, 2500)
    assert (exact.precision, exact.recall) == precision_recall(X, generated)
    assert report.copy_ratio == pytest.approx(exact.copy_ratio, rel=0.05)
    assert report.real_nearest_distance == pytest.approx(exact.real_nearest_distance, rel=0.05)
    assert report.label_consistency == pytest.approx(exact.label_consistency, abs=0.01)
    assert report.real_label_consistency == pytest.approx(exact.real_label_consistency, abs=0.01)
    assert report.kernel_distance == pytest.approx(exact.kernel_distance, abs=0.01)
    # A copy of a row that is not drawn is a copy as well, source or not.
    assert quality_report(X, X[source], max_samples=20).nearest_distance == 0.0
    assert quality_report(X, X[source], source, max_samples=20).copy_ratio == 0.0
    assert quality_report(X, generated, max_samples=20) == quality_report(
        X, generated, max_samples=20
    )
    for wrong in (5, 0.5):
        with pytest.raises(ValueError, match="max_samples must be"):
            quality_report(X, generated, max_samples=wrong)


def test_quality_report_has_no_source_among_the_voters():
    # Labels are noise and samples are copies: with its source as its only voter every label
    # would be kept; without it, no more than by chance.
    X, y = normal(300, 3), np.random.default_rng(1).integers(2, size=300)
    assert label_consistency(X, y, X, y, n_neighbors=1) == 1.0
    report = quality_report(X, X, np.arange(300), labels=y, n_neighbors=1)
    assert 0.35 < report.label_consistency < 0.65


def test_quality_report_measures_labels_in_the_embedding(blobs):
    X, y = blobs
    noisy = np.c_[X, 100.0 * normal(120, 1)]
    source = np.arange(120)
    plain = quality_report(noisy, noisy, source, labels=y)
    embedded = quality_report(noisy, noisy, source, labels=y, embed=lambda Z: Z[:, :4])
    assert plain.label_consistency < 0.9
    assert embedded.label_consistency == 1.0
    assert embedded.frechet_distance == plain.frechet_distance


def test_quality_report_of_images_under_an_extractor():
    images = np.random.default_rng(0).integers(255, size=(120, 4, 5, 3))
    y, source = np.arange(120) % 2, np.arange(119, -1, -1)
    features = channel_means(images)
    report = quality_report(images, images[source], source, extractor=channel_means, labels=y)
    assert report == quality_report(features, features[source], source, labels=y)
    assert report.copy_ratio == 0.0
    with pytest.raises(ValueError, match="int row numbers"):
        quality_report(images, images, images, extractor=channel_means)


def test_quality_report_with_tensors_as_embeddings(blobs):
    X, y = blobs
    source = np.arange(50)
    tensors = torch.from_numpy(X).requires_grad_(), torch.from_numpy(X[:50]).requires_grad_()
    found = quality_report(X, X[:50], source, embed=tensors, labels=y)
    assert found == quality_report(X, X[:50], source, embed=(X, X[:50]), labels=y)


def test_quality_report_without_labels_or_sources(blobs):
    X, y = blobs
    report = quality_report(X, X + 0.1, np.arange(120))
    assert report.label_consistency is None
    assert report.real_label_consistency is None
    assert report.copy_ratio > 0.0
    report = quality_report(X, X + 0.1, labels=y)
    assert report.label_consistency is None
    assert report.real_label_consistency == 1.0
    assert report.copy_ratio is None
    assert not report.near_copies
    assert "copy ratio                 -" in str(report)
    with pytest.raises(ValueError, match="a label of its own"):
        quality_report(X, X + 0.1, labels=np.arange(120))
    with pytest.raises(ValueError, match=r"4 real samples .*: give more samples"):
        quality_report(X[:5], X[:5] + 0.1)


def test_quality_report_prints_and_tabulates():
    report = QualityReport(0.9, 0.95, 1.01, 0.8, 0.7, 0.12, 1.5, 1e-5, 100)
    text = str(report)
    assert text.splitlines()[0] == "Quality of 100 generated samples"
    assert len(text.splitlines()) == 10
    assert "held-out real: 0.950" in text
    assert "near-copies!" in text
    assert "1e-05" in text
    frame = report.to_frame()
    assert frame.shape == (1, 13)
    assert frame.loc[0, "copy_ratio"] == 0.12
    assert len(pd.concat([frame, frame])) == 2
    with pytest.raises(AttributeError):
        report.recall = 1.0


# ------------------------------------------------------------------ errors, untouched inputs

PAIRWISE = [
    frechet_distance,
    kernel_distance,
    precision_recall,
    density_coverage,
    spread_ratio,
    lambda real, generated: copy_ratio(real, generated, np.zeros(len(generated), int)),
    lambda real, generated: quality_report(real, generated),
]


@pytest.mark.parametrize("score", PAIRWISE)
def test_pairs_that_do_not_fit_are_refused(score):
    X = normal(20, 3)
    with pytest.raises(ValueError, match="features"):
        score(X, normal(20, 4))
    broken = X.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"NaN"):
        score(X, broken)
    broken[3, 1] = np.inf
    with pytest.raises(ValueError, match="infinity"):
        score(broken, X)
    with pytest.raises(ValueError, match=r"must be a matrix .* flatten images"):
        score(X, normal(20, 2, 2, 3))


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance, spread_ratio])
def test_one_sample_is_too_few(score):
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        score(normal(1, 3), normal(9, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clustering_accuracy([0, 1], [0]), "1 labels for 2 samples"),
        (lambda: clustering_accuracy([], []), "y_true is empty"),
        (lambda: clustering_accuracy([0.0, np.nan], [0, 1]), "missing labels"),
        (lambda: clustering_accuracy(["a", None], [0, 1]), "missing labels"),
        (lambda: clustering_accuracy([0.3, 0.7], [0, 1]), "continuous"),
        (lambda: knn_accuracy(normal(30, 2), np.zeros(29)), "29 labels for 30 samples"),
        (lambda: knn_accuracy(normal(9, 2), np.arange(9) % 2, cv=2), "n_neighbors=10 needs"),
        (lambda: knn_accuracy(normal(9, 2), np.zeros(9), n_neighbors=0), "n_neighbors must"),
        (lambda: linear_svm_accuracy(normal(9, 2), np.arange(9) % 2), "lower cv"),
        (lambda: linear_svm_accuracy(normal(9, 2), np.arange(9) % 2, cv=1), "at least 2"),
        (lambda: precision_recall(normal(5, 2), normal(9, 2)), "only 4 real samples besides"),
        (lambda: density_coverage(normal(5, 2), normal(9, 2)), "only 4 real samples besides"),
        (lambda: precision_recall(normal(9, 2), normal(5, 2)), "only 4 generated samples besides"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), [0, 1, 9]), "0 to 8, got 0 to 9"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), [0, 1, -1]), "0 to 8, got -1 to 1"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), [0, 1]), "inconsistent numbers"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), [0.0, 1.0, 2.0]), "int row numbers"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), normal(3, 2, seed=5)), "not a row of real"),
        (lambda: copy_ratio(normal(9, 2), normal(3, 2), normal(3, 4)), "source has 4 features"),
        (lambda: copy_ratio(np.ones((9, 2)), normal(3, 2), [0, 1, 2]), "two different rows"),
        (lambda: spread_ratio(np.ones((9, 2)), normal(3, 2)), "all rows of real are equal"),
        (lambda: frechet_distance(normal(9, 2), normal(9, 2), labels=[0] * 9), "both labels and"),
        (
            lambda: frechet_distance(
                normal(3, 2), normal(3, 2), labels=[0, 1, 1], generated_labels=[1, 1, 0]
            ),
            "class 0 has 1 real and 1 generated",
        ),
        (
            lambda: kernel_distance(
                normal(2, 2), normal(2, 2), labels=["a", "a"], generated_labels=["a", "b"]
            ),
            r"\['b'\] are in one of them only",
        ),
        (
            lambda: frechet_distance(normal(9, 2), normal(9, 2), extractor=lambda X: X[:1]),
            r"one row of features per sample: it gave shape \(1, 2\) for the 9 samples of real",
        ),
        (lambda: label_consistency(normal(9, 1), ["a"] * 9, [[0.0]], ["x"], 3), r"\['x'\]"),
        (lambda: label_consistency(normal(9, 1), ["a"] * 9, [[0.0]], ["a"]), "only 9 real"),
        (
            lambda: quality_report(
                normal(9, 2), normal(9, 2), labels=[0] * 9, embed=lambda Z: Z[:3]
            ),
            "one row per sample",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_extractor_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"fitted estimator with transform, or a callable, got str"):
        frechet_distance(normal(9, 2), normal(9, 2), extractor="inception")


@pytest.mark.parametrize(
    "name", [n for n in metrics.__all__ if inspect.isroutine(vars(metrics)[n])]
)
def test_help_names_types_in_short(name):
    # Evaluated, the one word ArrayLike is 250 characters.
    assert "_SupportsArray" not in str(inspect.signature(getattr(metrics, name)))


def test_inputs_and_global_randomness_stay_as_they_are(blobs):
    X, y = blobs
    before, state = X.copy(), np.random.get_state()[1].copy()  # noqa: NPY002
    quality_report(X, X, X, labels=y)
    knn_accuracy(X, y)
    kmeans_scores(X, y)
    assert np.array_equal(X, before)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_tables_of_cells_are_refused_by_name():
    adata = pytest.importorskip("anndata").AnnData(np.eye(6, dtype=np.float32))
    for score in (knn_accuracy, linear_svm_accuracy):
        with pytest.raises(TypeError, match=r"is an AnnData: give the matrix .* adata\.obsm"):
            score(adata, [0, 1] * 3)
    with pytest.raises(TypeError, match="is an AnnData"):
        frechet_distance(adata, adata)


def test_an_embedding_scorer_takes_pipelines(blobs):
    X, y = blobs
    model = make_pipeline(StandardScaler(), PCA(2, random_state=0)).fit(X)
    score = metrics.make_embedding_scorer(knn_accuracy)
    assert score(model, X, y) == knn_accuracy(model.transform(X), y)
    project = metrics.make_embedding_scorer(knn_accuracy, method="project")
    with pytest.raises(ValueError, match="PCA has no method 'project'"):
        project(model, X, y)
    em = make_pipeline(StandardScaler(), SelfSupervisedEncoder(max_epochs=1, random_state=0)).fit(X)
    Z = em[-1].project(em[:-1].transform(X))
    assert project(em, X, y) == knn_accuracy(Z, y)


def test_folds_that_keep_groups_together(blobs):
    X, y = blobs
    folds = list(GroupKFold(3).split(X, y, np.arange(len(X)) % 12))
    assert 0 < knn_accuracy(X, y, cv=folds) <= 1


def test_offsets_change_no_distance():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(200, 20)), rng.normal(size=(150, 20))
    offset = np.full(20, 2.0**24)
    moved = real + offset, generated + offset
    real, generated = moved[0] - offset, moved[1] - offset  # what of it such numbers hold
    expected = nearest_training_samples(real, generated)
    for a, b in zip(nearest_training_samples(*moved), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert precision_recall(*moved) == precision_recall(real, generated)
    assert density_coverage(*moved) == density_coverage(real, generated)
    source = np.arange(150)
    assert copy_ratio(moved[0], moved[1], source) == pytest.approx(
        copy_ratio(real, generated, source)
    )
    apart = np.column_stack([real[:, :5] + 6, 1.7e9 + rng.normal(size=200)])
    other = np.column_stack([generated[:, :5], 1.7e9 + rng.normal(size=150)])
    assert precision_recall(apart, other) == (0.0, 0.0)


@pytest.mark.parametrize("value", [0.1, 0.0, 1e9])
def test_spread_of_equal_rows_is_undefined(value):
    with pytest.raises(ValueError, match="all rows of real are equal"):
        spread_ratio(np.full((10, 2), value), np.random.default_rng(0).normal(size=(10, 2)))
