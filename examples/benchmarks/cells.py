"""Cells against every peer installed: the protocol of DiffAug's Table 2 on five real cell sets.

    DIFFAUGKIT_DATA=folder python cells.py --out cells.json --cache cells_cache

Each peer works on the better of two standard matrices (scanpy's 2 000 scaled log genes; Pearson
residuals of 3 000 genes), chosen per set by its own mean SVM accuracy, and is given what its users
usually give it: UMAP, t-SNE and h-NNE 50 principal components, PaCMAP and PHATE the matrix (they
reduce it themselves), scVI the raw counts. Stochastic methods run once per seed, deterministic ones
once, but are judged with each seed, as k-means is not deterministic. diffaugkit starts from raw
counts with its defaults; "E-only" is the same estimator without generated views. Methods that are
not installed are skipped with a message.

Results are written as they come, and a second run goes on where the first stopped. Delete the
result file (not the cache of the peers) after a change to the library. Useful variants::

    python cells.py --quick                                  # 600 cells per set, minutes
    python cells.py --methods DiffAugEM E-only --out ours.json --also peers.json
    python cells.py --tables --out peers.json                # run nothing, print the tables

scVI may live in an environment of its own: run its rows there with the same ``--out``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import time
import warnings
from pathlib import Path

import numpy as np
from _common import (
    MATRICES,
    METRICS,
    SETS,
    Results,
    evaluate,
    load_cells,
    markdown,
    quick_out,
    standard_matrix,
)
from sklearn.pipeline import make_pipeline


def pca(n_components):
    """Principal components of the matrix, by the solver that scanpy uses."""

    def embed(matrix, seed, args):
        from sklearn.decomposition import PCA

        n_components_ = min(n_components, min(matrix.shape) - 1)
        return PCA(n_components_, svd_solver="arpack", random_state=0).fit_transform(matrix)

    return embed


def kernel_pca(matrix, seed, args):
    """RBF kernel PCA of the matrix, scikit-learn's default width."""
    from sklearn.decomposition import KernelPCA

    return KernelPCA(2, kernel="rbf", eigen_solver="arpack", random_state=0).fit_transform(matrix)


def umap(n_components):
    """UMAP of 50 principal components."""

    def embed(matrix, seed, args):
        from umap import UMAP

        return UMAP(n_components=n_components, random_state=seed, n_jobs=1).fit_transform(matrix)

    return embed


def pacmap(matrix, seed, args):
    """PaCMAP of the matrix; it takes 100 principal components itself."""
    from pacmap import PaCMAP

    return PaCMAP(n_components=2, random_state=seed).fit_transform(matrix)


def phate(matrix, seed, args):
    """PHATE of the matrix; it takes 100 principal components itself."""
    from phate import PHATE

    return PHATE(n_components=2, random_state=seed, n_jobs=1, verbose=0).fit_transform(matrix)


def tsne(matrix, seed, args):
    """t-SNE of 50 principal components."""
    from sklearn.manifold import TSNE

    return TSNE(2, random_state=seed, n_jobs=1).fit_transform(matrix)


def hnne(matrix, seed, args):
    """h-NNE of 50 principal components."""
    from hnne import HNNE

    return HNNE(n_components=2, random_state=seed).fit_transform(matrix)


def scvi(n_latent):
    """Latent means of scVI on raw counts, for as many epochs as its heuristic or the user says."""

    def embed(counts, seed, args):
        import anndata
        import scvi as scvi_tools

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        scvi_tools.settings.seed = seed
        scvi_tools.settings.verbosity = logging.ERROR
        adata = anndata.AnnData(counts.copy())
        scvi_tools.model.SCVI.setup_anndata(adata)
        model = scvi_tools.model.SCVI(adata, n_latent=n_latent)
        model.train(
            max_epochs=5 if args.quick else args.scvi_epochs,
            accelerator="cpu",
            enable_progress_bar=False,
        )
        return model.get_latent_representation()

    return embed


# name: (kind of embedding, module it needs, what it is given, stochastic, function)
PEERS = {
    "PCA": ("2-D", "sklearn", "matrix", False, pca(2)),
    "KernelPCA": ("2-D", "sklearn", "matrix", False, kernel_pca),
    "UMAP": ("2-D", "umap", "pca50", True, umap(2)),
    "PaCMAP": ("2-D", "pacmap", "matrix", True, pacmap),
    "PHATE": ("2-D", "phate", "matrix", True, phate),
    "t-SNE": ("2-D", "sklearn", "pca50", True, tsne),
    "hnne": ("2-D", "hnne", "pca50", True, hnne),
    "PCA-20": ("high-D", "sklearn", "matrix", False, pca(20)),
    "PCA-50": ("high-D", "sklearn", "matrix", False, pca(50)),
    "UMAP-10": ("high-D", "umap", "pca50", True, umap(10)),
    "scVI-10": ("high-D", "scvi", "counts", True, scvi(10)),
    "scVI-30": ("high-D", "scvi", "counts", True, scvi(30)),
}
OURS = ("E-only", "DiffAugEM")


def fit_ours(method, cells, seed, quick):
    """Fit our pipeline on raw counts; return its two embeddings by kind.

    E-only has the encoder's epochs and learning rates, and no M-step between.
    """
    from diffaugkit import CellPreprocessor, DiffAugEM

    model = DiffAugEM(random_state=seed, schedule=(3, 3, 3) if quick else "auto")
    if method == "E-only":
        model.set_params(schedule=without_m_step(model, len(cells.y)))
    pipeline = make_pipeline(CellPreprocessor(), model).fit(cells.counts)
    prepared = pipeline[0].transform(cells.counts)
    return {"2-D": model.project(prepared), "high-D": model.transform(prepared)}


def without_m_step(model, n_cells):
    """Return the model's own schedule with every M-step left out."""
    from diffaugkit import SelfSupervisedEncoder

    schedule = model._schedule(SelfSupervisedEncoder(), n_cells)
    return tuple(0 if number % 2 else epochs for number, epochs in enumerate(schedule))


def available(method):
    """Tell whether what the method needs is installed, and say so when it is not."""
    try:
        if method in OURS:
            from diffaugkit import CellPreprocessor, DiffAugEM  # noqa: F401
        elif importlib.util.find_spec(PEERS[method][1]) is None:
            raise ImportError(f"{PEERS[method][1]} is not installed")
    except ImportError as error:
        print(f"skipped {method}: {error}", flush=True)
        return False
    return True


class Inputs:
    """What the methods are given for one set, made when first asked for and kept in the cache."""

    def __init__(self, name, args):
        self.name, self.args = name, args
        self._cells = None
        self._made = {}

    @property
    def cells(self):
        """The set itself."""
        if self._cells is None:
            self._cells = load_cells(self.name, self.args.quick)
        return self._cells

    def cached(self, make, *parts):
        """Return ``(array, seconds)`` of ``make()``, from the cache folder where it holds them."""
        path = None
        if self.args.cache:
            folder = Path(self.args.cache, "quick" if self.args.quick else "")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / ("__".join((self.name, *parts)) + ".npz")
            if path.exists():
                with np.load(path) as file:
                    return file["array"], float(file["seconds"])
        start = time.perf_counter()
        array = np.asarray(make())
        seconds = time.perf_counter() - start
        if path is not None:
            aside = path.with_suffix(".tmp.npz")
            np.savez(aside, array=array, seconds=seconds)
            aside.replace(path)
        return array, seconds

    def peer(self, method, kind, seed):
        """Return the embedding of a peer and its seconds: one for all seeds if it has no chance."""
        _, _, what, stochastic, embed = PEERS[method]
        parts = [method, kind, str(seed if stochastic else 0)]
        if method.startswith("scVI") and self.args.scvi_epochs:
            parts.append(f"{self.args.scvi_epochs} epochs")
        given = self(what, kind)
        return self.cached(lambda: embed(given, seed, self.args), *parts)

    def __call__(self, what, kind):
        """Return the counts, a standard matrix, or its 50 principal components."""
        if what == "counts":
            return self.cells.counts
        if (what, kind) not in self._made:
            if what == "matrix":
                made, _ = self.cached(lambda: standard_matrix(self.cells, kind), what, kind)
            else:
                matrix = self("matrix", kind)
                made, _ = self.cached(lambda: pca(50)(matrix, 0, self.args), what, kind)
            self._made[what, kind] = made
        return self._made[what, kind]


def embed_and_judge(method, kind, seed, inputs, args):
    """Return the record of one method on one set: its time and its scores by kind of embedding."""
    if method in OURS:
        start = time.perf_counter()
        found = fit_ours(method, inputs.cells, seed, args.quick)
        seconds = time.perf_counter() - start
    else:
        array, seconds = inputs.peer(method, kind, seed)
        found = {PEERS[method][0]: array}
    scores = {group: evaluate(array, inputs.cells, seed) for group, array in found.items()}
    record = {"seconds": round(seconds, 2), "scores": scores}
    if method.startswith("scVI") and args.scvi_epochs:
        record["epochs"] = args.scvi_epochs
    return record


def runs(args, results):
    """Yield key, inputs, method, matrix and seed of every run that has no result yet."""
    methods = [method for method in args.methods if available(method)]
    if any(method.startswith("scVI") for method in methods):
        results.settle("scVI", scvi_epochs=args.scvi_epochs)
    for seed, name in itertools.product(args.seeds, args.sets):
        inputs = Inputs(name, args)
        for method in methods:
            kinds = ("ours",)
            if method in PEERS:
                kinds = ("counts",) if PEERS[method][2] == "counts" else MATRICES
            for kind in kinds:
                key = f"{name}|{method}|{kind}|{seed}"
                if key not in results.read():
                    yield key, inputs, method, kind, seed


def run(args):
    """Make and judge every embedding that is not yet in the result file."""
    results = Results(args.out)
    for key, inputs, method, kind, seed in runs(args, results):
        try:
            record = embed_and_judge(method, kind, seed, inputs, args)
        except Exception as error:
            # One method that fails on one set must not cost the others their hours.
            print(f"failed {key}: {type(error).__name__}: {error}", flush=True)
            continue
        results.add(key, record)
        shown = [f"{g} svm {s['svm']} knn {s['knn']}" for g, s in record["scores"].items()]
        print(f"{key}: {', '.join(shown)} ({record['seconds']:.1f} s)", flush=True)


def gather(records, group):
    """Return ``{method: {set: {metric: (mean, std, runs), "matrix": kind}}}``.

    Each peer stands on the matrix where its mean SVM accuracy is better. The protein scores need no
    labels, so there each peer has the matrix that is better for the proteins.
    """
    found = {}
    for key, record in records.items():
        name, method, kind, _ = key.split("|")
        if group in record["scores"]:
            scores = record["scores"][group] | {"seconds": record["seconds"]}
            for metric, value in scores.items():
                kinds = found.setdefault(method, {}).setdefault(name, {}).setdefault(metric, {})
                kinds.setdefault(kind, []).append(value)
    for sets in found.values():
        for name, scores in sets.items():
            kind = max(scores["svm"], key=lambda k: np.mean(scores["svm"][k]))
            values = {metric: kinds[kind] for metric, kinds in scores.items()}
            if "protein_r2" in scores:
                values["protein_r2"] = max(scores["protein_r2"].values(), key=np.mean)
            sets[name] = {m: (np.mean(v), np.std(v), len(v)) for m, v in values.items()}
            sets[name]["matrix"] = kind
    return found


def metric_table(chosen, metric, sets):
    """Return one markdown table: methods by sets, the best peers, and ours less those."""
    value = {m: {s: c[metric] for s, c in by.items() if metric in c} for m, by in chosen.items()}
    names = [s for s in sets if any(s in v for v in value.values())]
    means = {m: {s: v[s][0] for s in names if s in v} for m, v in value.items()}
    means = {m: v for m, v in means.items() if v}

    def average(numbers):
        return f"{np.mean(list(numbers.values())):.2f}" if len(numbers) == len(names) else "-"

    rows = []
    for method, v in means.items():
        cells = [f"{v[s]:.2f} ± {value[method][s][1]:.2f}" if s in v else "-" for s in names]
        rows.append([method, *cells, average(v)])
    peers = [m for m in means if m in PEERS]
    best = {s: max((means[m][s], m) for m in peers if s in means[m]) for s in names if peers}
    rivals = {"best per set": {s: score for s, (score, _) in best.items()}}
    rows.append(
        ["**best peer per set**"]
        + [f"{best[s][0]:.2f} ({best[s][1]})" if s in best else "-" for s in names]
        + [average(rivals["best per set"])]
    )
    complete = [m for m in peers if len(means[m]) == len(names)]
    if complete:
        leader = max(complete, key=lambda m: np.mean(list(means[m].values())))
        rivals[f"{leader}, best on average"] = means[leader]
    for method, (title, rival) in itertools.product(OURS, rivals.items()):
        if method in means:
            gain = {
                s: means[method][s] - rival[s] for s in names if s in means[method] and s in rival
            }
            cells = [f"{gain[s]:+.2f}" if s in gain else "-" for s in names]
            mean = f"{np.mean(list(gain.values())):+.2f}" if len(gain) == len(names) else "-"
            rows.append([f"**{method} less {title}**", *cells, mean])
    return markdown(["method", *names, "average"], rows)


def tables(records, sets):
    """Return every table as markdown text."""
    out = []
    for group, title in (("2-D", "2-D projections"), ("high-D", "High-dimensional embeddings")):
        found = gather(records, group)
        chosen = {method: found[method] for method in (*PEERS, *OURS) if method in found}
        if not chosen:
            continue
        for metric, label in METRICS.items():
            if any(metric in by.get(s, {}) for by in chosen.values() for s in sets):
                out.append(f"### {title}: {label}\n\n{metric_table(chosen, metric, sets)}")
        rows = []
        for method, by in chosen.items():
            notes = {s: (c["matrix"], c["seconds"][0], c["svm"][2]) for s, c in by.items()}
            cells = ["{}, {:.0f} s, {}".format(*notes[s]) if s in notes else "-" for s in sets]
            rows.append([method, *cells])
        table = markdown(["method", *sets], rows)
        out.append(f"### {title}: matrix used, mean seconds, number of runs\n\n{table}")
    return "\n\n".join(out)


def main():
    """Parse the command line, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = (*PEERS, *OURS)
    parser.add_argument("--methods", nargs="+", default=everything, choices=everything)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="cells.json", help="result file, resumed when it exists")
    parser.add_argument("--also", nargs="*", default=[], help="further result files for the tables")
    parser.add_argument("--cache", help="folder that keeps matrices and the peers' embeddings")
    parser.add_argument("--scvi-epochs", type=int, help="epochs of scVI; default its own heuristic")
    parser.add_argument("--quick", action="store_true", help="600 cells per set, short training")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.out = quick_out(args.out)
    # The peers' own deprecation and parallelism notes would bury the table.
    warnings.filterwarnings("ignore")
    if not args.tables:
        run(args)
    records = {}
    for path in (*args.also, args.out):
        records |= Results(path).read()
    print(tables(records, args.sets))


if __name__ == "__main__":
    main()
