"""Diffusion model conditioned on the embedding of an encoder.

The M-step of DiffAug (Zang et al., arXiv 2309.07909, Eqs. 4 and 6 to 8) for vectors. Samples are
generated in a compact space, the whitened leading principal components, because a denoiser that
works on thousands of noisy genes returns samples with several times the data's spread.

=============  =====================================================================
paper          here
=============  =====================================================================
x              a row of X; inside, its whitened scores
z_c            condition: an encoder's embedding of the row, standardised
delta          noise, one stream per row
Gen(delta, z)  ``sample(embeddings)``; of rows: ``augment(X)``
=============  =====================================================================
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchTransformer,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.data import check_X
from diffaugkit.decomposition import PrincipalComponents
from diffaugkit.denoisers import DENOISERS
from diffaugkit.diffusion import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SAMPLERS,
    WEIGHTINGS,
    Diffusion,
    RowNoise,
    sample_in_batches,
)
from diffaugkit.encoder import SelfSupervisedEncoder, auto_epochs, linear_space, project_rows
from diffaugkit.metrics import quality_report
from diffaugkit.rows import DenseRows, MappedRows
from diffaugkit.training import isolated_rng, make_batches, mix_seed

# Embeddings of training rows that are kept, so that ``sample(n)`` has conditions to draw from.
_POOL = 4_096


class EmbeddingConditionedDiffusion(TorchTransformer):
    """Generate samples from the embedding of a sample, by a conditional diffusion model.

    Parameters
    ----------
    encoder : "auto", estimator or None, default="auto"
        What gives the condition: an estimator with ``transform``. It is cloned and fitted, or used
        as it is inside ``sklearn.frozen.FrozenEstimator``. "auto" is
        ``SelfSupervisedEncoder()``; None makes the unconditional model. Not used where ``fit``
        gets `embeddings`.
    denoiser : {"auto", "mlp", "diffaug"}, default="auto"
        ``"mlp"``, which is also "auto": residual MLP with adaptive normalisation. ``"diffaug"``:
        the paper's eight-block network (Listing 2).
    autoencoder : None
        Latent space of images; reserved, vectors use `n_pcs`.
    n_pcs : int or None, default=50
        Width of the compact space. None generates all features, standardised.
    n_timesteps : int, default=1000
        Noise levels, the paper's.
    beta_schedule : {"cosine", "linear", "scaled_linear"}, default="cosine"
        Noise schedule. The paper's is linear.
    prediction_type : {"v_prediction", "epsilon", "sample"}, default="v_prediction"
        What the network predicts. The paper's epsilon gives vectors of too large a spread: take it
        with a linear schedule, as the cosine one multiplies its first error by thousands.
    loss_weighting : {"uniform", "p2", "min_snr"}, default="uniform"
        Weight of the noise levels.
    condition_dropout : float, default=0.1
        Share of training rows without condition, for guidance.
    condition_noise : float, default=0.0
        Standard deviation of noise added to the standardised condition in training and sampling:
        the larger, the farther samples go from their source.
    guidance_scale : float, default=1.0
        Classifier-free guidance: 1 is the conditional model, 0 the unconditional one.
    sampler : {"dpmsolver++", "ddim", "ddpm"}, default="dpmsolver++"
        From diffusers. The paper's is ddpm with 1 000 steps.
    n_sampling_steps : int, default=20
        Steps of the sampler, clipped to `n_timesteps`.
    ema_decay : float or None, default=0.999
        Average of the weights, with warm-up, used for sampling.
    width, n_blocks : int, default=256 and 4
        Size of the denoiser; for ``"diffaug"`` the width is that of its hidden layers (paper:
        2 000) and the number of blocks is fixed.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    max_epochs : int or "auto", default="auto"
        330, the paper's M-step, or as many as make 1 000 batches if that is fewer, but at least 10.
    batch_size : int, default=300
        The paper's.
    learning_rate : float, default=2e-3
        Peak rate of AdamW with warm-up and cosine.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    module_ : nn.Module
        The denoiser's averaged weights.
    encoder_ : estimator or None
        The fitted encoder; None if `embeddings` were given or there is none.
    history_ : DataFrame
        One row per epoch: epoch, loss, learning_rate.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray, only if the names are strings

    References
    ----------
    Zang et al., arXiv 2309.07909, Eqs. 4, 6 to 8 and Listing 2. Ho et al. 2020, DDPM. Ho and
    Salimans 2022, classifier-free guidance.

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
        "denoiser": [StrOptions({"auto", *DENOISERS})],
        "autoencoder": [None],
        "n_pcs": [Interval(Integral, 1, None, closed="left"), None],
        "n_timesteps": [Interval(Integral, 2, None, closed="left")],
        "beta_schedule": [StrOptions(set(BETA_SCHEDULES))],
        "prediction_type": [StrOptions(set(PREDICTION_TYPES))],
        "loss_weighting": [StrOptions(set(WEIGHTINGS))],
        "condition_dropout": [Interval(Real, 0, 1, closed="left")],
        "condition_noise": [Interval(Real, 0, None, closed="left")],
        "guidance_scale": [Interval(Real, 0, None, closed="left")],
        "sampler": [StrOptions(set(SAMPLERS))],
        "n_sampling_steps": [Interval(Integral, 1, None, closed="left")],
        "ema_decay": [Interval(Real, 0, 1, closed="left"), None],
        "width": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "layer": [str, None],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
    }
    _extra_state = ("_space", "_condition", "_pool", "_sampling_seed")

    def __init__(
        self,
        encoder="auto",
        denoiser="auto",
        autoencoder=None,
        *,
        n_pcs=50,
        n_timesteps=1000,
        beta_schedule="cosine",
        prediction_type="v_prediction",
        loss_weighting="uniform",
        condition_dropout=0.1,
        condition_noise=0.0,
        guidance_scale=1.0,
        sampler="dpmsolver++",
        n_sampling_steps=20,
        ema_decay=0.999,
        width=256,
        n_blocks=4,
        layer=None,
        max_epochs="auto",
        batch_size=300,
        learning_rate=2e-3,
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
        self.n_pcs = n_pcs
        self.n_timesteps = n_timesteps
        self.beta_schedule = beta_schedule
        self.prediction_type = prediction_type
        self.loss_weighting = loss_weighting
        self.condition_dropout = condition_dropout
        self.condition_noise = condition_noise
        self.guidance_scale = guidance_scale
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.ema_decay = ema_decay
        self.width = width
        self.n_blocks = n_blocks
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
            Normalised values; raw counts are refused (put ``CellPreprocessor()`` in front).
        y : array-like of shape (n_samples,) or None
            Handed to the encoder; ours ignores it.
        embeddings : array-like of shape (n_samples, n_embedding_features) or None
            Conditions, row by row; the encoder is then neither fitted nor used.

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
            allow_counts=False,
            ensure_min_samples=2,
            ensure_min_features=2,
        )
        seed = self._seed()
        encoder = None
        if embeddings is None and self.encoder is not None:
            encoder = self._make_encoder(seed).fit(rows, y)
            embeddings = encoder.transform(rows)
        state = self._prepare(rows, embeddings, seed=seed)
        module, history = self._fit_loop(
            state.module,
            state.loss,
            state.batches,
            seed=seed,
            max_epochs=auto_epochs(self.max_epochs, state.batches.steps_per_epoch),
            warmup=0.05,
            grad_clip=1.0,
            ema_decay=self.ema_decay,
        )
        self.encoder_ = encoder
        return self._set_fitted(state, module, history)

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
        if self.encoder_ is None:
            raise ValueError(
                "This model has no encoder of its own: it was fitted on given embeddings or with "
                "encoder=None. Embed X yourself and call sample(embeddings)."
            )
        return self.encoder_.transform(self._check_rows(X))

    def sample(self, n_or_embeddings=1, *, random_state=None):
        """Generate samples.

        Parameters
        ----------
        n_or_embeddings : int or array-like of shape (n, n_embedding_features), default=1
            How many to draw, each under the embedding of a random training sample; or the
            embeddings to draw under, one sample each.
        random_state : int or None, default=None
            Seed of the noise. Noise belongs to the row: the sample of row i is the same whatever
            the number of rows. None takes the seed of the fit, so that calls repeat.

        Returns
        -------
        ndarray of shape (n, n_features), float32
            In the space of `X`.
        """
        check_is_fitted(self, "module_")
        seed = self._sampling_seed if random_state is None else int(random_state)
        embeddings = self._conditions(n_or_embeddings, seed)
        n = int(n_or_embeddings) if embeddings is None else len(embeddings)
        return self._decode(self._sample_latents(embeddings, n, seed)).numpy()

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
        random_state : int or None, default=None
            As for :meth:`sample`.

        Returns
        -------
        ndarray of shape (n_samples * n_per_sample, n_features), float32
            All samples of the first source, then of the second, and so on:
            ``np.repeat(np.arange(n_samples), n_per_sample)`` gives the source of each.
        """
        check_is_fitted(self, "module_")
        rows = self._check_rows(X)
        embeddings = None if self._condition is None else self.transform(rows)
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
        random_state : int or None, default=None
            As for :meth:`sample`.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float32
        """
        a, b = self.transform(X_a), self.transform(X_b)
        return self.sample(interpolate_rows(a, b, alpha, kind), random_state=random_state)

    def quality_report(self, X, labels=None, *, random_state=0):
        """Compare one generated sample per row of `X` with `X`, in the compact space.

        Parameters
        ----------
        X : as for ``fit``
            Real samples, sources of the generated ones.
        labels : array-like of shape (n_samples,) or None, default=None
            Labels, for their consistency.
        random_state : int, default=0
            Seed of noise and folds.

        Returns
        -------
        QualityReport
            See :func:`~diffaugkit.metrics.quality_report`.
        """
        check_is_fitted(self, "module_")
        rows = self._check_rows(X)
        embeddings = None if self._condition is None else self.transform(rows)
        return self._report(rows, embeddings, labels, random_state)

    def _check_rows(self, X):
        return check_X(self, X, reset=False, layer=self.layer, allow_counts=False)

    def _make_encoder(self, seed):
        if self.encoder == "auto":
            names = ("device", "precision", "verbose", "layer")
            common = {name: getattr(self, name) for name in names}
            encoder = SelfSupervisedEncoder(**common)
        else:
            encoder = clone(self.encoder)
        frozen = isinstance(encoder, FrozenEstimator)
        if not frozen and encoder.get_params().get("random_state", 0) is None:
            # One seed makes the whole fit repeatable, as a resumed run has to be.
            encoder.set_params(random_state=self._child_seed(seed, 0))
        return encoder

    # ---- pieces that DiffAugEM shares ------------------------------------------------------------

    def _augment(self, rows, embeddings, n_per_sample, strength, random_state):
        if not isinstance(n_per_sample, Integral) or n_per_sample < 1:
            raise ValueError(f"n_per_sample={n_per_sample!r} must be an integer of at least 1.")
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength!r} must be in (0, 1].")
        seed = self._sampling_seed if random_state is None else int(random_state)
        views = [
            self._decode(
                self._sample_latents(embeddings, len(rows), mix_seed(seed, view), rows, strength)
            )
            for view in range(n_per_sample)
        ]
        return torch.stack(views, dim=1).flatten(0, 1).numpy()

    def _views(self, embeddings, n_views, seed):
        """Generate views of the training rows, decoded batch by batch as they are read."""
        for view in range(n_views):
            latents = self._sample_latents(embeddings, len(embeddings), mix_seed(seed, view))
            yield MappedRows(DenseRows(latents), self._decode, len(self._space["mean"]))

    def _report(self, rows, embeddings, labels, random_state):
        latents = self._sample_latents(embeddings, len(rows), random_state, rows).numpy()
        spread = self._space["std"]
        return quality_report(
            latents * spread,
            np.arange(len(rows)),
            np.asarray(self._latents(rows)) * spread,
            labels=labels,
            random_state=random_state,
        )

    def _prepare(self, rows, embeddings, *, seed):
        return _Fit(self, rows, embeddings, seed)

    def _set_fitted(self, state, module, history):
        import pandas as pd

        self._space, self._condition, self._pool = state.space, state.condition, state.pool
        self._sampling_seed = self._child_seed(state.seed, 2)
        self.module_ = module
        self.history_ = pd.DataFrame(history)
        self.n_iter_ = len(history)
        return self

    def _build(self):
        n_condition = 0 if self._condition is None else len(self._condition["mean"])
        return self._make_module(len(self._space["std"]), n_condition)

    def _make_module(self, n_inputs, n_condition):
        name = "mlp" if self.denoiser == "auto" else self.denoiser
        size = {"n_blocks": self.n_blocks} if name == "mlp" else {}
        return DENOISERS[name](
            n_inputs, n_condition, width=self.width, n_timesteps=self.n_timesteps, **size
        )

    def _diffusion(self):
        return Diffusion(self.n_timesteps, self.beta_schedule, prediction_type=self.prediction_type)

    def _latents(self, rows):
        space = self._space
        return project_rows(rows, space["mean"], space["components"], space["std"])

    def _decode(self, latents):
        mean, components, std = (self._space[name] for name in ("mean", "components", "std"))
        scores = latents * torch.from_numpy(std).to(latents)
        if components is None:
            return scores + torch.from_numpy(mean).to(scores)
        return PrincipalComponents(mean, components, std).inverse(scores)

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
        return check_array(n_or_embeddings, dtype=np.float32, input_name="embeddings")

    def _sample_latents(self, embeddings, n, seed, rows=None, strength=1.0):
        """Whitened samples (n, k); row i draws from its own stream whatever n is."""
        device = self._device()
        module, diffusion = self.module_.to(device).eval(), self._diffusion()
        shape = (len(self._space["std"]),)
        if embeddings is not None:
            embeddings = standardise(np.asarray(embeddings, np.float32), self._condition)
        start = None if rows is None or strength >= 1 else self._latents(rows)

        def run(index):
            noise = RowNoise(shape, seed, index)
            cond = None
            if embeddings is not None:
                cond = torch.from_numpy(embeddings[index])
                if self.condition_noise:
                    blur = RowNoise(cond.shape[1:], mix_seed(seed, 2), index)
                    cond = cond + self.condition_noise * blur()
                cond = cond.to(device)
            with torch.no_grad():
                return diffusion.sample(
                    module,
                    noise().to(device),
                    cond,
                    n_steps=min(self.n_sampling_steps, self.n_timesteps),
                    sampler=self.sampler,
                    guidance_scale=self.guidance_scale,
                    x_start=None if start is None else start[index].to(device),
                    strength=strength,
                    step_noise=noise,
                ).cpu()

        # One fixed size for all calls, the library's: it is what makes a row's sample its own.
        return sample_in_batches(run, n, batch_size=256 if device.type == "cpu" else 4096)

    @property
    def _n_features_out(self):
        return self.encoder_._n_features_out


class _Fit:
    """Module, batches and loss of one fit of a diffusion model."""

    def __init__(self, estimator, rows, embeddings, seed):
        self.estimator, self.seed = estimator, seed
        mean, components, std = linear_space(rows, estimator.n_pcs)
        # What has no spread must come back as it is: division by 0 avoided, the rest stays small.
        std = np.maximum(std, 1e-6 * max(1.0, np.abs(mean).max())).astype(np.float32)
        self.space = {"mean": mean, "components": components, "std": std}
        self.condition = self.pool = None
        n_condition = 0
        if embeddings is not None:
            embeddings = check_array(embeddings, dtype=np.float32, input_name="embeddings")
            if len(embeddings) != len(rows):
                raise ValueError(
                    f"embeddings have {len(embeddings)} rows, but X has {len(rows)}: one each."
                )
            spread = embeddings.std(axis=0)
            spread = np.where(spread > 0, spread, 1)
            self.condition = {"mean": embeddings.mean(axis=0), "std": spread}
            self.picked = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_POOL])
            self.pool = embeddings[self.picked]
            embeddings = standardise(embeddings, self.condition)
            n_condition = embeddings.shape[1]
        with isolated_rng(estimator._child_seed(seed, 1)):
            self.module = estimator._make_module(len(std), n_condition)
        self.diffusion = estimator._diffusion()
        self.batches = make_batches(
            project_rows(rows, mean, components, std),
            embeddings,
            batch_size=estimator.batch_size,
            seed=estimator._child_seed(seed, 2),
            device=estimator._device(),
        )

    def loss(self, x0, cond):
        estimator = self.estimator
        return self.diffusion.loss(
            self.module,
            x0,
            cond,
            weighting=estimator.loss_weighting,
            drop_condition=estimator.condition_dropout if cond is not None else 0.0,
            condition_noise=estimator.condition_noise if cond is not None else 0.0,
        )


def standardise(embeddings, condition):
    """Zero mean and unit variance per column, float32."""
    width = len(condition["mean"])
    if embeddings.shape[1] != width:
        raise ValueError(
            f"embeddings have {embeddings.shape[1]} features, but the model was fitted on {width}."
        )
    return ((embeddings - condition["mean"]) / condition["std"]).astype(np.float32)


def interpolate_rows(a, b, alpha, kind="slerp"):
    """Points between rows of two arrays, per row.

    Spherical interpolation as in the released latent-diffusion code: weights
    sin(alpha theta) / sin(theta) on the vectors as they are, straight where they are nearly
    parallel (|cos theta| above 0.9995).

    Parameters
    ----------
    a, b : ndarray of shape (n, d)
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
    if a.shape != b.shape:
        raise ValueError(f"The two ends differ in shape: {a.shape} and {b.shape}.")
    alpha = np.broadcast_to(np.asarray(alpha, dtype=a.dtype), (len(a),))[:, None]
    if not (alpha.min() >= 0 and alpha.max() <= 1):
        raise ValueError("alpha must be in [0, 1].")
    if kind == "lerp":
        return alpha * a + (1 - alpha) * b
    if kind != "slerp":
        raise ValueError(f"kind must be 'slerp' or 'lerp', got {kind!r}.")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    theta = np.arccos(np.clip(cosine, -1, 1))[:, None]
    sine = np.sin(theta)
    curved = (np.abs(cosine) <= 0.9995)[:, None]
    sine = np.where(curved, sine, 1.0)
    weight_a = np.where(curved, np.sin(alpha * theta) / sine, alpha)
    weight_b = np.where(curved, np.sin((1 - alpha) * theta) / sine, 1 - alpha)
    return (weight_a * a + weight_b * b).astype(a.dtype)
