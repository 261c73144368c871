"""Rare cell types with and without generated cells, against SMOTE and random oversampling.

    DIFFAUGKIT_DATA=folder python rare_cells.py --sets mouse_bladder cite_pbmc --out rare_cells.json

Five folds. In each, ``CellPreprocessor``, 50 principal components and the sampler see the training
cells alone. Every sampler gets the same components and brings each type to the size of the largest
(``--aim`` 1) or to that share of it. Logistic regression and a linear SVM are judged by the macro
F1 over the rare types, those with less than a twentieth of the cells, and over all types. Each fold
is written as it comes, and a second run goes on where the first stopped::

    python rare_cells.py --quick                            # a smoke test, a minute
    python rare_cells.py --tables --out rare_cells.json     # run nothing, print the tables
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from itertools import product

import numpy as np
from _common import SETS, Results, load_cells, markdown, quick_out
from scipy.stats import ttest_rel
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

PEERS = ("none", "random oversampling", "SMOTE")
OURS = ("reconstruction", "interpolation")
CLASSIFIERS = {
    "logistic": lambda: LogisticRegression(max_iter=1000),
    "svm": lambda: LinearSVC(dual=False),
}
SCORES = ("rare", "all")


def rare_types(y, share=0.05):
    """Types that make up less than this share of the cells; at least the two rarest."""
    counts = np.bincount(y)
    rare = np.flatnonzero((counts > 0) & (counts < share * len(y)))
    return rare if len(rare) >= 2 else np.argsort(np.where(counts, counts, len(y)))[:2]


def wanted_sizes(y, aim):
    """Size of each type after resampling: ``aim`` of the largest, or its own if that is more."""
    kinds, counts = np.unique(y, return_counts=True)
    sizes = np.maximum(counts, np.rint(aim * counts.max())).astype(int)
    return dict(zip(kinds.tolist(), sizes.tolist(), strict=True))


def make_sampler(method, y, args, seed):
    """Sampler of a method, or None; generators learn without labels."""
    wanted = wanted_sizes(y, args.aim)
    if method == "none":
        return None
    if method in OURS:
        from diffaugkit import EmbeddingConditionedDiffusion
        from diffaugkit.augmenter import GenerativeAugmenter

        diffusion = EmbeddingConditionedDiffusion()
        if args.quick:
            diffusion.set_params(max_epochs=5)
        return GenerativeAugmenter(
            diffusion, method, sampling_strategy=wanted, random_state=seed, verbose=0
        )
    from imblearn.over_sampling import SMOTE, RandomOverSampler

    if method == "random oversampling":
        return RandomOverSampler(sampling_strategy=wanted, random_state=seed)
    # Its five neighbours, or as many as the rarest type of the fold has.
    neighbors = min(5, np.unique(y, return_counts=True)[1].min() - 1)
    return SMOTE(sampling_strategy=wanted, k_neighbors=int(neighbors), random_state=seed)


def fold_components(cells, fold, args):
    """Principal components and labels of the training and of the test cells of a fold."""
    from diffaugkit import CellPreprocessor

    splitter = StratifiedKFold(5, shuffle=True, random_state=args.seed)
    train, test = list(splitter.split(cells.counts, cells.y))[fold]
    prepare = make_pipeline(CellPreprocessor(), PCA(50, random_state=0))
    X, X_test = prepare.fit_transform(cells.counts[train]), prepare.transform(cells.counts[test])
    return X, cells.y[train], X_test, cells.y[test]


def run_method(method, X, y, X_test, y_test, rare, args, fold):
    """Macro F1 x 100 of both classifiers after one method, and what the sampler says."""
    start = time.perf_counter()
    record = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method in OURS and args.fitted is not None:
            # One generator for both strategies, as the same seed would train the same again.
            sampler = args.fitted.set_params(strategy=method)
            X_more, y_more = sampler.resample(X, y)
        else:
            sampler = make_sampler(method, y, args, args.seed + fold)
            X_more, y_more = (X, y) if sampler is None else sampler.fit_resample(X, y)
        record["seconds"] = round(time.perf_counter() - start, 1)
        for name, make in CLASSIFIERS.items():
            model = make_pipeline(StandardScaler(), make()).fit(X_more, y_more)
            predicted = model.predict(X_test)
            for score, labels in (("rare", rare), ("all", np.unique(y))):
                value = f1_score(y_test, predicted, labels=labels, average="macro", zero_division=0)
                record[f"{name}_{score}"] = round(100 * float(value), 3)
    if method in OURS:
        args.fitted = sampler
        report = sampler.quality_report_
        chosen = sampler.selection_
        record["generated"] = int(chosen["accepted"].sum())
        record["wanted"] = int(chosen["wanted"].sum())
        record["low_confidence"] = int(chosen["low_confidence"].sum())
        record["copies"] = int(chosen["copies"].sum())
        record["label_consistency"] = report.label_consistency
        record["copy_ratio"] = report.copy_ratio
        record["spread_ratio"] = report.spread_ratio
    return record


def run(args, results):
    for name in args.sets:
        cells = load_cells(name, args.quick)
        rare = rare_types(cells.y)
        for fold in range(args.folds):
            load = partial(fold_components, cells, fold, args)
            run_fold(name, fold, load, rare, args, results)


def run_fold(name, fold, load, rare, args, results):
    """Run the methods that a fold lacks on what ``load()`` gives."""
    prefix = f"{name}|aim {args.aim}|seed {args.seed}|fold {fold}"
    todo = [m for m in args.methods if f"{prefix}|{m}" not in results.read()]
    if not todo:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = load()
    args.fitted = None
    for method in todo:
        record = run_method(method, *parts, rare, args, fold)
        results.add(f"{prefix}|{method}", record)
        print(f"{prefix}|{method}: {record}", flush=True)


def tables(results):
    """Print macro F1 x 100 per classifier and score: means over the folds that all methods have."""
    found = {}
    for key, record in results.read().items():
        name, aim, seed, fold, method = key.split("|")
        found.setdefault((name, aim), {}).setdefault(method, {})[seed, fold] = record
    for classifier in CLASSIFIERS:
        for score in SCORES:
            print(f"\n### {score.capitalize()} types, {classifier}\n")
            rows, gains = [], {}
            for (name, aim), methods in found.items():
                folds = sorted(set.intersection(*map(set, methods.values())))
                values = {
                    method: np.array([records[fold][f"{classifier}_{score}"] for fold in folds])
                    for method, records in methods.items()
                }
                cells = (cell(values, method) for method in (*PEERS, *OURS))
                rows.append([name, aim, len(folds), *cells])
                for ours, peer in product(OURS, PEERS):
                    if ours in values and peer in values:
                        gain = values[ours] - values[peer]
                        gains.setdefault(peer, {}).setdefault(ours, []).extend(gain)
            for peer, gain in gains.items():
                n = max(map(len, gain.values()))
                means = [
                    f"{np.mean(g):+.2f} ± {np.std(g, ddof=1) / len(g) ** 0.5:.2f}" if g else "-"
                    for g in (gain.get(ours, ()) for ours in OURS)
                ]
                rows.append([f"**against {peer}, all folds**", "", n, "", "", "", *means])
            print(markdown(["set", "aim", "folds", *PEERS, *OURS], rows))


def cell(values, method):
    """Mean over folds; for ours with the p-value of the paired difference from SMOTE."""
    if not len(values.get(method, ())):
        return "-"
    text = f"{values[method].mean():.1f}"
    if method in OURS and "SMOTE" in values and len(values[method]) > 2:
        if np.ptp(values[method] - values["SMOTE"]) > 0:
            text += f" (p {ttest_rel(values[method], values['SMOTE']).pvalue:.2f})"
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--folds", type=int, default=5, help="how many of the five to run")
    parser.add_argument("--aim", type=float, default=1.0, help="share of the largest type")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="600 cells, one fold, few epochs")
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    parser.add_argument("--out", default="rare_cells.json")
    args = parser.parse_args()
    if args.quick:
        args.sets, args.folds = args.sets[:1], 1
        args.out = quick_out(args.out)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
