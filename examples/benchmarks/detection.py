"""Boxes of nuclei from few labelled tiles: pre-trained against scratch (Table XV in miniature).

    python detection.py --seeds 0 1 2 --out detection.json

scikit-image's immunohistochemistry picture (512 x 512 pixels of colon), the left 288 columns for
learning and the right 192 for the test, the 32 in between for neither: no pixel is on both sides.
The truth are the connected regions of haematoxylin above its surroundings, about 260 in all: the
stain says what is a nucleus, which is right for most and merges some that touch.

For each seed all starts see the same tiles with boxes, drawn at random from the left side, and the
same epochs of fine-tuning; pre-training sees the whole left side without boxes, once per seed and
start for all numbers of tiles. Each result is written as it comes, and a second run goes on where
the first stopped::

    python detection.py --quick                         # a smoke test, half a minute
    python detection.py --tables --out detection.json   # run nothing, print the table
    python detection.py --picture detection.png         # true and predicted boxes of the first seed
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import Results, markdown, quick_out

TILE, TRAIN, TEST = 64, slice(0, 288), slice(320, 512)
VARIANTS = {
    # name: what differs from the method
    "from scratch": {"diffusion": None},
    "diffusion, P2": {},
    "inpainting": {"pretext": "inpainting"},
    "context restoration": {"pretext": "context_restoration"},
}
METRICS = {
    "ap50": "AP at IoU 0.5, %",
    "ap": "AP at IoU 0.5 to 0.95, %",
    "miou": "mean IoU, extra boxes count 0, %",
    "miou_true": "mean IoU over true boxes, %",
}


def load():
    """Give the picture (512, 512, 3) and a mask of its nuclei."""
    from scipy.ndimage import binary_opening, gaussian_filter
    from skimage.filters import threshold_otsu

    from diffaugkit.datasets import load_tissue_tiles

    X, _, stain = load_tissue_tiles(512, return_stain=True)
    above = gaussian_filter(stain[0], 1) - gaussian_filter(stain[0], 12)
    return X[0], binary_opening(above > 1.8 * threshold_otsu(above), iterations=2)


def boxes_of(mask):
    from diffaugkit import boxes_from_masks

    return boxes_from_masks(mask.astype(np.uint8), min_size=40, connectivity=1)


def labelled_tiles(picture, mask, n_tiles, seed):
    """Draw tiles of the left side that do not overlap, with the boxes in them."""
    places = [(y, x) for y in range(0, 512, TILE) for x in range(0, TRAIN.stop - TILE + 1, TILE)]
    order = np.random.default_rng(seed).permutation(len(places))[:n_tiles]
    cuts = [tuple(slice(at, at + TILE) for at in places[number]) for number in order]
    return [picture[cut] for cut in cuts], [boxes_of(mask[cut]) for cut in cuts]


def evaluate(model, picture, mask, min_score):
    """Scores on the right side, predicted as one image."""
    from diffaugkit.metrics import box_average_precision, mean_box_iou

    truth, found = [boxes_of(mask[:, TEST])], model.predict([picture[:, TEST]])
    steps = np.linspace(0.5, 0.95, 10)
    scores = {
        "ap50": box_average_precision(truth, found),
        "ap": box_average_precision(truth, found, iou_threshold=steps),
        "miou": mean_box_iou(truth, found, min_score=min_score),
        "miou_true": mean_box_iou(truth, found, min_score=min_score, count_extra=False),
    }
    return {name: round(100 * value, 3) for name, value in scores.items()}


def fit(args, variant, n_tiles, seed, picture, mask):
    """Fine-tune on some tiles; the pre-training is found in the store, or made there."""
    from diffaugkit.detector import DiffusionDetector

    X, boxes = labelled_tiles(picture, mask, n_tiles, seed)
    kept = args.store / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"
    with tempfile.TemporaryDirectory(dir=args.store) as folder:
        # The checkpoint of a finished phase is that phase: a fit that finds it goes on after it.
        if kept.exists():
            shutil.copytree(kept, Path(folder) / "pretraining")
        model = DiffusionDetector(
            block_out_channels=tuple(args.widths),
            patch_size=TILE,
            stride=TILE // 2,
            max_epochs=max(1, args.steps // max(1, round(n_tiles / 8))),
            pretrain_epochs=args.pretrain_epochs,
            validation_fraction=0.0,
            random_state=seed,
            checkpoint_dir=folder,
            **VARIANTS[variant],
        )
        model.fit(X, boxes, unlabeled=[picture[:, TRAIN]])
        if (Path(folder) / "pretraining").exists() and not kept.exists():
            shutil.copytree(Path(folder) / "pretraining", kept)
    return model


def run(args, results):
    names = ("widths", "steps", "pretrain_epochs", "min_score")
    results.settle("detectors", **{name: getattr(args, name) for name in names})
    picture, mask = load()
    for seed in args.seeds:
        for n_tiles in args.tiles:
            for variant in args.variants:
                key = f"{n_tiles}|{seed}|{variant}"
                if key in results.read():
                    continue
                clock = time.perf_counter()
                model = fit(args, variant, n_tiles, seed, picture, mask)
                record = evaluate(model, picture, mask, args.min_score)
                record["seconds"] = round(time.perf_counter() - clock, 1)
                results.add(key, record)
                print(f"{key}: " + ", ".join(f"{k} {v:.1f}" for k, v in record.items()))


def table(results):
    """Mean and standard deviation over seeds, and the paired difference to the start from zero."""
    records, rows = results.read(), []
    for n_tiles in sorted({int(key.split("|")[0]) for key in records}):
        for variant in VARIANTS:
            found = {
                key.split("|")[1]: record
                for key, record in records.items()
                if key.startswith(f"{n_tiles}|") and key.endswith(f"|{variant}")
            }
            if not found:
                continue
            row = [n_tiles, variant, len(found)]
            for metric in METRICS:
                values = np.array([record[metric] for record in found.values()])
                row.append(f"{values.mean():.1f} ± {values.std():.1f}")
            pairs = [
                (record["ap50"], records.get(f"{n_tiles}|{seed}|from scratch"))
                for seed, record in found.items()
            ]
            gains = [own - other["ap50"] for own, other in pairs if other]
            row.append(f"{np.mean(gains):+.1f} ± {np.std(gains):.1f}" if gains else "")
            rows.append(row)
    header = ["tiles", "start", "seeds", *METRICS.values(), "AP50 against scratch"]
    print("\n" + markdown(header, rows))


def draw(args, path):
    """One figure: the right side with the true boxes, and those of two starts."""
    import matplotlib.pyplot as plt

    picture, mask = load()
    n_tiles, seed = max(args.tiles), args.seeds[0]
    shown = {"truth (stain)": boxes_of(mask[:, TEST])["boxes"]}
    for variant in list(VARIANTS)[:2]:
        model = fit(args, variant, n_tiles, seed, picture, mask)
        (found,) = model.predict([picture[:, TEST]])
        score = evaluate(model, picture, mask, args.min_score)["ap50"]
        kept = found["scores"] >= args.min_score
        shown[f"{variant}, AP50 {score:.0f} %"] = found["boxes"][kept]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 13), layout="constrained")
    for axis, (name, boxes) in zip(axes, shown.items(), strict=True):
        axis.imshow(picture[:, TEST])
        for x0, y0, x1, y1 in boxes:
            axis.add_patch(
                plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec="lime")
            )
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
    print(f"figure: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tiles", nargs="+", type=int, default=[4, 16], help="with boxes")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64, 64])
    parser.add_argument("--steps", type=int, default=150, help="batches of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=40, help="of 15 batches")
    parser.add_argument("--min-score", type=float, default=0.4, help="for the mean IoU")
    parser.add_argument("--store", help="folder for pre-trained networks; default: a temporary one")
    parser.add_argument("--out", default="detection.json", help="resumed when it exists")
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke test")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the table")
    parser.add_argument("--picture", help="fit for a figure only, and write it here")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.tiles, args.widths = [0], [4], [8, 8]
        args.steps, args.pretrain_epochs, args.out = 5, 1, quick_out(args.out)
    results = Results(args.out)
    with tempfile.TemporaryDirectory() as folder:
        args.store = Path(args.store or folder)
        args.store.mkdir(parents=True, exist_ok=True)
        if args.picture:
            draw(args, args.picture)
        elif not args.tables:
            run(args, results)
    if not args.picture:
        table(results)


if __name__ == "__main__":
    main()
