"""Gen-SIS: an encoder that learns from images generated under its predecessor's embeddings.

Belagali, Yellapragada et al., "Gen-SIS: Generative Self-augmentation Improves Self-supervised
Learning". Three stages: a vanilla encoder; a diffusion model conditioned on its embeddings; a new
encoder from scratch that sees generated images as second views and tells apart the two sources of
interpolated ones.

============  ==================================================
paper         here
============  ==================================================
DINO          ``vanilla_encoder_``
E-LDM         ``diffusion_``
Gen-DINO      ``encoder_``, ``transform(X)``
I_s           ``augment(X)``
I_int, alpha  ``interpolate(X_a, X_b, alpha)``
============  ==================================================
"""

import os
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchTransformer,
    _fit_context,
    all_or_nothing,
    described,
)
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X
from diffaugkit.embedding_diffusion import (
    EmbeddingConditionedDiffusion,
    call_seed,
    check_conditioning,
    check_generator,
    conditioning_encoder,
    embed_rows,
    interpolate_rows,
)
from diffaugkit.encoder import SelfSupervisedEncoder
from diffaugkit.encoder_fits import draw_partners
from diffaugkit.image_rows import ImageRows
from diffaugkit.image_store import refuse_other_run, stored_samples
from diffaugkit.metrics.checks import check_labels
from diffaugkit.metrics.quality import own_report, report_rows
from diffaugkit.persistence import fingerprint
from diffaugkit.runtime import mix_seed

_VIEWS, _INTERPOLATIONS, _PARTNERS = 0, 1, 2
# Stream of the noise of interpolations, the same however many views there are.
_BETWEEN = 4, 1


class GenSIS(TorchTransformer):
    """Learn an embedding of images with views and mixtures generated from a first embedding.

    A first encoder learns from hand-made views alone; a diffusion model learns to make images under
    its embeddings; a second encoder of the same kind then learns from scratch, with generated
    images as second views of their source, and with images generated between two sources, whose
    shares it has to tell (the disentanglement task). All from the unlabelled images alone.

    Parameters
    ----------
    encoder : "auto" or estimator, default="auto"
        A :class:`~diffaugkit.SelfSupervisedEncoder`, cloned twice; "auto" is the paper's DINO. A
        fitted one inside ``sklearn.frozen.FrozenEstimator`` serves as the vanilla encoder as it is,
        and a clone of what is inside learns anew.
    diffusion : "auto" or estimator, default="auto"
        An :class:`~diffaugkit.EmbeddingConditionedDiffusion` to be cloned and fitted on the vanilla
        embeddings; a frozen one is used as it is, under embeddings of the encoder that it was
        fitted with (of one that was fitted on given embeddings, `encoder` must be frozen too).
    n_views : int, default=4
        Generated images per image, one of which is picked at random each time; the paper's for
        natural images (1 for tissue). 0 trains on interpolations alone.
    positives_prob : float, default=1.0
        Share of second global views that are generated; 0 makes none, as `n_views` of 0.
    n_interpolations : {"auto", 0, 1}, default="auto"
        Interpolated images per image; 0 leaves the disentanglement task out. "auto" is 1 with DINO,
        whose teacher the task needs, and 0 with other methods (as DiffAug's SimC.+Dif.).
    alpha : float or sequence of float, default=0.5
        Share of the image itself in its interpolation, in (0, 1); one of several is drawn per
        image (the paper has 0.5 for natural images and 0.2, 0.4, 0.6, 0.8 for tissue).
    interpolation : {"slerp", "lerp", "pixels"}, default="slerp"
        Path between two embeddings; "pixels" blends the images themselves (the ablation of the
        paper's Table 11).
    store_dir : str, path-like or None, default=None
        Folder for the generated images, in checksummed shards: a killed fit that starts again
        makes only what is missing, and one with more `n_views` only those. With
        ``random_state=None`` the seed is then 0. None keeps them in memory, or in `checkpoint_dir`
        if that is given.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of images given as rows of numbers.
    max_epochs : int or "auto", default="auto"
        Passes over the data of each of the three stages, where the parts are "auto".
    batch_size : int or "auto", default="auto"
        Of parts that are "auto".
    learning_rate : float or "auto", default="auto"
        Of parts that are "auto".
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to all parts; see :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    vanilla_encoder_ : SelfSupervisedEncoder
        The first encoder; also the baseline to compare with.
    diffusion_ : EmbeddingConditionedDiffusion
        The generator, conditioned on embeddings of ``vanilla_encoder_``, or of its own encoder
        where it was frozen and has one.
    encoder_ : SelfSupervisedEncoder
        The encoder that learned from generated images.
    history_ : DataFrame
        One row per epoch: phase ("vanilla", "diffusion", "generative"), epoch, loss, ...
    n_iter_ : int
        Epochs of all stages.
    n_features_in_ : int
    image_shape_ : tuple of (int, int, int) or None

    See Also
    --------
    SelfSupervisedEncoder : ``fit(X, positives=..., interpolations=...)`` is the third stage.

    Notes
    -----
    Parts that are "auto" are small, for two CPU cores, generate pixels, and sample without guidance
    in 20 steps of DPM-Solver++. The paper has ViT-S/16 (100 epochs, batches of 1 024, weight decay
    0.04 to 0.4), latents of a VQ autoencoder of factor 4, and 50 steps of DDIM with a guidance
    scale of 6 for natural images and 1.75 for tissue: give such an encoder and diffusion.

    References
    ----------
    Belagali, Yellapragada et al., "Gen-SIS: Generative Self-augmentation Improves Self-supervised
    Learning", Eqs. 4 to 7 and Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from diffaugkit import GenSIS
    >>> X, _ = load_digits(return_X_y=True)
    >>> model = GenSIS(image_shape=(8, 8, 1), max_epochs=1, n_views=1, random_state=0)
    >>> model = model.fit(X[:64])  # doctest: +SKIP
    >>> model.transform(X[:5]).shape[0], model.augment(X[:5]).shape  # doctest: +SKIP
    (5, (5, 64))
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchTransformer._parameter_constraints,
        "encoder": [HasMethods(["fit", "transform"]), StrOptions({"auto"})],
        "diffusion": [HasMethods(["fit", "sample"]), StrOptions({"auto"})],
        "n_views": [Interval(Integral, 0, None, closed="left")],
        "positives_prob": [Interval(Real, 0, 1, closed="both")],
        "n_interpolations": [Interval(Integral, 0, 1, closed="both"), StrOptions({"auto"})],
        "alpha": [Interval(Real, 0, 1, closed="neither"), tuple, list],
        "interpolation": [StrOptions({"slerp", "lerp", "pixels"})],
        "store_dir": [str, os.PathLike, None],
        "image_shape": [tuple, list, None],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    }
    _extra_state = ("_pixel_range", "_layout")

    def __init__(
        self,
        encoder="auto",
        diffusion="auto",
        *,
        n_views=4,
        positives_prob=1.0,
        n_interpolations="auto",
        alpha=0.5,
        interpolation="slerp",
        store_dir=None,
        image_shape=None,
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
        self.diffusion = diffusion
        self.n_views = n_views
        self.positives_prob = positives_prob
        self.n_interpolations = n_interpolations
        self.alpha = alpha
        self.interpolation = interpolation
        self.store_dir = store_dir
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

    @_fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit(self, X, y=None, *, groups=None):
        """Run the three stages.

        Parameters
        ----------
        X : images of shape (n_samples, ...)
            See :func:`~diffaugkit.data.check_X`; rows of numbers with `image_shape`.
        y : None
            Ignored.
        groups : array-like of shape (n_samples,) or None, default=None
            Slide or patient of each image: the partner of an interpolation then comes from another
            group. None takes any other image.

        Returns
        -------
        self

        Raises
        ------
        NotFittedError
            If a frozen part is not fitted.
        ValueError
            For input that cannot be used, groups of which there is only one, a frozen diffusion of
            other images, or a store of another run.
        """
        rows = self._check_input(X, reset=True, ensure_min_samples=2)
        if not rows.is_image:
            raise ValueError(
                f"X has shape {rows.shape}: GenSIS takes images. Say how rows of numbers make an "
                "image with image_shape=(height, width, channels); for vectors there is DiffAugEM."
            )
        alphas = self._check_alpha()
        seed = self._seed()
        partners = draw_partners(len(rows), groups, mix_seed(seed, _PARTNERS))
        vanilla, encoder = self._encoders(seed)
        interpolates = self._interpolates(encoder)
        diffusion = self._generator(seed)
        if isinstance(diffusion, FrozenEstimator):
            check_is_fitted(diffusion.estimator)
            check_generator(diffusion.estimator, rows)
            check_conditioning(vanilla, diffusion)
        else:
            diffusion._check_parts(rows, conditional=True)
        rng = np.random.default_rng(mix_seed(seed, _INTERPOLATIONS))
        alphas = rng.choice(alphas, size=len(rows)).astype(np.float32)
        pairs = (partners, alphas) if interpolates else None
        runs = self._runs(rows, vanilla, diffusion, pairs, seed)
        for name, run in runs.items():
            if (folder := self._store(name)) is not None:
                refuse_other_run(folder, len(rows), run)

        # Stage 1: hand-made views alone.
        if not isinstance(vanilla, FrozenEstimator):
            vanilla.fit(rows)
        embeddings = embed_rows(conditioning_encoder(vanilla, diffusion), rows)

        # Stage 2: images from embeddings.
        if not isinstance(diffusion, FrozenEstimator):
            diffusion.fit(rows, None, embeddings=embeddings)

        # Stage 3: generated and interpolated images, made once, and an encoder from scratch.
        positives = [
            self._generate(rows, diffusion, embeddings, name, runs[name])
            for name in map("view-{}".format, range(self._n_views()))
        ]
        interpolations = None
        if interpolates:
            run = runs.get("interpolation")
            between = self._between(rows, diffusion, embeddings, partners, alphas, run)
            interpolations = between, partners, alphas
        encoder.fit(rows, None, positives=positives or None, interpolations=interpolations)

        self.vanilla_encoder_, self.diffusion_, self.encoder_ = vanilla, diffusion, encoder
        self._end_stages({"vanilla": vanilla, "diffusion": diffusion, "generative": encoder})
        return self

    def transform(self, X):
        """Embed images with the encoder that learned from generated ones.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, n_components), float32

        Raises
        ------
        NotFittedError, ValueError
            Before ``fit``; for input that does not match it.
        """
        check_is_fitted(self, "encoder_")
        return self.encoder_.transform(self._check_input(X, reset=False))

    def augment(self, X, n_per_sample=1, *, strength=1.0, random_state=None):
        """Generate images under the vanilla embedding of given ones.

        Parameters
        ----------
        X : as for ``fit``
            Sources.
        n_per_sample : int, default=1
            Generated images per source.
        strength : float in (0, 1], default=1.0
            1 generates from noise alone; lower values start from the source, and stay closer to it.
        random_state : int, RandomState, Generator or None, default=None
            Seed of the noise; None takes the seed of the fit, so that calls repeat. Noise belongs
            to the place in the call: samples of two calls with one seed are not independent.

        Returns
        -------
        ndarray of shape (n_samples * n_per_sample, ...)
            In the layout and range of the images of ``fit``; all of the first source first.
        """
        check_is_fitted(self, "encoder_")
        rows = self._check_input(X, reset=False)
        conditions = embed_rows(self._listened_to(), rows)
        made = self.diffusion_._augment(rows, conditions, n_per_sample, strength, random_state)
        return self.diffusion_._laid_out(made, self._layout)

    def interpolate(self, X_a, X_b, alpha=0.5, *, kind="slerp", random_state=None):
        """Generate images between two sets of images.

        Parameters
        ----------
        X_a, X_b : as for ``fit``, of the same length
            Ends, row by row.
        alpha : float or array-like of shape (n_samples,), default=0.5
            Share of `X_a`, in [0, 1].
        kind : {"slerp", "lerp"}, default="slerp"
            Path between the embeddings, per row.
        random_state : int, RandomState, Generator or None, default=None
            As for :meth:`augment`.

        Returns
        -------
        ndarray of shape (n_samples, ...)
            In the layout and range of the images of ``fit``.
        """
        check_is_fitted(self, "encoder_")
        ends = (self._check_input(X, reset=False) for X in (X_a, X_b))
        ends = (embed_rows(self._listened_to(), rows) for rows in ends)
        between = interpolate_rows(*ends, alpha, kind)
        made = self.diffusion_.sample(between, random_state=random_state)
        return self.diffusion_._laid_out(made, self._layout)

    def quality_report(self, X, labels=None, *, random_state=0):
        """Compare one generated image per image of `X` with `X`.

        In the vanilla embedding, or in that of the own encoder of a frozen generator.
        Of many images 2 000 are drawn, for which others are generated.

        Parameters
        ----------
        X : as for ``fit``
            Real images, sources of the generated ones.
        labels : array-like of shape (n_samples,) or None, default=None
            Labels, for their consistency.
        random_state : int, RandomState, Generator or None, default=0
            Seed of the draw of rows, of noise and folds.

        Returns
        -------
        QualityReport
            See :func:`~diffaugkit.metrics.quality_report`; `n_generated` is the number of images.
        """
        check_is_fitted(self, "encoder_")
        rows = self._check_input(X, reset=False)
        if labels is not None:  # refused before all is generated
            check_labels(labels, n=len(rows), name="labels")
        encoder = self._listened_to()
        real = embed_rows(encoder, rows)
        seed = call_seed(random_state, 0)
        source = report_rows(len(rows), seed)
        made = self.diffusion_.sample(real[source], random_state=seed)
        made = embed_rows(encoder, self._generated_rows(self.diffusion_, made))
        return own_report(real, made, source, labels, seed)

    def _listened_to(self):
        """Give the encoder whose embeddings the generator knows."""
        return conditioning_encoder(self.vanilla_encoder_, self.diffusion_)

    def _generated_rows(self, diffusion, images):
        """Make Rows of generated images; a frozen generator may have another layout."""
        generator = getattr(diffusion, "estimator", diffusion)
        return self._check_input(generator._image_rows(images), reset=False)

    # ---- stages ----------------------------------------------------------------------------------

    def _check_input(self, X, *, reset, **limits):
        return check_X(self, X, reset=reset, images=True, image_shape=self.image_shape, **limits)

    def _check_alpha(self):
        alphas = np.atleast_1d(np.asarray(self.alpha, dtype=np.float64))
        if not alphas.size or not (alphas.min() > 0 and alphas.max() < 1):
            raise ValueError(f"alpha={self.alpha!r} must be in (0, 1), or several such values.")
        return alphas

    def _encoders(self, seed):
        """Make the vanilla encoder and the one that takes its place."""
        if isinstance(self.encoder, FrozenEstimator):
            vanilla, fresh = self.encoder, clone(self.encoder.estimator)
        elif self.encoder == "auto":
            vanilla = SelfSupervisedEncoder("dino", **self._sizes())
            fresh = clone(vanilla)
        else:
            vanilla, fresh = clone(self.encoder), clone(self.encoder)
        if not isinstance(fresh, SelfSupervisedEncoder):
            raise TypeError(
                f"{type(fresh).__name__} cannot learn from generated images: give a "
                "SelfSupervisedEncoder, or FrozenEstimator(...) of a fitted one."
            )
        if fresh.max_epochs == 0:
            raise ValueError(
                "The second encoder learns from generated images, which max_epochs=0 does not: "
                "give the encoder max_epochs of at least 1, or 'auto'."
            )
        if isinstance(vanilla, FrozenEstimator):
            check_is_fitted(vanilla)
        # The same seed for both: the baseline differs in what it sees, and in nothing else.
        fresh.set_params(positives_prob=self.positives_prob)
        for part, stage in ((vanilla, "vanilla"), (fresh, "generative")):
            if not isinstance(part, FrozenEstimator):
                self._set_common(part, stage, self._child_seed(seed, 0))
        return vanilla, fresh

    def _interpolates(self, encoder):
        """Whether there is the disentanglement task; refused here, before any work."""
        method = encoder._method(images=True)
        interpolates = self.n_interpolations
        if interpolates == "auto":
            interpolates = method == "dino"
        if interpolates and method != "dino":
            raise ValueError(
                f"n_interpolations=1 goes with an encoder of method='dino', not {method!r}: the "
                "disentanglement loss mixes logits of DINO's teacher. Set n_interpolations='auto' "
                "or 0, or the encoder's method."
            )
        if not (interpolates or self._n_views()):
            raise ValueError(
                f"With n_views={self.n_views}, positives_prob={self.positives_prob:g} and no "
                f"interpolations (n_interpolations={self.n_interpolations!r}, method={method!r}) "
                "the second encoder would see no generated image: raise one of the three."
            )
        return bool(interpolates)

    def _n_views(self):
        return self.n_views if self.positives_prob > 0 else 0

    def _generator(self, seed):
        diffusion = self.diffusion
        if diffusion == "auto":
            diffusion = EmbeddingConditionedDiffusion(encoder=None, **self._sizes())
        generator = getattr(diffusion, "estimator", diffusion)
        if not isinstance(generator, EmbeddingConditionedDiffusion):
            raise TypeError(
                f"{type(generator).__name__} does not generate images from embeddings: give an "
                "EmbeddingConditionedDiffusion, or FrozenEstimator(...) of a fitted one."
            )
        if isinstance(diffusion, FrozenEstimator):
            return diffusion
        diffusion = clone(diffusion)
        self._set_common(diffusion, "diffusion", self._child_seed(seed, 1))
        return diffusion

    def _sizes(self):
        names = ("max_epochs", "batch_size", "learning_rate", "image_shape")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value != "auto"}

    def _set_common(self, part, stage, seed):
        self._hand_over(part, random_state=seed, checkpoint_dir=self._folder(stage))
        part._description = f"Gen-SIS {stage}"

    def _seed(self):
        # As with a `checkpoint_dir`: another start could use nothing of what was stored.
        if self.random_state is None and self.store_dir is not None:
            return 0
        return super()._seed()

    def _runs(self, rows, vanilla, diffusion, pairs, seed):
        """Seed of each set of generated images, by its name in the store, and what else tells it.

        All that is known before any training: to learn after it that the store is of another run
        would cost the training.
        """
        runs = {f"view-{view}": {"seed": mix_seed(seed, view)} for view in range(self._n_views())}
        if pairs and self.interpolation != "pixels":
            told = {"interpolation": self.interpolation, "pairs": fingerprint(*pairs)}
            runs["interpolation"] = {"seed": mix_seed(seed, *_BETWEEN), **told}
        if self._store("") is None:
            return runs
        images = make_batches(rows, batch_size=len(rows), device="cpu").fingerprint()["data"]
        generator = getattr(diffusion, "estimator", diffusion)
        later = {name: getattr(generator, name) for name in generator._used_later}
        known = {"images": images, **described(generator), **later}
        if generator is diffusion:
            known |= _training(diffusion)
        else:
            known["generator"] = _weights(generator)
        if isinstance(vanilla, FrozenEstimator):
            first = {"layer": vanilla.estimator.layer, "weights": _weights(vanilla.estimator)}
        else:
            first = {"layer": vanilla.layer, **described(vanilla), **_training(vanilla)}
        known |= {f"vanilla {name}": value for name, value in first.items()}
        return {name: run | known for name, run in runs.items()}

    def _store(self, name):
        """Folder of a set of generated images, or None where they stay in memory."""
        folder = self.store_dir or self._folder("samples")
        return None if folder is None else Path(folder).expanduser() / name

    def _generate(self, rows, diffusion, conditions, name, run):
        """Images under conditions, row by row, from memory or the store."""
        folder = self._store(name)
        generator = getattr(diffusion, "estimator", diffusion)
        if folder is not None:
            told = {"generator": _weights(generator), "conditions": fingerprint(conditions)}
            run = {**run, **told}

        def generate(index):
            # A shard has a seed of its own: its images do not depend on the shards before it.
            number = mix_seed(run["seed"], int(index[0])) % 2**32
            made = diffusion.sample(conditions[index], random_state=number)
            return self._generated_rows(diffusion, made)[np.arange(len(index))]

        return ImageRows.like(rows, stored_samples(folder, len(rows), generate, run))

    def _between(self, rows, diffusion, embeddings, partners, alphas, run):
        if self.interpolation == "pixels":
            return ImageRows.like(rows, _blend(rows, partners, alphas))
        between = interpolate_rows(embeddings, embeddings[partners], alphas, self.interpolation)
        return self._generate(rows, diffusion, between, "interpolation", run)

    def _end_stages(self, stages):
        """Make the parts estimators of their own again, and join what they logged."""
        tables = []
        for stage, part in stages.items():
            if not isinstance(part, FrozenEstimator):
                part.set_params(checkpoint_dir=None)
                vars(part).pop("_description", None)
                tables.append(part.history_.assign(phase=stage))
        self._set_history(tables, ["phase", "epoch", "loss"])

    @property
    def _n_features_out(self):
        return self.encoder_._n_features_out

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        return tags


def _training(model):
    """Tell what shapes the weights of a part beside what ``described`` tells."""
    names = ("max_epochs", "batch_size", "learning_rate", "precision", "pretrained")
    return {name: described(getattr(model, name, None)) for name in names}


def _weights(model):
    parts = (model, getattr(model, "autoencoder_", None))
    return fingerprint(*(part.module_ for part in parts if part))


def _blend(rows, partners, alphas, batch_size=1024):
    """Mix alpha * image + (1 - alpha) * partner, in the values and the type of the images."""
    parts = []
    for start in range(0, len(rows), batch_size):
        index = np.arange(start, min(start + batch_size, len(rows)))
        own, other = (rows[i] for i in (index, partners[index]))
        share = torch.from_numpy(alphas[index])[:, None, None, None]
        mixed = share * own.float() + (1 - share) * other.float()
        parts.append(mixed.round().to(own.dtype) if own.dtype == torch.uint8 else mixed)
    return torch.cat(parts)
