"""
Detection: boxes of nuclei from four small tiles
================================================

A U-Net learns to denoise tissue without boxes, and then, from four tiles of 64 x 64 pixels with
boxes, to find nuclei (GenSelfDiff-HIS, with the head of FCOS). The same network from scratch is the
comparison. The truth is the connected regions of haematoxylin in scikit-image's picture: right for
most nuclei, and some that touch are one. One run says little: over five draws of four tiles the
pre-trained start was ahead in four, in benchmarks/detection.py.
Takes about three minutes on two cores; needs the extras `images` and `plots`::

    python examples/detection.py      # writes detection.png
"""

import argparse
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from scipy.ndimage import binary_opening, gaussian_filter
from skimage.filters import threshold_otsu

from diffaugkit import DiffusionDetector, boxes_from_masks
from diffaugkit.datasets import load_tissue_tiles
from diffaugkit.metrics import box_average_precision, mean_box_iou

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write the figure")
parser.add_argument("--pretrain-epochs", type=int, default=30)
parser.add_argument("--epochs", type=int, default=150)
parser.add_argument("--seed", type=int, default=0, help="of the choice of tiles and of the fits")
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: one picture of 512 x 512 pixels. The left 288 columns are for learning, the right 192 for
# the test. Boxes are used of four tiles only.

X, _, stain = load_tissue_tiles(512, return_stain=True)
picture = X[0]
above = gaussian_filter(stain[0], 1) - gaussian_filter(stain[0], 12)
nuclei = binary_opening(above > 1.8 * threshold_otsu(above), iterations=2).astype(np.uint8)


def boxes_of(masks):
    return boxes_from_masks(masks, min_size=40, connectivity=1)


train, test, truth = picture[:, :288], picture[:, 320:], boxes_of(nuclei[:, 320:])
places = [(row, column) for row in range(0, 512, 64) for column in range(0, 225, 64)]
chosen = np.random.default_rng(args.seed).permutation(len(places))[:4]
cuts = [tuple(slice(at, at + 64) for at in places[number]) for number in chosen]
tiles, boxes = [train[cut] for cut in cuts], boxes_of([nuclei[cut] for cut in cuts])
n_boxes = sum(len(tile["boxes"]) for tile in boxes)
print(f"{len(tiles)} tiles with {n_boxes} boxes; {len(truth['boxes'])} boxes in the test half\n")

# %%
# Fit: both from the same seed, with the same epochs of fine-tuning.

options = {
    "block_out_channels": (16, 32, 64, 64),
    "patch_size": 64,
    "stride": 32,
    "max_epochs": args.epochs,
    "pretrain_epochs": args.pretrain_epochs,
    "validation_fraction": 0.0,
    "random_state": args.seed,
    "verbose": 1,
}
models = {
    "pre-trained": DiffusionDetector(**options).fit(tiles, boxes, unlabeled=[train]),
    "from scratch": DiffusionDetector(diffusion=None, **options).fit(tiles, boxes),
}

# %%
# Compare on the other half: predicted as one image of 512 x 192 pixels, from overlapping tiles.
# Average precision takes all boxes, in the order of their scores; mean IoU those from 0.4 on.

found = {name: model.predict([test])[0] for name, model in models.items()}
print(f"\n{'percent':14}AP at IoU 0.5   mean IoU")
precision = {}
for name, predicted in found.items():
    precision[name] = box_average_precision([truth], [predicted])
    overlap = mean_box_iou([truth], [predicted], min_score=0.4)
    print(f"{name:14}{100 * precision[name]:13.1f}{100 * overlap:11.1f}")

# %%
# One figure: the truth, and what both found, with scores.

figure, axes = plt.subplots(1, 3, figsize=(12, 11), layout="constrained")
shown = {"truth (stain)": truth["boxes"]} | {name: box["boxes"] for name, box in found.items()}
for axis, (name, corners) in zip(axes, shown.items(), strict=True):
    axis.imshow(test, interpolation="nearest")
    scores = found[name]["scores"] if name in found else np.ones(len(corners))
    for (x0, y0, x1, y1), score in zip(corners, scores, strict=True):
        if score < 0.4:
            continue
        at = x0 - 0.5, y0 - 0.5
        axis.add_patch(Rectangle(at, x1 - x0, y1 - y0, fill=False, edgecolor="lime"))
        if name in found:
            axis.text(*at, f"{100 * score:.0f}", fontsize=6, va="bottom", clip_on=True)
    if name in found:
        name += f", AP {100 * precision[name]:.0f} %"
        axis.set_xlabel("boxes with a score of 0.4 and more, in percent")
    axis.set(title=name, xticks=[], yticks=[])
figure.savefig(args.folder / "detection.png", dpi=110)
print(f"\nfigure: {args.folder / 'detection.png'}")
print(f"all of it in {time.perf_counter() - start:.0f} s")
