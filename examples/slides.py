"""
Slides: one label each, and the tiles that decided
==================================================

Cut slides into tiles of tissue, learn vectors of tiles without labels, and from one label per
slide a classifier of bags, whose attention says which tiles decided; hand them over to QuPath.
The slides are made up: mosaics of pieces of the one tissue picture that scikit-image has, in which
a positive slide has two pieces that brown stain fills, among 28 that hold less. Where they are,
only the comparison at the end knows. One colour tells them apart: real slides are harder.
Takes about two minutes on two cores; needs the extras `images` and `plots`::

    python examples/slides.py      # writes slides.png and slide.geojson
"""

import argparse
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from skimage.color import rgb2hed
from sklearn.metrics import roc_auc_score

from diffaugkit import AttentionMILClassifier, SelfSupervisedEncoder, TissueTiles, to_geojson
from diffaugkit.datasets import load_tissue_tiles

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write both files")
parser.add_argument("--slides", type=int, default=40, help="for learning, and as many to test")
parser.add_argument("--epochs", type=int, default=6, help="of the encoder")
parser.add_argument("--mil-epochs", type=int, default=60, help="of the classifiers of slides")
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: pieces of 64 x 64 pixels, by how much brown stain (DAB) they hold. A slide is 5 x 6 of them
# on glass, turned at random, from the half that holds least; a positive one has two of the fifth
# that holds most. The picture's first and third quarter are for learning, the others for the test:
# no pixel is on both sides.

pieces, places = load_tissue_tiles(64, 16)
stain = rgb2hed(load_tissue_tiles(512)[0][0])[..., 2]
stain = np.array([stain[row : row + 64, column : column + 64].mean() for row, column in places])
plain, brown = stain < np.quantile(stain, 0.5), stain > np.quantile(stain, 0.8)
quarter = np.where(places[:, 0] % 128 <= 64, places[:, 0] // 128, -1)  # -1: it lies in two
rng = np.random.default_rng(0)


def make_slide(quarters, positive):
    """Slide (384, 448, 3), and which of its 5 x 6 pieces are brown."""
    here, is_brown = np.isin(quarter, quarters), np.zeros(30, bool)
    is_brown[rng.choice(30, 2, replace=False)] = positive
    picked = rng.choice(np.flatnonzero(here & plain), 30)
    picked[is_brown] = rng.choice(np.flatnonzero(here & brown), is_brown.sum())
    slide = np.full((384, 448, 3), 242, np.uint8)
    for number, piece in enumerate(pieces[picked]):
        row, column = 32 + 64 * (number // 6), 32 + 64 * (number % 6)
        slide[row : row + 64, column : column + 64] = np.rot90(piece, rng.integers(4))
    return slide, is_brown.reshape(5, 6)


y = np.arange(args.slides) % 2
train, train_brown = zip(*(make_slide([0, 2], label) for label in y), strict=True)
test, test_brown = zip(*(make_slide([1, 3], label) for label in y), strict=True)

# %%
# Tiles of tissue, read when they are needed. Slides of your own go in by their paths.

names = np.array([f"case {number:02}" for number in range(args.slides)])
options = {"tile_size": 32, "min_tissue": 0.25, "slide_ids": names}
tiles, test_tiles = TissueTiles(train, **options), TissueTiles(test, **options)
print(f"for learning: {tiles}\nfor the test: {test_tiles}\n")

# %%
# Vectors of tiles: SimCLR without labels, on 1 500 tiles for learning.

some = np.sort(rng.permutation(len(tiles))[:1500])
encoder = SelfSupervisedEncoder(
    "simclr", augmentation="tissue", max_epochs=args.epochs, random_state=0, verbose=1
).fit(tiles.take(some))
features, test_features = encoder.transform(tiles), encoder.transform(test_tiles)
print(f"\nvectors of {features.shape[1]} values after {time.perf_counter() - start:.0f} s\n")

# %%
# Labels of slides, from the vectors of their tiles: by attention, and by their mean, which does not
# say where.

classifiers = {
    pooling: AttentionMILClassifier(
        pooling, max_epochs=args.mil_epochs, dropout=0.25, random_state=0
    ).fit(features, y, groups=tiles.groups)
    for pooling in ("gated", "mean")
}
for pooling, classifier in classifiers.items():
    accuracy = classifier.score(test_features, y, groups=test_tiles.groups)
    print(f"{pooling:6} {100 * accuracy:5.1f} % of {len(y)} test slides right")

# %%
# Which tiles decided: attention against what is known of the mosaics, on the positive test slides.

attention = classifiers["gated"].attention(test_features, groups=test_tiles.groups)
table = test_tiles.table
middle = (table[["row", "column"]].to_numpy() + 16 - 32) // 64  # the piece under each tile
middle = middle.clip(0, [4, 5])
number = np.searchsorted(names, test_tiles.groups)
is_brown = np.array(test_brown)[number, middle[:, 0], middle[:, 1]]
areas = [
    roc_auc_score(is_brown[number == case], attention[number == case]) for case in np.flatnonzero(y)
]
print(
    f"\ntiles of brown pieces by attention: area under the ROC {np.mean(areas):.2f} (chance: 0.5)"
)

# %%
# One figure, a test slide, its tiles, and their attention as a share of the largest; and the same
# for QuPath, where Measure > Show measurement maps colours the tiles.

shown, case = names[1], number == 1
share = attention / attention[case].max()
figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
axes[0].imshow(test[1])
axes[0].contour(
    np.kron(np.pad(test_brown[1], 1), np.ones((64, 64)))[32:-32, 32:-32], [0.5], colors="tab:red"
)
axes[0].set(title=f"{shown}; red: brown pieces", xticks=[], yticks=[])
test_tiles.plot(shown, ax=axes[1])
test_tiles.plot(shown, values=share, ax=axes[2], alpha=0.7)
axes[2].set_title("attention of its tiles")
figure.savefig(args.folder / "slides.png", dpi=110)
to_geojson(
    test_tiles,
    args.folder / "slide.geojson",
    slide=shown,
    values={"attention": attention, "share of the largest": share},
)
print(f"\nfigure: {args.folder / 'slides.png'}\nQuPath: {args.folder / 'slide.geojson'}")
print(f"all of it in {time.perf_counter() - start:.0f} s")
