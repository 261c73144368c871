"""Ablations of DiffAug on the development cell sets: Tables 3 and 4 of the paper, and two curves.

    DIFFAUGKIT_DATA=... python cells_ablation.py --sets paul15 --seeds 0 1 2 --out ablation.json

``--parts`` picks from: ``condition`` (Table 3: labels, random vectors or the embedding as the
generator's condition), ``training`` (Table 4: InfoNCE, no generator, joint training), ``lambda``
(the share of generated views) and ``levers`` (label consistency against copy ratio for each way to
bring generated cells farther from their source; a figure is written beside the JSON). Each result
is written as it comes, and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from _common import SETS, Results, evaluate, load_cells, markdown, quick_out
from cells import without_m_step

LEVERS = {
    "y": {},
    "y, noise 0.5": {"condition_noise": 0.5},
    "y, noise 1": {"condition_noise": 1.0},
    "y, noise 2": {"condition_noise": 2.0},
    "y, guidance 0.5": {"guidance_scale": 0.5},
    "y, a third of the M-step": {"share": 1 / 3},
    "z": {"condition": "projection"},
    "z, noise 0.5": {"condition": "projection", "condition_noise": 0.5},
}
LAMBDAS = (0.1, 0.15, 0.3, 0.5, 1.0)


def variants(part, model, n_cells):
    """Name -> model of one part; `model` is the default."""
    from sklearn.base import clone

    from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder

    schedule = model._schedule(SelfSupervisedEncoder(), n_cells)
    no_m_step = without_m_step(model, n_cells)

    def make(**parameters):
        return clone(model).set_params(**{"schedule": schedule} | parameters)

    if part == "condition":
        return {
            "A1 labels": make(condition="supervised"),
            "A2 random": make(condition="random"),
            "A3 embedding (DiffAug)": make(),
        }
    if part == "training":
        simclr = SelfSupervisedEncoder("simclr")
        return {
            "B1 SimCLR": make(encoder=simclr, schedule=no_m_step),
            "B2 no diffusion (E alone)": make(schedule=no_m_step),
            "B3 InfoNCE for the soft loss": make(encoder=simclr),
            "B4 joint training": make(joint=True),
            "B5 alternation (DiffAug)": make(),
        }
    if part == "lambda":
        curve = {f"lambda {value}": make(augmentation_prob=value) for value in LAMBDAS}
        return {"lambda 0": make(schedule=no_m_step)} | curve
    found = {}
    for name, lever in LEVERS.items():
        lever = dict(lever)
        condition = lever.pop("condition", "embedding")
        share = lever.pop("share", 1.0)
        phases = tuple(max(1, round(e * share)) if i % 2 else e for i, e in enumerate(schedule))
        diffusion = EmbeddingConditionedDiffusion(**lever)
        found[name] = make(condition=condition, diffusion=diffusion, schedule=phases)
    return found


def run(args):
    """Fit and judge every variant that is not in the result file yet."""
    from tqdm import tqdm

    from diffaugkit import CellPreprocessor, DiffAugEM

    results = Results(args.out)
    todo = [(p, s, k) for p in args.parts for s in args.sets for k in args.seeds]
    for part, name, seed in tqdm(todo, unit="part"):
        cells = load_cells(name, args.quick)
        X = CellPreprocessor().fit_transform(cells.counts)
        model = DiffAugEM(random_state=seed, schedule=(3, 3, 3) if args.quick else "auto")
        for variant, ready in variants(part, model, len(X)).items():
            key = f"{part}|{variant}|{name}|{seed}"
            if key in results.read():
                continue
            ready.fit(X, cells.y)
            record = {
                "y": evaluate(ready.transform(X), cells, seed),
                "z": evaluate(ready.project(X), cells, seed),
            }
            if ready.diffusion_ is not None and ready.condition != "supervised":
                report = ready.quality_report(X, cells.y).to_frame().iloc[0]
                record["quality"] = {k: float(v) for k, v in report.items() if v is not None}
            results.add(key, record)


def tables(records, parts):
    """One table a part: mean over the sets and seeds that the file has of it."""
    for part in parts:
        groups, sets, seeds = {}, [], []
        for key, record in records.items():
            kind, variant, name, seed = key.split("|")
            if kind == part:
                groups.setdefault(variant, []).append(record)
                sets.append(name)
                seeds.append(seed)
        if not groups:
            continue
        over = f"{', '.join(dict.fromkeys(sets))}, mean over seeds {', '.join(sorted(set(seeds)))}"
        header = [
            "variant",
            "SVM y",
            "k-NN y",
            "SVM z",
            "k-NN z",
            "labels kept",
            "copy ratio",
            "runs",
        ]
        rows = []
        for variant, found in groups.items():
            scores = [np.mean([r[s][m] for r in found]) for s in "yz" for m in ("svm", "knn")]
            quality = [r["quality"] for r in found if "quality" in r]
            kept = [
                f"{np.mean([q[k] for q in quality]):.3f}" if quality else "-"
                for k in ("label_consistency", "copy_ratio")
            ]
            rows.append([variant, *(f"{score:.2f}" for score in scores), *kept, len(found)])
        print(f"\n### {part}: {over}\n\n{markdown(header, rows)}")


def plot_levers(records, path):
    """Label consistency, relative to real cells, against copy ratio, one point a lever."""
    import matplotlib.pyplot as plt

    points = {}
    for key, record in records.items():
        kind, variant, *_ = key.split("|")
        if kind == "levers":
            q = record["quality"]
            kept = q["label_consistency"] / q["real_label_consistency"]
            points.setdefault(variant, []).append((q["copy_ratio"], kept))
    if not points:
        return
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for (variant, found), marker in zip(points.items(), itertools.cycle("osD^vP")):
        ax.plot(*np.mean(found, axis=0), marker, label=variant)
    ax.set(xlabel="copy ratio (0: copies)", ylabel="labels kept, relative to real cells")
    ax.margins(0.1)
    ax.legend()
    figure.savefig(path, dpi=150)


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = ["condition", "training", "lambda", "levers"]
    parser.add_argument("--parts", nargs="+", choices=choices, default=choices)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="cells_ablation.json")
    parser.add_argument("--quick", action="store_true", help="600 cells and 3 epochs: a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.out = quick_out(args.out)
    run(args)
    records = Results(args.out).read()
    tables(records, args.parts)
    plot_levers(records, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
