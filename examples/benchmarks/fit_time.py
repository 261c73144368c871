"""Where the time of a fit goes: CPU seconds of each phase of DiffAugEM with its defaults.

    OMP_NUM_THREADS=1 python fit_time.py --cells 2000 8510 50000 --out fit_time.json

8 510 cells of 1 457 genes is the size of the paper's set, whose fit took 4.6 hours on a V100. The
counts are random, of eight types, as in ``memory.py``: time depends on their number only. Seconds
are those of the processor, all threads together, so that other work on the machine does not count;
the shares say what dominates.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _common import Results, markdown

PHASES = ("preprocessing", "first E-step", "M-step", "sampling", "second E-step")


def make_counts(n_cells, n_genes):
    """Random counts of eight types, float32 CSR (n_cells, n_genes)."""
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, 1.0, size=(8, n_genes))
    counts = sp.random(n_cells, n_genes, 0.1, format="csr", dtype=np.float32, random_state=rng)
    types = np.repeat(rng.integers(8, size=n_cells), np.diff(counts.indptr))
    counts.data = 1 + rng.poisson(rates[types, counts.indices]).astype(np.float32)
    return counts


def run(n_cells, n_genes):
    """CPU seconds of each phase, and the epochs of the three steps."""
    from diffaugkit import CellPreprocessor, DiffAugEM

    def epoch_ends(epoch, history):
        clock.append(time.process_time())

    counts, clock = make_counts(n_cells, n_genes), []
    start = time.process_time()
    cells = CellPreprocessor().fit_transform(counts)
    prepared = time.process_time()
    model = DiffAugEM(random_state=0, callbacks=epoch_ends).fit(cells)
    phases = (model.history_["phase"] + model.history_["round"].astype(str)).to_numpy()
    if len(phases) != len(clock):
        raise SystemExit("an epoch without its clock")
    clock = np.array(clock)
    first, middle, last = (clock[phases == phase] for phase in ("E0", "M0", "E1"))
    # A step's first epoch ends one epoch after the step began.
    begins = last[0] - np.diff(last).mean()
    seconds = (prepared - start, first[-1] - prepared, middle[-1] - first[-1])
    seconds += (begins - middle[-1], last[-1] - begins)
    return {
        "seconds": dict(zip(PHASES, map(float, seconds), strict=True)),
        "epochs": [len(first), len(middle), len(last)],
    }


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="+", type=int, default=[2_000, 8_510, 50_000])
    parser.add_argument("--genes", type=int, default=1_457)
    parser.add_argument("--out", default="fit_time.json", help="resumed when it exists")
    args = parser.parse_args()
    results = Results(args.out)
    for n_cells in args.cells:
        key = f"{n_cells} x {args.genes}"
        if key not in results.read():
            results.add(key, run(n_cells, args.genes))
    rows = []
    for key, record in results.read().items():
        total = sum(record["seconds"].values())
        shares = [f"{100 * seconds / total:.0f} %" for seconds in record["seconds"].values()]
        rows.append([key, "/".join(map(str, record["epochs"])), f"{total:.0f}", *shares])
    print(markdown(["cells x genes", "epochs E/M/E", "CPU seconds", *PHASES], rows))


if __name__ == "__main__":
    main()
