"""Networks and guidance of HistoDiffusion: classifiers that know the noise level, and their pull.

Ye, Ni et al., "Synthetic Augmentation with Large-scale Unconditional Pre-training" (HistoDiffusion,
MICCAI 2023), section 2.2, after Dhariwal and Nichol 2021, "Diffusion Models Beat GANs".

=============  =====================================================================
paper          here
=============  =====================================================================
z_t            `z_t`, vectors (B, D) or latents, pixels (B, C, H, W)
p_phi(y|z_t)   softmax of `LatentClassifier(z_t, t)`
phi~ (Eq. 5)   the auxiliary classifier, a `LatentClassifier` of clean images
g              `scale` of `classifier_guided`
=============  =====================================================================
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit.denoisers import sinusoidal_embedding
from diffaugkit.networks import Linear

__all__ = ["DecoderOf", "GuidedDenoiser", "LatentClassifier", "class_gradient", "classifier_guided"]

_GROUP_WIDTH = 8


class LatentClassifier(nn.Module):
    """Classify samples at any noise level (Eq. 6).

    The network reads sqrt(alpha_bar_t) z_t, the best linear estimate of z_0 from z_t where latents
    have unit spread. So its gradient shrinks with the signal, as that of the true p(y | z_t) does;
    a network that reads z_t itself has a gradient of its own making in pure noise, which a
    v-prediction multiplies by sqrt((1 - alpha_bar_t) / alpha_bar_t), over 10 000 at the start of a
    cosine schedule. Measured on three blobs in 20 dimensions with 24 labelled rows, v-prediction
    and a cosine schedule: guided samples lie within 11 of the origin, as the data do, and up to
    5 500 away if the network reads z_t.

    Images go through residual blocks of diffusers, two per level, with scale and shift from the
    noise level, and a layer that sees all positions; vectors through residual blocks with
    normalisation. Nothing is normalised over the batch, so that a row's gradient is its own. The
    paper pools by attention; from 50 labelled 8 x 8 digits (500 steps) that learned less: accuracy
    on others at t = 0, 300, 500 and 700 of 1 000 was 0.66, 0.59, 0.42 and 0.20, with the layer
    0.86, 0.81, 0.63 and 0.39.

    Parameters
    ----------
    shape : tuple of int
        Shape of one sample: (D,), or (C, H, W).
    n_classes : int
        Number of classes K.
    alpha_bar : Tensor of shape (T,)
        Of the diffusion; ``torch.ones(1)`` makes a classifier of clean samples.
    width : int, default=64
        Half the channels of the levels of up to 64 positions a side; those of finer levels are
        halved each time. Vectors have four times the width.
    timed : bool, default=True
        Whether the network is told the noise level.
    dropout : float in [0, 1), default=0.1
        Dropout in front of the last layer.
    units : array-like that broadcasts to `shape`, or None, default=None
        What the network reads is multiplied by this, as whitened vectors are by the spread of each
        component: where all count the same, few labels teach the noise of the least. On 8 x 8
        digits as rows with five labels a class, accuracy on others at t = 0, 200 and 400 of 1 000
        was 0.66, 0.61 and 0.50 without and 0.74, 0.68 and 0.57 with it.

    Examples
    --------
    >>> import torch
    >>> classifier = LatentClassifier((5,), 3, torch.linspace(1, 0, 10), width=8)
    >>> classifier(torch.randn(4, 5), torch.tensor([0, 1, 5, 9])).shape
    torch.Size([4, 3])
    """

    def __init__(
        self, shape, n_classes, alpha_bar, *, width=64, timed=True, dropout=0.1, units=None
    ):
        super().__init__()
        self.shape = tuple(shape)
        n_embedding = 2 * width if timed else None
        signal = torch.as_tensor(alpha_bar, dtype=torch.float32).sqrt().cpu()
        self.register_buffer("signal", signal, persistent=False)
        units = None if units is None else torch.as_tensor(units, dtype=torch.float32)
        self.register_buffer("units", units, persistent=False)
        if timed:
            table = sinusoidal_embedding(torch.arange(len(signal)), width)
            self.register_buffer("time_table", table, persistent=False)
            self.time_mlp = nn.Sequential(
                Linear(width, n_embedding), nn.SiLU(), Linear(n_embedding, n_embedding)
            )
        if len(self.shape) == 1:
            self.trunk = _VectorTrunk(*self.shape, 4 * width, n_embedding)
        else:
            self.trunk = _ImageTrunk(self.shape, width, n_embedding)
        self.dropout = nn.Dropout(dropout)
        self.head = Linear(self.trunk.n_features, n_classes)
        # The untrained classifier pulls nowhere.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, z_t, t):
        """Features (B, F) in front of the last layer, of samples (B, ...) at timesteps t (B,)."""
        if z_t.shape[1:] != self.shape:
            raise ValueError(
                f"z_t has shape {tuple(z_t.shape)}, this classifier takes {('B', *self.shape)}."
            )
        signal = self.signal[t].view(-1, *[1] * len(self.shape))
        read = signal * z_t if self.units is None else signal * self.units * z_t
        embedding = self.time_mlp(self.time_table[t]) if hasattr(self, "time_mlp") else None
        return self.trunk(read, embedding)

    def forward(self, z_t, t):
        """Logits (B, K) of samples (B, ...) at timesteps t (B,), int64."""
        return self.head(self.dropout(self.features(z_t, t)))


class _VectorTrunk(nn.Module):
    """Two residual blocks h + W2 silu(W1 (LN(h) * scale + shift)), and a normalisation."""

    def __init__(self, n_inputs, width, n_embedding):
        super().__init__()
        self.n_features = width
        self.input = Linear(n_inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width)) for _ in range(2)
        )
        if n_embedding:
            self.modulation = Linear(n_embedding, 4 * width)

    def forward(self, z, embedding):
        h = self.input(z)
        parts = [None] * 4
        if embedding is not None:
            parts = self.modulation(F.silu(embedding)).chunk(4, dim=1)
        for i, block in enumerate(self.blocks):
            normed = self.norms[i](h)
            if embedding is not None:
                normed = normed * (1 + parts[2 * i]) + parts[2 * i + 1]
            h = h + block(normed)
        return F.silu(self.norms[-1](h))


class _ImageTrunk(nn.Module):
    """Residual blocks of diffusers over all levels, then a layer that sees positions.

    Half the width at each level of more than 64 positions a side, as encoders of autoencoders have
    it: of full width, the finest level of a photograph would cost more than all others together.
    From 32 on it would cost accuracy: learned from 54 lung tiles of 64 x 64 pixels (300 steps, one
    seed) it was 0.66, and with full width, in twice the time, 0.72.
    """

    def __init__(self, shape, width, n_embedding):
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        width = _GROUP_WIDTH * max(1, width // _GROUP_WIDTH)
        side, self.n_features = max(shape[1:]), 2 * width
        # Down to 4 to 8 positions a side, or one of the shorter.
        n_levels = min(_doublings(side, 8), int(math.log2(min(shape[1:])))) + 1
        widths = [2 * width] * n_levels
        for level in reversed(range(min(_doublings(side, 64), n_levels - 1))):
            wider = widths[level + 1]
            widths[level] = wider // 2 if wider % (4 * _GROUP_WIDTH) == 0 else wider
        widths = [widths[0] // 2, *widths]
        # Not `norm_groups`, which has fewer for widths such as 24: saved models have these.
        n_groups = widths[0] // 4 if widths[0] <= 128 else math.gcd(32, widths[0])
        self.input = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        blocks = []
        for level in range(n_levels):
            last = level == n_levels - 1
            for step in range(2):
                blocks.append(
                    ResnetBlock2D(
                        in_channels=widths[level] if step == 0 else widths[level + 1],
                        out_channels=widths[level + 1],
                        temb_channels=n_embedding,
                        groups=n_groups,
                        time_embedding_norm="scale_shift" if n_embedding else "default",
                        down=step == 1 and not last,
                    )
                )
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(n_groups, widths[-1])
        self.grid = tuple(max(1, min(8, n >> (n_levels - 1))) for n in shape[1:])
        self.pool = Linear(widths[-1] * self.grid[0] * self.grid[1], self.n_features)

    def forward(self, z, embedding):
        h = self.input(z)
        for block in self.blocks:
            h = block(h, embedding)
        h = F.adaptive_avg_pool2d(F.silu(self.norm(h)), self.grid)  # (B, F, h, w)
        return F.silu(self.pool(h.flatten(1)))


def _doublings(side, least):
    """Count how often `least` doubles before it reaches `side`."""
    return max(0, math.ceil(math.log2(side / least)))


class DecoderOf(nn.Module):
    """Decoder of an autoencoder as a module of its own: all that Eq. 5 trains.

    Parameters
    ----------
    autoencoder : AutoencoderKL or VQModel of diffusers
        Its decoder and the convolution in front of it are this module's parameters, not copies.
    """

    def __init__(self, autoencoder):
        super().__init__()
        self.decoder, self.post_quant_conv = autoencoder.decoder, autoencoder.post_quant_conv
        self._whole = (autoencoder,)  # in a tuple, so that encoder and codebook are not registered

    def forward(self, latents):
        """Images (B, C, H, W) of latents (B, c, h, w) as the encoder gives them, not scaled."""
        return self._whole[0].decode(latents, return_dict=False)[0]


def class_gradient(classifier, z_t, t, y):
    """Gradient of log p(y | z_t) by z_t, row by row, also inside ``torch.no_grad()``.

    Parameters
    ----------
    classifier : callable
        `classifier(z_t, t) -> logits (B, K)`, each row from its own row of `z_t` alone.
    z_t : Tensor of shape (B, ...)
        Noised samples.
    t : Tensor of shape (B,), int64
        Timesteps.
    y : Tensor of shape (B,), int64
        Classes, 0 to K - 1.

    Returns
    -------
    Tensor like `z_t`
        In float32 whatever autocast says, since it is multiplied by large numbers.

    Examples
    --------
    >>> import torch
    >>> def linear(z, t):
    ...     return torch.cat([z, -z], dim=1)
    >>> class_gradient(linear, torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0]))
    tensor([[1.]])
    """
    with torch.enable_grad(), torch.autocast(z_t.device.type, enabled=False):
        z_t = z_t.detach().requires_grad_(True)
        chosen = F.log_softmax(classifier(z_t, t), dim=1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(chosen, z_t)[0]


def classifier_guided(denoiser, classifier, y, scale, diffusion):
    """Denoiser that a classifier pulls to given classes, which samplers never learn of.

    In the form for DDIM (Dhariwal and Nichol 2021, Algorithm 2; Eqs. 7 and 8 of HistoDiffusion):

        eps' = eps - scale sqrt(1 - alpha_bar_t) grad log p(y | z_t)

    with the alpha_bar of the timestep that is asked for. The same change in the other predictions:
    v' = v + (eps' - eps) / sqrt(alpha_bar_t), and the sample moves by
    scale (1 - alpha_bar_t) / sqrt(alpha_bar_t) grad log p. A scale of 0 is the denoiser itself.

    Parameters
    ----------
    denoiser : callable
        `denoiser(z_t, t)`, unconditional, or with a null condition.
    classifier : callable
        `classifier(z_t, t) -> logits (B, K)`.
    y : Tensor of shape (B,), int64
        Class of each row.
    scale : float or Tensor of shape (B,)
        The paper's g: 1 samples from p(z) p(y | z), above 1 classes are exaggerated. A tensor has
        one for each row.
    diffusion : Diffusion
        For its levels and its prediction type.

    Returns
    -------
    callable
        `denoise(z_t, t) -> prediction`.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.denoisers import MLPDenoiser
    >>> from diffaugkit.diffusion import Diffusion, row_noise
    >>> diffusion, denoiser = Diffusion(), MLPDenoiser(n_features=5, width=32)
    >>> classifier = LatentClassifier((5,), 2, diffusion.alpha_bar, width=8)
    >>> guided = classifier_guided(denoiser, classifier, torch.tensor([0, 1]), 1.0, diffusion)
    >>> diffusion.sample(guided, row_noise((5,), seed=0, rows=range(2)), n_steps=4).shape
    torch.Size([2, 5])
    """

    def denoise(z_t, t, cond=None, drop=None):
        prediction = denoiser(z_t, t)
        by_row = scale
        if torch.is_tensor(scale):
            by_row = scale.view(-1, *[1] * (z_t.ndim - 1))
        elif scale == 0:
            return prediction
        signal, sigma = diffusion._level(t, z_t.ndim)
        pull = by_row * sigma * class_gradient(classifier, z_t, t, y)
        if diffusion.prediction_type == "epsilon":
            return prediction.float() - pull
        if diffusion.prediction_type == "v_prediction":
            return prediction.float() - pull / signal
        return prediction.float() + pull * (sigma / signal)

    return denoise


class GuidedDenoiser(nn.Module):
    """`classifier_guided` as a denoiser whose condition is the class: (B, 1), as a number.

    Parameters
    ----------
    denoiser : nn.Module
        Unconditional, or with a null condition.
    classifier : LatentClassifier
        Not a part of the module: it has a precision of its own.
    scale : Tensor of shape (K,)
        The paper's g for each class.
    diffusion : Diffusion
        Of the denoiser.
    """

    def __init__(self, denoiser, classifier, scale, diffusion):
        super().__init__()
        self.denoiser = denoiser
        # Where no class is guided, no gradient is needed.
        self._rest = classifier, scale if scale.any() else None, diffusion

    def forward(self, z_t, t, cond, drop=None):
        """Guided prediction; shapes as in the contract of `diffaugkit.denoisers`."""
        classifier, scale, diffusion = self._rest
        y = cond[:, 0].long()
        by_row = 0.0 if scale is None else scale[y]
        return classifier_guided(self.denoiser, classifier, y, by_row, diffusion)(z_t, t)
