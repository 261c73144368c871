"""
Segmentation: nuclei from eight small masks
===========================================

A U-Net learns to denoise tissue without masks, and then, from eight tiles of 64 x 64 pixels with
masks, to find nuclei (GenSelfDiff-HIS). The same network from scratch is the comparison. The truth
is the haematoxylin stain of scikit-image's picture, above a threshold: a matter of colour, in which
scratch does as well. What a start is worth is measured on glands, in benchmarks/segmentation.py.
Takes about three minutes on two cores; needs the extras `images` and `plots`::

    python examples/segmentation.py      # writes segmentation.png
"""

import argparse
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import binary_opening, gaussian_filter
from skimage.filters import threshold_otsu

from diffaugkit.datasets import load_tissue_tiles
from diffaugkit.metrics import dice_score, iou_score
from diffaugkit.segmenter import DiffusionSegmenter

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write the figure")
parser.add_argument("--pretrain-epochs", type=int, default=20)
parser.add_argument("--epochs", type=int, default=150)
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: one picture of 512 x 512 pixels. The left 320 columns are for learning, the right 192 for
# the test. Masks are used of eight tiles only.

X, _, stain = load_tissue_tiles(512, return_stain=True)
picture = X[0]
smooth = gaussian_filter(stain[0], 1)
truth = binary_opening(smooth > threshold_otsu(smooth), iterations=1).astype(np.uint8)

train, test = picture[:, :320], picture[:, 320:]
places = [(row, column) for row in (16, 144, 272, 400) for column in (32, 192)]
tiles = np.stack([train[r : r + 64, c : c + 64] for r, c in places])
masks = np.stack([truth[r : r + 64, c : c + 64] for r, c in places])
share = masks.size / train[..., 0].size
print(f"{len(tiles)} masks, {share:.0%} of the training half; nuclei are {truth.mean():.0%}\n")

# %%
# Fit: both from the same seed, with the same epochs of fine-tuning.

options = {
    "block_out_channels": (16, 32, 64, 64),
    "patch_size": 64,
    "stride": 32,
    "max_epochs": args.epochs,
    "pretrain_epochs": args.pretrain_epochs,
    "validation_fraction": 0.0,
    "random_state": 0,
    "verbose": 1,
}
pretrained = DiffusionSegmenter(**options).fit(tiles, masks, unlabeled=[train])
scratch = DiffusionSegmenter(diffusion=None, **options).fit(tiles, masks)

# %%
# Compare on the other half: predicted as one image of 512 x 192 pixels, from overlapping tiles.

found = {"pre-trained": pretrained.predict([test])[0], "from scratch": scratch.predict([test])[0]}
print(f"\n{'':14}Dice    IoU")
for name, labels in found.items():
    dice, iou = dice_score(truth[:, 320:], labels), iou_score(truth[:, 320:], labels)
    print(f"{name:14}{dice:.3f}  {iou:.3f}")

# %%
# One figure: image, truth, and both predictions with the outline of the truth.

figure, axes = plt.subplots(1, 4, figsize=(12, 8.4), layout="constrained")
shown = [("image", test, None), ("truth (stain)", truth[:, 320:], "gray")]
shown += [(name, labels, "gray") for name, labels in found.items()]
for axis, (name, image, colors) in zip(axes, shown, strict=True):
    axis.imshow(image, cmap=colors, interpolation="nearest")
    if name in found:
        axis.contour(truth[:, 320:], [0.5], colors="tab:orange", linewidths=0.8)
        name += f", Dice {dice_score(truth[:, 320:], image):.3f}"
        axis.set_xlabel("orange: outline of the truth")
    axis.set(title=name, xticks=[], yticks=[])
figure.savefig(args.folder / "segmentation.png", dpi=110)
print(f"\nfigure: {args.folder / 'segmentation.png'}")
print(f"all of it in {time.perf_counter() - start:.0f} s")
