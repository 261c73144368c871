"""Multiple instances: attention finds what decides, bags of all forms, checks, copies, resume."""

import io
import pickle
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from scipy.sparse import csr_matrix, random
from simulated_accelerator import simulated_accelerator
from sklearn import config_context
from sklearn.exceptions import DataConversionWarning
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks
from sklearn.utils.fixes import parse_version
from torch.utils._python_dispatch import TorchDispatchMode

from diffaugkit import EarlyStopping, load, mil
from diffaugkit.mil import AttentionMILClassifier, BagNetwork
from diffaugkit.runtime import isolated_rng


def tiny(**more):
    options = {"max_epochs": 3, "hidden_sizes": (8,), "n_attention": 4, "random_state": 0}
    return AttentionMILClassifier(**{**options, **more})


def bags_with_keys(n_bags, seed=0, n_features=10, length=(15, 30), shift=3.0):
    """Half of the bags hold two key instances; returns bags, labels and where the keys are."""
    rng = np.random.default_rng(seed)
    bags, keys = [], []
    y = np.arange(n_bags) % 2
    for label in y:
        bag = rng.normal(size=(rng.integers(*length), n_features)).astype(np.float32)
        key = np.zeros(len(bag), bool)
        key[rng.choice(len(bag), 2, replace=False)] = label
        bag[key, :2] += shift
        bags.append(bag)
        keys.append(key)
    return bags, y, keys


@pytest.fixture(scope="module")
def data():
    bags, y, _ = bags_with_keys(20, length=(2, 7))
    return bags, y


@pytest.fixture(scope="module")
def fitted(data):
    return tiny().fit(*data)


@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.8"),
    reason="the Pipeline of scikit-learn 1.7 routes nothing to score",
)
def test_a_pipeline_that_routes_groups_is_scored():
    rng = np.random.default_rng(0)
    X, groups = rng.normal(size=(60, 4)), np.repeat(np.arange(20), 3)
    of_bags = np.arange(20) // 2 % 2
    y, model = of_bags[groups], tiny()
    with config_context(enable_metadata_routing=True):
        for name in ("fit", "predict", "score"):
            getattr(model, f"set_{name}_request")(groups=True)
        scores = cross_validate(
            make_pipeline(StandardScaler(), model),
            X,
            y,
            cv=GroupKFold(2),
            params={"groups": groups},
            error_score="raise",
        )["test_score"]
    assert ((scores >= 0) & (scores <= 1)).all()
    weight = np.arange(20.0)
    right = model.fit(X, y, groups=groups).predict(X, groups=groups) == of_bags
    weighted = model.score(X, y, weight, groups=groups)
    assert weighted == pytest.approx((right * weight).sum() / weight.sum())


def test_accumulated_bags_take_the_same_steps(data):
    whole, one_by_one = (
        tiny(batch_size=size, accumulate=20 // size, class_weight={0: 1.0, 1: 3.0}).fit(*data)
        for size in (20, 1)
    )
    assert whole.n_iter_ == one_by_one.n_iter_
    # Adam makes whole steps of gradients that are rounding errors: what matters is compared.
    expected = whole.predict_proba(data[0])
    np.testing.assert_allclose(one_by_one.predict_proba(data[0]), expected, atol=1e-5)
    each = tiny(batch_size=1, class_weight={0: 1.0, 1: 3.0}).fit(*data)
    assert np.abs(each.predict_proba(data[0]) - expected).max() > 0.02
    epochs = [tiny(max_epochs="auto", batch_size=n, accumulate=20 // n) for n in (20, 5)]
    assert epochs[0].fit(*data).n_iter_ == epochs[1].fit(*data).n_iter_ == 200


def test_attention_finds_the_key_instances_and_beats_the_mean():
    bags, y, _ = bags_with_keys(100, length=(40, 80))
    test_bags, y_test, keys = bags_with_keys(100, seed=1, length=(40, 80))
    scores, aucs = {}, []
    for pooling in ("gated", "mean"):
        model = AttentionMILClassifier(
            pooling, max_epochs=40, learning_rate=2e-3, random_state=0
        ).fit(bags, y)
        scores[pooling] = model.score(test_bags, y_test)
        if pooling == "gated":
            found = model.attention(test_bags)
            aucs = [
                roc_auc_score(key, share)
                for key, share in zip(keys, found, strict=True)
                if any(key)
            ]
    assert np.mean(aucs) > 0.93
    assert scores["gated"] > 0.88
    assert scores["gated"] > scores["mean"] + 0.05


@pytest.mark.parametrize("pooling", ["gated", "attention", "mean", "max"])
def test_poolings(data, pooling):
    bags, y = data
    model = tiny(pooling=pooling, max_instances=3, dropout=0.1, class_weight="balanced")
    model.fit(bags, y)
    assert model.predict_proba(bags).shape == (20, 2)
    np.testing.assert_allclose(model.predict_proba(bags).sum(1), 1, atol=1e-6)
    if pooling == "max":
        with pytest.raises(ValueError, match="shares"):
            model.attention(bags)
        return
    for bag, shares in zip(bags, model.attention(bags), strict=True):
        assert shares.shape == (len(bag),)
        assert shares.sum() == pytest.approx(1, abs=1e-6)
    if pooling == "mean":
        np.testing.assert_allclose(shares, 1 / len(shares), atol=1e-7)


def test_the_equations():
    """Gated attention in float64 NumPy, of a padded bag."""
    with isolated_rng(0):
        network = BagNetwork(5, 3, n_attention=4, hidden_sizes=()).double().eval()
        bag = torch.randn(1, 6, 5, dtype=torch.float64)
    inside = torch.tensor([[True] * 4 + [False] * 2])
    scores, shares = network(bag, inside)
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    h = bag[0, :4].numpy()
    hidden = np.tanh(h @ weights["tangent.weight"].T + weights["tangent.bias"])
    hidden /= 1 + np.exp(-(h @ weights["gate.weight"].T + weights["gate.bias"]))
    a = np.exp(hidden @ weights["weight.weight"][0])
    a /= a.sum()
    np.testing.assert_allclose(shares[0, :4].detach(), a, rtol=1e-5)
    assert (shares[0, 4:] == 0).all()
    expected = (a @ h) @ weights["output.weight"].T + weights["output.bias"]
    np.testing.assert_allclose(scores[0].detach(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="gated"):
        BagNetwork(5, 3, pooling="sum")


def test_a_table_with_groups_is_the_same(data, fitted):
    bags, y = data
    names = np.array([f"slide {i:02}" for i in range(20)])
    groups = np.repeat(names, [len(bag) for bag in bags])
    order = np.random.default_rng(0).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # rows of a bag in another order
    mixed = np.random.default_rng(1).permutation(len(groups))
    table, expected = np.concatenate(bags), fitted.predict_proba(bags)
    np.testing.assert_array_equal(fitted.predict_proba(table, groups=groups), expected)
    found = fitted.predict_proba(table[mixed], groups=groups[mixed])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    shares = fitted.attention(table[mixed], groups=groups[mixed])
    np.testing.assert_allclose(shares, np.concatenate(fitted.attention(bags))[mixed], atol=1e-6)
    per_row = np.repeat(y, [len(bag) for bag in bags])
    for labels in (per_row, y):
        model = tiny().fit(table, labels, groups=groups)
        np.testing.assert_array_equal(model.predict_proba(bags), expected)
        assert model.score(table, labels, groups=groups) == fitted.score(bags, y)
    frame = pd.DataFrame(table).rename(columns=str)
    named = tiny().fit(frame, per_row, groups=pd.Series(groups))
    np.testing.assert_array_equal(named.predict_proba(frame, groups=groups), expected)
    assert shares.shape == order.shape


@pytest.fixture(scope="module")
def table(data):
    """The bags as a table, the bag of each row, and the names of the bags in order."""
    bags, _ = data
    names = np.array([f"slide {i:02}" for i in range(20)])
    return np.concatenate(bags), np.repeat(names, [len(bag) for bag in bags]), names


@pytest.mark.parametrize("kind", ["object", "category", "int", "numbers of files"])
def test_labels_go_by_the_names_in_their_index(data, fitted, table, kind):
    bags, y = data
    X, groups, names = table
    if kind == "int":
        names, groups = np.arange(20), np.char.replace(groups, "slide ", "").astype(int)
    if kind == "numbers of files":  # "10" to "29" as the names of files, numbers in the table
        groups = np.char.replace(groups, "slide ", "").astype(int) + 10
        names, groups = np.arange(20) + 10, groups.astype(str)
        kind = "int"
    slides = pd.DataFrame({"slide": names, "label": y}).sample(frac=1, random_state=0)
    labels = slides.astype({"slide": kind}).set_index("slide")["label"]
    assert (labels.to_numpy() != y).any()
    model = tiny().fit(X, labels, groups=groups)
    np.testing.assert_array_equal(model.predict_proba(bags), fitted.predict_proba(bags))
    assert model.score(X, labels, groups=groups) == fitted.score(bags, y)
    names = np.unique(groups)
    first = [np.flatnonzero(groups == name)[0] for name in names]  # bags of one row
    assert model.score(X[first], labels, groups=names) == fitted.score([b[:1] for b in bags], y)


def test_an_index_that_names_no_bags_is_no_matter(data, fitted, table):
    bags, y = data
    X, groups, _ = table
    per_row = np.repeat(y, [len(bag) for bag in bags])
    numbers = np.char.replace(groups, "slide ", "").astype(int) + 1
    for labels in (
        pd.Series(y),
        pd.Series(y, index=np.arange(20) + 50),
        pd.Series(per_row, index=np.arange(len(X))[::-1]),  # holds the numbers of bags, by chance
    ):
        model = tiny().fit(X, labels, groups=numbers)
        np.testing.assert_array_equal(model.predict_proba(bags), fitted.predict_proba(bags))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": 0, "b": 1, "c": 1}, r"3 labels, but groups name 2 bags \(8 rows\); .* y only: c\."),
        ({"a": 0, "c": 1}, "in the index of y only: c; in groups only: b"),
        ({"A": 0, "B": 1}, "in the index of y only: A, B; in groups only: a, b"),
        ({"a": 0}, "y has 1 labels, .* in groups only: b"),
        (pd.Series([0, 1], index=["a", "a"]), "in groups only: b; repeated in the index of y: a"),
        ([0, 1, 1], r"y has 3 labels, but groups name 2 bags \(8 rows\)\. Give"),
        (["x"] * 4 + ["y"] * 3 + ["x"], "group 'b' have different labels"),
        (["x"] * 8, "one class, 'x'"),
        (["x"] * 7 + [np.nan], "y has missing labels .* in rows 7"),
        (pd.Categorical(["x", None] * 4), "y has missing labels .* in rows 1, 3, 5, 7: drop"),
    ],
)
def test_labels_that_do_not_go_with_groups(labels, message):
    if isinstance(labels, dict):
        labels = pd.Series(labels)
    X = np.random.default_rng(0).normal(size=(8, 3))
    with pytest.raises(ValueError, match=message):
        tiny().fit(X, labels, groups=np.repeat(["a", "b"], 4))


@pytest.mark.parametrize(
    "container",
    [
        list,
        lambda names: np.array(names, dtype=object),
        pd.Categorical,
        lambda names: pd.Series(names, dtype="string"),
    ],
    ids=["list", "array", "categorical", "string"],
)
@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_missing_groups(container, missing):
    X = np.random.default_rng(0).normal(size=(8, 3))
    groups = container([missing, "a", "a", missing, *"bbbb"])
    model = tiny().fit(X, [0, 1], groups=[*"aaaabbbb"])
    message = r"groups has missing values \(NaN or None\) in rows 0, 3: name them"
    with pytest.raises(ValueError, match=message):
        tiny().fit(X, [0, 1], groups=groups)
    with pytest.raises(ValueError, match=message):
        model.predict(X, groups=groups)


def test_groups_of_words_and_numbers():
    groups = np.array([*"aaaa", 1, 1, 1, 1], dtype=object)
    with pytest.raises(TypeError, match="groups must be all strings or all numbers"):
        tiny().fit(np.ones((8, 3)), [0, 1], groups=groups)


def test_a_table_without_groups_after_a_fit_with_them(data, table, tmp_path):
    bags, y = data
    X, groups, _ = table
    model = tiny().fit(X, y, groups=groups)
    model.save(tmp_path / "model")
    for fitted in (model, pickle.loads(pickle.dumps(model)), load(tmp_path / "model")):
        for call in (fitted.predict, fitted.predict_proba, fitted.attention):
            with pytest.raises(ValueError, match="give groups="):
                call(X)
        with pytest.raises(ValueError, match="fitted with groups"):
            fitted.score(X, np.zeros(len(X)))
        assert fitted.predict(bags).shape == fitted.predict(X, groups=groups).shape == (20,)
    per_row = np.repeat(y, [len(bag) for bag in bags])
    assert model.fit(X, per_row).predict(X).shape == (len(X),)


def test_a_bag_does_not_see_its_neighbours(data, fitted):
    bags, _ = data
    whole = fitted.predict_proba(bags)
    np.testing.assert_array_equal(fitted.predict_proba(bags[3:5]), whole[3:5])
    turned = [bag[::-1] for bag in bags]
    np.testing.assert_allclose(fitted.predict_proba(turned), whole, atol=1e-6)
    tensors = [torch.from_numpy(bag) for bag in bags]
    np.testing.assert_array_equal(fitted.predict_proba(tensors), whole)
    square = np.stack([bag[:2] for bag in bags])
    np.testing.assert_array_equal(fitted.predict_proba(square), fitted.predict_proba(list(square)))
    objects = np.empty(20, dtype=object)
    objects[:] = bags
    np.testing.assert_array_equal(fitted.predict_proba(objects), whole)


def test_bags_of_all_containers_are_the_same(data, fitted):
    bags, y = data
    expected = fitted.predict_proba(bags)
    nested = [bag.tolist() for bag in bags]
    weights = [torch.tensor(bag, requires_grad=True) for bag in bags]
    named = pd.Series(bags, index=range(5, 25))  # no row of the name 0, as after a split
    for form in (nested, tuple(bags), weights, list(map(pd.DataFrame, bags)), named):
        np.testing.assert_array_equal(fitted.predict_proba(form), expected)
    assert np.isfinite(cross_val_score(tiny(), named, y, cv=2)).all()
    # A table in lists stays a table, of bags of one row.
    assert len(fitted.predict(bags[0].tolist())) == len(bags[0])


def test_padding_does_not_matter():
    with isolated_rng(0):
        network = BagNetwork(3, 2).eval()
        bags = torch.randn(2, 5, 3)
    inside = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    other = bags.clone()
    other[0, 3:] = 100.0
    for one, two in zip(network(bags, inside), network(other, inside), strict=True):
        torch.testing.assert_close(one, two)


def test_training_pads_to_the_batch_only(monkeypatch):
    lengths = []

    class Spy(BagNetwork):
        def forward(self, bags, inside):
            lengths.append((bags.shape[1], int(inside.sum(dim=1).max())))
            return super().forward(bags, inside)

    monkeypatch.setattr(mil, "BagNetwork", Spy)
    bags = [np.random.default_rng(n).normal(size=(n, 3)) for n in (1, 2, 3, 5, 400)]
    model = tiny(batch_size=2, max_epochs=1, device="cpu").fit(bags, [0, 1, 0, 1, 0])
    assert len(lengths) == 2
    assert all(padded == longest for padded, longest in lengths)
    lengths.clear()
    model.set_params(max_instances=4).fit(bags, [0, 1, 0, 1, 0])
    assert all(padded == longest <= 4 for padded, longest in lengths)


def test_class_weights(data):
    bags, y = data
    plain = tiny().fit(bags, y).predict_proba(bags)
    weighted = tiny(class_weight={0: 1, 1: 20}).fit(bags, y).predict_proba(bags)
    assert weighted[:, 1].mean() > plain[:, 1].mean()
    names = np.where(y == 1, "tumour", "benign")
    model = tiny().fit(bags, names)
    assert model.classes_.tolist() == ["benign", "tumour"]
    np.testing.assert_array_equal(model.predict_proba(bags), plain)
    assert set(model.predict(bags)) <= {"benign", "tumour"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bags, y: (bags, y[:3], None), "y has 3 labels, but X has 20 bags"),
        (lambda bags, y: ([*bags[:19], bags[0][:0]], y, None), "row 19"),
        (lambda bags, y: ([*bags[:19], bags[0][:, :4]], y, None), "row 19"),
        (lambda bags, y: (bags, y, np.arange(20)), "X is a list"),
        (lambda bags, y: (bags, np.zeros(20), None), "one class"),
        (lambda bags, y: (bags, y * 0.3, None), "label type"),
        (lambda bags, y: (bags[0], [0, 1] * 10, np.zeros(len(bags[0]))), "groups name 1 bags"),
        (lambda bags, y: (bags[0], [0, 1], [0, 1]), "groups and X have inconsistent lengths"),
        (
            lambda bags, y: (np.concatenate(bags[:2])[:4], [0, 1, 1, 1], [0, 0, 1, 1]),
            "different labels",
        ),
        (lambda bags, y: ([*bags[:19], bags[0] * np.nan], y, None), "NaN"),
        (lambda bags, y: ([csr_matrix(bag) for bag in bags], y, None), "row 0 .* dense table"),
    ],
)
def test_bad_input(data, change, message):
    X, y, groups = change(*data)
    with pytest.raises(ValueError, match=message):
        tiny().fit(X, y, groups=groups)


@pytest.mark.parametrize("X", [[], (), np.array([]), np.empty((0, 5, 10)), np.empty(0, object)])
def test_no_bags(fitted, X):
    for method in (fitted.predict, fitted.predict_proba, fitted.attention):
        with pytest.raises(ValueError, match="X holds no bags: give at least one"):
            method(X)
    with pytest.raises(ValueError, match="X holds no bags"):
        tiny().fit(X, [])


@pytest.mark.parametrize("sizes", [(0,), (-8,), (8.0,), ("8",)])
def test_bad_layers(data, sizes):
    with pytest.raises(ValueError, match=r"'hidden_sizes' .* integers of at least 1"):
        tiny(hidden_sizes=sizes).fit(*data)


@parametrize_with_checks([tiny(max_epochs=12, learning_rate=3e-2, batch_size=32)])
def test_check_estimator(estimator, check):
    check(estimator)


def test_check_parameters():
    check_param_validation("AttentionMILClassifier", tiny())


def test_copies_and_composition(data, fitted, tmp_path):
    bags, y = data
    expected = fitted.predict_proba(bags)
    np.testing.assert_array_equal(tiny().fit(bags, y).predict_proba(bags), expected)
    copied = pickle.load(io.BytesIO(pickle.dumps(fitted)))
    np.testing.assert_array_equal(copied.predict_proba(bags), expected)
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(bags), expected)
    np.testing.assert_array_equal(loaded.attention(bags)[3], fitted.attention(bags)[3])
    assert cross_val_score(tiny(), bags, y, cv=2).shape == (2,)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_killed_fit_goes_on(data, tmp_path, share):
    def die(epoch, history):
        if epoch == 1:
            raise KeyboardInterrupt

    bags, y = data
    options = {"max_epochs": 4, "max_instances": 3, "dropout": 0.2, "validation_fraction": share}
    whole = tiny(**options).fit(bags, y)
    with pytest.raises(KeyboardInterrupt):
        tiny(**options, checkpoint_dir=tmp_path, callbacks=die).fit(bags, y)
    resumed = tiny(**options, checkpoint_dir=tmp_path).fit(bags, y)
    np.testing.assert_array_equal(resumed.predict_proba(bags), whole.predict_proba(bags))


# ---- validation ----------------------------------------------------------------------------------


def test_the_best_epoch_is_kept():
    bags, y, _ = bags_with_keys(60, shift=1.0)
    options = {"validation_fraction": 0.3, "max_epochs": 60, "learning_rate": 3e-2}
    model = tiny(**options).fit(bags, y)
    losses = model.history_["validation_loss"]
    best = int(losses.idxmin())
    assert best < 50  # it learns the bags by heart afterwards
    assert losses.iloc[-1] > 1.2 * losses[best]

    def fit(n_epochs):
        stop = lambda epoch, history: epoch + 1 == n_epochs  # noqa: E731
        return tiny(**options, callbacks=stop).fit(bags, y).predict_proba(bags)

    np.testing.assert_array_equal(fit(best + 1), model.predict_proba(bags))
    assert not np.array_equal(fit(best), model.predict_proba(bags))
    stopped = tiny(**options, callbacks=EarlyStopping("validation_loss", patience=5)).fit(bags, y)
    assert stopped.n_iter_ < 60
    last = tiny(**options | {"validation_fraction": 0.0}).fit(bags, y)
    assert "validation_loss" not in last.history_


def test_validation_is_the_loss_of_bags_that_nothing_is_learned_from(data):
    bags, y = data
    fits = [tiny(validation_fraction=0.3, class_weight={0: 1.0, 1: 3.0}, max_epochs=1)]
    fits[0].fit(bags, y)
    moved = []
    for number in range(len(bags)):
        other = [bag + 1.0 if k == number else bag for k, bag in enumerate(bags)]
        again = tiny(**fits[0].get_params()).fit(other, y)
        moved.append(not np.array_equal(again.mean_, fits[0].mean_))
    held = np.flatnonzero(~np.array(moved))
    assert np.bincount(y[held]).tolist() == [3, 3]
    train = np.flatnonzero(moved)
    alone = np.concatenate([bags[k] for k in train])
    np.testing.assert_allclose(fits[0].mean_, alone.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(fits[0].scale_, alone.std(axis=0), rtol=1e-5)
    given = fits[0].predict_proba([bags[k] for k in held])
    losses = -np.log(given[np.arange(6), y[held]]) * np.array([1.0, 3.0])[y[held]]
    assert fits[0].history_["validation_loss"][0] == pytest.approx(losses.mean(), rel=1e-5)


def test_too_few_bags_to_hold_any_out(data):
    bags, y = data
    message = r"validation_fraction=0.02 cannot .*: \{0: 10, 1: 10\}"
    with pytest.raises(ValueError, match=message):
        tiny(validation_fraction=0.02).fit(bags, y)
    with pytest.raises(ValueError, match=r"by class: \{0: 19, 1: 1\}"):
        tiny(validation_fraction=0.2).fit(bags, [0] * 19 + [1])


def test_class_weights_count_whatever_the_batch():
    rng = np.random.default_rng(0)
    y = (np.arange(64) % 8 == 0).astype(int)
    X = [rng.normal(size=(2, 3)) for _ in y]  # nothing to tell them apart by
    for batch_size in (1, 16):
        options = {"batch_size": batch_size, "max_epochs": 8, "pooling": "mean"}
        options |= {"hidden_sizes": (), "learning_rate": 0.01, "random_state": 0}
        plain = tiny(**options).fit(X, y).predict_proba(X)[:, 1].mean()
        heavy = tiny(**options, class_weight={0: 1, 1: 50}).fit(X, y).predict_proba(X)[:, 1].mean()
        assert heavy > plain + 0.1


def test_frames_go_by_the_names_of_their_columns(data):
    bags, y = data
    names = [f"m{i}" for i in range(10)]
    frames = [pd.DataFrame(bag, columns=names) for bag in bags]
    turned = [frame[names[::-1]] if n % 2 else frame for n, frame in enumerate(frames)]
    model = tiny().fit(frames, y)
    expected = model.predict_proba(frames)
    assert model.feature_names_in_.tolist() == names
    np.testing.assert_array_equal(model.predict_proba(turned), expected)
    np.testing.assert_array_equal(tiny().fit(turned, y).predict_proba(frames), expected)
    # As for a table: other columns first are an error, not another result.
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(turned[1:])
    other = frames[3].rename(columns={"m2": "age"})
    with pytest.raises(ValueError, match=r"row 3 of X has the columns m0, m1, age, .* row 0 has"):
        tiny().fit([*frames[:3], other, *frames[4:]], y)


def test_a_table_that_is_read_only(table, data):
    X, groups, _ = table
    X = X.copy()
    X.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(max_epochs=1).fit(X, data[1], groups=groups)


class LargestTensor(TorchDispatchMode):
    """Values of the largest tensor that is made inside; tracemalloc sees arrays only."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else [out]:
            if isinstance(made, torch.Tensor) and not func.is_view:
                self.values = max(self.values, made.numel())
        return out


@pytest.mark.parametrize("form", ["memory map", "list", "sparse", "file"])
@pytest.mark.usefixtures("fitted")  # all that a fit imports is imported by now
def test_memory_does_not_follow_the_instances(tmp_path, form):
    n_bags, length, d = 100, 1200, 128
    shape, kw = (n_bags * length, d), {"groups": np.repeat(np.arange(n_bags), length)}
    if form in ("memory map", "list"):
        X = np.memmap(tmp_path / "X", np.float32, mode="w+", shape=shape)
        X[::length, 0] = 1
        if form == "list":
            X, kw = list(X.reshape(n_bags, length, d)), {}
    else:
        X = random(*shape, density=0.01, format="csr", dtype=np.float32, random_state=0)
    if form == "file":
        anndata = pytest.importorskip("anndata")
        anndata.AnnData(csr_matrix(X)).write_h5ad(tmp_path / "X.h5ad")
        X = anndata.read_h5ad(tmp_path / "X.h5ad", backed="r")
    model = tiny(max_epochs=1, batch_size=1, accumulate=16, device="cpu")
    tracemalloc.start()
    try:
        with LargestTensor() as largest:
            model.fit(X, np.arange(n_bags) % 2, **kw)
            model.attention(X, **kw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = shape[0] * d
    assert largest.values < whole / 10
    assert peak < 0.75 * 4 * whole  # blocks of a fixed size, and numbers of the rows


def forms(table, groups, n_bags):
    """The same bags in all containers: name, X, and what else a call takes."""
    bags, more = [table[groups == number] for number in range(n_bags)], {"groups": groups}
    yield "table", table, more
    yield "doubles", table.astype(float), more
    yield "tensor", torch.from_numpy(table), more
    yield "frame", pd.DataFrame(table).rename(columns=str), more
    yield "sparse", csr_matrix(table), more
    yield "columns", csr_matrix(table).tocsc(), more
    yield "list", bags, {}
    yield "list of doubles", [bag.astype(float) for bag in bags], {}
    yield "list of columns", [np.asfortranarray(bag) for bag in bags], {}
    yield "list of frames", [pd.DataFrame(bag).rename(columns=str) for bag in bags], {}


@pytest.mark.parametrize("joined", [16, 200, 2**22])
def test_all_containers_give_the_same_model(table, data, tmp_path, monkeypatch, joined):
    monkeypatch.setattr(mil, "_JOINED_VALUES", joined)  # lists stay lists, of some bags or of each
    X, groups, _ = table
    groups = np.unique(groups, return_inverse=True)[1]
    X = np.where(X > 1, 0, X).astype(np.float32)
    X[:, 3] = 7.1  # no spread
    path = tmp_path / "X"
    X.tofile(path)
    options = {"max_instances": 3, "random_state": 1}
    expected = tiny(**options).fit(X, data[1], groups=groups)
    proba, shares = (f(X, groups=groups) for f in (expected.predict_proba, expected.attention))
    in_file = np.memmap(path, np.float32, mode="r", shape=X.shape)
    for name, form, more in (
        ("memory map", in_file, {"groups": groups}),
        *forms(X.copy(), groups, 20),
    ):
        model = tiny(**options).fit(form, data[1], **more)
        np.testing.assert_allclose(model.mean_, expected.mean_, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(model.scale_, expected.scale_, rtol=1e-6, err_msg=name)
        found = model.attention(form, **more)
        found = found if more else np.concatenate(found)
        np.testing.assert_allclose(model.predict_proba(form, **more), proba, atol=1e-6)
        np.testing.assert_allclose(found, shares, atol=1e-6)
        for part in [form] if more else form:
            values = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
            assert (values[:, 3] == np.asarray(7.1, np.float32)).all()  # nobody wrote to it
    np.testing.assert_allclose(expected.mean_, X.mean(axis=0, dtype=float), rtol=1e-6)
    spread = X.std(axis=0, dtype=float)
    np.testing.assert_allclose(expected.scale_, np.where(spread > 0, spread, 1), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_a_bad_value_in_any_bag_is_found(data, fitted, monkeypatch, bad):
    monkeypatch.setattr(mil, "_JOINED_VALUES", 64)
    bags = [bag.astype(float) for bag in data[0]]
    bags[17][-1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        tiny().fit(bags, data[1])
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        fitted.predict(bags)


@pytest.mark.parametrize("form", ["table", "list", "sparse"])
def test_an_accelerator_takes_what_fits(table, data, monkeypatch, form):
    monkeypatch.setattr(mil, "_JOINED_VALUES", 64)
    X, groups, _ = table
    X = {"table": X, "list": data[0], "sparse": csr_matrix(X)}[form]
    kw = {} if form == "list" else {"groups": groups}
    options = {"max_instances": 3, "batch_size": 4, "precision": "fp32"}
    expected = tiny(max_epochs=2, device="cpu", **options).fit(X, data[1], **kw)
    expected = expected.predict_proba(X, **kw)
    for free in (2**40, 500):
        waited = []
        for max_epochs in (1, 2):
            model = tiny(max_epochs=max_epochs, device="cuda", **options)
            with simulated_accelerator(free) as waits:
                model.fit(X, data[1], **kw)
                waited.append(len(waits))
        with simulated_accelerator(free):
            found = model.predict_proba(X, **kw)
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)
        # Where the data lie on the device nothing waits but the end of an epoch.
        assert (waited[1] - waited[0] <= 3) == (form != "sparse" and free > 500)


def test_a_column_of_labels_is_warned_of_once(data, table):
    X, groups, _ = table
    column = data[1][:, None]
    for form, more in ((data[0], {}), (X, {"groups": groups})):
        with pytest.warns(DataConversionWarning, match="column-vector") as caught:
            tiny(max_epochs=1).fit(form, column, **more)
        assert len(caught) == 1
