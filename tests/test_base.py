"""The base class: common parameters, seeds, and state that travels by pickle and copy."""

import copy
import enum
import functools
import io
import json
import pickle
from numbers import Integral

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler
from sklearn.utils import get_tags
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn
from torch.nn import functional as F

from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder
from diffaugkit.base import (
    Interval,
    StrOptions,
    TorchEstimator,
    _fit_context,
    _on_cpu,
    described,
)
from diffaugkit.batches import make_batches
from diffaugkit.runtime import isolated_rng


class Line(TransformerMixin, TorchEstimator):
    """The smallest estimator that trains."""

    _parameter_constraints: dict = {**TorchEstimator._parameter_constraints}  # noqa: RUF012

    def __init__(
        self,
        *,
        max_epochs=3,
        batch_size=16,
        learning_rate=0.01,
        device="cpu",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.precision = precision
        self.compile = compile
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        X = torch.as_tensor(X, dtype=torch.float32)
        self.n_features_in_ = X.shape[1]
        device, seed = self._device(), self._seed()
        with isolated_rng(seed, device):
            module = self._build()
        batches = make_batches(X, batch_size=self.batch_size, seed=seed, device=device)
        self.module_, self.history_ = self._fit_loop(
            module, lambda x: F.mse_loss(module(x), x), batches, seed=seed, weight_decay=0.01
        )
        return self

    def transform(self, X):
        with torch.no_grad():
            return self.module_(torch.as_tensor(X, dtype=torch.float32)).numpy()

    def _build(self):
        return nn.Linear(self.n_features_in_, self.n_features_in_)


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def weight(estimator):
    return estimator.module_.weight.detach().numpy()


def test_common_parameters_reach_the_loop(X, tmp_path, capsys):
    seen = []
    line = Line(
        max_epochs=5,
        random_state=3,
        verbose=1,
        checkpoint_dir=tmp_path,
        callbacks=lambda epoch, history: seen.append(epoch),
    ).fit(X)
    assert seen == list(range(5))
    assert len(line.history_) == 5
    assert (tmp_path / "training" / "manifest.json").exists()
    assert "Line: 100%" in capsys.readouterr().err


def test_options_replace_common_parameters(X):
    line = Line(max_epochs=5, random_state=0)
    module = nn.Identity()
    module.scale = nn.Parameter(torch.ones(()))
    batches = make_batches(X, batch_size=40, device="cpu")
    _, history = line._fit_loop(
        module, lambda x: (x * module.scale).square().mean(), batches, seed=0, max_epochs=2
    )
    assert len(history) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_epochs": 0},
        {"max_epochs": 1.5},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"device": 3},
        {"precision": "fp16"},
        {"compile": "yes"},
        {"random_state": "a"},
        {"verbose": -1},
        {"checkpoint_dir": 3},
        {"callbacks": 3},
    ],
)
def test_constraints_name_the_parameter(X, wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        Line(**wrong).fit(X)


def test_a_wrong_device_is_named(X):
    with pytest.raises(ValueError, match="device='gpu' is not a device"):
        Line(device="gpu").fit(X)


# ---- seeds ---------------------------------------------------------------------------------------


def test_int_seeds_repeat_and_stay(X):
    line = Line(random_state=7)
    first = weight(line.fit(X))
    assert np.array_equal(first, weight(line.fit(X)))
    assert line.random_state == 7
    assert np.array_equal(first, weight(Line(random_state=np.int64(7)).fit(X)))
    assert not np.array_equal(first, weight(Line(random_state=8).fit(X)))


def test_a_random_state_moves_on(X):
    line = Line(random_state=np.random.RandomState(0))
    first, second = weight(line.fit(X)), weight(line.fit(X))
    assert not np.array_equal(first, second)
    again = Line(random_state=np.random.RandomState(0)).fit(X)
    assert np.array_equal(first, weight(again))


def test_no_seed_is_fresh_and_leaves_the_global_stream(X):
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert Line()._seed() != Line()._seed()
    Line().fit(X)
    assert before == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert Line(checkpoint_dir="somewhere")._seed() == 0


def test_no_seed_under_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="pass an int"):
        Line()._seed()
    assert Line(random_state=2)._seed() == 2


def test_children_have_seeds_of_their_own():
    seeds = {Line._child_seed(parent, number) for parent in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)
    np.random.RandomState(max(seeds))


# ---- travel --------------------------------------------------------------------------------------


def by_pickle(estimator):
    return pickle.loads(pickle.dumps(estimator))


def by_joblib(estimator):
    file = io.BytesIO()
    joblib.dump(estimator, file)
    file.seek(0)
    return joblib.load(file)


@pytest.mark.parametrize("travel", [by_pickle, by_joblib, copy.deepcopy])
def test_fitted_estimators_travel(X, travel):
    line = Line(random_state=0).fit(X)
    other = travel(line)
    assert np.array_equal(line.transform(X), other.transform(X))
    assert other.history_ == line.history_
    assert other.get_params() == line.get_params()


def test_clone_is_unfitted(X):
    line = clone(Line(random_state=0, max_epochs=2).fit(X))
    assert line.max_epochs == 2
    assert not hasattr(line, "module_")


def test_state_leaves_the_device(X):
    line = Line(random_state=0).fit(X)
    assert line.__getstate__()["module_"] is line.module_  # nothing is copied on the CPU
    assert set(line.__getstate__()) >= set(vars(line))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_state_loads_on_the_cpu(X):
    line = Line(random_state=0, device="cuda").fit(X)
    assert line.module_.weight.is_cuda
    other = by_pickle(line)
    assert not other.module_.weight.is_cuda
    assert line.module_.weight.is_cuda


def test_nested_values_go_to_the_cpu():
    value = {"a": [torch.ones(1), ("b", 2)], "c": nn.Identity()}
    out = _on_cpu(value)
    assert out == value
    assert out["c"] is value["c"]
    # Meta tensors have no values to move, so they show that a move is tried.
    for elsewhere in (torch.zeros(2, device="meta"), nn.Linear(2, 2, device="meta")):
        with pytest.raises(NotImplementedError, match="meta"):
            _on_cpu({"a": (elsewhere,)})


def test_save_and_tags(X, tmp_path):
    tags = get_tags(Line())
    assert tags.input_tags.sparse
    assert not tags.non_deterministic
    line = Line(random_state=0)
    # A class that the library does not offer is refused: loading could not find it.
    with pytest.raises((TypeError, ValueError), match="Line"):
        line.save(tmp_path / "line")


def test_private_names_come_from_here():
    assert StrOptions({"a"}).is_satisfied_by("a")
    assert callable(_fit_context)
    assert Interval(Integral, 0, 1, closed="both").is_satisfied_by(1)


def test_the_home_folder_is_the_users(blobs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    encoder = SelfSupervisedEncoder(max_epochs=1, random_state=0, checkpoint_dir="~/run")
    encoder.fit(blobs[0])
    assert (tmp_path / "home" / "run" / "training").is_dir()
    assert not (tmp_path / "~").exists()


class Kind(str, enum.Enum):
    A, B = "a", "b"


class Doubler(nn.Module):
    def __init__(self, by=2.0, weight=1.0):
        super().__init__()
        self.by, self.weight = by, nn.Parameter(torch.tensor([weight]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(int, base=2), functools.partial(int, base=3)),
        (Doubler(2.0), Doubler(3.0)),
        (Doubler(weight=1.0), Doubler(weight=2.0)),
        (SimpleImputer(), SimpleImputer(strategy="median")),
        (OrdinalEncoder(dtype=np.float32), OrdinalEncoder(dtype=np.float64)),
        (np.arange(3), np.arange(4)),
        (Kind.A, Kind.B),
    ],
)
def test_descriptions_tell_parameters_apart(one, other):
    assert described(one) == described(copy.deepcopy(one)) != described(other)
    assert json.loads(json.dumps(described(one), allow_nan=False)) == described(one)


def test_parts_of_scikit_learn_in_a_fit_with_checkpoints(blobs, tmp_path):
    # A NaN and a class of NumPy are among their parameters.
    part = make_pipeline(SimpleImputer(), OrdinalEncoder(dtype=np.float32), PCA(3))
    options = {"width": 8, "n_blocks": 1, "max_epochs": 1, "random_state": 0}
    model = EmbeddingConditionedDiffusion(part, checkpoint_dir=tmp_path / "run", **options)
    np.testing.assert_array_equal(
        model.fit(blobs[0]).sample(blobs[0][:2, :3]), model.fit(blobs[0]).sample(blobs[0][:2, :3])
    )
    part = make_pipeline(StandardScaler(), SelfSupervisedEncoder(max_epochs=1, random_state=0))
    model = EmbeddingConditionedDiffusion(part, **options).fit(blobs[0]).set_params(device="cpu")
    assert model.encoder_[-1].device == "cpu"
