"""Gen-SIS against vanilla DINO on real images: Tables 1, 5, 6, 7, 8 and 11 of the paper, small.

    DIFFAUGKIT_DATA=folder python images.py --sets cifar lung --seeds 0 1 2 --out images.json

For each set and seed one vanilla encoder and, for variants that need it, one generator are fitted;
every variant then learns from scratch with the same seed, epochs and crops as the vanilla one, so
that what differs is what it sees. ``--local-crops 0`` is the table without local crops. The judge
is DINO's weighted k-NN (k = 20) and scikit-learn's logistic regression on features of held-out
images; tissue is split by source tile. Each result is written as it comes, and a second run goes on
where the first stopped::

    python images.py --quick                                # a smoke test, minutes
    python images.py --tables --out images.json             # run nothing, print the tables
    python images.py --sets cifar10 --epochs 200            # CIFAR-10 at full size, for a GPU
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from _common import Results, markdown, quick_out
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

SETS = ("cifar", "lung", "cifar10")
VARIANTS = {
    # name: (method, share of generated second views, interpolations)
    "PCA of pixels": ("pca", 0.0, None),
    "DINO": ("dino", 0.0, None),
    "+ generated": ("dino", 1.0, None),
    "+ interpolated": ("dino", 0.0, "slerp"),
    "Gen-DINO": ("dino", 1.0, "slerp"),
    "Gen-DINO, half the views": ("dino", 0.5, "slerp"),
    "Gen-DINO, mixed before the head": ("dino", 1.0, "slerp, features"),
    "Gen-DINO, pixel blends": ("dino", 1.0, "pixels"),
    "SimCLR": ("simclr", 0.0, None),
    "SimC.+Dif.": ("simclr", 1.0, None),
    "MoCo v2": ("mocov2", 0.0, None),
    "BYOL": ("byol", 0.0, None),
}


def load_images(name, seed):
    """Training images, test images, their labels, and the groups of the training images or None."""
    folder = os.environ.get("DIFFAUGKIT_DATA")
    if name == "cifar10":
        from diffaugkit.datasets import fetch_cifar10

        X, y, X_test, y_test = fetch_cifar10(data_home=folder)
        return X, y, X_test, y_test, None
    if not folder:
        raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds the image sets")
    if name == "cifar":
        with np.load(Path(folder) / "cifar10_6k.npz") as file:
            return file["X"], file["y"], file["X_test"], file["y_test"], None
    with np.load(Path(folder) / "lung_he64.npz") as file:
        X, y, group = file["X"], file["y"], file["group"]
    # Rotated copies of one source tile must not be on both sides.
    tiles = np.unique(group)
    held_out = np.random.default_rng(seed).permutation(tiles)[: len(tiles) // 4]
    test = np.isin(group, held_out)
    return X[~test], y[~test], X[test], y[test], group[~test]


def shrink(X, size):
    """Images (n, size, size, c) uint8, each pixel the mean of those that it covers."""
    from PIL import Image

    shape = size, size
    return np.stack([np.asarray(Image.fromarray(x).resize(shape, Image.Resampling.BOX)) for x in X])


def judge(encoder, X, y, X_test, y_test):
    """Weighted k-NN and logistic regression of held-out images, accuracy in percent."""
    from diffaugkit.metrics import weighted_knn_accuracy

    features, features_test = encoder.transform(X), encoder.transform(X_test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear.fit(features, y)
    return {
        "knn": 100 * float(weighted_knn_accuracy(features, y, features_test, y_test, k=20)),
        "linear": 100 * float(linear.score(features_test, y_test)),
    }


def make_encoder(method, seed, tissue, args):
    if method == "pca":
        flat = FunctionTransformer(lambda X: X.reshape(len(X), -1) / 255)
        return make_pipeline(flat, PCA(50, random_state=seed))
    from diffaugkit import SelfSupervisedEncoder

    options = {"max_epochs": args.epochs, "batch_size": args.batch_size}
    if method == "dino":
        options |= {"n_local_crops": args.local_crops, "out_dim": args.out_dim}
    options = {name: value for name, value in options.items() if value is not None}
    if tissue:
        options["augmentation"] = "tissue"
    return SelfSupervisedEncoder(method, random_state=seed, **options)


def generate(X, y, groups, vanilla, seed, tissue, args):
    """Views of X, interpolations as the encoder takes them by name, and what the images are like.

    The generator is conditioned on the embeddings of `vanilla`.
    """
    from diffaugkit import EmbeddingConditionedDiffusion
    from diffaugkit.gen_sis import draw_partners
    from diffaugkit.metrics import frechet_distance, quality_report

    embeddings = vanilla.transform(X)
    epochs = {"max_epochs": args.diffusion_epochs} if args.diffusion_epochs else {}
    generator = EmbeddingConditionedDiffusion(encoder=None, random_state=seed, **epochs)
    generator.fit(X, embeddings=embeddings)
    views = [generator.sample(embeddings, random_state=i) for i in range(args.n_views)]
    partners = draw_partners(len(X), groups, seed)
    alphas = np.full(len(X), 0.5, np.float32)
    if tissue:
        alphas = np.random.default_rng(seed).choice(np.float32([0.2, 0.4, 0.6, 0.8]), len(X))
    half = generator.sample(_between(embeddings, embeddings[partners], alphas), random_state=99)
    share = alphas[:, None, None, None]
    blend = np.rint(share * X + (1 - share) * X[partners]).astype(np.uint8)
    between = {"slerp": (half, partners, alphas), "pixels": (blend, partners, alphas)}
    made = vanilla.transform(views[0])
    report = quality_report(embeddings, made, np.arange(len(X)), labels=y, random_state=0)
    record = report.to_frame().squeeze().to_dict() | {
        "frechet_real_halves": frechet_distance(embeddings[::2], embeddings[1::2]),
        # How far from its source the first encoder sees a view: what it could still teach.
        "cosine_of_generated": _mean_cosine(embeddings, made),
        "cosine_of_hand_made": _mean_cosine(embeddings, vanilla.transform(augmented(X, tissue))),
        "cosine_of_others": _mean_cosine(embeddings, embeddings[partners]),
    }
    if args.unconditional:
        blind = EmbeddingConditionedDiffusion(encoder=None, random_state=seed, **epochs).fit(X)
        drawn = vanilla.transform(blind.sample(len(X), random_state=0))
        record["frechet_unconditional"] = frechet_distance(embeddings, drawn)
    return views, between, {k: float(v) for k, v in record.items() if v == v}


def augmented(X, tissue):
    """One hand-made view of each image, by the recipe that the encoders learn with."""
    import torch

    from diffaugkit.augmentations import ImageViews
    from diffaugkit.runtime import isolated_rng

    images = torch.from_numpy(X).permute(0, 3, 1, 2) / 127.5 - 1
    with isolated_rng(0):
        views = ImageViews("tissue" if tissue else "auto").global_view(images)
    return ((views.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _mean_cosine(a, b):
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / lengths))


def run(args, results):
    names = ("epochs", "batch_size", "out_dim", "diffusion_epochs", "n_views")
    shared = {name: getattr(args, name) for name in names}
    for name in args.sets:
        of = f"{name}, size {args.size}, local crops {args.local_crops}, {args.condition}"
        results.settle(of, **shared)
    for name in args.sets:
        for seed in args.seeds:
            run_set(name, seed, args, results)


def run_set(name, seed, args, results):
    """All variants on one set with one seed."""
    tissue = name == "lung"
    X, y, X_test, y_test, groups = load_images(name, seed)
    if args.size:
        X, X_test = shrink(X, args.size), shrink(X_test, args.size)
    if args.quick:
        X, y = X[::16], y[::16]
        groups = None if groups is None else groups[::16]
    crops = "auto" if args.local_crops is None else args.local_crops
    key = f"{name} {X.shape[1]}|local crops {crops}, condition {args.condition}|{seed}"
    todo = [v for v in args.variants if f"{key}|{v}" not in results.read()]
    if not todo:
        return
    print(f"{key}: {len(X)} images", flush=True)

    @cache
    def learn(method):
        """Fit the vanilla encoder of a method, once."""
        return make_encoder(method, seed, tissue, args).fit(X)

    made = None
    for variant in todo:
        method, share_generated, between = VARIANTS[variant]
        vanilla = not share_generated and between is None
        if not vanilla and made is None:
            *made, record = generate(X, y, groups, learn(args.condition), seed, tissue, args)
            results.add(f"{key}|generator", record)
        start = time.process_time()
        if vanilla:
            model = learn(method)
        else:
            views, mixtures = made
            kind, _, mix = (between or "").partition(", ")
            model = make_encoder(method, seed, tissue, args)
            model.set_params(positives_prob=share_generated)
            if mix:
                model.set_params(method_options={"mix": mix})
            positives = views if share_generated else None
            model.fit(X, positives=positives, interpolations=mixtures.get(kind))
        seconds = time.process_time() - start
        scores = judge(model, X, y, X_test, y_test) | {"cpu_seconds": round(seconds, 1)}
        results.add(f"{key}|{variant}", scores)
        print(f"  {variant}: k-NN {scores['knn']:.1f}, linear {scores['linear']:.1f}", flush=True)


def _between(a, b, alphas):
    from diffaugkit.embedding_diffusion import interpolate_rows

    return interpolate_rows(a, b, alphas, "slerp")


def tables(results):
    """Mean and standard deviation over seeds, and the difference to the vanilla encoder."""
    records = results.read()
    for group in sorted({tuple(key.split("|")[:2]) for key in records}):
        seeds = sorted({key.split("|")[2] for key in records if tuple(key.split("|")[:2]) == group})
        rows = []
        for variant, (method, *_) in VARIANTS.items():
            base = next(v for v, kind in VARIANTS.items() if kind == (method, 0.0, None))
            pairs = [
                (
                    records[f"{group[0]}|{group[1]}|{seed}|{variant}"],
                    records.get(f"{group[0]}|{group[1]}|{seed}|{base}"),
                )
                for seed in seeds
                if f"{group[0]}|{group[1]}|{seed}|{variant}" in records
            ]
            if not pairs:
                continue
            row = [variant, len(pairs)]
            for metric in ("knn", "linear"):
                values = np.array([own[metric] for own, _ in pairs])
                gains = np.array([own[metric] - other[metric] for own, other in pairs if other])
                row.append(f"{values.mean():.1f} ± {values.std():.1f}")
                gained = len(gains) and variant != base
                row.append(f"{gains.mean():+.1f} ± {gains.std():.1f}" if gained else "")
            times = [own["cpu_seconds"] for own, _ in pairs if own.get("cpu_seconds")]
            rows.append([*row, f"{np.mean(times):.0f}" if times else ""])
        print(f"\n### {group[0]}, {group[1]}\n")
        header = ["variant", "seeds", "k-NN %", "against vanilla", "linear %", "against vanilla"]
        header.append("CPU s of its fit")
        print(markdown(header, rows))
        reports = [
            records[k] for k in records if k.startswith("|".join(group)) and k.endswith("generator")
        ]
        names = sorted(set().union(*reports)) if reports else []
        if names:
            means = [[n, f"{np.mean([r[n] for r in reports if n in r]):.3f}"] for n in names]
            print("\n" + markdown(["of the generated images", "mean over seeds"], means))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["cifar", "lung"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--local-crops", type=int, help="of DINO; default: the library's")
    parser.add_argument("--out-dim", type=int, help="prototypes of DINO; default: the library's")
    parser.add_argument(
        "--condition", default="dino", choices=("dino", "simclr"), help="vanilla encoder of images"
    )
    parser.add_argument("--size", type=int, help="side of the images, pixels; default: their own")
    parser.add_argument("--epochs", type=int, help="of every encoder; default: the library's")
    parser.add_argument("--batch-size", type=int, help="of every encoder; default: the library's")
    parser.add_argument("--diffusion-epochs", type=int, help="default: the library's")
    parser.add_argument(
        "--unconditional", action="store_true", help="a generator without condition beside it"
    )
    parser.add_argument("--n-views", type=int, default=4, help="generated images per image")
    parser.add_argument("--out", default="images.json", help="result file, resumed when it exists")
    parser.add_argument(
        "--quick", action="store_true", help="a sixteenth of the data: a smoke test"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.out = quick_out(args.out)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
