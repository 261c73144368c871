"""Masks from a denoiser against Otsu and k-means: DiNO-Diffusion's Table 2, small.

    DIFFAUGKIT_DATA=folder python zero_shot_segmentation.py --sets glas nuclei --seeds 0 1 2

Glands: GlaS (Sirinukunwattana et al. 2017), the diffusion fitted on the images of the training
split, without their masks. Nuclei: tiles of the immunohistochemistry picture of scikit-image, the
truth being haematoxylin by colour deconvolution, above Otsu's threshold; the upper half of the
picture is for choosing, the lower half for the result.

Every method has one number to choose: the segments of k-means (of colours, of features, or by
``n_segments``), the timestep, or the share of pairs of anchors below the merging threshold. It is
chosen by the masks of the training part and reported on the test part, as the paper does with
threshold and timestep; "auto" takes the library's defaults and looks at no mask. The features at
timestep 50 are those of Baranchuk et al. (2022), whose timesteps are 50 to 250, at full resolution;
``n_segments`` clusters features of the same network. Mind the first line of each table: where masks
cover half of the images, one segment of everything has a Dice of two thirds.

The curves vary one number at a time. Each result is written as it comes, fitted models are kept
beside the result file, and a second run goes on where the first stopped::

    python zero_shot_segmentation.py --quick                       # a smoke test, a minute or two
    python zero_shot_segmentation.py --tables --out masks.json     # run nothing, print the tables
    python zero_shot_segmentation.py --size 128 192 --widths 128 256 384 512    # for a GPU
"""

from __future__ import annotations

import argparse
import csv
import os
import time
import warnings
from pathlib import Path

import numpy as np
from _common import Results, markdown, quick_out
from sklearn.cluster import KMeans

SETS = {"glas": "GlaS", "nuclei": "Nuclei"}
SEGMENTS = (2, 3, 4, 5, 6)
QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMESTEPS = (0, 50, 100, 200, 300, 500, 700, 900)
METHODS = {
    "everything": "one segment, everything",
    "otsu": "Otsu's threshold",
    "pixels": "k-means, pixels",
    "features": "k-means, features of the denoiser at timestep 50",
    "smoothed": "k-means, features of the denoiser at timestep 50, guided filter",
    "auto": "attention, auto",
    "sharp": "attention, auto, guided filter",
    "attention": "attention, threshold chosen",
    "refined": "attention, then k-means",
    "maps": "two segments, attention maps",
    "clear": "two segments, attention maps, guided filter",
    "two": "two segments, auto",
    "number": "segments, number chosen",
    "regions": "two segments, timestep chosen",
    "edges": "two segments, timestep chosen, guided filter",
}
SCORES = {
    "dice": "Dice of the best segment",
    "many": "Dice, many to one",
    "miou": "mean IoU with background",
}


def load_set(name, size):
    """Images and masks to choose by, and to report on: (X, masks), (X, masks)."""
    if name == "nuclei":
        from skimage.filters import threshold_otsu

        from diffaugkit.datasets import load_tissue_tiles

        X, place, stain = load_tissue_tiles(32, return_stain=True)
        masks = (stain > threshold_otsu(stain)).astype(np.uint8)
        upper = place[:, 0] < 256
        return (X[upper], masks[upper]), (X[~upper], masks[~upper])
    folder = os.environ.get("DIFFAUGKIT_DATA")
    if not folder:
        raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds glas_he")
    from PIL import Image

    folder = Path(folder) / "glas_he"
    with (folder / "index.csv").open() as file:
        index = list(csv.DictReader(file))
    parts = []
    for train in (True, False):
        names = [row["name"] for row in index if (row["split"] == "train") == train]
        pair = []
        for ending, how in (
            (".jpg", Image.Resampling.BOX),
            ("_mask.png", Image.Resampling.NEAREST),
        ):
            pictures = (Image.open(folder / f"{name}{ending}") for name in names)
            pair.append(np.stack([np.asarray(p.resize(size[::-1], how)) for p in pictures]))
        parts.append((pair[0], (pair[1] > 0).astype(np.uint8)))
    return tuple(parts)


def unlabelled(name, X):
    """Images to fit the diffusion on: tissue has no upright, so all its flips, or more tiles."""
    # Of the training part alone: images of the test are new to every method.
    if name == "nuclei":
        from diffaugkit.datasets import load_tissue_tiles

        tiles, place = load_tissue_tiles(32, 16)
        return tiles[place[:, 0] + 32 <= 256]
    return np.concatenate([X, X[:, ::-1], X[:, :, ::-1], X[:, ::-1, ::-1]])


def fitted_diffusion(args, name, seed, X):
    """The model of a set and seed, from the folder beside the results if it is there."""
    from diffaugkit import EmbeddingConditionedDiffusion, load

    folder = Path(args.out).with_suffix("") / f"{name}-{seed}"
    if (folder / "model").exists():
        return load(folder / "model")
    X = unlabelled(name, X)
    if args.quick:
        X = X[::8]
    options = {"block_out_channels": tuple(args.widths)} if args.widths else {}
    if args.epochs or args.quick:
        options["max_epochs"] = args.epochs or 1
    model = EmbeddingConditionedDiffusion(
        encoder=None,
        n_attention_levels=args.attention_levels,
        batch_size=args.batch_size,
        random_state=seed,
        verbose=1,
        checkpoint_dir=folder / "checkpoint",
        **options,
    )
    start = time.perf_counter()
    model.fit(X).set_params(checkpoint_dir=None, verbose=0)
    print(f"{name}, seed {seed}: {model.n_iter_} epochs, {time.perf_counter() - start:.0f} s")
    model.save(folder / "model")
    return model


def otsu(X):
    """Two segments per image: darker and brighter than Otsu's threshold of its grey values."""
    from skimage.color import rgb2gray
    from skimage.filters import threshold_otsu

    grey = rgb2gray(X)
    return np.stack([image > threshold_otsu(image) for image in grey]).astype(np.int32)


def clustered(features, n_segments, X=None):
    """K-means of the positions of each image by itself: features (n, h, w, d).

    With images `X` the distances from the clusters pass the guided filter of the segmenter, whose
    radius is a position of its attention.
    """
    masks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an image of fewer colours than clusters
        for i, image in enumerate(features):
            model = KMeans(n_segments, n_init=2, random_state=0)
            flat = image.reshape(-1, image.shape[-1])
            found = -(model.fit_transform(flat) ** 2).T.reshape(-1, *image.shape[:2])
            if X is not None:
                found = guided(X[i], found)
            masks.append(found.argmax(axis=0))
    return np.stack(masks)


def guided(image, maps):
    import torch

    from diffaugkit.zero_shot_segmenter import guided_filter

    guide = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)
    return guided_filter(guide, radius=4)(torch.from_numpy(maps)).numpy()


def denoiser_features(model, X, timestep):
    """What the way up of the U-Net knows of each pixel, every level in units of its spread."""
    import torch

    from diffaugkit.zero_shot_segmenter import aggregate_features

    size, blocks = X.shape[1:3], model.feature_maps(X, t=timestep)
    factors = [round(size[0] / block.shape[2]) for block in blocks]
    return np.stack(
        [
            aggregate_features(levels, factors, size).unflatten(0, size).numpy()
            for levels in zip(*map(torch.from_numpy, blocks), strict=True)
        ]
    )


def judge(masks, predicted):
    from diffaugkit.metrics import matched_dice, matched_iou

    return {
        "dice": 100 * matched_dice(masks, predicted),
        "many": 100 * matched_dice(masks, predicted, many_to_one=True),
        "miou": 100 * matched_iou(masks, predicted, labels=[0, 1]),
        "segments": float(np.mean([len(np.unique(mask)) for mask in predicted])),
    }


def run(args, results):
    from sklearn.frozen import FrozenEstimator

    from diffaugkit.zero_shot_segmenter import ZeroShotSegmenter

    names = ("size", "epochs", "batch_size", "widths", "attention_levels")
    for name in args.sets:
        results.settle(name, **{setting: getattr(args, setting) for setting in names})
    for name in args.sets:
        parts = load_set(name, tuple(args.size))
        if args.quick:
            parts = tuple((X[:6], masks[:6]) for X, masks in parts)
        (X_train, _), _ = parts
        for seed in args.seeds:

            def record(key, predict, name=name, seed=seed, parts=parts, **more):
                key = f"{name}|{seed}|{key}"
                if key in results.read():
                    return
                start = time.perf_counter()
                scores = {
                    part: judge(masks, predict(X))
                    for part, (X, masks) in zip(("train", "test"), parts, strict=True)
                }
                scores["seconds"] = time.perf_counter() - start
                results.add(key, scores | {k: value() for k, value in more.items()})
                print(f"{key}: Dice {scores['test']['dice']:.1f}", flush=True)

            def attention(key, model, name=name, seed=seed, record=record, X=X_train, **settings):
                if f"{name}|{seed}|{key}" not in results.read():
                    segmenter = ZeroShotSegmenter(FrozenEstimator(model), **settings).fit(X)
                    record(key, segmenter.predict, threshold=lambda: segmenter.merge_threshold_)

            record("everything", lambda X: np.zeros(X.shape[:3], np.int32))
            record("otsu", otsu)
            for k in SEGMENTS:
                record(f"pixels|{k}", lambda X, k=k: clustered(X / 255.0, k))
            model = fitted_diffusion(args, name, seed, load_set(name, tuple(args.size))[0][0])
            for k in SEGMENTS:
                record(
                    f"features|{k}",
                    lambda X, k=k, model=model: clustered(denoiser_features(model, X, 50), k),
                )
                record(
                    f"smoothed|{k}",
                    lambda X, k=k, model=model: clustered(denoiser_features(model, X, 50), k, X),
                )
            attention("auto|0", model)
            attention("sharp|0", model, guided_radius="auto")
            for quantile in QUANTILES:
                attention(f"attention|{quantile}", model, quantile=quantile)
                attention(f"refined|{quantile}", model, quantile=quantile, refine=True)
            attention("two|0", model, n_segments=2)
            by_maps = {"n_segments": 2, "cluster_on": "attention"}
            attention("maps|0", model, **by_maps)
            attention("clear|0", model, **by_maps, guided_radius="auto")
            for k in SEGMENTS:
                attention(f"number|{k}", model, n_segments=k)
            for timestep in TIMESTEPS:
                attention(f"timestep|{timestep}", model, timestep=timestep)
                two = {"timestep": timestep, "n_segments": 2}
                attention(f"regions|{timestep}", model, **two)
                attention(f"edges|{timestep}", model, **two, guided_radius="auto")


def chosen(records, name, seed, method):
    """The record whose number was best on the training part, by Dice."""
    start = f"{name}|{seed}|{method}"
    found = {key: r for key, r in records.items() if key == start or key.startswith(f"{start}|")}
    return max(found.values(), key=lambda r: r["train"]["dice"]) if found else None


def tables(results):
    records = results.read()
    for name, shown in SETS.items():
        seeds = sorted({key.split("|")[1] for key in records if key.startswith(f"{name}|")})
        if not seeds:
            continue
        rows = []
        for method, title in METHODS.items():
            found = [chosen(records, name, seed, method) for seed in seeds]
            found = [r["test"] for r in found if r]
            if found:
                if len(found) < len(seeds):
                    title += f" ({len(found)} of {len(seeds)} seeds)"
                cells = [
                    f"{np.mean(values):.1f} ± {np.std(values):.1f}"
                    for values in ([r[score] for r in found] for score in SCORES)
                ]
                rows.append([title, *cells, f"{np.mean([r['segments'] for r in found]):.1f}"])
        print(f"\n### {shown}: mean over test images, {len(seeds)} seeds\n")
        print(markdown(["method", *SCORES.values(), "segments"], rows))
        curves = {
            "regions": ("timestep, two segments", TIMESTEPS),
            "edges": ("timestep, two segments, guided filter", TIMESTEPS),
            "timestep": ("timestep, quantile 0.2", TIMESTEPS),
            "attention": ("quantile, timestep 300", QUANTILES),
        }
        for method, (first, numbers) in curves.items():
            rows = []
            for number in numbers:
                found = [records.get(f"{name}|{seed}|{method}|{number}") for seed in seeds]
                found = [r for r in found if r]
                if found:
                    test = [r["test"] for r in found]
                    means = [f"{np.mean([r[score] for r in test]):.1f}" for score in SCORES]
                    thresholds = [r["threshold"] for r in found if r["threshold"] is not None]
                    threshold = f"{np.mean(thresholds):.3g}" if thresholds else "/"
                    n = np.mean([r["segments"] for r in test])
                    rows.append([number, threshold, *means, f"{n:.1f}"])
            print("\n" + markdown([first, "threshold", *SCORES.values(), "segments"], rows))


def picture(args, path):
    """Draw images, truth and the library's own choice, for the first seed of each set."""
    import matplotlib

    matplotlib.use("Agg")
    from sklearn.frozen import FrozenEstimator

    from diffaugkit.segmentation_plotting import SegmentationDisplay
    from diffaugkit.zero_shot_segmenter import ZeroShotSegmenter

    for name in args.sets:
        (X_train, _), (X, masks) = load_set(name, tuple(args.size))
        model = fitted_diffusion(args, name, args.seeds[0], X_train)
        segmenter = ZeroShotSegmenter(FrozenEstimator(model)).fit(X_train)
        picked = np.linspace(0, len(X) - 1, 5).astype(int)
        display = SegmentationDisplay.from_estimator(
            segmenter, X[picked], masks[picked], match=True
        )
        path = Path(path)
        display.figure_.savefig(path.with_name(f"{path.stem}-{name}{path.suffix}"), dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", nargs=2, type=int, default=[48, 72], help="of GlaS, h and w")
    parser.add_argument("--epochs", type=int, help="of the diffusion; default: the library's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--widths", nargs="+", type=int, help="of the U-Net; default: by size")
    parser.add_argument("--attention-levels", type=int, default=2, help="lowest levels that attend")
    parser.add_argument("--out", default="zero_shot_segmentation.json", help="resumed if it exists")
    parser.add_argument("--picture", help="draw examples to this file, -<set> added to its name")
    parser.add_argument("--quick", action="store_true", help="few images: a smoke test")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.out = args.seeds[:1], quick_out(args.out)
        global SEGMENTS, QUANTILES, TIMESTEPS
        SEGMENTS, QUANTILES, TIMESTEPS = (2, 3), (0.3, 0.5), (100, 300)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
        if args.picture:
            picture(args, args.picture)
    tables(results)


if __name__ == "__main__":
    main()
