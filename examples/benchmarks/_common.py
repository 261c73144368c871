"""What the cell benchmarks share: five sets, two standard matrices, the judge, the result file.

The judge is scikit-learn alone and the matrices are scanpy's alone, so that no figure in a table
depends on diffaugkit's own code. The sets are read from the folder in the environment variable
``DIFFAUGKIT_DATA``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    confusion_matrix,
    normalized_mutual_info_score,
    r2_score,
)
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

SETS = ("mouse_bladder", "pbmc4k", "paul15", "starmap", "cite_pbmc")
MATRICES = ("log", "residuals")
METRICS = {
    "svm": "linear SVM (one-vs-one, standardised, 10-fold), accuracy %",
    "knn": "k-NN (k = 10, 10-fold), accuracy %",
    "kmeans": "k-means accuracy (Hungarian), %",
    "ari": "adjusted Rand index of k-means, x 100",
    "nmi": "normalised mutual information of k-means, x 100",
    "protein_r2": "proteins from k-NN regression (k = 10, 10-fold), mean R2 x 100",
}


@dataclass
class Cells:
    """One set: raw counts `(n, genes)` in CSR, labels `(n,)`, proteins `(n, p)` or None."""

    name: str
    counts: csr_matrix
    y: np.ndarray
    class_names: np.ndarray
    genes: np.ndarray | None
    proteins: np.ndarray | None


def load_cells(name, quick=False):
    """Read ``sc_<name>.npz`` from the data folder; ``quick`` keeps 600 random cells.

    The file holds raw counts as the ``data``, ``indices``, ``indptr`` and ``shape`` of a CSR matrix
    (cells, genes), the type of each cell as numbers ``y`` into ``class_names``, and where known the
    names ``genes`` and protein counts ``adt``. Sources: Mouse Cell Atlas bladder (Han et al. 2018),
    10x PBMC 4k, GSE72857 (Paul et al. 2015), STARmap mouse cortex (Wang et al. 2018), and PBMC by
    CITE-seq.
    """
    folder = os.environ.get("DIFFAUGKIT_DATA")
    if not folder:
        raise SystemExit(
            "set DIFFAUGKIT_DATA to the folder that holds sc_<set>.npz (see load_cells)"
        )
    with np.load(Path(folder) / f"sc_{name}.npz") as file:
        parts = {key: file[key] for key in file.files}
    counts = csr_matrix(
        (parts["data"].astype(np.float32), parts["indices"], parts["indptr"]),
        shape=tuple(parts["shape"]),
    )
    rows = np.arange(counts.shape[0])
    if quick:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:600])
    proteins = parts.get("adt")
    return Cells(
        name=name,
        counts=counts[rows],
        y=parts["y"][rows],
        class_names=parts["class_names"],
        genes=parts.get("genes"),
        proteins=None if proteins is None else normalise_proteins(proteins)[rows],
    )


def normalise_proteins(adt):
    """Centred log-ratio of each cell for protein counts `(n, p)`; scaled values stay as they are.

    A negative value shows that the file holds values normalised and scaled per protein: a logarithm
    of those would mean nothing, and R2 does not change with a protein's scale.
    """
    adt = np.asarray(adt, dtype=np.float64)
    if adt.min() < 0:
        return adt
    logs = np.log1p(adt)
    return logs - logs.mean(axis=1, keepdims=True)


def standard_matrix(cells, kind):
    """Return one of the two standard matrices, float32 `(n, g)`, as scanpy's tutorials make them.

    ``"log"``: counts per 10 000, log1p, 2 000 highly variable genes, unit variance clipped at 10.
    ``"residuals"``: Pearson residuals (theta 100) of the 3 000 genes that vary most in them.
    Sets with fewer genes keep all.
    """
    import anndata
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.AnnData(cells.counts.copy())
        if kind == "log":
            sc.pp.normalize_total(adata, target_sum=1e4)
            sc.pp.log1p(adata)
            if adata.n_vars > 2000:
                sc.pp.highly_variable_genes(adata, n_top_genes=2000)
                adata = adata[:, adata.var["highly_variable"]].copy()
            sc.pp.scale(adata, max_value=10)
        elif kind == "residuals":
            sc.pp.filter_genes(adata, min_cells=1)
            if adata.n_vars > 3000:
                sc.experimental.pp.highly_variable_genes(adata, n_top_genes=3000)
                adata = adata[:, adata.var["highly_variable"]].copy()
            sc.experimental.pp.normalize_pearson_residuals(adata)
        else:
            raise ValueError(f"kind={kind!r} is not one of {MATRICES}")
    return np.ascontiguousarray(adata.X, dtype=np.float32)


def evaluate(embedding, cells, seed=0):
    """Score an embedding `(n, d)` against labels, and proteins where the set has them, x 100.

    Folds are the same for every method and seed; ``seed`` only starts k-means. k-NN, k-means and
    the protein regression see the embedding as it is: rescaling its dimensions would change the
    method's own metric.
    """
    embedding = np.asarray(embedding, dtype=np.float64)
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding has values that are not finite")
    y = cells.y
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    svm = make_pipeline(StandardScaler(), SVC(kernel="linear", cache_size=500))
    with warnings.catch_warnings():
        # The rarest type of one set has 7 cells, fewer than folds.
        warnings.filterwarnings("ignore", message="The least populated class")
        svm_labels = cross_val_predict(svm, embedding, y, cv=folds)
        knn_labels = cross_val_predict(KNeighborsClassifier(10), embedding, y, cv=folds)
    clusters = KMeans(len(np.unique(y)), n_init=10, random_state=seed).fit_predict(embedding)
    table = confusion_matrix(y, clusters)
    matched = table[linear_sum_assignment(-table)].sum()
    scores = {
        "svm": np.mean(svm_labels == y),
        "knn": np.mean(knn_labels == y),
        "kmeans": matched / len(y),
        "ari": adjusted_rand_score(y, clusters),
        "nmi": normalized_mutual_info_score(y, clusters),
    }
    if cells.proteins is not None:
        folds = KFold(10, shuffle=True, random_state=0)
        predicted = cross_val_predict(KNeighborsRegressor(10), embedding, cells.proteins, cv=folds)
        scores["protein_r2"] = r2_score(cells.proteins, predicted, multioutput="uniform_average")
    return {key: round(100 * float(value), 3) for key, value in scores.items()}


class Results:
    """Records in one JSON file, written after each, so that a stopped run goes on where it was."""

    def __init__(self, path):
        self.path = Path(path)

    def read(self):
        """Return all records written so far, by key."""
        return {key: record for key, record in self._read().items() if key != "settings"}

    def add(self, key, record):
        """Write one record."""
        with self._lock():
            self._write(self._read() | {key: record})

    def settle(self, group, **settings):
        """Note what all records of a group share beside their keys; stop if they had another.

        Rows of a stopped run are not made again, so those of other settings would stay in between.
        """
        with self._lock():
            whole = self._read()
            before = whole.setdefault("settings", {}).setdefault(group, settings)
            self._write(whole)
        others = [name for name in settings if before.get(name) != settings[name]]
        if others:
            said = ", ".join(f"{k}={before.get(k)} and not {settings[k]}" for k in others)
            raise SystemExit(f"{self.path} holds {group} with {said}: name another --out")

    def _read(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def _write(self, whole):
        # The file is replaced whole, so that a reader never sees half of it.
        aside = self.path.with_name(self.path.name + ".tmp")
        aside.write_text(json.dumps(whole, indent=0, allow_nan=False) + "\n")
        aside.replace(self.path)

    @contextlib.contextmanager
    def _lock(self):
        # Two runs (ours and the peers', say) may write to the same file.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(self.path.name + ".lock")
        for _ in range(600):
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def quick_out(out):
    """Where a smoke test writes: its rows must never stand between those of a whole run."""
    return str(Path(out).with_suffix(".quick.json"))


def markdown(header, rows):
    """Return a markdown table as text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
