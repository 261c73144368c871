"""Diffusion model conditioned on the embedding of an encoder.

The M-step of DiffAug (Zang et al., arXiv 2309.07909, Eqs. 4 and 6 to 8), the E-LDM of Gen-SIS and
the model of DiNO-Diffusion. Vectors are generated in a compact space, the whitened leading
principal components, because a denoiser that works on thousands of noisy genes returns samples with
several times the data's spread; images as pixels, or as the latents of an autoencoder.

=============  =====================================================================
paper          here
=============  =====================================================================
x              a row of X; inside, its whitened scores, pixels in [-1, 1], or latents
z_c            condition: an encoder's embedding of the row, standardised
delta          noise, one stream per row
Gen(delta, z)  ``sample(embeddings)``; of rows: ``augment(X)``
=============  =====================================================================
"""

import copy
import math
from contextlib import ExitStack
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from diffaugkit.arrays import to_numpy
from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchEstimator,
    TorchTransformer,
    Widths,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X, keep_names_of_rows
from diffaugkit.denoisers import (
    DENOISERS,
    UNetDenoiser,
    check_denoiser,
    check_signature,
    record_attention,
    record_features,
    unet_size,
)
from diffaugkit.diffusion import (
    BETA_SCHEDULES,
    NORMS,
    PREDICTION_TYPES,
    SAMPLERS,
    WEIGHTINGS,
    Diffusion,
    RowNoise,
    sample_in_batches,
)
from diffaugkit.encoder import SelfSupervisedEncoder
from diffaugkit.encoder_fits import FEW_ROWS
from diffaugkit.image_inputs import check_image_shape, is_standard
from diffaugkit.image_rows import ImageRows, from_unit, to_unit
from diffaugkit.metrics import nearest_training_samples
from diffaugkit.metrics.checks import check_labels
from diffaugkit.metrics.quality import own_report, report_rows
from diffaugkit.rows import DenseRows, MappedRows, PickedRows
from diffaugkit.runtime import isolated_rng, mix_seed, progress_bar, resolve_precision
from diffaugkit.spaces import ComponentSpace, CopySpace, LatentSpace, PixelSpace, space_from_state
from diffaugkit.training import auto_epochs

# Embeddings of training rows that are kept, so that ``sample(n)`` has conditions to draw from.
_POOL = 4_096
# What "auto" means, for vectors and for images.
_AUTO = {"batch_size": (300, 64), "learning_rate": (2e-3, 1e-3)}
# Noise on the condition of few vectors, in its standard deviations.
_NOISE_FOR_FEW = 0.3
# Conditions of fewer dimensions keep their length: a direction would say too little.
_FEWEST_DIRECTIONS = 8


class EmbeddingConditionedDiffusion(TorchTransformer):
    """Generate samples from the embedding of a sample, by a conditional diffusion model.

    Parameters
    ----------
    encoder : "auto", estimator or None, default="auto"
        What gives the condition: an estimator with ``transform``. It is cloned and fitted, or used
        as it is inside ``sklearn.frozen.FrozenEstimator``. "auto" is
        ``SelfSupervisedEncoder()`` with the common parameters given here, and `max_epochs` unless
        that is "auto" too; its `batch_size` and `learning_rate` are its own, as networks differ in
        what they want. None makes the unconditional model. Not used where ``fit`` gets
        `embeddings`.
    denoiser : {"auto", "mlp", "diffaug", "unet"} or nn.Module, default="auto"
        "auto" is ``"mlp"`` for vectors, a residual MLP with adaptive normalisation, and ``"unet"``
        for images, diffusers' U-Net conditioned on tokens. ``"diffaug"``: the paper's eight-block
        network for vectors (Listing 2). A module is copied, and has to keep the contract of
        `diffaugkit.denoisers`.
    autoencoder : None or estimator, default=None
        For images: generate the latents of this :class:`~diffaugkit.LatentAutoencoder`, which is
        cloned and fitted, or used as it is inside ``FrozenEstimator``. None generates pixels.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of the images in the rows of a 2-D `X`; one entry may be -1.
    n_pcs : int or None, default=50
        Vectors: width of the compact space. None generates all features, standardised.
    residual_noise : bool, default=True
        Vectors: whether samples get the variance that the compact space leaves out, as noise of
        each feature that is independent of the others and of the space. Without it they are
        smoother than real ones, with half of the variance of scaled genes, and nearer to each
        other. Views for an encoder go without.
    n_timesteps : int, default=1000
        Noise levels, the paper's.
    beta_schedule : {"cosine", "linear", "scaled_linear"}, default="cosine"
        Noise schedule. The paper's is linear.
    prediction_type : {"v_prediction", "epsilon", "sample"}, default="v_prediction"
        What the network predicts. The paper's epsilon gives vectors of too large a spread; with the
        cosine schedule, which multiplies its first error by thousands, a run that nothing bounds
        (vectors, latents) begins where 4 % of the sample's amplitude is left. Measured
        on 14 x 14 digits after 282 steps (Frechet distance in 50 components, two real sets 1.9):
        v 1.4, sample 1.5, epsilon with a linear schedule 2.3, or 3.4 without `clip_sample`.
    loss_weighting : {"uniform", "p2", "min_snr"}, default="uniform"
        Weight of the noise levels. P2 multiplies the error of whatever is predicted; the paper's is
        that of epsilon.
    loss_norm : {"l2", "l1"}, default="l2"
        Squared error, or absolute error, the other choice of HistoDiffusion's pre-training, which
        single pixels far off move less.
    condition_dropout : float, default=0.1
        Share of training rows without condition, for guidance.
    condition_noise : float or "auto", default="auto"
        Standard deviation of noise added to the standardised condition in training and sampling:
        the larger, the farther samples go from their source. "auto" is 0.3 for up to 1 000 vectors
        under embeddings of 8 dimensions or more, which are else given back nearly as they are (copy
        ratios of 0.2 to 0.4; it cost 2 points of labels at most), and 0 for all others and images.
    guidance_scale : float, default=1.0
        Classifier-free guidance: 1 is the conditional model, 0 the unconditional one.
    clip_sample : bool or "auto", default="auto"
        Whether each step's estimate of the sample is clipped to [-1, 1]; "auto" does so for pixels,
        which lie there. It ruins anything else. What it gains is largest for epsilon.
    random_flip : bool, default=False
        Flip half of the images of a batch, left to right, in training. The condition stays that of
        the image as it is, so this suits encoders that do not see the flip. Pixels only.
    sampler : {"dpmsolver++", "ddim", "ddpm"}, default="dpmsolver++"
        From diffusers. The paper's is ddpm with 1 000 steps (in its code with beta_t as variance,
        here with the posterior's); Gen-SIS has ddim with 50.
    n_sampling_steps : int, default=20
        Steps of the sampler, clipped to `n_timesteps`.
    ema_decay : float or None, default=0.999
        Average of the weights, with warm-up, used for sampling. The releases of DiffAug and
        HistoDiffusion have 0.9999, for many more steps; Gen-SIS's has none.
    width, n_blocks : int, default=256 and 4
        Size of the denoiser of vectors; for ``"diffaug"`` the width is that of its hidden layers
        (paper: 2 000) and the number of blocks is fixed.
    block_out_channels : tuple of int or "auto", default="auto"
        Width of each level of the U-Net, each of half the resolution of the one before. "auto" goes
        by the size of the images, and is small enough for two CPU cores: (32, 64) at 8 pixels, (32,
        64, 64) at 28 and 32, (32, 64, 64, 128) at 64. On a GPU take several times that: Gen-SIS has
        (192, 384, 576, 960), with two layers per block.
    layers_per_block, n_attention_levels : int or "auto", default="auto"
        Residual blocks per level, and lowest levels with self-attention; "auto" is one each.
    validation_fraction : float, default=0.0
        Share of rows, in [0, 1), drawn at random, that nothing is learned from: no encoder, compact
        space or autoencoder, and no denoiser; `sample` does not draw their
        embeddings. The history then tells the loss on them, ``validation_loss``, with the averaged
        weights and the same noise each time: where it rises while the loss falls, the model begins
        to know its rows by heart. A frozen encoder, or given `embeddings`, may have seen them. 0
        holds out nothing: few rows are wanted for training.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    max_epochs : int or "auto", default="auto"
        330, the paper's M-step, or as many as make 1 000 batches (images: 2 000) if that is fewer,
        but at least 10. A number also holds for ``encoder="auto"``.
    batch_size : int or "auto", default="auto"
        Vectors 300, the paper's; images 64.
    learning_rate : float or "auto", default="auto"
        Peak rate of AdamW with warm-up and cosine. Vectors 2e-3, images 1e-3; networks much larger
        than the default want less (Gen-SIS: 1e-4).
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`. Encoder and autoencoder
        are resumed too: they keep their checkpoints in folders below `checkpoint_dir`, unless they
        have one of their own.

    Attributes
    ----------
    module_ : nn.Module
        The denoiser's averaged weights.
    encoder_ : estimator or None
        The fitted encoder; None if `embeddings` were given or there is none.
    autoencoder_ : LatentAutoencoder or None
        The fitted autoencoder.
    image_shape_ : tuple of (int, int, int) or None
        Height, width and channels; None for vectors.
    history_ : DataFrame
        One row per epoch: epoch, loss, learning_rate, and validation_loss where rows were held out.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray, only if the names are strings

    Notes
    -----
    Images keep their kind: uint8 gives uint8, floats give floats in the range of the training data,
    in the layout of the training data. Latents are encoded once, before training.

    Each column of the embeddings is standardised first, by the statistics of the training rows;
    then the U-Net brings each token to one length, from 8 dimensions on. Gen-SIS normalises the
    embedding as it is.

    References
    ----------
    Zang et al., arXiv 2309.07909, Eqs. 4, 6 to 8 and Listing 2. Belagali, Yellapragada et al.,
    Gen-SIS. "DiNO-Diffusion: Scaling Medical Diffusion Models via Self-Supervised Pre-Training". Ho
    et al. 2020, DDPM. Ho and Salimans 2022, classifier-free guidance.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit import EmbeddingConditionedDiffusion
    >>> X, _ = load_iris(return_X_y=True)
    >>> diffusion = EmbeddingConditionedDiffusion(max_epochs=2, width=32, random_state=0)
    >>> diffusion = diffusion.fit(X, embeddings=X)
    >>> diffusion.sample(X[:3]).shape, diffusion.sample(5).shape
    ((3, 4), (5, 4))
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchTransformer._parameter_constraints,
        "encoder": [HasMethods(["fit", "transform"]), StrOptions({"auto"}), None],
        "denoiser": [StrOptions({"auto", "unet", *DENOISERS}), nn.Module],
        "autoencoder": [HasMethods(["fit", "encode", "decode"]), None],
        "image_shape": [tuple, list, None],
        "n_pcs": [Interval(Integral, 1, None, closed="left"), None],
        "residual_noise": ["boolean"],
        "n_timesteps": [Interval(Integral, 2, None, closed="left")],
        "beta_schedule": [StrOptions(set(BETA_SCHEDULES))],
        "prediction_type": [StrOptions(set(PREDICTION_TYPES))],
        "loss_weighting": [StrOptions(set(WEIGHTINGS))],
        "loss_norm": [StrOptions(set(NORMS))],
        "condition_dropout": [Interval(Real, 0, 1, closed="left")],
        "condition_noise": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "guidance_scale": [Interval(Real, 0, None, closed="left")],
        "clip_sample": ["boolean", StrOptions({"auto"})],
        "random_flip": ["boolean"],
        "sampler": [StrOptions(set(SAMPLERS))],
        "n_sampling_steps": [Interval(Integral, 1, None, closed="left")],
        "ema_decay": [Interval(Real, 0, 1, closed="left"), None],
        "width": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "block_out_channels": [Widths(), StrOptions({"auto"})],
        "layers_per_block": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "n_attention_levels": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"})],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "layer": [str, None],
        **{
            name: [*TorchTransformer._parameter_constraints[name], StrOptions({"auto"})]
            for name in ("max_epochs", "batch_size", "learning_rate")
        },
    }
    _extra_state = (
        "_space",
        "_condition",
        "_pool",
        "_sampling_seed",
        "_pixel_range",
        "_layout",
    )
    _used_later = ("guidance_scale", "clip_sample", "sampler", "n_sampling_steps")

    def __init__(
        self,
        encoder="auto",
        denoiser="auto",
        autoencoder=None,
        *,
        image_shape=None,
        n_pcs=50,
        residual_noise=True,
        n_timesteps=1000,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        loss_weighting="uniform",
        loss_norm="l2",
        condition_dropout=0.1,
        condition_noise="auto",
        guidance_scale=1.0,
        clip_sample="auto",
        random_flip=False,
        sampler="dpmsolver++",
        n_sampling_steps=20,
        ema_decay=0.999,
        width=256,
        n_blocks=4,
        block_out_channels="auto",
        layers_per_block="auto",
        n_attention_levels="auto",
        validation_fraction=0.0,
        layer=None,
        max_epochs="auto",
        batch_size="auto",
        learning_rate="auto",
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.encoder = encoder
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.image_shape = image_shape
        self.n_pcs = n_pcs
        self.residual_noise = residual_noise
        self.n_timesteps = n_timesteps
        self.beta_schedule = beta_schedule
        self.prediction_type = prediction_type
        self.loss_weighting = loss_weighting
        self.loss_norm = loss_norm
        self.condition_dropout = condition_dropout
        self.condition_noise = condition_noise
        self.guidance_scale = guidance_scale
        self.clip_sample = clip_sample
        self.random_flip = random_flip
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.ema_decay = ema_decay
        self.width = width
        self.n_blocks = n_blocks
        self.block_out_channels = block_out_channels
        self.layers_per_block = layers_per_block
        self.n_attention_levels = n_attention_levels
        self.validation_fraction = validation_fraction
        self.layer = layer
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

    @_fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit(self, X, y=None, *, embeddings=None):
        """Fit the encoder, unless embeddings are given, and then the denoiser.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or Rows of shape (n_samples, n_features)
            Normalised values; raw counts are refused (put ``CellPreprocessor()`` in front). Or
            images: an array of three or four dimensions, a list of pictures or paths, a folder, or
            a 2-D array with `image_shape`.
        y : array-like of shape (n_samples,) or None
            Handed to the encoder; ours ignores it.
        embeddings : array-like of shape (n_samples, [n_tokens,] n_embedding_features) or None
            Conditions, row by row; the encoder is then neither fitted nor used. Several tokens
            need the U-Net.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, or embeddings of another length.
        """
        rows = check_X(
            self,
            X,
            reset=True,
            layer=self.layer,
            image_shape=self.image_shape,
            images=True,
            allow_counts=False,
            ensure_min_samples=2,
            ensure_min_features=2,
        )
        seed = self._seed()
        encoder = None
        train, held = self._hold_out(len(rows), seed)
        self._check_parts(rows, embeddings is not None or self.encoder is not None)
        if embeddings is None and self.encoder is not None:
            encoder = self._make_encoder(seed)
            learned = rows if held is None else PickedRows(rows, train)
            given = _as_given(encoder, learned)
            if y is not None and held is not None:
                y = _safe_indexing(y, train)
            self._fit_part(encoder, "encoder", given, y)
            given = given if held is None else _as_given(encoder, rows)
            embeddings = encoder.transform(given)
        validation = None
        if held is None:
            state = self._prepare(rows, embeddings, seed=seed)
        else:
            if embeddings is not None:
                embeddings = _check_embeddings(embeddings)
                _check_one_each(embeddings, rows)
            parts = [None if embeddings is None else embeddings[k] for k in (train, held)]
            state = self._prepare(PickedRows(rows, train), parts[0], seed=seed)
            validation = state.held_out(PickedRows(rows, held), parts[1])
        module, history = self._fit_loop(
            state.module,
            state.loss,
            state.batches,
            seed=seed,
            max_epochs=self._epochs(state),
            learning_rate=self._size("learning_rate", state.is_image),
            warmup=0.05,
            grad_clip=1.0,
            ema_decay=self.ema_decay,
            validation=validation,
        )
        self.encoder_ = encoder
        return self._set_fitted(state, module, history)

    @keep_names_of_rows
    def transform(self, X):
        """Embed samples with the fitted encoder.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, n_embedding_features)

        Raises
        ------
        ValueError
            If the model was fitted on given embeddings, or has no encoder.
        """
        check_is_fitted(self, "module_")
        return self._embed(self._check_rows(X))

    def sample(self, n_or_embeddings=1, *, random_state=None):
        """Generate samples.

        Parameters
        ----------
        n_or_embeddings : int or array-like of shape (n, n_embedding_features), default=1
            How many to draw, each under the embedding of a random training sample; or the
            embeddings, or tokens, to draw under, one sample each.
        random_state : int, RandomState, Generator or None, default=None
            Seed of the noise. Noise belongs to the row: the sample of row i is the same whatever
            the number of rows. None takes the seed of the fit, so that calls repeat; a generator of
            NumPy gives, and moves to, its next number.

        Returns
        -------
        ndarray of shape (n, n_features), float32; or of n images as `X` had them
            In the space of `X`.
        """
        check_is_fitted(self, "module_")
        seed = call_seed(random_state, self._sampling_seed)
        embeddings = self._conditions(n_or_embeddings, seed)
        n = int(n_or_embeddings) if embeddings is None else len(embeddings)
        latents = self._sample_latents(embeddings, n, seed)
        space = self._space_of()
        return space.output(space.decode(latents, seed))

    def augment(self, X, n_per_sample=1, *, strength=1.0, random_state=None):
        """Generate new samples that share the embedding of given ones (Eq. 8 of the paper).

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)
            Sources.
        n_per_sample : int, default=1
            Generated samples per source.
        strength : float in (0, 1], default=1.0
            Noise level at which generation starts from the source: 1 starts from noise alone,
            lower values stay closer to the source (partial noising).
        random_state : int, RandomState, Generator or None, default=None
            As for :meth:`sample`.

        Returns
        -------
        ndarray of shape (n_samples * n_per_sample, n_features), float32; or as many images
            All samples of the first source, then of the second, and so on:
            ``np.repeat(np.arange(n_samples), n_per_sample)`` gives the source of each.

        Raises
        ------
        ValueError
            For input that does not match that of ``fit``, or an unconditional model with
            ``strength=1``: from noise alone it makes samples of no source, see :meth:`sample`.
        """
        check_is_fitted(self, "module_")
        if self._condition is None and strength == 1:
            raise ValueError(
                "The model is unconditional (encoder=None): from noise alone its samples have no "
                "source. Take sample(n), strength below 1, which starts from the source, or a "
                "model with an encoder."
            )
        rows = self._check_rows(X)
        embeddings = None if self._condition is None else self._embed(rows)
        return self._augment(rows, embeddings, n_per_sample, strength, random_state)

    def interpolate(self, X_a, X_b, alpha=0.5, *, kind="slerp", random_state=None):
        """Generate samples under embeddings between those of two sets of samples.

        Parameters
        ----------
        X_a, X_b : as for ``fit``, of shape (n_samples, n_features)
            Ends, row by row.
        alpha : float or array-like of shape (n_samples,), default=0.5
            Share of `X_a`, in [0, 1].
        kind : {"slerp", "lerp"}, default="slerp"
            Spherical or straight path, per row.
        random_state : int, RandomState, Generator or None, default=None
            As for :meth:`sample`.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float32; or as many images
        """
        a, b = self.transform(X_a), self.transform(X_b)
        return self.sample(interpolate_rows(a, b, alpha, kind), random_state=random_state)

    def quality_report(self, X, labels=None, *, random_state=0):
        """Compare one generated sample per row of `X` with `X`; of many rows, for 2 000 of them.

        Vectors are compared in the compact space; images in the embeddings of the model's own
        encoder, or without one on 50 principal components of the pixels. Samples of an
        unconditional model have no source, and so no labels: of each the nearest real sample is
        taken for the copy ratio.

        Parameters
        ----------
        X : as for ``fit``
            Real samples, sources of the generated ones.
        labels : array-like of shape (n_samples,) or None, default=None
            Labels, for their consistency.
        random_state : int, RandomState, Generator or None, default=0
            Seed of the draw of rows, of noise and folds; None is that of the fit.

        Returns
        -------
        QualityReport
            See :func:`~diffaugkit.metrics.quality_report`; `n_generated` is the number of samples.
        """
        check_is_fitted(self, "module_")
        rows = self._check_rows(X)
        embeddings = None if self._condition is None else self._embed(rows)
        return self._report(rows, embeddings, labels, random_state)

    def attention_maps(self, X, *, t="auto", conditional=False):
        """Self-attention of the U-Net on images, from which regions can be read (DiffSeg).

        Parameters
        ----------
        X : as for ``fit``
            Images. They are fed as they are, without noise.
        t : int or "auto", default="auto"
            Timestep that the network is told; "auto" is three tenths of the noise levels, 300 of
            1 000, as in DiffSeg.
        conditional : bool, default=False
            Under the embedding of each image; False is the null condition, as in DiffSeg.

        Returns
        -------
        dict of (int, int) to ndarray of shape (n_samples, N, N), float32
            By resolution (rows, columns), N = rows * columns: the mean over layers and heads. Row i
            holds where position i looks to, and sums to 1. What was padded is left out.

        Raises
        ------
        ValueError
            For vectors, or a timestep out of range.
        TypeError
            If the denoiser has no attention.
        """
        maps = []
        for module, shape, found in self._look(X, t, conditional, record_attention):
            maps.append(_mean_maps(found.self_attention, module.multiple, shape))
        return {size: np.concatenate([part[size] for part in maps]) for size in maps[0]}

    def feature_maps(self, X, *, t="auto", conditional=False):
        """Features of the U-Net at each place of images: what pixels are, without labels.

        The way up of a denoiser knows which pixels belong together, as a classifier of pixels that
        learns from a handful of masks shows (Baranchuk et al. 2022, "Label-efficient semantic
        segmentation with diffusion models", arXiv 2112.03126).

        Parameters
        ----------
        X, t, conditional
            As of :meth:`attention_maps`. The middle of the noise levels serves best: on glands
            (GlaS, k-means into two) 200 and 300 of 1 000 were 2 points of Dice above 50.

        Returns
        -------
        list of ndarray of shape (n_samples, channels, rows, columns), float32
            One per block of the way up, the coarsest resolution first, the last one that of the
            images or latents. What was padded is left out.

        Raises
        ------
        ValueError
            For vectors, or a timestep out of range.
        TypeError
            If the denoiser is no U-Net.
        """
        blocks = []
        for module, shape, found in self._look(X, t, conditional, record_features):
            kept = (_without_padding(block.shape[2:], module.multiple, shape) for block in found)
            blocks.append(
                [
                    block[:, :, :rows, :columns].float().cpu().numpy()
                    for block, (rows, columns) in zip(found, kept, strict=True)
                ]
            )
        return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]

    def _look(self, X, t, conditional, record):
        """Send images through the U-Net without noise: module, size inside, what was recorded."""
        check_is_fitted(self, "module_")
        rows = self._check_rows(X)
        if self.image_shape_ is None:
            raise ValueError("The U-Net of images is read; this model has vectors.")
        t = int(0.3 * self.n_timesteps) if t == "auto" else t
        if not (isinstance(t, Integral) and 0 <= t < self.n_timesteps):
            raise ValueError(f"t={t!r} must be an int in [0, n_timesteps={self.n_timesteps}).")
        embeddings = None
        if conditional:
            self._need_condition()
            embeddings = standardise(self._embed(rows), self._condition)
        device, space = self._device(), self._space_of()
        module = self.module_.to(device).eval()
        inputs = space.encode(rows)
        for part in rows.slices(16):
            x = space.inside(inputs[part].to(device))
            cond = None if embeddings is None else torch.from_numpy(embeddings[part]).to(device)
            with torch.no_grad(), record(module) as found:
                module(x, torch.full((len(x),), t, device=device), cond)
            yield module, space.shape[1:], found

    def loss_by_timestep(self, X, *, embeddings=None, n_bins=10):
        """Denoising loss in equal bins of the timestep: where the generator is good or too good.

        Compare rows of the fit with held-out ones: where the first lose much less, the model knows
        them by heart. Compare models only with the same `prediction_type` and data.

        Parameters
        ----------
        X : as for ``fit``
        embeddings : array-like of shape (n_samples, [n_tokens,] n_embedding_features) or None
            Conditions of a model that was fitted on given ones; None takes those of its encoder.
        n_bins : int, default=10
            Number of bins, at most `n_timesteps`; each row is used once in each, with the same
            noise in every call.

        Returns
        -------
        DataFrame of n_bins rows
            ``timestep``, the first of the bin, from the smallest noise on; ``loss``, the mean
            squared error of what the network predicts, unweighted.

        Raises
        ------
        ValueError
            For input that does not match that of the fit, or missing embeddings.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from diffaugkit import EmbeddingConditionedDiffusion
        >>> X, _ = load_iris(return_X_y=True)
        >>> model = EmbeddingConditionedDiffusion(None, max_epochs=5, random_state=0).fit(X[::2])
        >>> model.loss_by_timestep(X[1::2], n_bins=4)["timestep"].tolist()
        [0, 250, 500, 750]
        """
        import pandas as pd

        check_is_fitted(self, "module_")
        rows = self._check_rows(X)
        if not (isinstance(n_bins, Integral) and 1 <= n_bins <= self.n_timesteps):
            raise ValueError(f"n_bins={n_bins!r} must be an int in [1, {self.n_timesteps}].")
        if embeddings is None and self._condition is not None:
            embeddings = self._embed(rows)
        if embeddings is not None:
            self._need_condition()
            check_consistent_length(embeddings, range(len(rows)))
            embeddings = standardise(_check_embeddings(embeddings), self._condition)
        device, space, diffusion = self._device(), self._space_of(), self._diffusion()
        module, inputs = self.module_.to(device), space.encode(rows)
        generator, total = torch.Generator().manual_seed(0), 0.0
        for part in rows.slices(256):
            x = space.inside(inputs[part].to(device))
            cond = None if embeddings is None else torch.from_numpy(embeddings[part]).to(device)
            losses = diffusion.loss_by_timestep(module, x, cond, n_bins, generator)
            total += len(x) * losses.double().numpy()
        first = [i * self.n_timesteps // n_bins for i in range(n_bins)]
        return pd.DataFrame({"timestep": first, "loss": total / len(rows)})

    def _check_rows(self, X, image_shape=None):
        return check_X(
            self,
            X,
            reset=False,
            layer=self.layer,
            image_shape=image_shape or self.image_shape,
            images=True,
            allow_counts=False,
        )

    def _need_condition(self):
        if self._condition is None:
            raise ValueError("This model is unconditional: it has no embeddings.")

    def _embed(self, rows):
        if self.encoder_ is None:
            raise ValueError(
                "This model has no encoder of its own: it was fitted on given embeddings or with "
                "encoder=None. Embed X yourself and call sample(embeddings)."
            )
        return embed_rows(self.encoder_, rows)

    def _size(self, name, is_image):
        value = getattr(self, name)
        return _AUTO[name][is_image] if value == "auto" else value

    def _epochs(self, state):
        steps = state.batches.steps_per_epoch
        return auto_epochs(self.max_epochs, steps, most_steps=2_000 if state.is_image else 1_000)

    def _make_encoder(self, seed):
        if self.encoder == "auto":
            encoder = SelfSupervisedEncoder(layer=self.layer, image_shape=self.image_shape)
            if self.max_epochs != "auto":
                encoder.set_params(max_epochs=self.max_epochs)
            self._hand_over(encoder)
        else:
            encoder = clone(self.encoder)
        if not isinstance(encoder, FrozenEstimator):
            # One seed makes the whole fit repeatable, as a resumed run has to be.
            self._seed_part(encoder, seed, 0)
        return encoder

    def _check_parts(self, rows, conditional):
        """Refuse parts that do not fit the data, before any of them is trained."""
        if isinstance(self.denoiser, nn.Module):
            check_signature(self.denoiser, conditional)
        else:
            self._denoiser_name(rows.is_image)  # refuses one for other data
        if self.autoencoder is None:
            return
        if not rows.is_image:
            raise ValueError("autoencoder is for images; vectors are compressed by n_pcs.")
        if self.random_flip:
            raise ValueError(
                "random_flip=True flips pixels, but latents are encoded once, before training: "
                "take autoencoder=None, or give X the flipped images as further rows."
            )
        if isinstance(self.autoencoder, FrozenEstimator):
            check_is_fitted(self.autoencoder.estimator)
            known = self.autoencoder.estimator.image_shape_
            if rows.shape[1] != known[2]:
                raise ValueError(
                    f"X has {rows.shape[1]} channels, but the autoencoder was fitted on {known[2]}."
                )
        elif getattr(self.autoencoder, "pretrained", "unknown") is None:
            clone(self.autoencoder).latent_shape(rows.shape[1:])  # refuses what does not fit

    def _denoiser_name(self, is_image):
        name = self.denoiser
        if name == "auto":
            return "unet" if is_image else "mlp"
        if is_image != (name == "unet"):
            accepted = "'auto', 'unet'" if is_image else "'auto', 'mlp', 'diffaug'"
            raise ValueError(
                f"denoiser={name!r} does not take {'images' if is_image else 'vectors'}: use "
                f"{accepted} or a module."
            )
        return name

    # ---- pieces that DiffAugEM shares ------------------------------------------------------------

    def _augment(self, rows, embeddings, n_per_sample, strength, random_state):
        if not isinstance(n_per_sample, Integral) or n_per_sample < 1:
            raise ValueError(f"n_per_sample={n_per_sample!r} must be an integer of at least 1.")
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r} must be in (0, 1].")
        seed = call_seed(random_state, self._sampling_seed)
        space = self._space_of()
        views = []
        for view in range(n_per_sample):
            own = mix_seed(seed, view)
            latents = self._sample_latents(embeddings, len(rows), own, rows, strength)
            views.append(space.decode(latents, own))
        return space.output(torch.stack(views, dim=1).flatten(0, 1))

    def _views(self, embeddings, n_views, seed):
        """Generate views of the training rows: Rows that an encoder takes as positives.

        Vectors are decoded batch by batch as they are read; images are kept as the caller's were.
        """
        space = self._space_of()
        for view in range(n_views):
            latents = self._sample_latents(embeddings, len(embeddings), mix_seed(seed, view))
            if self.image_shape_ is None:
                yield MappedRows(DenseRows(latents), self._decode, len(space.mean))
            else:
                yield self._image_rows(space.output(space.decode(latents)))

    def _report(self, rows, embeddings, labels, random_state):
        if labels is not None:  # refused before all is generated
            check_labels(labels, n=len(rows), name="labels")
        seed = call_seed(random_state, self._sampling_seed)
        source = report_rows(len(rows), seed)
        if embeddings is not None:
            embeddings = np.asarray(embeddings)[source]
        latents = self._sample_latents(embeddings, len(source), seed)
        if self.image_shape_ is not None:
            features = self._image_features(rows, latents)
        else:
            spread = self._space["std"]
            features = np.asarray(self._latents(rows)) * spread, latents.numpy() * spread
        if embeddings is None:
            source, labels = nearest_training_samples(*features)[1], None
        return own_report(*features, source, labels, seed)

    def _image_features(self, rows, latents):
        space = self._space_of()
        generated = self._image_rows(space.output(space.decode(latents)))
        if self.encoder_ is not None:
            # Several tokens are compared side by side.
            return [self._embed(part).reshape(len(part), -1) for part in (rows, generated)]
        pixels = CopySpace(rows, space)
        return [pixels.of(part) for part in (rows, generated)]

    def _prepare(self, rows, embeddings, *, seed):
        return _Fit(self, rows, embeddings, seed)

    def _set_fitted(self, state, module, history):
        import pandas as pd

        self._space, self._condition, self._pool = state.space.state(), state.condition, state.pool
        self.autoencoder_ = state.autoencoder
        self.image_shape_, self._pixel_range, self._layout = state.image
        self._sampling_seed = self._child_seed(state.seed, 2)
        # As a loaded module is, and an average is not: autocast keeps no casts of the latter.
        self.module_ = module.requires_grad_(True)
        self.history_ = pd.DataFrame(history)
        self.n_iter_ = len(history)
        return self

    def _build(self):
        n_condition = 0 if self._condition is None else self._condition["mean"].shape[-1]
        return self._make_module(self._space_of().shape, n_condition)

    def _make_module(self, shape, n_condition):
        if isinstance(self.denoiser, nn.Module):
            return copy.deepcopy(self.denoiser)
        name = self._denoiser_name(len(shape) == 3)
        if name == "unet":
            size = unet_size(shape)
            size |= {key: getattr(self, key) for key in size if getattr(self, key) != "auto"}
            normalize = n_condition >= _FEWEST_DIRECTIONS
            return UNetDenoiser(shape[0], n_condition, normalize=normalize, **size)
        size = {"n_blocks": self.n_blocks} if name == "mlp" else {}
        return DENOISERS[name](
            *shape, n_condition, width=self.width, n_timesteps=self.n_timesteps, **size
        )

    def _space_of(self):
        return space_from_state(self._space, self.autoencoder_)

    def _diffusion(self):
        return Diffusion(self.n_timesteps, self.beta_schedule, prediction_type=self.prediction_type)

    def _latents(self, rows):
        return self._space_of().encode(rows)

    def _decode(self, latents):
        return self._space_of().decode(latents)

    def _image_rows(self, images):
        """Rows of generated images, as the gate would make them."""
        return ImageRows(
            images,
            image_shape=self.image_shape_,
            layout=self._layout,
            pixel_range=self._pixel_range,
        )

    def _laid_out(self, samples, layout):
        """Give generated images another layout: a frozen model may have seen them in its own."""
        if self.image_shape_ is None or self._layout == layout:
            return samples
        rows = self._image_rows(samples)
        return from_unit(to_unit(rows[:], rows.pixel_range), rows.pixel_range, layout)

    def _conditions(self, n_or_embeddings, seed):
        """Embeddings to draw under, or None for the unconditional model."""
        if isinstance(n_or_embeddings, Integral):
            if n_or_embeddings < 1:
                raise ValueError(f"n={n_or_embeddings} must be at least 1.")
            if self._condition is None:
                return None
            rng = np.random.default_rng(mix_seed(seed, 1))
            return self._pool[rng.integers(len(self._pool), size=int(n_or_embeddings))]
        if self._condition is None:
            raise ValueError("This model is unconditional: give sample() a number, not embeddings.")
        return _check_embeddings(n_or_embeddings)

    def _sample_latents(self, embeddings, n, seed, rows=None, strength=1.0):
        """Draw samples inside the space; row i draws from its own stream whatever n is."""
        device = self._device()
        module, diffusion = self.module_.to(device).eval(), self._diffusion()
        if device.type == "cuda":
            _channels_last(module)
        space = self._space_of()
        is_image = len(space.shape) == 3
        n_steps = min(self.n_sampling_steps, self.n_timesteps)
        clip = (1.0 if self.clip_sample else None) if self.clip_sample != "auto" else space.clip
        if embeddings is not None:
            embeddings = standardise(np.asarray(embeddings, np.float32), self._condition)
            blur = self.condition_noise
            if blur == "auto":
                blur = self._condition.get("noise", 0.0)  # models saved before have none
        start = None if rows is None or strength >= 1 else space.encode(rows)
        # One fixed size for all calls, the library's: it is what makes a row's sample its own.
        batch_size = space.sampling_batch(device)

        def run(index):
            noise = RowNoise(space.shape, seed, index)
            cond = None
            if embeddings is not None:
                cond = torch.from_numpy(embeddings[index])
                if blur:
                    drawn = RowNoise(cond.shape[1:], mix_seed(seed, 2), index)
                    cond = cond + blur * drawn()
                cond = cond.to(device)
            with torch.no_grad():
                return diffusion.sample(
                    module,
                    noise().to(device),
                    cond,
                    n_steps=n_steps,
                    sampler=self.sampler,
                    guidance_scale=self.guidance_scale,
                    x_start=None if start is None else space.inside(start[index].to(device)),
                    strength=strength,
                    step_noise=noise,
                    clip=clip,
                    progress=bar.update,
                ).cpu()

        steps = len(diffusion.timesteps(n_steps, strength))
        with ExitStack() as stack:
            total = math.ceil(n / batch_size) * steps
            description = f"{getattr(self, '_description', '')} sampling".strip()
            bar = stack.enter_context(
                progress_bar(self.verbose, total, description, "step", leave=False)
            )
            if is_image and resolve_precision(self.precision, device, module) == "bf16":
                # One for all steps, as it keeps the weights that it has cast.
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            return sample_in_batches(run, n, batch_size=batch_size)

    @property
    def _n_features_out(self):
        return self._pool.shape[-1]  # any encoder's; a model without has none


class _Fit:
    """Module, batches and loss of one fit of a diffusion model."""

    def __init__(self, estimator, rows, embeddings, seed):
        self.estimator, self.seed = estimator, seed
        self.is_image = rows.is_image
        self.condition = self.pool = None
        n_condition = 0
        if embeddings is not None:
            embeddings = _check_embeddings(embeddings)
            _check_one_each(embeddings, rows)
            if embeddings.ndim == 3 and not self.is_image:
                raise ValueError(
                    f"embeddings have shape {embeddings.shape}: several tokens per row need the "
                    "U-Net of images. For vectors, join them: embeddings.reshape(len(X), -1)."
                )
            self.look_at(rows, embeddings)
            embeddings = standardise(embeddings, self.condition)
            n_condition = embeddings.shape[-1]
        self.space, self.autoencoder, self.image = self._make_space(rows)
        device = estimator._device()
        with isolated_rng(estimator._child_seed(seed, 1)):
            self.module = estimator._make_module(self.space.shape, n_condition)
            if isinstance(estimator.denoiser, nn.Module):
                cond = None if embeddings is None else torch.from_numpy(embeddings[:2])
                two = torch.zeros(2, *self.space.shape)
                check_denoiser(self.module, two, estimator.n_timesteps, cond)
        if device.type == "cuda":
            _channels_last(self.module)
        self.diffusion = estimator._diffusion()
        self.batches = make_batches(
            self.space.encode(rows),
            embeddings,
            batch_size=estimator._size("batch_size", self.is_image),
            seed=estimator._child_seed(seed, 2),
            device=device,
        )

    def held_out(self, rows, embeddings):
        """Batches of rows that none of this was learned from."""
        if embeddings is not None:
            embeddings = standardise(embeddings, self.condition)
        return make_batches(
            self.space.encode(rows),
            embeddings,
            batch_size=self.batches.batch_size,
            seed=self.batches.seed,
            device=self.batches.device,
        )

    def look_at(self, rows, embeddings):
        """Measure how to standardise the embeddings, and keep some to draw under."""
        # In double precision: over many rows far from 0 nothing would be left of the spread.
        mean, spread = (f(embeddings, axis=0, dtype=np.float64) for f in (np.mean, np.std))
        spread = np.where(spread > 1e-6 * np.abs(mean), spread, 1)
        self.condition = {
            "mean": mean.astype(np.float32),
            "std": spread.astype(np.float32),
            "noise": self._condition_noise(rows, embeddings.shape[-1]),
        }
        picked = np.sort(np.random.default_rng(self.seed).permutation(len(rows))[:_POOL])
        self.pool = embeddings[picked]

    def _condition_noise(self, rows, width):
        if self.estimator.condition_noise != "auto":
            return self.estimator.condition_noise
        # In few dimensions the noise would change the kind: too little repeats what it hides.
        few = not self.is_image and len(rows) <= FEW_ROWS and width >= _FEWEST_DIRECTIONS
        return _NOISE_FOR_FEW if few else 0.0

    def _make_space(self, rows):
        """Space, fitted autoencoder or None, and what is kept of the images."""
        estimator = self.estimator
        if not self.is_image:
            space = ComponentSpace.fit(rows, estimator.n_pcs, estimator.residual_noise)
            return space, None, (None, None, None)
        space = PixelSpace(rows.shape[1:], rows.pixel_range, rows.layout)
        image = rows.image_shape, rows.pixel_range, rows.layout
        if estimator.autoencoder is None:
            return space, None, image
        autoencoder = clone(estimator.autoencoder)
        if not isinstance(autoencoder, FrozenEstimator):
            estimator._seed_part(autoencoder, self.seed, 3)
            estimator._fit_part(autoencoder, "autoencoder", rows)
        return LatentSpace(space, autoencoder), autoencoder, image

    def loss(self, x0, cond):
        estimator = self.estimator
        x0 = self.space.inside(x0)
        if estimator.random_flip and self.is_image:
            flipped = torch.rand(len(x0), device=x0.device) < 0.5
            x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
        return self.diffusion.loss(
            self.module,
            x0,
            cond,
            weighting=estimator.loss_weighting,
            norm=estimator.loss_norm,
            drop_condition=estimator.condition_dropout if cond is not None else 0.0,
            condition_noise=self.condition["noise"] if cond is not None else 0.0,
        )


def call_seed(random_state, default):
    """Seed of one call that draws, in 0 to 2**32 - 1.

    Parameters
    ----------
    random_state : int, RandomState, Generator or None
        What the caller gave; a generator of NumPy moves on.
    default : int
        For None.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        For anything else.

    Examples
    --------
    >>> call_seed(3, default=0), call_seed(None, default=0)
    (3, 0)
    """
    if random_state is None:
        return default
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(np.iinfo(np.int32).max))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**32))
    if isinstance(random_state, Integral) and 0 <= random_state < 2**32:
        return int(random_state)
    raise ValueError(
        f"random_state={random_state!r} must be None, an integer from 0 to 2**32 - 1, or a "
        "RandomState or Generator of NumPy."
    )


def _check_embeddings(embeddings):
    embeddings = to_numpy(embeddings)
    return check_array(
        embeddings, dtype=np.float32, input_name="embeddings", allow_nd=np.ndim(embeddings) == 3
    )


def _check_one_each(embeddings, rows):
    if len(embeddings) != len(rows):
        raise ValueError(
            f"embeddings have {len(embeddings)} rows, but X has {len(rows)}: one each."
        )


def _as_given(encoder, rows):
    """Input of an encoder: Rows for ours; for any other images as given, and columns with names."""
    if isinstance(getattr(encoder, "estimator", encoder), TorchEstimator):
        return rows
    if not rows.is_image:
        if rows.feature_names is None or not hasattr(encoder, "feature_names_in_"):
            return rows
        import pandas as pd

        return pd.DataFrame(np.asarray(rows), columns=rows.feature_names)
    return from_unit(to_unit(rows[:], rows.pixel_range), rows.pixel_range, rows.layout)


def embed_rows(encoder, rows):
    """Embed Rows with an encoder of any make."""
    # set_output may make a DataFrame of it.
    return np.asarray(encoder.transform(_as_given(encoder, rows)))


def _channels_last(module):
    if isinstance(module, UNetDenoiser):
        module.to(memory_format=torch.channels_last)


def _without_padding(size, multiple, shape):
    """Rows and columns of a map of this size that are not padding, of a network's input `shape`."""
    return tuple(
        math.ceil(side * held / (-(-side // multiple) * multiple))
        for side, held in zip(shape, size, strict=True)
    )


def _mean_maps(found, multiple, shape):
    """Mean over layers and heads of each resolution, without the positions that are padding."""
    out = {}
    for (rows, columns), layers in found.items():
        maps = torch.stack([layer.mean(dim=1) for layer in layers]).mean(dim=0)
        kept = _without_padding((rows, columns), multiple, shape)
        maps = maps.view(len(maps), rows, columns, rows, columns)
        maps = maps[:, : kept[0], : kept[1], : kept[0], : kept[1]]
        maps = maps.flatten(3, 4).flatten(1, 2)
        out[kept] = (maps / maps.sum(dim=2, keepdim=True)).cpu().numpy()
    return out


def standardise(embeddings, condition):
    """Zero mean and unit variance per column, float32."""
    expected, found = condition["mean"].shape, embeddings.shape[1:]
    if found != expected:
        if len(found) == len(expected) == 1:
            found, expected = found[0], expected[0]
        raise ValueError(
            f"embeddings have {found} features, but the model was fitted on {expected}."
        )
    return ((embeddings - condition["mean"]) / condition["std"]).astype(np.float32)


def conditioning_encoder(encoder, diffusion):
    """Find the encoder whose embeddings a diffusion model knows: a frozen one keeps its own."""
    own = diffusion.encoder_ if isinstance(diffusion, FrozenEstimator) else None
    return encoder if own is None else own


def check_conditioning(encoder, diffusion):
    """Refuse an encoder yet to learn beside a frozen diffusion model that knows others' embeddings.

    They may be as wide as its own, and mean something else.
    """
    conditioner = conditioning_encoder(encoder, diffusion)
    frozen = (isinstance(part, FrozenEstimator) for part in (diffusion, encoder))
    if conditioner is encoder and tuple(frozen) == (True, False):
        raise ValueError(
            "The frozen diffusion was fitted on given embeddings, which an encoder that is yet to "
            "learn does not make: give the encoder that made them as "
            "encoder=FrozenEstimator(encoder), or fit the diffusion with that as its encoder."
        )


def check_generator(model, rows):
    """Refuse a fitted diffusion model whose samples are no views of such rows."""
    if model._condition is None:
        raise ValueError(
            "The frozen diffusion is unconditional: it cannot generate views of a sample."
        )
    if rows.is_image != (model.image_shape_ is not None):
        kinds = ("images", "vectors") if rows.is_image else ("vectors", "images")
        raise ValueError(f"X holds {kinds[0]}, but the frozen diffusion generates {kinds[1]}.")
    if not rows.is_image:
        try:
            model._check_rows(rows)  # the same columns, by name where both have names
        except ValueError as error:
            raise ValueError(
                f"X is not like what the frozen diffusion was fitted on: {error}"
            ) from error
        return
    check_image_shape("the frozen diffusion", rows.image_shape, model.image_shape_)
    ours, its = tuple(rows.pixel_range), tuple(model._pixel_range)
    # Ranges that were learned from values differ between two sets of one scale.
    if ours != its and any(map(is_standard, (ours, its))):
        raise ValueError(
            f"X holds pixels from {ours[0]} to {ours[1]}, but the frozen diffusion was fitted "
            f"on pixels from {its[0]} to {its[1]}, and generates such: give X on that scale."
        )


def interpolate_rows(a, b, alpha, kind="slerp"):
    """Points between rows of two arrays, per row.

    Spherical interpolation as in the released latent-diffusion code: weights
    sin(alpha theta) / sin(theta) on the vectors as they are, straight where they are nearly
    parallel (|cos theta| above 0.9995).

    Parameters
    ----------
    a, b : ndarray of shape (n, d) or (n, n_tokens, d)
        Of several tokens each goes from its own start to its own end.
    alpha : float or array-like of shape (n,)
        Share of `a`, in [0, 1].
    kind : {"slerp", "lerp"}, default="slerp"

    Returns
    -------
    ndarray of shape (n, d)

    Examples
    --------
    >>> import numpy as np
    >>> interpolate_rows(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), 0.5).round(3).tolist()
    [[0.707, 0.707]]
    """
    a, b = np.asarray(a), np.asarray(b)
    a, b = (ends.astype(np.result_type(a, b, np.float32), copy=False) for ends in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"The two ends differ in shape: {a.shape} and {b.shape}.")
    alpha = np.asarray(alpha, dtype=a.dtype)
    if alpha.shape not in ((), (len(a),)):
        raise ValueError(f"alpha must be one number or {len(a)} of them, got shape {alpha.shape}.")
    alpha = np.broadcast_to(alpha, (len(a),)).reshape(-1, *[1] * (a.ndim - 1))
    if not (alpha.min() >= 0 and alpha.max() <= 1):
        raise ValueError("alpha must be in [0, 1].")
    if kind == "lerp":
        return alpha * a + (1 - alpha) * b
    if kind != "slerp":
        raise ValueError(f"kind must be 'slerp' or 'lerp', got {kind!r}.")
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0)
    theta = np.arccos(np.clip(cosine, -1, 1))[..., None]
    sine = np.sin(theta)
    curved = (np.abs(cosine) <= 0.9995)[..., None]
    sine = np.where(curved, sine, 1.0)
    weight_a = np.where(curved, np.sin(alpha * theta) / sine, alpha)
    weight_b = np.where(curved, np.sin((1 - alpha) * theta) / sine, 1 - alpha)
    return (weight_a * a + weight_b * b).astype(a.dtype)
