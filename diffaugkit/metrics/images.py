"""Scores that only images have: copy detection, labels carried from frame to frame, Inception.

The protocols are DINO's (Caron et al. 2021, sections 4.2.1 and 4.2.2, tables 4 and 5), which
Gen-SIS follows in its tables 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import distance_transform_edt, zoom
from sklearn.utils import gen_batches

from diffaugkit.arrays import channel_last, guess_range, to_numpy
from diffaugkit.metrics.checks import check_temperature, unit_rows

# ------------------------------------------------------------------ copy detection


def copy_detection_features(
    cls_tokens: ArrayLike, patch_tokens: ArrayLike, p: float = 4, *, whitening: Any = None
) -> np.ndarray:
    r"""Describe images for copy detection: CLS token beside GeM-pooled patch tokens.

    Generalised mean pooling (Radenovic et al. 2018) is, per feature,

    .. math:: \left( \frac{1}{L} \sum_i \max(x_i, 10^{-6})^p \right)^{1/p}

    over the L patch tokens. The descriptor is L2-normalised.

    Parameters
    ----------
    cls_tokens : array-like or tensor of shape (n_samples, n_features)
        CLS tokens of the last layer.
    patch_tokens : array-like or tensor of shape (n_samples, n_patches, n_features)
        Patch tokens of the last layer, or (n_samples, h, w, n_features).
    p : float > 0, default=4
        1 is the mean of the positive parts, large values the maximum. DINO takes 4.
    whitening : fitted transformer or None, default=None
        Applied to the normalised descriptors, which are normalised again: a
        ``PCA(whiten=True)`` that was fitted on descriptors of *other* images, as DINO does.

    Returns
    -------
    ndarray of shape (n_samples, 2 * n_features), or as `whitening` gives
        Compare by cosine similarity: :func:`retrieval_map` with the database as `features` and
        the distorted images as `query_features` gives mAP, with ``average="micro"`` micro-AP.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or `p` is not positive.

    Examples
    --------
    >>> from diffaugkit.metrics import copy_detection_features
    >>> copy_detection_features([[3.0]], [[[4.0], [4.0]]]).round(6)
    array([[0.6, 0.8]])
    """
    if not isinstance(p, Real) or not (math.isfinite(p) and p > 0):
        raise ValueError(f"p must be a finite number > 0, got {p!r}.")
    cls, patches = _floats(cls_tokens), _floats(patch_tokens)
    if patches.ndim == 4:
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
    if cls.ndim != 2 or patches.ndim != 3 or len(cls) != len(patches) or not patches.shape[1]:
        raise ValueError(
            "cls_tokens must be of shape (n, d) and patch_tokens of shape (n, patches, d), got "
            f"{cls.shape} and {patches.shape}."
        )
    if not (np.isfinite(cls).all() and np.isfinite(patches).all()):
        raise ValueError("cls_tokens and patch_tokens must be finite.")
    patches = np.maximum(patches, 1e-6)
    # Less the largest, or high powers of large features overflow.
    top = patches.max(axis=1, keepdims=True)
    pooled = top[:, 0] * np.mean((patches / top) ** p, axis=1) ** (1.0 / p)
    features = unit_rows(np.concatenate([cls, pooled], axis=1))
    if whitening is None:
        return features
    return unit_rows(np.asarray(to_numpy(whitening.transform(features))))


# ------------------------------------------------------------------ video


def propagate_labels(
    tokens_per_frame: Sequence[ArrayLike],
    first_mask: ArrayLike,
    n_context: int = 7,
    topk: int = 5,
    radius: int | None = 12,
    temperature: float = 0.1,
) -> np.ndarray:
    r"""Carry the labels of a first frame through a video by the similarity of patch tokens.

    Each token of a frame takes the mean label of its `topk` most similar tokens among the first
    frame and the `n_context` frames before it, with weights :math:`\exp(s / \tau)`, s the cosine
    similarity. Labels stay soft between frames. At the end each class's map is enlarged
    bilinearly to the size of the mask and scaled to [0, 1], and the largest wins. Nothing is
    trained (DINO's DAVIS-2017 protocol, after Jabri et al. 2020).

    Parameters
    ----------
    tokens_per_frame : sequence of array-like or tensor of shape (h, w, n_features)
        Patch tokens of every frame, in their place in the image; an array (frames, h, w,
        n_features) will do.
    first_mask : int array-like of shape (H, W)
        Labels of the first frame, of any size: a token gets the label at the centre of its patch.
    n_context : int >= 0, default=7
        Previous frames besides the first.
    topk : int >= 1, default=5
        Tokens that vote.
    radius : int >= 0 or None, default=12
        A token only looks at those at most so many rows and columns away. None: everywhere.
    temperature : float > 0, default=0.1
        :math:`\tau`.

    Returns
    -------
    ndarray of shape (frames, H, W)
        Labels of the kind of `first_mask`, which is the first frame. Score the others by
        :func:`jaccard_j` and :func:`boundary_f`.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or a parameter is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.metrics import propagate_labels
    >>> left, right = np.eye(2)
    >>> frames = [[[left, right, right]], [[left, left, right]]]
    >>> propagate_labels(frames, [[1, 0, 0]], topk=1)[1]
    array([[1, 1, 0]])
    """
    for name, value, least in (("n_context", n_context, 0), ("topk", topk, 1)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")
    if radius is not None and (not isinstance(radius, Integral) or radius < 0):
        raise ValueError(f"radius must be an int >= 0 or None, got {radius!r}.")
    check_temperature(temperature)
    frames = [_unit_tokens(tokens, i) for i, tokens in enumerate(tokens_per_frame)]
    if len({tokens.shape for tokens in frames}) != 1:
        raise ValueError(
            "tokens_per_frame must hold at least one frame, all of one shape, got "
            f"{sorted({tokens.shape for tokens in frames})}."
        )
    first_mask = np.asarray(to_numpy(first_mask))
    if first_mask.ndim != 2 or first_mask.dtype.kind not in "biu":
        raise ValueError(
            f"first_mask must be an int array (H, W), got {first_mask.dtype} of shape "
            f"{first_mask.shape}."
        )
    classes, codes = np.unique(first_mask, return_inverse=True)
    codes = codes.reshape(first_mask.shape)
    h, w = frames[0].shape[:2]
    centre = [((np.arange(n) + 0.5) * size / n).astype(int)
              for n, size in zip((h, w), codes.shape, strict=True)]  # fmt: skip
    soft = [np.eye(len(classes))[codes[np.ix_(*centre)]]]  # (h, w, classes) for each frame
    masks = [first_mask]
    for i in range(1, len(frames)):
        context = [0, *range(max(1, i - n_context), i)]
        sources = np.stack([frames[j] for j in context])
        labels = np.stack([soft[j] for j in context])
        soft.append(_carry(frames[i], sources, labels, topk, radius, temperature))
        masks.append(classes[_enlarge(soft[i], codes.shape).argmax(axis=-1)])
        # Frames that no later one looks at need not be kept.
        if i - n_context >= 1:
            frames[i - n_context] = soft[i - n_context] = None
    return np.stack(masks)


def jaccard_j(y_true: ArrayLike, y_pred: ArrayLike, *, average: bool = True) -> float | np.ndarray:
    """Region similarity J of DAVIS: intersection over union of each object in each frame.

    Parameters
    ----------
    y_true : bool or int array-like of shape (H, W) or (frames, H, W)
        Masks, 0 for the background, else the number of the object.
    y_pred : array-like of the same shape
        Predicted masks, with the numbers of `y_true`.
    average : bool, default=True
        Whether to return the mean over objects and frames. DAVIS leaves out the first frame,
        which was given, and the last: ``jaccard_j(y_true[1:-1], y_pred[1:-1])``.

    Returns
    -------
    j : float in [0, 1], or ndarray of shape (n_objects, n_frames)
        1 where an object is in neither mask of a frame. Objects are those of `y_true`, sorted.

    Raises
    ------
    ValueError
        If shapes disagree, or `y_true` has no object.

    Examples
    --------
    >>> from diffaugkit.metrics import jaccard_j
    >>> jaccard_j([[1, 1, 0, 0]], [[0, 1, 1, 0]])
    0.3333333333333333
    """

    def score(true, predicted):
        union = np.count_nonzero(true | predicted)
        return np.count_nonzero(true & predicted) / union if union else 1.0

    return _per_object(score, y_true, y_pred, average)


def boundary_f(
    y_true: ArrayLike, y_pred: ArrayLike, *, tolerance: float = 0.008, average: bool = True
) -> float | np.ndarray:
    """Contour accuracy F of DAVIS: F-measure of the boundary pixels, within a tolerance.

    Precision is the share of predicted boundary pixels that lie near a true one, recall the share
    of true ones near a predicted one, F their harmonic mean. A pixel is on the boundary if the
    pixel to its right, below it, or below to the right is on the other side.

    Parameters
    ----------
    y_true : bool or int array-like of shape (H, W) or (frames, H, W)
        Masks, 0 for the background, else the number of the object.
    y_pred : array-like of the same shape
        Predicted masks, with the numbers of `y_true`.
    tolerance : float, default=0.008
        Below 1 the share of the image's diagonal, rounded up to pixels; from 1 on pixels.
    average : bool, default=True
        As for :func:`jaccard_j`.

    Returns
    -------
    f : float in [0, 1], or ndarray of shape (n_objects, n_frames)
        1 where neither mask has a boundary, 0 where only one has.

    Raises
    ------
    ValueError
        If shapes disagree, `y_true` has no object, or `tolerance` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.metrics import boundary_f
    >>> mask = np.zeros((20, 20), dtype=bool)
    >>> mask[5:15, 5:15] = True
    >>> boundary_f(mask, np.roll(mask, 1, axis=1))
    1.0
    >>> round(boundary_f(mask, np.roll(mask, 4, axis=1)), 2)
    0.45
    """
    if not isinstance(tolerance, Real) or not tolerance >= 0:
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}.")

    def score(true, predicted):
        reach = tolerance
        if tolerance < 1:
            reach = math.ceil(tolerance * math.hypot(*true.shape))
        true, predicted = _boundary(true), _boundary(predicted)
        if not true.any() or not predicted.any():
            return float(true.any() == predicted.any())
        # The distance of each pixel to the nearest one of the other boundary.
        precision = np.mean(distance_transform_edt(~true)[predicted] <= reach)
        recall = np.mean(distance_transform_edt(~predicted)[true] <= reach)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    return _per_object(score, y_true, y_pred, average)


# ------------------------------------------------------------------ Inception


def inception_extractor(
    path: str | Path,
    *,
    pixel_range: tuple[float, float] | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> Any:
    """Features of torchvision's Inception v3 before its classifier (pool3), from a local file.

    Nothing is downloaded. Images are scaled to [-1, 1], as the network was trained, and resized
    to 299 x 299 bilinearly with antialiasing. Inception knows photographs: for tissue, X-rays or
    cells an encoder of the domain sees more.

    Parameters
    ----------
    path : str or Path
        State dict of ``torchvision.models.inception_v3``: a `.safetensors` file, or a `.pth` file
        that is read with ``weights_only=True``, so that nothing in it is executed.
    pixel_range : (low, high) or None, default=None
        Values of black and white. None: (0, 255) for uint8; for floats (0, 1) if all values of a
        call lie in it, else (-1, 1).
    batch_size : int, default=64
        Images per pass.
    device : str, default="auto"
        Where torch computes; "auto" takes CUDA where there is one.

    Returns
    -------
    extractor : object with ``transform(images) -> ndarray of shape (n, 2048)``, also callable
        Pass it as `extractor=`. Images are channel-last arrays, channel-first tensors or arrays,
        greyscale (n, h, w), or lists of PIL images.

    Raises
    ------
    ImportError
        Without torchvision: ``pip install "diffaugkit[images]"``.
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file holds another network, or floats lie outside [-1, 1] and no `pixel_range` is
        given.

    Notes
    -----
    Published FID values come from another file (TensorFlow's 2015 network, 1 008 classes, with
    other poolings) and other resizing. Values compare only within one extractor, one number of
    images and one way to resize.

    Examples
    --------
    >>> from diffaugkit.metrics import frechet_distance, inception_extractor
    >>> extractor = inception_extractor("inception_v3.pth")  # doctest: +SKIP
    >>> frechet_distance(images, generated, extractor=extractor)  # doctest: +SKIP
    """
    return _Inception(_load_inception(Path(path)), pixel_range, batch_size, device)


class _Inception:
    """Resizes, scales and embeds images; see :func:`inception_extractor`."""

    def __init__(self, network, pixel_range, batch_size, device):
        import torch

        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        self.network = network.to(self.device)
        self.pixel_range, self.batch_size = pixel_range, batch_size

    def transform(self, images):
        """Return (n, 2048) float32 features."""
        import torch
        from torch.nn.functional import interpolate

        images = channel_last(images)
        if images.shape[-1] not in (1, 3):
            raise ValueError(f"Inception takes 1 or 3 channels, got {images.shape[-1]}.")
        low, high = self.pixel_range or guess_range(images)
        if self.pixel_range is None and (low, high) not in ((0, 255), (0, 1), (-1, 1)):
            raise ValueError(
                f"images have values from {low:.4g} to {high:.4g}; give inception_extractor the "
                "pixel_range=(black, white) that they are in."
            )
        features = []
        with torch.no_grad():
            for rows in gen_batches(len(images), self.batch_size):
                x = torch.from_numpy(np.ascontiguousarray(images[rows])).to(self.device).float()
                x = ((x - low) / (high - low) * 2 - 1).permute(0, 3, 1, 2)
                x = interpolate(x, (299, 299), mode="bilinear", antialias=True)
                features.append(self.network(x.expand(-1, 3, -1, -1)).cpu())
        return torch.cat(features).numpy()

    __call__ = transform


# ------------------------------------------------------------------ helpers


def _floats(X):
    """Return X as an array of float32, if it is of that precision, or float64."""
    X = np.asarray(to_numpy(X))
    return X if X.dtype == np.float32 else X.astype(np.float64)


def _unit_tokens(tokens, number):
    tokens = _floats(tokens)
    if tokens.ndim != 3 or not np.isfinite(tokens).all():
        raise ValueError(
            f"frame {number} must be finite and of shape (h, w, n_features), got {tokens.shape}."
        )
    return unit_rows(tokens.reshape(-1, tokens.shape[-1])).reshape(tokens.shape)


def _carry(tokens, sources, labels, topk, radius, temperature):
    """Return the soft labels of one frame, row of tokens by row of tokens."""
    h, w, d = tokens.shape
    far = np.abs(np.arange(w)[:, None] - np.arange(w)) > (w if radius is None else radius)
    out = np.empty((h, w, labels.shape[-1]))
    for row in range(h):
        low, high = (0, h) if radius is None else (max(0, row - radius), row + radius + 1)
        near = sources[:, low:high]
        similarity = (tokens[row] @ near.reshape(-1, d).T).astype(np.float64)
        similarity = similarity.reshape(w, -1, w)
        similarity = np.where(far[:, None], -np.inf, similarity).reshape(w, -1)
        k = min(topk, similarity.shape[1])
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        similarity = np.take_along_axis(similarity, nearest, axis=1)
        weight = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature)
        weight /= weight.sum(axis=1, keepdims=True)
        votes = labels[:, low:high].reshape(-1, labels.shape[-1])[nearest]
        out[row] = np.einsum("tk,tkc->tc", weight, votes)
    return out


def _enlarge(soft, shape):
    """Return soft labels at the size of the mask, each class scaled to [0, 1]."""
    factors = [size / n for size, n in zip(shape, soft.shape, strict=False)]
    if factors != [1.0, 1.0]:
        soft = zoom(soft, (*factors, 1), order=1, mode="nearest", grid_mode=True)
    low, high = soft.min(axis=(0, 1)), soft.max(axis=(0, 1))
    # A class of the same value everywhere is left as it is.
    return np.where(high > low, (soft - low) / np.where(high > low, high - low, 1.0), soft)


def _per_object(score, y_true, y_pred, average):
    """Return the score of each object in each frame, or the mean of all."""
    true, predicted = np.asarray(to_numpy(y_true)), np.asarray(to_numpy(y_pred))
    if true.shape != predicted.shape or true.ndim not in (2, 3):
        raise ValueError(
            f"y_true and y_pred must both be of shape (H, W) or (frames, H, W), got {true.shape} "
            f"and {predicted.shape}."
        )
    if "f" in true.dtype.kind + predicted.dtype.kind:
        raise ValueError("y_true and y_pred must hold bool or int labels; threshold them first.")
    true, predicted = (mask.reshape(-1, *mask.shape[-2:]) for mask in (true, predicted))
    objects = [label for label in np.unique(true) if label]
    if not objects:
        raise ValueError("y_true has no object: all its labels are 0.")
    values = np.array(
        [
            [score(t == label, p == label) for t, p in zip(true, predicted, strict=True)]
            for label in objects
        ]
    )
    return float(values.mean()) if average else values


def _boundary(mask):
    """Return the pixels whose right, lower or lower right neighbour is on the other side."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, corner = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != corner)


def _load_inception(path):
    try:
        from torchvision.models import inception_v3
    except ImportError as error:
        raise ImportError(
            'inception_extractor needs torchvision: pip install "diffaugkit[images]"'
        ) from error
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a local state dict.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # The classifiers are not needed, and differ between files.
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "AuxLogits."))}
    # Without memory there are no weights to draw, which would move torch's global stream.
    with torch.device("meta"):
        network = inception_v3(
            weights=None, aux_logits=False, init_weights=False, transform_input=False
        )
    network.fc = torch.nn.Identity()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a state dict of torchvision's inception_v3: {str(error)[:300]}"
        ) from error
    return network.float().eval().requires_grad_(False)
