"""HistoDiffusion on real tissue: Table 1 of the paper, small, with random against selective.

    DIFFAUGKIT_DATA=folder python histodiffusion.py --seeds 0 1 2 3 4 --out histodiffusion.json

An autoencoder and an unconditional latent diffusion model learn from one tissue without labels; a
few labelled images of the other tissue, one per source tile, adapt them and are augmented by 50 to
300 %. The judge is a small ResNet from scratch with the same number of steps in every row, tested
on patients (breast) or source tiles (lung) that nothing else has seen; each figure is the mean of
several judges, that of all labels of one. One pool of candidates serves all ratios and selections:
random takes what comes first, consistent what comes first of those that are nearest to the centroid
of their class, and selective, the paper's, the closest of those. The Frechet distance is taken at
the number of images of 50 % in every row, mean of 10 draws, in 16 principal components of a ResNet
trained on all labels of the training side. Each result is written as it comes, models are kept
beside the result file, and a second run goes on where the first stopped::

    python histodiffusion.py --quick                              # a smoke test, minutes
    python histodiffusion.py --tables --out histodiffusion.json   # run nothing, print the tables
    python histodiffusion.py --variants full untuned unpretrained # the supplement's ablations
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from _common import Results, markdown, quick_out
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import confusion_matrix, f1_score
from torch.nn import functional as F

TISSUES = ("lung", "breast")
VARIANTS = ("full", "untuned", "unpretrained")
SELECTIONS = ("random", "consistent", "selective")
RATIOS = (0.5, 1.0, 2.0, 3.0)
METRICS = ("frechet", "accuracy", "f1", "sensitivity", "specificity")


def load_tissue(name, size):
    """Images (n, size, size, 3) uint8, their labels, and the patient or source tile of each."""
    folder = os.environ.get("DIFFAUGKIT_DATA")
    if not folder:
        raise SystemExit("set DIFFAUGKIT_DATA to the folder that holds the image sets")
    file, of = ("lung_he64", "group") if name == "lung" else ("idc_he50", "patient")
    with np.load(Path(folder) / f"{file}.npz", allow_pickle=False) as data:
        X, y, groups = data["X"], data["y"], data[of]
    x = torch.from_numpy(X).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    X = x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(X), y.astype(np.int64), groups


def split(y, groups, n_labels, seed):
    """Rows with labels, rows of the training side, and rows of the test side."""
    rng = np.random.default_rng(seed)
    kinds = np.unique(groups)
    # Two patients: each is held out in turn. Tiles: a quarter.
    held_out = [kinds[seed % 2]] if len(kinds) == 2 else rng.permutation(kinds)[: len(kinds) // 4]
    test = np.isin(groups, held_out)
    train = np.flatnonzero(~test)
    labelled = []
    for k in np.unique(y):
        own = rng.permutation(train[y[train] == k])
        if len(kinds) > 2:
            # Rotated copies of one tile say little more than one of them.
            own = own[np.sort(np.unique(groups[own], return_index=True)[1])]
        labelled.append(own[: n_labels // len(np.unique(y))])
    return np.concatenate(labelled), train, np.flatnonzero(test)


class Judge:
    """A small ResNet from scratch, with flips and quarter turns, for a fixed number of steps."""

    def __init__(self, steps, seed):
        self.steps, self.seed = steps, seed

    def fit(self, X, y):
        from diffaugkit.batches import make_batches
        from diffaugkit.networks import small_resnet
        from diffaugkit.runtime import isolated_rng
        from diffaugkit.training import fit_loop

        with isolated_rng(self.seed):
            body = small_resnet(X.shape[1:], width=16)
            head = torch.nn.Linear(body.num_features, int(y.max()) + 1)
        self.body, network = body, torch.nn.Sequential(body, head)

        def loss(x, y):
            x = _unit(x)
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            turned = torch.rot90(x, int(torch.randint(4, ())), (2, 3))
            return F.cross_entropy(network(turned), y, label_smoothing=0.1)

        data = torch.from_numpy(X).permute(0, 3, 1, 2).contiguous()
        batches = make_batches(data, y, batch_size=64, seed=self.seed)
        self.network, _ = fit_loop(
            network,
            loss,
            batches,
            max_epochs=max(1, round(self.steps / batches.steps_per_epoch)),
            learning_rate=2e-3,
            weight_decay=0.05,
            warmup=0.05,
            seed=self.seed,
        )
        return self

    @torch.no_grad()
    def _run(self, module, X):
        device = next(module.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(X)).permute(0, 3, 1, 2)
        return torch.cat([module(_unit(part.to(device))).cpu() for part in x.split(128)]).numpy()

    def transform(self, X):
        return self._run(self.body, X)

    def predict(self, X):
        return self._run(self.network, X).argmax(axis=1)


def _unit(x):
    return x.float() / 127.5 - 1


def scores(y, predicted):
    """Accuracy, and the means over classes of F1, sensitivity and specificity."""
    table = confusion_matrix(y, predicted, labels=np.unique(y))
    hit, real, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    others = table.sum() - real
    return {
        "accuracy": float(hit.sum() / table.sum()),
        "f1": float(f1_score(y, predicted, average="macro", zero_division=0)),
        "sensitivity": float(np.mean(hit / real)),
        "specificity": float(np.mean((others - (said - hit)) / others)),
    }


def pretrained(args, source, seed, folder):
    """The unconditional latent diffusion model of a tissue, from the disk where it is there."""
    import diffaugkit
    from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder

    if (folder / "manifest.json").exists():
        return diffaugkit.load(folder)
    X, _, _ = load_tissue(source, args.size)
    epochs = {"max_epochs": args.epochs} if args.epochs else {}
    autoencoder = LatentAutoencoder(random_state=seed, **epochs)
    model = EmbeddingConditionedDiffusion(
        None, autoencoder=autoencoder, random_state=seed, **epochs
    ).fit(X[:: 16 if args.quick else 1])
    model.save(folder)
    return model


def pools(args, variant, generator, X, y, seed):
    """Generated images and labels for each selection, in the order in which they are taken."""
    from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder
    from diffaugkit.histo_augmenter import HistoDiffusionAugmenter

    if variant == "unpretrained":
        epochs = {"max_epochs": args.epochs} if args.epochs else {}
        autoencoder = LatentAutoencoder(random_state=seed, **epochs)
        diffusion = EmbeddingConditionedDiffusion(
            None, autoencoder=autoencoder, random_state=seed, **epochs
        )
    else:
        diffusion = FrozenEstimator(generator)
    epochs = {"max_epochs": args.epochs, "decoder_epochs": args.epochs} if args.epochs else {}
    augmenter = HistoDiffusionAugmenter(
        diffusion,
        guidance_scale=args.guidance_scale,
        n_sampling_steps=args.sampling_steps,
        tune_decoder=variant != "untuned",
        random_state=seed,
        **epochs,
    ).fit(X, y)
    each = args.n_candidates * max(RATIOS)
    labels = np.concatenate([np.full(round(each * (y == k).sum()), k) for k in np.unique(y)])
    images = augmenter.sample(labels)
    distances = augmenter.centroid_distances(images)
    own = np.take_along_axis(distances, labels[:, None], axis=1)[:, 0]
    right = np.flatnonzero(distances.argmin(axis=1) == labels)
    scales = dict(zip(augmenter.classes_.tolist(), augmenter.guidance_scale_.tolist(), strict=True))
    share = f"{len(right) / len(labels):.0%} of {len(labels)} candidates are right"
    print(f"  {share}, {scales=}", flush=True)
    orders = {
        "random": np.arange(len(labels)),
        "consistent": right,
        "selective": right[np.argsort(own[right], kind="stable")],
    }
    return {kind: (images[order], labels[order]) for kind, order in orders.items()}


def first(images, labels, y, ratio):
    """The first `ratio` times as many generated images of each class as there are real ones."""
    kept = [np.flatnonzero(labels == k)[: round(ratio * (y == k).sum())] for k in np.unique(y)]
    kept = np.concatenate(kept)
    return images[kept], labels[kept]


def frechet(space, real, generated, n, seed):
    """Mean distance over 10 draws of n images on each side."""
    from diffaugkit.metrics import frechet_distance

    rng, found = np.random.default_rng(seed), []
    n = min(n, len(real), len(generated))
    if n < 2:
        return None
    real, generated = space(real), space(generated)
    for _ in range(10):
        pair = (x[rng.choice(len(x), n, replace=False)] for x in (real, generated))
        found.append(frechet_distance(*pair))
    return float(np.mean(found))


def run(args, results):
    names = ("size", "n_labels", "guidance_scale", "n_candidates", "sampling_steps", "steps")
    shared = {name: getattr(args, name) for name in (*names, "judges", "epochs")}
    once = args.pretraining_seed
    shared["pretraining"] = "of each seed" if once is None else once
    for target in args.targets:
        results.settle(target, **shared)
    for target in args.targets:
        source = TISSUES[1 - TISSUES.index(target)]
        X, y, groups = load_tissue(target, args.size)
        for seed in args.seeds:
            labelled, train, test = split(y, groups, args.n_labels, seed)
            if args.quick:
                train, test = train[::4], test[::4]
            key, own = f"{source}->{target}|{seed}", (X[labelled], y[labelled])
            print(f"{key}: {len(labelled)} labelled, {len(test)} test images", flush=True)

            # Trained on the whole training side, for the space of the Frechet distance alone.
            oracle = Judge(args.steps, seed).fit(X[train], y[train])
            pca = PCA(16, random_state=0).fit(oracle.transform(X[train]))

            def space(images, oracle=oracle, pca=pca):
                return pca.transform(oracle.transform(images))

            def judge(images, labels, seed=seed, X_test=X[test], y_test=y[test]):
                found = [
                    scores(
                        y_test,
                        Judge(args.steps, 100 * seed + k).fit(images, labels).predict(X_test),
                    )
                    for k in range(args.judges)
                ]
                return {name: float(np.mean([r[name] for r in found])) for name in found[0]}

            if f"{key}|real" not in results.read():
                results.add(f"{key}|real", judge(*own))
            if f"{key}|all labels" not in results.read():
                results.add(f"{key}|all labels", scores(y[test], oracle.predict(X[test])))
            for variant in args.variants:
                rows = [(kind, ratio) for kind in args.selections for ratio in RATIOS]
                names = {row: f"{key}|{variant}|{row[0]}|{row[1]}" for row in rows}
                todo = [row for row in rows if names[row] not in results.read()]
                if not todo:
                    continue
                start, generator = time.perf_counter(), None
                if variant != "unpretrained":
                    start_seed = seed if once is None else once
                    folder = Path(f"{args.out}.models") / f"{source}-{args.size}-{start_seed}"
                    generator = pretrained(args, source, start_seed, folder)
                made = pools(args, variant, generator, *own, seed)
                print(f"  {variant}: {time.perf_counter() - start:.0f} s", flush=True)
                for kind, ratio in todo:
                    images, labels = first(*made[kind], own[1], ratio)
                    grown = np.concatenate([own[0], images]), np.concatenate([own[1], labels])
                    record = {
                        "frechet": frechet(space, X[train], images, len(labelled) // 2, seed),
                        "generated": len(images),
                        **judge(*grown),
                    }
                    results.add(names[kind, ratio], record)
                    print(f"  {kind} {ratio:.0%}: accuracy {record['accuracy']:.3f}", flush=True)


def tables(results):
    """Means over seeds, and the gain in accuracy over the real images alone, seed by seed."""
    records = results.read()
    for direction in sorted({key.split("|")[0] for key in records}):
        found = {}
        for key, record in records.items():
            where, seed, name = key.split("|", 2)
            if where == direction:
                found.setdefault(name, {})[seed] = record
        order = ["real", "all labels"]
        order += [
            f"{variant}|{kind}|{ratio}"
            for variant in VARIANTS
            for kind in SELECTIONS
            for ratio in RATIOS
        ]
        rows = []
        for name in (name for name in order if name in found):
            own = found[name]
            row = [name.replace("|", " "), len(own)]
            for metric in METRICS:
                values = [r[metric] for r in own.values() if r.get(metric) is not None]
                row.append(f"{np.mean(values):.3f}" if values else "/")
            gains = [r["accuracy"] - found["real"][seed]["accuracy"] for seed, r in own.items()]
            row.append(f"{np.mean(gains):+.3f} ± {np.std(gains):.3f}")
            rows.append(row)
        print(f"\n### {direction}\n")
        print(markdown(["training set", "seeds", *METRICS, "gain"], rows))


def scale(text):
    """Scale of the guidance on the command line."""
    return text if text == "auto" else float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TISSUES, default=["breast", "lung"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full"])
    parser.add_argument("--size", type=int, default=48, help="side of all images, pixels")
    parser.add_argument("--n-labels", type=int, default=54, help="5 %% of the lung training side")
    parser.add_argument("--guidance-scale", type=scale, default="auto", help="or a number")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument(
        "--n-candidates", type=float, default=2.0, help="per image of the largest ratio"
    )
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600, help="of each judge")
    parser.add_argument("--judges", type=int, default=3, help="whose mean each figure is")
    parser.add_argument("--epochs", type=int, help="of every other network; default: the library's")
    parser.add_argument(
        "--pretraining-seed", type=int, help="pre-train once, with this; default: with each seed"
    )
    parser.add_argument("--out", default="histodiffusion.json", help="resumed when it exists")
    parser.add_argument("--quick", action="store_true", help="hardly trained: a smoke test")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.steps, args.sampling_steps = [0], 1, 10, 4
        args.size, args.n_labels, args.judges = 24, 12, 1
        args.out = quick_out(args.out)
    results = Results(args.out)
    if not args.tables:
        run(args, results)
    tables(results)


if __name__ == "__main__":
    main()
