"""More labelled samples from few, by a generator that was trained without labels.

Ye, Ni et al., "Synthetic Augmentation with Large-scale Unconditional Pre-training" (HistoDiffusion,
MICCAI 2023). An unconditional diffusion model learns from a large unlabelled pool. A small labelled
set then tunes the decoder, trains a classifier of noised latents that pulls the generator to the
class asked for, and decides which of the candidates are good enough.

==================  ===================================================================
paper               here
==================  ===================================================================
epsilon_theta       ``diffusion_``, unconditional, never changed               (Eq. 3)
E, D'               ``autoencoder_``: the encoder as it was, the tuned decoder (Eq. 5)
phi                 ``module_``, the classifier of noised latents              (Eq. 6)
g                   ``guidance_scale``                                   (Eqs. 7, 8)
class centroids     ``centroids_``, of real samples alone
==================  ===================================================================
"""

import copy
import math
from numbers import Integral, Real

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch.nn import functional as F

from diffaugkit.arrays import some, warn
from diffaugkit.augmenter import GenerativeAugmenter, sampler_report
from diffaugkit.autoencoder import LatentAutoencoder, _feature_distance, _features
from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchEstimator,
    _fit_context,
    all_or_nothing,
    described,
)
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X
from diffaugkit.denoisers import UNetDenoiser
from diffaugkit.diffusion import SAMPLERS, sample_in_batches
from diffaugkit.embedding_diffusion import (
    EmbeddingConditionedDiffusion,
    _as_given,
    call_seed,
    embed_rows,
)
from diffaugkit.histo_networks import DecoderOf, GuidedDenoiser, LatentClassifier
from diffaugkit.image_rows import ImageRows, from_unit, to_unit
from diffaugkit.metrics import NEAR_COPY, QualityReport, copy_ratio, nearest_training_samples
from diffaugkit.resampling import (
    append_like,
    check_reading,
    count_wanted,
    read_targets,
    sampler_tags,
    take_like,
)
from diffaugkit.rows import DenseRows
from diffaugkit.runtime import isolated_rng, mix_seed
from diffaugkit.spaces import CopySpace, space_from_state
from diffaugkit.training import auto_epochs

__all__ = ["HistoDiffusionAugmenter"]

_DIFFUSION, _ENCODER, _AUXILIARY, _DECODER, _CLASSIFIER, _SAMPLES, _TRIAL = range(7)
# What each of the three fits depends on beside data and weights.
_SHAPE = {
    "auxiliary": ("class_weight",),
    "decoder": ("class_weight", "auxiliary_weight", "width", "diffusion"),
    "classifier": ("class_weight", "noised_classifier", "diffusion"),
}
# Features of the U-Net are read at T over this, where it looks for more than at t = 0. Nearest
# centroids from 50 digits (8 x 8 pixels) and 54 lung tiles (latents), accuracy on others: 0.82 and
# 0.79 at t = 0, 0.90 and 0.79 at T / 20, 0.91 and 0.76 at T / 5; no better with noise added.
_FEATURE_LEVEL = 20
# Scales of guidance that "auto" tries, samples of a class each time, and how many must be right.
_SCALES, _TRIAL_SIZE, _TRIAL_RIGHT = (1.0, 2.0, 4.0, 8.0, 16.0), 20, 0.9
# Draws of candidates for a class before it goes short.
_MOST_ROUNDS = 5
# Candidates of each kind and class that are kept for a look at them.
_EXAMPLES = 8
# Images from this size on are generated as latents where the generator is "auto".
_LARGE = 48
# Neighbours that vote in the quality report.
_VOTERS = 10
# Values of a sparse labelled set up to which it is made dense: the same bits as from an array.
_DENSE_VALUES = 2**26


class HistoDiffusionAugmenter(OneToOneFeatureMixin, TorchEstimator):
    """Add generated samples to a small labelled set, from a generator that needed no labels.

    Fitting adapts a pre-trained unconditional diffusion model to the labelled set without changing
    it: the decoder of its autoencoder is tuned on a copy, and a classifier of noised latents
    learns to pull samples to a class. ``fit_resample`` draws candidates of each class, keeps those
    that lie nearest to the centroid of their own class, closest first, and puts them behind the
    real samples: a sampler as imbalanced-learn has them, for images and vectors.

    Parameters
    ----------
    diffusion : "auto" or estimator, default="auto"
        The generator, an :class:`~diffaugkit.EmbeddingConditionedDiffusion` with ``encoder=None``
        (of a conditional one the null condition is used). It is cloned and fitted to `unlabeled`,
        or to `X` without one. ``FrozenEstimator(fitted)`` is used as it is: one pre-training then
        serves many labelled sets, and folds. "auto" generates vectors and small images as they
        are, and images of 48 pixels or more as the latents of a ``LatentAutoencoder()``.
    encoder : None or estimator, default=None
        What gives the features in which candidates are judged: an estimator with ``transform``,
        cloned and fitted to the labelled set, or used as it is inside ``FrozenEstimator``. None
        takes what the generator knows without labels: of images the middle features of its U-Net
        (:meth:`~diffaugkit.denoisers.UNetDenoiser.features`), standardised on the labelled set; of
        vectors, and under another denoiser, the sample in the generator's space, in units of `X`.
        Never the latent classifier, whose gradient the guidance follows: on lung tiles (54 labels)
        63 % of the candidates that it accepted were of their class by a classifier of all labels,
        and 97 % of those that the U-Net accepted.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of the images in the rows of a 2-D `X`; one entry may be -1.
    sampling_strategy : None, str, float, dict, list or callable, default=None
        As in imbalanced-learn's over-sampling, see :class:`~diffaugkit.GenerativeAugmenter`: "auto"
        brings every class to the size of the largest. None goes by `ratio`, which keeps the
        balance of the classes as it is.
    ratio : float, default=2.0
        Generated samples per real one, in each class. Used where `sampling_strategy` is None. The
        paper has 0.5, 1, 2 and 3, and is best at 2.
    guidance_scale : float or "auto", default="auto"
        Scale of the classifier's gradient: 1 is the paper's (and Bayes' rule), the released code
        has 10, 0 ignores the class. Larger scales hit the class more surely and vary less: on
        three blobs 96 % and a spread of 0.96 at 1, 99 % and 0.80 at 2 (real: 0.99). A classifier of
        few labels is wrong about much of what is generated, and needs more: "auto" takes for each
        class the smallest of 1, 2, 4, 8 and 16 at which 18 of 20 trial samples are nearest to the
        centroid of their class, or else the one at which most are. See ``guidance_scale_``.
    selection : {"centroid", "consistent", "random"}, default="centroid"
        "centroid" keeps a candidate only if the nearest class centroid is that of its class, and
        of those the closest (the paper). "consistent" has the same condition and keeps what comes
        first: the closest vary least. "random" keeps what comes first, of all.
    n_candidates : float, default=2.0
        Candidates per wanted sample of one round of drawing. Up to five rounds are drawn for a
        class; one that still has too few is warned of, and gets fewer.
    noised_classifier : bool, default=True
        Train the classifier at all noise levels, t ~ U(0, T), and tell it the level (Eq. 6). False
        is the released code: clean latents only. Measured on 24 labelled rows of three blobs whose
        centres are 15 to 19 apart: class means of the samples are off by 1.4, or by 7.2 with False.
    tune_decoder : bool, default=True
        Tune the decoder to the labelled images (Eq. 5), where there is an autoencoder.
    auxiliary_weight : float, default=1.0
        lambda_CE of Eq. 5: weight of the classification of the decoded images. 0 does without.
    sampler : {"ddim", "ddpm", "dpmsolver++"}, default="ddim"
        The paper's is DDIM, which is deterministic; the released code's, with eta = 1, is "ddpm".
    n_sampling_steps : int, default=50
        Steps of the sampler, clipped to the number of timesteps. The paper has 200, its code 50.
    class_weight : {"balanced"} or None, default="balanced"
        Whether the classifiers count each class the same, however rare.
    width : int, default=64
        Width of the classifiers; see `diffaugkit.histo_networks`.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    max_epochs : int or "auto", default="auto"
        Epochs of each classifier: as many as make 1 000 batches, from 10 to 1 000; the paper has
        100, of 157 batches. On 24 labelled rows of three blobs in 20 dimensions 100 batches
        brought 86 % of the samples to the class asked for, 1 000 batches 96 %.
    decoder_epochs : int or "auto", default="auto"
        Epochs of the decoder: as many as make 500 batches, from 10 to 500; the paper has 50.
    batch_size : int, default=32
        Of all three, the paper's for the latent classifier.
    learning_rate : float, default=1e-3
        Peak rate of the classifiers, AdamW with warm-up and cosine. The paper's 5e-5 is for
        networks of many times the width.
    decoder_learning_rate : float, default=1e-4
        Peak rate of the decoder, which has learned already; the paper has 5e-5.
    weight_decay : float, default=0.05
        Of the classifiers, the released code's.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    diffusion_ : estimator
        The generator, fitted here or given.
    autoencoder_ : LatentAutoencoder or None
        A copy of the generator's with the tuned decoder; None where there is none.
    encoder_ : estimator or None
        What gives the features, None for the generator itself.
    module_ : nn.Module
        The latent classifier.
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.
    centroids_ : ndarray of shape (n_classes, n_components), float64
        Mean of the features of the real samples of each class, each of length 1.
    guidance_scale_ : ndarray of shape (n_classes,), float64
        Scale of each class, found or given.
    sampling_strategy_ : dict
        Generated samples wanted, by class.
    selection_ : DataFrame
        After ``fit_resample``, a row per class: class, wanted, candidates, right_centroid (how many
        of them are nearest to their own centroid), kept, mean distances to that centroid
        (distance_real, distance_kept, distance_rejected), and copy_ratio: median distance of the
        kept ones to the nearest real sample as a share of that to the next, in the compact space
        of vectors or 50 principal components of pixels; near 0 for copies. Real samples are the
        labelled ones and those of `unlabeled`; what a frozen generator learned from before is not
        known here (:func:`~diffaugkit.metrics.copy_ratio` compares with it).
    sample_indices_ : ndarray of shape (n_resampled,), int64
        After ``fit_resample``, for each row of the result the row of `X` that it is, or the nearest
        one of its class in the features.
    quality_report_ : QualityReport or None
        After ``fit_resample``, kept samples against the labelled ones, the source of each the
        nearest of its class in the features; see :func:`~diffaugkit.metrics.quality_report`. None
        for too few samples.
    history_ : DataFrame
        One row per epoch: phase ("auxiliary", "decoder", "classifier"), epoch, loss, its parts,
        learning_rate.
    image_shape_ : tuple of (int, int, int) or None
        Height, width and channels; None for vectors.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray, only if the names are strings

    See Also
    --------
    EmbeddingConditionedDiffusion : The generator.
    LatentAutoencoder : Its autoencoder.

    Notes
    -----
    Where paper and released code differ, the paper is followed, with what the code adds as
    parameters. Two differences are ours. The reconstruction error of Eq. 5 has the pixel and the
    perceptual term of the autoencoder, but no discriminator: that of the pre-training is not kept.
    And the classifier reads sqrt(alpha_bar_t) z_t, see
    :class:`~diffaugkit.histo_networks.LatentClassifier`.

    There is no ``transform``, so that imbalanced-learn's ``Pipeline`` takes the augmenter as a
    step: test folds are never augmented. Such a pipeline passes no `unlabeled` on: pre-train first,
    and give ``FrozenEstimator(pretrained)``. The pre-training must not see test images, unless that
    is meant.

    References
    ----------
    Ye, Ni et al., MICCAI 2023, sections 2.2 and 3. Dhariwal and Nichol 2021. Xue et al. 2021,
    "Selective synthetic augmentation with HistoGAN", for the selection.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.frozen import FrozenEstimator
    >>> from diffaugkit import EmbeddingConditionedDiffusion
    >>> from diffaugkit.histo_augmenter import HistoDiffusionAugmenter
    >>> X, y = load_iris(return_X_y=True)
    >>> pretrained = EmbeddingConditionedDiffusion(
    ...     encoder=None, width=32, max_epochs=20, random_state=0
    ... ).fit(X)
    >>> augmenter = HistoDiffusionAugmenter(
    ...     FrozenEstimator(pretrained), ratio=1.0, width=16, max_epochs=100, random_state=0
    ... )
    >>> X_more, y_more = augmenter.fit_resample(X[::10], y[::10])
    >>> X_more.shape, augmenter.selection_["kept"].tolist()
    ((30, 4), [5, 5, 5])
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchEstimator._parameter_constraints,
        "diffusion": [HasMethods(["fit", "sample"]), StrOptions({"auto"})],
        "encoder": [HasMethods(["fit", "transform"]), None],
        "image_shape": [tuple, list, None],
        "sampling_strategy": GenerativeAugmenter._parameter_constraints["sampling_strategy"],
        "ratio": [Interval(Real, 0, None, closed="neither")],
        "guidance_scale": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "selection": [StrOptions({"centroid", "consistent", "random"})],
        "n_candidates": [Interval(Real, 1, None, closed="left")],
        "noised_classifier": ["boolean"],
        "tune_decoder": ["boolean"],
        "auxiliary_weight": [Interval(Real, 0, None, closed="left")],
        "sampler": [StrOptions(set(SAMPLERS))],
        "n_sampling_steps": [Interval(Integral, 1, None, closed="left")],
        "class_weight": [StrOptions({"balanced"}), None],
        "width": [Interval(Integral, 1, None, closed="left")],
        "layer": [str, None],
        "max_epochs": [*TorchEstimator._parameter_constraints["max_epochs"], StrOptions({"auto"})],
        "decoder_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "decoder_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
    }
    _extra_state = ("_pixel_range", "_layout", "_sampling_seed", "_examples", "_report", "_judge")

    def __init__(
        self,
        diffusion="auto",
        encoder=None,
        *,
        image_shape=None,
        sampling_strategy=None,
        ratio=2.0,
        guidance_scale="auto",
        selection="centroid",
        n_candidates=2.0,
        noised_classifier=True,
        tune_decoder=True,
        auxiliary_weight=1.0,
        sampler="ddim",
        n_sampling_steps=50,
        class_weight="balanced",
        width=64,
        layer=None,
        max_epochs="auto",
        decoder_epochs="auto",
        batch_size=32,
        learning_rate=1e-3,
        decoder_learning_rate=1e-4,
        weight_decay=0.05,
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.diffusion = diffusion
        self.encoder = encoder
        self.image_shape = image_shape
        self.sampling_strategy = sampling_strategy
        self.ratio = ratio
        self.guidance_scale = guidance_scale
        self.selection = selection
        self.n_candidates = n_candidates
        self.noised_classifier = noised_classifier
        self.tune_decoder = tune_decoder
        self.auxiliary_weight = auxiliary_weight
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.class_weight = class_weight
        self.width = width
        self.layer = layer
        self.max_epochs = max_epochs
        self.decoder_epochs = decoder_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.decoder_learning_rate = decoder_learning_rate
        self.weight_decay = weight_decay
        self.device = device
        self.precision = precision
        self.compile = compile
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks

    @_fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit(self, X, y, *, unlabeled=None):
        """Adapt the generator to a labelled set.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or Rows of shape (n_samples, n_features)
            Normalised values, or images of the size of the pre-training: an array of three or four
            dimensions, a list of pictures or paths, or a 2-D array with `image_shape`.
        y : array-like of shape (n_samples,), or one column per class (n_samples, n_classes) of 0, 1
            Classes, at least two.
        unlabeled : as `X`, or a folder or shards, or None, default=None
            The pool on which the generator is trained; None trains it on `X`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, a single class, or `unlabeled` beside a frozen generator.
        TypeError
            If the generator is no ``EmbeddingConditionedDiffusion``.
        """
        self._fit(X, y, unlabeled)
        return self

    def sample(self, y, *, random_state=None):
        """Generate a sample of each given class, unselected.

        Parameters
        ----------
        y : array-like of shape (n,)
            Classes.
        random_state : int, RandomState, Generator or None, default=None
            Seed of the noise. Noise belongs to the row: the sample of row i depends on the seed, on
            i and on ``y[i]`` alone. None takes the seed of the fit, so that calls repeat.

        Returns
        -------
        ndarray of shape (n, n_features), float32; or of n images as `X` had them
            In the space of `X`.

        Raises
        ------
        ValueError
            For a class that was not in `y` of ``fit``.
        """
        check_is_fitted(self, "module_")
        y = column_or_1d(y)
        numbers = {label: code for code, label in enumerate(self.classes_.tolist())}
        codes = np.array([numbers.get(label, -1) for label in y.tolist()])
        if not len(y) or codes.min() < 0:
            unknown = list(dict.fromkeys(label for label in y.tolist() if label not in numbers))
            raise ValueError(f"y must be classes of fit, {list(numbers)}, got {unknown}.")
        seed = call_seed(random_state, self._sampling_seed)
        return self._generate(codes, seed)

    def centroid_distances(self, X):
        """Distances of samples to the class centroids, by which candidates are selected.

        Both have length 1 in feature space, or nearly (a centroid is the mean of features of
        length 1), so that distances lie between 0 and 2.

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)
            Real or generated samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64
            Columns in the order of ``classes_``.

        Raises
        ------
        NotFittedError, ValueError
            Before ``fit``; for input that does not match it.
        """
        check_is_fitted(self, "module_")
        rows = self._generator()._check_rows(X, self.image_shape)
        return cdist(self._features(rows), self.centroids_)

    @_fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit_resample(self, X, y, *, unlabeled=None):
        """Adapt the generator to a labelled set, and add generated samples to it.

        Parameters
        ----------
        X, y, unlabeled
            As for :meth:`fit`.

        Returns
        -------
        X_resampled : of the kind of `X`, with n_resampled rows
            The real samples first, then the generated ones class by class, closest first where
            `selection` is "centroid". Lists of pictures or paths come back as one array.
        y_resampled : of the kind of `y`

        Raises
        ------
        ValueError, TypeError
            As for :meth:`fit`.

        Warns
        -----
        ConvergenceWarning
            If a class gets fewer samples than wanted.
        UserWarning
            If half of what is added nearly copies real samples, labelled or of `unlabeled`.
        """
        rows, pool, codes, features = self._fit(X, y, unlabeled)
        made, sources = self._select(rows, pool, codes, features)
        indices = np.append(np.arange(len(rows)), sources).astype(np.int64)
        self.sample_indices_ = indices
        # Of images the caller's form, of cells the generator's genes and layer.
        form = self if rows.is_image else self._generator()
        X_out = append_like(X, made, rows, indices, form)
        return X_out, take_like(y, indices, X_out)

    @property
    def quality_report_(self):
        """Kept against labelled samples after ``fit_resample``; None for too few of either."""
        check_is_fitted(self, "selection_")
        # Models that were saved before have none.
        report = getattr(self, "_report", None)
        return None if report is None else QualityReport(**report)

    def selection_examples(self):
        """Show some kept and some rejected candidates of the last ``fit_resample``.

        Returns
        -------
        dict of class to dict
            ``"kept"``: up to 8 samples, in the order of ``fit_resample``; ``"rejected"``: up to 8,
            farthest first.
            Arrays of samples as `X` had them, for
            :class:`~diffaugkit.plotting.SampleGridDisplay`.
        """
        message = "%(name)s has selected nothing yet: call fit_resample first."
        check_is_fitted(self, "selection_", msg=message)
        pairs = zip(self.selection_["class"], self._examples, strict=True)
        return {label: {"kept": kept, "rejected": rejected} for label, (kept, rejected) in pairs}

    # ---- fitting ---------------------------------------------------------------------------------

    def _fit(self, X, y, unlabeled):
        """Fit; give the rows of `X` and of the pool, class numbers and features of the former."""
        import pandas as pd

        # What can be refused is refused before minutes of training: an unfitted encoder, too.
        classes, codes, wanted = self._check_targets(y)
        seed = self._seed()
        diffusion, rows, pool = self._read(X, codes, unlabeled, seed)
        self.encoder_ = self._fit_encoder(rows, classes[codes], seed)
        features = None if self.encoder_ is None else self._features(rows)

        # Pre-training, without labels.
        generator = self._pretrain(diffusion, rows if pool is None else pool)

        # Fine-tuning: the decoder, then the classifier of noised latents.
        weight, history = self._weight_of(codes), []
        autoencoder = self._tune(generator.autoencoder_, rows, codes, weight, seed, history)
        space = space_from_state(generator._space, autoencoder)
        core = generator._diffusion()

        def loss(z_0, y):
            z_t = space.inside(z_0)
            t = torch.zeros(len(z_t), dtype=torch.int64, device=z_t.device)
            if self.noised_classifier:
                t = torch.randint(core.n_timesteps, (len(z_t),), device=z_t.device)
                z_t = core.add_noise(z_t, t, torch.randn_like(z_t))
            return _classification(classifier(z_t, t), y, weight)

        with isolated_rng(self._child_seed(seed, _CLASSIFIER)):
            classifier = self._make_classifier(space, len(classes), core)
        data = space.encode(rows), codes
        module = self._train("classifier", classifier, loss, data, seed, history)

        self.diffusion_, self.autoencoder_, self.module_ = diffusion, autoencoder, module
        self.classes_, self.sampling_strategy_ = classes, wanted
        self.image_shape_ = rows.image_shape
        self._pixel_range, self._layout = rows.pixel_range, rows.layout
        self._sampling_seed = self._child_seed(seed, _SAMPLES)
        for name in ("selection_", "sample_indices_", "_examples", "_report"):
            vars(self).pop(name, None)

        # Selection: centroids of real samples alone.
        self._fit_judge(rows)
        features = self._features(rows) if features is None else features
        self.centroids_ = np.stack([features[codes == k].mean(0) for k in range(len(classes))])
        self.guidance_scale_ = self._find_guidance(self._child_seed(seed, _TRIAL))
        self.history_ = pd.DataFrame(history)
        self.n_iter_ = len(history)
        return rows, pool, codes, features

    def _check_targets(self, y):
        """Classes, the number of the class of each row, and how many to generate of each class."""
        if y is None:
            name = type(self).__name__
            raise ValueError(f"{name} requires y to be passed, but the target y is None.")
        targets = read_targets(y)
        if targets.codes is None:
            raise ValueError("Multilabel and multioutput targets have no classes to guide to.")
        present, codes = np.unique(targets.codes, return_inverse=True)
        classes = np.asarray(targets.classes)[present]
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes.tolist()}, but at least two are needed.")
        return classes, codes, count_wanted(self.sampling_strategy, targets, ratio=self.ratio)

    def _read(self, X, codes, unlabeled, seed):
        """Give the generator, frozen or to be fitted, its rows of `X`, and of the pool or None."""
        diffusion, pool = self.diffusion, None
        generator = getattr(diffusion, "estimator", diffusion)
        if not isinstance(diffusion, str) and not isinstance(
            generator, EmbeddingConditionedDiffusion
        ):
            raise TypeError(
                f"diffusion={type(generator).__name__} cannot be guided: give an "
                "EmbeddingConditionedDiffusion, or FrozenEstimator(...) of a fitted one."
            )
        if isinstance(diffusion, FrozenEstimator):
            check_is_fitted(generator, "module_")
            if unlabeled is not None:
                raise ValueError(
                    "unlabeled was given, but diffusion is frozen: it is not fitted again."
                )
            check_reading(self, generator.image_shape_, generator.layer)
            rows = generator._check_rows(X, self.image_shape)
            check_consistent_length(range(len(rows)), codes)
        else:
            diffusion = self._make_diffusion(seed)
            gate = {
                "layer": diffusion.layer,
                "image_shape": diffusion.image_shape,
                "images": True,
                "allow_counts": False,
            }
            least = {"ensure_min_samples": 2, "ensure_min_features": 2}
            rows = check_X(self, X, reset=True, **gate, **least)
            check_consistent_length(range(len(rows)), codes)
            if unlabeled is not None:
                # X as the generator will read it, before it learns from the pool.
                reader = clone(diffusion)
                try:
                    pool = check_X(reader, unlabeled, reset=True, **gate, **least)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"unlabeled: {error}") from error
                rows = check_X(reader, X, reset=False, **gate)
            elif not rows.is_image and len(rows) * rows.n_features <= _DENSE_VALUES:
                rows = DenseRows(rows[:].numpy(), rows.feature_names)
            if self.diffusion == "auto" and rows.is_image and max(rows.shape[2:]) >= _LARGE:
                diffusion.set_params(autoencoder=self._hand_over(LatentAutoencoder()))
        return diffusion, rows, pool

    def _pretrain(self, diffusion, rows):
        """Fit the generator where it is not frozen, and give it."""
        generator = getattr(diffusion, "estimator", diffusion)
        if generator is diffusion:
            self._fit_part(diffusion, "diffusion", rows)
        self.n_features_in_ = generator.n_features_in_
        vars(self).pop("feature_names_in_", None)
        if hasattr(generator, "feature_names_in_"):
            self.feature_names_in_ = generator.feature_names_in_
        return generator

    def _make_diffusion(self, seed):
        if isinstance(self.diffusion, str):
            diffusion = self._hand_over(EmbeddingConditionedDiffusion(encoder=None))
        else:
            diffusion = clone(self.diffusion)
        self._seed_part(diffusion, seed, _DIFFUSION)
        # How to read X: the one that has it tells the other.
        for name in ("layer", "image_shape"):
            if getattr(diffusion, name) is None:
                diffusion.set_params(**{name: getattr(self, name)})
        check_reading(self, diffusion.image_shape, diffusion.layer)
        return diffusion

    def _tune(self, autoencoder, rows, codes, weight, seed, history):
        """Copy the autoencoder, and tune the decoder of the copy to the labelled images (Eq. 5)."""
        if autoencoder is None:
            return None
        tuned = copy.deepcopy(getattr(autoencoder, "estimator", autoencoder))
        if not self.tune_decoder:
            return tuned
        tuned.set_params(device=self.device)
        device = self._device()
        whole = tuned.module_.to(device).requires_grad_(False)
        features = _features(tuned, device)
        shift = torch.from_numpy(tuned.shift_).to(device)[:, None, None]
        auxiliary = None

        def classify(x, y):
            t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            return _classification(auxiliary(x, t), y, weight)

        if self.auxiliary_weight:
            with isolated_rng(self._child_seed(seed, _AUXILIARY)):
                auxiliary = LatentClassifier(
                    rows.shape[1:], len(weight), torch.ones(1), width=self.width, timed=False
                )

            def auxiliary_loss(images, y):
                return classify(to_unit(images, rows.pixel_range), y)

            # Learned on real images, and fixed from then on.
            self._train("auxiliary", auxiliary, auxiliary_loss, (rows, codes), seed, history)
            auxiliary.requires_grad_(False)

        def loss(latents, images, y):
            x = to_unit(images, rows.pixel_range)
            made = decoder(latents / tuned.scale_ + shift)[..., : x.shape[2], : x.shape[3]]
            if made.shape[1] != x.shape[1]:
                made = made.mean(dim=1, keepdim=True).expand_as(x)
            out = {"reconstruction": F.l1_loss(made, x)}
            total = out["reconstruction"]
            if features is not None:
                out["perceptual"] = _feature_distance(features, x, made)
                total = total + tuned.perceptual_weight * out["perceptual"]
            if auxiliary is not None:
                judged = classify(made, y)
                out |= {"auxiliary": judged["loss"], "accuracy": judged["accuracy"]}
                total = total + self.auxiliary_weight * judged["loss"]
            return {"loss": total, **out}

        batches = (to_unit(batch, rows.pixel_range) for _, batch in rows.batches(64))
        latents = torch.cat([tuned.encode(batch).cpu() for batch in batches])
        decoder = DecoderOf(whole).requires_grad_(True)
        self._train("decoder", decoder, loss, (latents, rows, codes), seed, history)
        whole.requires_grad_(True).eval()
        return tuned

    def _train(self, phase, module, loss, data, seed, history):
        """Run one of the three fits in the one training loop."""
        number = {"auxiliary": _AUXILIARY, "decoder": _DECODER, "classifier": _CLASSIFIER}[phase]
        seed = self._child_seed(seed, number)
        batches = make_batches(*data, batch_size=self.batch_size, seed=seed, device=self._device())
        steps = batches.steps_per_epoch
        if phase == "decoder":
            options = {
                "max_epochs": auto_epochs(self.decoder_epochs, steps, paper=500, most_steps=500),
                "learning_rate": self.decoder_learning_rate,
            }
        else:
            options = {
                "max_epochs": auto_epochs(self.max_epochs, steps, paper=1_000),
                "weight_decay": self.weight_decay,
            }
        module, rows = self._fit_loop(
            module,
            loss,
            batches,
            seed=seed,
            warmup=0.05,
            grad_clip=1.0,
            checkpoint_dir=self._folder(phase),
            identity={name: described(getattr(self, name)) for name in _SHAPE[phase]},
            description=f"{type(self).__name__} {phase}",
            **options,
        )
        history += [{"phase": phase, **row} for row in rows]
        return module

    def _fit_encoder(self, rows, y, seed):
        if self.encoder is None:
            return None
        encoder = clone(self.encoder)
        if isinstance(encoder, FrozenEstimator):
            return encoder
        self._seed_part(encoder, seed, _ENCODER)
        return encoder.fit(_as_given(encoder, rows), y)

    def _weight_of(self, codes):
        """Weight of each class (K,), of mean 1 over the rows."""
        counts = np.bincount(codes)
        weight = np.ones(len(counts))
        if self.class_weight == "balanced":
            weight = len(codes) / (len(counts) * counts)
        return torch.tensor(weight, dtype=torch.float32, device=self._device())

    def _make_classifier(self, space, n_classes, core, units=True):
        return LatentClassifier(
            space.shape,
            n_classes,
            core.alpha_bar,
            width=self.width,
            timed=self.noised_classifier,
            units=space.std / space.std.max() if units and hasattr(space, "std") else None,
        )

    def _build(self):
        core, units = self._generator()._diffusion(), hasattr(self, "_judge")
        return self._make_classifier(self._space(), len(self.classes_), core, units)

    # ---- sampling --------------------------------------------------------------------------------

    def _generator(self):
        return getattr(self.diffusion_, "estimator", self.diffusion_)

    def _space(self):
        return space_from_state(self._generator()._space, self.autoencoder_)

    def _find_guidance(self, seed):
        """Give the scale of each class: the smallest that brings enough samples to its centroid."""
        n_classes = len(self.centroids_)
        if self.guidance_scale != "auto":
            return np.full(n_classes, float(self.guidance_scale))
        scales, most, missed = np.ones(n_classes), np.zeros(n_classes), np.arange(n_classes)
        for scale in _SCALES:
            codes = np.repeat(missed, _TRIAL_SIZE)
            _, _, distances = self._judged(codes, seed, np.full(n_classes, scale))
            right = (distances.argmin(axis=1) == codes).reshape(-1, _TRIAL_SIZE).mean(axis=1)
            better = right > most[missed]
            scales[missed[better]], most[missed[better]] = scale, right[better]
            missed = missed[right < _TRIAL_RIGHT]
            if not len(missed):
                break
        return scales

    def _scales(self):
        """Scales (K,) of the fit, or what was set since."""
        if self.guidance_scale == "auto":
            return self.guidance_scale_
        return np.full(len(self.classes_), float(self.guidance_scale))

    def _generate(self, codes, seed, scales=None):
        """Guided samples of the classes with these numbers, in the form of `X`."""
        scales = self._scales() if scales is None else scales
        # The generator's own sampling, under another denoiser; it stays what it is itself.
        own = self._generator()
        guided = object.__new__(type(own))
        vars(guided).update(vars(own))
        classifier = self.module_.to(self._device()).eval()
        scales = torch.as_tensor(scales, dtype=torch.float32, device=self._device())
        guided.module_ = GuidedDenoiser(own.module_, classifier, scales, own._diffusion())
        # The condition is the number of the class, as it is.
        guided._condition = {"mean": np.zeros(1), "std": np.ones(1)}
        # Of itself alone: its parts are the generator's.
        BaseEstimator.set_params(
            guided,
            condition_noise=0.0,
            guidance_scale=1.0,
            sampler=self.sampler,
            n_sampling_steps=self.n_sampling_steps,
            device=self.device,
            precision=self.precision,
            verbose=self.verbose,
        )
        latents = guided._sample_latents(codes[:, None], len(codes), seed)
        space = self._space()
        decoded = space.decode(latents, seed)
        if self.image_shape_ is None:
            return space.output(decoded)
        return from_unit(decoded, self._pixel_range, self._layout)

    def _judged(self, codes, seed, scales=None):
        """Guided samples, their features (n, F), and distances to all centroids (n, K)."""
        samples = self._generate(codes, seed, scales)
        features = self._features(self._rows_of(samples))
        return samples, features, cdist(features, self.centroids_)

    def _rows_of(self, samples):
        """Rows of generated samples, as the gate would make them."""
        return DenseRows(samples) if self.image_shape_ is None else self._image_rows(samples)

    def _image_rows(self, images):
        return ImageRows(
            images,
            image_shape=self.image_shape_,
            layout=self._layout,
            pixel_range=self._pixel_range,
        )

    # ---- selection -------------------------------------------------------------------------------

    def _fit_judge(self, rows):
        """Learn the scale of the generator's own features, where no encoder judges."""
        self._judge = {"mean": np.zeros(1), "std": np.ones(1)}
        if self.encoder_ is None and rows.is_image:
            features = self._own_features(rows)
            std = features.std(axis=0)
            self._judge = {"mean": features.mean(axis=0), "std": np.where(std > 0, std, 1)}

    def _own_features(self, rows):
        """Give what the generator knows of samples without labels, (n, F)."""
        space, device = self._space(), self._device()
        inputs, middle, t = space.encode(rows), None, 0
        if hasattr(self, "_judge"):
            t = self._generator()._diffusion().n_timesteps // _FEATURE_LEVEL
            denoiser = self._generator().module_.to(device).eval()
            # Of a user's own module `features` may be anything.
            middle = denoiser.features if isinstance(denoiser, UNetDenoiser) else None
        else:  # saved before: the classifier judged
            middle = self.module_.to(device).eval().features

        def run(index):
            with torch.no_grad():
                z = space.inside(inputs[index].to(device))
                if middle is not None:
                    z = middle(z, torch.full((len(z),), t, device=device))
                return z.flatten(1).float().cpu()

        features = sample_in_batches(run, len(inputs), space.sampling_batch(device)).numpy()
        return features if middle is not None or rows.is_image else features * space.std

    def _features(self, rows):
        """Features of length 1, (n, F) float64."""
        if self.encoder_ is not None:
            features = embed_rows(self.encoder_, rows)
        else:
            features = self._own_features(rows)
            if hasattr(self, "_judge"):
                features = (features - self._judge["mean"]) / self._judge["std"]
        features = check_array(features, dtype=np.float64, input_name="features of encoder")
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        return features / np.where(norms > 0, norms, 1)

    def _select(self, rows, pool, codes, features):
        """Draw candidates and select; generated samples, and the nearest labelled one of each."""
        import pandas as pd

        # Copies are of what the generator has seen, most of which may have no label.
        space, added = CopySpace(rows if pool is None else pool, self._space()), []
        spots = labelled = space.of(rows)
        if pool is not None:
            spots = _different(np.concatenate([spots, space.of(pool)]))
        made, sources, judged, table, self._examples = [], [], [], [], []
        for code, (label, wanted) in enumerate(self._wanted()):
            samples, found, distances = self._candidates(code, wanted)
            own, right = distances[:, code], distances.argmin(axis=1) == code
            order = np.arange(len(samples))
            if self.selection != "random":
                order = np.flatnonzero(right)
            if self.selection == "centroid":
                order = order[np.argsort(own[order], kind="stable")]
            kept = order[:wanted]
            rejected = np.setdiff1d(np.arange(len(samples)), kept)
            # The farthest first: those show what the selection is for.
            rejected = rejected[np.argsort(-own[rejected], kind="stable")]
            real = np.flatnonzero(codes == code)
            made.append(samples[kept])
            judged.append(found[kept])
            if len(kept):
                added.append(space.of(self._rows_of(samples[kept])))
            sources.append(real[_nearest(found[kept], features[real])])
            self._examples.append([samples[kept[:_EXAMPLES]], samples[rejected[:_EXAMPLES]]])
            to_own = np.linalg.norm(features[real] - self.centroids_[code], axis=1)
            table.append(
                {
                    "class": label,
                    "wanted": wanted,
                    "candidates": len(samples),
                    "right_centroid": int(right.sum()),
                    "kept": len(kept),
                    "distance_real": _mean(to_own),
                    "distance_kept": _mean(own[kept]),
                    "distance_rejected": _mean(own[rejected]),
                    "copy_ratio": _copy_ratio(added[-1], spots) if len(kept) else math.nan,
                }
            )
        self.selection_ = pd.DataFrame(table)
        self._report = None
        if added:
            self._report = sampler_report(
                (labelled, features),
                (np.concatenate(added), np.concatenate(judged)),
                np.concatenate(sources),
                self.classes_[codes],
                _VOTERS,
            )
        self._warn(table, _copy_ratio(np.concatenate(added), spots) if added else math.nan)
        return np.concatenate(made), np.concatenate(sources)

    def _wanted(self):
        """Classes that are there, and how many samples each is to get."""
        return [(name, self.sampling_strategy_[name]) for name in self.classes_.tolist()]

    def _candidates(self, code, wanted):
        """Candidates of one class, as `_judged` gives them."""
        size = wanted if self.selection == "random" else math.ceil(self.n_candidates * wanted)
        parts, n_right = [], 0
        for number in range(_MOST_ROUNDS):
            # One at least: also a class that gets none knows the form of its samples.
            numbers = np.full(max(1, size), code)
            found = self._judged(numbers, mix_seed(self._sampling_seed, code, number))
            parts.append([part[:size] for part in found])
            n_right += int((parts[-1][2].argmin(axis=1) == code).sum())
            if self.selection == "random" or n_right >= wanted:
                break
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _warn(self, table, ratio):
        if ratio < NEAR_COPY:
            warn(
                f"Half of the generated samples have a copy ratio below {ratio:.2f} "
                f"(near-copies: below {NEAR_COPY}): they repeat real samples and add little. "
                "Train the generator on more samples that need no labels, or for fewer epochs."
            )
        short = [row for row in table if row["kept"] < row["wanted"]]
        if not short:
            return
        shown = some(
            f"{row['class']!r}: {row['kept']} of {row['wanted']} from {row['candidates']} "
            "candidates"
            for row in short
        )
        warn(
            f"{len(short)} of {len(table)} classes got fewer samples than wanted, as too few were "
            f"nearest to the centroid of their class: {shown}. A larger guidance_scale or "
            "n_candidates, a longer training of the generator, or selection='random' give more.",
            ConvergenceWarning,
        )

    def __sklearn_tags__(self):  # noqa: D105
        tags = sampler_tags(super().__sklearn_tags__())
        tags.target_tags.required = True
        return tags


def _classification(logits, y, weight):
    """Cross-entropy with a weight per class, and the share of right answers."""
    # Over the number of rows, not the sum of their weights: a batch of one class keeps its weight.
    loss = F.cross_entropy(logits.float(), y, weight=weight, reduction="none").mean()
    return {"loss": loss, "accuracy": (logits.argmax(dim=1) == y).float().mean()}


def _different(spots):
    """Drop repeated rows: a pool may hold the labelled samples too, equal up to rounding."""
    scale = spots.std() or 1.0
    return spots[np.unique(np.round(spots / scale, 4), axis=0, return_index=True)[1]]


def _copy_ratio(spots, real):
    """Median distance to the nearest real sample, as a share of that to the next."""
    if not len(spots) or (real == real[0]).all():
        return math.nan
    return copy_ratio(real, spots, nearest_training_samples(real, spots)[1])


def _mean(values):
    return float(values.mean()) if len(values) else math.nan


def _nearest(features, real):
    """Position of the nearest row of `real`, in pieces of bounded memory."""
    if not len(features):
        return np.empty(0, dtype=np.int64)
    return pairwise_distances_argmin(features, real)
