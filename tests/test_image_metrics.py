"""DINO's evaluation protocols against slow, obvious versions of themselves and peers."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, jaccard_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from diffaugkit.arrays import channel_last, guess_range
from diffaugkit.metrics import (
    WeightedKNNClassifier,
    boundary_f,
    copy_detection_features,
    frechet_distance,
    inception_extractor,
    jaccard_j,
    linear_probe,
    propagate_labels,
    retrieval_map,
    weighted_knn_accuracy,
)
from diffaugkit.metrics import neighbors as neighbor_metrics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def classes(n, k, seed=0):
    return np.random.default_rng(seed).integers(k, size=n)


def cosine(A, B):
    A = A / np.linalg.norm(A, axis=1, keepdims=True)
    return A @ (B / np.linalg.norm(B, axis=1, keepdims=True)).T


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:600:2], y[:600:2], X[1:600:2], y[1:600:2]


# ------------------------------------------------------------------ weighted k-NN


def slow_weighted_votes(X, y, X_test, k, temperature, n_classes):
    votes = np.zeros((len(X_test), n_classes))
    for i, similarities in enumerate(cosine(X_test, X)):
        for j in np.argsort(-similarities)[:k]:
            votes[i, y[j]] += math.exp(similarities[j] / temperature)
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 10, 20, 100, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_weighted_knn_equals_the_double_loop(k, temperature, monkeypatch):
    X, y, X_test, y_test = normal(130, 6), classes(130, 4), normal(37, 6, seed=1), classes(37, 4)
    X[:, 0] += y
    votes = slow_weighted_votes(X, y, X_test, k, temperature, 4)
    model = WeightedKNNClassifier(k, temperature).fit(X, y)
    assert np.allclose(model.predict_proba(X_test), votes, rtol=1e-10, atol=1e-14)
    known = np.mean(votes.argmax(axis=1) == y_test)
    assert weighted_knn_accuracy(X, y, X_test, y_test, k, temperature) == known
    # Blocks of one row give what one block gives.
    whole = model.predict_proba(X_test)
    monkeypatch.setattr(neighbor_metrics, "_BLOCK", 1)
    assert np.allclose(model.predict_proba(X_test), whole, rtol=1e-12)


def test_weighted_knn_on_digits(digits):
    X, y, X_test, y_test = digits
    names = np.array([f"digit {i}" for i in range(10)], dtype=object)
    accuracy = weighted_knn_accuracy(X, names[y], X_test, names[y_test], k=(10, 20, 10_000))
    assert accuracy[20] == weighted_knn_accuracy(X, y, X_test, y_test)
    assert accuracy[10] > 0.9
    assert accuracy[10_000] == weighted_knn_accuracy(X, y, X_test, y_test, k=300)
    # float32 and tensors too; the scale of a row does not matter.
    scaled = torch.from_numpy(X.astype(np.float32)) * torch.arange(1, 301)[:, None]
    assert weighted_knn_accuracy(scaled, y, X_test, y_test) == pytest.approx(accuracy[20], abs=0.01)
    # A class that training lacks is an error, not a crash.
    assert weighted_knn_accuracy(X, y, X_test, np.full(300, 99)) == 0.0
    with pytest.raises(ValueError, match="k must hold at least one"):
        weighted_knn_accuracy(X, y, X_test, y_test, k=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each image may be a class of its own
        assert weighted_knn_accuracy(X, np.arange(300), X, np.arange(300), k=1) == 1.0


def test_weighted_knn_equals_lightlys(digits):
    peer = pytest.importorskip("lightly.utils.benchmarking.knn")
    X, y, X_test, _ = digits
    unit = [torch.nn.functional.normalize(torch.from_numpy(Z), dim=1) for Z in (X, X_test)]
    known = peer.knn_predict(
        unit[1], unit[0].T, torch.from_numpy(y), num_classes=10, knn_k=20, knn_t=0.07
    )
    model = WeightedKNNClassifier(20, 0.07).fit(X, y)
    assert np.array_equal(model.predict(X_test), known[:, 0].numpy())


def test_weighted_knn_with_a_tiny_temperature_is_the_nearest_neighbour(digits):
    X, y, X_test, _ = digits
    nearest = y[cosine(X_test, X).argmax(axis=1)]
    assert np.array_equal(WeightedKNNClassifier(20, 1e-9).fit(X, y).predict(X_test), nearest)


def test_weighted_knn_in_a_search(digits):
    X, y, _, _ = digits
    model = make_pipeline(PCA(random_state=0), WeightedKNNClassifier())
    grid = {"pca__n_components": [1, 20], "weightedknnclassifier__temperature": [0.07, 1.0]}
    search = GridSearchCV(model, grid, cv=3, scoring="neg_log_loss").fit(X, y)
    assert search.best_params_ == {
        "pca__n_components": 20,
        "weightedknnclassifier__temperature": 0.07,
    }


@parametrize_with_checks([WeightedKNNClassifier(n_neighbors=5)])
def test_check_estimator(estimator, check):
    check(estimator)


# ------------------------------------------------------------------ linear probe


def slow_full_batch_descent(X, y, X_test, rate, epochs, n_classes):
    """Momentum 0.9, cosine decay, one step an epoch, in float64."""
    mean, std = X.mean(axis=0), X.std(axis=0)
    X, X_test = (np.c_[(Z - mean) / std, np.ones(len(Z))] for Z in (X, X_test))
    weight = np.zeros((X.shape[1], n_classes))
    velocity = np.zeros_like(weight)
    for epoch in range(epochs):
        logits = X @ weight
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        velocity = 0.9 * velocity + X.T @ (p - np.eye(n_classes)[y]) / len(X)
        weight -= rate * (len(X) / 256) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * velocity
    return (X_test @ weight).argmax(axis=1)


def test_linear_probe_equals_descent_by_hand():
    X, y = normal(90, 5), classes(90, 3)
    X[:, 0] += 0.7 * y
    X_test, y_test = normal(200, 5, seed=1), classes(200, 3, seed=1)
    X_test[:, 0] += 0.7 * y_test
    for rate in (0.01, 0.3):
        known = slow_full_batch_descent(X, y, X_test, rate, 12, 3)
        result = linear_probe(
            X, y, X_test, y_test, learning_rates=[rate], max_epochs=12, batch_size=500
        )
        assert result["accuracy"] == pytest.approx(np.mean(known == y_test), abs=1e-9)
        assert 0.4 < result["accuracy"] < 0.9
        assert result["learning_rate"] == rate


def test_linear_probe_is_of_float32_whatever_the_default(digits):
    expected = linear_probe(*digits, max_epochs=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert linear_probe(*digits, max_epochs=2) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_probe_comes_near_logistic_regression(digits):
    X, y, X_test, y_test = digits
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    result = linear_probe(X * 1e3, y, X_test * 1e3, y_test)
    assert result["accuracy"] == pytest.approx(model.fit(X, y).score(X_test, y_test), abs=0.03)
    best = max(result["validation"].values())
    assert result["validation"][None, result["learning_rate"]] == best
    assert len(result["validation"]) == 7
    again = linear_probe(X * 1e3, y, X_test * 1e3, y_test)
    assert again == result


def test_linear_probe_sweeps_layers_and_lets_no_test_sample_choose(digits):
    X, y, X_test, y_test = digits
    layers = {"noise": normal(300, 8), "pixels": X}
    tests = {"noise": normal(300, 8, seed=1), "pixels": X_test}
    result = linear_probe(layers, y, tests, y_test, max_epochs=30, learning_rates=(0.01, 0.1))
    assert result["layers"] == "pixels"
    assert set(result["validation"]) == {(n, r) for n in layers for r in (0.01, 0.1)}
    # Other test labels change the accuracy and nothing else.
    other = linear_probe(layers, y, tests, y_test[::-1], max_epochs=30, learning_rates=(0.01, 0.1))
    assert other.pop("accuracy") < result.pop("accuracy")
    assert other == result


def test_linear_probe_survives_a_learning_rate_that_diverges(digits):
    X, y, X_test, y_test = digits
    result = linear_probe(X, y, X_test, y_test, learning_rates=(0.1, 1e38), max_epochs=20)
    assert result["learning_rate"] == 0.1
    assert result["validation"][None, 1e38] == 0.0
    assert linear_probe(X, y, X_test, np.full(300, 77), max_epochs=1)["accuracy"] == 0.0


# ------------------------------------------------------------------ retrieval


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_retrieval_equals_scikit_learn_query_by_query(seed, ties):
    rng = np.random.default_rng(seed)
    X, queries = rng.normal(size=(20, 3)), rng.normal(size=(7, 3))
    if ties:
        # Axes of small integers have similarities that are equal, and exactly so.
        X, queries = np.eye(4)[rng.integers(4, size=20)], np.eye(4)[rng.integers(4, size=7)]
    y, query_y = rng.integers(4, size=20), rng.integers(4, size=7)
    values = retrieval_map(X, y, queries, query_y, average=None)
    known = [
        average_precision_score(y == label, scores) if label in y else np.nan
        for label, scores in zip(query_y, cosine(queries, X), strict=True)
    ]
    assert values == pytest.approx(known, nan_ok=True, abs=1e-12)
    if not np.isnan(known).all():
        macro = retrieval_map(X, y, queries, query_y)
        assert macro == pytest.approx(np.nanmean(known))
        pairs = (query_y[:, None] == y).ravel()
        micro = retrieval_map(X, y, queries, query_y, average="micro")
        assert micro == pytest.approx(average_precision_score(pairs, cosine(queries, X).ravel()))


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_retrieval_leaves_the_query_out(block, monkeypatch):
    monkeypatch.setattr(neighbor_metrics, "_BLOCK", block)
    X, y = normal(30, 4), classes(30, 3)
    y[5] = 9  # the only one of its class: no query
    known = []
    for i in range(30):
        others = np.arange(30) != i
        wanted = y[others] == y[i]
        known.append(
            average_precision_score(wanted, cosine(X[i : i + 1], X[others])[0])
            if wanted.any()
            else np.nan
        )
    assert retrieval_map(X, y, average=None) == pytest.approx(known, nan_ok=True)
    assert retrieval_map(X, y) == pytest.approx(np.nanmean(known))
    assert np.isnan(known).sum() == 1


def test_retrieval_with_junk():
    X, queries = normal(40, 5), normal(6, 5, seed=1)
    relevance = np.random.default_rng(2).integers(-1, 2, size=(6, 40))
    scores = cosine(queries, X)
    known = [
        average_precision_score(r[r >= 0], s[r >= 0])
        for r, s in zip(relevance, scores, strict=True)
    ]
    values = retrieval_map(X, query_features=queries, relevance=relevance, average=None)
    assert values == pytest.approx(known)


def test_retrieval_extremes():
    X = np.r_[np.tile([1.0, 0.0], (5, 1)), np.tile([0.0, 1.0], (5, 1))]
    assert retrieval_map(X, np.arange(10) // 5) == 1.0
    # No order among equal similarities: the precision is the share of the relevant.
    assert retrieval_map(np.ones((11, 2)), [0] * 6 + [1] * 5, average=None)[0] == 0.5


# ------------------------------------------------------------------ copy detection


def slow_gem(patches, p):
    return np.array([[np.mean(np.clip(c, 1e-6, None) ** p) ** (1 / p) for c in image.T]
                     for image in patches])  # fmt: skip


@pytest.mark.parametrize("p", [1, 3, 4])
def test_copy_detection_features_equal_the_definition(p):
    cls, patches = normal(5, 3), normal(5, 12, 3, seed=1)
    known = np.c_[cls, slow_gem(patches, p)]
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    features = copy_detection_features(cls, patches, p)
    assert np.allclose(features, known, rtol=1e-12)
    assert np.allclose(copy_detection_features(cls, patches.reshape(5, 3, 4, 3), p), known)
    tensors = (torch.tensor(x, dtype=torch.bfloat16) for x in (cls, patches))
    assert np.allclose(copy_detection_features(*tensors, p), known, atol=0.02)


def test_generalised_mean_nears_the_maximum_without_overflow():
    patches = np.abs(normal(4, 30, 6)) * 1e3
    features = copy_detection_features(np.zeros((4, 6)), patches, 500)
    top = patches.max(axis=1)
    assert np.allclose(features[:, 6:], top / np.linalg.norm(top, axis=1, keepdims=True), rtol=0.02)
    assert np.allclose(features[:, :6], 0.0)


def test_whitened_features_find_copies_among_near_images():
    # All images share a large part; whitening on other images removes it.
    rng = np.random.default_rng(0)

    def tokens(n):
        shared = 20.0 + 10.0 * rng.normal(size=(n, 1, 1)) * np.ones(8)
        own = np.abs(rng.normal(size=(n, 1, 8)))
        return (shared + own)[:, 0], np.abs(shared + own + 0.3 * rng.normal(size=(n, 9, 8)))

    whitening = PCA(10, whiten=True).fit(copy_detection_features(*tokens(500)))
    cls, patches = tokens(60)
    copies = cls + 0.1 * rng.normal(size=cls.shape), patches + 0.1 * rng.normal(size=patches.shape)
    y, score = np.arange(60), {}
    for how in (None, whitening):
        database = copy_detection_features(cls, patches, whitening=how)
        queries = copy_detection_features(*copies, whitening=how)
        assert np.allclose(np.linalg.norm(queries, axis=1), 1.0)
        score[how] = retrieval_map(database, y, queries, y, average="micro")
    assert score[whitening] > max(0.5, score[None])


# ------------------------------------------------------------------ labels from frame to frame


def slow_propagation(frames, mask, n_context, topk, radius, temperature):
    """Token by token, at the resolution of the tokens; soft labels, scaled at the end."""
    names = np.unique(mask)
    h, w = mask.shape
    soft = [np.array([[(mask[i, j] == names).astype(float) for j in range(w)] for i in range(h)])]
    out = [mask]
    unit = [f / np.linalg.norm(f, axis=-1, keepdims=True) for f in frames]
    for t in range(1, len(frames)):
        context = sorted({0, *range(max(0, t - n_context), t)})
        new = np.zeros((h, w, len(names)))
        for i in range(h):
            for j in range(w):
                candidates = [
                    (float(unit[t][i, j] @ unit[c][a, b]), soft[c][a, b])
                    for c in context
                    for a in range(h)
                    for b in range(w)
                    if radius is None or max(abs(a - i), abs(b - j)) <= radius
                ]
                best = sorted(candidates, key=lambda pair: -pair[0])[:topk]
                weights = np.array([math.exp(s / temperature) for s, _ in best])
                new[i, j] = sum(
                    wt * label for wt, (_, label) in zip(weights / weights.sum(), best, strict=True)
                )
        soft.append(new)
        low, high = new.min(axis=(0, 1)), new.max(axis=(0, 1))
        scaled = np.where(high > low, (new - low) / np.where(high > low, high - low, 1), new)
        out.append(names[scaled.argmax(axis=-1)])
    return np.array(out)


@pytest.mark.parametrize(
    ("n_context", "topk", "radius", "temperature"),
    [(7, 5, 12, 0.1), (2, 3, 1, 0.1), (0, 5, None, 0.07), (1, 1, 2, 1.0), (3, 50, 0, 0.1)],
)
def test_propagation_equals_the_slow_version(n_context, topk, radius, temperature):
    frames = normal(6, 4, 5, 8)
    frames = frames[:1] + 0.6 * frames.cumsum(axis=0)
    mask = np.array([[0, 0, 7, 7, 0]] * 2 + [[0, 3, 3, 0, 0]] * 2)
    known = slow_propagation(list(frames), mask, n_context, topk, radius, temperature)
    labels = propagate_labels(frames, mask, n_context, topk, radius, temperature)
    assert np.array_equal(labels, known)
    assert len(np.unique(known[1:])) == 3
    tensors = [torch.from_numpy(frame) for frame in frames]
    assert np.array_equal(
        propagate_labels(tensors, mask, n_context, topk, radius, temperature), known
    )


def moving_square(n_frames=6, size=12, patch=4):
    """Tokens and masks of a square that moves one token to the right in each frame."""
    object_token, ground = normal(2, 16)
    tokens = np.tile(ground, (n_frames, size, size, 1))
    masks = np.zeros((n_frames, size * patch, size * patch), dtype=np.uint8)
    for t in range(n_frames):
        tokens[t, 4:8, t : t + 4] = object_token
        masks[t, 4 * patch : 8 * patch, t * patch : (t + 4) * patch] = 1
    return tokens + 0.05 * normal(*tokens.shape, seed=1), masks


def test_propagation_follows_an_object():
    tokens, masks = moving_square()
    labels = propagate_labels(tokens, masks[0])
    assert labels.shape == masks.shape
    assert labels.dtype == masks.dtype
    assert np.array_equal(labels[0], masks[0])
    assert jaccard_j(masks[1:], labels[1:]) > 0.9
    assert boundary_f(masks[1:], labels[1:], tolerance=2) > 0.95
    still = np.broadcast_to(masks[0], masks.shape)
    assert jaccard_j(masks[1:], still[1:]) < 0.6


def test_propagation_looks_no_farther_than_its_radius():
    left, right = np.eye(2)
    frames = np.array([[[left, right, right, right]], [[right, right, right, left]]])
    assert propagate_labels(frames, [[1, 0, 0, 0]], topk=1, radius=None)[1].tolist() == [
        [0, 0, 0, 1]
    ]
    assert 1 not in propagate_labels(frames, [[1, 0, 0, 0]], topk=1, radius=1)[1]


masks = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).random((2, 3, 9, 11)) < 0.4
)


@given(masks)
@settings(max_examples=25, deadline=None)
def test_region_similarity_equals_scikit_learn(pair):
    true, predicted = pair
    values = jaccard_j(true, predicted, average=False)
    known = [jaccard_score(t.ravel(), p.ravel()) for t, p in zip(true, predicted, strict=True)]
    assert values.shape == (1, 3)
    assert values[0] == pytest.approx(known)
    assert jaccard_j(true, predicted) == pytest.approx(np.mean(known))


def test_region_similarity_of_several_objects():
    true = np.array([[[1, 1, 2, 2]], [[0, 0, 2, 2]]])
    predicted = np.array([[[1, 0, 2, 2]], [[0, 0, 5, 2]]])
    values = jaccard_j(true, predicted, average=False)
    assert values.tolist() == [[0.5, 1.0], [1.0, 0.5]]
    assert jaccard_j(true, true) == boundary_f(true, true) == 1.0


def slow_boundary_f(true, predicted, reach):
    def boundary(mask):
        h, w = mask.shape
        return [
            (i, j)
            for i in range(h)
            for j in range(w)
            if any(
                mask[i, j] != mask[min(i + a, h - 1), min(j + b, w - 1)]
                for a, b in ((0, 1), (1, 0), (1, 1))
            )
        ]

    def near(points, others):
        return np.mean([min(math.dist(p, q) for q in others) <= reach for p in points])

    true, predicted = boundary(true), boundary(predicted)
    if not true or not predicted:
        return float(not true and not predicted)
    precision, recall = near(predicted, true), near(true, predicted)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 0.25]))
@settings(max_examples=25, deadline=None)
def test_contour_accuracy_equals_the_pairs_of_points(seed, tolerance):
    rng = np.random.default_rng(seed)
    true, predicted = np.zeros((2, 13, 17), dtype=bool)
    for mask in (true, predicted):
        i, j, h, w = rng.integers(0, 9, size=4)
        mask[i : i + h + 1, j : j + w + 1] = True
    reach = math.ceil(tolerance * math.hypot(13, 17))
    known = slow_boundary_f(true, predicted, reach)
    assert boundary_f(true, predicted, tolerance=tolerance) == pytest.approx(known)
    assert boundary_f(true, predicted, tolerance=reach) == pytest.approx(known)


def test_contour_accuracy_closed_forms():
    square = np.zeros((100, 100), dtype=int)
    square[30:70, 30:70] = 4
    # 0.008 of a diagonal of 141 pixels is rounded up to 2.
    assert boundary_f(square, np.roll(square, 2, axis=0)) == 1.0
    assert boundary_f(square, np.roll(square, 3, axis=0)) < 1.0
    assert boundary_f(square, np.zeros_like(square)) == 0.0
    assert boundary_f(np.full((9, 9), 4), np.full((9, 9), 4)) == 1.0


# ------------------------------------------------------------------ images and Inception


def test_images_of_every_layout_become_channel_last():
    image = np.random.default_rng(0).integers(255, size=(4, 6, 7, 3), dtype=np.uint8)
    first = torch.from_numpy(image).permute(0, 3, 1, 2)
    grey = image[..., 0]
    for given_images in (image, first, first.numpy(), list(image), list(first)):
        assert np.array_equal(channel_last(given_images), image)
        assert channel_last(given_images).dtype == np.uint8
    assert np.array_equal(channel_last(image.reshape(4, -1), (6, 7, 3)), image)
    for given_images in (grey, list(grey), torch.from_numpy(grey), first[:, :1]):
        assert np.array_equal(channel_last(given_images), grey[..., None])
    assert np.array_equal(channel_last(grey.reshape(4, -1), (6, 7)), grey[..., None])
    Image = pytest.importorskip("PIL.Image")
    assert np.array_equal(channel_last([Image.fromarray(x) for x in image]), image)
    # Sides that could be channels: an array's last axis has the word, a tensor's second.
    odd = np.zeros((2, 3, 5, 4))
    assert channel_last(odd).shape == (2, 3, 5, 4)
    assert channel_last(torch.from_numpy(odd)).shape == (2, 5, 4, 3)


def test_values_of_black_and_white_are_guessed():
    assert guess_range(np.zeros((1, 2, 2, 1), dtype=np.uint8)) == (0.0, 255.0)
    for low, high, known in ((0.2, 0.9, (0, 1)), (-0.2, 0.9, (-1, 1)), (-3.0, 5.0, (-3, 5))):
        assert guess_range(np.array([low, high])) == known


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Files of a random Inception, and the network itself."""
    torchvision = pytest.importorskip("torchvision")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("inception")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.inception_v3(weights=None, init_weights=False)
        # Without training, the usual weights would let the signal die out before the end.
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    save_file(network.state_dict(), folder / "inception.safetensors")
    network.fc = torch.nn.Identity()
    return folder, network.eval()


def test_inception_gives_the_features_before_the_classifier(inception):
    folder, network = inception
    images = np.random.default_rng(0).integers(255, size=(3, 40, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        known = network(x).numpy()
    extractor = inception_extractor(folder / "inception.pth", batch_size=2, device="cpu")
    features = extractor(images)
    assert features.shape == (3, 2048)
    scale = known.std(axis=0).max()
    assert 1e-3 < scale < 1e3
    assert np.allclose(features, known, atol=1e-4 * scale)
    # The same pictures in another layout and range, from the other kind of file.
    other = inception_extractor(str(folder / "inception.safetensors"), device="cpu")
    tensor = torch.from_numpy(images[:2]).permute(0, 3, 1, 2).float() / 255
    assert np.allclose(other.transform(tensor), known[:2], atol=1e-3 * scale)
    grey = frechet_distance(images[..., 0], images[..., 0], extractor=other)
    assert grey == pytest.approx(0.0, abs=1e-6)


def test_inception_says_what_is_wrong(inception, tmp_path):
    folder, _ = inception
    extractor = inception_extractor(folder / "inception.pth", device="cpu")
    with pytest.raises(ValueError, match=r"values from 0 to 300; .* pixel_range"):
        extractor.transform(np.array([0.0, 300.0] * 24).reshape(1, 4, 4, 3))
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        extractor.transform(np.zeros((1, 8, 8, 4)))
    with pytest.raises(FileNotFoundError, match="no file"):
        inception_extractor(tmp_path / "nothing.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a state dict of torchvision's inception_v3"):
        inception_extractor(tmp_path / "other.pth")


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightedKNNClassifier(0).fit(normal(9, 2), [0, 1, 0] * 3), "n_neighbors must"),
        (lambda: WeightedKNNClassifier(temperature=0).fit(normal(3, 2), [0, 1, 0]), "temperature"),
        (lambda: weighted_knn_accuracy(normal(9, 2), [0] * 8, normal(2, 2), [0, 0]), "8 labels"),
        (lambda: weighted_knn_accuracy(normal(9, 2), [0] * 9, normal(2, 3), [0, 0]), "3 features"),
        (lambda: weighted_knn_accuracy(normal(9, 2), [0] * 9, normal(2, 2), [0, 0], (3, 0)), "k|n"),
        (lambda: linear_probe(normal(9, 2), [0] * 9, normal(2, 3), [0, 0]), "test part has 3"),
        (lambda: linear_probe({"a": normal(9, 2)}, [0] * 9, normal(2, 2), [0, 0]), "same names"),
        (
            lambda: linear_probe(
                normal(9, 2), [0] * 9, normal(2, 2), [0, 0], learning_rates=[0.1, -1]
            ),
            "learning_rates must",
        ),
        (
            lambda: linear_probe(normal(9, 2), [0] * 9, normal(2, 2), [0, 0], max_epochs=0),
            "max_epochs must",
        ),
        (
            lambda: linear_probe(normal(9, 2), [0] * 9, normal(2, 2), [0, 0], validation_size=1),
            "validation_size must",
        ),
        (lambda: retrieval_map(normal(9, 2)), "y gives the classes"),
        (lambda: retrieval_map(normal(9, 2), [0] * 9, normal(2, 2)), "query_labels those of"),
        (lambda: retrieval_map(normal(9, 2), [0] * 9, normal(2, 3), [0, 0]), "has 3 features"),
        (lambda: retrieval_map(normal(9, 2), range(9)), "no query has a relevant"),
        (lambda: retrieval_map(normal(9, 2), range(9), average="micro"), "no query has a relevant"),
        (lambda: retrieval_map(normal(9, 2), [0] * 9, average="mean"), "average must be"),
        (lambda: retrieval_map(normal(3, 2), relevance=[[1, 0, 2]] * 3), "hold only -1, 0 and 1"),
        (
            lambda: retrieval_map(normal(3, 2), [0] * 3, relevance=np.ones((3, 3), int)),
            "not both",
        ),
        (lambda: copy_detection_features(normal(3, 2), normal(2, 4, 2)), r"\(3, 2\) and \(2, 4"),
        (lambda: copy_detection_features(normal(3, 2), normal(3, 4, 2), p=0), "p must be"),
        (lambda: copy_detection_features(np.full((3, 2), np.nan), normal(3, 4, 2)), "finite"),
        (lambda: propagate_labels(normal(2, 3, 4), [[1]]), r"frame 0 .* got \(3, 4\)"),
        (lambda: propagate_labels([normal(3, 3, 2), normal(3, 4, 2)], [[1]]), "all of one shape"),
        (lambda: propagate_labels([], [[1]]), "at least one frame"),
        (lambda: propagate_labels(normal(2, 3, 3, 2), [[0.5]]), "int array"),
        (lambda: propagate_labels(normal(2, 3, 3, 2), [[1]], topk=0), "topk must"),
        (lambda: propagate_labels(normal(2, 3, 3, 2), [[1]], radius=-1), "radius must"),
        (lambda: propagate_labels(normal(2, 3, 3, 2), [[1]], temperature=0), "temperature must"),
        (lambda: jaccard_j(np.ones((2, 3), int), np.ones((3, 2), int)), "both be of shape"),
        (lambda: jaccard_j(np.zeros((2, 3), int), np.ones((2, 3), int)), "no object"),
        (lambda: boundary_f(np.ones((2, 3)), np.ones((2, 3))), "bool or int"),
        (lambda: boundary_f(np.ones((2, 3), int), np.ones((2, 3), int), tolerance=-1), "tolerance"),
        (lambda: channel_last(np.zeros((2, 9))), "give image_shape"),
        (lambda: channel_last(np.zeros((2, 9)), (3, 4)), "number of columns"),
        (lambda: channel_last(np.zeros((2, 9, 9, 9))), "1 to 4 channels"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("swap", [False, True])
def test_labels_of_another_kind_are_refused(digits, swap):
    X, y, X_test, y_test = digits
    y, y_test = (y.astype(str), y_test) if swap else (y, y_test.astype(str))
    for score in (weighted_knn_accuracy, linear_probe):
        with pytest.raises(ValueError, match=r"y_test .* are of another kind than those of y"):
            score(X, y, X_test, y_test)


def test_seeds_and_numbers_of_neighbours_of_any_kind(digits):
    X, y, X_test, y_test = digits
    assert set(weighted_knn_accuracy(X, y, X_test, y_test, k={5, 9})) == {5, 9}
    for seed in (None, np.random.RandomState(0)):
        assert linear_probe(X, y, X_test, y_test, max_epochs=1, random_state=seed)["accuracy"] > 0


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_retrieval_does_not_depend_on_the_order_of_equal_rows(average, dtype):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(2, 23))[rng.integers(0, 2, 20)].astype(dtype)
        y, order = rng.integers(0, 2, 20), rng.permutation(20)
        whole = retrieval_map(X, y, average=average)
        assert retrieval_map(X[order], y[order], average=average) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_cosines_that_are_close_are_no_ties(average):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 3000)
    X = normal(1, 16) + 0.01 * (normal(5, 16, seed=1)[y] + normal(3000, 16, seed=2))
    X = X.astype(np.float32)
    scores = cosine(X[:20].astype(np.float64), X[20:].astype(np.float64))
    wanted = y[:20, None] == y[20:]
    known = average_precision_score(wanted.ravel(), scores.ravel())
    if average == "macro":
        rows = zip(wanted, scores, strict=True)
        known = np.mean([average_precision_score(*row) for row in rows])
    found = retrieval_map(X[20:], y[20:], X[:20], y[:20], average=average)
    assert found == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("score", [weighted_knn_accuracy, retrieval_map, linear_probe])
def test_columns_of_tables_go_by_name(digits, score):
    X, y, X_test, y_test = digits
    names = [f"pixel {i}" for i in range(64)]
    X, X_test = (pd.DataFrame(part, columns=names) for part in (X, X_test))
    more = {"max_epochs": 1} if score is linear_probe else {}
    assert score(X, y, X_test[names[::-1]], y_test, **more) == score(X, y, X_test, y_test, **more)
