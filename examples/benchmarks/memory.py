"""Peak memory of a fit on cells that stay on disk, as their number grows.

    python memory.py --rows 20000 100000 500000 --out memory.json

Makes a file of random sparse counts (2 000 genes, 5 % filled) for each number of rows in a
temporary folder, and fits ``make_pipeline(CellPreprocessor(), DiffAugEM())`` on the backed AnnData
in a process of its own, with one epoch a phase: more epochs take more memory only for the further
generated views that they look at, at most three of 50 components per cell. Reported is the largest
anonymous memory of that process (pages that the system cannot drop), beside what the same process
holds after its imports, and what the cells would take as a dense float32 matrix.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from _common import Results, markdown

N_GENES, DENSITY = 2_000, 0.05


def make_file(path, n_rows):
    """Write random counts block by block, so that making them needs no memory either."""
    import anndata
    import h5py
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, 1.0, size=(8, N_GENES))
    block = 10_000
    for start in range(0, n_rows, block):
        size = min(block, n_rows - start)
        mask = sp.random(size, N_GENES, DENSITY, format="csr", dtype=np.float32, random_state=rng)
        types = np.repeat(rng.integers(8, size=size), np.diff(mask.indptr))
        mask.data = 1 + rng.poisson(rates[types, mask.indices]).astype(np.float32)
        if start == 0:
            anndata.AnnData(mask).write_h5ad(path)
            continue
        with h5py.File(path, "r+") as file:
            matrix = anndata.io.sparse_dataset(file["X"])
            matrix.append(mask)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        anndata.io.write_elem(file, "obs", pd.DataFrame(index=[str(i) for i in range(n_rows)]))


def anonymous_memory():
    """Anonymous resident memory of this process in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc/self/status and so needs Linux")


def fit(path):
    """Fit on the file at `path`; print one JSON line with what memory did."""
    import anndata
    from sklearn.pipeline import make_pipeline

    from diffaugkit import CellPreprocessor, DiffAugEM

    model = make_pipeline(CellPreprocessor(), DiffAugEM(schedule=(1, 1, 1), random_state=0))
    small = np.random.default_rng(0).poisson(1.0, size=(400, 100)).astype(np.float32)
    model.fit(small)  # every import and kernel is in before the base is read
    base = peak = anonymous_memory()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model.fit(anndata.read_h5ad(path, backed="r"))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"base_mb": base, "peak_mb": peak, "seconds": seconds}))


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[20_000, 100_000, 500_000])
    parser.add_argument("--out", default="memory.json")
    parser.add_argument("--fit", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(args.fit)
        return
    results = Results(args.out)
    for n_rows in args.rows:
        if str(n_rows) in results.read():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cells.h5ad"
            make_file(path, n_rows)
            command = [sys.executable, __file__, "--fit", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.add(str(n_rows), json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for n_rows, record in results.read().items():
        growth = record["peak_mb"] - record["base_mb"]
        dense = int(n_rows) * N_GENES * 4 / 2**20
        rows.append([n_rows, f"{record['base_mb']:.0f}", f"{growth:.0f}", f"{dense:.0f}"])
    header = ["cells", "after imports, MB", "peak of fit above it, MB", "dense matrix, MB"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
