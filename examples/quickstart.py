"""
Quickstart: 700 blood cells, from counts to a figure
====================================================

Learn an embedding, a map and a generator of cells from unlabelled PBMC data; compare with PCA and
UMAP, look at synthetic cells, save the model. Takes about two minutes on two cores; needs the
extras `cells` and `plots`::

    python examples/quickstart.py            # writes quickstart.png and quickstart_model/
"""

import argparse
import importlib.util
import os
import time
from pathlib import Path

start = time.perf_counter()

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA

from diffaugkit import CellPreprocessor, DiffAugEM, load
from diffaugkit.datasets import load_pbmc
from diffaugkit.metrics import kmeans_scores, knn_accuracy, linear_svm_accuracy
from diffaugkit.plotting import EmbeddingDisplay, TrainingCurveDisplay

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--folder", type=Path, default=Path(), help="where to write figure and model")
parser.add_argument("--schedule", type=int, nargs="+", help="epochs E M E, to try it out faster")
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)
if not os.access(args.folder, os.W_OK):  # said now, and not after minutes of work
    parser.error(f"{args.folder.resolve()} cannot be written to; name another --folder")

# %%
# Data: peripheral blood cells that ship inside scanpy, as raw counts, with cell types that nobody
# here trains on.

adata = load_pbmc()
cell_types = adata.obs["bulk_labels"]
print(f"{adata.n_obs} cells, {adata.n_vars} genes, {cell_types.nunique()} cell types (not shown)\n")

# %%
# Fit: normalise, then alternate between encoder and generator. No labels.

preprocessor = CellPreprocessor()
cells = preprocessor.fit_transform(adata)
fit_start = time.perf_counter()
model = DiffAugEM(schedule=args.schedule or "auto", random_state=0, verbose=1).fit(cells)
print(f"\nfitted in {time.perf_counter() - fit_start:.0f} s\n")

# %%
# Compare: what a linear classifier, neighbours and k-means find of the cell types in each
# embedding, in percent. The peers get the same normalised genes.

principal_components = PCA(50, svd_solver="arpack", random_state=0).fit_transform(cells)
embeddings = {
    "DiffAug": model.transform(cells),
    "PCA-50": principal_components,
    "PCA-20": principal_components[:, :20],
    "DiffAug map": model.project(cells),
    "PCA-2": principal_components[:, :2],
}
if importlib.util.find_spec("umap"):
    import umap

    reducer = umap.UMAP(random_state=0, n_jobs=1)
    embeddings["UMAP map"] = reducer.fit_transform(principal_components)

print(f"{'':13}dims  linear SVM   k-NN  k-means    ARI    NMI")
for name, embedding in embeddings.items():
    if name == "DiffAug map":
        print()
    clusters = kmeans_scores(embedding, cell_types)
    print(
        f"{name:13}{embedding.shape[1]:4}"
        f"{100 * linear_svm_accuracy(embedding, cell_types):12.1f}"
        f"{100 * knn_accuracy(embedding, cell_types):7.1f}"
        f"{100 * clusters['accuracy']:9.1f}"
        f"{100 * clusters['ari']:7.1f}"
        f"{100 * clusters['nmi']:7.1f}"
    )

# %%
# Generate: one synthetic cell from the embedding of each real one, and how good they are.

synthetic = model.augment(cells)
print(f"\n{model.quality_report(cells, cell_types)}\n")

# %%
# One figure: the map, synthetic cells on top of it, and how the training went.

figure, (real_axes, synthetic_axes, loss_axes) = plt.subplots(
    1, 3, figsize=(16, 4.8), width_ratios=[1, 1, 1.1], layout="constrained"
)
EmbeddingDisplay.from_estimator(model, cells, cell_types, ax=real_axes, legend=None)
EmbeddingDisplay.from_estimator(
    model, cells, cell_types, synthetic, generated_labels=cell_types, ax=synthetic_axes
)
TrainingCurveDisplay.from_estimator(model, ax=loss_axes)
real_axes.set_title("700 real cells")
synthetic_axes.set_title("700 generated cells on top")
figure.savefig(args.folder / "quickstart.png", dpi=110)
print(f"figure: {args.folder / 'quickstart.png'}")

# %%
# Save, load, and embed the same: a folder of plain data, reading which runs no code.

model.save(args.folder / "quickstart_model")
loaded = load(args.folder / "quickstart_model")
difference = max(
    np.abs(loaded.transform(cells) - model.transform(cells)).max(),
    np.abs(loaded.project(cells) - model.project(cells)).max(),
)
print(f"model:  {args.folder / 'quickstart_model'}, loaded again it differs by {difference:g}")
assert difference == 0
print(f"\nall of it in {time.perf_counter() - start:.0f} s")
