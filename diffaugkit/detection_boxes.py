"""Boxes of objects: from masks, as users give them, and as targets of patches.

A box is (x_min, y_min, x_max, y_max) in pixels; the pixel in row i and column j covers (j, i, j +
1, i + 1).
"""

from numbers import Integral

import numpy as np
import torch
from scipy.ndimage import find_objects

from diffaugkit.arrays import refuse_missing, to_numpy
from diffaugkit.metrics.detection import check_boxes
from diffaugkit.metrics.segmentation import check_objects, label_instances

__all__ = ["BLANK", "boxes_from_masks", "move_boxes", "patch_targets", "read_boxes"]

# Class code of a box whose inside counts nowhere.
BLANK = -1


def boxes_from_masks(masks, *, instances=False, min_size=1, connectivity=2):
    """Find the bounding boxes of the objects in masks, as GenSelfDiff-HIS does (section V-C).

    Parameters
    ----------
    masks : bool or int array-like of shape (h, w) or (n_images, h, w), or list of (h, w)
        0 is the background.
    instances : bool, default=False
        What the other numbers are. False: classes, whose connected regions are the objects. True:
        numbers of objects, each of which may lie in several pieces.
    min_size : int, default=1
        Objects of fewer pixels are dropped.
    connectivity : {1, 2}, default=2
        For connected regions: 2 joins pixels that touch at a corner, too.

    Returns
    -------
    list of dict, or dict for a single mask
        "boxes", float32 of shape (n, 4), and "labels", of shape (n,): the class of each object, or
        1 with `instances`. What ``DiffusionDetector.fit`` takes.

    Raises
    ------
    ValueError
        For masks that hold no labels, options out of range, or bool masks with `instances`: those
        hold no numbers of objects.

    Warns
    -----
    UserWarning
        If with `instances` all masks hold one label, such as 255, in several regions.

    Examples
    --------
    >>> from diffaugkit.detection_boxes import boxes_from_masks
    >>> boxes_from_masks([[2, 2, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]])["boxes"].tolist()
    [[3.0, 1.0, 4.0, 3.0], [0.0, 0.0, 2.0, 1.0]]
    """
    if not isinstance(min_size, Integral) or min_size < 1:
        raise ValueError(f"min_size={min_size!r} must be an int of at least 1.")
    masks = to_numpy(masks)
    is_list = isinstance(masks, list | tuple) and len(masks) and np.ndim(masks[0]) > 1
    images = [np.asarray(to_numpy(m)) for m in masks] if is_list else np.asarray(masks)
    single = not is_list and images.ndim in (0, 2)
    images = [images] if single else list(images)
    for mask in images:
        if mask.ndim != 2 or mask.dtype.kind not in "biu":
            raise ValueError(
                f"masks hold one of shape {mask.shape} and dtype {mask.dtype}: give arrays of "
                "whole numbers, (height, width), such as np.asarray(PIL.Image.open(path)) for "
                "files."
            )
    if instances:
        check_objects(images, "masks")
    found = [_boxes_of(mask, instances, min_size, connectivity) for mask in images]
    return found[0] if single else found


def _boxes_of(mask, instances, min_size, connectivity):
    if instances:
        names = np.unique(mask)
        objects = np.searchsorted(names[names != 0], mask) + 1
        objects[mask == 0] = 0
        kept = np.bincount(objects.ravel()) >= min_size
        objects[~kept[objects]] = 0
    else:
        objects = label_instances(mask, min_size=min_size, connectivity=connectivity)
    places = [(n, p) for n, p in enumerate(find_objects(objects), start=1) if p is not None]
    boxes = [(x.start, y.start, x.stop, y.stop) for _, (y, x) in places]
    labels = np.ones(len(boxes), np.int64)
    if not instances:
        labels[:] = [mask[place][objects[place] == number][0] for number, place in places]
    return {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": labels}


def read_boxes(boxes, images):
    """Read the boxes of images in either form, and check that they lie inside.

    Parameters
    ----------
    boxes : sequence of array-like of shape (n, 4), or of dicts with "boxes" and "labels"
        One entry per image; images may have none.
    images : ImageList
        Whose boxes they are.

    Returns
    -------
    list of dict
        See :func:`~diffaugkit.metrics.detection.check_boxes`.

    Raises
    ------
    ValueError
        For another number of entries than images, no boxes, boxes that stick out, or missing
        labels.
    """
    found = check_boxes(boxes)
    if len(found) != len(images):
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: X has {len(images)} "
            f"images, but boxes has {len(found)}: one entry each, empty where there is no object."
        )
    values = np.concatenate([image["boxes"] for image in found] or [np.zeros((0, 4))])
    largest = values.max(initial=0)
    if largest <= 1 and (values % 1).any():  # (0, 0, 1, 1) is the first pixel
        raise ValueError(
            f"No box reaches beyond {largest:.3g} pixels: are these shares of width and height? "
            "Boxes are in pixels."
        )
    for number, image in enumerate(found):
        refuse_missing(image["labels"], f"boxes of image {number}", cure="name or drop those boxes")
        height, width = images.size(number)
        inside = (image["boxes"] >= 0) & (image["boxes"] <= [width, height, width, height])
        if not inside.all():
            first = image["boxes"][~inside.all(axis=1)][0]
            raise ValueError(
                f"The boxes of image {number} hold {first.tolist()}, which sticks out of its "
                f"{width} x {height} pixels (width x height): boxes are (x_min, y_min, x_max, "
                "y_max); np.clip those that are only a little too large."
            )
    return found


def patch_targets(boxes, codes, patches, images):
    """Targets of patches: boxes in their coordinates, and places that count nowhere.

    A box belongs to the patches that its centre lies in, whole, even where it sticks out. Of a box
    whose centre lies outside the pixels are no background either: they are blank. So is what lies
    beyond the border of an image smaller than the patch.

    Parameters
    ----------
    boxes : list of ndarray of shape (n, 4)
        Of each image.
    codes : list of ndarray of shape (n,)
        Numbers of their classes from 0.
    patches : PatchRows
        The patches.
    images : ImageList
        The images.

    Returns
    -------
    Tensor of shape (n_patches, most, 5), float32
        Box and class code, or `BLANK`. Filled up with blank boxes without area.
    """
    height, width = patches.shape[2:]
    rows, strip = [], None
    for number, top, left in patches.places:
        if strip != (number, top):  # not all boxes of a slide for each of its patches
            strip = number, top
            within = (boxes[number][:, 1] < top + height) & (boxes[number][:, 3] > top)
            near, named = boxes[number][within], codes[number][within]
        seen = (near[:, 0] < left + width) & (near[:, 2] > left)
        moved = near[seen] - [left, top, left, top]
        centre = (moved[:, :2] + moved[:, 2:]) / 2
        mine = ((centre >= 0) & (centre < [width, height])).all(axis=1)
        rows.append(np.column_stack([moved, np.where(mine, named[seen], BLANK)]))
        size = images.size(number)
        if size[1] < width:
            rows[-1] = np.vstack([rows[-1], [size[1], 0, width, height, BLANK]])
        if size[0] < height:
            rows[-1] = np.vstack([rows[-1], [0, size[0], width, height, BLANK]])
    out = torch.zeros(len(rows), max(1, *map(len, rows)), 5)
    out[:, :, 4] = BLANK
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.from_numpy(row)
    return out


def move_boxes(boxes, places, size):
    """Move boxes (B, M, 4) with their images, of which `places` tells where the pixels went.

    `places` (B, 1, H, W) are the numbers of the pixels after flips and turns; `size` is (H, W).
    """
    height, width = size
    corner = places[:, 0, 0, 0, None]
    across, down = corner % width != 0, corner // width != 0
    # Along a row after a quarter turn lie pixels of a column.
    turned = places[:, 0, 0, -1:] // width != corner // width
    boxes = torch.where(turned[..., None], boxes[..., [1, 0, 3, 2]], boxes)
    across, down = torch.where(turned, down, across), torch.where(turned, across, down)
    x0, y0, x1, y1 = boxes.unbind(dim=2)
    x0, x1 = torch.where(across, width - x1, x0), torch.where(across, width - x0, x1)
    y0, y1 = torch.where(down, height - y1, y0), torch.where(down, height - y0, y1)
    return torch.stack([x0, y0, x1, y1], dim=2)
