"""SelfSupervisedEncoder: what it learns, positives, warm start, and its own parameters."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV

from diffaugkit import SelfSupervisedEncoder, load, objectives
from diffaugkit.metrics import kmeans_scores, knn_accuracy, linear_svm_accuracy
from diffaugkit.persistence import ModelFileError
from diffaugkit.rows import DenseRows

TINY = {"hidden_sizes": (16,), "n_components": 5, "n_pcs": 6, "max_epochs": 2, "random_state": 0}


def tiny(**more):
    return SelfSupervisedEncoder(**{**TINY, **more})


# ---- what it learns ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X / 16.0).astype(np.float32)[:1000], y[:1000]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dropout", "least"), [("scl", "auto", 0.8), ("simclr", 0, 0.6)])
def test_digits_are_told_apart_without_labels(digits, method, dropout, least):
    X, y = digits
    encoder = SelfSupervisedEncoder(
        method,
        hidden_sizes=(128,),
        dropout=dropout,
        max_epochs=40,
        batch_size=200,
        random_state=0,
    )
    y_space = encoder.fit(X).transform(X)
    assert knn_accuracy(y_space, y) >= 0.9
    assert encoder.score(X, y) == knn_accuracy(y_space, y)
    # In two dimensions simclr has a circle only, and PCA no more than 0.6.
    assert encoder.project(X).shape == (1000, 2)
    assert knn_accuracy(encoder.project(X), y) >= least
    assert knn_accuracy(PCA(2, random_state=0).fit_transform(X), y) < 0.65
    loss = encoder.history_["loss"].to_numpy()
    assert loss[-5:].mean() < loss[:5].mean()


def test_blobs_come_out_as_clusters(blobs):
    X, labels = blobs
    encoder = tiny(max_epochs=20, batch_size=80).fit(X)
    for space in (encoder.transform(X), encoder.project(X)):
        assert knn_accuracy(space, labels) >= 0.98
        assert kmeans_scores(space, labels)["ari"] >= 0.95
    assert adjusted_rand_score(labels, encoder.project(X)[:, 0] > 0) < 1


def test_few_rows_of_many_features_stay_apart_by_a_plane():
    """What PCA tells apart must not be lost where the neighbours of a row are of other kinds."""
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=120)
    shared = rng.normal(size=(120, 15)) @ rng.normal(scale=0.4, size=(15, 200))
    marks = np.where(rng.random((3, 200)) < 0.12, rng.normal(scale=1.3, size=(3, 200)), 0)[y]
    X = shared + marks + rng.normal(scale=0.4, size=(120, 200))
    embedding = SelfSupervisedEncoder(random_state=0).fit(X).transform(X)
    of_components = linear_svm_accuracy(PCA(20, random_state=0).fit_transform(X), y)
    assert linear_svm_accuracy(embedding, y) >= of_components - 0.05 >= 0.9


def test_new_rows_fall_where_their_kind_is(blobs):
    X, labels = blobs
    encoder = tiny(max_epochs=20, batch_size=80).fit(X[::2])
    near = ((encoder.transform(X[1::2])[:, None] - encoder.transform(X[::2])) ** 2).sum(-1)
    assert np.mean(labels[::2][near.argmin(1)] == labels[1::2]) >= 0.98


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "t"},
        {"kernel": "squared_t"},
        {"kernel": "unit_t"},
        {"target": "pair", "beta": 0.5},
        {"target": "own_view"},
        {"contrast": "softmax"},
        {"contrast": "softmax", "embedding_weight": 0.0},
        {"contrast": "pairwise", "repulsion": 0.3},
        {"contrast": "pairwise", "kernel": "squared_t", "target": "pair"},
        {"detach_target": True},
        {"method": "simclr", "temperature": 0.2},
        {"method": "scl"},
        {"backbone": "mlp"},
        {"skip": False},
        {"skip": True},
        {"dropout": 0.2},
        {"n_pcs": None},
        {"n_pcs": 1000},
        {"n_components": 1, "n_projections": 3},
        {"hidden_sizes": ()},
        {"hidden_sizes": [8, 4]},
        {"n_neighbors": 3},
        {"nu": 5.0, "nu_projection": 0.1},
        {"weight_decay": 0.1},
        {"batch_size": 7},
        {"batch_size": 10_000},
        {"precision": "bf16"},
        {"learning_rate": 1e-2},
        {"verbose": 1},
        {"callbacks": [lambda epoch, history: None]},
    ],
    ids="-".join,
)
def test_every_option_is_used(blobs, options):
    X = blobs[0]
    encoder = tiny(**options).fit(X)
    y, z = encoder.transform(X), encoder.project(X)
    assert y.shape == (240, options.get("n_components", 5))
    assert z.shape == (240, options.get("n_projections", 2))
    assert np.isfinite(y).all()
    assert np.isfinite(z).all()
    silent = {"verbose", "callbacks", "backbone"} & set(options)
    defaults = SelfSupervisedEncoder(n_components=50).get_params()
    if not silent and any(defaults[k] != v for k, v in options.items()):
        assert options["batch_size"] > 240 if options.get("batch_size", 0) > 240 else True
        if options not in ({"method": "scl"}, {"batch_size": 10_000}):
            base = tiny().fit(X)
            assert y.shape != base.transform(X).shape or not np.array_equal(y, base.transform(X))


def test_search_of_neighbours_shows_its_progress(blobs, capfd):
    tiny(verbose=1).fit(blobs[0])
    assert "neighbors" in capfd.readouterr().err
    tiny(verbose=0).fit(blobs[0])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("n", "asked", "dropout"),
    [(60, "auto", 0.5), (2_000, "auto", 0.25), (2_600, "auto", 0), (60, 0.3, 0.3), (60, 0, 0)],
)
def test_few_rows_are_learned_with_dropout(n, asked, dropout):
    X = np.random.default_rng(0).normal(size=(n, 6))
    encoder = tiny(dropout=asked, max_epochs=1, hidden_sizes=(8, 8)).fit(X)
    layers = [module for module in encoder.module_.modules() if "Drop" in type(module).__name__]
    assert [layer.p for layer in layers] == [dropout] * 2 * (dropout > 0)
    np.testing.assert_array_equal(encoder.transform(X[:5]), encoder.transform(X[:5]))


def test_auto_neighbours_fit_small_data(blobs):
    assert tiny().fit(blobs[0][:4]).transform(blobs[0]).shape == (240, 5)


@pytest.mark.parametrize("n_pcs", [6, None])
def test_input_of_the_network_has_unit_scale_and_keeps_directions(blobs, n_pcs):
    X = blobs[0] * 100 + 5
    encoder = tiny(n_pcs=n_pcs).fit(X)
    inputs = np.asarray(encoder._network_input(DenseRows(X)))
    expected = (X - X.mean(0)) @ (np.eye(20) if n_pcs is None else encoder.components_.T)
    np.testing.assert_allclose(inputs * encoder.scale_, expected, rtol=1e-3, atol=1e-2)
    assert np.mean(inputs.var(axis=0, ddof=1)) == pytest.approx(1.0, rel=1e-4)
    np.testing.assert_allclose(encoder.mean_, X.mean(0, dtype=np.float64), rtol=1e-5)
    if n_pcs is None:
        assert encoder.components_ is None
        sparse = tiny(n_pcs=None).fit(sp.csr_matrix(X))
        np.testing.assert_allclose(sparse.scale_, encoder.scale_, rtol=1e-6)
    far = tiny(n_pcs=n_pcs).fit(blobs[0] + 1e4)
    assert far.scale_ == pytest.approx(tiny(n_pcs=n_pcs).fit(blobs[0]).scale_, rel=1e-2)


def test_a_few_far_rows_are_named_for_they_set_the_scale(blobs):
    X = np.vstack([blobs[0], np.full((2, blobs[0].shape[1]), 99_999.0)])
    with pytest.warns(UserWarning, match=f"row {len(X) - 2} is the farthest"):
        tiny().fit(X)


@pytest.mark.parametrize(
    "X",
    [
        np.random.default_rng(0).standard_t(2, (300, 20)),  # long tails
        np.eye(20)[np.arange(300) % 20],
        np.r_[np.zeros((280, 20)), np.random.default_rng(0).normal(5, 1, (20, 20))],  # a rare type
        np.ones((60, 20)),
    ],
    ids=["long tails", "one-hot", "rare type", "constant"],
)
@pytest.mark.filterwarnings("error:.*samples lie within:UserWarning")
def test_long_tails_and_rare_types_are_not_taken_for_errors(X):
    tiny().fit(X)


def test_precision_and_device_are_checked(blobs):
    with pytest.raises(ValueError, match="is not a device"):
        tiny(device="abacus").fit(blobs[0])
    with pytest.raises(ValueError, match="precision"):
        tiny(precision="fp8").fit(blobs[0])


@pytest.mark.parametrize(
    "options",
    [{"backbone": "small_vit"}, {"backbone": torch.nn.Identity()}, {"pretrained": "dino"}],
)
def test_networks_for_images_are_refused_for_vectors(blobs, options):
    # Images without image_shape, say: an MLP without those weights was trained in their place.
    with pytest.raises(
        ValueError, match=r"\(240, 20\) holds vectors, but backbone .* image_shape="
    ):
        tiny(**options).fit(blobs[0])
    tiny(backbone="mlp").fit(blobs[0])


@pytest.mark.parametrize("sizes", [(8, 0), (8.0,), ["wide"]])
def test_hidden_sizes_are_checked(blobs, sizes):
    with pytest.raises(ValueError, match="hidden_sizes"):
        tiny(hidden_sizes=sizes).fit(blobs[0])


def test_a_batch_of_one_has_no_negatives(blobs):
    with pytest.raises(ValueError, match=r"'batch_size' .* in the range \[2, inf\)"):
        tiny(batch_size=1).fit(blobs[0])


# ---- positives -----------------------------------------------------------------------------------


def test_positives_are_used_as_often_as_asked(blobs):
    X = blobs[0]
    views = [X[::-1].copy(), X + 1]
    never = tiny(positives_prob=0.0).fit(X, positives=views).transform(X)
    some = tiny(positives_prob=0.5).fit(X, positives=views).transform(X)
    always = tiny(positives_prob=1.0).fit(X, positives=views).transform(X)
    assert not np.array_equal(never, some)
    assert not np.array_equal(some, always)


@pytest.fixture
def second_views(monkeypatch):
    """What the loss gets of second views, y of each batch."""
    seen = []
    original = objectives.soft_contrastive

    def record(y_a, z_a, y_b, z_b, **options):
        seen.append(y_b.detach().numpy())
        return original(y_a, z_a, y_b, z_b, **options)

    monkeypatch.setattr(objectives, "soft_contrastive", record)
    return seen


def test_positives_replace_the_second_view(blobs, second_views):
    X = blobs[0]
    views = [np.full_like(X, 3.0), np.full_like(X, -3.0)]
    tiny(positives_prob=1.0, max_epochs=1, dropout=0).fit(X, positives=views)
    distinct = {tuple(np.round(row, 3)) for row in second_views[0]}
    assert len(distinct) == 2  # both views, each row one of them, and no mix-up
    second_views.clear()
    options = {"max_epochs": 1, "batch_size": 240, "dropout": 0}
    tiny(positives_prob=0.25, **options).fit(X, positives=views[:1])
    rows = np.round(second_views[0], 3)
    same = max(np.sum((rows == row).all(axis=1)) for row in rows)
    assert same / 240 == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(("n", "share"), [(1_000, 0.5), (3_000, 0.1)])
def test_half_of_the_views_of_few_rows_are_generated(n, share, second_views):
    X = np.random.default_rng(0).normal(size=(n, 6))
    tiny(dropout=0, max_epochs=1, batch_size=n).fit(X, positives=[np.full_like(X, 3.0)])
    _, counts = np.unique(np.round(second_views[0], 3), axis=0, return_counts=True)
    assert counts.max() / n == pytest.approx(share, abs=0.06)


def test_positives_of_another_cell_spoil_and_of_the_same_help(blobs):
    X, labels = blobs
    rng = np.random.default_rng(0)
    noisy = X + rng.normal(scale=3.0, size=X.shape).astype(np.float32)
    options = {"max_epochs": 30, "batch_size": 80, "positives_prob": 1.0, "skip": False}
    of_class = [
        np.concatenate([rng.permutation(noisy[labels == k]) for k in range(3)]) for _ in range(4)
    ]
    of_any = [rng.permutation(noisy) for _ in range(4)]
    good, bad = (
        knn_accuracy(tiny(**options).fit(noisy, positives=views).project(noisy), labels)
        for views in (of_class, of_any)
    )
    assert good > bad + 0.02


@pytest.mark.parametrize(
    "container", [np.asarray, torch.from_numpy, sp.csr_matrix, pd.DataFrame, DenseRows, ad.AnnData]
)
def test_positives_come_in_every_container(blobs, container):
    X = blobs[0]
    expected = tiny(positives_prob=1.0).fit(X, positives=[X + 1]).transform(X)
    ours = tiny(positives_prob=1.0).fit(X, positives=[container(X + 1)]).transform(X)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_positives_go_by_name_and_layer(blobs):
    X, order = blobs[0], np.random.default_rng(0).permutation(20)
    names = np.array([f"gene{i}" for i in range(20)])

    def cells(values, names=names):
        zeros = np.zeros_like(values)
        return ad.AnnData(zeros, layers={"log": values}, var=pd.DataFrame(index=names))

    model = tiny(positives_prob=1.0, layer="log")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model.fit(cells(X), positives=[X + 1]).transform(cells(X))
    shuffled = cells(X[:, order] + 1, names[order])
    surplus = cells(np.c_[X + 1, X[:, 0]], [*names, "another"])
    for view in (shuffled, surplus):
        ours = model.fit(cells(X), positives=[view]).transform(cells(X))
        np.testing.assert_array_equal(ours, expected)
    with pytest.raises(ValueError, match=r"positives\[0\].*lacks 1 of the 20 genes .*gene3"):
        model.fit(cells(X), positives=[shuffled[:, shuffled.var_names != "gene3"]])


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (lambda X: [X, X[:-1]], r"positives\[1\] has shape \(239, 20\), but X has \(240, 20\)"),
        (lambda X: [X[:, :5]], r"positives\[0\] has shape \(240, 5\)"),
        (lambda X: X, "one set of views"),
        (lambda X: [X * np.nan], r"positives\[0\].*NaN"),
    ],
)
def test_wrong_positives_are_refused(blobs, views, message):
    encoder = tiny().fit(blobs[0])
    before = encoder.transform(blobs[0])
    with pytest.raises(ValueError, match=message):
        encoder.fit(blobs[0], positives=views(blobs[0]))
    np.testing.assert_array_equal(encoder.transform(blobs[0]), before)


# ---- warm start ----------------------------------------------------------------------------------


def test_warm_start_goes_on(blobs):
    X = blobs[0]
    encoder = tiny(warm_start=True, max_epochs=10, batch_size=80).fit(X)
    first, space, loss = encoder.module_, encoder.components_, encoder.history_["loss"].to_numpy()
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    encoder.set_params(max_epochs=3).fit(X[:200])
    assert encoder.history_["loss"].iloc[0] < loss[0]
    assert encoder.n_iter_ == 3
    np.testing.assert_array_equal(encoder.components_, space)
    assert all(torch.equal(kept[name], value) for name, value in first.state_dict().items())
    cold = encoder.set_params(warm_start=False).fit(X).transform(X)
    np.testing.assert_array_equal(cold, tiny(max_epochs=3, batch_size=80).fit(X).transform(X))


def test_warm_start_refuses_what_does_not_go_on(blobs):
    encoder = tiny(warm_start=True).fit(blobs[0])
    before = encoder.transform(blobs[0])
    with pytest.raises(ValueError, match="20 features"):
        encoder.fit(blobs[0][:, :7])
    with pytest.raises(ValueError, match="size were changed"):
        encoder.set_params(n_components=9).fit(blobs[0])
    encoder.set_params(n_components=5)
    np.testing.assert_array_equal(encoder.transform(blobs[0]), before)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, warm_start=True).fit(images)
    with pytest.raises(ValueError, match="size were changed"):
        encoder.set_params(method="dino").fit(images)


def test_neighbours_follow_the_space(blobs):
    # The same Rows, first for one space, then warm for another of equal shape.
    rows = DenseRows(blobs[0])
    rng = np.random.default_rng(0)
    other = DenseRows(blobs[0] * rng.uniform(0, 5, size=20).astype(np.float32))
    warm = tiny(warm_start=True).fit(other)
    tiny().fit(rows)
    space = warm._prepare(rows, None, seed=0)
    fresh = warm._prepare(DenseRows(blobs[0]), None, seed=0)
    assert torch.equal(space.batches.sources[1], fresh.batches.sources[1])


def test_grid_search_uses_the_score(blobs):
    X, y = blobs
    search = GridSearchCV(tiny(), {"n_components": [2, 6]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_score_ > 0.9


@pytest.mark.parametrize(("n", "n_classes"), [(3, 2), (10, 2), (12, 5), (60, 10)])
def test_small_folds_have_a_score(blobs, n, n_classes):
    X = blobs[0][:n]
    encoder = tiny(max_epochs=1).fit(blobs[0])
    y = [f"t{row % n_classes}" for row in range(n)]
    cv = min(10, -(-n // n_classes))
    n_neighbors = min(10, n - -(-n // cv))
    expected = knn_accuracy(encoder.transform(X), y, n_neighbors=n_neighbors, cv=cv)
    assert encoder.score(X, y) == expected


def test_parameters_changed_after_fit_leave_the_width(blobs):
    encoder = SelfSupervisedEncoder(max_epochs=1, n_components=7, random_state=0).fit(blobs[0])
    encoder.set_params(n_components=3)
    assert encoder.transform(blobs[0]).shape == (240, 7)
    assert encoder.project(blobs[0]).shape == (240, 2)
    assert len(encoder.get_feature_names_out()) == 7


def test_collapse_of_vectors_is_warned_of(blobs, monkeypatch):
    encoder = SelfSupervisedEncoder(max_epochs=1, dropout=0, random_state=0)
    assert encoder.fit(blobs[0]).history_["feature_spread"].iloc[-1] > 0.5
    loss = objectives.SoftContrastiveObjective.loss

    def collapsed(self, views):
        return loss(self, views) | {"feature_spread": torch.tensor(1e-4)}

    monkeypatch.setattr(objectives.SoftContrastiveObjective, "loss", collapsed)
    with pytest.warns(objectives.CollapseWarning, match="scl collapsed"):
        SelfSupervisedEncoder(max_epochs=1, random_state=0).fit(blobs[0])


@pytest.mark.parametrize("n_pcs", [None, 50])
def test_one_column_of_all_the_variance_is_warned_of(blobs, n_pcs):
    X = blobs[0].copy()
    encoder = SelfSupervisedEncoder(max_epochs=1, random_state=0, n_pcs=n_pcs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.fit(X)
    X[:, 2] *= 1000
    with pytest.warns(UserWarning, match=r"Column 2 of X .* 100\.0% .*StandardScaler") as seen:
        encoder.fit(X)
    assert seen[0].filename == __file__


def test_a_folder_of_checkpoints_is_no_place_for_a_model(blobs, tmp_path):
    encoder = SelfSupervisedEncoder(max_epochs=1, random_state=0, checkpoint_dir=tmp_path)
    with pytest.raises(ModelFileError, match="holds the checkpoints of a fit"):
        encoder.fit(blobs[0]).save(tmp_path)
    (tmp_path / "em" / "12-EM-DiffAugEM").mkdir(parents=True)  # as DiffAugEM names them
    with pytest.raises(ModelFileError, match="holds the checkpoints of a fit"):
        encoder.save(tmp_path / "em")


def test_single_rows_of_whole_numbers_are_transformed_after_load(tmp_path):
    table = np.random.default_rng(0).integers(-500, 3000, size=(40, 6)).astype(np.float32)
    model = SelfSupervisedEncoder(max_epochs=1, random_state=0).fit(table)
    single = np.abs(table[:1])  # alone it looks like raw counts
    model.save(tmp_path / "model")
    found = load(tmp_path / "model").transform(single)
    assert np.array_equal(found, model.transform(single))
