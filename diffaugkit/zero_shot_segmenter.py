"""Masks without any training on masks: regions from what a diffusion model knows of images.

DiNO-Diffusion segments lungs with the network that was trained to draw X-rays, by DiffSeg (Tian et
al. 2023, "Diffuse, Attend, and Segment", arXiv 2308.12469): positions of one region attend to the
same places, so maps that are alike, as distributions, belong to one region.

===============  ===========================================================================
paper            here
===============  ===========================================================================
A_k              ``diffusion_.attention_maps(X)``, mean of the layers and heads of a resolution
A_f              ``aggregate_attention``: all resolutions on one grid, weights as the square
                 root of the number of positions
D(., .), tau, N  symmetric Kullback-Leibler divergence, `merge_threshold`, `n_iterations`
M x M grid       `n_anchors`
L_p, NMS         ``merge_attention``: proposals; each pixel goes to the one that is largest there
k-means          ``cluster_attention``: `refine`
===============  ===========================================================================

Two things are ours. Where the number of segments is known, the features of the way up of the same
network are clustered (``aggregate_features``, `n_segments`), which finds glands better than its
attention; and a guided filter (``guided_filter``, `guided_radius`) brings borders to the edges of
the image.
"""

import warnings
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch.nn import functional as F

from diffaugkit.arrays import to_numpy
from diffaugkit.base import (
    HasMethods,
    Interval,
    StrOptions,
    TorchEstimator,
    _fit_context,
    all_or_nothing,
)
from diffaugkit.data import check_X
from diffaugkit.denoisers import UNetDenoiser, record_attention, unet_size
from diffaugkit.embedding_diffusion import EmbeddingConditionedDiffusion, _mean_maps
from diffaugkit.image_inputs import check_image_shape, check_is_image
from diffaugkit.image_rows import ImageRows, to_unit
from diffaugkit.metrics import matched_dice, matched_iou
from diffaugkit.runtime import isolated_rng

# Most positions that attend in the "auto" diffusion: a grid of 32 x 32.
_AUTO_POSITIONS = 1024
# Images from which an "auto" threshold is read.
_THRESHOLD_IMAGES = 64
# Maps of one product: the logarithms of a chunk are held, never those of all maps.
_CHUNK = 1024
# Segments that are enlarged to the pixels of an image at once.
_ENLARGED = 16
_SMALLEST = 1e-12


class ZeroShotSegmenter(TorchEstimator):
    """Segment images by the self-attention of a diffusion model that saw no masks.

    Each image goes through the denoiser once, without noise. Its attention maps are brought to one
    grid; those of a grid of anchors are merged while their divergence is below a threshold; each
    pixel then goes to the merged map that is largest there. Where the number of segments is known,
    the features of the denoiser, or its maps, are clustered into as many instead. The segments have
    numbers, not names.

    Parameters
    ----------
    diffusion : "auto" or estimator, default="auto"
        An :class:`~diffaugkit.EmbeddingConditionedDiffusion` of images whose denoiser is a U-Net,
        in pixels or latents: cloned and fitted on `X`, or a fitted one, used as it is, inside
        ``sklearn.frozen.FrozenEstimator``. "auto" is the unconditional model with self-attention at
        every resolution of at most 1 024 positions.
    timestep : int or "auto", default="auto"
        Noise level that the network is told, in [0, n_timesteps). "auto" is three tenths of them,
        300 of 1 000, as in DiffSeg's code; DiNO-Diffusion found 100 to 500 alike, and more to be
        worse.
    merge_threshold : float or "auto", default="auto"
        Divergence in nats below which maps are merged; the higher, the fewer segments. How peaked
        the maps are depends on the network: DiffSeg has 0.9 for Stable Diffusion, DiNO-Diffusion
        0.05. "auto" reads it from the training images, see `quantile`.
    n_segments : int or None, default=None
        Segments of each image, where their number is known, as 2 for one kind of object and the
        rest: k-means of what `cluster_on` says takes the place of the merging and its threshold.
        None lets the merging find how many there are.
    cluster_on : {"features", "attention"}, default="features"
        What `n_segments` clusters: the denoiser's features
        (:meth:`~diffaugkit.EmbeddingConditionedDiffusion.feature_maps`), or the logarithms of its
        attention maps. Try both where you have a few masks; see Notes.
    n_anchors : int, default=16
        Rows and columns of the grid of anchors, at most those of the attention.
    n_iterations : int, default=3
        Rounds of merging. The first averages all maps near each anchor, those that follow join the
        proposals; 1 leaves one proposal per anchor.
    refine : bool, default=False
        Whether k-means of the logarithms of all maps, from the proposals, has the last word.
        DiffSeg's benchmark does without.
    guided_radius : int, "auto" or None, default=None
        Radius in pixels of a guided filter (He et al. 2010), through which each segment passes
        before a pixel goes to the largest, so that borders lie at edges of the image and not at
        those of the coarse grid of the maps. "auto" is the side of a position of that grid. None,
        as in DiffSeg, enlarges smoothly. On glands it is worth 1 to 2 points by every measure to
        the merged attention, and nothing to features, whose grid is finer
        (``docs/benchmarks.md``, "Masks without masks").
    quantile : float in (0, 1), default=0.2
        For ``merge_threshold="auto"``: share of the pairs of anchors, over at most 64 images of
        ``fit``, whose divergence lies below the threshold. Lower than the 1 / k of all pairs that
        lie inside one of k equal regions, as means of maps are closer than maps; see Notes.
    resolution : "auto", "finest" or tuple of (int, int), default="auto"
        Rows and columns of the grid on which regions are found, one of the resolutions of the
        attention, for features of the U-Net; finer maps are averaged down to it. "auto" is the
        finest of the attention, for features half of the network's own: means of 2 x 2
        positions, which tell textures apart. A coarser attention takes less memory, n**2 values for
        n positions.
    conditional : bool, default=False
        Under the embedding of each image; False is the null condition, as in DiffSeg.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of images given as rows of numbers.
    max_epochs : int or "auto", default="auto"
        Passes over the data, of the "auto" diffusion.
    batch_size : int or "auto", default="auto"
        Of the "auto" diffusion.
    learning_rate : float or "auto", default="auto"
        Of the "auto" diffusion.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to a diffusion that is fitted here; see
        :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    diffusion_ : EmbeddingConditionedDiffusion or FrozenEstimator
        The fitted model.
    timestep_ : int
        The noise level in use.
    merge_threshold_ : float or None
        The threshold in use; None with `n_segments`.
    history_ : DataFrame
        One row per epoch of the diffusion; empty if it was frozen.
    n_iter_ : int
        Epochs of the diffusion.
    n_features_in_ : int
    image_shape_ : tuple of (int, int, int)

    See Also
    --------
    diffaugkit.metrics.matched_dice : Scores segments that have no names.

    Notes
    -----
    DiffSeg's published code, followed where the paper is silent: layers of one resolution are
    averaged, then heads; of each map the places looked to are interpolated and normalised again,
    the positions that look are repeated; the divergence is summed over the map. Unlike there, all
    is float32, any resolutions and sizes will do, and the threshold can be found. K-means is there
    over the maps, here over their logarithms, which are linear in the query of a position where
    the maps are the softmax of its products with all keys, so that a mean of logarithms is the map
    of a mean query.

    With `n_segments` the features of all blocks of the way up are put side by side, each block in
    units of its spread over the image. Clusters of the maps of attention, of the same networks at
    timestep 300, were behind by 2 to 4 points of Dice on glands (four networks), by 5 on textures
    (one), and ahead by 5 on nuclei (two), which colour alone finds better than either. On glands,
    both together were not better than features alone.

    Measured on images of two textures of one brightness (16 x 16, 352 steps; segments found, and
    mean IoU with the background): quantile 0.1 gives 7.9 and 36, 0.15 4.2 and 42, 0.2 2.8 and 43,
    0.3 1.3 and 34; k-means on pixels has 35. Timesteps 20 to 300 differ by less than 2. A network
    that has hardly learned attends everywhere alike (median divergence 0.001 after 300 steps on
    tissue), and its segments mean little.

    An image is segmented by itself: its mask does not depend on the others of a call.

    References
    ----------
    "DiNO-Diffusion: Scaling Medical Diffusion Models via Self-Supervised Pre-Training", sections
    2.4 and 3, appendix B. Tian et al. 2023, "Diffuse, Attend, and Segment: Unsupervised Zero-Shot
    Segmentation using Stable Diffusion", arXiv 2308.12469. Baranchuk et al. 2022, "Label-Efficient
    Semantic Segmentation with Diffusion Models", arXiv 2112.03126. He, Sun and Tang 2010, "Guided
    Image Filtering", ECCV.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.zero_shot_segmenter import ZeroShotSegmenter
    >>> X = np.random.default_rng(0).random((20, 16, 16, 1), dtype=np.float32)
    >>> segmenter = ZeroShotSegmenter(max_epochs=1, random_state=0)
    >>> # Skipped, as diffusers alone takes seconds to import.
    >>> segmenter.fit(X).predict(X[:2]).shape  # doctest: +SKIP
    (2, 16, 16)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchEstimator._parameter_constraints,
        "diffusion": [HasMethods(["fit", "sample"]), StrOptions({"auto"})],
        "timestep": [Interval(Integral, 0, None, closed="left"), StrOptions({"auto"})],
        "merge_threshold": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
        "n_segments": [Interval(Integral, 1, None, closed="left"), None],
        "cluster_on": [StrOptions({"features", "attention"})],
        "n_anchors": [Interval(Integral, 1, None, closed="left")],
        "n_iterations": [Interval(Integral, 1, None, closed="left")],
        "refine": ["boolean"],
        "guided_radius": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"}), None],
        "quantile": [Interval(Real, 0, 1, closed="neither")],
        "resolution": [StrOptions({"auto", "finest"}), tuple, list],
        "conditional": ["boolean"],
        "image_shape": [tuple, list, None],
        **{
            name: [*TorchEstimator._parameter_constraints[name], StrOptions({"auto"})]
            for name in ("max_epochs", "batch_size", "learning_rate")
        },
    }
    _extra_state = ("_pixel_range", "_layout")

    def __init__(
        self,
        diffusion="auto",
        timestep="auto",
        merge_threshold="auto",
        *,
        n_segments=None,
        cluster_on="features",
        n_anchors=16,
        n_iterations=3,
        refine=False,
        guided_radius=None,
        quantile=0.2,
        resolution="auto",
        conditional=False,
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
        self.timestep = timestep
        self.merge_threshold = merge_threshold
        self.n_segments = n_segments
        self.cluster_on = cluster_on
        self.n_anchors = n_anchors
        self.n_iterations = n_iterations
        self.refine = refine
        self.guided_radius = guided_radius
        self.quantile = quantile
        self.resolution = resolution
        self.conditional = conditional
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
    def fit(self, X, y=None):
        """Fit the diffusion model, unless it is frozen, and find the threshold.

        Parameters
        ----------
        X : images of shape (n_samples, ...)
            See :func:`~diffaugkit.data.check_X`; rows of numbers with `image_shape`.
        y : None
            Ignored: no masks are needed.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, a timestep or resolution that the model has not, or more
            segments than positions of the grid.
        TypeError
            If the denoiser of the diffusion is no U-Net.
        """
        frozen = isinstance(self.diffusion, FrozenEstimator)
        rows = self._check_input(X, reset=True, ensure_min_samples=1 if frozen else 2)
        check_is_image(self, rows)
        diffusion = self._make_diffusion(rows)
        if not frozen:
            self._check_unfitted(diffusion, rows)
            diffusion.fit(rows)
        self._set_fitted(diffusion)

        if self.n_segments is None and self.merge_threshold == "auto":
            self.merge_threshold_ = self._find_threshold(rows)
            return self
        # So that what the network has not is refused here.
        (self._features if self._on_features() else self._attention)(_alone(rows, 0))
        self.merge_threshold_ = None if self.n_segments else float(self.merge_threshold)
        return self

    def predict(self, X):
        """Segment images.

        Parameters
        ----------
        X : as for ``fit``

        Returns
        -------
        ndarray of shape (n_samples, height, width), int32
            Segment of each pixel: 0 is the largest of its image, then 1, and so on. The numbers of
            two images have nothing to do with each other.

        Raises
        ------
        NotFittedError, ValueError
            Before ``fit``; for input that does not match it; where `n_segments` was set to None
            after ``fit``, which then learned no threshold.
        """
        check_is_fitted(self, "timestep_")
        if self.n_segments is None and self.merge_threshold_ is None:
            raise ValueError(
                "n_segments=None merges to a threshold, but ZeroShotSegmenter was fitted with a "
                "number of segments and has learned none: fit it again."
            )
        rows = self._check_input(X, reset=False)
        masks = np.empty((len(rows), *self.image_shape_[:2]), np.int32)
        for i in range(len(rows)):
            image = _alone(rows, i)
            if self._on_features():
                features, shape, cell = self._features(image)
                segments = _cluster(features, self.n_segments)
            else:
                attention, shape, cell = self._attention(image)
                segments = self.n_segments or merge_attention(
                    attention,
                    self.merge_threshold_,
                    anchor_positions(shape, self.n_anchors),
                    n_iterations=self.n_iterations,
                )
                if self.refine or self.n_segments is not None:
                    segments = cluster_attention(attention, segments)
            sharpen = None
            if self.guided_radius is not None:
                radius = cell if self.guided_radius == "auto" else self.guided_radius
                guide = to_unit(image[[0]], image.pixel_range)[0]
                sharpen = guided_filter(guide.to(segments.device), radius)
            found = _largest(segments.view(-1, 1, *shape), cell, masks.shape[1:], sharpen)
            masks[i] = _by_size(found.cpu().numpy())
        return masks

    def score(self, X, y, *, metric="dice", labels=None, many_to_one=False):
        """Compare the segments with true masks, after the best matching in each image.

        Parameters
        ----------
        X : as for ``fit``
        y : int array-like of shape (n_samples, height, width) or (n_samples, height * width)
            True masks, 0 for the background. Of shape (n_samples,): one label for all pixels of an
            image.
        metric : {"dice", "iou"}, default="dice"
            What to return.
        labels, many_to_one
            See :func:`~diffaugkit.metrics.matched_dice`.

        Returns
        -------
        float in [0, 1]
            Mean over images and their labels.

        Raises
        ------
        ValueError
            For masks of another size, or an unknown metric.
        """
        scores = {"dice": matched_dice, "iou": matched_iou}
        if metric not in scores:
            raise ValueError(f"metric must be 'dice' or 'iou', got {metric!r}.")
        check_is_fitted(self, "timestep_")
        rows = self._check_input(X, reset=False)
        y = np.asarray(to_numpy(y))
        height, width = self.image_shape_[:2]
        if y.ndim == 1:
            y = np.broadcast_to(y[:, None, None], (len(y), height, width))
        elif y.ndim == 2 and y.shape[1] == height * width:
            y = y.reshape(-1, height, width)
        if y.shape != (len(rows), height, width):  # found by the metric after all the work
            raise ValueError(
                f"y has shape {y.shape}, but X holds {len(rows)} images of {height} x {width} "
                "pixels: masks hold one label per pixel."
            )
        return scores[metric](y, self.predict(rows), labels=labels, many_to_one=many_to_one)

    def _check_input(self, X, *, reset, **limits):
        return check_X(self, X, reset=reset, images=True, image_shape=self.image_shape, **limits)

    def _make_diffusion(self, rows):
        diffusion = self.diffusion
        model = getattr(diffusion, "estimator", diffusion)
        if model != "auto" and not isinstance(model, EmbeddingConditionedDiffusion):
            raise self._no_unet(model)
        if isinstance(diffusion, FrozenEstimator):
            check_is_fitted(diffusion.estimator)  # the message names what has to be fitted
            self._check_model(diffusion)
            return diffusion
        if diffusion == "auto":
            names = ("max_epochs", "batch_size", "learning_rate")
            diffusion = EmbeddingConditionedDiffusion(
                encoder=None,
                image_shape=self.image_shape,
                n_attention_levels=_attention_levels(rows.shape[1:]),
                **{name: getattr(self, name) for name in names},
            )
        diffusion = self._hand_over(
            clone(diffusion),
            random_state=self._child_seed(self._seed(), 0),
            checkpoint_dir=self._folder("diffusion"),
        )
        self._check_timestep(diffusion)
        return diffusion

    def _set_fitted(self, diffusion):
        import pandas as pd

        self._check_model(diffusion)
        frozen = isinstance(diffusion, FrozenEstimator)
        if not frozen:
            diffusion.set_params(checkpoint_dir=None)
        self.diffusion_ = diffusion
        first = ["epoch", "loss", "learning_rate"]
        self.history_ = pd.DataFrame(columns=first) if frozen else diffusion.history_
        self.n_iter_ = len(self.history_)
        n_timesteps = self._model().n_timesteps
        self.timestep_ = int(0.3 * n_timesteps) if self.timestep == "auto" else int(self.timestep)

    def _find_threshold(self, rows):
        distances = []
        for i in np.unique(np.linspace(0, len(rows) - 1, _THRESHOLD_IMAGES).astype(int)):
            attention, shape, _ = self._attention(_alone(rows, i))
            anchors = attention[anchor_positions(shape, self.n_anchors)]
            own = symmetric_divergence(anchors, anchors)
            upper = torch.triu_indices(*own.shape, offset=1, device=own.device)
            distances.append(own[upper[0], upper[1]].cpu().numpy())
        distances = np.concatenate(distances)
        # One anchor has no pairs: nothing is there to merge.
        found = float(np.quantile(distances, self.quantile)) if len(distances) else 0.0
        return max(found, _SMALLEST)

    def _model(self):
        return getattr(self.diffusion_, "estimator", self.diffusion_)

    def _check_model(self, diffusion):
        model = getattr(diffusion, "estimator", diffusion)
        if not isinstance(getattr(model, "module_", None), UNetDenoiser):
            raise self._no_unet(model)
        check_image_shape("the diffusion", self.image_shape_, model.image_shape_)
        self._check_timestep(model)

    @staticmethod
    def _no_unet(model):
        return TypeError(
            f"{type(model).__name__} has no U-Net, whose self-attention is needed: give an "
            "EmbeddingConditionedDiffusion of images."
        )

    def _check_timestep(self, model):
        if self.timestep != "auto" and self.timestep >= model.n_timesteps:
            raise ValueError(
                f"timestep={self.timestep} must be below the diffusion's n_timesteps="
                f"{model.n_timesteps}."
            )

    def _check_unfitted(self, diffusion, rows):
        """Refuse what the U-Net will not have before anything is trained."""
        if self.conditional and diffusion.encoder is None:
            raise ValueError(
                "conditional=True, but the diffusion has encoder=None, so that there are no "
                "embeddings: give an EmbeddingConditionedDiffusion with an encoder."
            )
        diffusion._check_parts(rows, diffusion.encoder is not None)
        shape = rows.shape[1:]
        if diffusion.autoencoder is not None:
            autoencoder = getattr(diffusion.autoencoder, "estimator", diffusion.autoencoder)
            if not hasattr(autoencoder, "module_") and autoencoder.pretrained is not None:
                return  # its weights say how large latents are
            shape = autoencoder.latent_shape(shape)
        with isolated_rng(0):
            module, blank = diffusion._make_module(shape, 0), torch.zeros(1, *shape)
        if not isinstance(module, UNetDenoiser):
            raise self._no_unet(diffusion)
        if self._on_features():
            self._choose_grid(shape[1:], module.multiple)
            return
        with torch.no_grad(), record_attention(module) as found:
            module(blank, torch.zeros(1, dtype=torch.int64))
        self._choose_resolution(_mean_maps(found.self_attention, module.multiple, shape[1:]))

    def _on_features(self):
        return self.n_segments is not None and self.cluster_on == "features"

    def _choose_resolution(self, sizes):
        """Pick the resolution on which maps are merged, out of those that there are."""
        if isinstance(self.resolution, str):
            shape = max(sizes, key=lambda size: size[0] * size[1])
        else:
            shape = self._check_resolution(sizes, "attention")
        self._check_n_segments(shape, "attention maps")
        return shape

    def _choose_grid(self, inner, multiple):
        """Pick rows and columns of the grid on which features are clustered, and its stride."""
        levels = range(multiple.bit_length())
        sizes = {tuple(-(-side // 2**k) for side in inner): 2**k for k in reversed(levels)}
        if isinstance(self.resolution, str):
            stride = 2 if self.resolution == "auto" else 1
            shape = tuple(-(-side // stride) for side in inner)
        else:
            shape = self._check_resolution(sizes, "U-Net")
            stride = sizes[shape]
        self._check_n_segments(shape, "features")
        return shape, stride

    def _check_n_segments(self, shape, of):
        if (self.n_segments or 0) > shape[0] * shape[1]:
            raise ValueError(
                f"n_segments={self.n_segments}, but the {of} of these images have "
                f"{shape[0] * shape[1]} positions, {shape[0]} x {shape[1]}."
            )

    def _check_resolution(self, sizes, of):
        if tuple(self.resolution) not in sizes:
            raise ValueError(
                f"resolution={self.resolution!r} is none of the {of}'s: "
                f"{', '.join(map(str, sorted(sizes)))}."
            )
        return tuple(self.resolution)

    def _attention(self, image):
        """Return maps of one image (n, n), rows and columns of their grid, and pixels of a cell."""
        maps, inner, multiple = self._look(image, "attention_maps")
        strides = {size: _stride(size, inner, multiple) for size in maps}
        shape = self._choose_resolution(maps)
        maps = {size: self._to_device(found[0]) for size, found in maps.items()}
        cell = strides[shape] * self._pixels_of(inner)
        return aggregate_attention(maps, strides, shape), shape, cell

    def _features(self, image):
        """Return features of one image (n, d), rows and columns of their grid, pixels of a cell."""
        blocks, inner, multiple = self._look(image, "feature_maps")
        shape, stride = self._choose_grid(inner, multiple)
        factors = [_stride(block.shape[2:], inner, multiple) / stride for block in blocks]
        blocks = [self._to_device(block[0]) for block in blocks]
        cell = stride * self._pixels_of(inner)
        return aggregate_features(blocks, factors, shape), shape, cell

    def _look(self, image, what):
        """Return what the network shows of one image, the size of its input, and its multiple."""
        model = self._model()
        found = getattr(model, what)(image, t=self.timestep_, conditional=self.conditional)
        return found, model._space_of().shape[1:], model.module_.multiple

    def _to_device(self, array):
        return torch.from_numpy(array).to(self._device())

    def _pixels_of(self, inner):
        # A latent stands for several pixels.
        return _stride(inner, self.image_shape_[:2], max(self.image_shape_))

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        return tags


def _alone(rows, i):
    """Rows of one image: nothing in a batch rounds it differently, and its maps are many."""
    return ImageRows.like(rows, rows[[int(i)]])


def aggregate_attention(maps, strides, shape):
    """Bring attention maps of several resolutions to one grid, and average them.

    Parameters
    ----------
    maps : dict of (int, int) to Tensor of shape (N, N)
        By resolution (rows, columns), N = rows * columns; row i holds where position i looks to.
    strides : dict of (int, int) to int
        Side of a position of each resolution, powers of two in a common unit.
    shape : tuple of (int, int)
        The resolution to bring them to.

    Returns
    -------
    Tensor of shape (n, n), float32
        Rows sum to 1. The weight of a resolution is proportional to the square root of its N.

    Examples
    --------
    >>> import torch
    >>> maps = {(1, 1): torch.ones(1, 1), (2, 2): torch.eye(4)}
    >>> aggregate_attention(maps, {(1, 1): 2, (2, 2): 1}, (2, 2))[0].tolist()
    [0.75, 0.0833333358168602, 0.0833333358168602, 0.0833333358168602]
    """
    rows, columns = shape
    n = rows * columns
    weights = {size: (size[0] * size[1]) ** 0.5 for size in maps}
    total = sum(weights.values())
    out = None
    for size, found in maps.items():
        found = found.float().view(-1, 1, *size)  # (N, 1, rows, columns)
        up, down = strides[size] // strides[shape], strides[shape] // strides[size]
        if up > 1:
            # To where positions look: interpolated. What lies beyond the image is cut off.
            found = F.interpolate(found, scale_factor=up, mode="bilinear", align_corners=False)
        elif down > 1:
            found = _pooled(found, down)
        found = found[:, 0, :rows, :columns].flatten(1)  # (N, n)
        found = found / found.sum(dim=1, keepdim=True)
        # Positions that look: repeated, or averaged.
        if down > 1:
            found = _pooled(found.T.reshape(n, 1, *size), down)[:, 0].flatten(1).T
        else:
            i, j = (torch.arange(m, device=found.device) // up for m in shape)
            found = found[(i[:, None] * size[1] + j).flatten()]
        found = found * (weights[size] / total)
        out = found if out is None else out.add_(found)
    return out


def aggregate_features(blocks, factors, shape):
    """Bring features of several resolutions to one grid, side by side.

    Parameters
    ----------
    blocks : list of Tensor of shape (channels, rows, columns)
        Features of one image.
    factors : list of float
        Side of a position of each block, powers of two in units of those of the grid.
    shape : tuple of (int, int)
        Rows and columns of the grid.

    Returns
    -------
    Tensor of shape (n, d), float32
        Of each position. Every channel has mean zero over the image, and every block the same share
        of the squared distances.

    Examples
    --------
    >>> import torch
    >>> block = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]])
    >>> aggregate_features([block], [1], (2, 2)).flatten().tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    out = []
    for block, factor in zip(blocks, factors, strict=True):
        block = block.float() - block.float().mean(dim=(1, 2), keepdim=True)
        block = block / block.square().sum(dim=0).mean().sqrt().clamp(min=_SMALLEST)
        if factor > 1:
            options = {"mode": "bilinear", "align_corners": False}
            block = F.interpolate(block[None], scale_factor=factor, **options)[0]
        elif factor < 1:
            block = _pooled(block[None], round(1 / factor))[0]
        out.append(block[:, : shape[0], : shape[1]].flatten(1))
    return torch.cat(out).T


def _pooled(maps, factor):
    return F.avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False)


def anchor_positions(shape, n_anchors):
    """Positions of an even grid of anchors, as indices into the rows of the attention.

    Parameters
    ----------
    shape : tuple of (int, int)
        Rows and columns of the attention.
    n_anchors : int
        Rows and columns of the grid, clipped to those of the attention.

    Returns
    -------
    Tensor of int64

    Examples
    --------
    >>> anchor_positions((4, 4), 2).tolist()
    [5, 7, 13, 15]
    """
    i, j = (
        ((torch.arange(count) + 0.5) * side / count).long()
        for side, count in ((side, min(n_anchors, side)) for side in shape)
    )
    return (i[:, None] * shape[1] + j).flatten()


def symmetric_divergence(p, q):
    """Mean of the two Kullback-Leibler divergences of each pair of distributions.

    Parameters
    ----------
    p : Tensor of shape (n, d)
        Rows that sum to 1.
    q : Tensor of shape (m, d)
        Likewise.

    Returns
    -------
    Tensor of shape (n, m)
        In nats. Values below 1e-12 count as such.

    Notes
    -----
    KL(p || q) is the sum of p log p minus the product of p and log q, so that all pairs take two
    matrix products. Those of `q` are made in chunks.

    Examples
    --------
    >>> import torch
    >>> p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    >>> round(symmetric_divergence(p, p)[0, 1].item(), 4)
    0.1373
    """
    log_p = p.clamp(min=_SMALLEST).log()
    entropy_p = (p * log_p).sum(dim=1)
    parts = []
    for part in q.split(_CHUNK):
        log_q = part.clamp(min=_SMALLEST).log()
        entropy_q = (part * log_q).sum(dim=1)
        crossed = p @ log_q.T + log_p @ part.T
        parts.append((entropy_p[:, None] + entropy_q - crossed) / 2)
    # Equal rows differ by rounding alone.
    return torch.cat(parts, dim=1).clamp(min=0)


def merge_attention(attention, threshold, anchors, n_iterations=3):
    """Merge the maps of anchors into proposals, DiffSeg's iterative attention merging.

    Parameters
    ----------
    attention : Tensor of shape (n, n)
        One distribution per position.
    threshold : float
        Symmetric divergence in nats below which two maps are merged.
    anchors : Tensor of int64
        Positions to start from.
    n_iterations : int, default=3
        Rounds. In the first each anchor becomes the mean of all maps near it; in those that follow
        proposals are visited in order, and one that no proposal before it took becomes the mean of
        all proposals near it, those taken before included.

    Returns
    -------
    Tensor of shape (n_proposals, n)
        Distributions.

    Examples
    --------
    >>> import torch
    >>> attention = torch.tensor([[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0.5, 0.5]] * 2)
    >>> merge_attention(attention, 1.0, torch.arange(4)).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    anchors = anchors.to(attention.device)
    near = symmetric_divergence(attention[anchors], attention) < threshold
    # Rounding must not part an anchor from itself.
    near[torch.arange(len(anchors), device=near.device), anchors] = True
    near = near.float()
    proposals = (near @ attention) / near.sum(dim=1, keepdim=True)
    for _ in range(n_iterations - 1):
        near = symmetric_divergence(proposals, proposals) < threshold
        near.fill_diagonal_(True)
        kept, taken = [], np.zeros(len(proposals), bool)
        for i, mine in enumerate(near.cpu().numpy()):
            if not taken[i]:
                kept.append(i)
                taken |= mine
        near = near[kept].float()
        proposals = (near @ proposals) / near.sum(dim=1, keepdim=True)
    return proposals


def cluster_attention(attention, start):
    """Cluster all maps by k-means of their logarithms.

    Parameters
    ----------
    attention : Tensor of shape (n, n)
        One distribution per position. Values below a hundredth of the uniform 1 / n count as such.
    start : int or Tensor of shape (k, n)
        Number of clusters, or the distributions to start from.

    Returns
    -------
    Tensor of shape (k, n), float32
        Negative squared distance of each position's map from the mean of each cluster.

    Examples
    --------
    >>> import torch
    >>> attention = torch.tensor([[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0.5, 0.5]] * 2)
    >>> cluster_attention(attention, 2).argmax(dim=0).unique(return_counts=True)[1].tolist()
    [2, 2]
    """

    def logarithm(maps):
        return maps.clamp(min=0.01 / maps.shape[1]).log()

    start = start if isinstance(start, Integral) else logarithm(start)
    return _cluster(logarithm(attention), start)


def _cluster(points, start):
    """Negative squared distances (k, n) of points (n, d) from the centres of k-means."""
    from sklearn.cluster import KMeans

    if isinstance(start, Integral):
        model = KMeans(start, n_init=3, random_state=0)
    else:
        model = KMeans(len(start), init=start.cpu().numpy(), n_init=1)
    with warnings.catch_warnings():
        # An image of one colour has fewer kinds of points than clusters: some of them stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # An array, also where scikit-learn is set to put out tables.
        distances = np.asarray(model.fit_transform(points.cpu().numpy()))
    return -torch.from_numpy(distances.T.astype(np.float32)).to(points.device).square()


def guided_filter(guide, radius, eps=4e-3):
    """Make a filter that gives maps the edges of an image.

    In each window the map is explained as a linear function of the image's colours; each pixel gets
    the mean of what the windows around it say (He, Sun and Tang 2010, "Guided Image Filtering",
    ECCV, Eqs. 14 to 16, the colour version).

    Parameters
    ----------
    guide : Tensor of shape (c, h, w)
        The image.
    radius : int
        Windows have a side of ``2 * radius + 1`` pixels, less at the border of the image.
    eps : float, default=4e-3
        Ridge on the slopes: windows whose colours have a variance far below it are averaged. The
        default is for pixels in [-1, 1].

    Returns
    -------
    callable
        From maps of shape (n, h, w) to maps of that shape. It is linear in the maps.

    Examples
    --------
    >>> import torch
    >>> guide = torch.tensor([[[0.0, 0, 0, 1, 1, 1]]])
    >>> blurred = torch.tensor([[[0.0, 0, 0.4, 0.6, 1, 1]]])
    >>> [round(value, 1) for value in guided_filter(guide, 1, 1e-4)(blurred)[0, 0].tolist()]
    [0.1, 0.1, 0.2, 0.8, 0.9, 0.9]
    """
    side = 2 * radius + 1

    def mean(maps):
        # Of the rows, then of the columns: what lies outside the image does not count.
        maps = F.avg_pool2d(maps[None], (side, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(maps, (1, side), 1, (0, radius), count_include_pad=False)[0]

    centre = mean(guide)
    products = mean((guide[:, None] * guide).flatten(0, 1)).unflatten(0, (len(guide), -1))
    covariance = (products - centre[:, None] * centre).permute(2, 3, 0, 1)
    ridge = eps * torch.eye(len(guide), dtype=guide.dtype, device=guide.device)
    inverse = torch.linalg.inv(covariance + ridge)

    def apply(one):
        level = mean(one[None])
        slopes = torch.einsum("hwij,jhw->ihw", inverse, mean(guide * one) - centre * level)
        offset = level - (slopes * centre).sum(dim=0)
        return (mean(slopes) * guide).sum(dim=0) + mean(offset)[0]

    return lambda maps: torch.stack([apply(one) for one in maps])


def _largest(segments, cell, size, sharpen=None):
    """Find which segment (n, 1, rows, columns) is largest at each pixel (height, width)."""
    height, width = size
    best = number = None
    for first in range(0, len(segments), _ENLARGED):
        part = segments[first : first + _ENLARGED]
        large = F.interpolate(part, scale_factor=cell, mode="bilinear", align_corners=False)
        large = large[:, 0, :height, :width]
        value, index = (large if sharpen is None else sharpen(large)).max(dim=0)
        if best is None:
            best, number = value, index
        else:
            number = torch.where(value > best, index + first, number)
            best = torch.maximum(best, value)
    return number


def _by_size(mask):
    """Give the segments new numbers, the largest first; of equal ones that which comes first."""
    _, first, codes, sizes = np.unique(
        mask, return_index=True, return_inverse=True, return_counts=True
    )
    number = np.empty(len(sizes), np.int32)
    number[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return number[codes.reshape(mask.shape)]


def _stride(size, shape, multiple):
    """Side of a position, from a resolution that covers `shape` with a power of two."""
    stride = 1
    while stride < multiple and tuple(-(-side // stride) for side in shape) != tuple(size):
        stride *= 2
    return stride


def _attention_levels(shape):
    """Lowest levels of the "auto" U-Net whose positions are few enough to attend, at least one."""
    n_levels = len(unet_size(shape)["block_out_channels"])
    positions = [-(-shape[1] // 2**level) * -(-shape[2] // 2**level) for level in range(n_levels)]
    return max(1, sum(count <= _AUTO_POSITIONS for count in positions))
