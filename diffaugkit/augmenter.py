"""Labelled data grows: a sampler in imbalanced-learn's form over a diffusion model.

"DiNO-Diffusion: Scaling Medical Diffusion Models via Self-Supervised Pre-Training", sections 2.3
and 2.4. New samples are generated under the embedding of a labelled one (reconstruction), or
between two that share a label (interpolation), checked, and added to the training set.

=============  ===================================================
paper          here
=============  ===================================================
f(x)           ``diffusion_.transform(X)``
c              condition: f(x), or lerp of two of them
r              1 - ``alpha``: the share of the farther end
rs             ``ratio``: synthetic samples per real one
full synthetic ``replace_real=True``
=============  ===================================================
"""

import copy
from dataclasses import asdict
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import OneToOneFeatureMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import gen_batches
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from diffaugkit.arrays import check_groups, many_classes, some, warn
from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchEstimator,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.data import check_X
from diffaugkit.diffaug_em import DiffAugEM
from diffaugkit.embedding_diffusion import EmbeddingConditionedDiffusion, interpolate_rows
from diffaugkit.gen_sis import GenSIS
from diffaugkit.image_rows import ImageRows
from diffaugkit.metrics import NEAR_COPY, QualityReport, quality_report
from diffaugkit.resampling import (
    SharedLabelPairs,
    append_like,
    check_reading,
    count_wanted,
    cycle,
    read_targets,
    sampler_tags,
    take_like,
)
from diffaugkit.rows import DenseRows
from diffaugkit.runtime import mix_seed, progress_bar
from diffaugkit.spaces import CopySpace

_STRATEGIES = {"auto", "minority", "not minority", "not majority", "all"}
_PROVENANCE = ("source", "partner", "alpha", "seed", "row", "confidence", "copy_ratio")


class GenerativeAugmenter(OneToOneFeatureMixin, TorchEstimator):
    """Add generated samples to a labelled set, as imbalanced-learn's samplers do.

    A diffusion model learns from the samples without their labels, or was pre-trained on a larger
    pool. New samples are drawn under the embeddings of labelled ones, and take their labels.
    Those that real neighbours give another label, and copies, are dropped and replaced.

    Parameters
    ----------
    diffusion : "auto" or estimator, default="auto"
        An :class:`~diffaugkit.EmbeddingConditionedDiffusion` with an encoder, for vectors or
        images. It is cloned and fitted on `X`, or used as it is inside
        ``sklearn.frozen.FrozenEstimator``: one pre-training on an unlabelled pool then serves many
        small labelled sets, and each fold of a cross-validation. A frozen
        :class:`~diffaugkit.DiffAugEM` or :class:`~diffaugkit.GenSIS` generates, too.
    strategy : {"reconstruction", "interpolation"}, default="reconstruction"
        "reconstruction" draws under the embedding of one sample. "interpolation" draws between the
        embeddings of two that share a label (multi-label: at least one, or none at all); no pair is
        used again before all were. Where a class has no pair its samples are reconstructed.
    ratio : float, default=1.0
        Generated samples per real one, in each class. Used where `sampling_strategy` is None. The
        paper has 1, 5, 10 and 50.
    sampling_strategy : None, str, float, dict, list or callable, default=None
        As in imbalanced-learn's over-sampling: "auto" or "not majority", "minority", "not
        minority", "all": bring these classes to the size of the largest; float in (0, 1], binary
        targets: size of the minority as a share of the majority; dict: wanted size by class; list:
        classes to bring to the size of the largest; callable: ``y -> dict``. None goes by `ratio`,
        and is the only choice for multi-label targets.
    alpha : float or sequence of float, default=(0.5, 0.6, 0.7, 0.8, 0.9)
        Interpolation: share of the first end, in [0, 1]; one of several is drawn per pair. The
        nearer end gives the label. The paper leaves its choice open.
    interpolation : {"lerp", "slerp"}, default="lerp"
        Straight path between embeddings, the paper's, or spherical.
    strength : float in (0, 1], default=1.0
        1 generates from noise alone; lower values start from the (nearer) source with that share of
        noise, and stay closer to it. Needed below 1 for an unconditional model.
    replace_real : bool, default=False
        Give generated samples only, the all-synthetic set. `sampling_strategy` then names the
        numbers of generated samples; a class that it does not name gets as many as it has.
    min_confidence : float in [0, 1] or None, default=0.3
        Least share of the votes of real neighbours that the wanted label must have, under the
        embedding of the model's own encoder (without one in its compact space). The sources
        themselves have no vote. A class has the weight that it gets by resampling: where classes
        become balanced, a rare one is not outvoted for its rarity. A majority (0.5) leaves typical
        samples alone, and little of classes that overlap. Multi-label: mean Jaccard index of the
        label sets. None lets all pass.
    n_neighbors : int, default=10
        Neighbours that vote; in a class of fewer samples, as many as it has besides the source.
    min_copy_ratio : float in [0, 1] or None, default=0.1
        A generated sample is a copy if its distance to the nearest real one is below this share of
        the distance to the next (compact space of vectors, 50 principal components of pixels).
        Copies are dropped. None lets all pass.
    max_attempts : int, default=5
        Generated candidates per wanted sample, at most. Where they do not suffice, fewer samples
        are given, with a warning.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of images given as rows of numbers; handed to a `diffusion` that
        does not say.
    max_epochs : int or "auto", default="auto"
        Passes over the data of the diffusion model; for ``diffusion="auto"``.
    batch_size : int or "auto", default="auto"
        Of ``diffusion="auto"``.
    learning_rate : float or "auto", default="auto"
        Of ``diffusion="auto"``.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to the diffusion model unless it is frozen; see
        :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    diffusion_ : estimator
        The fitted generator.
    sampling_strategy_ : dict
        Generated samples wanted, by class; multi-label: under the key "all".
    sample_indices_ : ndarray of int of shape (n_resampled,)
        For each row of the result the row of `X` that it is, or whose label it has.
    provenance_ : DataFrame of shape (n_generated, 7)
        For each generated row, in their order: ``source``, ``partner`` (-1: none), ``alpha``,
        the share of the source, ``seed`` and ``row`` of its noise, ``confidence`` and
        ``copy_ratio`` as above.
    selection_ : DataFrame
        For each class: samples wanted, candidates generated, dropped for another label
        (``low_confidence``), dropped as copies (``copies``), and accepted.
    quality_report_ : QualityReport or None
        Generated against real samples, up to 2 000 of each, see
        :func:`~diffaugkit.metrics.quality_report`; None for too few samples.
    history_ : DataFrame
        Training of the diffusion model.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray, only if the names are strings

    See Also
    --------
    EmbeddingConditionedDiffusion : ``augment`` and ``interpolate`` without labels and checks.

    Notes
    -----
    The generator learns without labels, but from all rows of ``fit``: inside imbalanced-learn's
    pipeline these are the rows of the training fold. A frozen one keeps what it saw: pre-train it
    without the test samples unless the setting is transductive.

    What the generator's principal components leave out of vectors wider than `n_pcs` comes back as
    noise of each feature (its `residual_noise`).

    The checks are ours: the paper adds all that is generated. `min_confidence` and
    `min_copy_ratio` of None do so, too.

    Containers come back as they were given: arrays, tensors, lists of numbers, DataFrames with
    their columns, sparse matrices (generated rows have no zeros, and cost accordingly), AnnData
    with generated rows that repeat the ``obs`` of their source and are marked in
    ``obs["generated"]``; of a generator with a `layer` it has that layer alone, and no ``.X``, of
    which nothing was generated. Lists of pictures or paths, and folders, become arrays.

    Inside a pipeline `groups` reach ``fit_resample`` through metadata routing only: enable it,
    import imblearn before diffaugkit, and call ``set_fit_resample_request(groups=True)``.

    References
    ----------
    "DiNO-Diffusion: Scaling Medical Diffusion Models via Self-Supervised Pre-Training", sections
    2.3, 2.4 and Table 1.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder
    >>> from diffaugkit.augmenter import GenerativeAugmenter
    >>> X, y = load_iris(return_X_y=True)
    >>> encoder = SelfSupervisedEncoder(max_epochs=2)
    >>> diffusion = EmbeddingConditionedDiffusion(encoder, max_epochs=2, width=32)
    >>> augmenter = GenerativeAugmenter(diffusion, min_confidence=None, random_state=0)
    >>> X_more, y_more = augmenter.fit_resample(X, y)
    >>> X_more.shape, y_more.shape, len(augmenter.provenance_)
    ((300, 4), (300,), 150)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchEstimator._parameter_constraints,
        "diffusion": [HasMethods(["fit"]), StrOptions({"auto"})],
        "strategy": [StrOptions({"reconstruction", "interpolation"})],
        "ratio": [Interval(Real, 0, None, closed="neither")],
        "sampling_strategy": [
            StrOptions(_STRATEGIES),
            Interval(Real, 0, 1, closed="right"),
            dict,
            list,
            tuple,
            callable,
            None,
        ],
        "alpha": [Interval(Real, 0, 1, closed="both"), tuple, list],
        "interpolation": [StrOptions({"lerp", "slerp"})],
        "strength": [Interval(Real, 0, 1, closed="right")],
        "replace_real": ["boolean"],
        "min_confidence": [Interval(Real, 0, 1, closed="both"), None],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "min_copy_ratio": [Interval(Real, 0, 1, closed="both"), None],
        "max_attempts": [Interval(Integral, 1, None, closed="left")],
        "image_shape": [tuple, list, None],
        **{
            name: [*TorchEstimator._parameter_constraints[name], StrOptions({"auto"})]
            for name in ("max_epochs", "batch_size", "learning_rate")
        },
    }
    _extra_state = ("_sampling_seed", "_report")
    # `fit` ignores them: a pipeline has to be told of `fit_resample` only.
    __metadata_request__fit = {"groups": UNUSED}  # noqa: RUF012

    def __init__(
        self,
        diffusion="auto",
        strategy="reconstruction",
        *,
        ratio=1.0,
        sampling_strategy=None,
        alpha=(0.5, 0.6, 0.7, 0.8, 0.9),
        interpolation="lerp",
        strength=1.0,
        replace_real=False,
        min_confidence=0.3,
        n_neighbors=10,
        min_copy_ratio=0.1,
        max_attempts=5,
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
        self.diffusion = diffusion
        self.strategy = strategy
        self.ratio = ratio
        self.sampling_strategy = sampling_strategy
        self.alpha = alpha
        self.interpolation = interpolation
        self.strength = strength
        self.replace_real = replace_real
        self.min_confidence = min_confidence
        self.n_neighbors = n_neighbors
        self.min_copy_ratio = min_copy_ratio
        self.max_attempts = max_attempts
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
        """Fit the generator alone, on samples that need no labels.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or images of shape (n_samples, ...)
            As for :class:`~diffaugkit.EmbeddingConditionedDiffusion`; cells normalised.
        y : array-like or None, default=None
            Handed to the diffusion model, and by it to its encoder; ours ignore it.
        groups : None
            Ignored; :meth:`resample` uses it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used.
        """
        self._fit(X, y)
        return self

    @_fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit_resample(self, X, y, *, groups=None):
        """Fit the generator, and return the samples with generated ones after them.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or images of shape (n_samples, ...)
            As for :meth:`fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Classes, or indicators of labels. Indicators with one label in each row are classes.
        groups : array-like of shape (n_samples,) or None, default=None
            Patient, slide or batch of each sample: pairs of an interpolation stay within one.

        Returns
        -------
        X_resampled : the kind of `X`
            Real rows as they were given, then the generated ones, class by class.
        y_resampled : the kind of `y`

        Raises
        ------
        ValueError
            For input that cannot be used, targets that are no classes, or a `sampling_strategy`
            that does not fit them.

        Warns
        -----
        ConvergenceWarning
            If fewer samples passed the checks than were wanted.
        UserWarning
            If most of what is added nearly copies real samples.
        """
        targets = read_targets(y)
        self._wanted(targets)
        self._alphas()

        def check(rows, conditional):
            check_consistent_length(range(len(rows)), targets.labels)
            check_groups(groups, len(rows))
            self._check_condition(conditional)

        # What can be refused is refused before minutes of training.
        self._fit(X, y, check)
        return self._resample(X, y, groups)

    def resample(self, X, y, *, groups=None):
        """Augment a labelled set with the generator as it was fitted, on this set or another.

        Parameters
        ----------
        X : as for :meth:`fit`
        y : as for :meth:`fit_resample`
        groups : as for :meth:`fit_resample`, default=None

        Returns
        -------
        X_resampled, y_resampled
            As of :meth:`fit_resample`, whose attributes are set anew. Calls repeat.
        """
        check_is_fitted(self, "diffusion_")
        self._validate_params()
        return self._resample(X, y, groups)

    @property
    def quality_report_(self):
        """Generated against real samples; None for too few."""
        check_is_fitted(self, "provenance_")
        return None if self._report is None else QualityReport(**self._report)

    # ---- the generator ---------------------------------------------------------------------------

    def _fit(self, X, y, check=None):
        seed = self._seed()
        if isinstance(self.diffusion, FrozenEstimator):
            self.diffusion_ = self.diffusion
            generator = self._generator()
            check_is_fitted(generator, "module_")
            check_reading(self, generator.image_shape_, generator.layer)
            generator._check_rows(X, self.image_shape)
            self.n_features_in_ = generator.n_features_in_
            vars(self).pop("feature_names_in_", None)
            if hasattr(generator, "feature_names_in_"):
                self.feature_names_in_ = generator.feature_names_in_
        else:
            diffusion = self._make_diffusion(seed)
            rows = check_X(
                self,
                X,
                reset=True,
                images=True,
                image_shape=diffusion.image_shape,
                layer=diffusion.layer,
                allow_counts=False,
                ensure_min_samples=2,
                ensure_min_features=2,
            )
            if check is not None:
                check(rows, diffusion.encoder is not None)
            diffusion.fit(rows, y)
            diffusion.set_params(checkpoint_dir=None)
            self.diffusion_ = diffusion
        generator = self._generator()
        self.history_, self.n_iter_ = generator.history_, generator.n_iter_
        self._sampling_seed = self._child_seed(seed, 1)

    def _make_diffusion(self, seed):
        if isinstance(self.diffusion, str):
            names = ("max_epochs", "batch_size", "learning_rate")
            given = {name: getattr(self, name) for name in names}
            diffusion = EmbeddingConditionedDiffusion(**given)
        else:
            diffusion = _check_generator(clone(self.diffusion))
        if diffusion.image_shape is None:
            diffusion.set_params(image_shape=self.image_shape)
        check_reading(self, diffusion.image_shape, diffusion.layer)
        return self._hand_over(
            diffusion,
            random_state=self._child_seed(seed, 0),
            checkpoint_dir=self._folder("diffusion"),
        )

    def _generator(self):
        model = getattr(self.diffusion_, "estimator", self.diffusion_)
        return _check_generator(_with_encoder(model))

    # ---- resampling ------------------------------------------------------------------------------

    def _wanted(self, targets):
        """Numbers of generated samples by class."""
        options = {"ratio": self.ratio, "replace_real": self.replace_real}
        return count_wanted(self.sampling_strategy, targets, **options)

    def _weights(self, targets, wanted):
        """Weight of each real sample's vote: how often its class will be there per real sample.

        Where classes are balanced, eight samples of a rare one cannot outvote sixty of another;
        whose label a place has is then a question of their densities, not of their numbers.
        """
        if targets.codes is None:
            return np.ones(len(targets.labels))
        sizes = targets.sizes()
        after = [wanted[name] + (0 if self.replace_real else size) for name, size in sizes.items()]
        return (np.maximum(after, 1) / np.maximum(list(sizes.values()), 1))[targets.codes]

    def _resample(self, X, y, groups):
        import pandas as pd

        generator = self._generator()
        rows = generator._check_rows(X, self.image_shape)
        targets = read_targets(y)
        check_consistent_length(range(len(rows)), targets.labels)
        groups = check_groups(groups, len(rows))
        wanted = self._wanted(targets)
        views = _Views(generator, rows)
        self._check_condition(generator._condition is not None)

        plans = self._plan(targets, groups, wanted)
        found, counts = self._generate(views, targets, plans, wanted)
        made, table = found["made"], pd.DataFrame({name: found[name] for name in _PROVENANCE})
        self._warn(wanted, counts, table)

        n = 0 if self.replace_real else len(rows)
        indices = np.append(np.arange(n), found["source"]).astype(np.int64)
        X_out = append_like(X, made, rows, indices, generator)
        self._report = self._make_report(views, found, targets)
        self.sampling_strategy_, self.sample_indices_ = wanted, indices
        self.provenance_ = table
        self.selection_ = pd.DataFrame(
            [{"class": name, "wanted": wanted[name], **counts[name]} for name in wanted]
        )
        return X_out, take_like(y, indices, X_out)

    def _check_condition(self, conditional):
        if conditional:
            return
        if self.strategy == "interpolation":
            raise ValueError("strategy='interpolation' needs a model with an encoder.")
        if self.strength == 1:
            raise ValueError(
                "The diffusion model is unconditional: from noise alone it knows no label. Take "
                "strength below 1, which starts from a labelled sample, or a model with an encoder."
            )

    def _alphas(self):
        alphas = np.atleast_1d(np.asarray(self.alpha, dtype=np.float64))
        if not (alphas.size and alphas.min() >= 0 and alphas.max() <= 1):
            raise ValueError(f"alpha={self.alpha!r} must be in [0, 1], or several such values.")
        return alphas

    def _plan(self, targets, groups, wanted):
        """Draw the candidates of each class: source, partner (-1: none) and share of the source."""
        plans, alphas = {}, self._alphas()
        for number, (name, members) in enumerate(targets.members().items()):
            rng = np.random.default_rng(mix_seed(self._sampling_seed, 1, number))
            n = wanted.get(name, 0) * self.max_attempts
            source = members[cycle(len(members), n, rng)]
            partner, alpha = np.full(n, -1), np.ones(n)
            pairs = None
            if self.strategy == "interpolation" and n:
                pairs = SharedLabelPairs(
                    targets.labels[members], None if groups is None else groups[members]
                )
            if pairs is not None and len(pairs):
                ends = members[pairs.draw(n, rng)]  # (n, 2)
                alpha = rng.choice(alphas, size=n)
                # The nearer end comes first: it is the source, and gives the label.
                swap = alpha < 0.5
                source = np.where(swap, ends[:, 1], ends[:, 0])
                partner = np.where(swap, ends[:, 0], ends[:, 1])
                alpha = np.where(swap, 1 - alpha, alpha)
            plans[name] = source, partner, alpha
        return plans

    def _generate(self, views, targets, plans, wanted):
        """Generate, check and replace, until each class has what it wants or its attempts end."""
        counts = {
            name: {"candidates": 0, "low_confidence": 0, "copies": 0, "accepted": 0}
            for name in wanted
        }
        judge = _Judge(views, targets, self.n_neighbors, self._weights(targets, wanted))
        parts = []
        for attempt in range(self.max_attempts):
            numbers, plan = [], []
            for number, (name, count) in enumerate(counts.items()):
                start, missing = count["candidates"], wanted[name] - count["accepted"]
                plan.append([part[start : start + missing] for part in plans[name]])
                numbers += [number] * missing
            if not numbers:
                break
            source, partner, alpha = (np.concatenate(part) for part in zip(*plan, strict=True))
            seed = mix_seed(self._sampling_seed, 2, attempt) % 2**32
            made, spots, features = views.generate(
                source, partner, alpha, seed, self.interpolation, self.strength
            )
            judged = []
            with progress_bar(self.verbose, len(spots), "judging", "row", leave=False) as bar:
                for i in gen_batches(len(spots), 4096):
                    confidence = judge.confidence(features[i], source[i], partner[i])
                    judged.append((confidence, judge.copy_ratio(spots[i])))
                    bar.update(i.stop - i.start)
            confidence, ratio = (np.concatenate(part) for part in zip(*judged, strict=True))
            doubtful = confidence < (self.min_confidence or 0)
            copied = ~doubtful & (ratio < (self.min_copy_ratio or 0))
            keep = ~(doubtful | copied)
            numbers = np.array(numbers)
            for number, name in enumerate(wanted):
                own = numbers == number
                counts[name]["candidates"] += int(own.sum())
                counts[name]["low_confidence"] += int((own & doubtful).sum())
                counts[name]["copies"] += int((own & copied).sum())
                counts[name]["accepted"] += int((own & keep).sum())
            found = (made, spots, features, numbers, source, partner, alpha)
            found += (np.full(len(keep), seed), np.arange(len(keep)), confidence, ratio)
            parts.append([part[keep] for part in found])
        if not parts:
            whole, share = np.empty(0, dtype=np.int64), np.empty(0)
            parts.append([*views.nothing(), *[whole] * 3, share, *[whole] * 2, *[share] * 2])
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        order = np.argsort(joined[3], kind="stable")  # class by class
        found = dict(zip(("made", "spots", "features", "class"), joined, strict=False))
        found |= dict(zip(_PROVENANCE, joined[4:], strict=True))
        return {name: values[order] for name, values in found.items()}, counts

    def _warn(self, wanted, counts, table):
        short = {name: c for name, c in counts.items() if c["accepted"] < wanted[name]}
        if short:
            shown = some(
                f"{name!r}: {c['accepted']} of {wanted[name]} ({c['low_confidence']} candidates "
                f"with another label, {c['copies']} copies)"
                for name, c in short.items()
            )
            warn(
                f"{len(short)} of {len(wanted)} classes got fewer samples than wanted: {shown}. "
                "More attempts (max_attempts), a longer training of the diffusion model or a lower "
                "min_confidence give more.",
                ConvergenceWarning,
            )
        ratio = table["copy_ratio"].median() if len(table) else 1.0
        if ratio < NEAR_COPY:
            warn(
                f"Half of the generated samples have a copy ratio below {ratio:.2f} (near-copies: "
                f"below {NEAR_COPY}): they repeat real samples and add little. Train the diffusion "
                "model for fewer epochs or on more data, give it condition_noise or an encoder of "
                "fewer dimensions, or raise min_copy_ratio."
            )

    def _make_report(self, views, found, targets):
        names = None if targets.codes is None else np.asarray(targets.classes)[targets.codes]
        return sampler_report(
            (views.spots, views.features),
            (found["spots"], found["features"]),
            found["source"],
            names,
            self.n_neighbors,
        )

    def __sklearn_tags__(self):  # noqa: D105
        return sampler_tags(super().__sklearn_tags__())


def sampler_report(real, generated, source, labels, n_neighbors):
    """Plain values of the report; None for few samples.

    Parameters
    ----------
    real, generated : tuple of two ndarray
        Spots and features, of one row per sample; see `_Views`.
    source : ndarray of int
        Row of `real` of each generated one.
    labels : ndarray or None
        Class of each real sample.
    n_neighbors : int
        Voters.

    Returns
    -------
    dict or None
        Arguments of a QualityReport.
    """
    (spots, features), (made, made_features) = real, generated
    if len(made) < 6 or len(np.unique(spots, axis=0)) < 6:
        return None
    if labels is not None and np.unique(labels, return_counts=True)[1].max() < 2:
        labels = None
    with many_classes():
        report = quality_report(
            spots,
            made,
            source,
            embed=(features, made_features),
            labels=labels,
            n_neighbors=min(n_neighbors, len(spots) // 2),
        )
    return asdict(report)


# ---- real and generated samples as the checks see them -------------------------------------------


def _with_encoder(model):
    """Give the generator of DiffAugEM or GenSIS together with the encoder that it listens to."""
    if isinstance(model, DiffAugEM):
        check_is_fitted(model, "encoder_")
        if model.condition != "embedding" or model.diffusion_ is None:
            raise ValueError(
                "A DiffAugEM generates for labels with condition='embedding' and an M-step only, "
                f"but has condition={model.condition!r} and schedule={model.schedule!r}."
            )
    elif isinstance(model, GenSIS):
        check_is_fitted(model, "encoder_")
    else:
        return model
    generator = copy.copy(getattr(model.diffusion_, "estimator", model.diffusion_))
    generator.encoder_ = model._listened_to()
    return generator.set_params(
        **{name: getattr(model, name) for name in ("layer", "image_shape") if hasattr(model, name)}
    )


def _check_generator(diffusion):
    if not isinstance(diffusion, EmbeddingConditionedDiffusion):
        raise TypeError(
            f"diffusion={type(diffusion).__name__} cannot generate for labels: give an "
            "EmbeddingConditionedDiffusion, or FrozenEstimator(...) of a fitted one."
        )
    return diffusion


class _Views:
    """Samples in the two spaces of the checks: `spots`, the data's own, and `features`, of labels.

    Spots are coordinates in :class:`~diffaugkit.spaces.CopySpace`. Features are the embedding of
    the model's own encoder, or spots where there is none.
    """

    def __init__(self, generator, rows):
        self.generator, self.rows = generator, rows
        self.embeddings = None
        if generator._condition is not None:
            self.embeddings = np.asarray(generator._embed(rows), dtype=np.float32)
        self.space = CopySpace(rows, generator._space_of())
        self.spots = self.space.of(rows)
        flat = self.embeddings
        self.features = self.spots if flat is None else flat.reshape(len(flat), -1)

    def generate(self, source, partner, alpha, seed, kind, strength):
        """Generate under these conditions: samples in the form of output, spots and features."""
        generator, cond = self.generator, None
        if self.embeddings is not None:
            cond = self.embeddings[source]
            between = np.flatnonzero(partner >= 0)
            if len(between):
                ends = self.features[source[between]], self.features[partner[between]]
                mixed = interpolate_rows(*ends, alpha[between], kind)
                cond[between] = mixed.reshape(-1, *cond.shape[1:])
        start = None if strength == 1 else _take_rows(self.rows, source)
        latents = generator._sample_latents(cond, len(source), seed, start, strength)
        space = generator._space_of()
        made = space.output(space.decode(latents, seed))
        if self.rows.is_image:
            again = generator._image_rows(made)
            spots = self.space.of(again)
        else:
            again, spots = DenseRows(made), self.space.of_latents(latents)
        if cond is None:
            return made, spots, spots
        return made, spots, np.asarray(generator._embed(again)).reshape(len(made), -1)

    def nothing(self):
        """Give samples, spots and features of no candidate."""
        space = self.generator._space_of()
        made = space.output(space.decode(torch.zeros(1, *space.shape)))
        return made[:0], self.spots[:0], self.features[:0]


class _Judge:
    """Label confidence and copy ratio of candidates, by the real samples."""

    def __init__(self, views, targets, n_neighbors, weights):
        self.labels, self.weights = targets.labels, weights
        self.voters = views.features
        n = len(self.voters)
        sets = self.labels.astype(np.float32)
        # Samples that share a label: a class of three has two voters for the third.
        kinds, kind, sizes = np.unique(sets, axis=0, return_inverse=True, return_counts=True)
        none, company = ~kinds.any(axis=1), np.empty(len(kinds), dtype=np.int64)
        # Label sets may be as many as samples: piece by piece.
        for part in gen_batches(len(kinds), max(1, 2_000_000 // len(kinds))):
            together = (kinds[part] @ kinds.T > 0) | (none[part, None] & none)
            company[part] = together @ sizes
        self.company = company[kind.reshape(-1)]
        self.n_neighbors = min(n_neighbors, n)
        self.search = NearestNeighbors(n_neighbors=min(n_neighbors + 2, n)).fit(self.voters)
        # Equal samples count once: a copy of one that is there twice is a copy.
        self.different = np.unique(views.spots, axis=0)
        self.nearest = NearestNeighbors(n_neighbors=min(2, len(self.different)))
        self.nearest.fit(self.different)

    def confidence(self, features, source, partner):
        """Share of neighbours with the wanted label, or the mean agreement of label sets."""
        neighbors = self.search.kneighbors(features, return_distance=False)  # (n, k + 2)
        company = self.company[source] - 1 - (partner >= 0)
        alone = company < 1
        votes = alone[:, None] | (neighbors != source[:, None]) & (neighbors != partner[:, None])
        most = np.clip(company, 1, self.n_neighbors)[:, None]
        votes &= np.cumsum(votes, axis=1) <= most
        votes = votes * self.weights[neighbors]
        agree = np.zeros(votes.shape)
        for column, neighbor in enumerate(neighbors.T):
            own, other = self.labels[source], self.labels[neighbor]
            union = (own | other).sum(axis=1)
            both = (own & other).sum(axis=1)
            agree[:, column] = np.where(union, both / np.maximum(union, 1), 1.0)
        return (agree * votes).sum(axis=1) / votes.sum(axis=1)

    def copy_ratio(self, spots):
        """Distance to the nearest real sample as a share of that to the next."""
        if len(self.different) < 2:
            return np.ones(len(spots))
        near = self.nearest.kneighbors(spots, return_distance=False)
        # Pair by pair: the search expands the square, and loses digits near zero.
        first, second = (np.linalg.norm(spots - self.different[i], axis=1) for i in near.T)
        first, second = np.minimum(first, second), np.maximum(first, second)
        return np.divide(first, second, out=np.zeros(len(spots)), where=second > 0)


def _take_rows(rows, index):
    taken = rows[index]
    return ImageRows.like(rows, taken) if rows.is_image else DenseRows(taken.numpy())
