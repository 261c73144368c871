"""What holds for every estimator: scikit-learn's checks, containers, purity, copies, refusals."""

import ast
import copy
import inspect
import io
import pickle
import re
from pathlib import Path

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

import diffaugkit
from diffaugkit import (
    CellPreprocessor,
    DiffAugEM,
    EmbeddingConditionedDiffusion,
    SelfSupervisedEncoder,
)
from diffaugkit.base import TorchEstimator
from diffaugkit.metrics import WeightedKNNClassifier
from diffaugkit.rows import DenseRows
from diffaugkit.slides import Slide

ENCODER = {"hidden_sizes": (8,), "n_components": 4, "n_pcs": 6, "max_epochs": 2}
DIFFUSION = {"width": 8, "n_blocks": 1, "n_pcs": 6, "n_sampling_steps": 2, "max_epochs": 2}


def tiny_encoder(**more):
    return SelfSupervisedEncoder(**{**ENCODER, **more})


def tiny_diffusion(**more):
    return EmbeddingConditionedDiffusion(**{"encoder": tiny_encoder(), **DIFFUSION, **more})


def tiny_em(**more):
    parts = {"encoder": tiny_encoder(), "diffusion": tiny_diffusion()}
    return DiffAugEM(**{**parts, "schedule": (2, 1, 2), "n_views": 2, **more})


TORCH = [tiny_encoder, tiny_diffusion, tiny_em]
EVERY = pytest.mark.parametrize("make", TORCH, ids=lambda make: make.__name__)


@pytest.fixture(scope="module")
def X(blobs):
    return blobs[0][::4]


def equal_state(a, b):
    """Compare fitted attributes, bit for bit, nested ones included."""
    assert type(a) is type(b)
    if isinstance(a, sklearn.base.BaseEstimator):
        assert vars(a).keys() == vars(b).keys()
        for name in vars(a):
            if name.endswith("_") or name in getattr(a, "_extra_state", ()):
                equal_state(getattr(a, name), getattr(b, name))
    elif isinstance(a, torch.nn.Module):
        equal_state(a.state_dict(), b.state_dict())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            equal_state(a[name], b[name])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


def embed(estimator, X):
    """All that the estimator computes of rows, side by side."""
    parts = [estimator.transform(X)]
    if hasattr(estimator, "project"):
        parts.append(estimator.project(X))
    if hasattr(estimator, "augment"):
        parts.append(estimator.augment(X))
    return np.hstack(parts)


# ---- scikit-learn's own checks -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:CellPreprocessor expects raw counts")
@parametrize_with_checks(
    [CellPreprocessor(), *(make() for make in TORCH)], expected_failed_checks=lambda estimator: {}
)
def test_check_estimator(estimator, check):
    check(estimator)


@EVERY
def test_check_estimator_parameters(make):
    check_param_validation(type(make()).__name__, make())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SelfSupervisedEncoder, "hidden_sizes"),
        (EmbeddingConditionedDiffusion, "block_out_channels"),
        (diffaugkit.LatentAutoencoder, "block_out_channels"),
        (diffaugkit.DiffusionSegmenter, "block_out_channels"),
        (diffaugkit.DiffusionDetector, "block_out_channels"),
        (diffaugkit.AttentionMILClassifier, "hidden_sizes"),
    ],
)
@pytest.mark.parametrize("widths", [(8, 0), [8, -2], (8, 16.0), ("a",), 8])
def test_widths_are_checked_before_anything_is_read(kind, name, widths):
    estimator = kind(**{name: widths})
    given = [["no", "images"]] * len(inspect.signature(kind.fit).parameters)
    with pytest.raises(ValueError, match=rf"'{name}' parameter.*integers of at least 1"):
        estimator.fit(*given[: 1 if hasattr(kind, "transform") else 2])


@pytest.mark.parametrize("name", sorted(diffaugkit._HOMES))
def test_public_names_import(name):
    assert getattr(diffaugkit, name).__name__ == name
    assert name in dir(diffaugkit)


PUBLIC = [getattr(diffaugkit, name) for name in sorted(diffaugkit._HOMES)]
ESTIMATORS = [
    kind
    for kind in PUBLIC
    if isinstance(kind, type) and issubclass(kind, sklearn.base.BaseEstimator)
]
OTHERS = [kind for kind in PUBLIC if isinstance(kind, type) and kind not in ESTIMATORS]


def documented(kind):
    """Check that each parameter has its line in the docstring, with the default that it has."""
    for name, parameter in inspect.signature(kind).parameters.items():
        # "name, other : type, default=value": what the documentation says is what the code does.
        # Without a type a line refers to where a group of parameters is described.
        pattern = rf"^    ((?:\w+, )*{name}(?:, \w+)*)(?: : (.*))?$"
        line = re.search(pattern, kind.__doc__, re.MULTILINE)
        assert line, name
        names = line[1].split(", ")
        if line[2] and "default=" in line[2]:
            stated = line[2].partition("default=")[2].replace("`", "").split(" and ")
            stated = stated[names.index(name)] if len(stated) > 1 else stated[0]
            assert ast.literal_eval(stated) == parameter.default, name
        elif line[2]:
            assert parameter.default is parameter.empty, f"the default of {name} is not stated"


def test_these_are_all_the_estimators():
    names = {kind.__name__ for kind in ESTIMATORS}
    listed = (Path(__file__).parent.parent / "docs/api.md").read_text()
    listed = listed.partition("## Estimators\n")[2].partition("\n## ")[0]
    assert names == set(re.findall(r"^   (\w+)$", listed, re.MULTILINE))
    assert len(names) == 12


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_parameter_is_documented_constrained_and_stored(kind):
    documented(kind)
    names = list(inspect.signature(kind).parameters)
    constraints = kind._parameter_constraints
    assert set(constraints) == set(names)
    defaults = kind()
    for name, parameter in inspect.signature(kind).parameters.items():
        assert getattr(defaults, name) is parameter.default
    if issubclass(kind, TorchEstimator):
        common = {"batch_size", "learning_rate", "device", "precision", "compile", "random_state"}
        assert common | {"verbose", "checkpoint_dir", "callbacks"} <= set(names)


@pytest.mark.parametrize("kind", [*OTHERS, Slide, WeightedKNNClassifier])
def test_every_parameter_of_other_classes_is_documented(kind):
    documented(kind)
    if issubclass(kind, sklearn.base.BaseEstimator):
        for name, parameter in inspect.signature(kind).parameters.items():
            assert getattr(kind(), name) is parameter.default


# ---- what methods return -------------------------------------------------------------------------


@EVERY
def test_shapes_names_and_containers_of_output(make, X):
    estimator = make(random_state=0)
    assert estimator.fit(X) is estimator
    y = estimator.transform(X)
    assert type(y) is np.ndarray
    assert y.dtype == np.float32
    assert y.shape == (len(X), 4)
    assert np.isfinite(y).all()
    names = estimator.get_feature_names_out()
    assert list(names) == [f"{type(estimator).__name__.lower()}{i}" for i in range(4)]
    assert estimator.n_features_in_ == X.shape[1]
    assert estimator.n_iter_ == len(estimator.history_)
    assert {"epoch", "loss", "learning_rate"} <= set(estimator.history_.columns)
    assert np.isfinite(estimator.history_["loss"]).all()
    frame = pd.DataFrame(X, index=[f"cell{i}" for i in range(len(X))])
    frame.columns = [f"gene{i}" for i in range(X.shape[1])]
    as_frame = clone(estimator).set_output(transform="pandas").fit(frame).transform(frame)
    assert list(as_frame.columns) == list(names)
    assert list(as_frame.index) == list(frame.index)
    np.testing.assert_array_equal(as_frame.to_numpy(), y)
    with sklearn.config_context(transform_output="pandas"):
        globally = clone(estimator).fit(frame)
        np.testing.assert_array_equal(embed(globally, frame), embed(estimator, X))


@EVERY
def test_outlets_are_looked_at_before_any_work(make, X, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("diffaugkit.base.fit_loop", work)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"checkpoint_dir=.*file is not a folder"):
        make(checkpoint_dir=tmp_path / "file" / "below").fit(X)
    with pytest.raises(TypeError, match=r"callbacks\[1\] is 'log'"):
        make(callbacks=[print, "log"]).fit(X)


@EVERY
def test_unfitted_methods_say_so(make, X):
    estimator = make()
    calls = {
        "transform": (X,), "project": (X,), "augment": (X,), "sample": (), "interpolate": (X, X),
        "quality_report": (X,), "score": (X, X[:, 0]),
    }  # fmt: skip
    tried = [name for name in calls if hasattr(estimator, name)]
    assert len(tried) >= 3
    for name in tried:
        with pytest.raises(NotFittedError):
            getattr(estimator, name)(*calls[name])


# ---- purity --------------------------------------------------------------------------------------


@EVERY
def test_a_row_does_not_depend_on_the_rows_around_it(make, X):
    estimator = make(random_state=0).fit(X)
    before = pickle.dumps(estimator)
    whole = estimator.transform(X)
    for part in (slice(0, 1), slice(7, 30), [5, 5, 2], np.arange(60)[::-1]):
        np.testing.assert_array_equal(estimator.transform(X[part]), whole[part])
    many = np.tile(X, (12, 1))
    np.testing.assert_array_equal(estimator.transform(many)[-60:], whole)
    if hasattr(estimator, "augment"):
        samples = estimator.augment(X, 2)
        np.testing.assert_array_equal(estimator.augment(X[:7], 2), samples[:14])
        np.testing.assert_array_equal(estimator.augment(X[:1], 1), samples[:1])
        np.testing.assert_array_equal(estimator.augment(many, 2)[:14], samples[:14])
        estimator.set_params(batch_size=3)
        np.testing.assert_array_equal(estimator.augment(X, 2), samples)
        estimator.set_params(batch_size=300)
        assert not np.array_equal(samples[0], samples[1])
        assert not np.array_equal(estimator.augment(X, 2, random_state=5), samples)
    fresh = pickle.loads(before)
    equal_state(estimator, fresh)


@EVERY
def test_seeds(make, X):
    same, again, other = (embed(make(random_state=s).fit(X), X) for s in (3, 3, 4))
    np.testing.assert_array_equal(same, again)
    assert not np.allclose(same, other)
    state = np.random.RandomState(0)
    first, second = (embed(make(random_state=state).fit(X), X) for _ in range(2))
    assert not np.allclose(first, second)
    assert not np.allclose(*(embed(make().fit(X), X) for _ in range(2)))


@EVERY
def test_rows_that_were_used_before_change_nothing(make, X):
    # Components and neighbours are kept with Rows: they must be those of the space asked for.
    rows = DenseRows(X)
    make(random_state=1).fit(rows)
    for more in ({}, {"n_pcs": 3}, {"n_pcs": None}, {"n_neighbors": 4}):
        estimator = make(random_state=0)
        for part in (estimator, *map(estimator.get_params().get, ("encoder", "diffusion"))):
            if part is not None:
                part.set_params(**{k: v for k, v in more.items() if k in part.get_params()})
        equal_state(clone(estimator).fit(rows), clone(estimator).fit(X))


# ---- containers ----------------------------------------------------------------------------------


def names_of(d):
    return np.array([f"gene{i}" for i in range(d)])


def anndata_of(X, order=None):
    adata = ad.AnnData(X.copy(), var=pd.DataFrame(index=names_of(X.shape[1])))
    adata.obs_names = [f"cell{i}" for i in range(len(X))]
    return adata if order is None else adata[:, order].copy()


@EVERY
def test_every_container_gives_the_same_embedding(make, X, tmp_path):
    X = np.where(X > 0, X, 0).astype(np.float32)
    expected = embed(make(random_state=0).fit(X), X)
    adata = anndata_of(X)
    adata.write_h5ad(tmp_path / "dense.h5ad")
    sparse = anndata_of(X)
    sparse.X = sp.csr_matrix(X)
    sparse.layers["normalised"] = sparse.X.copy()
    sparse.write_h5ad(tmp_path / "sparse.h5ad")
    containers = {
        "float64": X.astype(np.float64),
        "fortran": np.asfortranarray(X),
        "tensor": torch.from_numpy(X),
        "frame": pd.DataFrame(X, columns=names_of(X.shape[1])),
        "rows": DenseRows(X),
        "anndata": adata,
        "csr": sp.csr_matrix(X),
        "csc": sp.csc_array(X),
        "sparse anndata": sparse,
        "backed": ad.read_h5ad(tmp_path / "dense.h5ad", backed="r"),
        "backed sparse": ad.read_h5ad(tmp_path / "sparse.h5ad", backed="r"),
    }
    for name, container in containers.items():
        ours = embed(make(random_state=0).fit(container), container)
        # Sums over sparse blocks run in another order: equal up to rounding.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3, err_msg=name)
        if name in ("float64", "fortran", "tensor", "frame", "rows", "anndata"):
            np.testing.assert_array_equal(ours, expected, err_msg=name)
    layered = make(random_state=0, layer="normalised").fit(sparse)
    np.testing.assert_allclose(embed(layered, sparse), expected, rtol=0, atol=2e-3)
    fitted = make(random_state=0).fit(adata)
    shuffled = anndata_of(X, np.random.default_rng(0).permutation(X.shape[1]))
    np.testing.assert_array_equal(embed(fitted, shuffled), expected)
    assert list(fitted.feature_names_in_) == list(adata.var_names)
    with pytest.raises(ValueError, match=r"lacks 1 of the 20 genes.*gene0"):
        fitted.transform(adata[:, 1:].copy())


@EVERY
def test_anndata_is_not_modified(make, X):
    adata = anndata_of(X)
    adata.obs["label"] = "a"
    before = copy.deepcopy(adata)
    estimator = make(random_state=0).fit(adata)
    embed(estimator, adata)
    np.testing.assert_array_equal(adata.X, before.X)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert not adata.layers
    assert not adata.obsm
    assert not adata.uns
    X = X.copy()
    X.flags.writeable = False
    embed(make(random_state=0).fit(X), X)


# ---- refusals ------------------------------------------------------------------------------------


def _with(X, value):
    X = X.copy()
    X[3, 2] = value
    return X


BAD = {
    "nan": (lambda X: _with(X, np.nan), "NaN"),
    "infinite": (lambda X: _with(X, np.inf), "infinity"),
    "empty": (lambda X: X[:0], "0 sample"),
    "one sample": (lambda X: X[:1], "1 sample"),
    "one feature": (lambda X: X[:, :1], "1 feature"),
    "1-D": (lambda X: X[0], "1D array|1-dimensional|Expected 2D"),
    "images": (lambda X: X.reshape(-1, 2, 2, 5), "dim 4|channel-last array has 1 to 4 channels"),
    "strings": (lambda X: pd.DataFrame({"a": ["x"] * 9, "b": 1.0}), "hold no numbers: a"),
    "counts": (
        lambda X: sp.csr_matrix(np.random.default_rng(0).poisson(9, X.shape).astype(np.float32)),
        r"raw counts.*CellPreprocessor\(\)",
    ),
}


@EVERY
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_and_leaves_the_fit(make, kind, X):
    bad, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        make().fit(bad(X))
    estimator = make(random_state=0).fit(X)
    expected = embed(estimator, X)
    state = copy.deepcopy(vars(estimator))
    with pytest.raises(ValueError, match=message):
        estimator.fit(bad(X))
    np.testing.assert_array_equal(embed(estimator, X), expected)
    assert vars(estimator).keys() == state.keys()
    assert estimator.n_features_in_ == X.shape[1]
    methods = ["transform", "project", "augment", "quality_report"]
    for name in [name for name in methods if hasattr(estimator, name)]:
        if kind not in ("one sample", "one feature", "strings"):
            with pytest.raises(ValueError, match=message):
                getattr(estimator, name)(bad(X))
        with pytest.raises(ValueError, match=r"expecting 20 features"):
            getattr(estimator, name)(X[:, :9])


@EVERY
def test_too_few_samples_for_the_neighbours(make, X):
    estimator = make()
    encoder = estimator.get_params().get("encoder", estimator)
    encoder.set_params(n_neighbors=30)
    with pytest.raises(ValueError, match=r"n_neighbors=30 needs more than 30 samples.*Lower"):
        estimator.fit(X[:30])
    estimator.fit(X[:31])


@EVERY
def test_two_rows_are_enough(make, X):
    estimator = make(random_state=0).fit(X[:2])
    assert np.isfinite(embed(estimator, X)).all()
    constant = make(random_state=0).fit(np.ones((20, 3)))
    assert np.isfinite(embed(constant, np.ones((4, 3)))).all()


@EVERY
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_dies_late_leaves_the_one_before(make, error, X):
    estimator = make(random_state=0).fit(X)
    expected, history = embed(estimator, X), estimator.history_.copy()

    def die(epoch, history):
        if epoch == 1:
            raise error("stop here")

    names = pd.DataFrame(X[:, :7], columns=[f"g{i}" for i in range(7)])
    with pytest.raises(error, match="stop here"):
        estimator.set_params(callbacks=die).fit(names)
    estimator.set_params(callbacks=None)
    np.testing.assert_array_equal(embed(estimator, X), expected)
    pd.testing.assert_frame_equal(estimator.history_, history)
    assert not hasattr(estimator, "feature_names_in_")


# ---- copies --------------------------------------------------------------------------------------


@EVERY
def test_copies_are_bit_equal(make, X, tmp_path):
    frame = pd.DataFrame(X, columns=names_of(X.shape[1]))
    estimator = make(random_state=0).fit(frame)
    expected = embed(estimator, frame)
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    estimator.save(tmp_path / "model")
    copies = {
        "pickle": pickle.loads(pickle.dumps(estimator)),
        "joblib": joblib.load(buffer),
        "deepcopy": copy.deepcopy(estimator),
        "load": diffaugkit.load(tmp_path / "model"),
        "set_params": copy.deepcopy(estimator).set_params(**estimator.get_params(deep=False)),
    }
    for name, other in copies.items():
        equal_state(estimator, other)
        assert repr(other) == repr(estimator), name
        np.testing.assert_array_equal(embed(other, frame), expected, err_msg=name)
        if hasattr(other, "sample"):
            np.testing.assert_array_equal(other.sample(3), estimator.sample(3))
        np.testing.assert_array_equal(embed(other.fit(frame), frame), expected, err_msg=name)
    unfitted = clone(estimator)
    assert not [name for name in vars(unfitted) if name.endswith("_")]
    unfitted.save(tmp_path / "unfitted")
    assert repr(diffaugkit.load(tmp_path / "unfitted")) == repr(unfitted)
    np.testing.assert_array_equal(embed(unfitted.fit(frame), frame), expected)


def test_models_saved_by_an_earlier_version_give_what_they_gave():
    # Written in November 2026. If it fails, people's files do: read the old form beside the new.
    folder = Path(__file__).parent / "saved_models"
    X = (np.arange(240).reshape(40, 6) * 7919 % 101 / 25).astype(np.float32)
    em, images = diffaugkit.load(folder / "em"), diffaugkit.load(folder / "images")
    found = {
        "transform": em.transform(X),
        "project": em.project(X),
        "augment": em.augment(X[:5]),
        "sample": images.sample(2).astype(float),
    }
    with np.load(folder / "expected.npz") as expected:
        for name, values in found.items():
            # Other processors round otherwise, bytes by one.
            atol = 1.01 if name == "sample" else 1e-3
            np.testing.assert_allclose(values, expected[name], atol=atol, err_msg=name)
