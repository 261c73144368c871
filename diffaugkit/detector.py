"""Detection from generative pre-training: a U-Net that learned to denoise learns to find objects.

GenSelfDiff-HIS (Purma et al., section V-C): the pre-training of the segmenter, then a box head in
place of the last layer:

======================  ===========================================================================
paper                   here
======================  ===========================================================================
pre-training            phase one of :class:`~diffaugkit.DiffusionSegmenter`, the same code
boxes from masks        ``boxes_from_masks``
layers on the U-Net     two convolutions and a last layer per branch (``DetectionNetwork``)
loss of YOLO-V1         loss of FCOS (``detection_loss``): see the notes of the class
mIoU (table XV)         ``metrics.mean_box_iou``
======================  ===========================================================================
"""

import math
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from diffaugkit.arrays import warn
from diffaugkit.base import Interval, StrOptions, _fit_context, all_or_nothing
from diffaugkit.detection_boxes import move_boxes, patch_targets, read_boxes
from diffaugkit.detection_head import (
    DetectionNetwork,
    StripBoxes,
    candidates,
    detection_loss,
    pixel_maps,
    places_of,
)
from diffaugkit.image_rows import to_unit
from diffaugkit.metrics.detection import box_average_precision
from diffaugkit.pretrained_unet import PretrainedUNet
from diffaugkit.runtime import reduced_precision
from diffaugkit.segmentation_data import PatchRows, vary_pairs
from diffaugkit.segmentation_tiles import predict_strips
from diffaugkit.training import KeepBest

__all__ = ["DiffusionDetector"]

# Fewest places along the side of the median object, and pixels between them at most.
_PLACES, _MOST_STRIDE = 3, 16
# Share of the boxes that may lie between places, such as slivers at the border of an image.
_MOST_MISSED = 0.1
# Score from which a box counts in validation and `score`: average precision wants weak ones, too.
_LEAST_SCORED = 0.05
# COCO's: at 0.5 alone the epochs of few held-out boxes are often equal.
_IOU_STEPS = tuple(np.linspace(0.5, 0.95, 10))
# Of the group norm in torchvision's heads.
_GROUPS = 32


class DiffusionDetector(PretrainedUNet):
    """Find objects as boxes with a U-Net that was pre-trained, without boxes, by denoising.

    Parameters
    ----------
    diffusion, pretext, loss_weighting, n_timesteps, denoiser, block_out_channels
        The pre-training and the network, as for :class:`~diffaugkit.DiffusionSegmenter`;
        ``diffusion=None`` trains from scratch.
    patch_size : int, tuple of (int, int) or "auto", default="auto"
        Height and width of the patches of both phases and of the tiles of prediction. "auto" is the
        smallest training image, at most 128. Objects must be smaller than a patch, better than half
        of one.
    stride : int, tuple of (int, int) or "auto", default="auto"
        Distance of training patches; "auto" is half a patch.
    head_width : int, default=64
        Channels of the box head, a multiple of 32.
    head_stride : int or "auto", default="auto"
        Distance of the places that predict a box, in pixels. "auto" is the power of two, at most
        16, that puts three to six of them along the side of the median training box.
    augment : bool, str or dict, default=True
        True flips patches with their boxes, and jitters and blurs their colours, as in the paper.
        ``"natural"``, ``"greyscale"``, ``"tissue"`` (quarter turns of square patches, jitter of the
        stain), ``"auto"`` or a dict give the flips, turns and colours of a recipe, but no crops:
        values as of `augmentation` of :class:`~diffaugkit.SelfSupervisedEncoder`.
    classes : array-like or None, default=None
        Labels that boxes may have. None takes those found. Give it where a training set may lack a
        class.
    validation_fraction : float or "auto", default="auto"
        Share of the images, or of the `groups`, by whose average precision, mean over IoU 0.5 to
        0.95, the best epoch is chosen; with 0, or where these show no object, the last epoch is
        kept. "auto" is a tenth, or 0 where that is fewer than three.
    overlap : float, default=0.25
        Prediction: share of a tile that the next one covers again. Objects are seen whole in some
        tile if they are smaller than that share.
    score_threshold : float, default=0.2
        Prediction: boxes of a lower score are dropped, torchvision's default. Low, for the sake of
        average precision: for counting take what a validation set says.
    nms_threshold : float, default=0.5
        Prediction: of two boxes of one class whose IoU is above it the one of the lower score is
        dropped as a duplicate.
    image_shape : tuple of (int, int, int) or None, default=None
        Height, width and channels of the images in the rows of a 2-D `X`; one entry may be -1.
    pretrain_epochs, max_epochs, batch_size, learning_rate
        As for :class:`~diffaugkit.DiffusionSegmenter`.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters, handed to a `diffusion` that is fitted here; see
        :class:`~diffaugkit.base.TorchEstimator`. Each phase keeps its checkpoints in a folder of
        its own.

    Attributes
    ----------
    module_ : DetectionNetwork
    classes_ : ndarray of shape (n_classes,)
        Labels, sorted, or in the order of `classes`; [1] for boxes without labels.
    head_stride_ : int
    diffusion_ : estimator or None
        The fitted `diffusion`, where one was given.
    patch_shape_ : tuple of (int, int)
        Height and width of patches.
    image_shape_ : tuple of (int, int, int)
        Height, width and channels of the first training image.
    history_ : DataFrame
        One row per epoch: phase ("pretraining" or "finetuning"), epoch, loss and its parts,
        learning_rate, and validation_ap where images were held out.
    n_iter_ : int
        Epochs of both phases.
    n_features_in_ : int
        Values of the first training image.

    See Also
    --------
    DiffusionSegmenter : Masks instead of boxes, from the same pre-training.
    boxes_from_masks : Makes boxes of masks.

    Notes
    -----
    The paper's head, convolutions followed by fully connected layers with YOLO's loss, is tied to
    one size of image and to a fixed number of objects per cell of a coarse grid, which dozens of
    touching nuclei exceed. Here the head is that of FCOS (Tian et al. 2019), the form that this
    family has since taken: fully convolutional, one box per place, the places as dense as the
    objects are small. Its last layer is YOLO's fully connected one, shared by all places.

    Whole images are predicted from overlapping tiles, whose scores and box sides blend as the
    segmenter's probabilities do; duplicates are dropped strip by strip.

    References
    ----------
    Purma et al., GenSelfDiff-HIS, section V-C. Tian et al. 2019, FCOS. Redmon et al. 2016, YOLO.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.detector import DiffusionDetector
    >>> X = np.random.default_rng(0).integers(0, 90, (12, 16, 16), dtype=np.uint8)
    >>> X[:, 4:12, 3:11] += 120
    >>> boxes = [[[3, 4, 11, 12]]] * 12
    >>> detector = DiffusionDetector(
    ...     pretrain_epochs=1, max_epochs=20, block_out_channels=(8, 8), head_width=32,
    ...     learning_rate=5e-3, random_state=0,
    ... ).fit(X[:10], boxes[:10])
    >>> found = detector.predict(X[10:])
    >>> len(found), found[0]["boxes"].shape[1], detector.score(X[10:], boxes[10:]) > 0.8
    (2, 4, True)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **PretrainedUNet._parameter_constraints,
        "head_width": [Interval(Integral, 32, None, closed="left")],
        "head_stride": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "score_threshold": [Interval(Real, 0, 1, closed="left")],
        "nms_threshold": [Interval(Real, 0, 1, closed="both")],
    }
    _extra_state = ("_pixel_range", "_layout")
    # What passes `boxes` on does so by position: it is no metadata to ask for.
    __metadata_request__fit = {"boxes": UNUSED}  # noqa: RUF012

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
        head_width=64,
        head_stride="auto",
        augment=True,
        classes=None,
        validation_fraction="auto",
        overlap=0.25,
        score_threshold=0.2,
        nms_threshold=0.5,
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
        self.head_width = head_width
        self.head_stride = head_stride
        self.augment = augment
        self.classes = classes
        self.validation_fraction = validation_fraction
        self.overlap = overlap
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
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
    def fit(self, X, boxes, *, unlabeled=None, groups=None):
        """Pre-train the U-Net on images alone, and fine-tune it on images with boxes.

        Parameters
        ----------
        X : array-like, list, path or Rows
            Images: an array of three or four dimensions, a list of arrays, pictures, paths or
            :class:`~diffaugkit.slides.Slide`, which may differ in size, a folder, or a 2-D array
            with `image_shape`. Of slides and whole-slide files the finest level counts.
        boxes : sequence of array-like of shape (n, 4), or of dicts
            Boxes of each image, (x_min, y_min, x_max, y_max) in pixels from its upper left corner,
            maxima exclusive; empty where there is no object. With labels as a dict of "boxes" and
            "labels", as ``boxes_from_masks`` and :meth:`predict` give them.
        unlabeled : as `X`, or None, default=None
            Images of the first phase; None takes `X` without its boxes.
        groups : array-like of shape (n_samples,) or None, default=None
            Patient or slide of each image: images of a group are all held out, or none.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that is no images, boxes that stick out of their images or have no area, or no
            box at all.
        TypeError
            If `diffusion` has no U-Net to start from.

        Warns
        -----
        UserWarning
            If more than a tenth of the boxes are too small for `head_stride_`.
        """
        if self.head_width % _GROUPS:
            raise ValueError(f"head_width={self.head_width} must be a multiple of {_GROUPS}.")
        images = self._read_labelled(X, boxes, "boxes")
        truth = read_boxes(boxes, images)
        codes = self._encode(truth)
        pool = self._read_pool(unlabeled, images)
        seed = self._seed()
        shown = [row for row, image in enumerate(truth) if len(image["boxes"])]
        train, held = self._split(len(images), groups, seed, shown)
        self.head_stride_ = self._make_head_stride(truth)
        return self._fit_phases(pool, images, (truth, codes), train, held, seed)

    def _finetune(self, network, images, targets, train, held, seed):
        """Phase two: the U-Net at t = 0 on images with boxes, best epoch on those held out."""
        truth, codes = targets
        pixel_range, recipe = images.common_range(), self._recipe()
        patches = PatchRows(images, train, self.patch_shape_, self._strides())
        of_patches = patch_targets([image["boxes"] for image in truth], codes, patches, images)
        batches = self._batches(patches, of_patches, seed=self._child_seed(seed, 3))
        size, s = self.patch_shape_, self.head_stride_
        device = self._device()
        places = places_of(size, s, device)
        numbers = torch.arange(math.prod(size), device=device).reshape(1, 1, *size)
        module, validation, known = network, None, []
        if held is not None:
            module = KeepBest(network)
            picked = images.take(held)
            validation = self._validation(module, picked, [truth[number] for number in held])
            sources = (images.read, lambda k: truth[k]["boxes"], codes.__getitem__)
            # Read where a checkpoint asks for them: a tenth of large files fills the memory.
            known = (read(k) for read in sources for k in held)

        def loss(x, target):
            x, boxes = to_unit(x, pixel_range), target[..., :4]
            if self.augment:
                x, moved = vary_pairs(x, numbers.expand(len(x), -1, -1, -1), recipe)
                boxes = move_boxes(boxes, moved, size)
            return detection_loss(module(x), places, boxes, target[..., 4], s)

        return self._train_with_labels(module, loss, batches, validation, seed, known)

    def _validation(self, module, images, truth):
        """Make the callback that scores epochs on held-out images and keeps the best weights."""
        # Lower than predictions need it, so that early epochs, whose scores are low, can be told
        # apart.
        least = min(self.score_threshold, _LEAST_SCORED)

        def score(epoch, history):
            found = self._named(self._find(module.eval(), images, least))
            precision = box_average_precision(truth, found, iou_threshold=_IOU_STEPS)
            history[-1]["validation_ap"] = precision
            module.offer(precision)

        return score

    # ---- prediction ------------------------------------------------------------------------------

    def predict(self, X):
        """Find the objects in whole images of any size.

        Parameters
        ----------
        X : as for ``fit``
            The images; of a fitted `image_shape` only that size.

        Returns
        -------
        list of dict
            For each image "boxes", float32 of shape (n, 4), "labels" of shape (n,), out of
            ``classes_``, and "scores", float32 of shape (n,) in [0, 1], highest first. Of an image
            without objects n is 0.

        Notes
        -----
        Memory beside images and boxes is that of one strip of tiles. Of slides, whole-slide files
        and large TIFF files no more than some strips are read at once; other files are decoded as a
        whole.
        """
        check_is_fitted(self, "module_")
        return self._predict(self._read(X, reset=False), self.score_threshold)

    def score(self, X, y):
        """Average precision at IoU 0.5, mean over the classes of `y`.

        Of boxes with a score from 0.05, whatever the `score_threshold` above it. Not the paper's
        mean IoU, which depends on the score from which a box counts; for that see
        :func:`~diffaugkit.metrics.mean_box_iou`.

        Parameters
        ----------
        X : as for :meth:`predict`
        y : as `boxes` of ``fit``
            The boxes, under the name by which scikit-learn's scorers know them.

        Returns
        -------
        float
            See :func:`~diffaugkit.metrics.box_average_precision`.
        """
        check_is_fitted(self, "module_")
        self._require(y, "boxes")
        images = self._read(X, reset=False)
        least = min(self.score_threshold, _LEAST_SCORED)
        return box_average_precision(read_boxes(y, images), self._predict(images, least))

    def _predict(self, images, least):
        module = self.module_.to(self._device()).eval()
        with reduced_precision(module, self.precision, self._device()):
            return self._named(self._find(module, images, least, self.verbose))

    def _find(self, module, images, least, verbose=0):
        """Boxes (n, 4), scores (n,) and class codes (n,) of each image, as one tensor (n, 6)."""
        device, tile, s = self._device(), self.patch_shape_, self.head_stride_
        # Whole places apart, where that can be: those of two tiles then coincide, and what they
        # say of a pixel is of the same object.
        apart = [round(side * (1 - self.overlap)) for side in tile]
        stride = tuple(max(1, side // s * s or side) for side in apart)

        def predict(x):
            with torch.no_grad():
                return pixel_maps(module(x.to(device)).float(), tile, s).cpu()

        batch_size = 8 if device.type == "cpu" else 32
        sizes = [images.size(number) for number in range(len(images))]
        found = [StripBoxes(tile[0], self.nms_threshold) for _ in sizes]
        strips = predict_strips(
            images,
            predict,
            tile=tile,
            stride=stride,
            batch_size=batch_size,
            lattice=s if s <= min(tile) else 1,
            verbose=verbose,
        )
        for number, rows, maps in strips:
            found[number].add(rows, candidates(maps, rows, sizes[number], s, least))
        return [image.all() for image in found]

    def _named(self, found):
        out = []
        for table in found:
            table = table[table[:, 4].argsort(descending=True, stable=True)].numpy()
            labels = self.classes_[table[:, 5].astype(np.int64)]
            out.append({"boxes": table[:, :4], "labels": labels, "scores": table[:, 4]})
        return out

    # ---- input and network -----------------------------------------------------------------------

    def _encode(self, truth):
        """Learn the classes; number those of the boxes of each image."""
        labels = [image["labels"] for image in truth]
        n_boxes = sum(map(len, labels))
        if not n_boxes:
            raise ValueError("boxes are all empty: no image has an object to learn from.")
        found = np.unique(np.concatenate([part for part in labels if len(part)]))
        self.classes_ = found if self.classes is None else np.asarray(self.classes)
        if len(np.unique(self.classes_)) != len(self.classes_):
            raise ValueError(f"classes={self.classes!r} names a class twice.")
        unknown = found[~np.isin(found, self.classes_)].tolist()
        if unknown:
            raise ValueError(
                f"boxes have the label {unknown[0]!r}, which is not among the classes "
                f"{self.classes_.tolist()}: name it in classes=."
            )
        order = np.argsort(self.classes_)
        return [order[np.searchsorted(self.classes_[order], part)] for part in labels]

    def _make_head_stride(self, truth):
        boxes = np.concatenate([image["boxes"] for image in truth])
        sides = boxes[:, 2:] - boxes[:, :2]
        stride = self.head_stride
        if stride == "auto":
            side = np.median(np.sqrt(sides.prod(axis=1)))
            stride = min(_MOST_STRIDE, 2 ** max(0, math.floor(math.log2(side / _PLACES))))
        # How likely a place lies in a box, wherever it is.
        missed = 1 - np.minimum(sides / stride, 1).prod(axis=1).mean()
        if missed > _MOST_MISSED:
            warn(
                f"At head_stride={stride} about {missed:.0%} of the boxes lie between the places "
                "that predict one, and are learned as background: give a smaller head_stride."
            )
        return int(stride)

    def _with_head(self, denoiser):
        return DetectionNetwork(denoiser, len(self.classes_), self.head_width, self.head_stride_)
