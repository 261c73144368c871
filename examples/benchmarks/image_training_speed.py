"""Speed of ``fit`` on images against hand-written PyTorch loops of the same networks, in one run.

    python image_training_speed.py --repeats 3 --out image_training_speed.json

DINO (two global crops, no local ones) and the U-Net's diffusion loss, on scikit-learn's digits and
on tiles of scikit-image's tissue picture, and segmentation of nuclei in those tiles. The
hand-written loops are what a user would write first: shuffled index batches, kornia's augmentation,
``zero_grad``, ``backward``, ``step``, the teacher's average, in float32. Runs alternate, each
figure is the best of its repeats; only ratios mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import copy
import time

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from _common import Results, markdown

from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder
from diffaugkit.data import check_X
from diffaugkit.datasets import load_digits, load_tissue_tiles
from diffaugkit.losses import dino_loss
from diffaugkit.segmentation_losses import segmentation_loss
from diffaugkit.segmenter import DiffusionSegmenter


def encoder(epochs, precision="fp32", augmentation="auto"):
    """Make the encoder of a run."""
    return SelfSupervisedEncoder(
        "dino",
        max_epochs=epochs,
        batch_size=64,
        n_local_crops=0,
        augmentation=augmentation,
        precision=precision,
        device="cpu",
        random_state=0,
    )


def generator(epochs, precision="fp32"):
    """Make the generator of a run."""
    return EmbeddingConditionedDiffusion(
        encoder=None, max_epochs=epochs, precision=precision, device="cpu", random_state=0
    )


def dino_by_hand(X, epochs, tissue):
    """Train student and teacher as a user would."""
    estimator = encoder(1, augmentation="tissue" if tissue else "auto")
    rows = estimator._check_fit_input(X)
    student = estimator._prepare(rows, None, seed=0).module.network
    student.to(memory_format=torch.contiguous_format)  # as networks are made
    teacher = copy.deepcopy(student).requires_grad_(False)
    size = rows.shape[2:]
    jitter = (0.4, 0.4, 0.0, 0.0) if tissue or rows.shape[1] == 1 else (0.4, 0.4, 0.2, 0.1)
    views = K.AugmentationSequential(
        K.RandomResizedCrop(size, scale=(0.4, 1.0)),
        K.RandomHorizontalFlip() if tissue else torch.nn.Identity(),
        K.ColorJiggle(*jitter, p=0.8),
    )
    images = torch.from_numpy(np.asarray(rows)).float() / 255
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.04)
    center, n = 0.0, len(images)
    student.train(), teacher.train()
    for _ in range(epochs):
        for index in torch.randperm(n).split(64):
            pair = torch.cat([views(images[index]) * 2 - 1 for _ in range(2)])
            with torch.no_grad():
                targets = teacher(pair)[1]
            logits = student(pair)[1]
            loss = dino_loss(logits.chunk(2), targets.chunk(2), center, 0.1, 0.04)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            with torch.no_grad():
                center = 0.9 * center + 0.1 * targets.mean(dim=0)
                for mean, own in zip(teacher.parameters(), student.parameters(), strict=True):
                    mean.lerp_(own, 0.004)


def diffusion_by_hand(X, embeddings, epochs):
    """Train the same U-Net as a user would, on v with the cosine schedule."""
    estimator = generator(1)
    rows = check_X(estimator, X, reset=True, images=True)
    state = estimator._prepare(rows, embeddings, seed=0)
    net, images, conditions = state.module, *state.batches.sources
    images = images.float() / 127.5 - 1
    mean = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    alpha_bar = state.diffusion.alpha_bar
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            x0, noise = images[index], torch.randn_like(images[index])
            t = torch.randint(1000, (len(x0),))
            signal, sigma = (a[t].sqrt()[:, None, None, None] for a in (alpha_bar, 1 - alpha_bar))
            drop = torch.rand(len(x0)) < 0.1
            prediction = net(signal * x0 + sigma * noise, t, conditions[index], drop)
            loss = F.mse_loss(prediction, signal * noise - sigma * x0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            mean.update_parameters(net)


def segmenter(epochs, precision="fp32"):
    """Make the segmenter of a run: the U-Net from scratch, as pre-training is the row above."""
    return DiffusionSegmenter(
        pretext=None,
        max_epochs=epochs,
        validation_fraction=0.0,
        precision=precision,
        device="cpu",
        random_state=0,
    )


def segmentation_by_hand(X, masks, network, epochs):
    """Train the same network as a user would, images and masks turned over together."""
    vary = K.AugmentationSequential(
        K.RandomHorizontalFlip(),
        K.RandomVerticalFlip(),
        K.ColorJiggle((0.5, 1.5), (0.6, 1.4), p=0.3),
        K.RandomGaussianBlur((3, 3), (1.0, 2.0), p=0.3),
        data_keys=["input", "mask"],
    )
    images = torch.from_numpy(X).permute(0, 3, 1, 2).float() / 255
    targets = torch.from_numpy(masks).float()[:, None]
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(8):
            x, target = vary(images[index], targets[index])
            loss = segmentation_loss(network(2 * x - 1), target[:, 0].long())["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="image_training_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results, table = Results(args.out), []
    sets = {
        "digits, 8 x 8": load_digits()[0][: args.images],
        "tissue, 32 x 32": load_tissue_tiles(32)[0][: args.images],
    }
    for name, X in sets.items():
        tissue = name.startswith("tissue")
        recipe = "tissue" if tissue else "auto"
        embeddings = np.random.default_rng(0).normal(size=(len(X), 64)).astype(np.float32)
        runs = {
            "DINO": {
                "by hand": lambda x=X, t=tissue: dino_by_hand(x, args.epochs, t),
                "fp32": lambda x=X, r=recipe: encoder(args.epochs, "fp32", r).fit(x),
                "auto": lambda x=X, r=recipe: encoder(args.epochs, "auto", r).fit(x),
            },
            "diffusion": {
                "by hand": lambda x=X, e=embeddings: diffusion_by_hand(x, e, args.epochs),
                "fp32": lambda x=X, e=embeddings: generator(args.epochs).fit(x, embeddings=e),
                "auto": lambda x=X, e=embeddings: generator(args.epochs, "auto").fit(
                    x, embeddings=e
                ),
            },
        }
        if tissue:
            # Nuclei are where haematoxylin is.
            _, _, stain = load_tissue_tiles(X.shape[1], return_stain=True)
            masks = (stain > np.quantile(stain, 0.75))[: len(X)]
            network = segmenter(1).fit(X[:8], masks[:8]).module_
            runs["segmentation"] = {
                "by hand": lambda x=X, m=masks, n=network: segmentation_by_hand(
                    x, m, n, args.epochs
                ),
                "fp32": lambda x=X, m=masks: segmenter(args.epochs).fit(x, m),
                "auto": lambda x=X, m=masks: segmenter(args.epochs, "auto").fit(x, m),
            }
        for part, kinds in runs.items():
            best = dict.fromkeys(kinds, np.inf)
            for repeat in range(args.repeats + 1):
                for kind, run in kinds.items():
                    start = time.perf_counter()
                    run()
                    if repeat:  # the first round is for imports and warm caches
                        best[kind] = min(best[kind], time.perf_counter() - start)
            record = {kind: best["by hand"] / best[kind] for kind in ("fp32", "auto")}
            results.add(f"{part}|{name}", record)
            table.append([part, name, f"{record['fp32']:.2f}", f"{record['auto']:.2f}"])
            print(part, name, record, flush=True)
    print(f"\nSpeed relative to the hand-written float32 loop, {args.threads} threads\n")
    print(markdown(["network", "images", "fit fp32", "fit auto"], table))


if __name__ == "__main__":
    main()
