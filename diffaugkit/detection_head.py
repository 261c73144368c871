"""A box head on a U-Net: one box per place, its classes, and how central the place is (FCOS).

Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object Detection". The layers, the focal and
the GIoU loss and the removal of duplicates are torchvision's; here they meet the U-Net of
GenSelfDiff-HIS, and targets are found for whole batches, without waiting for the device.

==============  ===================================================================================
paper (FCOS)    here
==============  ===================================================================================
s               ``stride``: places lie every s pixels, at (i + 1/2) s
l*, t*, r*, b*  distances of a place to the sides of its box, predicted in units of s
centre sample   a place belongs to a box if inside, and within 1.5 s of its centre on both axes
p, centreness   score of a class: sqrt(p * centreness)
==============  ===================================================================================
"""

import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit.segmentation_networks import SegmentationNetwork

__all__ = [
    "DetectionNetwork",
    "StripBoxes",
    "candidates",
    "detection_loss",
    "match_places",
    "pixel_maps",
    "places_of",
]

_RADIUS = 1.5
# Distances at the start, in units of the stride.
_HALF_SIDE = 2.0
# Boxes that are compared with each other, before the best of all are.
_MANY = 2048


class DetectionNetwork(nn.Module):
    """A denoiser at t = 0 whose last layer is replaced by a box head.

    Parameters
    ----------
    denoiser : nn.Module
        As for :class:`~diffaugkit.segmentation_networks.SegmentationNetwork`. Changed in place.
    n_classes : int
        Classes K.
    width : int, default=64
        Channels of the new last layer and of the head, a multiple of 32.
    stride : int, default=2
        Distance s of places, in pixels.

    Raises
    ------
    ValueError
        From torchvision, for another width.
    TypeError
        If the denoiser has no last layer to be replaced.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.denoisers import UNetDenoiser
    >>> network = DetectionNetwork(UNetDenoiser(3, block_out_channels=(8, 16)), 2, 32, stride=4)
    >>> network(torch.randn(1, 3, 9, 7)).shape  # 3 x 2 places
    torch.Size([1, 6, 7])
    """

    def __init__(self, denoiser, n_classes, width=64, stride=2):
        from torchvision.models.detection.fcos import FCOSHead

        super().__init__()
        self.n_classes, self.stride = n_classes, stride
        self.features = SegmentationNetwork(denoiser, width)
        # Two convolutions as in the paper; what it has fully connected is the same at each place.
        self.head = FCOSHead(width, num_anchors=1, num_classes=n_classes, num_convs=2)
        # Distances end in a ReLU. From torchvision's start at 0 one of the four was seen to die, so
        # that its side ran through the place; from here all live, near half an object.
        nn.init.constant_(self.head.regression_head.bbox_reg.bias, _HALF_SIDE)

    def forward(self, images):
        """Predict for images (B, C, H, W) in [-1, 1].

        Returns (B, L, K + 5) for the L places, row by row: K class scores before the sigmoid,
        distances to left, top, right and bottom in units of the stride, and centreness before the
        sigmoid.
        """
        h = self.features(images)
        h = F.avg_pool2d(h, self.stride, ceil_mode=True, count_include_pad=False)
        return torch.cat(list(self.head([h]).values()), dim=2)


def places_of(size, stride, device=None):
    """Give x and y of the places of an image of `size` (H, W), row by row: (L, 2) float32."""
    y, x = (
        (torch.arange(-(-side // stride), device=device, dtype=torch.float32) + 0.5) * stride
        for side in size
    )
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2).flatten(0, 1)


def decode(found, places, stride):
    """Turn distances (..., L, 4) into boxes around places (L, 2)."""
    sides = found * stride
    return torch.cat([places - sides[..., :2], places + sides[..., 2:]], dim=-1)


def match_places(places, boxes, codes, stride):
    """Find the box of each place: of those that it is central in, the smallest.

    Parameters
    ----------
    places : Tensor of shape (L, 2)
    boxes : Tensor of shape (B, M, 4)
    codes : Tensor of shape (B, M)
        Class of each box; below 0 its inside counts nowhere.
    stride : int

    Returns
    -------
    number : Tensor of shape (B, L), int64
        Box of each place, where it has one.
    matched, blank : Tensor of shape (B, L), bool
        Whether it has one, and whether it counts nowhere.
    """
    x, y = places[:, None].unbind(dim=2)  # (L, 1)
    x0, y0, x1, y1 = boxes[:, None].unbind(dim=3)  # (B, 1, M)
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    reach = _RADIUS * stride
    near = ((x - (x0 + x1) / 2).abs() < reach) & ((y - (y0 + y1) / 2).abs() < reach)
    real = (codes >= 0)[:, None]
    area = ((x1 - x0) * (y1 - y0)).masked_fill(~(inside & near & real), torch.inf)
    smallest, number = area.min(dim=2)
    matched = smallest.isfinite()
    return number, matched, (inside & ~real).any(dim=2) & ~matched


def detection_loss(found, places, boxes, codes, stride):
    """Loss of FCOS: focal loss of the classes, GIoU of the boxes, cross-entropy of centreness.

    Parameters
    ----------
    found : Tensor of shape (B, L, K + 5)
        From `DetectionNetwork`.
    places, boxes, codes, stride
        As for :func:`match_places`.

    Returns
    -------
    dict of scalar Tensor
        "loss", the sum of "classification", "box" and "centreness", each a sum over the places that
        count divided by the number of places that have a box. As ``FCOSHead.compute_loss``, but for
        blank places.
    """
    from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

    number, matched, blank = match_places(places, boxes, codes, stride)
    n_matched = matched.sum().clamp(min=1)
    scores, sides, centred = found.split([found.shape[2] - 5, 4, 1], dim=2)

    code = codes.long().gather(1, number).masked_fill(~matched, -1)
    target = (code[..., None] == torch.arange(scores.shape[2], device=code.device)).float()
    focal = sigmoid_focal_loss(scores, target).masked_fill(blank[..., None], 0)

    # Places without a box get one around them, so that no branch divides by zero.
    around = torch.cat([places - stride, places + stride], dim=1)
    true = boxes.gather(1, number[..., None].expand(-1, -1, 4))
    true = torch.where(matched[..., None], true, around)
    giou = generalized_box_iou_loss(decode(sides, places, stride), true)

    across = torch.stack([places[:, 0] - true[..., 0], true[..., 2] - places[:, 0]])
    down = torch.stack([places[:, 1] - true[..., 1], true[..., 3] - places[:, 1]])
    central = (across.amin(0) / across.amax(0) * down.amin(0) / down.amax(0)).sqrt()
    entropy = F.binary_cross_entropy_with_logits(centred[..., 0], central, reduction="none")

    parts = {
        "classification": focal.sum() / n_matched,
        "box": giou.masked_fill(~matched, 0).sum() / n_matched,
        "centreness": entropy.masked_fill(~matched, 0).sum() / n_matched,
    }
    return {"loss": sum(parts.values()), **parts}


def pixel_maps(found, size, stride):
    """Spread predictions at places over the pixels, for blending.

    Parameters
    ----------
    found : Tensor of shape (B, L, K + 5)
        From `DetectionNetwork`.
    size : tuple of (int, int)
        Height and width.
    stride : int

    Returns
    -------
    Tensor of shape (B, K + 4, H, W)
        Scores of the classes in [0, 1], and the sides of the box as they lie from the middle of the
        pixel: x_min and y_min, mostly below 0, x_max and y_max.
    """
    height, width = size
    rows = -(-height // stride)
    places = places_of(size, stride, found.device)
    scores = (found[..., :-5].sigmoid() * found[..., -1:].sigmoid()).sqrt()
    maps = torch.cat([scores, decode(found[..., -5:-1], places, stride)], dim=2)
    maps = maps.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
    maps = maps.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[:, :, :height, :width]
    pixels = places_of(size, 1, found.device).T.unflatten(1, size)  # x and y
    return torch.cat([maps[:, :-4], maps[:, -4:] - pixels.repeat(2, 1, 1)], dim=1)


# ---- boxes of whole images -----------------------------------------------------------------------


def candidates(maps, rows, size, stride, least):
    """Take the boxes that a strip of rows predicts at a lattice of its pixels.

    Parameters
    ----------
    maps : Tensor of shape (K + 4, n_rows, W)
        Blended maps of :func:`pixel_maps`.
    rows : slice
        The rows of the image.
    size : tuple of (int, int)
        Height and width of the image, to which boxes are clipped.
    stride : int
        Distance of the lattice, the same in all strips.
    least : float
        Lowest score.

    Returns
    -------
    Tensor of shape (n, 6), float32
        Box, score and class code. A pixel gives a box for each class of enough score.
    """
    height, width = size
    y = torch.arange(rows.start, rows.stop)
    y = y[y % stride == min(stride // 2, height - 1)]
    x = torch.arange(min(stride // 2, width - 1), width, stride)
    maps = maps[:, y - rows.start][:, :, x]
    middle = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))]) + 0.5
    boxes = maps[-4:] + middle.repeat(2, 1, 1)
    boxes[0::2].clamp_(0, width)
    boxes[1::2].clamp_(0, height)
    has_area = (boxes[2] > boxes[0]) & (boxes[3] > boxes[1])
    code, row, column = ((maps[:-4] > least) & has_area).nonzero(as_tuple=True)
    score = maps[code, row, column][:, None]
    return torch.cat([boxes[:, row, column].T, score, code[:, None].float()], dim=1)


class StripBoxes:
    """Boxes of one image, whose duplicates are dropped while its strips come in from above.

    Only boxes that those of later strips can still reach are compared again, so that the work grows
    with the image as its number of strips does.

    Parameters
    ----------
    reach : int
        Boxes of later strips begin at most this many pixels above their strip: a tile's height.
    nms_threshold : float
        IoU above which the box of the lower score is dropped.

    Examples
    --------
    >>> import torch
    >>> boxes = StripBoxes(8, 0.5)
    >>> boxes.add(slice(0, 4), torch.tensor([[0.0, 0, 4, 4, 0.6, 0]]))
    >>> boxes.add(slice(4, 8), torch.tensor([[0.0, 0, 4, 5, 0.9, 0]]))
    >>> boxes.all()[:, 4].tolist()
    [0.8999999761581421]
    """

    def __init__(self, reach, nms_threshold):
        self._reach, self._threshold = reach, nms_threshold
        self._settled, self._open = [], torch.zeros(0, 6)

    def add(self, rows, found):
        """Take the candidates (n, 6) of the next strip of rows."""
        from torchvision.ops import batched_nms

        found = torch.cat([self._open, found])
        if len(found) > _MANY:
            # Boxes side by side first: the work on all together grows with their number squared.
            part = found[:, 0].argsort(stable=True).argsort() // _MANY
            kinds = part * (found[:, 5].max() + 1) + found[:, 5]
            found = found[batched_nms(found[:, :4], found[:, 4], kinds, self._threshold)]
        kept = found[batched_nms(found[:, :4], found[:, 4], found[:, 5], self._threshold)]
        within = kept[:, 3] > rows.stop - self._reach
        self._settled.append(kept[~within])
        self._open = kept[within]

    def all(self):
        """Return the boxes of the whole image, (n, 6)."""
        return torch.cat([*self._settled, self._open])
