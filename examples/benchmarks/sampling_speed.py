"""Samplers: images per second, and the Frechet distance that they reach, in one run.

    python sampling_speed.py --out sampling_speed.json

One unconditional U-Net is trained on scikit-learn's digits (8 x 8 pixels); every sampler then walks
with the very same weights: ours (DDPM with 1 000 steps, DDIM, DPM-Solver++), the pipelines of
diffusers (DDPM, DDIM), and the sampling loop of denoising-diffusion-pytorch, where installed. The
Frechet distance is between 20 principal components of as many generated as real images; it falls
with their number, so only figures of one table compare. Noise is one set for all of ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import time

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


def by_diffusers(model, kind, n_steps, n, batch_size):
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
    generator, images = torch.Generator().manual_seed(0), []
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


def by_pytorch_package(model, n_steps, n, batch_size):
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
    with torch.inference_mode():
        for start in range(0, n, batch_size):
            images.append(process.sample(min(batch_size, n - start))[:, 0])
    return torch.cat(images).numpy()


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--batch-size", type=int, default=256, help="of the peers")
    parser.add_argument("--precision", default="fp32", help="of ours; the peers' is fp32")
    parser.add_argument("--out", default="sampling_speed.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    X, _ = load_digits()
    model = EmbeddingConditionedDiffusion(
        encoder=None, max_epochs=args.epochs, precision=args.precision, random_state=0, verbose=1
    ).fit(X)
    # Twice as many images as have a sample: the real half against the other says what noise is.
    real = X[: args.images].reshape(-1, 64) / 127.5 - 1
    components = PCA(20, random_state=0).fit(real)
    results, rows = Results(args.out), []

    def record(name, n_steps, sample):
        start = time.perf_counter()
        images = sample()
        seconds = time.perf_counter() - start
        flat = np.asarray(images, np.float64).reshape(len(images), -1)
        distance = frechet_distance(components.transform(real), components.transform(flat))
        results.add(name, {"steps": n_steps, "rate": len(images) / seconds, "frechet": distance})
        print(f"{name}: {len(images) / seconds:.1f} images/s, Frechet {distance:.4f}", flush=True)

    for name, (sampler, n_steps) in OURS.items():
        model.set_params(sampler=sampler, n_sampling_steps=n_steps, verbose=0)
        record(name, n_steps, lambda: model.sample(args.images, random_state=0) / 127.5 - 1)
    for kind, n_steps in (("ddpm", 1000), ("ddim", 50)):
        record(
            f"diffusers' pipeline, {kind.upper()} {n_steps}",
            n_steps,
            lambda k=kind, s=n_steps: by_diffusers(model, k, s, args.images, args.batch_size),
        )
    if importlib.util.find_spec("denoising_diffusion_pytorch"):
        for n_steps in (250, 50):
            record(
                f"denoising-diffusion-pytorch, DDIM {n_steps}",
                n_steps,
                lambda s=n_steps: by_pytorch_package(model, s, args.images, args.batch_size),
            )

    records = results.read()
    base = records["ours, DDPM 1000"]
    for name, row in records.items():
        rows.append(
            [
                name,
                f"{row['frechet']:.4f}",
                f"{100 * (row['frechet'] / base['frechet'] - 1):+.1f} %",
                f"{row['rate'] / base['rate']:.1f}",
                f"{row['rate'] * row['steps'] / (base['rate'] * base['steps']):.2f}",
            ]
        )
    print(f"\n{args.images} images, U-Net of {model.module_.__class__.__name__}, one run\n")
    header = ["sampler", "Frechet", "against DDPM 1000", "images/s, ratio", "steps/s, ratio"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
