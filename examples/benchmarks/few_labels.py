"""Classifiers on few labels with and without generated images: DiNO-Diffusion's Table 1, small.

    DIFFAUGKIT_DATA=folder python few_labels.py --sets pneumonia cifar --out few_labels.json

For each set an encoder and a diffusion model on its embeddings learn once from all training images,
without labels, and are saved beside the results. In each of five folds N labelled images are drawn
from the other four fifths, images are generated from them (reconstruction or interpolation) at
several per real one, and classifiers learn from the real images, from both together, and from the
generated ones alone. They are judged by the AUC (one against the rest) and the accuracy on the test
images of the set; a quarter of the digits, which ship with scikit-learn, are for testing. The sets
of smaller ratios are the first images of the largest. Each result is written as it comes, and a
second run goes on where the first stopped::

    python few_labels.py --quick                            # a smoke test, two minutes
    python few_labels.py --tables --out few_labels.json     # run nothing, print the tables
    python few_labels.py --sets digits --sizes 50 100 500 --ratios 1 5      # half an hour, no data

Ratio 50 of 1 000 labels generates 50 000 images per fold and strategy: that is for a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from _common import Results, markdown
from scipy.stats import ttest_1samp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

SETS = {
    "pneumonia": "pneumonia28.npz",
    "cifar": "cifar10_6k.npz",
    "mnist": "mnist10k.npz",
    "digits": None,
}
STRATEGIES = ("reconstruction", "interpolation")
USES = ("augmentation", "all-synthetic")
# What is added to the name of a classifier in the records.
MEASURES = {"AUC": "", "accuracy": ", accuracy"}


class ConvNet(ClassifierMixin, BaseEstimator):
    """The paper's kind of judge: a convolutional network from scratch, on randomly moved images.

    Every fit takes the same number of batches, whatever the size of the set: what is added is
    judged, not longer training. Affine changes as in the paper.
    """

    def __init__(self, n_steps=300, batch_size=64, learning_rate=1e-3):
        self.n_steps, self.batch_size, self.learning_rate = n_steps, batch_size, learning_rate

    def fit(self, X, y):
        import torch
        from torchvision.transforms import v2

        from diffaugkit.networks import feature_width, small_resnet

        self.classes_, codes = np.unique(y, return_inverse=True)
        X, codes = self._tensor(X), torch.from_numpy(codes)
        move = v2.RandomAffine(0, translate=(0.05, 0.05), scale=(0.9, 1.4), shear=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = *X.shape[2:], X.shape[1]
            backbone = small_resnet(shape)
            last = torch.nn.Linear(feature_width(backbone, shape), len(self.classes_))
            self.module_ = torch.nn.Sequential(backbone, last)
            self.module_.to(memory_format=torch.channels_last)
            options = {"lr": self.learning_rate, "weight_decay": 1e-2}
            optimizer = torch.optim.AdamW(self.module_.parameters(), **options)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.learning_rate, total_steps=self.n_steps
            )
            for _ in range(self.n_steps):
                rows = torch.randint(len(X), (self.batch_size,))
                x = torch.stack([move(image) for image in X[rows]])
                with torch.autocast("cpu", torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(self.module_(x).float(), codes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.module_.eval()
        return self

    def predict_proba(self, X):
        import torch

        with torch.no_grad():
            parts = [self.module_(x).softmax(dim=1) for x in self._tensor(X).split(500)]
        return torch.cat(parts).double().numpy()

    def _tensor(self, X):
        import torch

        X = X[..., None] if X.ndim == 3 else X
        return torch.from_numpy(np.moveaxis(X, -1, 1).astype(np.float32) / 127.5 - 1)


def on_components(classifier):
    """Judge by a classifier of scikit-learn on principal components of the pixels."""
    # Not whitened: of few images the last components are noise.
    flat = FunctionTransformer(lambda X: X.reshape(len(X), -1).astype(np.float32) / 255)

    def fit(X, y):
        steps = flat, PCA(min(50, len(X), X[0].size), random_state=0), classifier
        return make_pipeline(*steps).fit(X, y)

    return fit


CLASSIFIERS = {
    "logistic": on_components(LogisticRegression(max_iter=1000)),
    "trees": on_components(
        ExtraTreesClassifier(200, min_samples_leaf=2, random_state=0, n_jobs=-1)
    ),
    "cnn": lambda X, y: ConvNet().fit(X, y),
}


def load_set(name, quick):
    """Training images and labels in random order, test images and labels."""
    if name == "digits":
        from diffaugkit.datasets import load_digits

        X, y = load_digits()
    else:
        folder = os.environ.get("DIFFAUGKIT_DATA")
        if not folder:
            raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds the image sets")
        with np.load(Path(folder) / SETS[name]) as file:
            X, y = file["X"], file["y"]
            X_test, y_test = (file[key] if key in file else None for key in ("X_test", "y_test"))
    if name in ("digits", "mnist"):
        X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=0, stratify=y)
    order = np.random.default_rng(0).permutation(len(X))
    order = order[:400] if quick else order
    return X[order], y[order], X_test, y_test


def pretrain(name, X, args):
    """Encoder and diffusion model of a set, learned without labels, from disk if they are there."""
    from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder, load

    path = Path(args.out).with_suffix("") / f"{name}{'-quick' if args.quick else ''}"
    if path.exists():
        return FrozenEstimator(load(path))
    encoder, options = SelfSupervisedEncoder(), {}
    if args.quick:
        encoder.set_params(max_epochs=1)
        options = {"max_epochs": 1, "n_sampling_steps": 4, "block_out_channels": (16, 16)}
    if args.epochs:
        encoder.set_params(max_epochs=args.epochs)
    if args.diffusion_epochs:
        options["max_epochs"] = args.diffusion_epochs
    diffusion = EmbeddingConditionedDiffusion(encoder, random_state=0, verbose=1, **options).fit(X)
    path.parent.mkdir(parents=True, exist_ok=True)
    diffusion.set_params(verbose=0).save(path)
    return FrozenEstimator(diffusion)


def judge(key, results, names, X, y, X_test, y_test):
    """Add AUC and accuracy x 100 of each classifier that has none yet."""
    found = results.read().get(key, {})
    todo = [name for name in names if name not in found]
    for name in todo:
        classifier = CLASSIFIERS[name](X, y)
        shares = classifier.predict_proba(X_test)
        hits = classifier.classes_[shares.argmax(axis=1)] == y_test
        found[name + MEASURES["accuracy"]] = 100 * float(np.mean(hits))
        shares = shares[:, 1] if shares.shape[1] == 2 else shares
        found[name] = 100 * float(roc_auc_score(y_test, shares, multi_class="ovr"))
    if todo:
        results.add(key, found)
        print(f"{key}: {found}", flush=True)


def first_of_each(labels, y, ratio):
    """Rows of the generated set that a smaller ratio would have: the first of each class."""
    kinds, sizes = np.unique(y, return_counts=True)
    rows = [
        np.flatnonzero(labels == kind)[: round(ratio * size)]
        for kind, size in zip(kinds, sizes, strict=True)
    ]
    return np.concatenate(rows)


def run(args, results):
    from diffaugkit.augmenter import GenerativeAugmenter

    for name in args.sets:
        results.settle(
            name,
            epochs=args.epochs,
            diffusion_epochs=args.diffusion_epochs,
            largest_ratio=max(args.ratios),  # of which smaller ones are the first images
        )
    for name in args.sets:
        X, y, X_test, y_test = load_set(name, args.quick)
        splitter = StratifiedKFold(5, shuffle=True, random_state=0)
        for fold, (pool, _) in enumerate(splitter.split(X, y)):
            if fold >= args.folds:
                break
            for size in args.sizes:
                few, _ = train_test_split(
                    pool, train_size=size, random_state=fold, stratify=y[pool]
                )
                key = f"{name}|{size}|{fold}"
                test = X_test, y_test
                judge(f"{key}|real", results, args.classifiers, X[few], y[few], *test)
                for strategy in args.strategies:
                    how = f"{strategy}, gate {args.min_confidence:g}"
                    keys = {
                        (use, ratio): f"{key}|{how}|{use}|{ratio:g}"
                        for use in args.uses
                        for ratio in args.ratios
                    }
                    known = results.read()
                    if all(set(args.classifiers) <= set(known.get(k, ())) for k in keys.values()):
                        continue
                    start = time.perf_counter()
                    augmenter = GenerativeAugmenter(
                        pretrain(name, X, args),
                        strategy,
                        ratio=max(args.ratios),
                        replace_real=True,
                        min_confidence=args.min_confidence,
                        random_state=fold,
                    )
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        made, labels = augmenter.fit_resample(X[few], y[few])
                    seconds = time.perf_counter() - start
                    record = augmenter.selection_.drop(columns="class").sum().to_dict()
                    report = augmenter.quality_report_
                    if report is not None:
                        record |= {
                            "label_consistency": report.label_consistency,
                            "copy_ratio": report.copy_ratio,
                        }
                    record = {k: float(v) for k, v in record.items() if v is not None}
                    results.add(f"{key}|{how}|generator", record | {"seconds": seconds})
                    for (use, ratio), found in keys.items():
                        rows = first_of_each(labels, y[few], ratio)
                        if use == "augmentation":
                            given = np.concatenate([X[few], made[rows]])
                            given_labels = np.concatenate([y[few], labels[rows]])
                        else:
                            given, given_labels = made[rows], labels[rows]
                        if len(np.unique(given_labels)) < len(np.unique(y)):
                            continue  # no sample of a class passed the checks
                        judge(found, results, args.classifiers, given, given_labels, *test)


def tables(results):
    """Print each measure and the paired test against real images alone, per set, use and judge."""
    found, real = {}, {}
    for key, record in results.read().items():
        parts = key.split("|")
        if parts[-1] == "real":
            real[tuple(parts[:3])] = record
        elif parts[-1] != "generator":
            name, size, fold, strategy, use, ratio = parts
            cells = found.setdefault((name, use, strategy), {}).setdefault(int(size), {})
            cells.setdefault(float(ratio), {})[fold] = record
    for (name, use, strategy), sizes in found.items():
        ratios = sorted({ratio for cells in sizes.values() for ratio in cells})
        rows = []
        for (size, cells), kind, (measure, suffix) in product(
            sorted(sizes.items()), CLASSIFIERS, MEASURES.items()
        ):
            column = kind + suffix
            base = {
                fold: record[column]
                for (other, n, fold), record in real.items()
                if (other, n) == (name, str(size)) and column in record
            }
            if base:
                row = [size, kind, measure, f"{np.mean(list(base.values())):.1f}"]
                rows.append(row + [against(base, cells.get(ratio, {}), column) for ratio in ratios])
        print(f"\n### {name}, {use} by {strategy}: x 100 (p, paired t-test)\n")
        header = ["N", "judge", "measure", "real", *(f"1 : {ratio:g}" for ratio in ratios)]
        print(markdown(header, rows))


def against(base, records, column):
    """Mean over the folds that both have, its difference to the base, and how sure that is."""
    folds = [fold for fold in sorted(base) if column in records.get(fold, ())]
    if not folds:
        return "-"
    own = np.array([records[fold][column] for fold in folds])
    gains = own - [base[fold] for fold in folds]
    text = f"{own.mean():.1f} ({gains.mean():+.1f}"
    if len(folds) > 2 and np.ptp(gains) > 0:
        text += f", p {ttest_1samp(gains, 0).pvalue:.3f}"
    # A set from which no sample of a class passed the checks is not judged.
    return text + (")" if len(folds) == len(base) else f", {len(folds)} of {len(base)} folds)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 500, 1000])
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 5, 10, 50])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--classifiers", nargs="+", default=list(CLASSIFIERS), choices=CLASSIFIERS)
    parser.add_argument("--uses", nargs="+", default=list(USES), choices=USES)
    parser.add_argument(
        "--min-confidence", type=float, default=0.3, help="of the gate; 0 keeps all, as the paper"
    )
    parser.add_argument("--folds", type=int, default=5, help="how many of the five to run")
    parser.add_argument("--epochs", type=int, help="of the encoder; default: its own")
    parser.add_argument("--diffusion-epochs", type=int, help="default: the model's own")
    parser.add_argument("--quick", action="store_true", help="a smoke test of all parts")
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    parser.add_argument("--out", default="few_labels.json")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.ratios, args.folds = [50], [1, 2], 1
        args.out = str(Path(args.out).with_name("few_labels_quick.json"))
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
