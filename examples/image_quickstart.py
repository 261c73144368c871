"""
Images: from unlabelled digits to a stronger encoder and a generator
====================================================================

Learn an encoder from 1 797 handwritten digits without labels, a diffusion model on its embeddings,
and a second encoder from what was generated (Gen-SIS). Compare, look at reconstructions and
interpolations, save the model. Takes about three minutes on two cores; needs the extra `plots`::

    python examples/image_quickstart.py  # writes image_quickstart.png, image_quickstart_model/
"""

import argparse
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffaugkit import EmbeddingConditionedDiffusion, GenSIS, SelfSupervisedEncoder, load
from diffaugkit.datasets import load_digits
from diffaugkit.metrics import weighted_knn_accuracy
from diffaugkit.plotting import InterpolationDisplay, SampleGridDisplay, TrainingCurveDisplay

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write figure and model")
parser.add_argument("--epochs", type=int, default=25, help="of each encoder")
parser.add_argument("--diffusion-epochs", type=int, default=20)
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: digits of 8 x 8 pixels. The labels are for the table at the end only.

X, y = load_digits()
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=500, random_state=0)
print(f"{len(X_train)} images of {X.shape[1]} x {X.shape[2]} pixels, labels not shown\n")

# %%
# Fit: DINO on hand-made views, a diffusion model on its embeddings, DINO again on generated views
# and on images between two sources. No labels.

model = GenSIS(
    SelfSupervisedEncoder("dino", max_epochs=args.epochs, batch_size=100),
    EmbeddingConditionedDiffusion(encoder=None, max_epochs=args.diffusion_epochs),
    n_views=2,
    random_state=0,
    verbose=1,
)
fit_start = time.perf_counter()
model.fit(X_train)
print(f"\nfitted in {time.perf_counter() - fit_start:.0f} s\n")

# %%
# Compare on held-out digits: weighted k-NN and a linear classifier on each embedding, in percent.

pca = PCA(20, random_state=0).fit(X_train.reshape(len(X_train), -1))
embeddings = {
    "DINO": model.vanilla_encoder_.transform,
    "Gen-DINO": model.encoder_.transform,
    "PCA-20": lambda images: pca.transform(images.reshape(len(images), -1)),
}
print(f"{'':10}dims   k-NN  linear")
for name, embed in embeddings.items():
    train, test = embed(X_train), embed(X_test)
    knn = weighted_knn_accuracy(train, y_train, test, y_test)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    linear = classifier.fit(train, y_train).score(test, y_test)
    print(f"{name:10}{train.shape[1]:4}{100 * knn:7.1f}{100 * linear:8.1f}")
print(f"\n{model.quality_report(X_test, y_test)}\n")

# %%
# One figure: held-out digits with what is generated under their embeddings and the nearest training
# image (a copy would be seen), generated images between two digits, and the training.

figure, (grid_axes, strip_axes, loss_axes) = plt.subplots(
    1, 3, figsize=(16, 5.2), width_ratios=[1, 1, 1.1], layout="constrained"
)
first = [np.flatnonzero(y_test == digit)[0] for digit in range(8)]
other = [np.flatnonzero(y_test == (digit + 3) % 10)[1] for digit in range(8)]
SampleGridDisplay.from_estimator(
    model, X_test[first], y_test[first], n_per_sample=4, real=X_train, ax=grid_axes
)
InterpolationDisplay.from_estimator(model, X_test[first], X_test[other], ax=strip_axes)
TrainingCurveDisplay.from_estimator(model, ax=loss_axes)
figure.savefig(args.folder / "image_quickstart.png", dpi=110)
print(f"figure: {args.folder / 'image_quickstart.png'}")

# %%
# Save, load, and embed the same: a folder of plain data, reading which runs no code.

model.save(args.folder / "image_quickstart_model")
difference = np.abs(
    load(args.folder / "image_quickstart_model").transform(X_test) - model.transform(X_test)
).max()
print(
    f"model:  {args.folder / 'image_quickstart_model'}, loaded again it differs by {difference:g}"
)
assert difference == 0
print(f"\nall of it in {time.perf_counter() - start:.0f} s")
