"""Rare classes of small tables with and without generated rows, on data of scikit-learn.

    python rare_rows.py --out rare_rows.json

The smallest sizes at which one would try it: every other class has 60 rows, the rest have 8. Five
draws of these, standardised; half of all rows are for testing. Samplers, classifiers and tables are
those of ``rare_cells.py``; the F1 of "rare types" is that of the classes of 8 rows. Each draw is
written as it comes, and a second run goes on where the first stopped::

    python rare_rows.py --quick                            # a smoke test, a minute
    python rare_rows.py --tables --out rare_rows.json      # run nothing, print the tables
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
from _common import Results, quick_out
from rare_cells import OURS, PEERS, run_fold, tables
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

SETS = {"wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits}
COMMON, RARE = 60, 8


def draw(name, seed):
    """Training rows and labels in which odd classes are rare, test rows and labels."""
    X, y = SETS[name](return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, random_state=seed, stratify=y)
    rng = np.random.default_rng(seed)
    sizes = {kind: RARE if kind % 2 else COMMON for kind in np.unique(y).tolist()}
    kept = [rng.permutation(np.flatnonzero(y == kind))[:size] for kind, size in sizes.items()]
    kept = np.concatenate(kept)
    scale = StandardScaler().fit(X[kept])
    return scale.transform(X[kept]), y[kept], scale.transform(X_test), y_test


def run(args, results):
    for name in args.sets:
        kinds = np.unique(SETS[name](return_X_y=True)[1])
        for fold in range(args.folds):
            load = partial(draw, name, fold)
            run_fold(name, fold, load, kinds[kinds % 2 == 1], args, results)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--folds", type=int, default=5, help="how many draws")
    parser.add_argument("--aim", type=float, default=1.0, help="share of the largest class")
    parser.add_argument("--seed", type=int, default=0, help="of the samplers")
    parser.add_argument("--quick", action="store_true", help="one set, one draw, few epochs")
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    parser.add_argument("--out", default="rare_rows.json")
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
