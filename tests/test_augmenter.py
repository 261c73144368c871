"""GenerativeAugmenter: numbers, pairs, checks, provenance, containers, pipelines, resume."""

import tracemalloc
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from diffaugkit import DiffAugEM, EmbeddingConditionedDiffusion, SelfSupervisedEncoder, load
from diffaugkit.augmenter import GenerativeAugmenter
from diffaugkit.embedding_diffusion import interpolate_rows
from diffaugkit.resampling import SharedLabelPairs, count_wanted, cycle, read_targets

imblearn_pipeline = pytest.importorskip("imblearn.pipeline")
imblearn_checks = pytest.importorskip("imblearn.utils.estimator_checks")

# Three epochs teach little: what is asked of the checks is tested where it is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer samples than wanted"),
    pytest.mark.filterwarnings("ignore:Half of the generated samples"),
]


class Halves(TransformerMixin, BaseEstimator):
    """An encoder that learns nothing: the first columns."""

    def fit(self, X, y=None):
        self.n_features_in_ = np.asarray(X).shape[1]
        return self

    def transform(self, X):
        return np.asarray(X)[:, :3].astype(np.float32)


def tiny_diffusion(encoder="tiny", **more):
    if encoder == "tiny":
        encoder = SelfSupervisedEncoder(hidden_sizes=(8,), n_components=4, n_pcs=6, max_epochs=1)
    options = {"width": 8, "n_blocks": 1, "n_pcs": 6, "n_sampling_steps": 2, "max_epochs": 2}
    return EmbeddingConditionedDiffusion(encoder, **{**options, **more})


def tiny(diffusion=None, **more):
    options = {"min_confidence": None, "min_copy_ratio": None, "random_state": 0}
    return GenerativeAugmenter(diffusion or tiny_diffusion(), **{**options, **more})


@pytest.fixture(scope="module")
def data(blobs):
    """Blobs of 40, 20 and 8 rows."""
    X, y = blobs
    rows = np.concatenate([np.flatnonzero(y == c)[:n] for c, n in enumerate((40, 20, 8))])
    return X[rows], np.array(["a", "b", "c"])[y[rows]]


@pytest.fixture(scope="module")
def frozen(data):
    return FrozenEstimator(tiny_diffusion(Halves(), random_state=0).fit(data[0]))


# ---- the checks of scikit-learn and imbalanced-learn ---------------------------------------------


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([tiny(sampling_strategy="auto", min_confidence=0.5)])
def test_check_estimator(estimator, check):
    check(estimator)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("estimator", "check"),
    # A list, where imbalanced-learn's own decorator hands pytest a generator.
    list(imblearn_checks.estimator_checks_generator(tiny(sampling_strategy="auto"))),
    ids=lambda value: getattr(getattr(value, "func", None), "__name__", "tiny"),
)
def test_check_estimator_of_imbalanced_learn(estimator, check):
    check(estimator)


def test_check_estimator_parameters():
    check_param_validation("GenerativeAugmenter", tiny())


# ---- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    ["auto", "all", "minority", "not minority", "not majority", {"b": 30, "c": 9}],
)
def test_wanted_sizes_are_those_of_imbalanced_learn(data, strategy):
    from imblearn.utils import check_sampling_strategy

    y = data[1]
    expected = check_sampling_strategy(strategy, y, "over-sampling")
    found = count_wanted(strategy, read_targets(y))
    assert {name: n for name, n in found.items() if n} == {k: n for k, n in expected.items() if n}
    assert count_wanted(lambda y: {"c": 2 * (y == "c").sum()}, read_targets(y))["c"] == 8
    assert count_wanted(["c"], read_targets(y)) == {"a": 0, "b": 0, "c": 32}
    sizes = (1, 2, 3, 5, 7)
    found = count_wanted(None, read_targets(np.repeat(np.arange(5), sizes)), ratio=0.5)
    assert list(found.values()) == [1, 1, 2, 3, 4]
    two = read_targets(np.where(y == "a", 1, 0))
    assert count_wanted(1.0, two) == {0: 12, 1: 0}


def test_ratio_and_sampling_strategy(data, frozen):
    X, y = data
    model = tiny(frozen, ratio=2)
    X_more, y_more = model.fit_resample(X, y)
    assert model.sampling_strategy_ == {"a": 80, "b": 40, "c": 16}
    assert X_more.shape == (3 * 68, 20)
    np.testing.assert_array_equal(X_more[:68], X)
    np.testing.assert_array_equal(y_more[:68], y)
    np.testing.assert_array_equal(y_more, y[model.sample_indices_])
    balanced = tiny(frozen, sampling_strategy="auto").fit_resample(X, y)[1]
    assert set(np.unique(balanced, return_counts=True)[1]) == {40}
    for strategy, counts in (
        (None, [40, 20, 8]),
        ("auto", [40, 40, 40]),
        ({"c": 10}, [40, 20, 10]),
        ({"a": 5, "c": 3}, [5, 20, 3]),
    ):
        model = tiny(frozen, sampling_strategy=strategy, replace_real=True)
        X_new, y_new = model.fit_resample(X, y)
        assert np.unique(y_new, return_counts=True)[1].tolist() == counts
        assert not (X_new[:, None] == X).all(axis=2).any()
        np.testing.assert_array_equal(y_new, y[model.sample_indices_])


def test_nothing_to_do_gives_the_samples_back(data, frozen):
    X, y = data[0][:40], data[1][:40].copy()
    y[20:] = "b"
    model = tiny(frozen, sampling_strategy="auto")
    np.testing.assert_array_equal(model.fit_resample(X, y)[0], X)
    assert len(model.provenance_) == 0
    assert model.quality_report_ is None


# ---- sources and pairs ---------------------------------------------------------------------------


def test_reconstruction_uses_all_sources_alike(data, frozen):
    model = tiny(frozen, ratio=2.5)
    model.fit_resample(*data)
    uses = np.bincount(model.provenance_["source"])
    assert set(uses) == {2, 3}
    assert (model.provenance_["partner"] == -1).all()
    assert np.bincount(cycle(7, 17, np.random.default_rng(0))).max() == 3


@pytest.mark.parametrize("with_groups", [False, True])
def test_pairs_are_all_that_share_a_label(with_groups):
    rng = np.random.default_rng(0)
    labels = rng.random((23, 3)) < 0.4
    groups = rng.integers(3, size=23) if with_groups else None
    pairs = SharedLabelPairs(labels, groups)
    found = {tuple(sorted(pair)) for pair in pairs[np.arange(len(pairs))].tolist()}
    expected = {
        (i, j)
        for i in range(23)
        for j in range(i + 1, 23)
        if ((labels[i] & labels[j]).any() or not (labels[i].any() or labels[j].any()))
        and (groups is None or groups[i] == groups[j])
    }
    assert len(found) == len(pairs)
    assert found == expected
    drawn = [frozenset(pair) for pair in pairs.draw(2 * len(pairs), rng).tolist()]
    assert len(set(drawn[: len(pairs)])) == len(pairs)


def test_pairs_of_many_label_sets_need_little_memory(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.random((4000, 20)) < 0.3  # nearly each sample has a set of its own
    tracemalloc.start()
    try:
        pairs = SharedLabelPairs(labels)
        ends = pairs.draw(4000, rng)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    first, second = labels[ends[:, 0]], labels[ends[:, 1]]
    assert ((first & second).any(axis=1) | ~(first.any(axis=1) | second.any(axis=1))).all()
    numbers = np.arange(0, len(pairs), 5000)
    # In whatever pieces the kinds are compared.
    whole = pairs[numbers]
    monkeypatch.setattr("diffaugkit.resampling._KIND_PAIRS", 300_000)
    np.testing.assert_array_equal(SharedLabelPairs(labels)[numbers], whole)


def test_interpolation_pairs_labels_and_shares(data, frozen):
    X, y = data
    groups = np.arange(len(X)) % 2
    model = tiny(frozen, strategy="interpolation", alpha=(0.2, 0.7), ratio=3)
    model.fit_resample(X, y, groups=groups)
    table = model.provenance_
    source, partner = table["source"], table["partner"]
    assert (partner >= 0).all()
    assert (y[source] == y[partner]).all()
    assert (groups[source] == groups[partner]).all()
    assert set(table["alpha"].round(6)) == {0.7, 0.8}  # the nearer end is the source
    keys = [frozenset(pair) for pair in zip(source, partner, strict=True)]
    rare = [key for key in keys if y[min(key)] == "c"]  # 24 wanted, 12 pairs within the groups
    assert sorted({rare.count(key) for key in rare}) == [2]
    common = [key for key in keys if y[min(key)] == "a"]
    assert len(set(common)) == len(common)


def test_a_class_without_pairs_is_reconstructed(data, frozen):
    X, y = data
    y = y.copy()
    y[0] = "d"
    model = tiny(frozen, strategy="interpolation", ratio=2)
    model.fit_resample(X, y)
    alone = model.provenance_[model.provenance_["source"] == 0]
    assert len(alone) == 2
    assert (alone["partner"] == -1).all()
    assert (alone["alpha"] == 1).all()


def test_multilabel_targets(data, frozen):
    X, _ = data
    Y = np.random.default_rng(0).integers(2, size=(len(X), 3))
    model = tiny(frozen, strategy="interpolation", ratio=2)
    X_more, Y_more = model.fit_resample(X, Y)
    assert X_more.shape[0] == Y_more.shape[0] == 3 * len(X)
    np.testing.assert_array_equal(Y_more, Y[model.sample_indices_])
    first, second = Y[model.provenance_["source"]], Y[model.provenance_["partner"]]
    assert ((first & second).any(axis=1) | ~(first | second).any(axis=1)).all()
    assert model.sampling_strategy_ == {"all": 2 * len(X)}
    assert ((model.provenance_["confidence"] >= 0) & (model.provenance_["confidence"] <= 1)).all()
    with pytest.raises(ValueError, match="Multilabel"):
        tiny(frozen, sampling_strategy="auto").fit_resample(X, Y)
    # One label in each row: classes.
    Y = np.eye(3, dtype=int)[np.unique(data[1], return_inverse=True)[1]]
    model = tiny(frozen, sampling_strategy="auto")
    assert (model.fit_resample(X, Y)[1].sum(axis=0) == 40).all()
    table = pd.DataFrame(Y).add_prefix("label_").astype("boolean")
    assert (model.fit_resample(X, table)[1].sum(axis=0) == 40).all()


# ---- provenance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["reconstruction", "interpolation"])
def test_provenance_makes_the_samples_again(data, frozen, strategy):
    X, y = data
    model = tiny(frozen, strategy=strategy, ratio=1)
    X_more, _ = model.fit_resample(X, y)
    table, diffusion = model.provenance_, frozen.estimator
    embeddings = diffusion.transform(X)
    cond = embeddings[table["source"]]
    if strategy == "interpolation":
        ends = embeddings[table["source"]], embeddings[table["partner"]]
        cond = interpolate_rows(*ends, table["alpha"].to_numpy(), "lerp")
    assert table["seed"].nunique() == 1
    order = np.argsort(table["row"])
    again = diffusion.sample(cond[order], random_state=int(table["seed"][0]))
    np.testing.assert_allclose(X_more[len(X) :][order], again, atol=1e-6)
    # Noise belongs to the row, whatever the number of rows.
    few = diffusion.sample(cond[order][:3], random_state=int(table["seed"][0]))
    np.testing.assert_array_equal(few, again[:3])
    np.testing.assert_array_equal(model.resample(X, y)[0], X_more)


# ---- the checks of what is generated -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({}, {"a": 80, "b": 40, "c": 16}),
        ({"sampling_strategy": "auto"}, {"a": 40, "b": 40, "c": 40}),
        (
            {"sampling_strategy": {"b": 30, "c": 70}, "replace_real": True},
            {"a": 40, "b": 30, "c": 70},
        ),
    ],
)
def test_confidence_against_a_plain_vote(data, frozen, options, after):
    X, y = data
    model = tiny(frozen, n_neighbors=4, **options)
    X_more, y_more = model.fit_resample(X, y)
    assert {name: (y_more == name).sum() for name in after} == after
    features = frozen.estimator.transform(X).astype(np.float64)
    weights = np.array([after[name] / (y == name).sum() for name in y])
    made = frozen.estimator.transform(X_more[-len(model.provenance_) :])
    for spot, row in zip(made, model.provenance_.itertuples(), strict=True):
        others = np.delete(np.arange(len(X)), row.source)
        distance = np.linalg.norm(features[others] - spot, axis=1)
        voters = others[np.argsort(distance)[:4]]
        votes, right = weights[voters], y[voters] == y[row.source]
        assert row.confidence == votes[right].sum() / votes.sum()


def test_a_rare_class_is_not_outvoted_for_its_rarity():
    # Two classes in one place, 600 and 60 rows: nine of ten neighbours are of the larger.
    X = np.random.default_rng(0).normal(size=(660, 4))
    y = np.repeat([0, 1], (600, 60))
    diffusion = FrozenEstimator(tiny_diffusion(Halves(), random_state=0).fit(X))
    # A third of the places has none of the smaller near, and nothing can speak for it there.
    balanced = GenerativeAugmenter(diffusion, sampling_strategy="auto", random_state=0)
    assert (balanced.fit_resample(X, y)[1] == 1).sum() > 580
    # Where they stay as many to one, they stay in doubt.
    doubled = GenerativeAugmenter(diffusion, random_state=0, max_attempts=1)
    with pytest.warns(ConvergenceWarning, match="fewer samples"):
        assert (doubled.fit_resample(X, y)[1] == 1).sum() < 80


def test_copy_ratio_against_all_distances(data, frozen):
    X, y = data
    X = np.vstack([X, X[:5]])  # equal rows are one
    y = np.append(y, y[:5])
    model = tiny(frozen)
    X_more, _ = model.fit_resample(X, y)
    space = frozen.estimator._space_of()
    axes = np.asarray(space.components)
    real = (X - space.mean) @ axes.T
    made = (X_more[len(X) :] - space.mean) @ axes.T
    distance = np.linalg.norm(made[:, None] - real[:68], axis=2)
    nearest = np.sort(distance, axis=1)
    expected = nearest[:, 0] / nearest[:, 1]
    np.testing.assert_allclose(model.provenance_["copy_ratio"], expected, rtol=1e-3)


def test_gates_replace_what_they_drop(data, frozen):
    X, y = data
    loose = tiny(frozen)
    loose.fit_resample(X, y)
    limit = float(loose.provenance_["confidence"].median())
    strict = tiny(frozen, min_confidence=limit, max_attempts=20).fit(X)
    X_more, _ = strict.resample(X, y)
    assert (strict.provenance_["confidence"] >= limit).all()
    assert strict.selection_["candidates"].sum() > loose.selection_["candidates"].sum()
    table = strict.selection_
    assert (
        table["candidates"] == table["low_confidence"] + table["copies"] + table["accepted"]
    ).all()
    assert (table["accepted"] <= table["wanted"]).all()
    assert len(X_more) == len(X) + table["accepted"].sum()
    with pytest.warns(ConvergenceWarning, match="'b': 0 of 20") as caught:
        tiny(frozen, min_copy_ratio=1.0, max_attempts=2).fit_resample(X, y)
    assert caught[0].filename == __file__  # the caller's own line


def test_copies_are_dropped_and_near_copies_warned_of(data):
    X, y = data
    diffusion = FrozenEstimator(tiny_diffusion(None, n_timesteps=1000).fit(X))
    # Almost no noise on top of the source: all copies.
    options = {"strength": 0.002, "max_attempts": 1}
    with pytest.warns(UserWarning, match="near-copies"):
        tiny(diffusion, **options).fit_resample(X, y)
    model = tiny(diffusion, min_copy_ratio=0.2, **options)
    with pytest.warns(ConvergenceWarning, match="copies"):
        X_more, _ = model.fit_resample(X, y)
    assert (model.provenance_["copy_ratio"] >= 0.2).all()
    assert model.selection_["copies"].sum() + len(X_more) == 2 * len(X)


def test_quality_report(data, frozen):
    model = tiny(frozen).fit(data[0])
    with pytest.raises(NotFittedError):
        model.quality_report_  # noqa: B018
    model.resample(*data)
    report = model.quality_report_
    assert report.n_generated == report.n_real == 68
    assert 0 <= report.label_consistency <= 1
    assert np.isfinite([report.copy_ratio, report.frechet_distance]).all()


def test_many_classes_are_not_warned_of(data, frozen):
    X, _ = data
    y = np.r_[np.arange(48), np.arange(20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny(frozen)
        model.fit_resample(X, y)
    assert model.quality_report_ is not None
    assert not [w for w in caught if "unique classes" in str(w.message)]


def test_quality_report_of_few_samples_from_many_rows():
    X, y = make_blobs(5_000, n_features=4, centers=2, random_state=0)
    frozen = FrozenEstimator(EmbeddingConditionedDiffusion(PCA(2), width=8, max_epochs=1).fit(X))
    made = {0: int(np.sum(y == 0)) + 30, 1: int(np.sum(y == 1))}
    model = tiny(frozen, sampling_strategy=made, min_confidence=None, min_copy_ratio=None)
    model.fit_resample(X, y)
    report = model.quality_report_
    assert (report.n_generated, report.n_real) == (30, 2_000)


def test_a_frozen_generator_of_images_reads_flattened_ones():
    X = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    y = np.arange(24) % 2
    generator = EmbeddingConditionedDiffusion(None, max_epochs=1, n_sampling_steps=2).fit(X)
    ungated = {"strength": 0.5, "min_confidence": None, "min_copy_ratio": None}
    model = tiny(FrozenEstimator(generator), **ungated)
    expected, _ = model.fit_resample(X, y)
    model.set_params(image_shape=(8, 8, -1))
    found, _ = model.fit_resample(X.reshape(24, -1), y)
    np.testing.assert_array_equal(found, expected.reshape(len(expected), -1))


def test_generated_rows_keep_their_label_on_easy_data(blobs):
    X, y = blobs
    rows = np.concatenate([np.flatnonzero(y == c)[:n] for c, n in enumerate((80, 80, 9))])
    X, y = X[rows], y[rows]
    encoder = PCA(2, random_state=0)
    diffusion = EmbeddingConditionedDiffusion(encoder, width=64, n_pcs=5, max_epochs=150)
    model = GenerativeAugmenter(diffusion, sampling_strategy="auto", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X_more, y_more = model.fit_resample(X, y)
    made, labels = X_more[len(X) :], y_more[len(X) :]
    assert len(made) == 71
    assert KNeighborsClassifier(5).fit(X, y).score(made, labels) > 0.95
    assert model.quality_report_.label_consistency > 0.9


# ---- containers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:X has feature names")
def test_containers_come_back_as_they_were(data, frozen):
    X, y = data
    expected, labels = tiny(frozen).fit_resample(X, y)
    frame = pd.DataFrame(X, index=[f"r{i}" for i in range(len(X))])
    frame.columns = [f"g{i}" for i in range(20)]
    X_more, y_more = tiny(frozen).fit_resample(frame, pd.Series(y, name="type"))
    assert X_more.columns.tolist() == frame.columns.tolist()
    assert (X_more.dtypes == np.float32).all()
    assert y_more.name == "type"
    np.testing.assert_allclose(X_more.to_numpy(), expected)
    np.testing.assert_array_equal(y_more, labels)
    for kind in (sp.csr_matrix, sp.csc_array):
        X_more, _ = tiny(frozen).fit_resample(kind(X), y)
        assert type(X_more) is kind
        np.testing.assert_allclose(X_more.toarray(), expected, atol=1e-5)
    X_more, y_more = tiny(frozen).fit_resample(torch.from_numpy(X), torch.arange(len(X)) % 2)
    assert isinstance(X_more, torch.Tensor)
    assert isinstance(y_more, torch.Tensor)
    assert X_more.shape == expected.shape
    whole = (10 * X).astype(int)
    assert tiny(frozen).fit_resample(whole, y)[0].dtype == np.float64
    assert tiny(frozen).fit_resample(whole, y.tolist())[1] == labels.tolist()


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize("replace_real", [False, True])
@pytest.mark.parametrize("dtype", [bool, "boolean", pd.SparseDtype(bool)], ids=str)
def test_columns_of_a_table_stay_numbers(data, frozen, dtype, replace_real):
    X, y = data
    frame = pd.DataFrame(X).add_prefix("g")
    frame["g0"] = (X[:, 0] > 0).astype(int)
    frame["g1"] = pd.Series(X[:, 1] > 0).astype(dtype)
    model = tiny(frozen, replace_real=replace_real)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        X_more, _ = model.fit_resample(frame, y)
    assert X_more.columns.tolist() == frame.columns.tolist()
    assert X_more.dtypes["g1"] == (pd.SparseDtype("f4", 0) if "Sparse" in str(dtype) else "f4")
    assert {X_more[name].dtype.kind for name in frame} == {"f"}
    if not replace_real:
        np.testing.assert_allclose(X_more[: len(X)].astype(float), frame.astype(float))


def test_cells(data, tmp_path):
    X, y = data
    cells = ad.AnnData(sp.csr_matrix(X), obs=pd.DataFrame({"type": y}, index=map(str, range(68))))
    cells.var_names = [f"g{i}" for i in range(20)]
    model = tiny(sampling_strategy="auto")
    more, y_more = model.fit_resample(cells, cells.obs["type"])
    assert isinstance(more, ad.AnnData)
    assert sp.issparse(more.X)
    assert more.shape == (120, 20)
    assert more.obs_names.is_unique
    assert more.obs["generated"].sum() == 52
    np.testing.assert_array_equal(more.obs["type"], y_more)
    np.testing.assert_array_equal(more.var_names, cells.var_names)
    np.testing.assert_array_equal(more.X[:68].toarray(), X)
    again, _ = tiny(ratio=0.5).fit_resample(more, y_more)
    assert again.obs_names.is_unique
    assert again.obs["generated"].tolist() == [False] * 68 + [True] * (len(again) - 68)
    # A frozen model finds its genes by name; the others are left out.
    diffusion = FrozenEstimator(tiny_diffusion().fit(cells[:, ::-2]))
    more, _ = tiny(diffusion).fit_resample(cells, y)
    assert more.var_names.tolist() == cells.var_names[::-2].tolist()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for part in (backed, backed[np.arange(68)]):
        of_disk, _ = tiny(diffusion).fit_resample(part, y)
        np.testing.assert_allclose(of_disk.X.toarray(), more.X.toarray(), atol=1e-5)
    layered = ad.AnnData(np.zeros_like(X), layers={"scaled": X}, obs=cells.obs)
    more, _ = tiny(tiny_diffusion(layer="scaled")).fit_resample(layered, y)
    assert np.abs(more.layers["scaled"][68:]).min(axis=1).max() > 0
    np.testing.assert_array_equal(more.layers["scaled"][:68], X)
    assert more.X is None  # of generated cells there are no other values
    with pytest.raises(ValueError, match="raw counts"):
        tiny().fit_resample(sp.csr_matrix(np.arange(1360).reshape(68, 20)), y)


IMAGE = {"block_out_channels": (8, 8), "max_epochs": 1, "n_sampling_steps": 2}


class Corners(TransformerMixin, BaseEstimator):
    """An encoder of images that learns nothing: some of the pixels."""

    def fit(self, X, y=None):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def transform(self, X):
        flat = np.asarray(X).reshape(len(X), -1)
        return (flat[:, ::7] / 255).astype(np.float32)


@pytest.mark.parametrize("kind", ["grey", "channels_last", "tensor", "flat", "pictures"])
def test_images(kind):
    digits = load_digits()
    X, y = (digits.images[:30] * 15).astype(np.uint8), digits.target[:30] % 3
    forms = {
        "grey": X,
        "channels_last": X[..., None],
        "tensor": torch.from_numpy(X[:, None]),
        "flat": X.reshape(30, 64),
    }
    if kind == "pictures":
        from PIL import Image

        forms["pictures"] = [Image.fromarray(image) for image in X]
    given = forms[kind]
    shape = (8, 8, 1) if kind == "flat" else None
    diffusion = tiny_diffusion(Corners(), n_pcs=50, image_shape=shape)
    for name, value in IMAGE.items():
        diffusion.set_params(**{name: value})
    model = tiny(diffusion, strategy="interpolation")
    X_more, y_more = model.fit_resample(given, y)
    array = np.asarray(X_more)
    assert array.dtype == np.uint8
    assert len(array) == len(y_more) == 60
    if kind != "pictures":
        assert type(X_more) is type(given)
        assert X_more.shape[1:] == given.shape[1:]
    np.testing.assert_array_equal(array[:30].reshape(30, 64), X.reshape(30, 64))
    if kind == "grey":
        # A frozen model gives images in the form of those that it is asked to augment.
        frozen = FrozenEstimator(model.diffusion_)
        floats, _ = tiny(frozen, strategy="interpolation").fit_resample(X[..., None] / 255.0, y)
        assert floats.dtype == np.float64
        assert floats.shape == (60, 8, 8, 1)
        assert 0 <= floats.min() <= floats.max() <= 1
        assert floats[30:].max() > 0.1


# ---- pipelines, frozen models, resume, saving ----------------------------------------------------


def test_only_training_folds_are_augmented(blobs):
    X, y = blobs[0][::3], blobs[1][::3]
    fitted, scored = [], []

    class Model(LogisticRegression):
        def fit(self, X, y):
            fitted.append(len(X))
            return super().fit(X, y)

        def score(self, X, y):
            scored.append(len(X))
            return super().score(X, y)

    frozen = FrozenEstimator(tiny_diffusion(Halves(), random_state=0).fit(X))
    for step in (tiny(frozen, ratio=2), tiny(ratio=2)):
        fitted.clear()
        scored.clear()
        pipeline = imblearn_pipeline.make_pipeline(step, Model(max_iter=500))
        scores = cross_val_score(pipeline, X, y, cv=4)
        assert scored == [20] * 4
        assert fitted == [180] * 4
        assert scores.min() > 0.8
    assert not hasattr(GenerativeAugmenter, "transform")


def test_groups_are_routed_to_resampling_alone(frozen):
    # A pipeline calls for a request of each method that could take them.
    with config_context(enable_metadata_routing=True):
        assert "groups" not in tiny(frozen).get_metadata_routing().fit.requests


def test_a_frozen_model_stays_as_it_is(data, frozen):
    X, y = data
    before = {k: v.clone() for k, v in frozen.estimator.module_.state_dict().items()}
    model = clone(tiny(frozen))
    model.fit_resample(X[::2], y[::2])
    assert model.diffusion_.estimator.n_features_in_ == model.n_features_in_ == 20
    after = model.diffusion_.estimator.module_.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_same_seed_same_samples(data):
    first, again = (tiny().fit_resample(*data)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = tiny(random_state=1).fit_resample(*data)[0]
    assert not np.array_equal(first, other)
    # The generator may learn from other samples than those it augments, and needs no labels.
    model = tiny().fit(data[0])
    np.testing.assert_array_equal(model.resample(*data)[0], first)
    assert len(model.resample(data[0][:50], data[1][:50])[0]) == 100


def test_a_killed_fit_goes_on(data, tmp_path):
    expected = tiny().fit_resample(*data)[0]
    calls = []

    def kill(epoch, history):
        calls.append(epoch)
        if len(calls) == 1:
            raise KeyboardInterrupt

    model = tiny(checkpoint_dir=tmp_path, callbacks=kill)
    with pytest.raises(KeyboardInterrupt):
        model.fit_resample(*data)
    assert not hasattr(model, "diffusion_")
    model.set_params(callbacks=None)
    np.testing.assert_array_equal(model.fit_resample(*data)[0], expected)


def test_epochs_reach_the_automatic_parts(data):
    model = tiny(max_epochs=2)
    model.set_params(diffusion="auto").fit(data[0])
    assert model.diffusion_.n_iter_ == model.diffusion_.encoder_.n_iter_ == 2


def test_save_and_load(data, tmp_path):
    model = tiny(sampling_strategy={"c": 12})
    expected = model.fit_resample(*data)[0]
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.sampling_strategy_ == model.sampling_strategy_
    pd.testing.assert_frame_equal(again.provenance_, model.provenance_)
    pd.testing.assert_frame_equal(again.selection_, model.selection_)
    assert again.quality_report_ == model.quality_report_
    np.testing.assert_array_equal(again.resample(*data)[0], expected)


# ---- refusals ------------------------------------------------------------------------------------


def test_what_is_refused(data, frozen):
    X, y = data
    refused = [
        (tiny(frozen), (X, None), "target y is None"),
        (tiny(frozen), (X, X[:, 0]), "Unknown label type|continuous"),
        (tiny(frozen), (X, y[:-1]), "inconsistent"),
        (tiny(frozen, sampling_strategy="auto"), (X, np.zeros(len(X))), "one class"),
        (tiny(frozen, sampling_strategy={"z": 9}), (X, y), "not in y"),
        (tiny(frozen, sampling_strategy={"a": 9}), (X, y), "only adds"),
        (tiny(frozen, sampling_strategy={"a": -1}, replace_real=True), (X, y), "only adds"),
        (tiny(frozen, sampling_strategy=0.5), (X, y), "two classes"),
        (tiny(frozen, strategy="interpolation", alpha=(0.5, 2)), (X, y), "alpha"),
        (tiny(frozen), (X[:, :7], y), "features"),
        (tiny(frozen), (np.full_like(X, np.nan), y), "NaN"),
        (tiny(FrozenEstimator(tiny_diffusion(None).fit(X))), (X, y), "unconditional"),
        (
            tiny(FrozenEstimator(tiny_diffusion().fit(X, embeddings=X[:, :3]))),
            (X, y),
            "no encoder of its own",
        ),
    ]
    for model, given, message in refused:
        with pytest.raises(ValueError, match=message):
            model.fit_resample(*given)
    with pytest.raises(TypeError, match="EmbeddingConditionedDiffusion"):
        tiny(Generator()).fit_resample(X, y)
    with pytest.raises(NotFittedError):
        tiny().resample(X, y)
    with pytest.raises(ValueError, match="inconsistent"):
        tiny(frozen).fit_resample(X, y, groups=[1, 2])


@pytest.mark.parametrize(
    "container",
    [
        list,
        tuple,
        lambda values: np.array(values, dtype=object),
        pd.Categorical,
        lambda values: pd.Series(values, dtype="string"),
        lambda values: pd.DataFrame({"label": values}),
    ],
    ids=["list", "tuple", "array", "categorical", "string", "frame"],
)
@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_missing_labels_and_groups_are_named(data, frozen, container, missing):
    X, y = data
    labels = container([missing if row in (4, 41) else label for row, label in enumerate(y)])
    message = r"y has missing labels \(NaN or None\) in rows 4, 41: drop those samples"
    with pytest.raises(ValueError, match=message):
        tiny(frozen).fit_resample(X, labels)
    groups = container([missing, "a", "b", missing])
    with pytest.raises(ValueError, match=r"groups has missing values .* in rows 0, 3: name them"):
        SharedLabelPairs(np.ones((4, 1), dtype=bool), groups)
    groups = np.array([missing, *"ab" * 33, "a"], dtype=object)
    with pytest.raises(ValueError, match=r"groups has missing values .* in rows 0: name them"):
        tiny(frozen, strategy="interpolation").fit_resample(X, y, groups=groups)


def test_missing_indicators_are_named():
    with pytest.raises(ValueError, match=r"y has missing labels .* in rows 1:"):
        read_targets([[1, 0], [np.nan, 1], [1, 1]])
    with pytest.raises(ValueError, match="infinity"):
        read_targets([1.0, np.inf])


def test_unfitted_parts_are_named(data):
    with pytest.raises(NotFittedError, match="This EmbeddingConditionedDiffusion instance"):
        tiny(FrozenEstimator(tiny_diffusion())).fit_resample(*data)


def test_image_shape_reaches_the_diffusion():
    X = (load_digits().images[:20] * 15).astype(np.uint8)
    flat, shape = X.reshape(20, 64), (8, 8, 1)
    diffusion = tiny_diffusion(None, **IMAGE)
    model = tiny(diffusion, image_shape=shape, strength=0.5).fit(flat)
    assert model.diffusion_.image_shape_ == shape
    assert diffusion.image_shape is None
    assert model.resample(flat, np.arange(20) % 2)[0].shape == (40, 64)
    tiny(diffusion.set_params(image_shape=list(shape)), image_shape=shape).fit(flat)
    with pytest.raises(
        ValueError, match=r"image_shape=\(4, 16, 1\), but .*image_shape=\[8, 8, 1\]"
    ):
        tiny(diffusion, image_shape=(4, 16, 1)).fit(flat)
    frozen = FrozenEstimator(model.diffusion_)
    assert tiny(frozen, image_shape=shape).fit(flat).diffusion_ is frozen
    with pytest.raises(ValueError, match="image_shape"):
        tiny(frozen, image_shape=(4, 16, 1)).fit(flat)
    vectors = FrozenEstimator(tiny_diffusion(None).fit(flat / 255))
    with pytest.raises(ValueError, match="the diffusion model has vectors"):
        tiny(vectors, image_shape=shape).fit(flat / 255)


class Generator(BaseEstimator):
    """Something that generates, but under no embedding."""

    def fit(self, X, y=None):
        return self

    def sample(self, n=1):
        return np.zeros((n, 2))


@pytest.mark.parametrize(
    ("options", "y", "groups", "message"),
    [
        ({}, 59, None, "inconsistent numbers of samples"),
        ({}, 60, np.zeros(59), "groups"),
        ({}, 60, [None] * 60, "groups"),
        ({"alpha": (0.5, 1.5)}, 60, None, r"alpha=\(0\.5, 1\.5\)"),
        ({"strategy": "interpolation", "diffusion__encoder": None}, 60, None, "with an encoder"),
        ({"strength": 1.0, "diffusion__encoder": None}, 60, None, "unconditional"),
    ],
)
def test_what_cannot_be_used_is_refused_before_training(data, options, y, groups, message):
    epochs = []
    augmenter = tiny(tiny_diffusion()).set_params(callbacks=lambda *_: epochs.append(1), **options)
    with pytest.raises(ValueError, match=message):
        augmenter.fit_resample(data[0][:60], data[1][:y], groups=groups)
    assert not epochs


def test_a_series_of_paths_comes_back_as_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for path, values in zip(paths, pixels, strict=True):
        image.fromarray(values).save(path)
    table = pd.DataFrame({"path": list(map(str, paths)), "y": np.arange(12) % 2})
    options = {"block_out_channels": (8, 8), "max_epochs": 1, "n_sampling_steps": 2}
    diffusion = EmbeddingConditionedDiffusion(None, **options)
    X, y = tiny(diffusion, strength=0.5).fit_resample(table["path"], table["y"])
    assert X.shape == (24, 8, 8, 3)
    assert X.dtype == np.uint8
    np.testing.assert_array_equal(X[:12], pixels)
    assert isinstance(y, pd.Series)


@pytest.mark.parametrize(
    ("marks", "earlier"),
    [
        (["False", "True"] * 30, [False, True] * 30),  # as a file of text has them
        (pd.array([None, True] * 30, dtype="boolean"), [False, True] * 30),  # of a concatenation
        ([np.nan, True] * 30, [False, True] * 30),
        (["yes", "no"] * 30, [False] * 60),  # the caller's own
    ],
)
def test_marks_of_generated_cells(data, frozen, marks, earlier):
    X, y = data[0][:60], data[1][:60]
    cells = ad.AnnData(X.copy())
    cells.obs["generated"] = marks
    labels = pd.Series(y, index=cells.obs_names)
    out, targets = tiny(frozen).fit_resample(cells, labels)
    assert out.obs["generated"].dtype == bool
    assert out.obs["generated"][:60].tolist() == earlier
    assert out.obs["generated"][60:].all()
    assert ("generated_before" in out.obs) != any(earlier)
    assert targets.index.equals(out.obs_names)  # so that it may become a column of obs


def test_repeated_names_of_genes_that_are_not_used(data, frozen):
    X, y = data[0][:60], data[1][:60]
    generator = tiny_diffusion().set_params(max_epochs=1)
    named = pd.DataFrame(X, columns=[f"g{i}" for i in range(X.shape[1])])
    generator.fit(named)
    more = ad.AnnData(np.hstack([np.ones((60, 2), X.dtype), X]))
    more.var_names = ["a", "a", *named.columns]
    out, _ = tiny(FrozenEstimator(generator)).fit_resample(more, y)
    assert out.var_names.tolist() == named.columns.tolist()
    np.testing.assert_array_equal(out.X[:60], X)


def test_a_fitted_em_generates(data, tmp_path):
    X, y = data[0][:60], data[1][:60]
    parts = {
        "encoder": SelfSupervisedEncoder(hidden_sizes=(8,), n_components=4),
        "schedule": (1, 1, 1),
    }
    em = DiffAugEM(diffusion=tiny_diffusion(), random_state=0, **parts).fit(X)
    augmenter = tiny(FrozenEstimator(em), min_confidence=None, min_copy_ratio=None)
    out, _ = augmenter.fit_resample(X, y)
    source = augmenter.provenance_["source"].to_numpy()
    again = em.diffusion_.sample(
        em.condition_encoder_.transform(X)[source], random_state=augmenter.provenance_["seed"][0]
    )
    np.testing.assert_allclose(out[60:], again, rtol=1e-5, atol=1e-5)
    assert em.diffusion_.encoder_ is None  # left as it was
    augmenter.save(tmp_path / "model")
    np.testing.assert_array_equal(load(tmp_path / "model").resample(X, y)[0], out)
    with pytest.raises(TypeError, match=r"DiffAugEM cannot generate for labels: .*FrozenEstimator"):
        tiny(DiffAugEM(**parts)).fit_resample(X, y)
    random = DiffAugEM(diffusion=tiny_diffusion(), condition="random", **parts).fit(X)
    with pytest.raises(ValueError, match="condition='embedding' and an M-step only"):
        tiny(FrozenEstimator(random)).fit_resample(X, y)
