"""Scores of boxes: average precision, and the mean IoU of GenSelfDiff-HIS (table XV).

A box is (x_min, y_min, x_max, y_max) in pixels: a pixel in column j covers j to j + 1. The boxes of
an image are an array (n, 4), or a dict as torchvision has it, ``{"boxes": (n, 4), "labels": (n,),
"scores": (n,)}``, whose labels may be left out in all images, and of the truth the scores too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score

from diffaugkit.arrays import some, to_numpy
from diffaugkit.metrics.segmentation import iou_tables

_RECALLS = np.linspace(0, 1, 101)
_MOST_PAIRS = 2**20  # looked at in one go


def box_average_precision(
    y_true: Sequence,
    y_pred: Sequence,
    *,
    iou_threshold: float | Sequence[float] = 0.5,
    labels: Sequence | None = None,
    interpolation: str | None = "coco",
    average: bool = True,
) -> float | np.ndarray:
    """Average precision of boxes with scores, by COCO's rules.

    All predictions of a class are gone through from the highest score down. Each takes, of the true
    boxes of its image that are still free, the one of the largest IoU, if that reaches the
    threshold: a hit. Any other is a false alarm, a second box on the same object too. Precision is
    the share of hits so far, recall the share of true boxes found so far.

    Parameters
    ----------
    y_true : sequence of arrays (n, 4), or of dicts with "boxes" and "labels"
        True boxes of each image; an image may have none.
    y_pred : sequence of dicts with "boxes", "scores" and "labels"
        Predictions of the same images. Boxes without labels all have the label 1.
    iou_threshold : float or sequence of float, default=0.5
        IoU from which a box counts as found, in (0, 1]. For several the mean over them:
        ``np.linspace(0.5, 0.95, 10)`` is COCO's main figure.
    labels : sequence or None, default=None
        Classes to score; None takes those of `y_true`.
    interpolation : "coco" or None, default="coco"
        Area below the curve: the mean over 101 recalls of the best precision at that recall or
        beyond, as pycocotools has it, or the plain sum of steps of
        ``sklearn.metrics.average_precision_score``.
    average : bool, default=True
        Whether to return the mean over classes, or one value each.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_classes,)
        NaN for a class without true boxes, which the mean leaves out. The mean over no class at all
        is 1 where nothing was predicted, else 0.

    Raises
    ------
    ValueError
        For lists of different length, arrays that are no boxes (the message names the image), and
        strings beside numbers as labels.

    Notes
    -----
    COCO looks at the 100 best predictions of an image only; here all count. The IoU is that of
    ``torchvision.ops.box_iou``, in float64. Memory is that of the pairs which overlap, so that a
    slide of 100 000 nuclei is an image as any other.

    References
    ----------
    Lin et al. 2014, "Microsoft COCO: Common Objects in Context".

    Examples
    --------
    >>> from diffaugkit.metrics import box_average_precision
    >>> y_true = [[[0, 0, 4, 4], [6, 6, 9, 9]]]
    >>> y_pred = [{"boxes": [[0, 0, 4, 3], [0, 0, 4, 4]], "scores": [0.9, 0.8]}]
    >>> round(box_average_precision(y_true, y_pred), 3)  # one of two found, 51 of 101 recalls
    0.505
    >>> box_average_precision(y_true, y_pred, interpolation=None)
    0.5
    """
    if interpolation not in ("coco", None):
        raise ValueError(f"interpolation={interpolation!r} must be 'coco' or None.")
    thresholds = np.atleast_1d(np.asarray(iou_threshold, np.float64))
    if not (len(thresholds) and np.all((thresholds > 0) & (thresholds <= 1))):
        raise ValueError(f"iou_threshold={iou_threshold!r} must be in (0, 1].")
    true, found = _pair(y_true, y_pred)
    names = _names(true) if labels is None else np.asarray(labels)
    values = [
        np.mean([_average_precision(matches, t, interpolation) for t in thresholds])
        for matches in (_Matches(_of_class(true, found, name)) for name in names)
    ]
    values = np.array(values, np.float64)
    if not average:
        return values
    if np.isnan(values).all():
        return float(not any(len(image["boxes"]) for image in found))
    return float(np.nanmean(values))


def mean_box_iou(
    y_true: Sequence,
    y_pred: Sequence,
    *,
    min_score: float = 0.0,
    count_extra: bool = True,
    labels: Sequence | None = None,
) -> float:
    """Mean IoU of true boxes with the predicted boxes that are matched to them.

    In each image and class boxes are matched one to one so that the sum of their IoU is greatest
    (Hungarian method). The sum over all images is divided by the number of true boxes plus, with
    `count_extra`, that of predictions without a partner: a missed object counts 0, and so does a
    false alarm.

    Parameters
    ----------
    y_true, y_pred, labels
        As for :func:`box_average_precision`; predictions need no scores if `min_score` is 0. With
        `labels` None, classes that were only predicted count too.
    min_score : float, default=0.0
        Predictions of a lower score are left out. Unlike average precision this figure depends on
        where that line is drawn.
    count_extra : bool, default=True
        False divides by the number of true boxes alone. The paper, which gives no definition, may
        mean that, but then boxes everywhere score well: 0.5 on a picture of nuclei, where their
        average precision was 0.01.

    Returns
    -------
    float in [0, 1]
        1 where there are no boxes at all.

    Raises
    ------
    ValueError
        As for :func:`box_average_precision`.

    References
    ----------
    Purma et al., GenSelfDiff-HIS, section V-C and table XV.

    Examples
    --------
    >>> from diffaugkit.metrics import mean_box_iou
    >>> mean_box_iou([[[0, 0, 4, 4], [6, 6, 9, 9]]], [[[0, 0, 4, 3]]])
    0.375
    """
    true, found = _pair(y_true, y_pred, scored=min_score > 0)
    if min_score > 0:
        found = [_taken(image, image["scores"] >= min_score) for image in found]
    total, count = 0.0, 0
    for name in _names(true + found) if labels is None else labels:
        for one, other in _of_class(true, found, name):
            count += len(one["boxes"]) + count_extra * len(other["boxes"])
            for iou in iou_tables(_overlapping(one["boxes"], other["boxes"])):
                matched = iou[linear_sum_assignment(iou, maximize=True)]
                total += matched.sum()
                count -= count_extra * np.count_nonzero(matched)
    return float(total / count) if count else 1.0


def check_boxes(y: Sequence, name: str = "boxes", scored: bool = False) -> list[dict]:
    """Read boxes of several images in either form.

    Parameters
    ----------
    y : sequence of array-like of shape (n, 4), or of dicts
        See the head of this file.
    name : str, default="boxes"
        What messages call it.
    scored : bool, default=False
        Whether scores must be there.

    Returns
    -------
    list of dict
        "boxes" float64 (n, 4), "labels" (n,), 1 where none were given, and "scores" float64 (n,) if
        `scored`.

    Raises
    ------
    ValueError
        For anything else, for boxes whose maxima do not exceed their minima, and if the boxes of
        some images have labels and those of others have none, or words here and numbers there.
    """
    if isinstance(y, dict | str) or not hasattr(y, "__len__"):
        raise ValueError(f"{name} must be a list with the boxes of each image, one entry each.")
    found = [
        _check_image(image, f"{name} of image {number}", scored) for number, image in enumerate(y)
    ]
    # The 1 of boxes without labels must not become a class beside those that have names.
    named = {
        number: isinstance(image, dict) and image.get("labels") is not None
        for number, image in enumerate(y)
        if len(found[number]["boxes"])
    }
    if any(named.values()) and not all(named.values()):
        first = next(number for number in named if not named[number])
        raise ValueError(
            f"The {name} of image {first} have no labels, but those of others have: give the class "
            "of each box in all images, or in none."
        )
    _refuse_mixed(found, f"The {name}")
    return found


def _refuse_mixed(images, name):
    """Refuse words beside numbers as labels, which are never the same."""
    labels = [image["labels"].tolist()[0] for image in images if len(image["labels"])]
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError(
            f"{name} have words and numbers as labels, {some(sorted(set(map(repr, labels))))}: "
            "give one form. Boxes without labels have the label 1."
        )


def _check_image(image, name, scored):
    given = image if isinstance(image, dict) else {"boxes": image}
    if "boxes" not in given or (scored and given.get("scores") is None):
        need = "'boxes' and 'scores'" if scored else "'boxes'"
        raise ValueError(f"The {name} must be a dict with {need}, got {_kind(image)}.")
    try:
        boxes = np.asarray(to_numpy(given["boxes"]), np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The {name} are no numbers: {error}.") from error
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"The {name} have shape {boxes.shape}, expected (n, 4): x_min, y_min, x_max, y_max of "
            "each object, and [] where there is none. boxes_from_masks makes boxes of masks."
        )
    if not np.isfinite(boxes).all():
        raise ValueError(f"The {name} hold NaN or infinity.")
    if (flat := ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)).any():
        raise ValueError(
            f"The {name} hold {boxes[flat][0].tolist()}, which has no area: a box is (x_min, "
            "y_min, x_max, y_max), not (x, y, width, height)."
        )
    out = {"boxes": boxes}
    for key in ("labels", "scores") if scored else ("labels",):
        values = given.get(key)
        values = np.ones(len(boxes), np.int64) if values is None else to_numpy(values)
        values = np.asarray(values, np.float64 if key == "scores" else None).reshape(-1)
        if len(values) != len(boxes):
            raise ValueError(f"The {name} are {len(boxes)}, but have {len(values)} {key}.")
        out[key] = values if len(values) or key == "scores" else values.astype(np.int64)
    if scored and not np.isfinite(out["scores"]).all():
        raise ValueError(f"The scores of the {name} hold NaN or infinity.")
    return out


def _kind(image):
    if not isinstance(image, dict):
        return type(image).__name__
    return f"the keys {[key for key, values in image.items() if values is not None]}"


def _pair(y_true, y_pred, scored=True):
    true, found = check_boxes(y_true, "y_true"), check_boxes(y_pred, "y_pred", scored)
    if len(true) != len(found):
        raise ValueError(f"y_true has {len(true)} images, but y_pred has {len(found)}.")
    _refuse_mixed(true + found, "y_true and y_pred")
    return true, found


def _names(images):
    """Labels of all boxes, sorted."""
    return np.unique(np.concatenate([i["labels"] for i in images if len(i["labels"])] or [[]]))


def _taken(image, rows):
    return {key: values[rows] for key, values in image.items()}


def _of_class(true, found, name):
    """Keep the true and predicted boxes of one class, by image."""
    return [
        tuple(_taken(image, image["labels"] == name) for image in pair)
        for pair in zip(true, found, strict=True)
    ]


def _overlapping(true, predicted):
    """Pairs of boxes that share pixels, and their IoU: no table of all by all."""
    names = [("true", int), ("predicted", int), ("iou", float)]
    found = [np.zeros(0, names)]
    if not (len(true) and len(predicted)):
        return found[0]
    # Of the boxes from left to right those can overlap that begin within this reach.
    order = np.argsort(predicted[:, 0], kind="stable")
    begins, widest = predicted[order, 0], np.ptp(predicted[:, ::2], axis=1).max()
    first = np.searchsorted(begins, true[:, 0] - widest, side="left")
    counts = np.searchsorted(begins, true[:, 2], side="left") - first
    part = np.cumsum(counts) // _MOST_PAIRS
    for rows in np.split(np.arange(len(true)), np.flatnonzero(np.diff(part)) + 1):
        n = counts[rows]
        t = np.repeat(rows, n)
        p = order[np.repeat(first[rows] - (np.cumsum(n) - n), n) + np.arange(n.sum())]
        low = np.maximum(true[t, :2], predicted[p, :2])
        high = np.minimum(true[t, 2:], predicted[p, 2:])
        near = (high > low).all(axis=1)
        t, p, shared = t[near], p[near], np.prod(high[near] - low[near], axis=1)
        pairs = np.zeros(len(t), names)
        pairs["true"], pairs["predicted"] = t, p
        areas = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (true[t], predicted[p]))
        pairs["iou"] = shared / (sum(areas) - shared)
        found.append(pairs)
    return np.concatenate(found)


class _Matches:
    """Of the images of one class: which predictions find a true box, at any threshold."""

    def __init__(self, images):
        self.n_true = sum(len(true["boxes"]) for true, _ in images)
        self._pairs, scores = [], [np.zeros(0)]
        for true, found in images:
            order = np.argsort(-found["scores"], kind="stable")
            scores.append(found["scores"][order])
            pairs = _overlapping(true["boxes"], found["boxes"][order])
            # A prediction takes the best box that those of higher scores have left.
            keys = pairs["true"], -pairs["iou"], pairs["predicted"]
            self._pairs.append((len(order), pairs[np.lexsort(keys)]))
        self.scores = np.concatenate(scores)

    def hits(self, threshold):
        """Tell of each prediction, in the order of ``scores``, whether it finds a true box."""
        hits = [np.zeros(0, bool)]
        for n, pairs in self._pairs:
            hit, taken = np.zeros(n, bool), set()
            close = pairs[pairs["iou"] >= threshold]
            for p, t in zip(close["predicted"].tolist(), close["true"].tolist(), strict=True):
                if not hit[p] and t not in taken:
                    hit[p] = True
                    taken.add(t)
            hits.append(hit)
        return np.concatenate(hits)


def _average_precision(matches, threshold, interpolation):
    n_true, score = matches.n_true, matches.scores
    if not n_true:
        return np.nan
    hit = matches.hits(threshold)
    if not hit.any():
        return 0.0
    if interpolation is None:
        # scikit-learn's recall is that among the boxes found: the missed ones come in here.
        return average_precision_score(hit, score) * hit.sum() / n_true
    found = np.cumsum(hit[np.argsort(-score, kind="stable")])
    precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
    at = np.searchsorted(found / n_true, _RECALLS)
    return float(np.append(precision, 0.0)[at].mean())
