"""Scores of masks: regions, objects, contours, and segments that have no names.

====================================  ===========================================================
masks                                 scores
====================================  ===========================================================
classes per pixel (semantic)          ``dice_score``, ``iou_score``, ``pixel_aji``,
                                      ``sensitivity``, ``specificity``
segments without names (zero-shot)    ``matched_dice``, ``matched_iou``
objects, each with a number           ``object_aji``, ``object_f1``, ``panoptic_quality``
two sets of points                    ``hausdorff_distance``, ``hd95``, ``row_hausdorff``
====================================  ===========================================================

Label 0 is the background, which counts only where it is asked for. ``label_instances`` makes
objects from classes. Macro F1 and AUC are scikit-learn's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, label
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import directed_hausdorff
from sklearn.metrics import make_scorer, multilabel_confusion_matrix

from diffaugkit.arrays import strips, to_numpy, warn

# ------------------------------------------------------------------ classes per pixel


def dice_score(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence[int] | None = None,
    average: bool = True,
    per_image: bool = False,
    ignore_label: int | None = None,
    zero_division: float = 1.0,
) -> float | np.ndarray:
    """Dice coefficient of classes per pixel: twice the overlap over the sum of the sizes.

    Parameters
    ----------
    y_true : bool or int array-like of any shape, or list of masks of several sizes
        Class of each pixel.
    y_pred : as `y_true`
        Predicted classes.
    labels : sequence of int or None, default=None
        Classes to count. None takes all that occur in either, but not 0, the background.
    average : bool, default=True
        Whether to return the mean over classes (and images), or one value each.
    per_image : bool, default=False
        Whether each entry of the first axis, or of the list, is scored by itself. False pools all
        pixels, so that a large object counts more than a small one.
    ignore_label : int or None, default=None
        Pixels of this label in `y_true` are left out.
    zero_division : float, default=1.0
        Value of a class that is in neither: 1 praises that nothing was found where nothing is; NaN
        leaves it out of the mean.

    Returns
    -------
    dice : float in [0, 1], or ndarray of shape (n_classes,) or (n_images, n_classes)
        Classes are sorted, or in the order of `labels`.

    Raises
    ------
    ValueError
        If shapes disagree, the masks hold probabilities, or bool masks stand beside labels other
        than 0 and 1.

    See Also
    --------
    iou_score : Intersection over union; Dice is 2 IoU / (1 + IoU).
    matched_dice : For segments that have no class.

    Examples
    --------
    >>> from diffaugkit.metrics import dice_score
    >>> dice_score([[1, 1, 0, 0]], [[0, 1, 1, 0]])
    0.5
    >>> dice_score([[1, 1, 2, 0]], [[0, 1, 2, 2]], average=False).round(2).tolist()
    [0.67, 0.67]
    """
    overlap, true, predicted = _region_sizes(y_true, y_pred, labels, per_image, ignore_label)
    return _ratio(2 * overlap, true + predicted, average, zero_division, per_image)


def iou_score(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence[int] | None = None,
    average: bool = True,
    per_image: bool = False,
    ignore_label: int | None = None,
    zero_division: float = 1.0,
) -> float | np.ndarray:
    """Intersection over union (Jaccard index) of classes per pixel.

    Parameters
    ----------
    y_true, y_pred, labels, average, per_image, ignore_label, zero_division
        As for :func:`dice_score`.

    Returns
    -------
    iou : float in [0, 1], or ndarray of shape (n_classes,) or (n_images, n_classes)

    Raises
    ------
    ValueError
        If shapes disagree, the masks hold probabilities, or bool masks stand beside labels other
        than 0 and 1.

    Examples
    --------
    >>> from diffaugkit.metrics import iou_score
    >>> iou_score([[1, 1, 0, 0]], [[0, 1, 1, 0]])
    0.3333333333333333
    """
    overlap, true, predicted = _region_sizes(y_true, y_pred, labels, per_image, ignore_label)
    return _ratio(overlap, true + predicted - overlap, average, zero_division, per_image)


def pixel_aji(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence[int] | None = None,
    ignore_label: int | None = None,
) -> float:
    """Score classes by the aggregated Jaccard index of GenSelfDiff-HIS (tables IV to XIV).

    The paper aggregates over classes, not over objects: the sum of the intersections over the sum
    of the unions. With one class it is the IoU, as the paper says; :func:`object_aji` is the index
    of Kumar et al., which sees whether objects were kept apart. The released code takes the mean
    over images, and joins each true class with the predicted one of the largest IoU, be it another
    class: that is :func:`object_aji` of masks of classes.

    Parameters
    ----------
    y_true, y_pred, labels, ignore_label
        As for :func:`dice_score`; the background is left out.

    Returns
    -------
    float in [0, 1]
        1 where neither has any of the classes.

    Raises
    ------
    ValueError
        If shapes disagree, the masks hold probabilities, or bool masks stand beside labels other
        than 0 and 1.

    Examples
    --------
    >>> from diffaugkit.metrics import pixel_aji
    >>> pixel_aji([[1, 1, 2, 2, 0]], [[1, 1, 1, 2, 0]])
    0.6
    """
    overlap, true, predicted = _region_sizes(y_true, y_pred, labels, False, ignore_label)
    union = (true + predicted - overlap).sum()
    return float(overlap.sum() / union) if union else 1.0


def sensitivity(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence | None = None,
    average: bool = True,
    ignore_label: int | str | None = None,
    zero_division: float = 0.0,
) -> float | np.ndarray:
    """Share of a class that is recognised: true positives over all positives.

    Parameters
    ----------
    y_true : array-like of any shape, or list of masks of several sizes
        Classes of samples, or of the pixels of masks; all are pooled.
    y_pred : as `y_true`
        Predicted classes.
    labels : sequence or None, default=None
        Classes to count. None: 1 of 0 and 1, the second of two sorted classes, all of more.
    average : bool, default=True
        Whether to return the mean over the classes (each counts the same), or one value each.
    ignore_label : int, str or None, default=None
        Samples or pixels of this label in `y_true` are left out.
    zero_division : float, default=0.0
        Value of a class without positives; NaN leaves it out of the mean.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_classes,)

    Raises
    ------
    ValueError
        If shapes disagree, or bool masks stand beside labels other than 0 and 1.

    See Also
    --------
    sensitivity_scorer, specificity_scorer : For `GridSearchCV` and `cross_val_score`.

    Examples
    --------
    >>> from diffaugkit.metrics import sensitivity, specificity
    >>> y_true, y_pred = [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1]
    >>> sensitivity(y_true, y_pred), specificity(y_true, y_pred)
    (0.75, 0.5)
    """
    counts = _confusion(y_true, y_pred, labels, ignore_label)
    return _ratio(counts[:, 1, 1][None], counts[:, 1].sum(axis=1)[None], average, zero_division)


def specificity(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence | None = None,
    average: bool = True,
    ignore_label: int | str | None = None,
    zero_division: float = 0.0,
) -> float | np.ndarray:
    """Share of what is not of a class that is not taken for it: true over all negatives.

    Parameters
    ----------
    y_true, y_pred, labels, average, ignore_label
        As for :func:`sensitivity`.
    zero_division : float, default=0.0
        Value of a class without negatives; NaN leaves it out of the mean.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_classes,)

    Raises
    ------
    ValueError
        If shapes disagree, or bool masks stand beside labels other than 0 and 1.

    Examples
    --------
    >>> from diffaugkit.metrics import specificity
    >>> specificity(["a", "b", "a", "a"], ["a", "b", "b", "a"])
    0.6666666666666666
    """
    counts = _confusion(y_true, y_pred, labels, ignore_label)
    return _ratio(counts[:, 0, 0][None], counts[:, 0].sum(axis=1)[None], average, zero_division)


class _PositiveScorer:
    """Score of the predicted classes, of two the second; a fold may hold one of them alone."""

    def __init__(self, score_func):
        self.score_func = score_func

    def __call__(self, estimator, X, y):
        """Return the score of ``estimator.predict(X)`` for the classes `y`."""
        classes = getattr(estimator, "classes_", ())
        labels = [classes[1]] if len(classes) == 2 else None
        return self.score_func(y, estimator.predict(X), labels=labels)

    def __repr__(self):
        """Return the scorer's name."""
        return f"{self.score_func.__name__}_scorer"


#: Larger is better; for estimators whose ``predict`` gives masks.
dice_scorer = make_scorer(dice_score)
iou_scorer = make_scorer(iou_score)
#: Larger is better; for classifiers, and for estimators whose ``predict`` gives masks.
sensitivity_scorer = _PositiveScorer(sensitivity)
specificity_scorer = _PositiveScorer(specificity)

# ------------------------------------------------------------------ segments without names


def matched_dice(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence[int] | None = None,
    many_to_one: bool = False,
    average: bool = True,
    ignore_label: int | None = None,
) -> float | np.ndarray:
    """Dice of segments without names, after the best matching with the true regions of each image.

    Zero-shot segmentation numbers its segments at will, anew in each image. The Hungarian method
    gives every true label its own segment so that the sum of the scores is greatest; a label that
    gets none scores 0. With one label this picks the segment of the best Dice, as DiNO-Diffusion
    does for lungs.

    Parameters
    ----------
    y_true : bool or int array-like of shape (h, w) or (n_images, h, w), or list of (h, w)
        True regions.
    y_pred : as `y_true`
        Segments. All their numbers are alike, 0 is no background here.
    labels : sequence of int or None, default=None
        True labels to find. None takes those of each image but 0; DiffSeg counts 0 too.
    many_to_one : bool, default=False
        Give each segment to the true label that it overlaps most, so that several segments may make
        one region. It flatters many small segments: compare at equal numbers of segments.
    average : bool, default=True
        Whether to return the mean over images.
    ignore_label : int or None, default=None
        Pixels of this label in `y_true` are left out.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_images,)
        Of an image the mean over its labels; NaN if it has none, which the mean leaves out.

    Raises
    ------
    ValueError
        If shapes disagree, or masks hold no labels.

    Examples
    --------
    >>> from diffaugkit.metrics import matched_dice
    >>> matched_dice([[0, 0, 1, 1]], [[7, 7, 7, 3]]) == 2 / 3
    True
    """
    return _matched(_dice, y_true, y_pred, labels, many_to_one, average, ignore_label)


def matched_iou(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: Sequence[int] | None = None,
    many_to_one: bool = False,
    average: bool = True,
    ignore_label: int | None = None,
) -> float | np.ndarray:
    """Intersection over union of segments without names, after the best matching.

    Parameters
    ----------
    y_true, y_pred, labels, many_to_one, average, ignore_label
        As for :func:`matched_dice`.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_images,)

    Raises
    ------
    ValueError
        If shapes disagree, or masks hold no labels.

    Examples
    --------
    >>> from diffaugkit.metrics import matched_iou
    >>> matched_iou([[0, 0, 1, 1]], [[7, 7, 7, 3]])
    0.5
    """
    return _matched(_iou, y_true, y_pred, labels, many_to_one, average, ignore_label)


# ------------------------------------------------------------------ objects


def label_instances(
    masks: ArrayLike, *, min_size: int = 0, connectivity: int = 2
) -> np.ndarray | list[np.ndarray]:
    """Make an object of each connected region of masks.

    Parameters
    ----------
    masks : bool or int array-like of shape (h, w) or (n_images, h, w), or list of (h, w)
        0 is the background. Regions of different labels are different objects.
    min_size : int, default=0
        Objects of fewer pixels are dropped.
    connectivity : {1, 2}, default=2
        2 joins pixels that touch at a corner, too.

    Returns
    -------
    ndarray of int32, of the shape of `masks`, or a list if they were one
        0 for the background, then 1, 2, ... in each image.

    Raises
    ------
    ValueError
        For another connectivity, or masks that hold no labels.

    Examples
    --------
    >>> from diffaugkit.metrics import label_instances
    >>> label_instances([[1, 0, 1, 1], [1, 0, 0, 0]]).tolist()
    [[1, 0, 2, 2], [1, 0, 0, 0]]
    """
    if connectivity not in (1, 2):
        raise ValueError(f"connectivity must be 1 or 2, got {connectivity!r}.")
    if not isinstance(min_size, Integral) or min_size < 0:
        raise ValueError(f"min_size must be an int >= 0, got {min_size!r}.")
    images, stacked = _images(masks, "masks")
    structure = np.ones((3, 3)) if connectivity == 2 else None
    found = []
    for image in images:
        objects, n = np.zeros(image.shape, np.int32), 0
        values = np.unique(image)
        codes = np.empty(image.shape, np.int32)
        for rows in strips(image.shape):  # indices take eight bytes a pixel
            codes[rows] = np.searchsorted(values, image[rows]) + 1
        # Each label where it lies: many labels are no work on the whole image each.
        for code, place in enumerate(find_objects(codes), start=1):
            if values[code - 1] == 0:
                continue
            regions, n_regions = label(codes[place] == code, structure)
            regions[regions > 0] += n
            objects[place] += regions
            n += n_regions
        sizes = (np.bincount(objects[r].ravel(), minlength=n + 1) for r in strips(image.shape))
        kept = sum(sizes, np.zeros(n + 1, int)) >= max(1, min_size)
        kept[0] = False
        numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
        for rows in strips(image.shape):
            objects[rows] = numbers[objects[rows]]
        found.append(objects)
    return stacked(found)


def object_aji(y_true: ArrayLike, y_pred: ArrayLike, *, average: bool = True) -> float | np.ndarray:
    """Score objects by the aggregated Jaccard index (Kumar et al. 2017, algorithm 1).

    Each true object is joined with the predicted one of the largest IoU; intersections and unions
    are summed, and the pixels of predicted objects that were joined with none are added to the
    unions. One predicted object may serve several true ones, as in the paper's algorithm.

    Parameters
    ----------
    y_true : int array-like of shape (h, w) or (n_images, h, w), or list of (h, w)
        Number of the object of each pixel, 0 for the background: :func:`label_instances` makes them
        of masks that only tell objects from background.
    y_pred : as `y_true`
        Predicted objects, with numbers of their own.
    average : bool, default=True
        Whether to return the mean over images.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_images,)
        1 for an image without objects in both.

    Raises
    ------
    ValueError
        If shapes disagree, or masks hold no labels, or are bool: those hold no numbers of objects.

    Warns
    -----
    UserWarning
        If all masks hold one label, such as 255, in several regions: it counts as one object.

    References
    ----------
    Kumar et al. 2017, "A Dataset and a Technique for Generalized Nuclear Segmentation for
    Computational Pathology", IEEE Transactions on Medical Imaging 36.

    Examples
    --------
    >>> from diffaugkit.metrics import object_aji
    >>> object_aji([[1, 1, 0, 2, 2]], [[1, 1, 1, 1, 1]]), object_aji([[1, 1, 0]], [[0, 5, 0]])
    (0.4, 0.5)
    """

    def score(pairs, true, predicted):
        if not len(true) + len(predicted):
            return 1.0
        # Of each true object the pair of the largest IoU, of equal ones the first. One that meets
        # none is joined with none: its own pixels are the union.
        pairs = pairs[np.lexsort((pairs["predicted"], -pairs["iou"], pairs["true"]))]
        pairs = pairs[np.unique(pairs["true"], return_index=True)[1]]
        shared = pairs["shared"].sum()
        union = true.sum() + predicted[pairs["predicted"]].sum() - shared
        left = np.setdiff1d(np.arange(len(predicted)), pairs["predicted"])
        return shared / (union + predicted[left].sum())

    return _over_objects(score, y_true, y_pred, average)


def object_f1(
    y_true: ArrayLike, y_pred: ArrayLike, *, iou_threshold: float = 0.5, average: bool = True
) -> float | np.ndarray:
    """F1 of detected objects: a pair whose IoU is above the threshold is a true positive.

    Parameters
    ----------
    y_true, y_pred, average
        As for :func:`object_aji`.
    iou_threshold : float in [0, 1), default=0.5
        From 0.5 on no object can have two partners; below, as many pairs as possible are made.

    Returns
    -------
    float in [0, 1], or ndarray of shape (n_images,)
        1 for an image without objects in both.

    Raises
    ------
    ValueError
        As for :func:`object_aji`, and if the threshold is out of range.

    Examples
    --------
    >>> from diffaugkit.metrics import object_f1
    >>> object_f1([[1, 1, 1, 0, 2, 2]], [[1, 1, 1, 0, 0, 0]]) == 2 / 3
    True
    """
    _check_threshold(iou_threshold)

    def score(pairs, true, predicted):
        n_pairs = len(_matched_iou(pairs, iou_threshold))
        n = len(true) + len(predicted)
        return 2 * n_pairs / n if n else 1.0

    return _over_objects(score, y_true, y_pred, average)


def panoptic_quality(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    iou_threshold: float = 0.5,
    average: bool = True,
    return_parts: bool = False,
) -> float | np.ndarray | tuple:
    """Panoptic quality of objects of one class (Kirillov et al. 2019).

    Recognition quality, the :func:`object_f1`, times segmentation quality, the mean IoU of the
    pairs.

    Parameters
    ----------
    y_true, y_pred, iou_threshold, average
        As for :func:`object_f1`.
    return_parts : bool, default=False
        Whether to return (pq, segmentation quality, recognition quality).

    Returns
    -------
    pq : float in [0, 1], or ndarray of shape (n_images,), or three of them
        All 1 for an image without objects in both; of an image without pairs all 0.

    Raises
    ------
    ValueError
        As for :func:`object_aji`, and if the threshold is out of range.

    Examples
    --------
    >>> from diffaugkit.metrics import panoptic_quality
    >>> panoptic_quality([[1, 1, 1, 1, 0, 2]], [[0, 1, 1, 1, 0, 0]])
    0.5
    """
    _check_threshold(iou_threshold)

    def score(pairs, true, predicted):
        if not len(true) + len(predicted):
            return 1.0, 1.0, 1.0
        iou = _matched_iou(pairs, iou_threshold)
        segmentation = iou.mean() if len(iou) else 0.0
        recognition = 2 * len(iou) / (len(true) + len(predicted))
        return segmentation * recognition, segmentation, recognition

    values = _over_objects(score, y_true, y_pred, average=False)
    parts = tuple(values.mean(axis=0).tolist()) if average else tuple(values.T)
    return parts if return_parts else parts[0]


# ------------------------------------------------------------------ two sets of points


def hausdorff_distance(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    percentile: float = 100.0,
    points: str = "region",
    spacing: float | Sequence[float] = 1.0,
    average: bool = True,
) -> float | np.ndarray:
    """Symmetric Hausdorff distance between two sets of pixels.

    How far the worst pixel of either mask lies from the other mask.

    Parameters
    ----------
    y_true : bool or int array-like of shape (h, w) or (n_images, h, w), or list of (h, w)
        What is not 0 belongs to the set.
    y_pred : as `y_true`
        The other set.
    percentile : float in [0, 100], default=100.0
        Which of the sorted distances is taken, in each direction; the larger of the two is
        returned.
    points : {"region", "boundary"}, default="region"
        All pixels of a mask, as in the GlaS contest and in scikit-image, or those that have a
        neighbour outside (of four; what lies beyond the image is outside).
    spacing : float or (float, float), default=1.0
        Height and width of a pixel; the result is in this unit.
    average : bool, default=True
        Whether to return the mean over images.

    Returns
    -------
    float >= 0, or ndarray of shape (n_images,)
        0 where both are empty, infinite where one is.

    Raises
    ------
    ValueError
        If shapes disagree, masks hold no labels, or another argument is out of range.

    See Also
    --------
    row_hausdorff : What the code of GenSelfDiff-HIS computes.

    Examples
    --------
    >>> from diffaugkit.metrics import hausdorff_distance
    >>> hausdorff_distance([[1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0]], spacing=0.5)
    1.0
    """
    if not isinstance(percentile, Real) or not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile!r}.")
    if points not in ("region", "boundary"):
        raise ValueError(f"points must be 'region' or 'boundary', got {points!r}.")
    spacing = np.broadcast_to(np.asarray(spacing, dtype=float), 2)
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"spacing must be positive, got {spacing.tolist()}.")

    def score(true, predicted):
        if not true.any() or not predicted.any():
            return 0.0 if true.any() == predicted.any() else np.inf
        if points == "boundary":
            true, predicted = (mask & ~binary_erosion(mask) for mask in (true, predicted))
        # The distance of each pixel to the nearest one of the other set.
        to_true, to_predicted = (
            distance_transform_edt(~mask, sampling=spacing) for mask in (true, predicted)
        )
        return max(
            np.percentile(to_predicted[true], percentile),
            np.percentile(to_true[predicted], percentile),
        )

    values = [score(t != 0, p != 0) for t, p in _image_pairs(y_true, y_pred)]
    return float(np.mean(values)) if average else np.array(values, dtype=float)


def hd95(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    points: str = "boundary",
    spacing: float | Sequence[float] = 1.0,
    average: bool = True,
) -> float | np.ndarray:
    """Hausdorff distance without the worst twentieth of the contour pixels.

    Parameters
    ----------
    y_true, y_pred, spacing, average
        As for :func:`hausdorff_distance`.
    points : {"boundary", "region"}, default="boundary"
        Contours by default: most pixels of a region lie inside the other one, and a percentile over
        all would be 0.

    Returns
    -------
    float >= 0, or ndarray of shape (n_images,)

    Raises
    ------
    ValueError
        As for :func:`hausdorff_distance`.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.metrics import hd95
    >>> mask = np.zeros((20, 20), dtype=bool)
    >>> mask[5:15, 5:15] = True
    >>> hd95(mask, np.roll(mask, 2, axis=1))
    2.0
    """
    return hausdorff_distance(
        y_true, y_pred, percentile=95.0, points=points, spacing=spacing, average=average
    )


def row_hausdorff(
    y_true: ArrayLike, y_pred: ArrayLike, *, average: bool = True
) -> float | np.ndarray:
    """Hausdorff distance between the rows of two masks, the "HD" of GenSelfDiff-HIS.

    The released code hands whole masks to SciPy's ``directed_hausdorff``, which reads each row of
    pixels as one point in as many dimensions as the image has columns, and takes the larger of the
    two directions. It is no distance in pixels; it is here to compare with the paper's tables.

    Parameters
    ----------
    y_true, y_pred, average
        As for :func:`hausdorff_distance`.

    Returns
    -------
    float >= 0, or ndarray of shape (n_images,)

    Raises
    ------
    ValueError
        If shapes disagree, or masks hold no labels.

    Examples
    --------
    >>> from diffaugkit.metrics import row_hausdorff
    >>> row_hausdorff([[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]])
    1.0
    """
    rows = [
        ((t != 0).astype(float), (p != 0).astype(float)) for t, p in _image_pairs(y_true, y_pred)
    ]
    values = [max(directed_hausdorff(t, p)[0], directed_hausdorff(p, t)[0]) for t, p in rows]
    return float(np.mean(values)) if average else np.array(values)


# ------------------------------------------------------------------ helpers


def _refuse_paths(y, name):
    if getattr(y, "ndim", 1) and isinstance(next(iter(y), None), str | os.PathLike):
        raise ValueError(
            f"{name} must hold arrays, tensors or PIL images, got paths: give "
            f"[PIL.Image.open(path) for path in {name}]."
        )


def _mask(y, name):
    y = np.asarray(to_numpy(y))
    _refuse_paths(y.ravel(), name)
    if y.dtype.kind not in "biu":
        raise ValueError(f"{name} must hold bool or int labels, got {y.dtype}; threshold it first.")
    return y


def _arrays(y):
    """Return tensors and lists of PIL images, which may differ in size, as arrays."""
    y = to_numpy(y)
    if isinstance(y, list | tuple) and any(hasattr(mask, "getbands") for mask in y):
        return [np.asarray(to_numpy(mask)) for mask in y]
    return y


def _aligned(y_true, y_pred):
    """Return both as arrays of one shape, and None.

    Lists of masks of several sizes become rows of all pixels, and where to split these.
    """
    both = [_arrays(y) for y in (y_true, y_pred)]
    if any(
        isinstance(y, list | tuple) and len({getattr(mask, "shape", ()) for mask in y}) > 1
        for y in both
    ):
        both = [[np.asarray(to_numpy(mask)) for mask in y] for y in both]
        _check_shapes(*both)
        ends = np.cumsum([mask.size for mask in both[0]])[:-1]
        return *(np.concatenate([mask.ravel() for mask in y]) for y in both), ends
    true, predicted = map(np.asarray, both)
    if true.shape != predicted.shape:
        raise ValueError(
            f"y_true and y_pred must be of one shape, got {true.shape} and {predicted.shape}."
        )
    return true, predicted, None


def _check_shapes(true, predicted):
    """Refuse lists of masks of which not each has the shape of its partner."""
    shapes = [mask.shape for mask in true], [mask.shape for mask in predicted]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"y_true and y_pred must have, image by image, masks of the same shapes: got "
            f"{len(true)} of {sorted(set(shapes[0]))} and {len(predicted)} of "
            f"{sorted(set(shapes[1]))}."
        )


def _refuse_mixed(true, predicted, labels):
    """Refuse bool masks beside classes other than 0 and 1: True counts as label 1."""
    pairs = ("y_true", true, "y_pred", predicted), ("y_pred", predicted, "y_true", true)
    for name, mask, other, classes in pairs:
        if mask.dtype != bool or classes.dtype == bool:
            continue
        found = np.setdiff1d(classes if labels is None else labels, [0, 1])
        if len(found):
            raise ValueError(
                f"{name} is of bool masks, whose True is label 1, but {other} holds label "
                f"{found[0]}: give both in one form, such as {other} > 0."
            )


def _region_sizes(y_true, y_pred, labels, per_image, ignore_label):
    """Return overlap, true and predicted size in pixels, each (n_images or 1, n_labels)."""
    for name, y in (("y_true", y_true), ("y_pred", y_pred)):
        if hasattr(y, "__len__"):
            _refuse_paths(y, name)
    true, predicted, ends = _aligned(y_true, y_pred)
    true, predicted = _mask(true, "y_true"), _mask(predicted, "y_pred")
    if not true.size:
        raise ValueError("y_true and y_pred must not be empty.")
    if per_image and true.ndim < 2 and ends is None:
        raise ValueError("per_image=True needs masks of shape (n_images, ...).")
    n = len(true) if per_image and ends is None else 1
    true, predicted = true.reshape(n, -1), predicted.reshape(n, -1)
    counted = np.ones_like(true, bool) if ignore_label is None else true != ignore_label
    _refuse_mixed(true[counted], predicted[counted], labels)
    if labels is None:
        labels = np.union1d(true[counted], predicted[counted])
        labels = labels[labels != 0]
    if per_image and ends is not None:
        # Rows of several lengths, each by itself, but with the labels of all.
        pairs = zip(np.split(true[0], ends), np.split(predicted[0], ends), strict=True)
        each = [_region_sizes(*pair, labels, False, ignore_label) for pair in pairs]
        return np.concatenate(each, axis=1)
    sizes = np.zeros((3, n, len(labels)))
    for i, value in enumerate(labels):
        here, there = (true == value) & counted, (predicted == value) & counted
        for part, region in zip(sizes, (here & there, here, there), strict=True):
            part[:, i] = region.sum(axis=1)
    return sizes


def _ratio(above, below, average, zero_division, per_image=False):
    """Quotients (n_images, n_labels), without the first axis if all are pooled; or their mean."""
    values = np.where(below > 0, above / np.where(below > 0, below, 1), zero_division)
    if not average:
        return values if per_image else values[0]
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float(zero_division)


def _confusion(y_true, y_pred, labels, ignore_label):
    true, predicted, _ = _aligned(y_true, y_pred)
    true, predicted = true.ravel(), predicted.ravel()
    if ignore_label is not None:
        counted = true != ignore_label
        true, predicted = true[counted], predicted[counted]
    _refuse_mixed(true, predicted, labels)
    if labels is None:
        labels = np.union1d(true, predicted)
        if labels.dtype.kind in "biuf" and set(labels.tolist()) <= {0, 1}:
            labels = np.array([1], labels.dtype)
        elif len(labels) == 2:
            labels = labels[1:]
        elif len(labels) == 1:
            warn(
                f"All samples are of one class, {labels.tolist()[0]!r}, which counts as the "
                "positive one: say which is, labels=[...]."
            )
    if np.isin(labels, np.union1d(true, predicted)).any():
        return multilabel_confusion_matrix(true, predicted, labels=labels)
    # scikit-learn refuses labels of which there are none.
    return np.array([[[len(true), 0], [0, 0]]] * len(labels)).reshape(-1, 2, 2)


def _images(y, name):
    """List of masks (h, w), and what puts such a list into the form that was given."""
    y = _arrays(y)
    if isinstance(y, list | tuple) and y and all(getattr(mask, "ndim", 0) == 2 for mask in y):
        return [_mask(mask, name) for mask in y], list
    y = _mask(y, name)
    if y.ndim not in (2, 3) or not y.size:
        raise ValueError(
            f"{name} must be of shape (h, w) or (n_images, h, w), or a list of masks, got {y.shape}"
        )
    return ([y], lambda found: found[0]) if y.ndim == 2 else (list(y), np.stack)


def _image_pairs(y_true, y_pred):
    true, predicted = _images(y_true, "y_true")[0], _images(y_pred, "y_pred")[0]
    _check_shapes(true, predicted)
    return list(zip(true, predicted, strict=True))


def _overlaps(true, predicted):
    """Return both's sorted labels, and the pixels that each pair shares, (n_true, n_predicted)."""
    (t_labels, t), (p_labels, p) = (
        np.unique(mask, return_inverse=True) for mask in (true, predicted)
    )
    shape = len(t_labels), len(p_labels)
    table = np.bincount(t.ravel() * shape[1] + p.ravel(), minlength=shape[0] * shape[1])
    return t_labels, p_labels, table.reshape(shape)


def _dice(overlap, true, predicted):
    return 2 * overlap / (true[:, None] + predicted)


def _iou(overlap, true, predicted):
    return overlap / (true[:, None] + predicted - overlap)


def _matched(score, y_true, y_pred, labels, many_to_one, average, ignore_label):
    values = []
    for true, predicted in _image_pairs(y_true, y_pred):
        if ignore_label is not None:
            counted = true != ignore_label
            true, predicted = true[counted], predicted[counted]
        t_labels, _, table = _overlaps(true, predicted)
        wanted = t_labels != 0 if labels is None else np.isin(t_labels, labels)
        if not wanted.any():
            values.append(np.nan)
            continue
        true_sizes, sizes = table.sum(axis=1)[wanted], table.sum(axis=0)
        if many_to_one:
            # Segments of one owner are one region.
            owner = table.argmax(axis=0)
            joined = owner[:, None] == np.arange(len(t_labels))  # (n_segments, n_labels)
            found = score((table @ joined)[wanted], true_sizes, sizes @ joined)
            values.append(found[np.arange(len(found)), np.flatnonzero(wanted)].mean())
        else:
            found = score(table[wanted], true_sizes, sizes)
            values.append(found[linear_sum_assignment(found, maximize=True)].sum() / len(found))
    values = np.array(values, dtype=float)
    if not average:
        return values
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _over_objects(score, y_true, y_pred, average):
    values, pairs = [], _image_pairs(y_true, y_pred)
    for name, masks in zip(("y_true", "y_pred"), zip(*pairs, strict=True), strict=True):
        check_objects(masks, name)
    for true, predicted in pairs:
        values.append(score(*_touching(true, predicted)))
    values = np.array(values, dtype=float)
    return float(values.mean()) if average else values


def _touching(true, predicted):
    """Pairs of objects that share pixels, and the sizes of all: no table of all by all."""
    (t_labels, t, t_sizes), (p_labels, p, p_sizes) = (
        np.unique(mask, return_inverse=True, return_counts=True) for mask in (true, predicted)
    )
    inside = (true != 0).ravel() & (predicted != 0).ravel()
    # Numbers of the objects, from 0 without the background.
    t = np.cumsum(t_labels != 0)[t.ravel()[inside]] - 1
    p = np.cumsum(p_labels != 0)[p.ravel()[inside]] - 1
    t_sizes, p_sizes = t_sizes[t_labels != 0], p_sizes[p_labels != 0]
    found, shared = np.unique(t * len(p_sizes) + p, return_counts=True)
    pairs = np.zeros(
        len(found), [("true", int), ("predicted", int), ("shared", int), ("iou", float)]
    )
    pairs["true"], pairs["predicted"] = np.divmod(found, max(1, len(p_sizes)))
    pairs["shared"] = shared
    pairs["iou"] = shared / (t_sizes[pairs["true"]] + p_sizes[pairs["predicted"]] - shared)
    return pairs, t_sizes, p_sizes


def check_objects(masks, name):
    """Refuse bool masks, and warn of masks of one label, where numbers of objects are needed.

    Parameters
    ----------
    masks : sequence of ndarray of shape (h, w)
        Masks of a set of images.
    name : str
        What the caller calls them.
    """
    if any(mask.dtype == bool for mask in masks):
        raise ValueError(
            f"{name} must hold numbers of objects, got bools, which would all count as one: give "
            f"label_instances({name})."
        )
    inside = (mask[mask != 0] for mask in masks if mask.any())
    labels = {int(value) for found in inside for value in (found.min(), found.max())}
    # As label_instances joins pixels.
    if len(labels) == 1 and any(label(mask != 0, np.ones((3, 3)))[1] > 1 for mask in masks):
        warn(
            f"{name} has no label but {labels.pop()}, whose separate regions count as one object: "
            f"label_instances({name}) numbers them."
        )


def _check_threshold(iou_threshold):
    if not isinstance(iou_threshold, Real) or not 0 <= iou_threshold < 1:
        raise ValueError(f"iou_threshold must be in [0, 1), got {iou_threshold!r}.")


def _matched_iou(pairs, threshold):
    """IoU of the pairs above the threshold: as many as there can be, and the best of these."""
    pairs = pairs[pairs["iou"] > threshold]
    if threshold >= 0.5:  # no object is in two
        return pairs["iou"]
    found = [np.zeros(0)]
    for iou in iou_tables(pairs):
        # Up to n pairs: what all their IoU can add stays below what one more pair does.
        worth = np.where(iou > 0, 1 + iou / (min(iou.shape) + 1), 0)
        best = iou[linear_sum_assignment(worth, maximize=True)]
        found.append(best[best > 0])
    return np.concatenate(found)


def iou_tables(pairs):
    """Yield the IoU of all true with all predicted objects, group by group that hang together.

    Parameters
    ----------
    pairs : structured ndarray with "true", "predicted" and "iou"
        Those that overlap, each once.
    """
    n = pairs["predicted"].max(initial=-1) + 1
    nodes = pairs["true"] + n, pairs["predicted"]
    n_nodes = nodes[0].max(initial=-1) + 1
    graph = coo_array((np.ones(len(pairs)), nodes), shape=(n_nodes, n_nodes))
    group = connected_components(graph, directed=False)[1][nodes[1]]
    sizes = np.bincount(group)
    ends = np.cumsum(sizes[sizes > 0])[:-1]
    for part in np.split(pairs[np.argsort(group, kind="stable")], ends):
        (t, p) = (np.unique(part[side], return_inverse=True)[1] for side in ("true", "predicted"))
        iou = np.zeros((t.max(initial=-1) + 1, p.max(initial=-1) + 1))
        iou[t, p] = part["iou"]
        yield iou
