"""Self-supervised encoder: views of a sample -> network -> loss -> embedding.

Of vectors, the E-step of DiffAug (Zang et al., arXiv 2309.07909): a soft contrastive loss, whose
positives are mix-ups of nearest neighbours until a generator gives better ones. Of images, DINO and
its kin on random crops, and the third stage of Gen-SIS (Belagali, Yellapragada et al.), in which
generated images are second views, and interpolated ones are told apart. The encoder knows nothing
of generators: their samples come in through ``fit(X, positives=..., interpolations=...)``.

One path for both: views (:mod:`~diffaugkit.augmentations`) x network
(:mod:`~diffaugkit.networks`) x objective (:mod:`~diffaugkit.objectives`).

===========  ===================================================================
paper        here
===========  ===================================================================
x            an image, or a row of X as scores on the first principal components
y            ``transform(X)``, high-dimensional embedding
z            ``project(X)``, low-dimensional embedding, the map
lambda       ``positives_prob``
nu^y, nu^z   ``nu``, ``nu_projection``
tau_s        ``student_temp``
tau_t        ``teacher_temp``
===========  ===================================================================
"""

import math
import os
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from diffaugkit.arrays import check_groups, warn
from diffaugkit.base import (
    Interval,
    Options,
    StrOptions,
    TorchTransformer,
    Widths,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.data import check_X, keep_names_of_rows
from diffaugkit.diffusion import sample_in_batches
from diffaugkit.encoder_fits import (
    ImageFit,
    PretrainedAsItIs,
    VectorFit,
    auto_queue,
    has_map,
    linear_space,
    project_rows,
)
from diffaugkit.image_rows import to_unit
from diffaugkit.losses import KERNELS
from diffaugkit.networks import (
    FEATURES,
    DINOHead,
    EmbeddingMLP,
    ImageEmbedder,
    class_attention,
    feature_width,
    is_hub_name,
    make_backbone,
    mlp_head,
    patch_tokens,
)
from diffaugkit.objectives import (
    BYOLObjective,
    CollapseWarning,
    DINOObjective,
    MoCoObjective,
    Objective,
    SimCLRObjective,
    SimSiamObjective,
    SoftContrastiveObjective,
)
from diffaugkit.runtime import progress_bar
from diffaugkit.training import auto_epochs

__all__ = ["SelfSupervisedEncoder", "linear_space", "project_rows"]

_LEAST_SPREAD = 0.1
_FEW_ROWS = 10
_METHODS = ("auto", "scl", "simclr", "mocov2", "byol", "simsiam", "dino")
# What few users change; DINO's values are those of its authors' code.
_METHOD_OPTIONS = {
    "bottleneck": 256,
    "center_momentum": 0.9,
    "drop_path": 0.1,
    "frozen_epochs": 1,
    "hidden": "auto",
    "mix": "logits",
    "n_last": 4,
    "norm_hidden": "auto",
    "norm_last": True,
    "queue_size": "auto",
    "warmup_share": 0.0,
    "warmup_teacher_temp": 0.04,
}
_SIZE = Interval(Integral, 1, None, closed="left")
_SHARE = Interval(Real, 0, 1, closed="both")
_OPTION_CONSTRAINTS = {
    "bottleneck": [_SIZE],
    "center_momentum": [_SHARE],
    "drop_path": [Interval(Real, 0, 1, closed="left")],
    "frozen_epochs": [Interval(Real, 0, None, closed="left")],
    "hidden": [_SIZE, StrOptions({"auto"})],
    "mix": [StrOptions({"logits", "features"})],
    "n_last": [_SIZE],
    "norm_hidden": [Options(bool, {True, False}), StrOptions({"auto"})],
    "norm_last": [Options(bool, {True, False})],
    "queue_size": [_SIZE, StrOptions({"auto"})],
    "warmup_share": [_SHARE],
    "warmup_teacher_temp": [Interval(Real, 0, None, closed="neither")],
}


class SelfSupervisedEncoder(TorchTransformer):
    """Learn an embedding from unlabelled vectors or images by comparing views of samples.

    Vectors are first projected to their leading principal components (one common scale, not
    whitened: measured on five cell sets to serve better than raw genes, in a quarter of the time).
    Two views of each row, mix-ups with nearest neighbours or generated ones (DiffAug makes one, and
    compares it with the row as it is), then go through an MLP to a high-dimensional embedding y and
    on to a low-dimensional z; the loss pulls the views of a row together in z and holds the others
    apart, as far as y says that they differ, and in y itself. Images are cropped, flipped and
    recoloured at random, on the device, and go through a convolutional network or a vision
    transformer.

    Parameters
    ----------
    method : {"auto", "scl", "simclr", "mocov2", "byol", "simsiam", "dino"}, default="auto"
        What is learned from views: "auto" is ``"scl"`` for vectors and ``"simclr"`` for images,
        which learned most in a short fit on few images (see ``docs/benchmarks.md``).
        ``"scl"``: soft contrastive loss of DiffAug, with a map. ``"simclr"``: InfoNCE within a
        batch (of vectors: on the map z, the ablation B3 of DiffAug). ``"mocov2"``: InfoNCE against
        a queue. ``"byol"``, ``"simsiam"``: no negatives. ``"dino"``: self-distillation, whose
        teacher is what embeds in the end; with the others it is the student.
    backbone : str or nn.Module, default="auto"
        Network for images: ``"small_resnet"`` (1.2 million weights, for 8 to 64 pixels),
        ``"small_vit"`` (2.7 million; it has attention maps), a name of timm, or a module from
        (B, C, H, W) to (B, F), of which a copy is trained (it cannot be saved by ``save``, which
        builds networks from names; pickle and joblib can). "auto" is "small_resnet", which learned
        far more in a short fit on few images (DINO on 500 digits). For vectors "auto" is
        ``"mlp"``, and there is no other.
    n_components : int or "auto", default="auto"
        Width of the embedding y. "auto" is 50 for vectors and the backbone's own width for images,
        where an int adds a linear layer.
    n_projections : int, default=2
        Width of the projection z, of the methods that make a map.
    image_shape : tuple of (int, int, int) or None, default=None
        (height, width, channels) of flattened images, so that steps of scikit-learn compose; one
        may be -1. Not needed for images that come as such.
    augmentation : {"auto", "natural", "greyscale", "tissue"}, dict or callable, default="auto"
        Recipe of the views, see :func:`~diffaugkit.augmentations.image_recipe`: "auto" is
        "greyscale" for one channel and "natural" for others. ``"tissue"`` changes the stain of H&E
        by little: no hue, no grey. A dict changes values, as ``{"recipe": "natural", "flip":
        0.0}``; a callable maps a batch (B, C, H, W) in [-1, 1] to a view of it, drawing from
        torch's generators; an encoder with one can be pickled, but not saved.
    n_local_crops : int or "auto", default="auto"
        Small crops beside the two global ones, of DINO on images; always of the image itself, not
        of one generated for it. "auto" is the paper's 8, or 0
        where they would not be smaller than the image (below 16 pixels) or the augmentation is a
        callable.
    features : {"auto", "cls", "pooled", "last_n"}, default="auto"
        What of the backbone is the embedding: its own output ("auto"), the CLS token, the mean of
        patch tokens or maps, or the CLS tokens of the last blocks side by side.
    pretrained : str, path-like or None, default=None
        Weights of the backbone to begin with. A tag of timm's for `backbone`, such as ``"dino"``,
        which is downloaded. ``"hf-hub:owner/name"``, a model of timm on the Hugging Face Hub (most
        foundation models of pathology are: ``"hf-hub:MahmoodLab/UNI"``), or
        ``"local-dir:folder"``, a folder with its ``config.json`` and weights; these name the
        architecture, too, and `backbone` stays "auto". Or a local file (safetensors, or a state
        dict, which is read without running code of it). Pixels are scaled by the mean and
        deviation that a tag or a hub's model tells; with a file of weights they are in [-1, 1].
    out_dim : int or "auto", default="auto"
        Prototypes of DINO's head. "auto" is the power of two next to the number of samples, from
        256 to the paper's 65 536, so that there are about as many prototypes as samples.
    student_temp : float, default=0.1
        Temperature of DINO's student.
    teacher_temp : float, default=0.04
        Temperature of DINO's teacher; a warm-up is among `method_options`.
    momentum : float or "auto", default="auto"
        Decay of the teacher's average at the start; it goes to 1 (with ``"mocov2"`` it stays).
        "auto" is ``1 - 20 / steps``, at least 0.9, and at most the paper's: 0.996, or 0.999 with
        ``"mocov2"``. Short fits have not the steps to wait for a slow teacher.
    method_options : dict or None, default=None
        What few change. DINO: ``"bottleneck"`` (256), ``"hidden"`` ("auto": `out_dim` within 256
        to 2048), ``"norm_last"`` (True), ``"norm_hidden"``, BatchNorm in the head ("auto": where
        `out_dim` is below 16 384; on 500 digits it decided between learning and collapse),
        ``"center_momentum"`` (0.9), ``"warmup_teacher_temp"`` (0.04) and ``"warmup_share"`` (0.0,
        of all steps), ``"frozen_epochs"`` of the prototypes (1), ``"drop_path"`` of the student
        (0.1), ``"mix"`` ("logits", or "features": where interpolations mix the teacher). MoCo:
        ``"queue_size"`` ("auto": the largest power of two up to half the samples, at most 65 536).
        ``"n_last"`` (4), blocks of ``features="last_n"``.
    hidden_sizes : tuple of int, default=(256, 256)
        Hidden layers of the encoder, and again of the head from y to z. The released code has
        layers of 500 behind raw genes, three in the encoder and two in the head; behind principal
        components two of half the width were measured to give the same embedding in less than half
        the time.
    skip : bool, default=True
        Give y a linear skip from the input, the identity at the start; see
        :class:`~diffaugkit.networks.EmbeddingMLP`.
    dropout : float or "auto", default="auto"
        Share of the hidden units between input and y that are left out, drawn anew for each row and
        step; of vectors. Few rows are learned by heart without it, and new rows are placed worse
        (``docs/benchmarks.md``, "New cells"): "auto" is 0.5 for up to 1 000 rows, then falls in
        inverse proportion, and is 0 beyond 2 500. The released code has none (0).
    n_pcs : int or None, default=20
        Principal components in front of the network; clipped to what the data have. None feeds the
        features as they are, centred and brought to one common scale.
    n_neighbors : int or "auto", default="auto"
        Neighbours among which the mix-up picks; "auto" is 30, or fewer for few samples: at
        most a tenth of them, but at least 5 where there are more than 5 samples.
    nu : float, default=100.0
        Degrees of freedom of the kernel in y, the paper's.
    nu_projection : float, default=1.0
        Degrees of freedom of the kernel in z, the paper's for three of its four cell sets. Smaller
        values give heavier tails: tighter, more separate groups.
    kernel : {"t", "squared_t", "unit_t"}, default="t"
        See :func:`~diffaugkit.losses.t_similarity`.
    target : {"own_view", "pair"}, default="own_view"
        Where the soft targets are measured; see :func:`~diffaugkit.losses.soft_contrastive`.
    contrast : {"softmax", "pairwise"}, default="softmax"
        Soft targets in the paper's Eq. 1 or in its Eq. 2. On the development sets the softmax form
        keeps 2-D maps clearly more faithful; the pairwise form is what the paper optimises.
    beta : float, default=1.0
        Preference of a row's own pair, in [0, 1], with ``target="pair"``.
    repulsion : float, default=1.0
        Weight of the different pairs with ``contrast="pairwise"``.
    detach_target : bool, default=False
        Stop gradients at the soft targets.
    embedding_weight : float, default=3.0
        Weight of the same contrast taken in y itself
        (:func:`~diffaugkit.losses.t_info_nce`, 5 degrees of freedom), so that y does not only serve
        a map of two dimensions. Ours, not the paper's, whose y learns through z alone (0): measured
        on five cell sets to add 0.4 points of linear SVM and 0.6 of k-NN on y and to leave the map
        as it is. Of ``method="scl"``.
    temperature : float or "auto", default="auto"
        Of ``"simclr"`` (0.5) and ``"mocov2"`` (0.2).
    positives_prob : float or "auto", default="auto"
        lambda: share of second views that come from given `positives` (Bernoulli per sample).
        "auto" is DiffAug's 0.1 for vectors, 0.5 for up to 1 000 of them (``docs/benchmarks.md``,
        "New cells"), and Gen-SIS's 1.0 for images.
    weight_decay : float, tuple of (float, float) or "auto", default="auto"
        Of AdamW; a pair goes from the first to the last value along a cosine, as DINO's (0.04,
        0.4), which is for long fits. "auto" is DiffAug's 1e-6 for vectors and 0.04 for images.
    warm_start : bool, default=False
        Go on from the weights and the principal components of the previous fit.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    max_epochs : int or "auto", default="auto"
        Passes over the data. "auto" is as many as make 1 000 batches, but at least 10 and at most
        330, DiffAug's E-step: large data need fewer passes. 0 keeps the weights of `pretrained`, or
        of a module as `backbone`, as they are: a foundation model as an encoder of this library.
    batch_size : int, default=300
        At least 2; DiffAug's. Other rows of the batch are the negatives; where several processes
        train together, those of a process's own share of it, and MoCo's queue takes the keys of the
        first process.
    learning_rate : float or "auto", default="auto"
        Peak rate of AdamW with warm-up and cosine. "auto" is 2e-3 for the MLP (DiffAug's code has
        1e-3, its paper prints 1e-4, both for many more steps) and "small_resnet", and DINO's
        5e-4 per 256 samples of a batch for other backbones.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    module_ : EmbeddingMLP or ImageEmbedder
        The network, in evaluation mode.
    image_shape_ : tuple of (int, int, int) or None
        Height, width and channels; None for vectors.
    out_dim_ : int or None
        Prototypes, of DINO.
    mean_ : ndarray of shape (n_features,) or None
        Of vectors, as the next two; None for images.
    components_ : ndarray of shape (n_pcs, n_features) or None
        Principal components in front of the network.
    scale_ : float or None
        Their common scale.
    history_ : DataFrame
        One row per epoch: epoch, loss, learning_rate, and as far as the method has them
        feature_spread (1: embeddings fill the sphere, 0: they have collapsed), teacher_entropy (as
        a share of the largest) and disentanglement.
    n_iter_ : int
        Epochs of the last fit.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features,)
        Only if the names are strings.

    References
    ----------
    Zang et al., "Boosting Unsupervised Contrastive Learning Using Diffusion-Based Data Augmentation
    From Scratch", arXiv 2309.07909. Belagali, Yellapragada et al., "Gen-SIS: Generative
    Self-augmentation Improves Self-supervised Learning". Caron et al., "Emerging Properties in
    Self-Supervised Vision Transformers", 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit import SelfSupervisedEncoder
    >>> X, _ = load_iris(return_X_y=True)
    >>> encoder = SelfSupervisedEncoder(max_epochs=2, hidden_sizes=(16,), random_state=0).fit(X)
    >>> encoder.transform(X).shape, encoder.project(X).shape
    ((150, 50), (150, 2))

    Images, here flattened ones of 8 x 8 pixels:

    >>> from sklearn.datasets import load_digits
    >>> X, _ = load_digits(return_X_y=True)
    >>> encoder = SelfSupervisedEncoder("simclr", image_shape=(8, 8, 1), max_epochs=1)
    >>> encoder.fit(X[:300]).transform(X[:5]).shape
    (5, 128)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchTransformer._parameter_constraints,
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "method": [StrOptions(set(_METHODS))],
        "backbone": [str, torch.nn.Module],
        "n_components": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "n_projections": [Interval(Integral, 1, None, closed="left")],
        "hidden_sizes": [Widths(fewest=0)],
        "skip": ["boolean"],
        "dropout": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "n_pcs": [Interval(Integral, 1, None, closed="left"), None],
        "n_neighbors": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "nu": [Interval(Real, 0, None, closed="neither")],
        "nu_projection": [Interval(Real, 0, None, closed="neither")],
        "kernel": [StrOptions(set(KERNELS))],
        "target": [StrOptions({"own_view", "pair"})],
        "contrast": [StrOptions({"softmax", "pairwise"})],
        "beta": [Interval(Real, 0, 1, closed="both")],
        "repulsion": [Interval(Real, 0, None, closed="left")],
        "detach_target": ["boolean"],
        "embedding_weight": [Interval(Real, 0, None, closed="left")],
        "temperature": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "positives_prob": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "weight_decay": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"}), tuple, list],
        "warm_start": ["boolean"],
        "layer": [str, None],
        "max_epochs": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"})],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "image_shape": [tuple, list, None],
        "augmentation": [str, dict, callable],
        "n_local_crops": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"})],
        "features": [StrOptions(set(FEATURES))],
        "pretrained": [str, os.PathLike, None],
        "out_dim": [Interval(Integral, 2, None, closed="left"), StrOptions({"auto"})],
        "student_temp": [Interval(Real, 0, None, closed="neither")],
        "teacher_temp": [Interval(Real, 0, None, closed="neither")],
        "momentum": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "method_options": [dict, None],
    }
    # "_n_embedding" is in models of images saved until November 2026.
    _extra_state = ("_layout", "_n_embedding", "_pixel_range", "_source")

    def __init__(
        self,
        method="auto",
        backbone="auto",
        *,
        n_components="auto",
        n_projections=2,
        image_shape=None,
        augmentation="auto",
        n_local_crops="auto",
        features="auto",
        pretrained=None,
        out_dim="auto",
        student_temp=0.1,
        teacher_temp=0.04,
        momentum="auto",
        method_options=None,
        hidden_sizes=(256, 256),
        skip=True,
        dropout="auto",
        n_pcs=20,
        n_neighbors="auto",
        nu=100.0,
        nu_projection=1.0,
        kernel="t",
        target="own_view",
        contrast="softmax",
        beta=1.0,
        repulsion=1.0,
        detach_target=False,
        embedding_weight=3.0,
        temperature="auto",
        positives_prob="auto",
        weight_decay="auto",
        warm_start=False,
        layer=None,
        max_epochs="auto",
        batch_size=300,
        learning_rate="auto",
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.method = method
        self.backbone = backbone
        self.n_components = n_components
        self.n_projections = n_projections
        self.image_shape = image_shape
        self.augmentation = augmentation
        self.n_local_crops = n_local_crops
        self.features = features
        self.pretrained = pretrained
        self.out_dim = out_dim
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.momentum = momentum
        self.method_options = method_options
        self.hidden_sizes = hidden_sizes
        self.skip = skip
        self.dropout = dropout
        self.n_pcs = n_pcs
        self.n_neighbors = n_neighbors
        self.nu = nu
        self.nu_projection = nu_projection
        self.kernel = kernel
        self.target = target
        self.contrast = contrast
        self.beta = beta
        self.repulsion = repulsion
        self.detach_target = detach_target
        self.embedding_weight = embedding_weight
        self.temperature = temperature
        self.positives_prob = positives_prob
        self.weight_decay = weight_decay
        self.warm_start = warm_start
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

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None, *, positives=None, interpolations=None, groups=None):
        """Learn the embedding.

        Parameters
        ----------
        X : vectors or images, n_samples of them
            Vectors: array-like, sparse matrix, DataFrame, AnnData or Rows of shape
            (n_samples, n_features), normalised; raw counts are refused (put ``CellPreprocessor()``
            in front). Images: see :func:`~diffaugkit.data.check_X`.
        y : None
            Ignored.
        positives : sequence of sets like `X`, each aligned with it, or None
            Generated views: sample i of each is another view of sample i of `X`. One is drawn per
            sample and step, and with probability `positives_prob` the second view of the sample is
            a view of that one.
        interpolations : tuple (images, partners, alphas), "pixels" or None
            Of images with ``method="dino"``: the disentanglement of Gen-SIS. Image i lies between
            images i and ``partners[i]`` of `X`, and ``alphas[i]`` in [0, 1] (or one number for all)
            is the share of the first. "pixels" blends random pairs of `X` evenly instead, the
            ablation of the paper's Table 11.
        groups : array-like of shape (n_samples,) or None
            Slide, patient or other origin of each image: partners in `interpolations` must be of
            another group. Without interpolations there is nothing that they could say.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, see :func:`~diffaugkit.data.check_X`, fewer samples than
            neighbours, or positives or interpolations that do not go with `X`.

        Warns
        -----
        CollapseWarning
            If all samples end with nearly the same embedding.
        """
        self._check_options()
        rows = self._check_fit_input(X)
        images = rows.is_image
        if check_groups(groups, len(rows)) is not None and interpolations is None:
            raise ValueError(
                "groups say from where the partners of interpolations come, but there are no "
                "interpolations: the fit would not look at groups. It does not correct for batches "
                "or donors; do that before, or leave groups out."
            )
        if len(getattr(positives, "shape", ())) >= 2:
            raise ValueError(
                f"positives of shape {tuple(positives.shape)} is one set of views: give a list of "
                "sets, positives=[views]."
            )
        if self.max_epochs == 0:
            self._check_as_it_is(images, positives, interpolations)
            state = PretrainedAsItIs(self, rows, self._seed())
            return self._set_fitted(state, state.module, [])
        state = self._prepare(
            rows, positives, interpolations=interpolations, groups=groups, seed=self._seed()
        )
        epochs = auto_epochs(self.max_epochs, state.batches.steps_per_epoch)
        state.module.n_steps = epochs * state.batches.steps_per_epoch
        module, history = self._fit_loop(
            state.module,
            state.loss,
            state.batches,
            seed=state.seed,
            max_epochs=epochs,
            **self._weight_decay(images),
            warmup=0.1 if images else 0.05,
            grad_clip=3.0 if images else 5.0,
            clip_each=self._method(images) == "dino",
            after_step=state.module.after_step,
        )
        self._set_fitted(state, module, history)
        if images or len(rows) >= _FEW_ROWS:  # mix-ups of two rows are one point
            _warn_of_collapse(history, self._method(images))
        return self

    @keep_names_of_rows
    def transform(self, X):
        """Embed samples in y.

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
        return self._run(self._check_rows(X), lambda x: self.module_.embed(x))

    def project(self, X):
        """Embed samples in z, the low-dimensional map, where the method makes one.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, n_projections), float32

        Raises
        ------
        AttributeError
            If the method has no map: all but ``"scl"``, and ``"simclr"`` on vectors.
        """
        rows = self._check_rows(X)
        method = self._method(self.image_shape_ is not None)
        if not has_map(method, self.image_shape_):
            raise AttributeError(
                f"method={method!r} makes no low-dimensional map: use method='scl', or map the "
                "result of transform() with PCA or t-SNE."
            )
        return self._run(rows, lambda x: self.module_(x)[1])

    def attention_maps(self, X, layer=-1):
        """Attention of the CLS token to the patches, of a vision transformer.

        Parameters
        ----------
        X : images as for ``fit``
        layer : int, default=-1
            Block, from the first (0) or the last (-1).

        Returns
        -------
        ndarray of shape (n_samples, n_heads, h, w), float32
            h and w in patches; non-negative, and at most 1 in sum for each head: the rest is the
            attention of the token to itself.

        Raises
        ------
        ValueError
            If the backbone is no vision transformer, or has no such block.
        """
        inputs = self._check_images(X, "attention_maps")
        network = self.module_
        return self._run(
            inputs, lambda x: class_attention(network.backbone, network.pixels(x), layer)
        )

    def patch_tokens(self, X):
        """Features of the patches, of a vision transformer.

        Parameters
        ----------
        X : images as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, n_patches, n_features), float32
            Patches row by row.

        Raises
        ------
        ValueError
            If the backbone is no vision transformer.
        """
        inputs = self._check_images(X, "patch_tokens")
        network = self.module_
        return self._run(inputs, lambda x: patch_tokens(network.backbone, network.pixels(x)))

    def score(self, X, y):
        """Cross-validated accuracy with which 10 nearest neighbours in y predict the labels.

        Parameters
        ----------
        X : as for ``fit``
        y : array-like of shape (n_samples,)
            Labels.

        Returns
        -------
        float
            In [0, 1]. Ten folds; as many as the largest class has samples if that is fewer, and
            no more neighbours than a fold leaves: the splits of a search may be small.
        """
        from diffaugkit.metrics import knn_accuracy
        from diffaugkit.metrics.checks import check_labels

        embedded = self.transform(X)
        codes = check_labels(y, n=len(embedded))[1]
        cv = max(2, min(10, int(np.bincount(codes).max())))
        rest = len(embedded) - -(-len(embedded) // cv)
        return knn_accuracy(embedded, y, n_neighbors=max(1, min(10, rest)), cv=cv)

    # ---- pieces that DiffAugEM's joint training shares -------------------------------------------

    def _check_fit_input(self, X):
        return check_X(
            self,
            X,
            reset=not self._goes_on(),
            layer=self.layer,
            images=True,
            image_shape=self.image_shape,
            allow_counts=False,
            ensure_min_samples=2,
            ensure_min_features=2,
        )

    def _goes_on(self):
        return self.warm_start and hasattr(self, "module_")

    def _prepare(self, rows, positives, *, interpolations=None, groups=None, seed):
        """Everything a loop needs; nothing of it is kept on the estimator before the loop ends."""
        kind = ImageFit if rows.is_image else VectorFit
        return kind(self, rows, positives, interpolations, groups, seed)

    def _set_fitted(self, state, module, history):
        import pandas as pd

        vars(self).update(state.fitted)
        module = module.embedder if isinstance(module, Objective) else module
        # As from a file: weights in plain order, which safetensors takes, too.
        self.module_ = module.to(memory_format=torch.contiguous_format)
        self.history_ = pd.DataFrame(history)
        self.n_iter_ = len(history)
        return self

    def _fit_loop(self, module, loss_fn, batches, **options):
        options.setdefault("learning_rate", self._learning_rate(batches))
        return super()._fit_loop(module, loss_fn, batches, **options)

    # ---- parameters that depend on the kind of data ----------------------------------------------

    def _method(self, images):
        if self.method != "auto":
            return self.method
        return "simclr" if images else "scl"

    def _weight_decay(self, images):
        decay = self.weight_decay
        if isinstance(decay, str):
            decay = 0.04 if images else 1e-6
        first, *last = np.atleast_1d(decay)
        return {"weight_decay": float(first), "final_weight_decay": float(*last) if last else None}

    def _learning_rate(self, batches):
        if self.learning_rate != "auto":
            return self.learning_rate
        small = isinstance(self.backbone, str) and self.backbone in ("auto", "mlp", "small_resnet")
        small = small and not is_hub_name(self.pretrained)
        return 2e-3 if small else 5e-4 * batches.batch_size / 256

    def _option(self, name):
        return {**_METHOD_OPTIONS, **(self.method_options or {})}[name]

    def _check_as_it_is(self, images, positives, interpolations):
        given = self.pretrained is not None or isinstance(self.backbone, torch.nn.Module)
        if not (images and given):
            raise ValueError(
                "max_epochs=0 keeps the weights of pretrained=, or of a module as backbone, of "
                "images, but there are none: random weights embed nothing. Give max_epochs of at "
                "least 1, or 'auto'."
            )
        if self.n_components != "auto":
            raise ValueError(
                f"max_epochs=0 trains no layer from the backbone's features to n_components="
                f"{self.n_components}: leave it at 'auto', and put a PCA behind."
            )
        if positives is not None or interpolations is not None:
            raise ValueError("max_epochs=0 learns nothing from positives and interpolations.")

    def _check_options(self):
        if is_hub_name(self.pretrained) and self.backbone != "auto":
            raise ValueError(
                f"pretrained={self.pretrained!r} names the architecture, too: leave backbone at "
                f"'auto', got {self.backbone!r}."
            )
        given = self.method_options or {}
        if unknown := sorted(set(given) - set(_METHOD_OPTIONS)):
            raise ValueError(
                f"method_options has no {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join(_METHOD_OPTIONS)}."
            )
        if not isinstance(self.weight_decay, str):
            pair = np.atleast_1d(np.asarray(self.weight_decay))
            numbers = pair.dtype.kind in "iuf"
            if not (numbers and pair.ndim == 1 and 1 <= len(pair) <= 2 and (pair >= 0).all()):
                raise ValueError(
                    f"weight_decay={self.weight_decay!r} must be a number of at least 0, or two of "
                    "them: the first and the last value."
                )
        for name, value in given.items():
            allowed = _OPTION_CONSTRAINTS[name]
            if not any(constraint.is_satisfied_by(value) for constraint in allowed):
                raise ValueError(
                    f"method_options: {name}={value!r} must be {' or '.join(map(str, allowed))}."
                )

    # ---- the network -----------------------------------------------------------------------------

    def _build(self):
        if self.image_shape_ is not None:
            source = getattr(self, "_source", None)  # models saved before have none
            return self._make_image_network(self.image_shape_, self.out_dim_, source, load=False)
        n_inputs = self.n_features_in_ if self.components_ is None else len(self.components_)
        return self._make_network(n_inputs, self.out_dim_)

    def _make_network(self, n_inputs, out_dim, dropout=0.0):
        """Make the network for vectors; dropout is for a fit, what is loaded only embeds."""
        method = self._method(images=False)
        width = 50 if self.n_components == "auto" else self.n_components
        return EmbeddingMLP(
            n_inputs,
            width,
            self.n_projections,
            hidden_sizes=tuple(self.hidden_sizes),
            skip=self.skip,
            dropout=dropout,
            head=None if has_map(method, None) else self._make_head(method, width, out_dim),
        )

    def _make_image_network(self, shape, out_dim, source=None, load=True):
        method = self._method(images=True)
        backbone = self.backbone
        if is_hub_name(self.pretrained):
            backbone = source["architecture"]
        elif isinstance(backbone, str) and backbone == "auto":
            backbone = "small_resnet"
        if isinstance(backbone, str) and backbone == "mlp":
            raise ValueError(
                "backbone='mlp' is for vectors; for images take 'auto', 'small_resnet', "
                "'small_vit', a name of timm or a module. To treat images as vectors, give them as "
                "a 2-D array without image_shape."
            )
        drop_path = self._option("drop_path") if method == "dino" else 0.0
        options = {"pretrained": self.pretrained, "load": load, "source": source}
        backbone = make_backbone(backbone, shape, drop_path=drop_path, **options)
        n_last = self._option("n_last")
        n_features = feature_width(backbone, shape, self.features, n_last)
        n_components = None if self.n_components == "auto" else self.n_components
        head = self._make_head(method, n_components or n_features, out_dim)
        # Images come in [-1, 1], but their scale is told for [0, 1].
        scale = source and (
            [2 * mean - 1 for mean in _per_channel(source["mean"], shape[2])],
            [2 * std for std in _per_channel(source["std"], shape[2])],
        )
        return ImageEmbedder(backbone, n_features, n_components, head, self.features, n_last, scale)

    def _make_head(self, method, width, out_dim):
        """From the embedding to what the loss compares; sizes as in the papers, per its width."""
        if method == "dino":
            if out_dim is None:
                raise ValueError(
                    "method was set to 'dino' after a fit with another: fit again, or set it back."
                )
            hidden, norm_hidden = self._option("hidden"), self._option("norm_hidden")
            return DINOHead(
                width,
                out_dim,
                min(2048, max(256, out_dim)) if hidden == "auto" else hidden,
                self._option("bottleneck"),
                self._option("norm_last"),
                out_dim < 16384 if norm_hidden == "auto" else norm_hidden,
            )
        if method == "scl":
            return mlp_head(width, 256, 256, self.n_projections)
        if method == "byol":
            return mlp_head(width, 2 * width, 256)
        if method == "simsiam":
            return mlp_head(width, 4 * width, 4 * width, 4 * width, norm_last=True)
        return mlp_head(width, width, 128, norm_hidden=method == "simclr")

    def _make_objective(self, network, images, out_dim, n_samples, steps_per_epoch):
        """Make the method's loss, and what it keeps beside the network."""
        method = self._method(images)
        temperature = self.temperature
        if temperature == "auto":
            temperature = 0.2 if method == "mocov2" else 0.5
        if method == "scl":
            return SoftContrastiveObjective(
                network,
                self.embedding_weight,
                nu=self.nu,
                nu_low=self.nu_projection,
                kernel=self.kernel,
                beta=self.beta,
                target=self.target,
                contrast=self.contrast,
                repulsion=self.repulsion,
                detach_target=self.detach_target,
            )
        if method == "simclr":
            return SimCLRObjective(network, temperature)
        width = network.head[0].in_features if method != "dino" else None
        if method == "simsiam":
            return SimSiamObjective(network, 4 * width, width)
        if method == "byol":
            return BYOLObjective(network, 256, 2 * width, self.momentum)
        if method == "mocov2":
            size = self._option("queue_size")
            size = auto_queue(n_samples) if size == "auto" else size
            return MoCoObjective(network, 128, size, temperature, self.momentum)
        return DINOObjective(
            network,
            out_dim,
            self.student_temp,
            self.teacher_temp,
            self._option("warmup_teacher_temp"),
            self._option("warmup_share"),
            self._option("center_momentum"),
            self.momentum,
            round(self._option("frozen_epochs") * steps_per_epoch),
            self._option("mix"),
        )

    # ---- embedding -------------------------------------------------------------------------------

    def _check_rows(self, X):
        check_is_fitted(self, "module_")
        rows = check_X(
            self,
            X,
            reset=False,
            layer=self.layer,
            images=self.image_shape_ is not None,
            image_shape=self.image_shape_,
            allow_counts=False,
        )
        return self._network_input(rows)

    def _check_images(self, X, what):
        check_is_fitted(self, "module_")
        if self.image_shape_ is None:
            raise ValueError(f"{what} is for images, but the encoder was fitted on vectors.")
        return self._check_rows(X)

    def _network_input(self, rows):
        if self.image_shape_ is not None:
            return rows
        return project_rows(rows, self.mean_, self.components_, self.scale_)

    def _run(self, inputs, fn):
        """Apply a function of the network to its input rows, in float32 and in padded batches."""
        device = self._device()
        self.module_.to(device).eval()
        size = 256
        if self.image_shape_ is not None:
            # A function of the size of an image only: rows give the same however many there are.
            size = max(16, min(256, 2**22 // math.prod(self.image_shape_)))

        def run(index):
            with torch.no_grad():
                x = inputs[index].to(device)
                if self.image_shape_ is not None:
                    x = to_unit(x, inputs.pixel_range)
                y = fn(x).float().cpu()
            bar.update(min(size, bar.total - bar.n))  # the last batch is filled up
            return y

        n = len(inputs)
        with progress_bar(self.verbose, n, "embedding", "row", leave=False, delay=2) as bar:
            return sample_in_batches(run, n, size).numpy()

    @property
    def _n_features_out(self):
        return self.module_.n_components


def _per_channel(values, channels):
    """Values of as many channels as there are; their mean for all where they are others."""
    return values if len(values) == channels else [sum(values) / len(values)]


def _warn_of_collapse(history, method):
    last = history[-1] if history else {}
    spread, entropy = last.get("feature_spread", 1.0), last.get("teacher_entropy", 0.5)
    if spread >= _LEAST_SPREAD and entropy < 0.995:
        return
    warn(
        f"{method} collapsed: the embeddings of different samples are nearly the same "
        f"(feature_spread {spread:.3f}, 1 is best"
        + (f"; teacher_entropy {entropy:.3f} of its largest" if "teacher_entropy" in last else "")
        + "). Try a lower learning_rate, more samples in a batch, a smaller out_dim, momentum "
        "closer to 1, or weaker augmentation.",
        CollapseWarning,
    )
