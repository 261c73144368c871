"""Structural similarity and focal loss against float64 NumPy, their slopes, and hard cases."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from diffaugkit.segmentation_losses import (
    focal_loss,
    segmentation_loss,
    structural_similarity_loss,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def reference(logits, target, *, beta=0.1, c=0.01, gamma=2.0, ignore=None):
    """Eqs. 9 to 11 with loops, in float64: (SS, focal, cross-entropy)."""
    logits, target = logits.double().numpy(), target.numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    cross, focal, n = 0.0, 0.0, 0
    for image in range(len(target)):
        for place in np.ndindex(target.shape[1:]):
            if target[(image, *place)] == ignore:
                continue
            true = p[(image, target[(image, *place)], *place)]
            cross -= np.log(true)
            focal -= (1 - true) ** gamma * np.log(true)
            n += 1
    errors = []
    for image in range(len(target)):
        valid = target[image] != (-1 if ignore is None else ignore)
        for label in range(p.shape[1]):
            y = (target[image] == label)[valid].astype(float)
            y_hat = p[image, label][valid]
            e = np.abs((y - y.mean() + c) / (y.std() + c) - (y_hat - y_hat.mean() + c) /
                       (y_hat.std() + c))  # fmt: skip
            errors.extend(e[e > beta * e.max()])
    return cross / n * np.mean(errors), focal / n, cross / n


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("ignore", [None, 255])
def test_against_numpy(n_classes, ignore):
    logits = 2 * torch.randn(3, n_classes, 5, 6, dtype=torch.float64)
    target = torch.randint(n_classes, (3, 5, 6))
    target[0] = 0  # the first image lacks all classes but one
    if ignore is not None:
        target[1, :2] = ignore
    ss, focal, cross = reference(logits, target, ignore=ignore)
    more = {"ignore_index": ignore}
    assert structural_similarity_loss(logits, target, **more).item() == pytest.approx(ss, rel=1e-7)
    assert focal_loss(logits, target, **more).item() == pytest.approx(focal, rel=1e-9)
    found = segmentation_loss(logits, target, focal_weight=0.5, **more)
    assert found["loss"].item() == pytest.approx(ss + 0.5 * focal, rel=1e-7)
    single = segmentation_loss(logits, target, loss="cross_entropy", **more)["loss"].item()
    assert single == pytest.approx(cross, rel=1e-9)
    in_float32 = segmentation_loss(logits.float(), target, **more)["loss"].item()
    assert in_float32 == pytest.approx(ss + focal, rel=1e-4)


def test_cross_entropy_is_scikit_learns():
    logits, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(3, (2, 4, 4))
    p = logits.softmax(1).movedim(1, -1).reshape(-1, 3).numpy()
    expected = log_loss(target.flatten().numpy(), p, labels=[0, 1, 2])
    found = segmentation_loss(logits, target, loss="cross_entropy")["loss"].item()
    assert found == pytest.approx(expected)
    assert focal_loss(logits, target, gamma=0.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["ss", "focal", "ss_focal", "cross_entropy"])
def test_slopes(loss):
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (2, 3, 4))
    target[0, 0] = 7
    assert torch.autograd.gradcheck(
        lambda x: segmentation_loss(x, target, loss=loss, ignore_index=7)["loss"], logits
    )


@pytest.mark.parametrize("loss", ["ss", "focal", "ss_focal"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("wrong", [False, True])
def test_hard_cases_stay_finite(loss, scale, wrong):
    # Sure of everything, of one value everywhere, a single pixel: where log(softmax) breaks.
    for shape in ((2, 4, 4), (1, 1, 1)):
        target = torch.zeros(shape, dtype=torch.int64)
        logits = torch.zeros(shape[0], 2, *shape[1:])
        logits[:, int(wrong)] = scale
        logits.requires_grad_()
        value = segmentation_loss(logits, target, loss=loss)["loss"]
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()


def test_nothing_labelled():
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    value = segmentation_loss(logits, torch.full((1, 3, 3), 9), ignore_index=9)["loss"]
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_ignored_pixels_do_not_matter():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    target[:, 0] = 200
    other = logits.clone()
    other[:, :, 0] = torch.randn(2, 3, 4)
    for loss in ("ss", "focal", "cross_entropy"):
        a, b = (
            segmentation_loss(x, target, loss=loss, ignore_index=200)["loss"].item()
            for x in (logits, other)
        )
        assert a == pytest.approx(b, rel=1e-6)


def test_unknown_name():
    with pytest.raises(ValueError, match="cross_entropy"):
        segmentation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1), loss="dice")
