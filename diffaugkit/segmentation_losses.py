r"""Losses of segmentation: structural similarity and focal loss, in log space.

GenSelfDiff-HIS (Purma et al., Eqs. 9 to 11) after Zhao et al. 2019, "Correlation Maximized
Structural Similarity Loss for Semantic Segmentation", and Lin et al. 2017, "Focal Loss":

=================  ================================================================================
``y``              one-hot truth of a pixel and class
``y_hat``          softmax probability of a pixel and class
``e``              |standardised y - standardised y_hat|, statistics per image and class (Eq. 9)
``f``              1 where e > beta e_max, e_max per image and class (Eq. 9)
=================  ================================================================================

Logarithms come from ``log_softmax``, so that no probability of zero meets one (the released code
has log(softmax), which is infinite there). Sums over a batch are means, so that a loss does not
grow with the batch or the size of its images. Pixels of `ignore_index` take part in nothing.
"""

import torch
import torch.nn.functional as F

__all__ = ["focal_loss", "segmentation_loss", "structural_similarity_loss"]

# A root has no slope at 0, the variance of a constant image.
_LEAST_VARIANCE = 1e-20
# Nor has a power below 1.
_LEAST_MISSING = 1e-12


def structural_similarity_loss(logits, target, *, beta=0.1, stability=0.01, ignore_index=None):
    r"""Structural similarity loss, the error at the pixels that correlate least (Eqs. 9 and 10).

    .. math:: L_{SS} = \frac{L_{CE}}{M} \sum_{nc} f_{nc} e_{nc}, \quad
              e = \left| \frac{y - \mu_y + C_1}{\sigma_y + C_1}
              - \frac{\hat y - \mu_{\hat y} + C_1}{\sigma_{\hat y} + C_1} \right|, \quad
              f = 1[e > \beta\, e_{max}], \quad M = \sum_{nc} f_{nc}

    Parameters
    ----------
    logits : Tensor of shape (B, K, H, W)
        Scores of K classes before the softmax.
    target : Tensor of shape (B, H, W), integer
        Class of each pixel, 0 to K - 1.
    beta : float in [0, 1], default=0.1
        Pixels with an error above this share of the largest one count as hard, as in the paper.
    stability : float, default=0.01
        C_1 of the paper.
    ignore_index : int or None, default=None
        Value of pixels without a label: they enter neither the means nor the sums.

    Returns
    -------
    scalar Tensor
        0 where no pixel has a label, or all errors vanish.

    Notes
    -----
    :math:`L_{CE}` is the mean cross-entropy of the batch, one number, as in the released code; it
    has a gradient too. The standard deviations are those of the population (there over n - 1). A
    class that an image lacks has a constant truth, whose standardised value is 1 everywhere.

    Examples
    --------
    >>> import torch
    >>> target = torch.tensor([[[0, 1], [1, 0]]])
    >>> good, bad = torch.zeros(2, 1, 2, 2, 2)
    >>> good.scatter_(1, target[:, None], 4.0).shape
    torch.Size([1, 2, 2, 2])
    >>> bool(structural_similarity_loss(good, target) < structural_similarity_loss(bad, target))
    True
    """
    log_p, truth, valid = _prepared(logits, target, ignore_index)
    p = log_p.exp()
    error = _standardised(truth, valid, stability) - _standardised(p, valid, stability)
    error = error.abs() * valid
    hard = (error > beta * error.detach().amax(dim=(2, 3), keepdim=True)) & (valid > 0)
    mean_error = (error * hard).sum() / hard.sum().clamp(min=1)
    return _cross_entropy(log_p, truth, valid) * mean_error


def focal_loss(logits, target, *, gamma=2.0, ignore_index=None):
    r"""Focal loss, cross-entropy that fades where a pixel is right already (Eq. 11).

    .. math:: L_{FL} = -\frac{1}{N} \sum_{nc} (1 - \hat y_{nc})^\gamma\, y_{nc} \log \hat y_{nc}

    with N the number of pixels that have a label.

    Parameters
    ----------
    logits, target, ignore_index
        As for :func:`structural_similarity_loss`.
    gamma : float, default=2.0
        0 is cross-entropy; the paper has 2.

    Returns
    -------
    scalar Tensor

    Examples
    --------
    >>> import torch
    >>> even = focal_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    >>> round(even.item(), 4)  # log(2) / 4
    0.1733
    """
    log_p, truth, valid = _prepared(logits, target, ignore_index)
    log_true = (log_p * truth).sum(dim=1, keepdim=True)
    if gamma:
        # 1 - y_hat without cancellation near 1; the floor keeps the slope of its power finite.
        missing = (-torch.expm1(log_true)).clamp(min=_LEAST_MISSING)
        log_true = missing.pow(gamma) * log_true
    return -(log_true * valid).sum() / valid.sum().clamp(min=1)


def segmentation_loss(logits, target, *, loss="ss_focal", focal_weight=1.0, ignore_index=None):
    """One of the losses of GenSelfDiff-HIS by name, with its parts.

    Parameters
    ----------
    logits, target, ignore_index
        As for :func:`structural_similarity_loss`.
    loss : {"ss_focal", "ss", "focal", "cross_entropy"}, default="ss_focal"
        The paper's sum, L_SS + lambda L_FL, or what its Table XII compares with.
    focal_weight : float, default=1.0
        lambda of the sum; the paper's best.

    Returns
    -------
    dict
        "loss", and for the sum also "ss" and "focal".

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> import torch
    >>> target = torch.zeros(1, 2, 2, dtype=torch.int64)
    >>> sorted(segmentation_loss(torch.zeros(1, 2, 2, 2), target))
    ['focal', 'loss', 'ss']
    """
    if loss == "cross_entropy":
        return {"loss": _cross_entropy(*_prepared(logits, target, ignore_index))}
    if loss == "ss":
        return {"loss": structural_similarity_loss(logits, target, ignore_index=ignore_index)}
    if loss == "focal":
        return {"loss": focal_loss(logits, target, ignore_index=ignore_index)}
    if loss != "ss_focal":
        raise ValueError(
            f"loss={loss!r} is unknown: take one of ss_focal, ss, focal, cross_entropy."
        )
    ss = structural_similarity_loss(logits, target, ignore_index=ignore_index)
    focal = focal_loss(logits, target, ignore_index=ignore_index)
    return {"loss": ss + focal_weight * focal, "ss": ss, "focal": focal}


def _prepared(logits, target, ignore_index):
    """Log-probabilities and one-hot truth (B, K, H, W), and 1 where a pixel has a label."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    valid = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        valid = target != ignore_index
        target = target.masked_fill(~valid, 0)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    valid = valid[:, None].to(logits.dtype)
    return F.log_softmax(logits, dim=1), truth * valid, valid


def _cross_entropy(log_p, truth, valid):
    return -(log_p * truth).sum() / valid.sum().clamp(min=1)


def _standardised(x, valid, stability):
    """(x - mean + C) / (std + C) over the labelled pixels of each image and class."""
    count = valid.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    centred = x - (x * valid).sum(dim=(2, 3), keepdim=True) / count
    variance = (centred.square() * valid).sum(dim=(2, 3), keepdim=True) / count
    return (centred + stability) / (variance.clamp(min=_LEAST_VARIANCE).sqrt() + stability)
