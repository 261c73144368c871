"""Zero-shot segmentation: merging against slow versions, known blocks, contracts."""

import pickle

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder, load
from diffaugkit.metrics import matched_dice, matched_iou
from diffaugkit.zero_shot_segmenter import (
    ZeroShotSegmenter,
    aggregate_attention,
    aggregate_features,
    anchor_positions,
    cluster_attention,
    guided_filter,
    merge_attention,
    symmetric_divergence,
)


def tiny_diffusion(**more):
    options = {"block_out_channels": (8, 8), "n_attention_levels": 2, "max_epochs": 1}
    return EmbeddingConditionedDiffusion(None, **{**options, "random_state": 0, **more})


def tiny(diffusion=None, **more):
    diffusion = tiny_diffusion() if diffusion is None else diffusion
    return ZeroShotSegmenter(diffusion, **{"n_anchors": 4, "random_state": 0, **more})


@pytest.fixture(scope="module")
def X():
    """Two flat halves, or quarters, of random grey, and some noise."""
    rng = np.random.default_rng(0)
    X = np.repeat(np.repeat(rng.integers(30, 220, size=(24, 2, 2, 1)), 6, axis=1), 5, axis=2)
    return (X + rng.integers(-9, 10, size=X.shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def diffusion(X):
    return FrozenEstimator(tiny_diffusion().fit(X))


@pytest.fixture(scope="module")
def fitted(X, diffusion):
    return tiny(diffusion).fit(X)


def random_maps(n, seed=0, peak=1.0):
    rng = np.random.default_rng(seed)
    maps = np.exp(peak * rng.normal(size=(n, n)))
    return maps / maps.sum(axis=1, keepdims=True)


# ---- the merging against a slow version of the paper's description -------------------------------


def slow_divergence(p, q):
    return 0.5 * np.sum(p * np.log(p / q)) + 0.5 * np.sum(q * np.log(q / p))


def slow_merge(attention, threshold, anchors, n_iterations):
    """Iterative attention merging, one pair at a time, in float64."""
    proposals = []
    for anchor in anchors:
        near = [a for a in attention if slow_divergence(attention[anchor], a) < threshold]
        proposals.append(np.mean(near, axis=0))
    for _ in range(n_iterations - 1):
        new, matched = [], set()
        for i, proposal in enumerate(proposals):
            if i in matched:
                continue
            near = [
                j
                for j, other in enumerate(proposals)
                if slow_divergence(proposal, other) < threshold
            ]
            matched |= set(near)
            new.append(np.mean([proposals[j] for j in near], axis=0))
        proposals = new
    return np.array(proposals)


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.35, 1.0, 50.0])
def test_merging_is_that_of_the_slow_version(threshold, n_iterations):
    for seed in range(3):
        attention = random_maps(36, seed=seed, peak=0.6)
        anchors = anchor_positions((6, 6), 4)
        expected = slow_merge(attention, threshold, anchors.tolist(), n_iterations)
        ours = merge_attention(
            torch.from_numpy(attention).float(), threshold, anchors, n_iterations
        )
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(ours.sum(dim=1).numpy(), 1.0, atol=1e-5)


def test_the_divergence_by_two_products():
    p, q = random_maps(30)[:7], random_maps(30, seed=1)
    expected = [[slow_divergence(a, b) for b in q] for a in p]
    ours = symmetric_divergence(*(torch.from_numpy(x).float() for x in (p, q)))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4)
    # More rows than one chunk, and zeros, of which no logarithm is.
    many = torch.eye(4).repeat(300, 1)
    found = symmetric_divergence(many[:4], many)
    assert found.shape == (4, 1200)
    assert torch.isfinite(found).all()
    assert (found[0, ::4] == 0).all()
    assert (found[0, 1::4] > 20).all()


def slow_aggregate(maps, strides, shape):
    """Every entry of every map, one at a time: bilinear where it looks, nearest who looks."""
    total = np.zeros((*shape, *shape))
    for size, found in maps.items():
        factor = strides[size] // strides[shape]
        found = found.reshape(*size, *size)
        large = np.zeros((*size, *shape))
        for i in range(shape[0]):
            for j in range(shape[1]):
                y, x = ((k + 0.5) / factor - 0.5 for k in (i, j))
                y, x = (min(max(v, 0), n - 1) for v, n in zip((y, x), size, strict=True))
                top, left = int(y), int(x)
                low, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
                a, b = y - top, x - left
                large[:, :, i, j] = (
                    (1 - a) * (1 - b) * found[:, :, top, left]
                    + (1 - a) * b * found[:, :, top, right]
                    + a * (1 - b) * found[:, :, low, left]
                    + a * b * found[:, :, low, right]
                )
        large /= large.sum(axis=(2, 3), keepdims=True)
        for i in range(shape[0]):
            for j in range(shape[1]):
                total[i, j] += np.sqrt(np.prod(size)) * large[i // factor, j // factor]
    total /= sum(np.sqrt(np.prod(size)) for size in maps)
    return total.reshape(np.prod(shape), -1)


def test_aggregation_against_a_loop_over_all_entries():
    # 13 x 10 pixels: the last row of the coarser grids reaches beyond the finest.
    strides = {(7, 5): 2, (4, 3): 4, (2, 2): 8}
    maps = {size: random_maps(size[0] * size[1], seed=size[0]) for size in strides}
    tensors = {size: torch.from_numpy(found) for size, found in maps.items()}
    ours = aggregate_attention(tensors, strides, (7, 5))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), slow_aggregate(maps, strides, (7, 5)), atol=1e-6)
    np.testing.assert_allclose(ours.sum(dim=1).numpy(), 1.0, atol=1e-5)


def test_aggregation_on_a_coarser_grid_averages():
    strides = {(4, 4): 1, (2, 2): 2}
    fine = random_maps(16)
    blocks = fine.reshape(2, 2, 2, 2, 2, 2, 2, 2)  # (rows, 2, columns, 2) twice
    coarse = blocks.sum(axis=(5, 7)).mean(axis=(1, 3)).reshape(4, 4)
    maps = {(4, 4): torch.from_numpy(fine), (2, 2): torch.eye(4)}
    ours = aggregate_attention(maps, strides, (2, 2))
    np.testing.assert_allclose(ours.numpy(), (4 * coarse + 2 * np.eye(4)) / 6, atol=1e-6)


def test_anchors_form_an_even_grid():
    assert anchor_positions((64, 64), 16)[:3].tolist() == [2 * 64 + 2, 2 * 64 + 6, 2 * 64 + 10]
    assert anchor_positions((2, 3), 16).tolist() == list(range(6))
    assert anchor_positions((5, 5), 1).tolist() == [12]


# ---- attention of a known structure --------------------------------------------------------------


def three_regions():
    regions = np.zeros((12, 10), int)
    regions[2:8, 2:6] = 1
    regions[8:, 6:] = 2
    return regions


class Attending:
    """Stands in for the U-Net's attention: positions of a region look at that region alone."""

    def __init__(self, regions):
        self.regions = regions

    def __call__(self, X, *, t="auto", conditional=False):
        self.asked = t, conditional
        maps = {}
        for step in (1, 2):
            part = self.regions[::step, ::step]
            same = (part.ravel()[:, None] == part.ravel()).astype(np.float32)
            same += 1e-4
            maps[part.shape] = (same / same.sum(axis=1, keepdims=True))[None]
        return maps


@pytest.mark.parametrize(
    "how", [{}, {"refine": True}, {"n_segments": 3, "cluster_on": "attention"}], ids=str
)
def test_blocks_come_out_exactly(X, monkeypatch, how):
    regions = three_regions()
    model = tiny_diffusion().fit(X)
    attending = Attending(regions)
    monkeypatch.setattr(model, "attention_maps", attending, raising=False)
    segmenter = tiny(
        FrozenEstimator(model), merge_threshold=1.0, n_anchors=16, timestep=40, **how
    ).fit(X)
    masks = segmenter.predict(X[:2])
    np.testing.assert_array_equal(masks, np.stack([regions, regions]))
    assert attending.asked == (40, False)
    assert segmenter.score(X[:2], np.stack([regions, regions])) == 1.0
    segmenter.set_params(conditional=True).predict(X[:1])
    assert attending.asked == (40, True)
    # One anchor sees its own region only: a segment of everything.
    assert (tiny(FrozenEstimator(model), n_anchors=1).fit(X).predict(X[:1]) == 0).all()
    # A high threshold merges all, a low one leaves each its own; the numbers go by size.
    high = clone(segmenter).set_params(merge_threshold=100.0, n_segments=None).fit(X)
    assert (high.predict(X[:1]) == 0).all()
    sizes = np.bincount(masks[0].ravel())
    assert (np.diff(sizes) <= 0).all()


def test_clusters_are_those_of_k_means_of_logarithms():
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat([0, 1, 2], 20))
    logits = 3 * rng.normal(size=(3, 60))[kind] + 0.3 * rng.normal(size=(60, 60))
    maps = torch.softmax(torch.from_numpy(logits), dim=1).float()
    floor = maps.double().numpy().clip(min=0.01 / 60)
    found = cluster_attention(maps, 3)
    members = found.argmax(dim=0).numpy()
    assert adjusted_rand_score(kind, members) == 1.0
    means = np.stack([np.log(floor)[members == k].mean(axis=0) for k in range(3)])
    distances = ((np.log(floor)[None] - means[:, None]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(-found.numpy(), distances, rtol=1e-4, atol=1e-3)


def slow_features(blocks, factors, shape):
    """Each position of the grid by itself, in float64: means of finer ones, the nearest coarser."""
    out = []
    for block, factor in zip(blocks, factors, strict=True):
        c, h, w = block.shape
        block = block - block.reshape(c, -1).mean(axis=1)[:, None, None]
        block = block / np.sqrt((block**2).sum(axis=0).mean())
        grid = np.empty((*shape, c))
        for i, j in np.ndindex(shape):
            if factor <= 1:
                side = round(1 / factor)
                window = block[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
                grid[i, j] = window.reshape(c, -1).mean(axis=1)
            else:  # bilinear, centres of positions half a position from the border
                y, x = (np.clip((k + 0.5) / factor - 0.5, 0, None) for k in (i, j))
                a, b = int(y), int(x)
                y, x = y - a, x - b
                d, e = min(a + 1, h - 1), min(b + 1, w - 1)
                above = (1 - x) * block[:, a, b] + x * block[:, a, e]
                below = (1 - x) * block[:, d, b] + x * block[:, d, e]
                grid[i, j] = (1 - y) * above + y * below
        out.append(grid.reshape(-1, c))
    return np.concatenate(out, axis=1)


def test_features_against_a_loop_over_positions():
    rng = np.random.default_rng(0)
    shapes = [(5, 3, 2), (4, 6, 4), (3, 11, 7)]  # of a network of 11 x 7 on a grid of 6 x 4
    blocks = [rng.normal(3, 10.0**k, size=shape) for k, shape in enumerate(shapes)]
    found = aggregate_features([torch.from_numpy(block) for block in blocks], [2, 1, 0.5], (6, 4))
    assert found.shape == (24, 12)
    expected = slow_features(blocks, [2, 1, 0.5], (6, 4))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    # Every block counts alike, whatever its units.
    spread = found[:, 5:9].square().sum(dim=1).mean()
    assert spread == pytest.approx(1.0, rel=1e-5)
    flat = aggregate_features([torch.full((2, 4, 4), 7.0)], [1], (4, 4))
    assert (flat == 0).all()


class Featured:
    """Stands in for the U-Net's features: those of a region are alike."""

    def __init__(self, regions):
        self.regions = regions

    def __call__(self, X, *, t="auto", conditional=False):
        self.asked = t, conditional
        kinds = np.random.default_rng(0).normal(size=(4, self.regions.max() + 1))
        parts = (self.regions[::2, ::2], self.regions)
        return [kinds[:, part][None].astype(np.float32) for part in parts]


@pytest.mark.parametrize("resolution", ["auto", "finest", (6, 5), (12, 10)])
def test_regions_of_features_come_out_exactly(X, monkeypatch, resolution):
    regions = three_regions()
    model = tiny_diffusion().fit(X)
    featured = Featured(regions)
    monkeypatch.setattr(model, "feature_maps", featured, raising=False)
    segmenter = tiny(
        FrozenEstimator(model), n_segments=3, timestep=40, resolution=resolution, guided_radius=None
    ).fit(X)
    truth = np.stack([regions, regions])
    np.testing.assert_array_equal(segmenter.predict(X[:2]), truth)
    assert featured.asked == (40, False)
    segmenter.set_params(conditional=True).predict(X[:1])
    assert featured.asked == (40, True)


def test_as_many_segments_as_asked(X, diffusion):
    model = tiny(diffusion, n_segments=2).fit(X)
    assert model.merge_threshold_ is None
    masks = model.predict(X)
    assert masks.max() == 1
    np.testing.assert_array_equal(masks[3:5], model.predict(X[3:5]))
    np.testing.assert_array_equal(masks, pickle.loads(pickle.dumps(model)).predict(X))
    flat = np.full_like(X[:1], 100)  # fewer kinds of maps than segments: no error, no warning
    assert model.predict(flat).shape == (1, 12, 10)
    with pytest.raises(ValueError, match=r"n_segments=31, but .* 30 positions, 6 x 5"):
        tiny(diffusion, n_segments=31).fit(X)
    with pytest.raises(ValueError, match=r"n_segments=121, but .* 120 positions, 12 x 10"):
        tiny(diffusion, n_segments=121, cluster_on="attention").fit(X)
    assert tiny(diffusion, n_segments=31, resolution="finest").fit(X).predict(X[:1]).max() == 30
    with pytest.raises(ValueError, match=r"resolution=\(3, 3\) is none of the U-Net's: .*12, 10"):
        tiny(diffusion, n_segments=2, resolution=(3, 3)).fit(X)


# ---- borders -------------------------------------------------------------------------------------


def slow_guided(guide, one, radius, eps):
    """He et al.: a ridge regression in each window, the mean of all predictions for a pixel."""
    c, h, w = guide.shape
    total, count = np.zeros((h, w)), np.zeros((h, w))
    slopes, offsets = np.zeros((h, w, c)), np.zeros((h, w))
    windows = {}
    for i in range(h):
        for j in range(w):
            rows = slice(max(0, i - radius), i + radius + 1)
            columns = slice(max(0, j - radius), j + radius + 1)
            windows[i, j] = rows, columns
            x = guide[:, rows, columns].reshape(c, -1).T
            y = one[rows, columns].ravel()
            A = np.c_[x, np.ones(len(x))]
            ridge = np.diag([eps * len(x)] * c + [0.0])
            found = np.linalg.solve(A.T @ A + ridge, A.T @ y)
            slopes[i, j], offsets[i, j] = found[:c], found[c]
    for (rows, columns), a, b in zip(
        windows.values(), slopes.reshape(-1, c), offsets.ravel(), strict=True
    ):
        total[rows, columns] += np.tensordot(a, guide[:, rows, columns], 1) + b
        count[rows, columns] += 1
    return total / count


@pytest.mark.parametrize(("channels", "radius"), [(1, 1), (3, 2), (4, 9)])
def test_the_guided_filter_is_a_ridge_regression_in_each_window(channels, radius):
    rng = np.random.default_rng(0)
    guide, maps = rng.random((channels, 7, 9)), rng.normal(size=(3, 7, 9))
    expected = np.stack([slow_guided(guide, one, radius, 0.01) for one in maps])
    apply = guided_filter(torch.from_numpy(guide), radius, 0.01)
    np.testing.assert_allclose(apply(torch.from_numpy(maps)).numpy(), expected, atol=1e-10)
    single = guided_filter(torch.from_numpy(guide).float(), radius, 0.01)
    found = single(100 * torch.from_numpy(maps).float()).numpy()
    np.testing.assert_allclose(found / 100, expected, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"n_segments": 2, "resolution": (8, 8)}], ids=str)
@pytest.mark.parametrize("scale", [1, 1 / 255], ids=["bytes", "floats"])
def test_borders_lie_at_the_edges_of_the_image(monkeypatch, how, scale):
    # The object begins in the middle of a position of the attention.
    truth = np.zeros((32, 32), int)
    truth[6:22, 9:25] = 1
    rng = np.random.default_rng(0)
    image = np.where(truth, 160, 90) + rng.integers(-5, 6, size=truth.shape)
    X = np.stack([image] * 4).astype(np.uint8)[..., None]
    if scale != 1:
        X = (X * scale).astype(np.float32)
    model = tiny_diffusion(block_out_channels=(8, 8, 8, 8), n_attention_levels=2).fit(X)
    coarse = truth[1::4, 1::4]
    monkeypatch.setattr(model, "attention_maps", Attending(coarse), raising=False)
    monkeypatch.setattr(model, "feature_maps", Featured(coarse), raising=False)
    options = {"merge_threshold": 1.0, "n_anchors": 16, **how}
    plain = tiny(FrozenEstimator(model), **options).fit(X)
    guided = clone(plain).set_params(guided_radius="auto").fit(X)
    truth = np.stack([truth] * 4)
    assert guided.score(X, truth) > max(plain.score(X, truth) + 0.05, 0.9)
    same = clone(plain).set_params(guided_radius=4).fit(X)
    np.testing.assert_array_equal(same.predict(X), guided.predict(X))


# ---- the estimator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": (3, 3)}, r"resolution=\(3, 3\) is none of the attention's: .*12, 10"),
        ({"n_segments": 31}, r"n_segments=31, but .* 30 positions, 6 x 5"),
        (
            {"n_segments": 121, "cluster_on": "attention"},
            r"n_segments=121, but .* 120 positions, 12 x 10",
        ),
        ({"n_segments": 2, "resolution": (5, 5)}, r"resolution=\(5, 5\) is none of the U-Net's"),
        ({"conditional": True}, "conditional=True, but the diffusion has encoder=None"),
        ({"of": {"autoencoder": LatentAutoencoder(downsampling=3)}}, "must be a power of two"),
        (
            {"of": {"autoencoder": LatentAutoencoder(downsampling=2)}, "n_segments": 10},
            r"9 positions, 3 x 3",
        ),
        (
            {
                "of": {"autoencoder": LatentAutoencoder(downsampling=2)},
                "n_segments": 31,
                "cluster_on": "attention",
            },
            r"30 positions, 6 x 5",
        ),
    ],
)
def test_what_the_network_will_not_have_is_refused_before_any_training(
    X, monkeypatch, options, message
):
    def never(*args, **kwargs):
        raise AssertionError("something was trained")

    monkeypatch.setattr("diffaugkit.base.fit_loop", never)
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        tiny(tiny_diffusion(**options.pop("of", {})), **options).fit(X)


def test_fit_predict_score(X, fitted):
    masks = fitted.predict(X)
    assert masks.shape == (24, 12, 10)
    assert masks.dtype == np.int32
    for mask in masks:
        sizes = np.bincount(mask.ravel())
        assert (sizes > 0).all()
        assert (np.diff(sizes) <= 0).all()
    truth = (X[..., 0] > 120).astype(int)
    assert fitted.score(X, truth) == matched_dice(truth, masks)
    assert fitted.score(X, truth, metric="iou", labels=[0, 1]) == matched_iou(
        truth, masks, labels=[0, 1]
    )
    assert fitted.score(X, truth.reshape(24, -1)) == matched_dice(truth, masks)
    labels = np.arange(24) % 2
    whole = np.broadcast_to(labels[:, None, None], masks.shape)
    assert fitted.score(X, labels) == matched_dice(whole, masks)
    assert fitted.timestep_ == 300
    assert 0 < fitted.merge_threshold_ < 10
    assert tiny(fitted.diffusion_, merge_threshold=0.3).fit(X[:1]).merge_threshold_ == 0.3
    with pytest.raises(ValueError, match="metric must be"):
        fitted.score(X, truth, metric="auc")


@pytest.mark.parametrize("how", [{"n_segments": 2}, {"refine": True}], ids=str)
def test_settings_of_others_change_nothing(X, how):
    expected = tiny(**how).fit(X).predict(X[:2])
    torch.set_default_dtype(torch.float64)
    try:
        with config_context(transform_output="pandas"):
            np.testing.assert_array_equal(tiny(**how).fit(X).predict(X[:2]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_a_threshold_nothing_is_merged(X, diffusion):
    model = tiny(diffusion, n_segments=2).fit(X).set_params(n_segments=None)
    with pytest.raises(ValueError, match="has learned none: fit it again"):
        model.predict(X)


def test_the_diffusion_is_fitted_unless_it_is_frozen(X, diffusion, fitted):
    assert fitted.diffusion_ is diffusion
    assert fitted.n_iter_ == 0
    own = tiny(max_epochs=1).fit(X)
    assert own.n_iter_ == len(own.history_) == 1
    again = tiny(max_epochs=1).fit(X)
    np.testing.assert_array_equal(own.predict(X), again.predict(X))
    assert own.merge_threshold_ == again.merge_threshold_
    auto = ZeroShotSegmenter(max_epochs=1, n_anchors=2, random_state=0).fit(X)
    assert auto.diffusion_.encoder_ is None
    # Every resolution of at most 32 x 32 attends.
    assert len(auto.diffusion_.attention_maps(X[:1])) == 2


def test_the_threshold_is_the_quantile_over_pairs_of_anchors(X, diffusion):
    model = diffusion.estimator
    strides = {(12, 10): 1, (6, 5): 2}
    distances = []
    maps = [model.attention_maps(X[i : i + 1]) for i in range(len(X))]
    for found in maps:
        found = {size: torch.from_numpy(part[0]) for size, part in found.items()}
        attention = aggregate_attention(found, strides, (12, 10)).numpy().astype(float)
        anchors = attention[anchor_positions((12, 10), 3).numpy()]
        distances += [slow_divergence(anchors[i], anchors[j]) for i in range(9) for j in range(i)]
    for quantile in (0.2, 0.5):
        found = tiny(diffusion, n_anchors=3, quantile=quantile).fit(X).merge_threshold_
        assert found == pytest.approx(np.quantile(distances, quantile), rel=0.02, abs=1e-6)


def test_an_image_does_not_depend_on_those_around_it(X, fitted):
    whole = fitted.predict(X)
    for part in (slice(0, 1), slice(5, 19), [3, 3, 1], np.arange(24)[::-1]):
        np.testing.assert_array_equal(fitted.predict(X[part]), whole[part])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(X), whole)


def test_masks_that_do_not_fit_are_refused_before_any_work(X, fitted, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it was segmented")

    monkeypatch.setattr(ZeroShotSegmenter, "_attention", never)
    for y in (X[:5, ..., 0], X[:, :6, :, 0], X):
        with pytest.raises(ValueError, match=r"y has shape .*, but X holds 24 images of 12 x 10"):
            fitted.score(X, y)


def test_many_segments_are_enlarged_some_at_a_time(X, diffusion, monkeypatch):
    model = tiny(diffusion, n_anchors=12, n_iterations=1, merge_threshold=1e-6).fit(X)
    enlarged = []

    def interpolate(maps, **options):
        enlarged.append(maps.shape)
        return resize(maps, **options)

    resize = torch.nn.functional.interpolate
    monkeypatch.setattr("diffaugkit.zero_shot_segmenter.F.interpolate", interpolate)
    found = model.predict(X[:2])
    assert max(shape[0] for shape in enlarged if shape[2:] == (12, 10)) <= 16
    assert found.max() > 16
    monkeypatch.setattr("diffaugkit.zero_shot_segmenter._ENLARGED", 1000)
    np.testing.assert_array_equal(model.predict(X[:2]), found)


def test_parameters_reach_the_model(X, diffusion):
    coarse = tiny(diffusion, resolution=(6, 5)).fit(X)
    assert coarse.predict(X[:2]).shape == (2, 12, 10)
    assert tiny(diffusion, timestep=700, merge_threshold=0.3).fit(X).timestep_ == 700
    with pytest.raises(ValueError, match=r"resolution=\(3, 3\) is none of .*\(6, 5\), \(12, 10\)"):
        tiny(diffusion, resolution=(3, 3), merge_threshold=0.3).fit(X)
    with pytest.raises(ValueError, match=r"timestep=1000 must be below"):
        tiny(diffusion, timestep=1000).fit(X)
    with pytest.raises(ValueError, match=r"timestep=1000 must be below"):
        tiny(timestep=1000).fit(X)
    with pytest.raises(ValueError, match="unconditional"):
        tiny(diffusion, conditional=True).fit(X)


def test_images_of_any_kind_and_flattened(X, fitted, diffusion):
    expected = fitted.predict(X)
    np.testing.assert_array_equal(fitted.predict(torch.from_numpy(X[..., 0])[:, None]), expected)
    np.testing.assert_array_equal(fitted.predict(list(X)), expected)
    flat = tiny(diffusion, image_shape=(12, 10, 1)).fit(X.reshape(24, -1))
    np.testing.assert_array_equal(flat.predict(X.reshape(24, -1)), expected)
    assert fitted.set_params().fit(X[:1]).predict(X[:1]).shape == (1, 12, 10)


def test_conditions_and_latents(X):
    model = EmbeddingConditionedDiffusion(
        FrozenEstimator(Mean().fit(X)), block_out_channels=(8, 8), max_epochs=1, random_state=0
    ).fit(X)
    own = tiny(FrozenEstimator(model), conditional=True).fit(X)
    assert own.predict(X[:3]).shape == (3, 12, 10)
    autoencoder = LatentAutoencoder(
        downsampling=4, block_out_channels=(8, 8, 8), max_epochs=1, random_state=0
    )
    latent = tiny(tiny_diffusion(autoencoder=autoencoder), n_anchors=2).fit(X)
    assert latent.predict(X[:3]).shape == (3, 12, 10)


class Mean(TransformerMixin, BaseEstimator):
    """Three numbers of an image, for a condition."""

    def fit(self, X, y=None):
        self.is_fitted_ = True
        return self

    def transform(self, X):
        pixels = np.asarray(X, dtype=np.float32).reshape(len(X), -1)
        return np.stack([pixels.mean(1), pixels.std(1), pixels[:, 0]], axis=1)


def test_save_and_load(X, fitted, tmp_path):
    for model in (fitted, tiny(max_epochs=1).fit(X)):
        folder = tmp_path / str(model.n_iter_)
        model.save(folder)
        loaded = load(folder)
        np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
        assert loaded.merge_threshold_ == model.merge_threshold_


def test_a_killed_fit_goes_on(X, tmp_path):
    whole = tiny(tiny_diffusion(max_epochs=3)).fit(X)

    def die(epoch, history):
        if epoch == 1:
            raise KeyboardInterrupt

    killed = tiny(tiny_diffusion(max_epochs=3), checkpoint_dir=tmp_path, callbacks=die)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(X)
    assert not hasattr(killed, "diffusion_")
    resumed = tiny(tiny_diffusion(max_epochs=3), checkpoint_dir=tmp_path).fit(X)
    assert resumed.merge_threshold_ == whole.merge_threshold_
    np.testing.assert_array_equal(resumed.predict(X), whole.predict(X))


def test_bad_input_is_refused_and_leaves_the_fit(X, diffusion, fitted):
    with pytest.raises(NotFittedError):
        tiny().predict(X)
    with pytest.raises(NotFittedError):
        tiny().score(X, X[..., 0])
    with pytest.raises(NotFittedError):
        tiny(FrozenEstimator(tiny_diffusion())).fit(X)
    with pytest.raises(ValueError, match=r"takes images.* X\[None\] if it is one greyscale image"):
        tiny().fit(np.random.default_rng(0).normal(size=(20, 5)))
    with pytest.raises(ValueError, match=r"was fitted on \(12, 10, 1\)"):
        fitted.predict(X[:, :8])
    with pytest.raises(ValueError, match=r"the diffusion was fitted on \(12, 10, 1\)"):
        tiny(diffusion).fit(X[:, :8])
    vectors = EmbeddingConditionedDiffusion(None, width=8, n_blocks=1, max_epochs=1)
    vectors.fit(np.random.default_rng(0).normal(size=(20, 5)))
    for other in (FrozenEstimator(vectors), GaussianMixture()):
        with pytest.raises(TypeError, match="no U-Net"):
            tiny(other).fit(X)
    again = clone(fitted).fit(X)
    before = again.predict(X[:3])
    with pytest.raises(ValueError, match="NaN"):
        again.fit(np.full((4, 12, 10, 1), np.nan, np.float32))
    np.testing.assert_array_equal(again.predict(X[:3]), before)


FLAT = {"image_shape": (1, -1, 1)}
NO_MASKS = {"check_fit_score_takes_y": "score compares masks; the check hands one number per image"}


@parametrize_with_checks([tiny(tiny_diffusion(**FLAT), n_anchors=2, **FLAT)])
def test_check_estimator(estimator, check):
    check(estimator)


def test_check_estimator_parameters():
    check_param_validation("ZeroShotSegmenter", tiny())
