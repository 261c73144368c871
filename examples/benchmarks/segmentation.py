"""GenSelfDiff-HIS against other starts and losses on GlaS: Tables IV, V, XI, XII of the paper.

    DIFFAUGKIT_DATA=folder python segmentation.py --seeds 0 1 2 --out segmentation.json

GlaS (Sirinukunwattana et al. 2017) by its official split: pre-training on all training images
without masks, fine-tuning on a share of them with masks, scores on both test sets as whole images.
For each seed every variant has the same network, the same images with masks and the same epochs;
what differs is the start, or the loss. A pre-training is done once per seed and start, and shared
by all shares. Each result is written as it comes, and a second run goes on where the first stopped.

The paper's AJI aggregates over classes, so that with one class it is the IoU (``AJI (paper)``); the
index of Kumar et al. over objects stands beside it, and the Hausdorff distance is that of point
sets at 95 %::

    python segmentation.py --quick                          # a smoke test, minutes
    python segmentation.py --tables --out segmentation.json # run nothing, print the tables
    python segmentation.py --paper --epochs 150 --pretrain-epochs 100     # full size, for a GPU
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import Results, markdown, quick_out

SHARES = (5, 10, 25, 100)
VARIANTS = {
    # name: what differs from the method
    "from scratch": {"diffusion": None},
    "diffusion, P2": {},
    "diffusion, uniform": {"loss_weighting": "uniform"},
    "diffusion, min-SNR": {"loss_weighting": "min_snr"},
    "inpainting": {"pretext": "inpainting"},
    "context restoration": {"pretext": "context_restoration"},
    "diffusion, P2; cross-entropy": {"loss": "cross_entropy"},
    "diffusion, P2; SS": {"loss": "ss"},
    "diffusion, P2; focal": {"loss": "focal"},
    "from scratch; cross-entropy": {"diffusion": None, "loss": "cross_entropy"},
    "diffusion, P2; T = 100": {"n_timesteps": 100},
    "from scratch; tissue recipe": {"diffusion": None, "augment": "tissue"},
    "diffusion, P2; tissue recipe": {"augment": "tissue"},
}
METRICS = {
    "dice": "Dice (F1)",
    "aji_paper": "AJI (paper) = IoU",
    "aji_objects": "AJI of objects",
    "hd95": "Hausdorff 95 %, pixels",
}


def load_glas(scale):
    """Images and masks of GlaS by split, every `scale`-th pixel after averaging."""
    import pandas as pd
    from PIL import Image

    folder = os.environ.get("DIFFAUGKIT_DATA")
    if not folder:
        raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds glas_he")
    folder = Path(folder) / "glas_he"
    sets = {}
    for row in pd.read_csv(folder / "index.csv").itertuples():
        with Image.open(folder / f"{row.name}.jpg") as file:
            image = file.convert("RGB")
        with Image.open(folder / f"{row.name}_mask.png") as file:
            mask = file.copy()
        size = image.width // scale, image.height // scale
        image = image.resize(size, Image.Resampling.BOX)
        mask = mask.resize(size, Image.Resampling.NEAREST)
        split = "train" if row.split == "train" else "test"
        sets.setdefault(split, []).append((np.asarray(image), (np.asarray(mask) > 0)))
    return {name: tuple(map(list, zip(*pairs, strict=True))) for name, pairs in sets.items()}


def scores(model, images, masks):
    """Scores of whole images, means over them."""
    from diffaugkit.metrics import dice_score, hd95, label_instances, object_aji, pixel_aji

    found = [labels.astype(np.uint8) for labels in model.predict(images)]
    truth = [mask.astype(np.uint8) for mask in masks]
    pairs = list(zip(truth, found, strict=True))
    objects = [[label_instances(mask, min_size=20) for mask in part] for part in (truth, found)]
    # An image in which nothing was found has no contour to measure to.
    distances = [float(hd95(a > 0, b > 0)) for a, b in pairs if a.any() and b.any()]
    return {
        "dice": 100 * float(np.mean([dice_score(a, b) for a, b in pairs])),
        "aji_paper": 100 * float(np.mean([pixel_aji(a, b) for a, b in pairs])),
        "aji_objects": 100 * float(np.mean(object_aji(*objects))),
        "hd95": float(np.mean(distances)) if distances else None,
    }


def fit(options, start, seed, data, picked, store):
    """Fine-tune on the picked images; the pre-training is found in `store`, or made there."""
    from diffaugkit.segmenter import DiffusionSegmenter

    X, masks = data["train"]
    with tempfile.TemporaryDirectory(dir=store) as folder:
        # The checkpoint of a finished phase is that phase: a fit that finds it goes on after it.
        kept = store / f"{start}-{seed}"
        if kept.exists():
            shutil.copytree(kept, Path(folder) / "pretraining")
        model = DiffusionSegmenter(**options, random_state=seed, checkpoint_dir=folder)
        model.fit([X[i] for i in picked], [masks[i] for i in picked], unlabeled=X)
        if (Path(folder) / "pretraining").exists() and not kept.exists():
            shutil.copytree(Path(folder) / "pretraining", kept)
    return model


def run(args, results):
    data = load_glas(args.scale)
    if args.quick:
        data = {name: (X[:8], masks[:8]) for name, (X, masks) in data.items()}
    options = {
        "patch_size": args.patch_size,
        "stride": args.stride,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "max_epochs": args.epochs or "auto",
        "pretrain_epochs": args.pretrain_epochs or "auto",
    }
    if args.paper:
        options["denoiser"] = "attention_unet"
    elif args.widths:
        options["block_out_channels"] = tuple(args.widths)
    size = "paper" if args.paper else "small"
    names = ("patch_size", "stride", "batch_size", "learning_rate", "widths")
    shared = {name: getattr(args, name) for name in (*names, "epochs", "pretrain_epochs")}
    results.settle(f"{size}, 1/{args.scale}", **shared)
    n = len(data["train"][0])
    with tempfile.TemporaryDirectory(dir=args.store) as folder:
        store = Path(args.store or folder)
        for seed in args.seeds:
            order = np.random.default_rng(seed).permutation(n)
            for share in args.shares:
                picked = np.sort(order[: max(2, round(n * share / 100))])
                for variant in args.variants:
                    key = f"{size}, 1/{args.scale}|{share}|{seed}|{variant}"
                    if key in results.read():
                        continue
                    clock = time.perf_counter()
                    start = variant.partition(";")[0].replace(" ", "-").replace(",", "")
                    for change in ("T = 100", "tissue recipe"):
                        start += f"-{change}".replace(" ", "") if change in variant else ""
                    model = fit(options | VARIANTS[variant], start, seed, data, picked, store)
                    record = scores(model, *data["test"])
                    record["seconds"] = round(time.perf_counter() - clock, 1)
                    results.add(key, record)
                    shown = (f"{k} {v:.1f}" for k, v in record.items() if v is not None)
                    print(f"{key}: {', '.join(shown)}")


def tables(results):
    """Mean and standard deviation over seeds, and the paired difference to the start from zero."""
    records = results.read()
    for size, share in sorted({tuple(key.split("|")[:2]) for key in records}, key=_by_share):
        rows = []
        for variant in VARIANTS:
            found = {
                key.split("|")[2]: record
                for key, record in records.items()
                if key.startswith(f"{size}|{share}|") and key.endswith(f"|{variant}")
            }
            if not found:
                continue
            row = [variant, len(found)]
            for metric in METRICS:
                values = [record[metric] for record in found.values()]
                values = [value for value in values if value is not None]
                row.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "/")
            base = [
                (record["aji_paper"], records.get(f"{size}|{share}|{seed}|from scratch"))
                for seed, record in found.items()
            ]
            gains = [own - other["aji_paper"] for own, other in base if other]
            row.append(f"{np.mean(gains):+.1f} ± {np.std(gains):.1f}" if gains else "")
            rows.append(row)
        print(f"\n### GlaS, {share} % of the masks, network and scale: {size}\n")
        print(markdown(["variant", "seeds", *METRICS.values(), "AJI against scratch"], rows))


def _by_share(group):
    return group[0], int(group[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=int, default=list(SHARES), help="percent")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--scale", type=int, default=2, help="shrink images by this factor")
    parser.add_argument("--patch-size", type=int, default=128)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--widths", nargs="+", type=int, help="of the U-Net; default: the library's"
    )
    parser.add_argument("--epochs", type=int, help="of fine-tuning; default: the library's")
    parser.add_argument("--pretrain-epochs", type=int, help="default: the library's")
    parser.add_argument("--store", help="folder for pre-trained networks; default: a temporary one")
    parser.add_argument("--out", default="segmentation.json", help="resumed when it exists")
    parser.add_argument("--paper", action="store_true", help="the paper's network, patch and rate")
    parser.add_argument(
        "--quick", action="store_true", help="eight images, one epoch: a smoke test"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.paper:
        args.scale, args.patch_size, args.stride, args.learning_rate = 1, 256, 64, 1e-4
    if args.quick:
        args.seeds, args.shares, args.scale, args.patch_size, args.widths = [0], [25], 4, 32, [8, 8]
        args.stride, args.epochs, args.pretrain_epochs = 32, 1, 1
        args.out = quick_out(args.out)
    if args.store:
        Path(args.store).mkdir(parents=True, exist_ok=True)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
