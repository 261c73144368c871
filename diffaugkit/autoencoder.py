"""Autoencoder of images: the latent space of latent diffusion.

The first stage of Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models", section 3.1, which Gen-SIS (VQ), DiNO-Diffusion and HistoDiffusion (KL) build on:

    loss = |x - x'| + w_p d(x, x') + w_r R - lambda w_a D(x')      and for D the hinge loss

    x, x'    image and its reconstruction, in [-1, 1]
    d        distance of features of a given network        Zhang et al. 2018, without its weights
    R        KL divergence to a standard normal, or the commitment to the codebook
    D        judges patches, from step `adversarial_start` on              Isola et al. 2017
    lambda   |grad of the first two terms| / |grad of the last| at the decoder's last layer

Everything is divided by the number of pixel values, so that the weights are those of the paper
whatever the size. Both networks learn in the same step of the one training loop, each from its own
terms: D is frozen in the first line, and sees reconstructions without their gradient in its own.
"""

import copy
import inspect
import math
import warnings
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from diffaugkit.base import (
    Interval,
    StrOptions,
    TorchTransformer,
    Widths,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X
from diffaugkit.diffusion import sample_in_batches
from diffaugkit.image_inputs import check_is_image
from diffaugkit.image_rows import from_unit, to_unit
from diffaugkit.networks import norm_groups
from diffaugkit.runtime import isolated_rng
from diffaugkit.training import auto_epochs

__all__ = ["LatentAutoencoder", "PatchDiscriminator", "adaptive_weight"]

_WIDTHS = (32, 64, 128, 128, 128)
# Rows from which the scale of the latents is estimated.
_SCALE_ROWS = 2_048
# Smallest image that three strided convolutions can judge.
_SMALLEST_JUDGED = 8


class LatentAutoencoder(TorchTransformer):
    """Compress images to small feature maps, and decompress them.

    Parameters
    ----------
    kind : {"kl", "vq"}, default="kl"
        Continuous latents, pulled a little to a standard normal, or latents that the decoder rounds
        to a learned codebook.
    downsampling : int, default=4
        Factor between the sides of image and latents, a power of two. Other sides are padded.
    latent_channels : int or "auto", default="auto"
        Channels of the latents; "auto" is 3 up to a factor of 4, the papers', and 4 beyond, Stable
        Diffusion's.
    block_out_channels : tuple of int or "auto", default="auto"
        Width of each level, one more than factors of two. "auto" is (32, 64, 128, 128, ...), which
        two CPU cores train in minutes; the papers have (128, 256, 512).
    layers_per_block : int, default=1
        Residual blocks per level; the papers have 2.
    n_codes : int, default=512
        VQ: size of the codebook; Gen-SIS has 8192. It starts at latents of training images.
    kl_weight : float, default=1e-6
        KL: weight of the divergence.
    perceptual : None, str or nn.Module, default=None
        Network whose features are compared beside the pixels: a module that gives a tensor (B, C,
        H, W), or a list of them, for images in [-1, 1]; or a tag of timm, with `download=True`,
        which sees each channel as a grey image where there are not three.
    perceptual_weight : float, default=1.0
        Weight of that distance.
    adversarial_start : int or None, default=None
        Step from which a discriminator of patches joins in; None never. HistoDiffusion: 50 001.
    adversarial_weight : float, default=0.5
        Its weight, beside the adaptive one.
    pretrained : str, path-like or None, default=None
        Start from trained weights of diffusers: a local folder, or a name on the Hugging Face hub.
        Size parameters are then read from there, and `max_epochs` "auto" trains no further.
        safetensors only.
    download : bool, default=False
        Whether a name may be looked up on the network; False finds what is already on this machine.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of the images in the rows of a 2-D `X`; one entry may be -1.
    max_epochs : int or "auto", default="auto"
        As many as make 4 000 batches, from 10 to 300; 0 with `pretrained`.
    batch_size : int, default=32
        Images of a batch.
    learning_rate : float, default=1e-3
        Peak rate of AdamW with warm-up and cosine; take 1e-4 for networks of the papers' size.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`. Whatever the precision,
        fitted models encode and decode in float32.

    Attributes
    ----------
    module_ : AutoencoderKL or VQModel of diffusers
    shift_ : ndarray of shape (latent_channels,), float32
        Mean of the latents of the training images.
    scale_ : float
        1 / standard deviation of the centred latents: the scale factor of latent diffusion.
    latent_shape_ : tuple of (int, int, int)
        Channels, height and width of one image's latents.
    image_shape_ : tuple of (int, int, int)
        Height, width and channels.
    history_ : DataFrame
        One row per epoch: epoch, loss, its parts, learning_rate.
    n_iter_ : int
    n_features_in_ : int

    Notes
    -----
    The discriminator normalises by groups of channels, not by batch statistics as the released code
    does: an image's verdict does not depend on the images beside it. Both networks have AdamW with
    its usual betas, there Adam with 0.5 and 0.9.

    Latent diffusion does not centre latents, and takes the deviation of its first batch, or for
    Stable Diffusion the factor 0.18215. Here shift and scale are measured on up to 2 048 training
    images, also those of pretrained weights.

    References
    ----------
    Rombach et al. 2022, section 3.1. Esser et al. 2021, "Taming Transformers", Eq. 7.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from diffaugkit import LatentAutoencoder
    >>> X = load_digits().images[:64] / 16
    >>> autoencoder = LatentAutoencoder(downsampling=2, max_epochs=1, random_state=0).fit(X)
    >>> autoencoder.transform(X).shape, autoencoder.latents(X).shape
    ((64, 48), (64, 3, 4, 4))
    >>> autoencoder.reconstruct(X).shape
    (64, 8, 8)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchTransformer._parameter_constraints,
        "kind": [StrOptions({"kl", "vq"})],
        "downsampling": [Interval(Integral, 1, None, closed="left")],
        "latent_channels": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "block_out_channels": [Widths(), StrOptions({"auto"})],
        "layers_per_block": [Interval(Integral, 1, None, closed="left")],
        "n_codes": [Interval(Integral, 2, None, closed="left")],
        "kl_weight": [Interval(Real, 0, None, closed="left")],
        "perceptual": [str, nn.Module, None],
        "perceptual_weight": [Interval(Real, 0, None, closed="left")],
        "adversarial_start": [Interval(Integral, 0, None, closed="left"), None],
        "adversarial_weight": [Interval(Real, 0, None, closed="left")],
        "pretrained": [str, Path, None],
        "download": ["boolean"],
        "image_shape": [tuple, list, None],
        "max_epochs": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"})],
    }
    _extra_state = ("_config", "_pixel_range", "_layout")

    def __init__(
        self,
        kind="kl",
        downsampling=4,
        *,
        latent_channels="auto",
        block_out_channels="auto",
        layers_per_block=1,
        n_codes=512,
        kl_weight=1e-6,
        perceptual=None,
        perceptual_weight=1.0,
        adversarial_start=None,
        adversarial_weight=0.5,
        pretrained=None,
        download=False,
        image_shape=None,
        max_epochs="auto",
        batch_size=32,
        learning_rate=1e-3,
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.kind = kind
        self.downsampling = downsampling
        self.latent_channels = latent_channels
        self.block_out_channels = block_out_channels
        self.layers_per_block = layers_per_block
        self.n_codes = n_codes
        self.kl_weight = kl_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.adversarial_start = adversarial_start
        self.adversarial_weight = adversarial_weight
        self.pretrained = pretrained
        self.download = download
        self.image_shape = image_shape
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.precision = precision
        self.compile = compile
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None):
        """Train the autoencoder, and measure the scale of its latents.

        Parameters
        ----------
        X : array-like, list, path or Rows
            Images: an array of three or four dimensions, a list of pictures or paths, a folder, or
            a 2-D array with `image_shape`.
        y : None
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that is no images, or a size that does not fit.
        OSError
            If `pretrained` is not found.
        """
        import pandas as pd

        rows = check_X(self, X, reset=True, **self._gate(), ensure_min_samples=2)
        check_is_image(self, rows)
        seed = self._seed()
        with isolated_rng(self._child_seed(seed, 0)):
            networks = self._start(rows)
        steps = -(-len(rows) // min(self.batch_size, len(rows)))
        max_epochs = 0
        if self.max_epochs != "auto" or self.pretrained is None:
            max_epochs = auto_epochs(self.max_epochs, steps, paper=300, most_steps=4_000)
        if not max_epochs and self.pretrained is None:
            raise ValueError(
                "max_epochs=0 keeps the weights of pretrained=, but there are none: random weights "
                "encode nothing."
            )
        history = []
        if max_epochs:
            state = _Fit(self, networks, self._device())
            batches = make_batches(
                rows,
                batch_size=self.batch_size,
                seed=self._child_seed(seed, 1),
                device=self._device(),
            )
            networks, history = self._fit_loop(
                networks,
                state.loss,
                batches,
                seed=seed,
                max_epochs=max_epochs,
                warmup=0.05,
                # Per parameter: what one network's gradient does must not slow the other down.
                grad_clip=1.0,
                clip_each=True,
                after_step=state.after_step,
            )
        self.module_ = networks.autoencoder.eval()
        self.history_, self.n_iter_ = pd.DataFrame(history), len(history)
        self._measure_latents(rows)
        return self

    def transform(self, X):
        """Encode images to latents, flattened.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, n_latents), float32
            Of spread near 1; ``.reshape(-1, *latent_shape_)`` gives what :meth:`latents` gives. An
            image's latents do not depend on the images beside it.
        """
        latents = self.latents(X)
        return latents.reshape(len(latents), -1)

    def latents(self, X):
        """Encode images to latents.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, channels, height, width), float32
        """
        check_is_fitted(self, "module_")
        rows = check_X(self, X, reset=False, **self._gate())
        # Whole batches of the network: the last of each is filled up, at its full cost.
        batches = rows.batches(self._batch_size())
        parts = [self.encode(to_unit(batch, rows.pixel_range)) for _, batch in batches]
        return torch.cat(parts).cpu().numpy()

    def inverse_transform(self, Z):
        """Decode latents to images.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_latents) or (n_samples, c, h, w)
            Latents.

        Returns
        -------
        ndarray
            Images in layout, kind and range of the training images.
        """
        check_is_fitted(self, "module_")
        Z = check_array(Z, dtype=np.float32, input_name="Z", allow_nd=True)
        if Z.shape[1:] not in ((self._n_features_out,), tuple(self.latent_shape_)):
            raise ValueError(
                f"Z has shape {Z.shape}, expected (n, {self._n_features_out}) or "
                f"{('n', *self.latent_shape_)}."
            )
        height, width, _ = self.image_shape_
        images = self.decode(torch.from_numpy(Z).reshape(-1, *self.latent_shape_))
        return from_unit(images[..., :height, :width], self._pixel_range, self._layout)

    def reconstruct(self, X):
        """Encode and decode images.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray
            Images in layout, kind and range of the training images.
        """
        return self.inverse_transform(self.latents(X))

    def score(self, X, y=None):
        """Peak signal-to-noise ratio of the reconstructions.

        Parameters
        ----------
        X : as for ``fit``
        y : None
            Ignored.

        Returns
        -------
        float
            In decibels, 10 log10(peak^2 / mean squared error) over all images, where the peak is
            the width of the pixel range. Higher is better.
        """
        check_is_fitted(self, "module_")
        rows = check_X(self, X, reset=False, **self._gate())
        height, width, _ = self.image_shape_
        total = 0.0
        for _, batch in rows.batches(self._batch_size()):
            unit = to_unit(batch, rows.pixel_range)
            made = self.decode(self.encode(unit))[..., :height, :width].clamp(-1, 1).cpu()
            total += float(((made - unit).double() / 2).square().mean(dim=(1, 2, 3)).sum())
        return -10 * math.log10(max(total / len(rows), 1e-12))

    # ---- on tensors: what diffusion in latents calls ---------------------------------------------

    def encode(self, images):
        """Encode images (B, C, H, W) in [-1, 1] to scaled latents (B, c, h, w), on the device.

        Sides are padded to multiples of the downsampling. KL latents are the mean of their
        distribution, VQ latents those before they are rounded. Takes a tensor or an array of
        floats; images of any other kind are for :meth:`latents`.
        """
        check_is_fitted(self, "module_")
        images = _as_floats("images", images, {1, self._config["in_channels"]})
        shift, scale = self._shift_and_scale()
        return self._in_batches(lambda x: (self._raw_latents(x) - shift) * scale, images)

    def decode(self, latents):
        """Decode scaled latents (B, c, h, w) to images near [-1, 1], padded sides and all.

        Takes a tensor or an array; :meth:`inverse_transform` gives images as `X` had them.
        """
        check_is_fitted(self, "module_")
        latents = _as_floats("latents", latents, {self.latent_shape_[0]})
        shift, scale = self._shift_and_scale()
        channels = self.image_shape_[2]

        def run(z):
            images = self.module_.decode(z / scale + shift, return_dict=False)[0]
            same = images.shape[1] == channels
            return images if same else images.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)

        return self._in_batches(run, latents)

    def latent_shape(self, image_shape):
        """Shape (c, h, w) of the latents of an image (C, H, W); before ``fit`` from parameters."""
        config = getattr(self, "_config", None) or self._make_config(image_shape[0])
        factor = _factor(config)
        name = "vq_embed_dim" if self.kind == "vq" else "latent_channels"
        channels = config.get(name) or config["latent_channels"]
        return (channels, *(-(-side // factor) for side in image_shape[1:]))

    # ---- pieces ----------------------------------------------------------------------------------

    def _gate(self):
        return {"image_shape": self.image_shape, "images": True}

    def _start(self, rows):
        """Networks at the start of training; sets `_config`, from which `_build` makes them."""
        if self.pretrained is not None:
            autoencoder = _load_pretrained(self.kind, self.pretrained, download=self.download)
            names = inspect.signature(type(autoencoder).__init__).parameters
            self._config = {k: v for k, v in autoencoder.config.items() if k in names}
            found = self._config["in_channels"]
            if rows.shape[1] not in (1, found):
                raise ValueError(
                    f"The autoencoder in pretrained={str(self.pretrained)!r} takes {found} "
                    f"channels, but X has {rows.shape[1]}."
                )
        else:
            self._config = self._make_config(rows.shape[1])
            autoencoder = self._build()
        judge = None
        if self.adversarial_start is not None:
            judge = PatchDiscriminator(autoencoder.config["out_channels"], rows.shape[2:])
        networks = _Networks(autoencoder, judge)
        if self.kind == "vq" and self.pretrained is None:
            _spread_codes(autoencoder, rows)
        return networks

    def _make_config(self, n_channels):
        n_levels = self.downsampling.bit_length()
        if self.downsampling != 2 ** (n_levels - 1):
            raise ValueError(f"downsampling={self.downsampling} must be a power of two.")
        widths = self.block_out_channels
        if widths == "auto":
            widths = (*_WIDTHS, *[_WIDTHS[-1]] * n_levels)[:n_levels]
        if len(widths) != n_levels:
            raise ValueError(
                f"block_out_channels={widths!r} must have {n_levels} widths, one for each halving "
                f"up to downsampling={self.downsampling} and one more."
            )
        channels = self.latent_channels
        if channels == "auto":
            channels = 3 if self.downsampling <= 4 else 4
        config = {
            "in_channels": n_channels,
            "out_channels": n_channels,
            "down_block_types": ("DownEncoderBlock2D",) * n_levels,
            "up_block_types": ("UpDecoderBlock2D",) * n_levels,
            "block_out_channels": tuple(int(width) for width in widths),
            "layers_per_block": int(self.layers_per_block),
            "latent_channels": int(channels),
            "norm_num_groups": norm_groups(*widths),
            "mid_block_add_attention": False,
        }
        if self.kind == "vq":
            config["num_vq_embeddings"] = int(self.n_codes)
        return config

    def _build(self):
        return _autoencoder_class(self.kind)(**self._config)

    def _shift_and_scale(self):
        shift = torch.from_numpy(self.shift_).to(self._device())
        return shift[:, None, None], self.scale_

    def _raw_latents(self, images):
        x = _fit_channels(images, self._config["in_channels"])
        out = self.module_.encode(_pad(x, _factor(self._config)))
        return out.latents if self.kind == "vq" else out.latent_dist.mode()

    def _in_batches(self, fn, tensor):
        """Run in batches of one size, the library's, so that a row does not see its neighbours."""
        device = self._device()
        self.module_.to(device).eval()

        def run(index):
            with torch.no_grad():
                return fn(tensor[index].to(device))

        return sample_in_batches(run, len(tensor), batch_size=self._batch_size())

    def _batch_size(self):
        return 8 if self._device().type == "cpu" else 64

    def _measure_latents(self, rows):
        index = np.linspace(0, len(rows) - 1, min(len(rows), _SCALE_ROWS)).astype(np.int64)
        parts = [
            self._in_batches(self._raw_latents, to_unit(rows[part], rows.pixel_range)).cpu()
            for part in np.array_split(index, 1 + len(index) // 64)
        ]
        latents = torch.cat(parts).double()
        mean = latents.mean(dim=(0, 2, 3), keepdim=True)
        self.shift_ = mean.flatten().float().numpy()
        self.scale_ = float(1 / (latents - mean).square().mean().sqrt().clamp(min=1e-6))
        self.latent_shape_ = tuple(latents.shape[1:])

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        return tags

    @property
    def _n_features_out(self):
        return math.prod(self.latent_shape_)


class PatchDiscriminator(nn.Module):
    """Judges whether patches are real (Isola et al. 2017, "pix2pix", section 3.2.2).

    Parameters
    ----------
    n_channels : int
        Channels of the images.
    size : tuple of (int, int)
        Height and width, at least 8: one to three strided convolutions, so that several patches
        are left.
    width : int, default=64
        Channels after the first one, doubled by each.

    Examples
    --------
    >>> import torch
    >>> PatchDiscriminator(3, (32, 32))(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(self, n_channels, size, width=64):
        super().__init__()
        side = min(size)
        if side < _SMALLEST_JUDGED:
            raise ValueError(
                f"adversarial_start needs images of at least {_SMALLEST_JUDGED} pixels a side, X "
                f"has {tuple(size)}: set it to None."
            )
        n_strided = max(1, min(3, int(math.log2(side / 8))))
        layers = [nn.Conv2d(n_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, n_strided + 1):
            stride = 2 if level < n_strided else 1
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, images):
        """Verdicts (B, 1, h, w) on images (B, C, H, W): positive is real."""
        return self.layers(images)


def adaptive_weight(reconstruction, adversarial, weight):
    """Weight at which both losses pull equally at a layer (Esser et al. 2021, Eq. 7).

    Parameters
    ----------
    reconstruction, adversarial : scalar Tensor
        Losses; both graphs are kept.
    weight : Parameter
        Of the decoder's last layer.

    Returns
    -------
    scalar Tensor without gradient
        |grad reconstruction| / (|grad adversarial| + 1e-4), at most 1e4.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> round(adaptive_weight(6 * w.sum(), 2 * w.sum(), w).item(), 3)
    3.0
    """
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    )
    return (of_reconstruction / (of_adversarial + 1e-4)).clamp(max=1e4).detach()


class _Networks(nn.Module):
    """Autoencoder, and discriminator or None, as one module: all that a checkpoint needs."""

    def __init__(self, autoencoder, discriminator):
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        """Reconstructions, and the regulariser per pixel value."""
        if hasattr(self.autoencoder, "quantize"):
            latents = self.autoencoder.encode(images).latents
            return self.autoencoder.decode(latents, return_dict=False)
        posterior = self.autoencoder.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # In a plain order, whatever the memory format: the same noise for the same image.
        noise = torch.randn(mean.shape, device=mean.device)
        latents = mean + torch.exp(0.5 * logvar) * noise
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / images.numel()
        return self.autoencoder.decode(latents, return_dict=False)[0], divergence


class _Fit:
    """Loss of one fit."""

    def __init__(self, estimator, networks, device):
        self.estimator, self.networks = estimator, networks
        self.pixel_range, self.factor = estimator._pixel_range, _factor(estimator._config)
        self.in_channels = estimator._config["in_channels"]
        self.regularizer_weight = 1.0 if estimator.kind == "vq" else estimator.kl_weight
        self.features = _features(estimator, device)
        self.step = None

    def loss(self, images):
        estimator, networks = self.estimator, self.networks
        x = _pad(_fit_channels(to_unit(images, self.pixel_range), self.in_channels), self.factor)
        made, regularizer = networks(x)
        out = {"reconstruction": F.l1_loss(made, x), "regularizer": regularizer}
        fidelity = out["reconstruction"]
        if self.features is not None:
            out["perceptual"] = _feature_distance(self.features, x, made)
            fidelity = fidelity + estimator.perceptual_weight * out["perceptual"]
        loss = fidelity + self.regularizer_weight * regularizer
        if networks.discriminator is not None:
            loss = loss + self._adversarial(x, made, fidelity, out)
        return {"loss": loss, **out}

    def _adversarial(self, x, made, fidelity, out):
        judge = self.networks.discriminator
        if self.step is None:
            self.step = int(self.networks.n_steps)  # once: later looks would wait for the device
        if self.step < self.estimator.adversarial_start:
            # Without a gradient: with one of 0 Adam's second moment would be next to nothing by
            # now, and the first steps several times too long.
            names = ("adversarial", "discriminator", "adaptive_weight")
            out |= dict.fromkeys(names, x.new_zeros(()))
            return 0.0
        frozen = {name: weight.detach() for name, weight in judge.named_parameters()}
        fooling = -functional_call(judge, frozen, (made,)).mean()
        last = self.networks.autoencoder.decoder.conv_out.weight
        weight = adaptive_weight(fidelity, fooling, last)
        hinge = 0.5 * (F.relu(1 - judge(x)).mean() + F.relu(1 + judge(made.detach())).mean())
        out |= {"adversarial": fooling, "discriminator": hinge, "adaptive_weight": weight}
        return self.estimator.adversarial_weight * weight * fooling + hinge

    def after_step(self, step):
        self.networks.n_steps += 1
        if self.step is not None:
            self.step += 1


def _factor(config):
    """Factor between the sides of images and latents."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _pad(images, factor):
    """Repeat the last row and column until the sides are multiples of the factor."""
    height, width = images.shape[2:]
    missing = (0, -width % factor, 0, -height % factor)
    return F.pad(images, missing, mode="replicate") if any(missing) else images


def _as_floats(name, values, channels):
    """Tensor (B, C, H, W), float32, of a tensor or array of floats with so many channels."""
    if not isinstance(values, torch.Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor or an array, got {type(values).__name__}.")
    if values.ndim != 4 or values.shape[1] not in channels:
        c = " or ".join(map(str, sorted(channels)))
        raise ValueError(f"{name} have shape {tuple(values.shape)}, expected (B, {c}, H, W).")
    if "float" not in str(values.dtype):
        raise ValueError(
            f"{name} are {values.dtype}, but must be floats: images in [-1, 1], or latents. For "
            "images as X has them there are latents(X) and reconstruct(X)."
        )
    return torch.as_tensor(values, dtype=torch.float32)


def _fit_channels(images, n_channels):
    """Repeat the channel of grey images for a network that takes colour."""
    return images if images.shape[1] == n_channels else images.expand(-1, n_channels, -1, -1)


def _autoencoder_class(kind):
    if kind == "vq":
        from diffusers.models.autoencoders.vq_model import VQModel

        return VQModel
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def _load_pretrained(kind, source, *, download):
    """Autoencoder from a folder or the hub, float32; a pipeline's folder is searched for it."""
    try:
        with warnings.catch_warnings():
            # Of diffusers' own call of the hub; nothing a user could change.
            warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")
            return _read_pretrained(kind, source, download=download)
    except OSError as error:
        if download or Path(source).expanduser().is_dir():
            raise
        raise OSError(
            f"pretrained={str(source)!r} is not on this machine: if it is a name on the Hugging "
            "Face hub allow its download with download=True, or give a local folder."
        ) from error


def _read_pretrained(kind, source, *, download):
    cls = _autoencoder_class(kind)
    options = {"use_safetensors": True, "local_files_only": not download}
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = folder
        names = () if (folder / "config.json").exists() else ("vae", "vqvae", "movq")
        if found := [name for name in names if (folder / name).is_dir()]:
            options["subfolder"] = found[0]
    found = cls.load_config(
        str(source), **{k: v for k, v in options.items() if k != "use_safetensors"}
    )
    if found.get("_class_name") not in (None, cls.__name__):
        raise ValueError(
            f"pretrained={str(source)!r} holds a {found['_class_name']}, but kind={kind!r} is a "
            f"{cls.__name__}."
        )
    return cls.from_pretrained(str(source), torch_dtype=torch.float32, **options)


@torch.no_grad()
def _spread_codes(autoencoder, rows):
    """Start the codebook at latents of training images: codes far from all would never be used."""
    codes = autoencoder.quantize.embedding.weight
    index = torch.randperm(len(rows))[:256].sort().values.numpy()
    images = _pad(to_unit(rows[index], rows.pixel_range), _factor(autoencoder.config))
    latents = torch.cat([autoencoder.encode(part).latents for part in images.split(32)])
    latents = latents.permute(0, 2, 3, 1).flatten(0, 2)
    picked = latents[torch.randint(len(latents), (len(codes),))]
    codes.copy_(picked + 0.1 * latents.std(dim=0) * torch.randn_like(picked))


def _features(estimator, device):
    """Frozen network whose features are compared, or None."""
    perceptual = estimator.perceptual
    if perceptual is None:
        return None
    if isinstance(perceptual, str):
        if not estimator.download:
            raise ValueError(
                f"perceptual={perceptual!r} names weights of timm, which would be downloaded: "
                "allow it with download=True, or give a module, for example "
                "timm.create_model(..., features_only=True) with weights of your own."
            )
        perceptual = _TimmFeatures(perceptual)
    # A copy: the caller's own may be trained elsewhere.
    return copy.deepcopy(perceptual).to(device).eval().requires_grad_(False)


class _TimmFeatures(nn.Module):
    """Feature maps of a network of timm, for images in [-1, 1]."""

    def __init__(self, tag):
        super().__init__()
        import timm

        with isolated_rng(0):  # weights are drawn before they are loaded
            self.network = timm.create_model(tag, pretrained=True, features_only=True)
        config = self.network.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def forward(self, images):
        if images.shape[1] != 3:
            # The network knows colours; what has other channels is seen as one grey image of each.
            images = images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        return self.network(((images + 1) / 2 - self.mean) / self.std)


def _feature_distance(features, x, made):
    """Mean squared distance of features that have length 1 at each position."""
    with torch.no_grad():
        of_real = features(x)
    of_made = features(made)
    if isinstance(of_real, torch.Tensor):
        of_real, of_made = [of_real], [of_made]
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()
        for a, b in zip(of_real, of_made, strict=True)
    ]
    return torch.stack(distances).mean()
