"""Multiple instances: attention finds what decides, bags of all forms, checks, copies, resume."""

import io
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from diffaugkit import load
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


def test_padding_does_not_matter():
    with isolated_rng(0):
        network = BagNetwork(3, 2).eval()
        bags = torch.randn(2, 5, 3)
    inside = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    other = bags.clone()
    other[0, 3:] = 100.0
    for one, two in zip(network(bags, inside), network(other, inside), strict=True):
        torch.testing.assert_close(one, two)


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
        (lambda bags, y: (bags, y[:3], None), "inconsistent"),
        (lambda bags, y: ([*bags[:19], bags[0][:0]], y, None), "row 19"),
        (lambda bags, y: ([*bags[:19], bags[0][:, :4]], y, None), "row 19"),
        (lambda bags, y: (bags, y, np.arange(20)), "X is a list"),
        (lambda bags, y: (bags, np.zeros(20), None), "one class"),
        (lambda bags, y: (bags, y * 0.3, None), "label type"),
        (lambda bags, y: (bags[0], [0, 1] * 10, np.zeros(len(bags[0]))), "inconsistent"),
        (
            lambda bags, y: (np.concatenate(bags[:2])[:4], [0, 1, 1, 1], [0, 0, 1, 1]),
            "different labels",
        ),
        (lambda bags, y: ([*bags[:19], bags[0] * np.nan], y, None), "NaN"),
    ],
)
def test_bad_input(data, change, message):
    X, y, groups = change(*data)
    with pytest.raises(ValueError, match=message):
        tiny().fit(X, y, groups=groups)


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


def test_a_killed_fit_goes_on(data, tmp_path):
    def die(epoch, history):
        if epoch == 1:
            raise KeyboardInterrupt

    bags, y = data
    options = {"max_epochs": 4, "max_instances": 3, "dropout": 0.2}
    whole = tiny(**options).fit(bags, y)
    with pytest.raises(KeyboardInterrupt):
        tiny(**options, checkpoint_dir=tmp_path, callbacks=die).fit(bags, y)
    resumed = tiny(**options, checkpoint_dir=tmp_path).fit(bags, y)
    np.testing.assert_array_equal(resumed.predict_proba(bags), whole.predict_proba(bags))
