"""Segmentation from generative pre-training: a U-Net that learned to denoise learns to segment.

GenSelfDiff-HIS (Purma et al., "GenSelfDiff-HIS: Generative Self-Supervision Using Diffusion for
Histopathological Image Segmentation"), two phases on one network and one range of pixels:

=================  ================================================================================
paper              here
=================  ================================================================================
x_0                a patch, in [-1, 1] in both phases
lambda_t           weight of a timestep: P2, k = gamma = 1, that is 1 - alpha_bar_t          (Eq. 8)
L_P2               ``Diffusion.loss(weighting="p2")``, on images without masks           (Eq. 8)
f_theta            the same U-Net at t = 0 with a new last layer                 (``module_``)
L_SS + lambda L_FL ``segmentation_losses``, on images with masks                  (Eqs. 9 to 11)
=================  ================================================================================
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from diffaugkit.arrays import some, strips, warn
from diffaugkit.base import Interval, StrOptions, _fit_context, all_or_nothing
from diffaugkit.image_rows import to_unit
from diffaugkit.pretrained_unet import PretrainedUNet
from diffaugkit.runtime import reduced_precision
from diffaugkit.segmentation_data import IGNORED, PatchRows, read_masks, vary_pairs
from diffaugkit.segmentation_losses import segmentation_loss
from diffaugkit.segmentation_networks import SegmentationNetwork
from diffaugkit.segmentation_tiles import predict_strips
from diffaugkit.training import KeepBest

__all__ = ["DiffusionSegmenter"]

_LOSSES = ("ss_focal", "ss", "focal", "cross_entropy")
# Labels from which on masks are taken for numbers of objects, unless they are named.
_USUAL_CLASSES = 20


class DiffusionSegmenter(PretrainedUNet):
    """Segment images with a U-Net that was pre-trained, without masks, by denoising.

    Parameters
    ----------
    diffusion : "auto", estimator or None, default="auto"
        The pre-training. "auto" trains this estimator's own network by `pretext`. An
        :class:`~diffaugkit.EmbeddingConditionedDiffusion` of pixels, best without condition
        (``encoder=None``), is cloned and fitted on the patches, or gives its weights as they are
        inside ``sklearn.frozen.FrozenEstimator``; its U-Net is then the network. None trains from
        scratch.
    pretext : {"diffusion", "inpainting", "context_restoration"} or None, default="diffusion"
        What "auto" learns from: noise (the paper), erased boxes (Pathak et al. 2016), cells that
        changed places (Chen et al. 2019), or nothing.
    loss_weighting : {"p2", "uniform", "min_snr"}, default="p2"
        Diffusion: weight of the noise levels.
    n_timesteps : int, default=1000
        Diffusion: noise levels, on the released code's schedule (squares of evenly spaced roots).
    denoiser : {"unet", "attention_unet"}, default="unet"
        The network: diffusers' U-Net, or the paper's with linear attention at every level. Not used
        where `diffusion` is an estimator.
    block_out_channels : tuple of int or "auto", default="auto"
        Width of each level. "auto" is the paper's (64, 128, 256, 512) for ``"attention_unet"``, and
        at most (32, 64, 64, 128) for ``"unet"``, which two CPU cores train in minutes.
    patch_size : int, tuple of (int, int) or "auto", default="auto"
        Height and width of the patches of both phases and of the tiles of prediction. "auto" is the
        smallest training image, at most 128; the paper has 256.
    stride : int, tuple of (int, int) or "auto", default="auto"
        Distance of training patches; "auto" is half a patch. The paper has 64.
    loss : {"ss_focal", "ss", "focal", "cross_entropy"}, default="ss_focal"
        Loss of the second phase.
    focal_weight : float, default=1.0
        Weight lambda of the focal loss in the sum, the paper's best.
    augment : bool, str or dict, default=True
        True flips patches with their masks, and jitters and blurs their colours, as in the paper.
        ``"natural"``, ``"greyscale"``, ``"tissue"`` (quarter turns of square patches, jitter of the
        stain), ``"auto"`` or a dict give the flips, turns and colours of a recipe, but no crops:
        values as of `augmentation` of :class:`~diffaugkit.SelfSupervisedEncoder`.
    classes : array-like of int or None, default=None
        Labels that masks may hold, the first one the background. None takes those found. Give it
        where a training set may lack a class.
    ignore_label : int or None, default=None
        Label of pixels that count nowhere.
    validation_fraction : float or "auto", default="auto"
        Share of the images, or of the `groups`, by whose Dice the best epoch is chosen; with 0, or
        where these show no object, the last epoch is kept. "auto" is the paper's tenth, or 0 where
        that is fewer than three: one image that is held out tells little of an epoch, and is missed
        where masks are few.
    overlap : float, default=0.25
        Prediction: share of a tile that the next one covers again. Below 0.5 the middle of a tile
        is its own prediction.
    window : {"hann", "linear"}, default="hann"
        Prediction: how overlapping tiles blend.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of the images in the rows of a 2-D `X`; one entry may be -1.
    pretrain_epochs : int or "auto", default="auto"
        Epochs of the first phase; "auto" is the paper's 100, or as many as make 2 000 batches if
        that is fewer, but at least 10. More pay where there is time for them: 8 000 batches were
        worth 7 to 13 points of the AJI of objects against none on GlaS.
    max_epochs : int or "auto", default="auto"
        Epochs of the second phase; "auto" is the paper's 150, or as many as make 1 000 batches.
    batch_size : int, default=8
        Patches of a batch in both phases, the paper's.
    learning_rate : float, default=1e-3
        Peak rate of AdamW with warm-up and cosine, in both phases; take the paper's 1e-4 for its
        network.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to a `diffusion` that is fitted here; see
        :class:`~diffaugkit.base.TorchEstimator`. Each phase keeps its checkpoints in a folder of
        its own.

    Attributes
    ----------
    module_ : SegmentationNetwork
    classes_ : ndarray of shape (n_classes,)
        Labels, sorted, or in the order of `classes`; the first one is the background.
    diffusion_ : estimator or None
        The fitted `diffusion`, where one was given.
    patch_shape_ : tuple of (int, int)
        Height and width of patches.
    image_shape_ : tuple of (int, int, int)
        Height, width and channels of the first training image.
    history_ : DataFrame
        One row per epoch: phase ("pretraining" or "finetuning"), epoch, loss and its parts,
        learning_rate, and validation_dice where images were held out.
    n_iter_ : int
        Epochs of both phases.
    n_features_in_ : int
        Values of the first training image.

    See Also
    --------
    EmbeddingConditionedDiffusion : The generator whose weights it can start from.

    Notes
    -----
    The released code pre-trains on [-1, 1] and fine-tunes on [0, 1]; here both phases see [-1, 1].
    It takes the log of a softmax; here ``log_softmax`` does. It sums the loss of the first phase
    over the batch; here it is a mean. Its Adam has a constant rate, in the second phase with betas
    0.5 and 0.999; here AdamW has the usual ones, and gradients are clipped at a norm of 1. It
    predicts patches; here whole images of any size are put together from overlapping tiles, strip
    by strip.

    ``fit`` calls its second argument `masks`. scikit-learn passes it by position, so that pipelines
    and searches work; of scikit-learn's checks only the one for the name ``y`` is not met.

    References
    ----------
    Purma et al., GenSelfDiff-HIS. Choi et al. 2022, P2 weighting. Zhao et al. 2019; Lin et al.
    2017.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.segmenter import DiffusionSegmenter
    >>> X = np.random.default_rng(0).integers(0, 90, (12, 16, 16), dtype=np.uint8)
    >>> X[:, 4:12, 4:12] += 120
    >>> masks = X > 100
    >>> segmenter = DiffusionSegmenter(
    ...     pretrain_epochs=2, max_epochs=12, block_out_channels=(8, 8), random_state=0
    ... ).fit(X[:10], masks[:10])
    >>> segmenter.predict(X[10:]).shape, segmenter.score(X[10:], masks[10:]) > 0.8
    ((2, 16, 16), True)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **PretrainedUNet._parameter_constraints,
        "loss": [StrOptions(set(_LOSSES))],
        "focal_weight": [Interval(Real, 0, None, closed="left")],
        "ignore_label": [Integral, None],
        "window": [StrOptions({"hann", "linear"})],
    }
    _extra_state = ("_pixel_range", "_layout", "_one_label")
    # What passes `masks` on does so by position: it is no metadata to ask for.
    __metadata_request__fit = {"masks": UNUSED}  # noqa: RUF012
    __metadata_request__predict = {"out": UNUSED}  # noqa: RUF012
    _used_later = ("overlap", "window", "pretrain_epochs")  # the last shows in the weights

    def __init__(
        self,
        diffusion="auto",
        *,
        pretext="diffusion",
        loss_weighting="p2",
        n_timesteps=1000,
        denoiser="unet",
        block_out_channels="auto",
        patch_size="auto",
        stride="auto",
        loss="ss_focal",
        focal_weight=1.0,
        augment=True,
        classes=None,
        ignore_label=None,
        validation_fraction="auto",
        overlap=0.25,
        window="hann",
        image_shape=None,
        pretrain_epochs="auto",
        max_epochs="auto",
        batch_size=8,
        learning_rate=1e-3,
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.diffusion = diffusion
        self.pretext = pretext
        self.loss_weighting = loss_weighting
        self.n_timesteps = n_timesteps
        self.denoiser = denoiser
        self.block_out_channels = block_out_channels
        self.patch_size = patch_size
        self.stride = stride
        self.loss = loss
        self.focal_weight = focal_weight
        self.augment = augment
        self.classes = classes
        self.ignore_label = ignore_label
        self.validation_fraction = validation_fraction
        self.overlap = overlap
        self.window = window
        self.image_shape = image_shape
        self.pretrain_epochs = pretrain_epochs
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
    def fit(self, X, masks, *, unlabeled=None, groups=None):
        """Pre-train the U-Net on images alone, and fine-tune it on images with masks.

        Parameters
        ----------
        X : array-like, list, path or Rows
            Images: an array of three or four dimensions, a list of arrays, pictures, paths or
            :class:`~diffaugkit.slides.Slide`, which may differ in size, a folder, or a 2-D array
            with `image_shape`. Of slides and whole-slide files the finest level counts.
        masks : array-like of shape (n_samples, height, width), or list
            Labels of the pixels, whole numbers: an array, or a list of arrays (height, width),
            pictures or paths. For a 2-D `X` also (n_samples, height * width), or (n_samples,) for
            images of one pixel.
        unlabeled : as `X`, or None, default=None
            Images of the first phase; None takes `X` without its masks.
        groups : array-like of shape (n_samples,) or None, default=None
            Patient or slide of each image: images of a group are all held out, or none.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that is no images, masks that do not fit, or masks of one class only.
        TypeError
            If `diffusion` has no U-Net to start from.
        """
        images = self._read_labelled(X, masks, "masks")
        targets = self._encode(read_masks(masks, images))
        pool = self._read_pool(unlabeled, images)
        seed = self._seed()
        shown = [row for row, mask in enumerate(targets) if ((mask > 0) & (mask < IGNORED)).any()]
        train, held = self._split(len(images), groups, seed, shown)
        if all((targets[row] == IGNORED).all() for row in train):
            raise ValueError(
                f"All pixels of the {len(train)} masks to learn from have ignore_label="
                f"{self.ignore_label}: there is nothing to learn from."
            )
        return self._fit_phases(pool, images, targets, train, held, seed)

    def _finetune(self, network, images, targets, train, held, seed):
        """Phase two: the U-Net at t = 0 on images with masks, best epoch by held-out Dice."""
        pixel_range, recipe = images.common_range(), self._recipe()
        patches, truth = self._pairs(images, targets, train, self._strides())
        batches = self._batches(patches, truth, seed=self._child_seed(seed, 3))
        module, validation, known = network, None, []
        if held is not None:
            module = KeepBest(network)
            validation = self._validation(module, images, targets, held)
            # Read where a checkpoint asks for them: a tenth of large files fills the memory.
            known = (read(k) for read in (images.read, targets.__getitem__) for k in held)

        def loss(x, target):
            x = to_unit(x, pixel_range)
            if self.augment:
                x, target = vary_pairs(x, target, recipe)
            return segmentation_loss(
                module(x),
                target[:, 0],
                loss=self.loss,
                focal_weight=self.focal_weight,
                ignore_index=IGNORED,
            )

        return self._train_with_labels(module, loss, batches, validation, seed, known)

    def _validation(self, module, images, targets, held):
        """Make the callback that scores epochs on held-out patches and keeps the best weights."""
        patches, truth = self._pairs(images, targets, held, self.patch_shape_)
        n_classes, device = len(self.classes_), self._device()

        def score(epoch, history):
            module.eval()
            counts = np.zeros((n_classes, n_classes))
            for part in patches.slices(max(8, self.batch_size)):
                with torch.no_grad():
                    x = to_unit(patches[part].to(device), patches.pixel_range)
                    found = module(x).argmax(dim=1).cpu().numpy()
                counts += _confusion(truth[part][:, 0].numpy(), found, n_classes)
            history[-1]["validation_dice"] = _mean_dice(counts)
            module.offer(history[-1]["validation_dice"])

        return score

    # ---- prediction ------------------------------------------------------------------------------

    def predict(self, X, *, out=None):
        """Label the pixels of whole images of any size.

        Parameters
        ----------
        X : as for ``fit``
            The images; of a fitted `image_shape` only that size.
        out : ndarray of shape (height, width), or sequence of them, one per image; default=None
            Where the labels go, such as memory maps, and what is given back.

        Returns
        -------
        ndarray of shape (n_samples, height, width), or list of ndarray of shape (height, width)
            Labels out of ``classes_``. A list for a list or a folder, an array for an array, (n,
            height * width) for a 2-D `X`, and (n,) if its images have one pixel.

        Notes
        -----
        Memory beside images and labels is that of one strip of tiles. Of slides, whole-slide files
        and large TIFF files no more than some strips are read at once; other files are decoded as a
        whole. The labels have the type of ``classes_``: without `classes` that of the masks, so
        that masks of bytes give bytes.
        """
        check_is_fitted(self, "module_")
        images = self._read(X, reset=False)
        if out is None:
            tables = [np.empty(images.size(row), self.classes_.dtype) for row in range(len(images))]
        else:
            tables = self._checked_out(out, images)
        for row, part, found in self._strips(images):
            tables[row][part] = self.classes_[found.argmax(dim=0).numpy()]
        return self._as_given(tables, X, images) if out is None else out

    def predict_proba(self, X):
        """Give the probabilities of all classes for the pixels of whole images of any size.

        Parameters
        ----------
        X : as for :meth:`predict`

        Returns
        -------
        ndarray of shape (n_samples, height, width, n_classes), or list of ndarray
            As for :meth:`predict`, with one more axis, in the order of ``classes_``; float32.
        """
        check_is_fitted(self, "module_")
        images = self._read(X, reset=False)
        sizes = [(*images.size(row), len(self.classes_)) for row in range(len(images))]
        out = [np.empty(size, np.float32) for size in sizes]
        for row, part, found in self._strips(images):
            out[row][part] = found.permute(1, 2, 0).numpy()
        return self._as_given(out, X, images)

    def score(self, X, y):
        """Mean Dice over images and foreground classes.

        Parameters
        ----------
        X : as for :meth:`predict`
        y : as `masks` of ``fit``
            The masks, under the name by which scikit-learn's scorers know them.

        Returns
        -------
        float
            ``2 |A n B| / (|A| + |B|)`` per class, without the first one, the background; mean over
            the classes that an image has, or was predicted to have, then over the images that have
            any. 1 if none has. Pixels of `ignore_label` do not count.
        """
        check_is_fitted(self, "module_")
        self._require(y, "masks")
        images = self._read(X, reset=False)
        targets = self._encode(read_masks(y, images), reset=False)
        n_classes = len(self.classes_)
        counts = np.zeros((len(images), n_classes, n_classes))
        for row, part, found in self._strips(images):
            labels = found.argmax(dim=0).numpy()
            counts[row] += _confusion(targets[row][part], labels, n_classes)
        scores = [_mean_dice(table, empty=np.nan) for table in counts]
        return float(np.nanmean(scores)) if not np.isnan(scores).all() else 1.0

    def _strips(self, images):
        device = self._device()
        module = self.module_.to(device).eval()
        tile = self.patch_shape_
        stride = tuple(max(1, round(side * (1 - self.overlap))) for side in tile)

        def predict(x):
            with torch.no_grad():
                return module(x.to(device)).float().softmax(dim=1).cpu()

        # One batch size, the library's, whatever the caller's: a tile's bits do not depend on it.
        batch_size = 8 if device.type == "cpu" else 32
        with reduced_precision(module, self.precision, device):
            yield from predict_strips(
                images,
                predict,
                tile=tile,
                stride=stride,
                window=self.window,
                batch_size=batch_size,
                verbose=self.verbose,
            )

    def _checked_out(self, out, images):
        tables = [out] if getattr(out, "ndim", 0) == 2 else list(out)
        found = [table.shape for table in tables]
        sizes = [images.size(row) for row in range(len(images))]
        if found != sizes:
            raise ValueError(f"out has the shapes {found}, but the images of X are {sizes}.")
        for table in tables:
            if not np.array_equal(self.classes_.astype(table.dtype), self.classes_):
                raise ValueError(
                    f"out has dtype {table.dtype}, which does not hold all of the labels "
                    f"{self.classes_.tolist()}."
                )
        return tables

    def _as_given(self, out, X, images):
        if self.image_shape is not None and images.layout == "flat":
            flat = np.stack([values.reshape(-1, *values.shape[2:]) for values in out])
            return flat[:, 0] if self._one_label else flat
        return np.stack(out) if hasattr(X, "shape") and len(X.shape) > 1 else out

    # ---- input -----------------------------------------------------------------------------------

    def _encode(self, masks, *, reset=True):
        """Masks as bytes: the position of a label in ``classes_``, and `IGNORED`."""
        if reset:
            self._one_label = self.image_shape_[:2] == (1, 1)
            found = self.classes
            if found is None:
                found = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
            found = np.ravel(found)
            self.classes_ = found[found != self.ignore_label]
            named = self.classes_.tolist()
            if len(set(named)) < len(named):
                raise ValueError(f"classes={named} names a class twice.")
            if len(named) < 2:
                raise ValueError(
                    f"The masks hold no more than one class, {named}: at least two are needed, as "
                    "object and background. Name all that masks may hold with classes=."
                )
            if self.classes is None and _USUAL_CLASSES < len(named) < IGNORED:
                warn(
                    f"The masks hold {len(named)} labels, {some(named)}, and each is learned as a "
                    "class. If these are numbers of objects, give masks > 0; if they are classes, "
                    "name them with classes=."
                )
            if len(named) >= IGNORED:
                raise ValueError(
                    f"The masks hold {len(named)} classes, {named[:5]} and more, but {IGNORED - 1} "
                    "are possible at most. If these are numbers of objects, give masks > 0."
                )
        order = np.argsort(self.classes_)
        known, out = self.classes_[order], []
        for row, mask in enumerate(masks):
            code = np.empty(mask.shape, np.uint8)
            for rows in strips(mask.shape):  # indices take eight bytes a pixel
                part = mask[rows]
                position = np.searchsorted(known, part).clip(max=len(known) - 1)
                ignored = np.zeros(part.shape, bool)
                if self.ignore_label is not None:
                    ignored = part == self.ignore_label
                unknown = (known[position] != part) & ~ignored
                if unknown.any():
                    raise ValueError(
                        f"The mask in row {row} holds the label {part[unknown][0]}, which is not "
                        f"among the classes {known.tolist()}: name it in classes=, or as "
                        "ignore_label."
                    )
                code[rows] = np.where(ignored, IGNORED, order[position])
            out.append(code)
        return out

    def _pairs(self, images, targets, numbers, stride):
        patches = PatchRows(images, numbers, self.patch_shape_, stride)
        return patches, PatchRows(targets, numbers, self.patch_shape_, stride)

    def _with_head(self, denoiser):
        return SegmentationNetwork(denoiser, len(self.classes_))


def _confusion(truth, found, n_classes):
    """Count pixels by true and predicted class, (K, K)."""
    labelled = truth != IGNORED
    pairs = truth[labelled].astype(np.int64) * n_classes + found[labelled]
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def _mean_dice(counts, empty=1.0):
    """Mean Dice of the classes after the first one; `empty` if there are none to be seen."""
    both = np.diag(counts)[1:]
    either = (counts.sum(axis=0) + counts.sum(axis=1))[1:]
    seen = either > 0
    return float((2 * both[seen] / either[seen]).mean()) if seen.any() else empty
