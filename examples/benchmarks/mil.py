"""Attention over patches against pooling without: bags of lung tissue tiles, by source.

    DIFFAUGKIT_DATA=folder python mil.py --seeds 0 1 2 --out mil.json

A bag stands for a slide: tiles of benign lung tissue (LC25000, Borkowski et al. 2019), and in two
of three bags a few tiles of one kind of cancer, which give it its label. Sources are split first,
so that no bag of the test has a tile, or a rotated copy of one, that was learned from. The
classifier sees labels of bags only; which tiles decide is known, so that attention can be judged:
area under the ROC of the tiles of a bag, mean over the bags with cancer. Embeddings come from an
encoder that learned from the training tiles without labels. Each result is written as it comes::

    python mil.py --quick                                   # a smoke test, a minute
    python mil.py --tables --out mil.json                   # run nothing, print the tables
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from _common import Results, markdown, quick_out
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

POOLINGS = ("gated", "attention", "mean", "max")
LINEAR = "mean of the bag, logistic regression"


def load_lung():
    folder = os.environ.get("DIFFAUGKIT_DATA")
    if not folder:
        raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds lung_he64.npz")
    with np.load(Path(folder) / "lung_he64.npz") as file:
        return file["X"], file["class_names"][file["y"]].astype(str), file["group"]


def embed(name, X, train, seed, epochs):
    """Embeddings of all tiles, by an encoder that saw the training tiles only."""
    if name == "pca":
        flat = X.reshape(len(X), -1) / 255
        return PCA(64, random_state=seed).fit(flat[train]).transform(flat)
    from diffaugkit import SelfSupervisedEncoder

    more = {"max_epochs": epochs} if epochs else {}
    encoder = SelfSupervisedEncoder(name, augmentation="tissue", random_state=seed, **more)
    return encoder.fit(X[train]).transform(X)


def make_bags(embeddings, y, tiles, n_bags, size, n_keys, rng):
    """Bags of `size` tiles out of `tiles`, their labels, and which tiles of each are cancer."""
    kinds = {kind: tiles[y[tiles] == kind] for kind in np.unique(y)}
    benign = next(kind for kind in kinds if "benign" in kind.lower() or kind.endswith("_n"))
    bags, labels, keys = [], [], []
    for number in range(n_bags):
        label = sorted(kinds)[number % len(kinds)]
        n = 0 if label == benign else n_keys
        picked = np.append(
            rng.choice(kinds[benign], size - n, replace=False), rng.choice(kinds[label], n)
        )
        order = rng.permutation(size)
        bags.append(embeddings[picked[order]])
        labels.append(label)
        keys.append(order >= size - n)
    return bags, np.array(labels), keys


def run(args, results):
    from diffaugkit.mil import AttentionMILClassifier

    names = ("encoder_epochs", "bags", "bag_size", "epochs")
    results.settle(args.encoder, **{name: getattr(args, name) for name in names})
    X, y, group = load_lung()
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        sources = rng.permutation(np.unique(group))
        held = np.isin(group, sources[: len(sources) // 3])
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
        todo = [
            (n_keys, pooling)
            for n_keys in args.keys
            for pooling in (*POOLINGS, LINEAR)
            if f"{args.encoder}|{n_keys}|{seed}|{pooling}" not in results.read()
        ]
        if not todo:
            continue
        embeddings = embed(args.encoder, X, train, seed, args.encoder_epochs)
        for n_keys, pooling in todo:
            # The same bags for every pooling.
            rng = np.random.default_rng([seed, n_keys])
            parts = (train, args.bags), (test, args.bags)
            (bags, labels, _), (test_bags, truth, keys) = (
                make_bags(embeddings, y, tiles, n, args.bag_size, n_keys, rng) for tiles, n in parts
            )
            start, record = time.perf_counter(), {}
            if pooling == LINEAR:
                judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
                judge.fit([bag.mean(axis=0) for bag in bags], labels)
                found = judge.predict([bag.mean(axis=0) for bag in test_bags])
            else:
                model = AttentionMILClassifier(
                    pooling, random_state=seed, max_epochs=args.epochs or "auto", dropout=0.25
                ).fit(bags, labels)
                found = model.predict(test_bags)
                if pooling in ("gated", "attention"):
                    pairs = zip(keys, model.attention(test_bags), strict=True)
                    record["attention"] = 100 * float(
                        np.mean([roc_auc_score(k, share) for k, share in pairs if k.any()])
                    )
            record["accuracy"] = 100 * float(np.mean(found == truth))
            record["seconds"] = round(time.perf_counter() - start, 2)
            results.add(f"{args.encoder}|{n_keys}|{seed}|{pooling}", record)
            print(f"{n_keys} of {args.bag_size}, seed {seed}, {pooling}: {record}", flush=True)


def tables(results):
    """Mean and standard deviation over seeds."""
    records = results.read()
    for encoder, n_keys in sorted({tuple(key.split("|")[:2]) for key in records}):
        rows = []
        for pooling in (*POOLINGS, LINEAR):
            found = [
                record
                for key, record in records.items()
                if key.startswith(f"{encoder}|{n_keys}|") and key.endswith(f"|{pooling}")
            ]
            if not found:
                continue
            row = [pooling, len(found)]
            for metric in ("accuracy", "attention"):
                values = [record[metric] for record in found if metric in record]
                row.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
            rows.append(row)
        print(f"\n### {n_keys} cancer tiles per bag, embeddings: {encoder}\n")
        print(markdown(["pooling", "seeds", "accuracy %", "key tiles by attention, AUC %"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--encoder", default="simclr", help="pca, or a method of the encoder")
    parser.add_argument("--encoder-epochs", type=int, help="default: the library's")
    parser.add_argument("--keys", nargs="+", type=int, default=[1, 2, 5], help="cancer tiles")
    parser.add_argument("--bags", type=int, default=150, help="for training, and for the test")
    parser.add_argument("--bag-size", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="of the classifier; default: the library's")
    parser.add_argument("--out", default="mil.json", help="result file, resumed when it exists")
    parser.add_argument("--quick", action="store_true", help="PCA, few bags: a smoke test")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.encoder, args.keys, args.bags, args.epochs = [0], "pca", [5], 60, 20
        args.out = quick_out(args.out)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
