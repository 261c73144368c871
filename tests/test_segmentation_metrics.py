"""Scores of masks against scikit-learn, scikit-image, torchmetrics and slow oracles."""

import itertools
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.spatial.distance import cdist
from skimage.measure import label
from skimage.metrics import hausdorff_distance as skimage_hausdorff
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, jaccard_score, recall_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from diffaugkit.metrics import (
    dice_score,
    dice_scorer,
    hausdorff_distance,
    hd95,
    iou_score,
    label_instances,
    matched_dice,
    matched_iou,
    object_aji,
    object_f1,
    panoptic_quality,
    pixel_aji,
    row_hausdorff,
    sensitivity,
    sensitivity_scorer,
    specificity,
    specificity_scorer,
)
from diffaugkit.metrics import segmentation as module

PAIRS = st.tuples(*[arrays(np.int64, (5, 6), elements=st.integers(0, 3))] * 2)
MASKS = st.tuples(*[arrays(bool, (6, 5))] * 2)
ONE_IMAGE = (matched_dice, matched_iou, object_aji, object_f1, panoptic_quality)
POINTS = (hausdorff_distance, hd95, row_hausdorff)


def random_masks(n=4, shape=(12, 14), n_labels=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, n_labels, size=(2, n, *shape))


# ---- classes per pixel ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_regions_are_those_of_scikit_learn(pair):
    true, predicted = pair
    labels = [value for value in np.union1d(true, predicted) if value]
    if not labels:
        assert dice_score(true, predicted) == iou_score(true, predicted) == 1.0
        return
    flat = true.ravel(), predicted.ravel()
    for ours, theirs in ((dice_score, f1_score), (iou_score, jaccard_score)):
        each = theirs(*flat, labels=labels, average=None)
        np.testing.assert_allclose(ours(true, predicted, average=False), each)
        assert ours(true, predicted) == pytest.approx(each.mean())
    assert pixel_aji(true, predicted) == pytest.approx(
        jaccard_score(*flat, labels=labels, average="micro")
    )


def test_regions_per_image_ignored_and_missing():
    true, predicted = random_masks()
    each = dice_score(true, predicted, per_image=True, average=False)
    assert each.shape == (4, 3)
    for i in range(4):
        np.testing.assert_allclose(each[i], dice_score(true[i], predicted[i], average=False))
    assert dice_score(true, predicted, per_image=True) == pytest.approx(each.mean())
    kept = true != 2
    assert iou_score(true, predicted, ignore_label=2, labels=[0, 1, 3]) == pytest.approx(
        iou_score(true[kept], predicted[kept], labels=[0, 1, 3])
    )
    # A class that is in neither: praised by default, left out on request.
    assert dice_score(true, predicted, labels=[1, 9], average=False)[1] == 1.0
    assert dice_score(true, predicted, labels=[1, 9], zero_division=np.nan) == pytest.approx(
        dice_score(true, predicted, labels=[1])
    )
    assert np.isnan(dice_score(true, predicted, labels=[9], zero_division=np.nan))
    # Bool, bytes, lists and tensors are the same mask.
    binary = true == 1, predicted == 1
    expected = iou_score(*binary)
    for kind in (np.uint8, np.int32, torch.tensor, lambda mask: mask.tolist()):
        assert iou_score(*map(kind, binary)) == expected
    np.testing.assert_allclose(iou_score(*binary), dice_score(*binary) / (2 - dice_score(*binary)))


@pytest.mark.parametrize("score", [dice_score, iou_score])
def test_one_image_of_its_own_keeps_its_axis(score):
    true, predicted = random_masks()
    for one, other in ((true[:1], predicted[:1]), ([true[0]], [predicted[0]])):
        each = score(one, other, per_image=True, average=False, labels=[1, 2, 3])
        assert each.shape == (1, 3)
        np.testing.assert_array_equal(each[0], score(one, other, average=False, labels=[1, 2, 3]))


def test_regions_of_masks_of_several_sizes():
    true, predicted = random_masks(seed=2)
    cut = [(12, 14), (5, 9), (12, 3), (1, 1)]
    true, predicted = (
        [mask[:h, :w] for mask, (h, w) in zip(masks, cut, strict=True)]
        for masks in (true, predicted)
    )
    flat = [np.concatenate([mask.ravel() for mask in masks]) for masks in (true, predicted)]
    for score, options in (
        (dice_score, {"average": False}),
        (iou_score, {"average": False, "ignore_label": 2, "labels": [0, 1, 3]}),
        (pixel_aji, {}),
        (sensitivity, {"average": False}),
        (specificity, {"average": False}),
    ):
        np.testing.assert_array_equal(score(true, predicted, **options), score(*flat, **options))
        tensors = [[torch.from_numpy(mask) for mask in masks] for masks in (true, predicted)]
        np.testing.assert_array_equal(score(*tensors, **options), score(*flat, **options))
        with pytest.raises(ValueError, match="image by image, masks of the same shapes: got 4"):
            score(true, predicted[::-1])
    each = dice_score(true, predicted, per_image=True, average=False)
    assert each.shape == (4, 3)
    for i in range(4):
        one = dice_score(true[i], predicted[i], labels=[1, 2, 3], average=False)
        np.testing.assert_array_equal(each[i], one)
    assert dice_score(true, predicted, per_image=True) == pytest.approx(each.mean())
    with pytest.raises(ValueError, match="threshold it first"):
        dice_score(true, [mask / 4 for mask in predicted])


@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:All samples are of one class")
@given(PAIRS)
def test_sensitivity_and_specificity(pair):
    true, predicted = (mask.ravel() for mask in pair)
    labels = np.union1d(true, predicted)
    if set(labels) <= {0, 1}:
        labels = np.array([1])
    elif len(labels) == 2:
        labels = labels[1:]
    expected = [np.mean(predicted[true == c] == c) if (true == c).any() else 0 for c in labels]
    np.testing.assert_allclose(sensitivity(*pair, average=False), expected)
    assert sensitivity(*pair) == pytest.approx(np.mean(expected))
    expected = [np.mean(predicted[true != c] != c) if (true != c).any() else 0 for c in labels]
    np.testing.assert_allclose(specificity(*pair, average=False), expected)


def test_sensitivity_of_classes_with_names_and_scorers():
    true, predicted = ["good", "bad", "good", "bad"], ["good", "good", "good", "bad"]
    assert sensitivity(true, predicted) == recall_score(true, predicted, pos_label="good") == 1.0
    assert specificity(true, predicted) == recall_score(true, predicted, pos_label="bad") == 0.5
    assert sensitivity([0, 0], [0, 1]) == 0.0
    assert np.isnan(sensitivity([0, 0], [0, 1], zero_division=np.nan))
    assert sensitivity([0, 0], [0, 0]) == 0.0
    assert specificity([0, 0], [0, 0]) == 1.0
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    y = (X[:, 0] + 0.5 * rng.normal(size=60) > 0).astype(int)
    for scorer, function in ((sensitivity_scorer, sensitivity), (specificity_scorer, specificity)):
        scores = cross_val_score(LogisticRegression(), X, y, scoring=scorer)
        assert scores.shape == (5,)
        model = LogisticRegression().fit(X, y)
        assert scorer(model, X, y) == function(y, model.predict(X))


def test_sensitivity_without_the_pixels_that_are_ignored():
    true, predicted = random_masks()
    counted = true != 2
    for score in (sensitivity, specificity):
        for average in (True, False):
            found = score(true, predicted, average=average, ignore_label=2)
            expected = score(true[counted], predicted[counted], average=average)
            np.testing.assert_array_equal(found, expected)
        assert score(["a", "b", "?"], ["a", "b", "a"], ignore_label="?") == 1.0
        assert score(["?"], ["a"], ignore_label="?") == 0.0  # as of no positives


@pytest.mark.parametrize(
    "score", [dice_score, iou_score, pixel_aji, sensitivity, specificity], ids=lambda s: s.__name__
)
def test_bool_beside_other_classes_is_refused(score):
    true = random_masks(n_labels=2)[0]
    found = true.astype(bool)
    assert score(true, found) == score(found, true) == 1.0
    with pytest.raises(ValueError, match=r"y_pred is of bool .* y_true holds label 255.*rue > 0"):
        score(255 * true, found)
    with pytest.raises(ValueError, match=r"y_true is of bool .* y_pred holds label 255"):
        score(found, 255 * true)
    # Pixels without a label are none of a class, and one class may be asked for.
    some = true.copy()
    some[:, :3] = 255
    assert score(some, found, ignore_label=255) == 1.0
    assert score(3 * ~found + true, found, labels=[1]) == 1.0


def test_a_scorer_of_masks():
    class Threshold(BaseEstimator):
        def fit(self, X, y=None):
            return self

        def predict(self, X):
            return (X > 0.5).astype(int)

    X = np.random.default_rng(0).random((3, 8, 8))
    y = (X > 0.3).astype(int)
    assert dice_scorer(Threshold(), X, y) == dice_score(y, X > 0.5)


# ---- segments without names ----------------------------------------------------------------------


def best_by_trial(score, true, predicted, labels):
    """Every way to hand segments to labels, tried."""
    segments = list(np.unique(predicted)) + [None] * len(labels)
    best = 0.0
    for chosen in itertools.permutations(segments, len(labels)):
        values = [
            0.0 if s is None else score(true == value, predicted == s)
            for value, s in zip(labels, chosen, strict=True)
        ]
        best = max(best, float(np.mean(values)))
    return best


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_the_matching_is_the_best_of_all(pair):
    true, predicted = pair
    for labels in (None, [0, 1]):
        wanted = [v for v in np.unique(true) if (v if labels is None else v in labels)]
        for ours, score in ((matched_dice, dice_score), (matched_iou, iou_score)):
            value = ours(true, predicted, labels=labels)
            if not wanted:
                assert np.isnan(value)
            else:
                expected = best_by_trial(score, true, predicted, wanted)
                assert value == pytest.approx(expected)


def test_matching_does_not_look_at_names():
    true, _ = random_masks()
    renamed = np.array([7, 3, 9, 0])[true]
    assert matched_dice(true, renamed) == matched_iou(true, renamed) == 1.0
    # Names are anew in each image.
    renamed[1:] = np.array([1, 0, 3, 2])[true[1:]]
    np.testing.assert_array_equal(matched_dice(true, renamed, average=False), 1.0)
    halves = 2 * true + np.arange(14) % 2
    assert matched_dice(true, halves) < 0.8
    assert matched_dice(true, halves, many_to_one=True) == 1.0


def test_many_to_one_against_a_loop():
    true, predicted = random_masks(seed=1)
    predicted = 3 * predicted + np.arange(14) % 3
    for t, p in zip(true, predicted, strict=True):
        owned = np.zeros_like(p)
        for segment in np.unique(p):
            owned[p == segment] = np.bincount(t[p == segment]).argmax()
        expected = [dice_score(t == c, owned == c) for c in np.unique(t) if c]
        assert matched_dice(t, p, many_to_one=True) == pytest.approx(np.mean(expected))


def test_images_without_regions_are_left_out():
    true, predicted = random_masks()
    true[0] = 0
    each = matched_iou(true, predicted, average=False)
    assert np.isnan(each[0])
    assert matched_iou(true, predicted) == pytest.approx(each[1:].mean())
    ignored = matched_dice(true, predicted, ignore_label=3, average=False)
    kept = true[1] != 3
    line = true[1][kept][None], predicted[1][kept][None]
    assert ignored[1] == pytest.approx(matched_dice(*line))


# ---- objects -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(arrays(bool, (7, 8)), st.sampled_from([1, 2]))
def test_instances_are_those_of_scikit_image(mask, connectivity):
    ours = label_instances(mask, connectivity=connectivity)
    theirs = label(mask, connectivity=connectivity)
    assert ours.max() == theirs.max()
    # The same regions, whatever their numbers.
    assert len(np.unique(np.stack([ours, theirs]).reshape(2, -1), axis=1).T) == ours.max() + (
        not mask.all()
    )


def test_instances_of_many_images_labels_and_sizes():
    mask = np.array([[1, 1, 2, 0, 1], [1, 0, 2, 0, 0]])
    assert label_instances(mask).tolist() == [[1, 1, 3, 0, 2], [1, 0, 3, 0, 0]]
    assert label_instances(mask, min_size=2).tolist() == [[1, 1, 2, 0, 0], [1, 0, 2, 0, 0]]
    stack = label_instances(np.stack([mask, mask * 0]))
    assert stack.dtype == np.int32
    assert stack.shape == (2, 2, 5)
    assert not stack[1].any()
    listed = label_instances([mask, mask[:, :2]])
    assert [found.shape for found in listed] == [(2, 5), (2, 2)]
    assert label_instances(np.ones((3, 3), bool)).min() == 1


def slow_aji(true, predicted):
    """Algorithm 1 of Kumar et al. 2017, line by line."""
    intersection, union, used = 0, 0, set()
    for i in np.unique(true[true > 0]):
        best, best_jaccard = None, 0.0
        for j in np.unique(predicted[predicted > 0]):
            both = np.sum((true == i) & (predicted == j))
            jaccard = both / np.sum((true == i) | (predicted == j))
            if jaccard > best_jaccard:
                best, best_jaccard = j, jaccard
        if best is None:
            union += np.sum(true == i)
            continue
        intersection += np.sum((true == i) & (predicted == best))
        union += np.sum((true == i) | (predicted == best))
        used.add(best)
    for j in np.unique(predicted[predicted > 0]):
        if j not in used:
            union += np.sum(predicted == j)
    return intersection / union if union else 1.0


@pytest.mark.filterwarnings("ignore:.* separate regions count as one")
@settings(max_examples=80, deadline=None)
@given(PAIRS)
def test_object_aji_is_the_algorithm_of_the_paper(pair):
    assert object_aji(*pair) == pytest.approx(slow_aji(*pair))


def test_object_aji_sees_what_pixels_do_not():
    true = label_instances(np.array([[1, 1, 0, 1, 1]]))
    joined = np.array([[1, 1, 1, 1, 1]])
    assert pixel_aji(true > 0, joined) == 0.8
    assert object_aji(true, joined) == pytest.approx(0.4)
    assert object_aji(true, true[:, ::-1]) == object_aji(true, 7 * true) == 1.0


@pytest.mark.parametrize("score", [object_aji, object_f1, panoptic_quality])
def test_bool_masks_hold_no_objects(score):
    true = np.array([[1, 1, 0, 1, 1]], bool)
    found = np.array([[1, 1, 0, 0, 0]], bool)
    objects = label_instances(true), label_instances(found)
    assert 0 < score(*objects) < 1
    for pair, name in (
        ((true, objects[1]), "y_true"),
        ((objects[0], found), "y_pred"),
        (([objects[0], true], [objects[1], found]), "y_true"),
    ):
        with pytest.raises(ValueError, match=rf"give label_instances\({name}\)"):
            score(*pair)


@pytest.mark.parametrize("score", [object_aji, object_f1, panoptic_quality])
def test_one_label_of_several_regions_is_a_warning(score):
    true = np.zeros((2, 9, 9), np.uint8)
    true[:, 1:3, 1:3] = true[1, 5:8, 5:8] = 255
    objects = label_instances(true)
    with pytest.warns(UserWarning, match=r"y_true has no label but 255.*label_instances\(y_true\)"):
        score(true, objects)
    with pytest.warns(UserWarning, match=r"y_pred has no label but 255") as caught:
        score(objects, list(true))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(objects, objects) == 1.0
        assert score(true[0], true[0]) == 1.0  # one region


def test_paths_are_no_masks():
    for call in (
        lambda: label_instances(["a.png", "b.png"]),
        lambda: dice_score(["a.png"], ["b.png"]),
        lambda: dice_score(["a.png", "b.png"], np.zeros((2, 3, 3), int)),
        lambda: object_f1("a.png", "b.png"),
    ):
        with pytest.raises(ValueError, match=r"got paths: give \[PIL\.Image\.open\(path\) for"):
            call()


@pytest.mark.filterwarnings("ignore:.* separate regions count as one")
@settings(max_examples=60, deadline=None)
@given(PAIRS, st.sampled_from([0.2, 0.5, 0.75]))
def test_object_f1_and_panoptic_quality_by_trial(pair, threshold):
    true, predicted = pair
    t, p = ([v for v in np.unique(mask) if v] for mask in pair)
    iou = np.array([[iou_score(true == i, predicted == j) for j in p] for i in t])
    iou = iou.reshape(len(t), len(p))
    n_pairs, best = 0, 0.0
    if iou.size:
        wide = iou if len(t) <= len(p) else iou.T
        for columns in itertools.permutations(range(wide.shape[1]), wide.shape[0]):
            found = wide[np.arange(wide.shape[0]), columns]
            found = found[found > threshold]
            if (len(found), found.sum()) > (n_pairs, best):
                n_pairs, best = len(found), found.sum()
    n = len(t) + len(p)
    f1 = 2 * n_pairs / n if n else 1.0
    assert object_f1(*pair, iou_threshold=threshold) == pytest.approx(f1)
    pq, sq, rq = panoptic_quality(*pair, iou_threshold=threshold, return_parts=True)
    assert rq == pytest.approx(f1)
    assert sq == pytest.approx(best / n_pairs if n_pairs else float(not n))
    assert pq == pytest.approx(sq * rq)


def test_panoptic_quality_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.detection")
    rng = np.random.default_rng(0)
    true = label_instances(rng.random((3, 16, 16)) < 0.3)
    predicted = np.where(rng.random(true.shape) < 0.1, 0, true)
    for t, p in zip(true, predicted, strict=True):
        pair = [torch.from_numpy(np.stack([m > 0, m], -1)[None].astype(int)) for m in (p, t)]
        theirs = functional.panoptic_quality(
            *pair, things={1}, stuffs={0}, return_per_class=True, return_sq_and_rq=True
        )
        ours = panoptic_quality(t, p, return_parts=True)
        np.testing.assert_allclose(ours, theirs.reshape(-1, 3)[0].numpy(), rtol=1e-6)


def test_many_objects_cost_no_table_of_all_pairs():
    side = 60
    true = np.arange(1, side**2 + 1).reshape(side, side).repeat(3, axis=0).repeat(3, axis=1)
    true[::3] = true[:, ::3] = 0
    found = np.roll(true, 1, axis=1)
    tracemalloc.start()
    try:
        assert object_aji(true, found) == pytest.approx(1 / 3)
        assert object_f1(true, found, iou_threshold=0.2) == 1
        assert panoptic_quality(true, found, iou_threshold=0.2) == pytest.approx(1 / 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * side**4 / 4  # a quarter of one such table


def test_many_labels_are_looked_for_where_they_lie(monkeypatch):
    pixels = []

    def spy(mask, structure=None):
        pixels.append(mask.size)
        return label_pixels(mask, structure)

    label_pixels = module.label
    monkeypatch.setattr(module, "label", spy)
    mask = np.arange(100).reshape(10, 10).repeat(4, axis=0).repeat(4, axis=1)
    mask[1::4, 1::4] = 200  # what all pieces share lies everywhere
    found = label_instances(mask)
    assert found.max() == len(np.unique(label(mask, connectivity=2))) - 1
    assert sum(pixels) < 3 * mask.size


# ---- two sets of points --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_hausdorff_is_that_of_scikit_image(pair):
    assert hausdorff_distance(*pair) == pytest.approx(skimage_hausdorff(*pair))


@settings(max_examples=60, deadline=None)
@given(MASKS, st.sampled_from([0, 50, 95]), st.sampled_from(["region", "boundary"]))
def test_percentiles_against_all_distances(pair, percentile, points):
    spacing = 0.5, 2.0
    sets = []
    for mask in pair:
        kept = mask
        if points == "boundary":
            padded = np.pad(mask, 1)
            inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            kept = mask & ~inside
        sets.append(np.argwhere(kept) * spacing)
    arguments = {"percentile": percentile, "points": points, "spacing": spacing}
    ours = hausdorff_distance(*pair, **arguments)
    if not len(sets[0]) or not len(sets[1]):
        assert ours == (0.0 if len(sets[0]) == len(sets[1]) else np.inf)
        return
    distances = cdist(*sets)
    expected = [np.percentile(distances.min(axis=axis), percentile) for axis in (0, 1)]
    assert ours == pytest.approx(max(expected))
    if percentile == 95:
        assert hd95(*pair, points=points, spacing=spacing) == ours


def test_rows_as_points():
    true, predicted = random_masks(n_labels=2)
    apart = [cdist(t, p) for t, p in zip(1.0 * true, 1.0 * predicted, strict=True)]
    expected = [max(d.min(axis=1).max(), d.min(axis=0).max()) for d in apart]
    np.testing.assert_allclose(row_hausdorff(true, predicted, average=False), expected)
    assert row_hausdorff(true, predicted) == pytest.approx(np.mean(expected))
    both = [[1, 0], [0, 0]], [[0, 0], [0, 0]]  # each row of the second is one of the first
    assert row_hausdorff(*both) == row_hausdorff(*both[::-1]) == 1


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [*ONE_IMAGE, *POINTS], ids=lambda score: score.__name__)
def test_images_are_scored_one_by_one(score):
    true, predicted = random_masks()
    each = score(true, predicted, average=False)
    assert each.shape == (4,)
    assert score(true, predicted) == pytest.approx(each.mean())
    np.testing.assert_array_equal(score(list(true), list(predicted), average=False), each)
    np.testing.assert_array_equal(
        score(torch.from_numpy(true), torch.from_numpy(predicted), average=False), each
    )
    assert score(true[1], predicted[1]) == each[1]
    mixed = [true[0], true[1, :5]], [predicted[0], predicted[1, :5]]
    assert score(*mixed, average=False)[0] == each[0]
    with pytest.raises(ValueError, match="threshold it first"):
        score(true, predicted / 4)
    with pytest.raises(ValueError, match=r"same shapes: got 4 .* and 3"):
        score(true, predicted[:3])
    with pytest.raises(ValueError, match=r"must be of shape \(h, w\)"):
        score(true[0, 0], predicted[0, 0])


@pytest.mark.parametrize(
    "score", [dice_score, sensitivity, *ONE_IMAGE, *POINTS], ids=lambda score: score.__name__
)
def test_pictures_of_several_sizes(score):
    true, predicted = random_masks().astype(np.uint8)
    true, predicted = ([y[0], y[1][:5, :9]] for y in (true, predicted))
    pictures = ([Image.fromarray(mask) for mask in y] for y in (true, predicted))
    assert score(*pictures) == score(true, predicted)


def test_wrong_arguments_are_refused():
    true, predicted = random_masks()
    for score in (dice_score, iou_score, pixel_aji):
        with pytest.raises(ValueError, match="of one shape"):
            score(true, predicted[:, :-1])
        with pytest.raises(ValueError, match="threshold it first"):
            score(true / 2, predicted)
    with pytest.raises(ValueError, match="of one shape"):
        sensitivity([0, 1], [1])
    with pytest.raises(ValueError, match="per_image"):
        dice_score([1, 0], [1, 0], per_image=True)
    with pytest.raises(ValueError, match="iou_threshold"):
        object_f1(true, predicted, iou_threshold=1.0)
    with pytest.raises(ValueError, match="percentile"):
        hausdorff_distance(true, predicted, percentile=101)
    with pytest.raises(ValueError, match="points"):
        hd95(true, predicted, points="edge")
    with pytest.raises(ValueError, match="spacing"):
        hd95(true, predicted, spacing=0)
    with pytest.raises(ValueError, match="connectivity"):
        label_instances(true, connectivity=3)
    with pytest.raises(ValueError, match="min_size"):
        label_instances(true, min_size=-1)


SCORERS, FUNCTIONS = (sensitivity_scorer, specificity_scorer), (sensitivity, specificity)


@pytest.mark.parametrize("names", [(0, 1), ("healthy", "tumour"), (1, 2)])
def test_scorers_in_folds_of_one_class(names):
    X = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2], [0.3], [1.3]])
    y = np.array(names)[[0, 0, 0, 1, 1, 1, 0, 1]]
    model = KNeighborsClassifier(1).fit(X, y)  # never wrong
    for part, expected in (((0, 1), (0.0, 1.0)), ((3, 4), (1.0, 0.0)), ((6, 7), (1.0, 1.0))):
        found = [score(model, X[list(part)], y[list(part)]) for score in SCORERS]
        assert found == [
            score(y[list(part)], y[list(part)], labels=[names[1]]) for score in FUNCTIONS
        ]
        assert found[0] == expected[0] or np.isnan(found[0])
        assert found[1] == expected[1] or np.isnan(found[1])
    if names[0] == "healthy":
        with pytest.warns(UserWarning, match="All samples are of one class"):
            sensitivity(y[:2], y[:2])
