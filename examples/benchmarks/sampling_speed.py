"""Samplers: images per second, and the Frechet distance that they reach, in one run.

    python sampling_speed.py --out sampling_speed.json

One unconditional U-Net is trained on scikit-learn's digits (8 x 8 pixels); every sampler then walks
with the very same weights: ours (DDPM with 1 000 steps, DDIM, DPM-Solver++), the pipelines of
diffusers (DDPM, DDIM), and the sampling loop of denoising-diffusion-pytorch, where installed. The
Frechet distance is between 20 principal components of the generated and of all training images. It
falls with the number of images and scatters with the noise, so only figures of one table compare,
and each is the mean over several sets of noise, the same ones for all of ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from functools import partial

import numpy as np
import torch
from _common import Results, markdown
from sklearn.decomposition import PCA
from torch import nn

from diffaugkit import EmbeddingConditionedDiffusion
from diffaugkit.datasets import load_digits
from diffaugkit.metrics import frechet_distance

OURS = {
    "ours, DDPM 1000": ("ddpm", 1000),
    "ours, DDIM 250": ("ddim", 250),
    "ours, DDIM 50": ("ddim", 50),
    "ours, DDIM 20": ("ddim", 20),
    "ours, DPM-Solver++ 20": ("dpmsolver++", 20),
    "ours, DPM-Solver++ 10": ("dpmsolver++", 10),
}


def by_diffusers(model, kind, n_steps, n, batch_size, seed):
    """Images of diffusers' own pipeline, in [-1, 1], from the same U-Net."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    unet = model.module_.unet.eval()
    unet.config.sample_size = model.image_shape_[0]
    if kind == "ddpm":
        pipeline = DDPMPipeline(unet, DDPMScheduler(**settings))
    else:
        pipeline = DDIMPipeline(unet, DDIMScheduler(**settings))
    pipeline.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(seed), []
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        out = pipeline(
            batch_size=size, num_inference_steps=n_steps, generator=generator, output_type="np"
        )
        images.append(out.images[..., 0] * 2 - 1)
    return np.concatenate(images)


class _ForPytorchPackage(nn.Module):
    """Our U-Net with the attributes that denoising-diffusion-pytorch asks of a model."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, unet, channels):
        super().__init__()
        self.unet, self.channels, self.out_dim = unet, channels, channels

    def forward(self, x, t, x_self_cond=None):
        return self.unet(x, t).sample


def by_pytorch_package(model, n_steps, n, batch_size, seed):
    """Images of denoising-diffusion-pytorch's DDIM (250 steps is its default), in [-1, 1]."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    process = GaussianDiffusion(
        _ForPytorchPackage(model.module_.unet.eval(), 1),
        image_size=model.image_shape_[0],
        timesteps=1000,
        sampling_timesteps=n_steps,
        objective="pred_v",
        beta_schedule="cosine",
        auto_normalize=False,
    )
    images = []
    torch.manual_seed(seed)
    with torch.inference_mode():
        for start in range(0, n, batch_size):
            images.append(process.sample(min(batch_size, n - start))[:, 0])
    return torch.cat(images).numpy()


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise")
    parser.add_argument("--batch-size", type=int, default=256, help="of the peers")
    parser.add_argument("--precision", default="fp32", help="of ours; the peers' is fp32")
    parser.add_argument("--out", default="sampling_speed.json", help="resumed when it exists")
    args = parser.parse_args()
    names = ("epochs", "images", "batch_size", "precision")
    Results(args.out).settle("samplers", **{name: getattr(args, name) for name in names})
    X, _ = load_digits()
    model = EmbeddingConditionedDiffusion(
        encoder=None, max_epochs=args.epochs, precision=args.precision, random_state=0, verbose=1
    ).fit(X)
    model.set_params(verbose=0)
    real = X.reshape(len(X), -1) / 127.5 - 1
    components = PCA(20, random_state=0).fit(real)
    n, size, results = args.images, args.batch_size, Results(args.out)

    def ours(sampler, n_steps, seed):
        model.set_params(sampler=sampler, n_sampling_steps=n_steps)
        return model.sample(n, random_state=seed) / 127.5 - 1

    samplers = {
        name: (n_steps, partial(ours, sampler, n_steps))
        for name, (sampler, n_steps) in OURS.items()
    }
    for kind, n_steps in (("ddpm", 1000), ("ddim", 50)):
        samplers[f"diffusers' pipeline, {kind.upper()} {n_steps}"] = (
            n_steps,
            partial(by_diffusers, model, kind, n_steps, n, size),
        )
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        for n_steps in (250, 50):
            samplers[f"denoising-diffusion-pytorch, DDIM {n_steps}"] = (
                n_steps,
                partial(by_pytorch_package, model, n_steps, n, size),
            )
    # Noise by noise, so that whatever else the machine does falls on all of them.
    for seed in args.seeds:
        for name, (_, sample) in samplers.items():
            key = f"{name}|{seed}"
            if key in results.read():
                continue
            start = time.perf_counter()
            images = sample(seed=seed)
            rate = n / (time.perf_counter() - start)
            flat = np.asarray(images, np.float64).reshape(n, -1)
            distance = frechet_distance(components.transform(real), components.transform(flat))
            results.add(key, {"rate": rate, "frechet": distance})
            print(f"{key}: {rate:.1f} images/s, Frechet {distance:.4f}", flush=True)

    records = results.read()

    def column(name, field):
        return np.array([records[f"{name}|{seed}"][field] for seed in args.seeds])

    base = next(iter(OURS))
    rows = []
    for name, (n_steps, _) in samplers.items():
        distance, base_distance = column(name, "frechet"), column(base, "frechet")
        faster = np.median(column(name, "rate") / column(base, "rate"))
        rows.append(
            [
                name,
                f"{distance.mean():.4f} ± {distance.std():.4f}",
                f"{100 * (distance.mean() / base_distance.mean() - 1):+.1f} %",
                f"{faster:.1f}",
                f"{faster * n_steps / samplers[base][0]:.2f}",
            ]
        )
    print(f"\n{args.epochs} epochs; {n} images for each of {len(args.seeds)} sets of noise\n")
    header = ["sampler", "Frechet", "against DDPM 1000", "images/s, ratio", "steps/s, ratio"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
