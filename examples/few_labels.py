"""
Few labels: a generator learns from all digits, and augments the 50 that have labels
====================================================================================

Learn an encoder and a diffusion model from 1 297 handwritten digits without labels, then add
generated digits to 50 labelled ones, checked for their labels and for copies, and train classifiers
on both. Takes about three minutes on two cores; needs the extra `plots`::

    python examples/few_labels.py      # writes few_labels.png
"""

import argparse
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC

from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder
from diffaugkit.augmenter import GenerativeAugmenter
from diffaugkit.datasets import load_digits
from diffaugkit.metrics import nearest_training_samples
from diffaugkit.plotting import SampleGridDisplay

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write the figure")
parser.add_argument("--epochs", type=int, default=15, help="of the encoder")
parser.add_argument("--diffusion-epochs", type=int, default=20)
parser.add_argument("--ratio", type=int, default=5, help="generated digits per labelled one")
parser.add_argument("--repeats", type=int, default=3, help="random choices of the 50 labels")
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: digits of 8 x 8 pixels. 500 are for testing; nothing below learns from them.

X, y = load_digits()
X_pool, X_test, y_pool, y_test = train_test_split(X, y, test_size=500, random_state=0, stratify=y)
print(
    f"{len(X_pool)} images without labels, of which 50 will have one; {len(X_test)} for testing\n"
)

# %%
# Pre-train once, without labels: an encoder (SimCLR), and a diffusion model on its embeddings.

diffusion = EmbeddingConditionedDiffusion(
    SelfSupervisedEncoder(max_epochs=args.epochs, batch_size=100),
    max_epochs=args.diffusion_epochs,
    random_state=0,
    verbose=1,
).fit(X_pool)
pretrained = FrozenEstimator(diffusion)
print(f"\npre-trained in {time.perf_counter() - start:.0f} s\n")

# %%
# Augment 50 labelled digits, five of each kind; for several choices of the 50.

classifiers = {
    "logistic regression": make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=1000)),
    "SVM (RBF)": make_pipeline(MinMaxScaler(), SVC()),
    "1-NN": KNeighborsClassifier(1),
}
samplers = {
    strategy: GenerativeAugmenter(pretrained, strategy, ratio=args.ratio, random_state=0)
    for strategy in ("reconstruction", "interpolation")
}
names = ["50 labels", *(f"{how} {kind}" for kind in samplers for how in ("+", "only"))]
scores = {name: {kind: [] for kind in classifiers} for name in names}
for repeat in range(args.repeats):
    few, _, y_few, _ = train_test_split(
        X_pool, y_pool, train_size=50, random_state=repeat, stratify=y_pool
    )
    sets = {"50 labels": (few, y_few)}
    for strategy, sampler in samplers.items():
        more, y_more = sampler.fit_resample(few, y_few)
        sets[f"+ {strategy}"] = more, y_more
        # As replace_real=True would give them.
        sets[f"only {strategy}"] = more[50:], y_more[50:]
    for name, (given, labels) in sets.items():
        for kind, classifier in classifiers.items():
            classifier.fit(given.reshape(len(given), -1), labels)
            found = classifier.score(X_test.reshape(len(X_test), -1), y_test)
            scores[name][kind].append(100 * found)
print(
    f"accuracy on {len(X_test)} digits, %: mean +- standard deviation over {args.repeats} choices\n"
    "of the 50 (+: with generated digits, only: from generated digits alone)\n"
)
print(f"{'':20}" + "".join(f"{kind:>22}" for kind in classifiers))
for name, by_kind in scores.items():
    cells = (f"{np.mean(v):.1f} +- {np.std(v):.1f}" for v in by_kind.values())
    print(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))

# %%
# Each generated row knows where it comes from, and how sure its label is.

augmenter = samplers["reconstruction"]
print(f"\n{augmenter.selection_.to_string(index=False)}\n")
print(f"{augmenter.provenance_.head(3).to_string(index=False)}\n\n{augmenter.quality_report_}\n")

# %%
# One figure: a labelled digit of each kind with what was generated from it, and what lies between
# two of a kind. Rows show the source, the generated digits and the nearest digit of the pool: a
# copy would be seen.

figure, axes = plt.subplots(1, 2, figsize=(11, 6.5), layout="constrained")
for (name, augmenter), ax in zip(samplers.items(), axes, strict=True):
    made, labels = sets[f"only {name}"]
    origin = augmenter.provenance_["source"].to_numpy()
    # The source of each digit that was used most often, and five of what came from it.
    sources = [np.bincount(origin[labels == digit]).argmax() for digit in np.unique(labels)]
    shown = made[np.concatenate([np.resize(np.flatnonzero(origin == row), 5) for row in sources])]
    distance, nearest = nearest_training_samples(X_pool.reshape(-1, 64), shown.reshape(-1, 64))
    closest = distance.reshape(-1, 5).argmin(axis=1) + 5 * np.arange(len(sources))
    SampleGridDisplay(shown, few[sources], y_few[sources], X_pool[nearest[closest]]).plot(ax=ax)
    ax.set_title(name)
figure.savefig(args.folder / "few_labels.png", dpi=110)
print(f"figure: {args.folder / 'few_labels.png'}")
print(f"\nall of it in {time.perf_counter() - start:.0f} s")
