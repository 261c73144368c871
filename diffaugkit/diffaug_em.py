"""DiffAug: an encoder and a generator that teach each other, by turns.

Zang et al., "Boosting Unsupervised Contrastive Learning Using Diffusion-Based Data Augmentation
From Scratch", arXiv 2309.07909, Algorithm 1. The E-step fits the encoder on views of each sample,
some of them generated; the M-step fits the generator on the frozen encoder's embeddings; at each
switch back the generated views are drawn anew.

===========  ======================================
paper        here
===========  ======================================
Enc          ``encoder_``
Gen          ``diffusion_``
y, z         ``transform(X)``, ``project(X)``
lambda       ``augmentation_prob``
330/330/340  ``schedule``
===========  ======================================
"""

import copy
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from diffaugkit.arrays import refuse_missing
from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchEstimator,
    TorchTransformer,
    _fit_context,
    all_or_nothing,
    described,
)
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X, keep_names_of_rows
from diffaugkit.embedding_diffusion import (
    EmbeddingConditionedDiffusion,
    check_conditioning,
    check_generator,
    conditioning_encoder,
    embed_rows,
)
from diffaugkit.encoder import SelfSupervisedEncoder
from diffaugkit.encoder_fits import auto_positives_prob, has_map
from diffaugkit.runtime import mix_seed
from diffaugkit.training import auto_epochs

_PAPER_SCHEDULE = {"vectors": (330, 330, 340), "images": (200, 400, 800)}


class DiffAugEM(TorchTransformer):
    """Embed unlabelled samples with positives that a diffusion model generates from the embedding.

    The main job of the library: from a table of cells (or from images), without labels, a
    high-dimensional embedding for classifiers and neighbours, a two-dimensional map, and a
    generator of new cells. Training alternates E-steps (encoder) and M-steps (generator). The first
    E-step knows only hand-made views; the later ones replace a share of them by samples generated
    from each row's embedding.

    Parameters
    ----------
    encoder : "auto" or estimator, default="auto"
        A :class:`~diffaugkit.SelfSupervisedEncoder` to be cloned and fitted; its `max_epochs` comes
        from `schedule`, its `positives_prob` from `augmentation_prob`.
    diffusion : "auto" or estimator, default="auto"
        An :class:`~diffaugkit.EmbeddingConditionedDiffusion` to be cloned and fitted.
    schedule : "auto" or tuple of int, default="auto"
        Epochs of the phases E, M, E, M, E, ...: an odd number of phases. "auto" is the paper's
        (330, 330, 340), for images (200, 400, 800), or fewer where 1 000 full batches a phase come
        sooner (for vectors from 1 200 samples on), but at least 10. An M-step of 0 epochs is left
        out: (330, 0, 340) is the encoder alone.
    augmentation_prob : float or "auto", default="auto"
        lambda of the paper: share of second views that are generated. "auto" is 0.5 for up to 1 000
        vectors, where generated views help most (docs/benchmarks.md, "New cells"), and for more,
        and for images, 0.1 (the paper has 0.1 to 0.15).
    n_views : int, default=4
        Generated views kept per sample; one is picked at random each time. Fewer are made where the
        next E-step looks at fewer: `augmentation_prob` times its epochs, at least 1.
    condition : {"embedding", "projection", "supervised", "random"}, default="embedding"
        What the generator sees of a sample: its y, its z, its label (needs `y` in ``fit``; ablation
        A1 of the paper) or a random vector (A2), which belongs to a place among the rows of
        ``fit``: of other rows, or in another order, `augment` then makes samples of others.
    joint : bool, default=False
        Train both networks in every phase, on the sum of both losses (ablation B4); for vectors.
        One optimiser and one batch serve both: `learning_rate` and `batch_size` are the encoder's.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of images given as rows of numbers.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    batch_size : int or "auto", default="auto"
        Of parts that are "auto"; "auto" is each part's own (300 for vectors, the paper's).
    learning_rate : float or "auto", default="auto"
        Of parts that are "auto"; "auto" is each part's own (2e-3 for vectors).
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to both parts; see :class:`~diffaugkit.base.TorchEstimator`. Each
        phase keeps its checkpoints in a folder of its own below `checkpoint_dir`.

    Attributes
    ----------
    encoder_ : SelfSupervisedEncoder
        The fitted encoder.
    diffusion_ : EmbeddingConditionedDiffusion or None
        The fitted generator; None if no M-step ran.
    condition_encoder_ : SelfSupervisedEncoder or None
        The encoder that the generator listens to, as the last M-step found it: the E-step after it
        moves the embeddings of ``encoder_``. None if no M-step ran.
    classes_ : ndarray of shape (n_classes,)
        With ``condition="supervised"`` only: what the columns of the condition stand for.
    history_ : DataFrame
        One row per epoch: phase ("E", "M" or "EM"), round, epoch, loss, learning_rate, and of an
        E-step ``feature_spread``, by which a collapse shows.
    n_iter_ : int
        Epochs of all phases.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features,)
        Only if the names are strings.

    See Also
    --------
    CellPreprocessor : From raw counts to what this estimator expects.

    Notes
    -----
    Where paper and released code disagree: generated views are picked with probability lambda (the
    release: 18.4 %), the buffer is refilled at every switch (the release never fills it when it
    starts from scratch), and the generator sees y, as in the release (the paper prints z).

    Where both differ from here: they compare a row as it is with a view of it, here both are views;
    their loss is the pairwise form, and they have no contrast of y itself (`contrast` and
    `embedding_weight` of the encoder); one optimiser runs through all phases, here each E-step goes
    on with the weights under a new one, and each M-step trains the generator anew; and they
    generate features with a linear schedule, epsilon and 1 000 ancestral steps, see
    :class:`~diffaugkit.EmbeddingConditionedDiffusion`.

    References
    ----------
    Zang et al., arXiv 2309.07909.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit import DiffAugEM
    >>> X, _ = load_iris(return_X_y=True)
    >>> model = DiffAugEM(schedule=(2, 2, 2), random_state=0).fit(X)
    >>> model.transform(X).shape, model.project(X).shape, model.augment(X[:3], 2).shape
    ((150, 50), (150, 2), (6, 4))
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **{k: v for k, v in TorchTransformer._parameter_constraints.items() if k != "max_epochs"},
        "encoder": [HasMethods(["fit", "transform"]), StrOptions({"auto"})],
        "diffusion": [HasMethods(["fit", "sample"]), StrOptions({"auto"})],
        "schedule": [StrOptions({"auto"}), tuple, list],
        "augmentation_prob": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "n_views": [Interval(Integral, 1, None, closed="left")],
        "condition": [StrOptions({"embedding", "projection", "supervised", "random"})],
        "joint": ["boolean"],
        "image_shape": [tuple, list, None],
        "layer": [str, None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
    }

    _extra_state = ("_condition_seed", "_pixel_range", "_layout")

    def __init__(
        self,
        encoder="auto",
        diffusion="auto",
        *,
        schedule="auto",
        augmentation_prob="auto",
        n_views=4,
        condition="embedding",
        joint=False,
        image_shape=None,
        layer=None,
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
        self.schedule = schedule
        self.augmentation_prob = augmentation_prob
        self.n_views = n_views
        self.condition = condition
        self.joint = joint
        self.image_shape = image_shape
        self.layer = layer
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
    def fit(self, X, y=None):
        """Run the E- and M-steps of the schedule.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or Rows of shape (n_samples, n_features)
            Normalised values; raw counts are refused (put ``CellPreprocessor()`` in front). Or
            images, see :func:`~diffaugkit.data.check_X`.
        y : array-like of shape (n_samples,) or None
            Labels, used with ``condition="supervised"`` only.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, or a schedule that is no odd number of phases.
        """
        rows = self._check_input(X, reset=True, ensure_min_samples=2, ensure_min_features=2)
        if rows.is_image and self.joint:
            raise ValueError("joint=True is for vectors; images train by turns (joint=False).")
        seed = self._seed()
        labels = self._check_labels(y, len(rows))
        vars(self).pop("classes_", None)
        if labels is not None:
            self.classes_ = labels[0]
        encoder = self._part(self.encoder, SelfSupervisedEncoder, seed, 0)
        diffusion = self._part(self.diffusion, EmbeddingConditionedDiffusion, seed, 1)
        share = self._share(rows)
        if not isinstance(encoder, FrozenEstimator):
            encoder.set_params(positives_prob=share)
        self._check_frozen(encoder, diffusion, rows, labels)
        self._check_map(encoder, diffusion, rows.is_image)
        if not isinstance(diffusion, FrozenEstimator):
            diffusion._check_parts(rows, conditional=True)
            if self.joint and diffusion.validation_fraction:
                raise ValueError("joint=True has no validation: set validation_fraction=0.")
        fitted = conditioner = positives = None
        history = []

        schedule = self._schedule(encoder, len(rows), "images" if rows.is_image else "vectors")
        phases = [
            (number, "EM" if self.joint else "EM"[number % 2], epochs)
            for number, epochs in enumerate(schedule)
            if epochs > 0
        ]
        for (number, phase, epochs), after in zip(phases, [*phases[1:], None], strict=True):
            if "E" in phase:
                self._set_phase(encoder, phase, number, len(schedule), epochs, warm=number > 0)
            if "M" in phase:
                self._set_phase(diffusion, phase, number, len(schedule), epochs)
            if phase == "E":
                encoder.fit(rows, None, positives=positives)
            else:
                if phase == "EM":
                    self._joint_step(rows, positives, labels, encoder, diffusion, seed, number)
                conditioner = conditioning_encoder(encoder, diffusion)
                embeddings = self._condition(conditioner, rows, labels, seed)
                fitted = diffusion
                if phase == "M":
                    diffusion.fit(rows, None, embeddings=embeddings)
                    # The next E-step gives the encoder new weights; this one keeps these.
                    conditioner = copy.copy(conditioner)
                if after is not None and "E" in after[1]:
                    # As many views of a row as the next E-step can be expected to look at.
                    n_views = min(self.n_views, max(1, round(share * after[2])))
                    views = diffusion._views(embeddings, n_views, mix_seed(seed, number))
                    positives = list(views)
            part = diffusion if phase == "M" else encoder
            if not isinstance(part, FrozenEstimator):
                history.append(part.history_.assign(phase=phase, round=number // 2))

        for part in (encoder, diffusion, conditioner):
            self._end_phases(part)
        self.encoder_, self.diffusion_, self.condition_encoder_ = encoder, fitted, conditioner
        self._set_history(history, ["phase", "round", "epoch", "loss"])
        self._condition_seed = seed
        return self

    @keep_names_of_rows
    def transform(self, X):
        """Embed samples in y, the high-dimensional embedding.

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components), float32
            A row's embedding does not depend on the other rows.

        Raises
        ------
        NotFittedError, ValueError
            Before ``fit``; for input that does not match it.
        """
        rows = self._check_rows(X)
        return self.encoder_.transform(rows)

    def project(self, X):
        """Embed samples in z, the low-dimensional map.

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_projections), float32
        """
        rows = self._check_rows(X)
        return self.encoder_.project(rows)

    def augment(self, X, n_per_sample=1, *, strength=1.0, random_state=None):
        """Generate new samples that share the embedding of given ones (Eq. 8 of the paper).

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)
            Sources.
        n_per_sample : int, default=1
            Generated samples per source.
        strength : float in (0, 1], default=1.0
            1 generates from noise alone; lower values start from the source with that share of the
            noise levels, and stay closer to it.
        random_state : int, RandomState, Generator or None, default=None
            Seed of the noise; None takes the seed of the fit, so that calls repeat. Noise belongs
            to the place in the call: samples of two calls with one seed are not independent.

        Returns
        -------
        ndarray of shape (n_samples * n_per_sample, n_features), float32
            In the space of `X`, columns in the order of ``fit`` (``feature_names_in_``);
            ``np.repeat(np.arange(n_samples), n_per_sample)`` gives the source of each.
        """
        rows = self._check_rows(X)
        embeddings = self._generator_condition(rows)
        made = self.diffusion_._augment(rows, embeddings, n_per_sample, strength, random_state)
        return self.diffusion_._laid_out(made, getattr(self, "_layout", None))

    def quality_report(self, X, labels=None, *, random_state=0):
        """Compare one generated sample per row of `X` with `X`, in the generator's compact space.

        Of many rows 2 000 are drawn, for which samples are generated.

        Parameters
        ----------
        X : as for ``fit``
            Real samples, sources of the generated ones.
        labels : array-like of shape (n_samples,) or None, default=None
            Labels, for their consistency.
        random_state : int, RandomState, Generator or None, default=0
            Seed of the draw of rows, of noise and folds.

        Returns
        -------
        QualityReport
            Label consistency, spread ratio, precision, recall, copy ratio, Frechet and kernel
            distance; ``print`` it, or ``to_frame()``.
        """
        rows = self._check_rows(X)
        embeddings = self._generator_condition(rows)
        return self.diffusion_._report(rows, embeddings, labels, random_state)

    # ---- phases ----------------------------------------------------------------------------------

    def _part(self, part, default, seed, number):
        """Make or clone a part and hand it the common parameters."""
        if isinstance(part, FrozenEstimator):
            check_is_fitted(part.estimator)
            return part
        if part == "auto":
            names = ("batch_size", "learning_rate", "layer", "image_shape")
            given = {name: getattr(self, name) for name in names}
            if default is SelfSupervisedEncoder:
                given["method"] = "scl"
            part = default(**{name: value for name, value in given.items() if value != "auto"})
        if not isinstance(part, default):
            raise TypeError(
                f"{type(part).__name__} cannot be trained by turns: give a {default.__name__}, or "
                "FrozenEstimator(...) of a fitted estimator."
            )
        return self._hand_over(clone(part), random_state=self._child_seed(seed, number))

    def _check_frozen(self, encoder, diffusion, rows, labels):
        frozen = [isinstance(part, FrozenEstimator) for part in (encoder, diffusion)]
        if self.joint and any(frozen):
            raise ValueError("joint=True trains both parts at once: neither can be frozen.")
        if frozen[1]:
            check_generator(diffusion.estimator, rows)
        if self.condition in ("embedding", "projection"):
            check_conditioning(encoder, diffusion)
        if not frozen[1] or labels is None:
            return
        width = diffusion._condition["mean"].shape[-1]
        if len(labels[0]) != width:
            raise ValueError(
                f"y has {len(labels[0])} classes, but the frozen diffusion was fitted on "
                f"conditions of {width} columns, one for each of its classes."
            )

    def _check_map(self, encoder, diffusion, images):
        """Refuse condition="projection" of an encoder that makes no map, before any E-step."""
        listened_to = conditioning_encoder(encoder, diffusion)
        listened_to = getattr(listened_to, "estimator", listened_to)
        if self.condition != "projection" or not isinstance(listened_to, SelfSupervisedEncoder):
            return
        method = listened_to._method(images)
        if not has_map(method, () if images else None):
            raise ValueError(
                f"condition='projection' needs an encoder with a low-dimensional map, but "
                f"method={method!r} makes none: take method='scl', or condition='embedding'."
            )

    def _schedule(self, encoder, n_samples, kind="vectors"):
        if self.schedule == "auto":
            steps = max(1, n_samples // min(getattr(encoder, "batch_size", 300), n_samples))
            paper = _PAPER_SCHEDULE[kind]
            return tuple(auto_epochs("auto", steps, paper=epochs) for epochs in paper)
        schedule = tuple(self.schedule)
        whole = all(isinstance(epochs, Integral) and epochs >= 0 for epochs in schedule)
        if len(schedule) % 2 == 0 or not whole or schedule[0] == 0:
            raise ValueError(
                f"schedule={self.schedule!r} must be an odd number of phases E, M, E, ... in "
                "epochs, for example (330, 330, 340); the first must be at least 1."
            )
        return schedule

    def _share(self, rows):
        """Share of second views that are generated."""
        if self.augmentation_prob != "auto":
            return self.augmentation_prob
        return 0.1 if rows.is_image else auto_positives_prob(len(rows))

    def _set_phase(self, part, phase, number, n_phases, epochs, warm=None):
        if isinstance(part, FrozenEstimator):
            return
        folder = self._folder(f"{number}-{phase}-{type(part).__name__}")
        part.set_params(max_epochs=int(epochs), checkpoint_dir=folder)
        if warm is not None:
            part.set_params(warm_start=warm)
        part._description = f"{phase}-step {number + 1}/{n_phases}"

    @staticmethod
    def _end_phases(part):
        """Take back what only the phases needed: the part is an estimator of its own again."""
        if not isinstance(part, TorchEstimator):  # none, frozen, or what a frozen generator has
            return
        part.set_params(checkpoint_dir=None)
        if isinstance(part, SelfSupervisedEncoder):
            part.set_params(warm_start=False)
        vars(part).pop("_description", None)

    def _condition(self, encoder, rows, labels, seed):
        """Give what the generator sees of each row, (n, E)."""
        if self.condition == "embedding":
            return embed_rows(encoder, rows)
        if self.condition == "projection":
            return encoder.project(rows)
        if self.condition == "supervised":
            return np.eye(len(labels[0]), dtype=np.float32)[labels[1]]
        width = _width(encoder)
        rng = np.random.default_rng(self._child_seed(seed, 2))
        return rng.standard_normal((len(rows), width), dtype=np.float32)

    def _joint_step(self, rows, positives, labels, encoder, diffusion, seed, number):
        """One phase in which both networks learn from every batch (B4).

        The condition of the generator is the embedding of the row as it is, without gradient.
        """
        going_on = number > 0
        for part in (encoder, diffusion):
            check_X(part, rows, reset=True)
        e_step = encoder._prepare(rows, positives, seed=self._child_seed(seed, 10 + number))
        if not going_on:
            encoder._set_fitted(e_step, e_step.module, [])
        embeddings = self._condition(encoder, rows, labels, seed)
        m_step = diffusion._prepare(rows, embeddings, seed=self._child_seed(seed, 20 + number))
        if going_on:
            m_step.module = diffusion.module_
        both = _Both(e_step.module, m_step.module, m_step.condition).to(self._device())
        inputs = [*e_step.batches.sources[2:], *m_step.batches.sources]
        batches = make_batches(
            *e_step.batches.sources[:2],
            *inputs,
            batch_size=encoder.batch_size,
            seed=self._child_seed(seed, 30 + number),
            device=self._device(),
        )

        def loss(x, neighbors, *rest):
            *generated, latents, given = rest
            e_loss = e_step.loss(x, neighbors, *generated)["loss"]
            cond = given
            if self.condition in ("embedding", "projection"):
                # As it embeds outside training, which is what samples are asked for by.
                e_step.module.eval()
                with torch.no_grad():
                    y, z = e_step.module.embedder(x)
                    cond = both.standardise(y if self.condition == "embedding" else z)
                e_step.module.train()
            m_loss = m_step.loss(latents, cond)["loss"]
            return {"loss": e_loss + m_loss, "e_loss": e_loss, "m_loss": m_loss}

        # A teacher or queue follows the encoder, here as in an E-step.
        e_step.module.n_steps = encoder.max_epochs * batches.steps_per_epoch
        trained, history = encoder._fit_loop(
            both,
            loss,
            batches,
            seed=self._child_seed(seed, 40 + number),
            after_step=e_step.module.after_step,
            **encoder._weight_decay(images=False),
            identity={"encoder": described(encoder), "diffusion": described(diffusion)},
            warmup=0.05,
            grad_clip=5.0,
            ema_decay=diffusion.ema_decay,
        )
        encoder._set_fitted(e_step, e_step.module, history)
        m_step.look_at(rows, self._condition(encoder, rows, labels, seed))
        diffusion.encoder_ = None
        diffusion._set_fitted(m_step, trained.diffusion, history)

    def _check_labels(self, y, n):
        if self.condition != "supervised":
            return None
        if y is None:
            raise ValueError("condition='supervised' needs labels: fit(X, y).")
        refuse_missing(y, "y")
        y = column_or_1d(y)
        check_consistent_length(y, np.empty(n))
        return np.unique(y, return_inverse=True)

    def _check_rows(self, X):
        check_is_fitted(self, "encoder_")
        return self._check_input(X, reset=False)

    def _check_input(self, X, **options):
        return check_X(
            self,
            X,
            layer=self.layer,
            allow_counts=False,
            images=True,
            image_shape=self.image_shape,
            **options,
        )

    def _generator_condition(self, rows):
        if self.diffusion_ is None:
            raise ValueError("No M-step ran, so there is no generator: give schedule an M-step.")
        if self.condition == "supervised":
            raise ValueError(
                "A generator conditioned on labels cannot augment unlabelled rows: call "
                "diffusion_.sample() with one-hot labels, a column for each of classes_."
            )
        return self._condition(self._listened_to(), rows, None, self._condition_seed)

    def _listened_to(self):
        """Give the encoder whose embeddings the generator knows; older files lack it."""
        known = getattr(self, "condition_encoder_", None)
        return conditioning_encoder(self.encoder_, self.diffusion_) if known is None else known

    @property
    def _n_features_out(self):
        return _width(self.encoder_)


class _Both(nn.Module):
    """The two networks of joint training, and the standardisation between them.

    It follows the encoder: what an untrained one gives has a hundredth of the spread.
    """

    def __init__(self, encoder, diffusion, condition):
        super().__init__()
        self.encoder, self.diffusion = encoder, diffusion
        self.scale = nn.BatchNorm1d(len(condition["mean"]), eps=1e-12, affine=False)
        self.scale.running_mean.copy_(torch.as_tensor(condition["mean"]))
        self.scale.running_var.copy_(torch.as_tensor(condition["std"]) ** 2)

    def standardise(self, embeddings):
        """Give embeddings mean 0 and variance 1, by the last ten batches or so."""
        embeddings = embeddings.float()
        if len(embeddings) > 1:
            self.scale.train()(embeddings)
        return self.scale.eval()(embeddings)

    def compile(self, *args, **kwargs):
        """Compile the networks, which the loss calls."""
        self.encoder.compile(*args, **kwargs)
        self.diffusion.compile(*args, **kwargs)


def _width(encoder):
    if hasattr(encoder, "_n_features_out"):
        return encoder._n_features_out
    return len(encoder.get_feature_names_out())  # of a frozen pipeline
