"""Speed of ``fit`` against a hand-written PyTorch loop of the same networks, in one run.

    python training_speed.py --repeats 3 --out training_speed.json

Both train the encoder, and then the denoiser, on the same data with the same batches per epoch, the
same loss functions and AdamW. The hand-written loop is what a user would write first: shuffled
index batches, ``zero_grad``, ``backward``, ``step``, in float32. Runs alternate and each figure is
the best of its repeats; only ratios mean something on a shared machine. Linear SVM accuracy on the
embedding (10-fold) shows that a faster precision does not cost quality.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from _common import Results, markdown
from sklearn.datasets import load_digits, make_blobs

from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder
from diffaugkit.metrics import linear_svm_accuracy
from diffaugkit.rows import DenseRows


def data(name):
    """Samples and labels."""
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        return X.astype(np.float32), y
    X, y = make_blobs(3_000, n_features=2_000, centers=10, cluster_std=8.0, random_state=0)
    return X.astype(np.float32), y


def by_hand(state, n, epochs, batch_size, rate, average=None):
    """Train as a user would: every source indexed by a shuffled batch, AdamW, float32."""
    sources = state.batches.sources
    optimizer = torch.optim.AdamW(state.module.parameters(), lr=rate, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // batch_size))
    mean = None
    if average is not None:
        function = torch.optim.swa_utils.get_ema_multi_avg_fn(average)
        mean = torch.optim.swa_utils.AveragedModel(state.module, multi_avg_fn=function)
    state.module.train()
    for _ in range(epochs):
        for index in torch.randperm(n).split(batch_size):
            loss = state.loss(*[None if s is None else s[index] for s in sources])
            loss = loss["loss"] if isinstance(loss, dict) else loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.module.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            if mean is not None:
                mean.update_parameters(state.module)
    state.module.eval()


def encoder(n_pcs, epochs, precision="fp32"):
    """Make the encoder of a run."""
    return SelfSupervisedEncoder(
        n_pcs=n_pcs, max_epochs=epochs, precision=precision, device="cpu", random_state=0
    )


def diffusion(epochs, precision="fp32"):
    """Make the generator of a run."""
    return EmbeddingConditionedDiffusion(
        max_epochs=epochs, precision=precision, device="cpu", random_state=0
    )


def seconds(run):
    """Wall time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="training_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results, rows = Results(args.out), []
    for name, n_pcs in (("digits", 20), ("blobs, 2 000 features", None)):
        X, y = data(name.split(",")[0])
        shared = DenseRows(X)
        encoder(n_pcs, 1).fit(shared)  # principal components and neighbours are kept with the rows
        embeddings = np.asarray(X[:, :50])

        def hand_encoder(shared=shared, n_pcs=n_pcs):
            estimator = encoder(n_pcs, args.epochs)
            rows = estimator._check_fit_input(shared)
            state = estimator._prepare(rows, None, seed=0)
            by_hand(state, len(rows), args.epochs, 300, 1e-3)

        def hand_diffusion(shared=shared, embeddings=embeddings):
            estimator = diffusion(args.epochs)
            state = estimator._prepare(shared, embeddings, seed=0)
            by_hand(state, len(shared), args.epochs, 300, 1e-3, average=0.999)

        runs = {
            "encoder": {
                "by hand": hand_encoder,
                "fp32": lambda s=shared, k=n_pcs: encoder(k, args.epochs).fit(s),
                "auto": lambda s=shared, k=n_pcs: encoder(k, args.epochs, "auto").fit(s),
            },
            "diffusion": {
                "by hand": hand_diffusion,
                "fp32": lambda s=shared, e=embeddings: diffusion(args.epochs).fit(s, embeddings=e),
                "auto": lambda s=shared, e=embeddings: diffusion(args.epochs, "auto").fit(
                    s, embeddings=e
                ),
            },
        }
        for part, kinds in runs.items():
            best = dict.fromkeys(kinds, np.inf)
            for _ in range(args.repeats):
                for kind, run in kinds.items():
                    best[kind] = min(best[kind], seconds(run))
            record = {k: best["by hand"] / best[k] for k in ("fp32", "auto")}
            if part == "encoder":
                for kind in ("fp32", "auto"):
                    model = encoder(n_pcs, 10 * args.epochs, kind).fit(shared)
                    record[f"svm_{kind}"] = 100 * linear_svm_accuracy(model.transform(X), y)
            results.add(f"{part}|{name}", record)
            accuracy = [
                f"{record[k]:.1f}" if k in record else "-" for k in ("svm_fp32", "svm_auto")
            ]
            rows.append([part, name, f"{record['fp32']:.2f}", f"{record['auto']:.2f}", *accuracy])
    header = ["network", "data", "fit fp32", "fit auto", "SVM fp32, %", "SVM auto, %"]
    print(f"Speed relative to the hand-written float32 loop, {args.threads} threads\n")
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
