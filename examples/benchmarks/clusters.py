"""Leiden clusters, as scanpy users make them, from our embedding and from each peer's.

    DIFFAUGKIT_DATA=folder python clusters.py --out clusters.json --cache cells_cache

``sc.pp.neighbors(use_rep=...)`` with scanpy's 15 neighbours, then ``sc.tl.leiden``, once at its
default resolution of 1 and once at the resolution that gives as many clusters as the set has types,
found by bisection; adjusted Rand index and normalised mutual information with the types. Embeddings
are those of ``cells.py``, whose cache is used where it is there; each peer has the better of the
two standard matrices per set and measure. An embedding without chance in it is clustered with every
seed too: the chance in the clusters is as large as in any embedding. Needs igraph, which is in the
extra ``peers``. Results are written as they come, and a second run goes on where the first
stopped::

    python clusters.py --quick                              # 600 cells per set, a minute or two
    python clusters.py --tables --out clusters.json         # run nothing, print the tables
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
from _common import SETS, Results, markdown, quick_out
from cells import OURS, PEERS, fit_ours, runs
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

METHODS = ("PCA-20", "PCA-50", "UMAP-10", "scVI-10", "scVI-30", *OURS)
MEASURES = {
    "matched ari": "adjusted Rand index x 100, as many clusters as types",
    "matched nmi": "normalised mutual information x 100, as many clusters as types",
    "default ari": "adjusted Rand index x 100, resolution 1",
    "default nmi": "normalised mutual information x 100, resolution 1",
}


def leiden_scores(embedding, y, seed):
    """Score the clusters of the two resolutions against the types."""
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(np.zeros((len(y), 1), np.float32), obsm={"X": np.asarray(embedding)})
    sc.pp.neighbors(adata, use_rep="X", random_state=seed)

    def clusters(resolution):
        sc.tl.leiden(
            adata,
            resolution,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
        return adata.obs["leiden"].cat.codes.to_numpy()

    wanted, found = len(np.unique(y)), {"default": clusters(1.0)}
    low, high, best = 0.01, 5.0, None
    for _ in range(20):
        middle = (low * high) ** 0.5
        labels = clusters(middle)
        off = labels.max() + 1 - wanted
        if best is None or abs(off) < best[0]:
            best = abs(off), labels
        if off == 0:
            break
        low, high = (middle, high) if off < 0 else (low, middle)
    found["matched"] = best[1]
    scores = {"resolution 1, clusters": int(found["default"].max() + 1), "missed by": int(best[0])}
    for name, labels in found.items():
        scores[f"{name} ari"] = 100 * adjusted_rand_score(y, labels)
        scores[f"{name} nmi"] = 100 * normalized_mutual_info_score(y, labels)
    return {key: round(float(value), 2) for key, value in scores.items()}


def run(args):
    """Embed and cluster whatever is not yet in the result file."""
    import torch

    threads = torch.get_num_threads()
    results = Results(args.out)
    for key, inputs, method, kind, seed in runs(args, results):
        if method in PEERS:
            array, _ = inputs.peer(method, kind, seed)
        else:
            torch.set_num_threads(threads)  # numba, below neighbors, lifts a limit
            array = fit_ours(method, inputs.cells, seed, args.quick)["high-D"]
        results.add(key, leiden_scores(array, inputs.cells.y, seed))
        print(f"{key}: {results.read()[key]}", flush=True)


def tables(records, sets):
    """One table a measure: mean and standard deviation over seeds."""
    seeds = {key.split("|")[3] for key in records}
    for measure, title in MEASURES.items():
        rows = []
        for method in METHODS:
            cells, means = [], []
            for name in sets:
                by_kind = {}
                for key, record in records.items():
                    if key.startswith(f"{name}|{method}|"):
                        by_kind.setdefault(key.split("|")[2], []).append(record[measure])
                if by_kind:
                    best = max(by_kind.values(), key=np.mean)
                    means.append(np.mean(best))
                    few = f" ({len(best)} of {len(seeds)} seeds)" * (len(best) < len(seeds))
                    cells.append(f"{np.mean(best):.1f} ± {np.std(best):.1f}{few}")
                else:
                    cells.append("-")
            if means:
                average = f"{np.mean(means):.1f}" if len(means) == len(sets) else "-"
                rows.append([method, *cells, average])
        print(f"\n### Leiden: {title}\n\n{markdown(['method', *sets, 'average'], rows)}")


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="clusters.json", help="resumed when it exists")
    parser.add_argument("--cache", help="folder that keeps matrices and the peers' embeddings")
    parser.add_argument("--scvi-epochs", type=int, help="epochs of scVI; default its own heuristic")
    parser.add_argument("--quick", action="store_true", help="600 cells per set, short training")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.out = quick_out(args.out)
    warnings.filterwarnings("ignore")
    if not args.tables:
        run(args)
    tables(Results(args.out).read(), args.sets)


if __name__ == "__main__":
    main()
