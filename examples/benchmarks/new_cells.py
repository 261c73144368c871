"""Embeddings of cells that the encoder has not seen, learned from few and from many.

    DIFFAUGKIT_DATA=folder python new_cells.py --sizes 400 --seeds 0 1 2 --out new_cells.json

From each set some cells are drawn, without labels, for the preprocessing and the embedding; all
others are embedded by what was learned, and judged as in ``cells.py`` among themselves. So what is
asked for is not how well a map fits the cells it was drawn from, but what it has understood, which
is where generated views can help. Every method reads the same matrix, that of ``CellPreprocessor``:
PCA, UMAP (of 50 principal components, by its ``transform``), ``DiffAugEM`` with each share lambda
of generated views, and the same without a generator at equal epochs of the encoder ("E alone").
Size 0 stands for half of the set. Results are written as they come, and a second run goes on where
the first stopped::

    python new_cells.py --quick                             # a smoke test
    python new_cells.py --tables --out new_cells.json       # run nothing, print the tables
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import numpy as np
from _common import SETS, Results, evaluate, load_cells, markdown, quick_out
from cells import without_m_step
from scipy.stats import sem
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline

BASE = "E alone"


def fit_pca(X, seed, args):
    """Principal components, 20, 50 and 2."""
    pca = PCA(50, random_state=0).fit(X)
    return {
        ("PCA-20", "y"): lambda new: pca.transform(new)[:, :20],
        ("PCA-50", "y"): pca.transform,
        ("PCA-2", "z"): lambda new: pca.transform(new)[:, :2],
    }


def fit_umap(X, seed, args):
    """UMAP in 10 and 2 dimensions."""
    import umap

    def fit(n_components):
        reducer = umap.UMAP(n_components=n_components, random_state=seed, n_jobs=1)
        return make_pipeline(PCA(50, random_state=0), reducer).fit(X).transform

    return {("UMAP-10", "y"): fit(10), ("UMAP-2", "z"): fit(2)}


def fit_ours(X, seed, args):
    """The encoder alone, and with each share of generated views."""
    from diffaugkit import DiffAugEM

    schedule = (3, 3, 3) if args.quick else "auto"
    model = DiffAugEM(random_state=seed, schedule=schedule)
    found = {}
    for share in [0.0, *args.lambdas]:
        if share:
            model.set_params(augmentation_prob=share, schedule=schedule)
        else:
            model.set_params(schedule=without_m_step(model, len(X)))
        fitted = model.fit(X)
        name = f"DiffAugEM, lambda {share:g}" if share else BASE
        # Before the next share is fitted on the same object.
        found[name, "y"], found[name, "z"] = fitted.encoder_.transform, fitted.encoder_.project
    return found


FITS = {"PCA": fit_pca, "UMAP": fit_umap, "ours": fit_ours}


def run(args, results):
    """Learn from the cells that are drawn, and judge the others."""
    import torch
    from tqdm import tqdm

    from diffaugkit import CellPreprocessor

    results.settle("new cells", lambdas=args.lambdas)
    n_threads = torch.get_num_threads()
    todo = [(n, s, k, m) for n in args.sizes for s in args.sets for k in args.seeds for m in FITS]
    for size, name, seed, method in tqdm(todo, unit="fit"):
        key = f"{size}|{name}|{seed}|{method}"
        if key in results.read():
            continue
        torch.set_num_threads(n_threads)  # numba, inside UMAP, sets them to all cores
        cells = load_cells(name, args.quick)
        order = np.random.default_rng(seed).permutation(len(cells.y))
        seen, new = np.split(order, [size or len(order) // 2])
        preprocessor = CellPreprocessor().fit(cells.counts[seen])
        X, X_new = (preprocessor.transform(cells.counts[rows]) for rows in (seen, new))
        proteins = None if cells.proteins is None else cells.proteins[new]
        others = dataclasses.replace(
            cells, counts=cells.counts[new], y=cells.y[new], proteins=proteins
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="n_jobs value 1 overridden")
            embeddings = FITS[method](X, seed, args)
            record = {
                f"{variant}|{space}": evaluate(embed(X_new), others, seed)
                for (variant, space), embed in embeddings.items()
            }
        results.add(key, record)


def tables(records):
    """Print a table per size: means over sets and seeds, paired gains over the encoder alone."""
    sizes = sorted({int(key.split("|")[0]) for key in records}, key=lambda size: size or 10**9)
    for size in sizes:
        found = {}
        for key, record in records.items():
            n, name, seed, _ = key.split("|")
            if int(n) == size:
                for variant, scores in record.items():
                    found.setdefault(tuple(variant.split("|")), {})[name, seed] = scores
        if (BASE, "y") not in found:
            continue
        measures = {"svm": "SVM", "knn": "k-NN"}
        header = ["method", "dims", *measures.values()]
        header += [f"{label} against {BASE}" for label in measures.values()] + ["above it", "runs"]
        rows = []
        for (variant, space), own in sorted(found.items(), key=lambda item: item[0][1]):
            base = found[BASE, space]
            gains = np.array(
                [[own[run][m] - base[run][m] for m in measures] for run in own if run in base]
            )
            row = [variant, {"y": "high", "z": "2"}[space]]
            row += [f"{np.mean([scores[m] for scores in own.values()]):.2f}" for m in measures]
            row += [f"{np.mean(gain):+.2f} ± {sem(gain):.2f}" for gain in gains.T]
            row.append(" / ".join(f"{(gain > 0).sum()}" for gain in gains.T))
            rows.append([*row, len(own)])
        cells = f"{size} cells" if size else "half of the cells"
        sets = len({name for name, _ in found[BASE, "y"]})
        print(f"\n### Learned from {cells}: means over {sets} sets\n\n{markdown(header, rows)}")


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[400, 0], help="0: half of a set")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lambdas", nargs="+", type=float, default=[0.1, 0.5])
    parser.add_argument("--out", default="new_cells.json", help="resumed when it exists")
    parser.add_argument("--quick", action="store_true", help="600 cells and 3 epochs: a smoke test")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.out = quick_out(args.out)
        args.sizes, args.seeds = [400], [0]
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results.read())


if __name__ == "__main__":
    main()
