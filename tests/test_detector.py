"""The detector: boxes of masks, scores of boxes, the head, learning, whole images, copies."""

import copy
import io
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks

from diffaugkit import EmbeddingConditionedDiffusion, load
from diffaugkit.denoisers import UNetDenoiser
from diffaugkit.detection_boxes import BLANK, boxes_from_masks, move_boxes, patch_targets
from diffaugkit.detection_head import (
    DetectionNetwork,
    StripBoxes,
    candidates,
    detection_loss,
    match_places,
    pixel_maps,
    places_of,
)
from diffaugkit.detector import DiffusionDetector
from diffaugkit.image_rows import ImageRows
from diffaugkit.metrics.detection import box_average_precision, check_boxes, mean_box_iou
from diffaugkit.runtime import isolated_rng
from diffaugkit.segmentation_data import ImageList, PatchRows, vary_pairs
from diffaugkit.slides import open_slide

pytest.importorskip("diffusers")
pytest.importorskip("torchvision")


def tiny(**more):
    options = {
        "block_out_channels": (8, 8),
        "head_width": 32,
        "pretrain_epochs": 1,
        "max_epochs": 1,
        "batch_size": 16,
        "n_timesteps": 20,
        "patch_size": 16,
        "stride": 16,
        "random_state": 0,
    }
    return DiffusionDetector(**{**options, **more})


def squares(n, height=32, width=32, seed=0, most=3):
    """Bright squares that do not touch: images (n, H, W, 3) uint8, and masks of two classes."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, height, width), np.uint8)
    for mask in masks:
        for _ in range(rng.integers(most + 1)):
            side = rng.integers(5, 9)
            y, x = rng.integers(0, (height - side + 1, width - side + 1))
            if not mask[max(0, y - 1) : y + side + 1, max(0, x - 1) : x + side + 1].any():
                mask[y : y + side, x : x + side] = rng.integers(1, 3)
    X = rng.integers(0, 90, (n, height, width, 3))
    X[masks == 1] += 110
    X[..., 0][masks == 2] += 110
    return X.astype(np.uint8), masks


@pytest.fixture(scope="module")
def data():
    X, masks = squares(8)
    return X, boxes_from_masks(masks)


@pytest.fixture(scope="module")
def fitted(data):
    return tiny(score_threshold=0.01).fit(*data)


@pytest.fixture(scope="module")
def learned():
    X, masks = squares(24)
    model = tiny(max_epochs=25, batch_size=8, learning_rate=5e-3, validation_fraction=0.0)
    return model.fit(X[:16], boxes_from_masks(masks[:16]))


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == {"boxes", "labels", "scores"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# ---- boxes ---------------------------------------------------------------------------------------


def test_boxes_from_masks_against_scikit_image():
    measure = pytest.importorskip("skimage.measure")
    masks = np.random.default_rng(0).random((3, 30, 20)) < 0.3
    for connectivity in (1, 2):
        found = boxes_from_masks(masks, min_size=3, connectivity=connectivity)
        for mask, image in zip(masks, found, strict=True):
            regions = measure.regionprops(measure.label(mask, connectivity=connectivity))
            expected = [r.bbox for r in regions if r.area >= 3]
            expected = np.array(expected, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
            order, theirs = np.lexsort(image["boxes"].T), np.lexsort(expected.T)
            np.testing.assert_array_equal(image["boxes"][order], expected[theirs])
            assert image["boxes"].dtype == np.float32
            assert set(image["labels"]) == {1}


def test_boxes_of_classes_and_of_instances():
    mask = np.array([[5, 5, 0, 7], [0, 0, 0, 7], [5, 0, 0, 0]])
    found = boxes_from_masks(mask)
    assert found["labels"].tolist() == [5, 5, 7]
    assert found["boxes"].tolist() == [[0, 0, 2, 1], [0, 2, 1, 3], [3, 0, 4, 2]]
    found = boxes_from_masks([mask, mask[:2] * 0], instances=True, min_size=3)
    assert found[0]["boxes"].tolist() == [[0, 0, 2, 3]]
    assert found[0]["labels"].tolist() == [1]
    assert found[1]["boxes"].shape == (0, 4)
    assert boxes_from_masks(-mask, instances=True)["boxes"].shape == (2, 4)
    # What holds no numbers of objects gives no boxes of instances.
    with pytest.raises(ValueError, match=r"masks must hold numbers.*give label_instances\(masks\)"):
        boxes_from_masks([mask, mask > 0], instances=True)
    with pytest.warns(UserWarning, match="masks has no label but 255"):
        boxes_from_masks(255 * (mask > 0), instances=True)
    with pytest.raises(ValueError, match=r"such as np\.asarray\(PIL\.Image\.open\(path\)\)"):
        boxes_from_masks(["a.png", "b.png"])
    with pytest.raises(ValueError, match="float"):
        boxes_from_masks(mask / 2)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        boxes_from_masks("mask.png")
    with pytest.raises(ValueError, match="min_size"):
        boxes_from_masks(mask, min_size=0)


def test_targets_of_patches():
    images = ImageList([ImageRows(np.zeros((1, 20, 12), np.uint8))], [(0, 255)])
    boxes = [np.array([[0.0, 0, 4, 4], [5, 6, 11, 12], [2, 14, 4, 18]])]
    patches = PatchRows(images, [0], (8, 8), (8, 4))
    targets = patch_targets(boxes, [np.array([0, 1, 2])], patches, images)
    assert patches.places.tolist()[1] == [0, 0, 4]
    # The centre of the second box is at (8, 9): outside of the upper patches, whose border it cuts.
    assert targets[0].tolist()[:2] == [[0, 0, 4, 4, 0], [5, 6, 11, 12, BLANK]]
    of = {tuple(place[1:]): row for place, row in zip(patches.places, targets, strict=True)}
    assert of[8, 4].tolist()[0] == [1, -2, 7, 4, 1]
    assert (targets[..., 4] == BLANK).any()
    small = PatchRows(images, [0], (24, 16), (8, 8))
    (row,) = patch_targets(boxes, [np.array([0, 1, 2])], small, images)
    assert row.tolist()[3:] == [[12, 0, 16, 24, BLANK], [0, 20, 16, 24, BLANK]]
    # Each patch looks at the boxes of its strip alone: none is lost, none is another's.
    images = ImageList([ImageRows(np.zeros((2, 60, 50), np.uint8))], [(0, 255)])
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (2, 80, 2))
    boxes = list(np.concatenate([corner, corner + rng.uniform(1, 10, corner.shape)], axis=2))
    patches = PatchRows(images, [0, 1], (16, 16), (8, 8))
    targets = patch_targets(boxes, [np.arange(80), np.arange(80)], patches, images)
    for (number, *corner), row in zip(patches.places, targets, strict=True):
        low = np.maximum(boxes[number][:, 1::-1], corner)
        high = np.minimum(boxes[number][:, :1:-1], np.add(corner, 16))
        area = row[:, 2] > row[:, 0]
        assert area.sum() == (high > low).all(axis=1).sum()
        centre = (boxes[number][:, 1::-1] + boxes[number][:, :1:-1]) / 2
        mine = ((centre >= corner) & (centre < np.add(corner, 16))).all(axis=1)
        assert sorted(row[row[:, 4] != BLANK, 4].tolist()) == np.flatnonzero(mine).tolist()
    patches = PatchRows(images, [0], (8, 8), (8, 4))
    nothing = patch_targets([np.zeros((0, 4))], [np.zeros(0)], patches, images)
    assert nothing.shape == (len(patches), 1, 5)
    assert (nothing[..., 4] == BLANK).all()


def test_boxes_move_with_their_pixels():
    image = torch.zeros(1, 1, 5, 7)
    image[..., 1:3, 2:6] = 1
    box = torch.tensor([[[2.0, 1, 6, 3]]])
    numbers = torch.arange(35).reshape(1, 1, 5, 7)
    for axes in ([], [2], [3], [2, 3]):
        moved = move_boxes(box, numbers.flip(axes), (5, 7))[0, 0].int().tolist()
        found = boxes_from_masks(image.flip(axes)[0, 0].int().numpy())["boxes"][0].tolist()
        assert moved == found


def test_boxes_turn_with_their_pixels():
    from diffaugkit.augmentations import image_recipe

    masks = torch.zeros(64, 1, 7, 7)
    masks[..., 1:3, 2:6] = 1
    numbers = torch.arange(49).reshape(1, 1, 7, 7).expand(64, -1, -1, -1)
    pairs = torch.cat([masks, numbers], dim=1)
    with isolated_rng(0):
        masks, moved = vary_pairs(
            pairs[:, :1], pairs[:, 1:].long(), image_recipe("tissue", 3), color=False
        )
    boxes = move_boxes(torch.tensor([[[2.0, 1, 6, 3]]]).expand(64, -1, -1), moved, (7, 7))
    found = [boxes_from_masks(mask.int().numpy())["boxes"][0].tolist() for mask in masks[:, 0]]
    assert boxes[:, 0].int().tolist() == found
    assert len(np.unique(found, axis=0)) == 8


# ---- scores of boxes -----------------------------------------------------------------------------


def slow_iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(q[2] - q[0]) * (q[3] - q[1]) for q in (a, b)]
    return width * height / (sum(area) - width * height)


def slow_average_precision(y_true, y_pred, threshold, interpolation):
    """One class, box by box."""
    entries = [
        (-score, number, at)
        for number, image in enumerate(y_pred)
        for at, score in enumerate(image["scores"])
    ]
    free = [list(map(tuple, image["boxes"])) for image in y_true]
    n_true, curve, hits = sum(map(len, free)), [], 0
    for rank, (_, number, at) in enumerate(sorted(entries), 1):
        box = y_pred[number]["boxes"][at]
        best = max(free[number], key=lambda t: slow_iou(t, box), default=None)
        if best is not None and slow_iou(best, box) >= threshold:
            free[number].remove(best)
            hits += 1
        curve.append((hits / n_true, hits / rank))
    if interpolation == "coco":
        recalls = np.linspace(0, 1, 101)
        return np.mean([max((p for r, p in curve if r >= at), default=0) for at in recalls])
    steps = np.diff([0, *(r for r, _ in curve)])
    return sum(step * p for step, (_, p) in zip(steps, curve, strict=True))


def random_boxes(rng, n, n_classes=2):
    corner = rng.uniform(0, 20, (n, 2))
    boxes = np.hstack([corner, corner + rng.uniform(3, 9, (n, 2))])
    return {"boxes": boxes, "labels": rng.integers(n_classes, size=n), "scores": rng.random(n)}


def random_images(seed, n_classes=2):
    """Truth, and predictions of which some are it, moved."""
    rng = np.random.default_rng(seed)
    y_true = [random_boxes(rng, n, n_classes) for n in (4, 0, 6, 9)]
    y_pred = []
    for image, n in zip(y_true, (3, 2, 0, 5), strict=True):
        more = random_boxes(rng, n, n_classes)
        moved = image["boxes"] + rng.normal(0, 0.7, image["boxes"].shape)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 0.5)
        moved = {**image, "boxes": moved, "scores": rng.random(len(moved))}
        y_pred.append({key: np.concatenate([more[key], moved[key]]) for key in more})
    return y_true, y_pred


@pytest.mark.parametrize("interpolation", ["coco", None])
def test_average_precision_is_the_slow_one(interpolation):
    for seed in range(6):
        y_true, y_pred = random_images(seed, n_classes=1)
        for threshold in (0.3, 0.5, 0.75):
            ours = box_average_precision(
                y_true, y_pred, iou_threshold=threshold, interpolation=interpolation
            )
            slow = slow_average_precision(y_true, y_pred, threshold, interpolation)
            assert ours == pytest.approx(slow, abs=1e-12)


def test_average_precision_is_torchmetrics_one():
    pytest.importorskip("pycocotools")
    detection = pytest.importorskip("torchmetrics.detection")
    for seed in range(5):
        y_true, y_pred = random_images(seed)
        metric = detection.MeanAveragePrecision(
            iou_thresholds=np.linspace(0.5, 0.95, 10).round(2).tolist(),
            # COCO's own: torchmetrics rounds them to float32, and 7 of 10 miss 0.7.
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            max_detection_thresholds=[1, 10, 100],
            class_metrics=True,
        )
        both = [
            [{k: torch.as_tensor(v) for k, v in i.items()} for i in y] for y in (y_pred, y_true)
        ]
        metric.update(*both)
        theirs = metric.compute()
        assert box_average_precision(y_true, y_pred) == pytest.approx(
            theirs["map_50"].item(), abs=1e-6
        )
        steps = np.linspace(0.5, 0.95, 10)
        each = box_average_precision(y_true, y_pred, iou_threshold=steps, average=False)
        np.testing.assert_allclose(each, theirs["map_per_class"].numpy(), atol=1e-6)


def test_mean_iou_by_hand():
    y_true = [[[0, 0, 4, 4], [6, 6, 9, 9]], [], [[0, 0, 2, 2]]]
    y_pred = [
        {"boxes": [[0, 0, 4, 2], [0, 2, 4, 4]], "scores": [0.9, 0.2]},
        {"boxes": [[5, 5, 6, 6]], "scores": [0.1]},
        {"boxes": [[0, 0, 2, 2]], "scores": [0.8]},
    ]
    assert mean_box_iou(y_true, y_pred) == pytest.approx((0.5 + 0 + 1) / (3 + 2))
    assert mean_box_iou(y_true, y_pred, min_score=0.15) == pytest.approx(1.5 / 4)
    assert mean_box_iou(y_true, y_pred, count_extra=False) == pytest.approx(1.5 / 3)
    # Matched for the greatest sum, not greedily.
    assert mean_box_iou([[[0, 0, 4, 1], [2, 0, 6, 1]]], [[[1, 0, 5, 1], [0, 0, 3, 1]]]) > 0.6
    for seed in range(3):
        y_true, y_pred = random_images(seed)
        total = count = 0
        for a, b in zip(y_true, y_pred, strict=True):
            for name in (0, 1):
                pairs = [i["boxes"][i["labels"] == name] for i in (a, b)]
                iou = np.array([[slow_iou(t, f) for f in pairs[1]] for t in pairs[0]])
                from scipy.optimize import linear_sum_assignment

                if iou.size:
                    matched = iou[linear_sum_assignment(-iou)]
                    total, count = total + matched.sum(), count - (matched > 0).sum()
                count += len(pairs[0]) + len(pairs[1])
        assert mean_box_iou(y_true, y_pred) == pytest.approx(total / count)


def test_boxes_of_a_slide_are_compared_where_they_overlap():
    # All by all 20 000 boxes were 30 GB. Cells of a grid, so that the scores are known: of each
    # four one is missed, one half as wide, and there is one false alarm for each of them.
    corner = 10.0 * np.stack(np.meshgrid(np.arange(200), np.arange(100)), axis=-1).reshape(-1, 2)
    true = np.hstack([corner, corner + 8])
    found = true[np.arange(len(true)) % 4 > 0]
    found[::3, 2] -= 4
    wrong = true[np.arange(len(true)) % 4 == 0] + [2000, 0, 2000, 0]
    scores = np.repeat([0.9, 0.1], [len(found), len(wrong)])
    y_pred = [{"boxes": np.vstack([found, wrong]), "scores": scores}]
    tracemalloc.start()
    at_half = box_average_precision([true], y_pred, iou_threshold=0.5)
    above = box_average_precision([true], y_pred, iou_threshold=0.51, interpolation=None)
    mean = mean_box_iou([true], y_pred)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert at_half == pytest.approx(76 / 101)
    assert above == pytest.approx(
        np.mean(np.arange(1, 10001) / (1 + np.arange(10000) * 1.5)) / 2, 1e-3
    )
    assert mean == pytest.approx((0.5 * 1 + 0.25 * 0.5) / 1.25)
    assert peak < 100e6


def test_scores_of_nothing():
    empty = {"boxes": [], "scores": []}
    box = {"boxes": [[0, 0, 1, 1]], "scores": [0.5]}
    assert box_average_precision([[]], [empty]) == mean_box_iou([[]], [empty]) == 1
    assert box_average_precision([[]], [box]) == mean_box_iou([[]], [box]) == 0
    assert box_average_precision([box], [empty]) == mean_box_iou([box], [empty]) == 0
    assert box_average_precision([box], [box]) == mean_box_iou([box], [box]) == 1
    other = {**box, "labels": ["b"]}
    assert box_average_precision([{**box, "labels": ["a"]}], [other]) == 0
    each = box_average_precision([other], [other], labels=["a", "b"], average=False)
    np.testing.assert_array_equal(each, [np.nan, 1])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0, 0, 1]]], r"boxes of image 0 have shape \(1, 3\)"),
        ([[], [[3, 3, 2, 9]]], "boxes of image 1 hold .* no area"),
        ([[[0, 0, np.nan, 1]]], "NaN"),
        ([[["a", "b", "c", "d"]]], "no numbers"),
        ([{"box": []}], "dict with 'boxes', got the keys"),
        ([{"boxes": [[0, 0, 1, 1]], "labels": [1, 2]}], "are 1, but have 2 labels"),
        (
            [[], {"boxes": [[0, 0, 1, 1]], "labels": ["a"]}, [[0, 0, 1, 1]]],
            "boxes of image 2 have no labels, but those of others have",
        ),
        (
            [{"boxes": [[0, 0, 1, 1]], "labels": None}, {"boxes": [[0, 0, 1, 1]], "labels": [2]}],
            "boxes of image 0 have no labels",
        ),
        ({"boxes": []}, "must be a list"),
        (3, "must be a list"),
    ],
)
def test_bad_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_boxes(boxes)


def test_labels_that_are_none_were_not_given():
    box = {"boxes": [[0, 0, 1, 1]], "scores": [0.5]}
    found = check_boxes([{**box, "labels": None}, [[0, 0, 1, 1]]])
    assert [image["labels"].tolist() for image in found] == [[1], [1]]
    # Images without boxes have no labels in any case.
    named = check_boxes([{**box, "labels": ["a"]}, [], {"boxes": [], "labels": None}])
    assert [image["labels"].tolist() for image in named] == [["a"], [], []]
    with pytest.raises(ValueError, match=r"'scores', got the keys \['boxes'\]"):
        box_average_precision([box], [{**box, "scores": None}])


def test_words_and_numbers_as_labels_are_never_the_same():
    box = {"boxes": [[0, 0, 1, 1]], "scores": [0.5]}
    for score in (box_average_precision, mean_box_iou):
        for labels in ([1], None):
            with pytest.raises(ValueError, match="words and numbers as labels, '1', 1"):
                score([{**box, "labels": ["1"]}], [{**box, "labels": labels}])
        assert score([{**box, "labels": np.array([1], object)}], [{**box, "labels": [1.0]}]) == 1
    with pytest.raises(ValueError, match="The boxes have words and numbers as labels, 'a', 1"):
        check_boxes([{**box, "labels": ["a"]}, {**box, "labels": [1]}])


def test_bad_options_of_scores():
    box = {"boxes": [[0, 0, 1, 1]], "scores": [0.5]}
    with pytest.raises(ValueError, match="iou_threshold"):
        box_average_precision([box], [box], iou_threshold=0)
    with pytest.raises(ValueError, match="interpolation"):
        box_average_precision([box], [box], interpolation="voc")
    with pytest.raises(ValueError, match="2 images, but y_pred has 1"):
        box_average_precision([box, box], [box])
    with pytest.raises(ValueError, match="'scores'"):
        box_average_precision([box], [[[0, 0, 1, 1]]])


# ---- head ----------------------------------------------------------------------------------------


def network(n_classes=2, stride=2):
    with isolated_rng(0):
        return DetectionNetwork(UNetDenoiser(3, block_out_channels=(8, 8)), n_classes, 32, stride)


def test_only_the_last_layer_is_new():
    with isolated_rng(0):
        denoiser = UNetDenoiser(3, block_out_channels=(8, 8))
        before = copy.deepcopy(denoiser.state_dict())
        after = DetectionNetwork(denoiser, 1, 32).features.denoiser.state_dict()
    changed = {n for n in before if not before[n].shape == after[n].shape}
    assert changed == {"unet.conv_out.weight", "unet.conv_out.bias"}
    assert all(torch.equal(before[n], after[n]) for n in before if n not in changed)


def test_loss_and_places_are_torchvisions():
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOS

    images, stride = torch.randn(3, 3, 12, 16, generator=torch.Generator().manual_seed(0)), 2
    module = network()
    with torch.no_grad():
        found = module(images)
    boxes = torch.tensor(
        [[[1.0, 1, 7, 9], [2, 3, 6, 7]], [[8, 4, 15, 10.5], [0, 0, 0, 0]], [[0.0, 0, 0, 0]] * 2]
    )
    codes = torch.tensor([[0.0, 1], [1, BLANK], [BLANK, BLANK]])
    places = places_of((12, 16), stride)
    ours = detection_loss(found, places, boxes, codes, stride)

    def body(x):
        return x

    body.out_channels = 32
    peer = FCOS(body, 2, anchor_generator=AnchorGenerator(((2,),), ((1.0,),)), head=module.head)
    anchors = torch.cat([places - stride / 2, places + stride / 2], dim=1)
    targets = [
        {"boxes": b[c >= 0], "labels": c[c >= 0].long()} for b, c in zip(boxes, codes, strict=True)
    ]
    outputs = dict(
        zip(
            ("cls_logits", "bbox_regression", "bbox_ctrness"),
            found.split([2, 4, 1], 2),
            strict=True,
        )
    )
    theirs = peer.compute_loss(targets, outputs, [anchors] * 3, [len(places)])
    for own, name in zip(("classification", "box", "centreness"), theirs, strict=True):
        torch.testing.assert_close(ours[own], theirs[name])
    torch.testing.assert_close(ours["loss"], sum(theirs.values()))


def test_blank_places_count_nowhere():
    places = places_of((8, 8), 2)
    boxes = torch.tensor([[[0.0, 0, 4, 8], [0.5, 0.5, 3, 3]]])
    number, matched, blank = match_places(places, boxes, torch.tensor([[BLANK, 0]]), 2)
    inside = (places[:, 0] < 4)[None]
    assert torch.equal(blank | matched, inside)
    assert matched.sum() == 1  # the places at 3 are on the border of the small box
    assert number[matched].tolist() == [1]
    found = torch.zeros(1, 16, 6)
    one, other = found.clone(), found.clone()
    other[:, ~(~blank)[0]] = 3.0  # what is predicted at blank places
    args = places, boxes, torch.tensor([[BLANK, 0.0]]), 2
    assert detection_loss(one, *args)["loss"] == detection_loss(other, *args)["loss"]
    nothing = detection_loss(found, places, torch.zeros(1, 1, 4), torch.full((1, 1), -1.0), 2)
    assert nothing["box"] == nothing["centreness"] == 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_maps_and_candidates_keep_boxes(stride):
    """What a place predicts comes back as that box, wherever it is looked up."""
    size = (9, 14)
    places = places_of(size, stride)
    found = torch.full((1, len(places), 6), -20.0)
    found[..., 5] = 20
    at = len(places) // 2
    box = torch.tensor([1.0, 2, 12, 8])
    sides = torch.cat([places[at] - box[:2], box[2:] - places[at]]) / stride
    found[0, at] = torch.cat([torch.tensor([20.0]), sides, torch.tensor([20.0])])
    maps = pixel_maps(found, size, stride)
    assert maps.shape == (1, 5, *size)
    boxes = candidates(maps[0], slice(0, 9), size, stride, 0.5)
    assert len(boxes) == 1
    torch.testing.assert_close(boxes[0], torch.tensor([1.0, 2, 12, 8, 1, 0]))
    halves = [
        candidates(maps[0][:, a:b], slice(a, b), size, stride, 0.5) for a, b in [(0, 5), (5, 9)]
    ]
    torch.testing.assert_close(torch.cat(halves), boxes)


def test_duplicates_go_as_if_all_at_once():
    from torchvision.ops import batched_nms

    rng = np.random.default_rng(0)
    corner = rng.uniform(0, (40, 200), (400, 2))
    table = np.hstack([corner, corner + rng.uniform(4, 12, (400, 2)), rng.random((400, 1))])
    table = torch.tensor(np.hstack([table, rng.integers(2, size=(400, 1))]), dtype=torch.float32)
    middle = (table[:, 1] + table[:, 3]) / 2
    boxes = StripBoxes(12, 0.3)
    for top in range(0, 220, 20):
        boxes.add(slice(top, top + 20), table[(middle >= top) & (middle < top + 20)])
    once = table[batched_nms(table[:, :4], table[:, 4], table[:, 5], 0.3)]
    found = boxes.all()
    share = np.isin(found[:, 4].numpy(), once[:, 4].numpy()).mean()
    assert len(found) < 300
    assert share > 0.97  # chains over several strips may end otherwise
    assert len(found) == pytest.approx(len(once), rel=0.03)


def test_many_boxes_are_compared_with_those_beside_them(monkeypatch):
    import torchvision

    batched_nms, pairs = torchvision.ops.batched_nms, []

    def counting(boxes, scores, kinds, threshold):
        pairs.append(int((kinds.unique(return_counts=True)[1] ** 2).sum()))
        return batched_nms(boxes, scores, kinds, threshold)

    rng = np.random.default_rng(0)
    corner = np.stack(np.meshgrid(np.arange(500), np.arange(6)), axis=-1).reshape(-1, 2) * 20.0
    corner = np.repeat(corner, 6, axis=0) + rng.normal(0, 0.5, (18000, 2))
    table = np.hstack(
        [corner, corner + 14, rng.random((18000, 1)), rng.integers(2, size=(18000, 1))]
    )
    table = torch.tensor(table, dtype=torch.float32)
    once = table[counting(table[:, :4], table[:, 4], table[:, 5], 0.5)]
    monkeypatch.setattr(torchvision.ops, "batched_nms", counting)
    boxes = StripBoxes(128, 0.5)
    boxes.add(slice(0, 120), table)
    # 2 classes of 9 000 in one piece; 9 pieces of 2 x 1 000, and then what is left, 2 x 3 000.
    assert sum(pairs[1:]) < pairs[0] / 4
    found = boxes.all()
    assert len(found) == len(once)
    np.testing.assert_array_equal(*(np.sort(part[:, 4].numpy()) for part in (found, once)))


# ---- learning ------------------------------------------------------------------------------------


def test_it_learns_places_and_classes(learned):
    X, masks = squares(24)
    boxes = boxes_from_masks(masks)
    assert learned.classes_.tolist() == [1, 2]
    assert learned.head_stride_ == 2
    assert learned.score(X[16:], boxes[16:]) > 0.8
    found = learned.predict(X[16:])
    assert mean_box_iou(boxes[16:], found, min_score=0.4) > 0.6
    with isolated_rng(1):
        untrained = copy.copy(learned)
        untrained.module_ = learned._build()
    assert untrained.set_params(score_threshold=0.0).score(X[16:], boxes[16:]) < 0.05
    assert {"classification", "box", "centreness"} <= set(learned.history_)


def test_whole_images_are_put_together_from_tiles(learned):
    X, masks = squares(1, 70, 90, seed=5, most=12)
    boxes = boxes_from_masks(masks)
    assert learned.score(X, boxes) > 0.7
    (found,) = learned.predict(X)
    assert found["boxes"].min() >= 0
    assert (found["boxes"] <= [90, 70, 90, 70]).all()
    assert (np.diff(found["scores"]) <= 0).all()
    assert found["boxes"].dtype == found["scores"].dtype == np.float32
    # The second of the two tiles of a row begins a column later than the distance of tiles.
    assert learned.predict(X[:, :16, :17])[0]["boxes"].shape[1] == 4


def test_places_of_all_tiles_coincide(learned):
    X = np.zeros((1, 51, 53, 3), np.uint8)
    X[..., 0], X[..., 1] = np.arange(53), np.arange(51)[:, None]
    corners = []
    hook = learned.module_.register_forward_pre_hook(
        lambda module, inputs: corners.append(inputs[0][:, :2, 0, 0].float().cpu())
    )
    try:
        learned.predict(X)
    finally:
        hook.remove()
    corners = ((torch.cat(corners) + 1) * 127.5).round().numpy()
    assert corners.max(axis=0).tolist() == [38, 36]  # one pixel beyond the border, mirrored
    assert (corners % learned.head_stride_ == 0).all()
    # A tile that holds less than one place ends at the border.
    model = tiny(head_stride=16, patch_size=8, stride=8, diffusion=None).fit(X, [[[4, 4, 20, 20]]])
    assert len(model.predict(X)) == 1


def test_the_score_does_not_hang_on_the_threshold_of_predictions(fitted, data):
    X, boxes = data
    scores, counts = [], []
    for threshold in (0.05, 0.2, 0.9):
        model = copy.copy(fitted).set_params(score_threshold=threshold)
        scores.append(model.score(X, boxes))
        counts.append(sum(len(image["boxes"]) for image in model.predict(X)))
    assert scores[0] == scores[1] == scores[2] > 0
    assert counts[0] > counts[2]


def test_an_image_without_objects():
    X, masks = squares(6)
    X[0], masks[0] = 0, 0
    model = tiny(score_threshold=0.9).fit(X, boxes_from_masks(masks))
    for image in model.predict(X):
        assert image["boxes"].shape == (0, 4)
        assert image["labels"].shape == image["scores"].shape == (0,)
        assert image["labels"].dtype == model.classes_.dtype
    assert 0 <= model.score(X, boxes_from_masks(masks)) <= 1  # of weaker boxes, too


@pytest.mark.parametrize("pretext", ["diffusion", "inpainting"])
def test_pretraining_changes_the_start(data, pretext):
    X, boxes = data
    plain = tiny(diffusion=None, score_threshold=0.01).fit(X, boxes)
    model = tiny(pretext=pretext, score_threshold=0.01).fit(X, boxes)
    assert set(plain.history_["phase"]) == {"finetuning"}
    assert model.history_["phase"].tolist() == ["pretraining", "finetuning"]
    with pytest.raises(AssertionError):
        equal(plain.predict(X), model.predict(X))
    pool = squares(4, 20, 24, seed=3)[0]
    assert tiny().fit(X, boxes, unlabeled=pool).history_["loss"][0] != model.history_["loss"][0]


def test_pretraining_is_the_segmenters(data):
    from diffaugkit import DiffusionSegmenter

    X, boxes = data
    options = tiny(augment=False).get_params()
    shared = {k: v for k, v in options.items() if k in DiffusionSegmenter().get_params()}
    masks = np.zeros(X.shape[:3], int)
    masks[:, 4:9] = 1
    other = DiffusionSegmenter(**shared).fit(X, masks)
    assert other.history_["loss"][0] == tiny(augment=False).fit(X, boxes).history_["loss"][0]


def test_a_fitted_diffusion_gives_its_unet(data):
    X, boxes = data
    generator = EmbeddingConditionedDiffusion(
        None, block_out_channels=(8, 16), max_epochs=1, random_state=0, n_sampling_steps=2
    )
    frozen = FrozenEstimator(clone(generator).fit(X[:, :16, :16]))
    weights = copy.deepcopy(frozen.module_.state_dict())
    model = tiny(diffusion=frozen).fit(X, boxes)
    assert all(torch.equal(weights[n], w) for n, w in frozen.module_.state_dict().items())
    assert set(model.history_["phase"]) == {"finetuning"}
    with pytest.raises(ValueError, match="channels"):
        tiny(diffusion=frozen).fit(X[..., 0], boxes)


def test_boxes_between_the_places_are_warned_of(data):
    X, boxes = data
    small = [[[3, 3, 5, 7]], *[image["boxes"] for image in boxes[1:]]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(diffusion=None).fit(X, small)
    # Boxes of 2 x 4 and 4 x 4 pixels: an eighth and a quarter of what a place stands for.
    with pytest.warns(UserWarning, match=r"head_stride=8 about 81% of the boxes lie") as caught:
        tiny(diffusion=None, head_stride=8).fit(X[:2], [small[0], [[1, 1, 5, 5]]])
    assert caught[0].filename == __file__


def test_held_out_images_without_objects_choose_no_epoch(data):
    X, boxes = data
    model = tiny(max_epochs=2, validation_fraction=0.25)
    held = model._split(len(X), None, 0)[1]
    none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int)}
    boxes = [none if row in held else image for row, image in enumerate(boxes)]
    with pytest.warns(UserWarning, match="holds out shows an object"):
        model.fit(X, boxes)
    assert "validation_ap" not in model.history_


def test_the_best_epoch_is_kept(data):
    X, boxes = data
    model = tiny(max_epochs=6, validation_fraction=0.4, learning_rate=5e-3).fit(X, boxes)
    scores = model.history_["validation_ap"].dropna().tolist()
    assert len(scores) == 6
    best = int(np.argmax(scores))
    kept = clone(model).set_params(callbacks=lambda epoch, history: epoch == best).fit(X, boxes)
    assert kept.history_["validation_ap"].dropna().tolist() == scores[: best + 1]
    equal(kept.predict(X), model.predict(X))


def test_containers_sizes_and_batches(data, fitted, tmp_path):
    from PIL import Image

    X, boxes = data
    whole = fitted.predict(X)
    assert sum(len(image["boxes"]) for image in whole) > 0
    equal(fitted.predict(X[3:5]), whole[3:5])
    images = [X[0], X[1, :20, :9], X[2, :3, :2], squares(1, 40, 37)[0][0]]
    together = fitted.predict(images)
    for image, found in zip(images, together, strict=True):
        equal(fitted.predict(image[None]), [found])
        size = image.shape[1::-1]
        assert (found["boxes"] <= [*size, *size]).all()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    equal(fitted.predict(sorted(tmp_path.glob("*.png"))), together)
    equal(fitted.predict([Image.open(tmp_path / "0.png")]), whole[:1])
    equal(fitted.predict([open_slide(image) for image in images]), together)
    several = tiny().fit(images[:2], [boxes[0]["boxes"], [[1, 2, 8, 9]]])
    assert several.patch_shape_ == (16, 16)
    assert several.classes_.tolist() == [1]
    grey = tiny().fit(X[..., 0] / 255, boxes)
    assert grey.image_shape_ == (32, 32, 1)
    flat = tiny(image_shape=(32, 32, 3), score_threshold=0.01).fit(X.reshape(8, -1), boxes)
    equal(flat.predict(X.reshape(8, -1)), whole)


def test_labels_come_back_as_they_were(data):
    X, boxes = data
    named = [{**b, "labels": np.array(["", "cell", "gland"])[b["labels"]]} for b in boxes]
    model = tiny(score_threshold=0.0, classes=["gland", "cell", "other"]).fit(X, named)
    assert model.classes_.tolist() == ["gland", "cell", "other"]
    found = model.predict(X[:1])[0]
    assert set(found["labels"]) <= set(model.classes_)
    assert model.score(X, named) >= 0
    with pytest.raises(ValueError, match="label 'gland'"):
        tiny(classes=["cell"]).fit(X, named)
    with pytest.raises(ValueError, match="twice"):
        tiny(classes=["cell", "gland", "cell"]).fit(X, named)
    one, other = tiny().fit(X, boxes), tiny(classes=[2, 1]).fit(X, boxes)
    assert one.history_["loss"][1] != other.history_["loss"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, b: (X, b[:4]), "8 images, but boxes has 4"),
        (lambda X, b: (X, None), "y is None"),
        (lambda X, b: (X, [[]] * 8), "all empty"),
        (lambda X, b: (X, [[[0.1, 0.2, 0.5, 0.9]]] * 8), "beyond 0.9 pixels"),
        (lambda X, b: (X, X[..., 0]), "boxes_from_masks"),
        (
            lambda X, b: (X, [*b[:7], {"boxes": [[0, 0, 33, 4]], "labels": [1]}]),
            r"image 7 hold .* 32 x 32 pixels",
        ),
        (lambda X, b: (X, [*b[:7], b[7]["boxes"]]), "image 7 have no labels"),
        (
            lambda X, b: (X, [*b[:7], {"boxes": [[0, 0, 3, 4]] * 2, "labels": [1, None]}]),
            r"boxes of image 7 has missing labels \(NaN or None\) in rows 1: name or drop",
        ),
        (
            lambda X, b: (X, [{**image, "labels": image["labels"] * np.nan} for image in b]),
            r"missing labels",
        ),
        (lambda X, b: (X, [*b[:7], [[5, 5, 3, 3]]]), "width, height"),
        (lambda X, b: (X.reshape(8, -1), b), "image_shape"),
        (lambda X, b: (["nowhere.png"] * 8, b), "nowhere.png"),
    ],
)
def test_bad_input(data, change, message):
    with pytest.raises(ValueError, match=message):
        tiny().fit(*change(*data))


def test_a_failed_fit_changes_nothing(data, fitted):
    X, boxes = data
    with pytest.raises(ValueError, match=r"requires y .* give boxes"):
        fitted.score(X, None)
    before = vars(fitted).copy()
    with pytest.raises(ValueError, match="boxes"):
        fitted.fit(X, boxes[:2])
    assert vars(fitted) == before
    with pytest.raises(ValueError, match="channels"):
        fitted.predict(X[..., 0])
    with pytest.raises(NotFittedError):
        tiny().predict(X)
    with pytest.raises(ValueError, match="groups"):
        tiny().fit(X, boxes, groups=[1, 2])
    with pytest.raises(ValueError, match="multiple of 32"):
        tiny(head_width=40).fit(X, boxes)


# ---- scikit-learn, copies, resume ----------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        # Those of scikit-learn's checks that fit nothing: the others fit class labels as targets.
        estimator_checks.check_param_validation,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_requires_y_none,
    ],
    ids=lambda check: check.__name__,
)
def test_scikit_learns_checks(check):
    check("DiffusionDetector", tiny(image_shape=(1, 1, -1)))


def test_composition(data):
    X, boxes = data
    assert cross_val_score(tiny(), X, boxes, cv=2).shape == (2,)
    search = GridSearchCV(tiny(diffusion=None), {"head_stride": [2, 4]}, cv=2).fit(X, boxes)
    assert search.best_estimator_.head_stride_ in (2, 4)
    assert len(search.predict(X)) == 8


def test_a_refit_is_equal_and_copies_too(data, fitted, tmp_path):
    X, boxes = data
    expected = fitted.predict(X)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    equal(clone(fitted).fit(X, boxes).predict(X), expected)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    equal(pickle.load(io.BytesIO(pickle.dumps(fitted))).predict(X), expected)
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    equal(loaded.predict(X), expected)
    assert loaded.score(X, boxes) == fitted.score(X, boxes)


@pytest.mark.parametrize("phase", [0, 1])
def test_a_killed_fit_goes_on(data, tmp_path, phase):
    X, boxes = data
    options = {"pretrain_epochs": 3, "max_epochs": 3, "validation_fraction": 0.3}
    whole = tiny(**options).fit(X, boxes)
    calls = []

    def die(epoch, history):
        calls.append(epoch)
        if len(calls) == 2 + 3 * phase:
            raise KeyboardInterrupt

    broken = tiny(**options, checkpoint_dir=tmp_path, callbacks=die)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(X, boxes)
    resumed = tiny(**options, checkpoint_dir=tmp_path).fit(X, boxes)
    equal(resumed.predict(X), whole.predict(X))
    assert resumed.history_.equals(whole.history_)
