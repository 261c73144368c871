"""Losses against an independent float64 NumPy version, closed forms, and no NaN at extremes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffaugkit.losses import (
    KERNELS,
    dino_loss,
    disentanglement_loss,
    info_nce_queue,
    min_snr_weight,
    negative_cosine,
    nt_xent,
    p2_weight,
    soft_contrastive,
    squared_distances,
    t_info_nce,
    t_similarity,
)

FORMS = [
    pytest.param(*form, id="-".join(map(str, form)))
    for form in itertools.product(
        KERNELS, ("own_view", "pair"), ("pairwise", "softmax"), (1.0, 0.25)
    )
    if form[2] == "pairwise" or form[3] == 1.0
]


# ---- the slow and obvious version: one pair at a time, densities from SciPy --------------------


def numpy_kernel(distance, nu, kernel):
    density = stats.t.pdf(distance, df=nu)
    if kernel == "unit_t":
        return density / stats.t.pdf(0.0, df=nu)
    return density if kernel == "t" else 2 * np.pi * density**2


def numpy_soft_contrastive(
    y_a, z_a, y_b, z_b, *, nu, nu_low, kernel, beta, target, contrast, repulsion
):
    n = len(y_a)
    P, Q = np.empty((n, n)), np.empty((n, n))
    for i in range(n):
        for j in range(n):
            other = y_a if target == "own_view" else y_b
            P[i, j] = numpy_kernel(np.sqrt(np.sum((y_a[i] - other[j]) ** 2)), nu, kernel)
            if target == "pair" and i == j:
                P[i, j] *= np.exp(beta)
            P[i, j] = min(P[i, j], 1.0)
            Q[i, j] = numpy_kernel(np.sqrt(np.sum((z_a[i] - z_b[j]) ** 2)), nu_low, kernel)
    if contrast == "pairwise":
        attraction, repelling = P * np.log(Q + 1e-5), (1 - P) * np.log(1 - Q + 1e-5)
        return -np.mean(attraction + repulsion * repelling)
    from_a = sum(
        P[i, j] / P[i].sum() * np.log(Q[i, j] / Q[i].sum()) for i in range(n) for j in range(n)
    )
    from_b = sum(
        P[i, j] / P[:, j].sum() * np.log(Q[i, j] / Q[:, j].sum())
        for i in range(n)
        for j in range(n)
    )
    return -(from_a + from_b) / (2 * n)


def views(n=6, seed=0):
    rng = np.random.default_rng(seed)
    y, z = rng.normal(size=(n, 5)), rng.normal(size=(n, 2))
    noise = 0.3 * rng.normal(size=(n, 7))
    return y, z, y + noise[:, :5], z + noise[:, 5:]


def options(kernel, target, contrast, repulsion):
    names = {"kernel": kernel, "target": target, "contrast": contrast, "repulsion": repulsion}
    return {**names, "nu": 7.0, "nu_low": 0.7, "beta": 0.6}


@pytest.mark.parametrize(("kernel", "target", "contrast", "repulsion"), FORMS)
def test_value_equals_numpy(kernel, target, contrast, repulsion):
    arrays, settings = views(), options(kernel, target, contrast, repulsion)
    expected = numpy_soft_contrastive(*arrays, **settings)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        loss = soft_contrastive(*(torch.tensor(a, dtype=dtype) for a in arrays), **settings)
        assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("kernel", "target", "contrast", "repulsion"), FORMS)
def test_gradient_equals_finite_differences_of_numpy(kernel, target, contrast, repulsion):
    arrays, settings = views(4), options(kernel, target, contrast, repulsion)
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    soft_contrastive(*tensors, **settings).backward()
    step = 1e-5
    for number, tensor in enumerate(tensors):
        # With the targets within one view, the other view's y has no part in the loss.
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for position in np.ndindex(*arrays[number].shape):
            values = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[number][position] += sign * step
                values.append(numpy_soft_contrastive(*moved, **settings))
            expected = (values[0] - values[1]) / (2 * step)
            assert gradient[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("contrast", ["pairwise", "softmax"])
def test_gradcheck(contrast):
    tensors = [torch.tensor(a, requires_grad=True) for a in views(4)]
    settings = options("t", "pair", contrast, 1.0)
    assert torch.autograd.gradcheck(lambda *v: soft_contrastive(*v, **settings), tensors)


def test_detached_targets_give_y_no_gradient():
    tensors = [torch.tensor(a, requires_grad=True) for a in views()]
    for target in ("own_view", "pair"):
        soft_contrastive(*tensors, target=target, detach_target=True).backward()
        assert tensors[0].grad is None
        assert tensors[1].grad.abs().sum() > 0
        with torch.no_grad():
            attached = soft_contrastive(*tensors, target=target)
            assert attached == soft_contrastive(*tensors, target=target, detach_target=True)


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nu", "value"), [(100, 0.9945), (10, 0.951), (1, 0.636), (0.1, 0.138), (0.01, 0.0155)]
)
def test_squared_t_at_distance_0(nu, value):
    # The released code's own values; it writes 3.14 for pi, which shows at nu = 100 only.
    at_zero = t_similarity(torch.tensor(0.0, dtype=torch.float64), nu, "squared_t").item()
    digits = len(str(value)) - 2
    assert round(at_zero * 3.14 / math.pi, digits) == value
    assert at_zero == pytest.approx(2 * math.pi * stats.t.pdf(0, nu) ** 2, rel=1e-10)


def test_t_density_at_distance_0():
    zero = torch.tensor(0.0)
    assert t_similarity(zero, 100.0, "t").item() == pytest.approx(0.398, abs=5e-4)
    assert t_similarity(zero, 1.0, "t").item() == pytest.approx(1 / math.pi, rel=1e-6)
    assert t_similarity(zero, 3.0, "unit_t").item() == 1.0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("nu", [0.01, 0.1, 1.0, 10.0, 100.0, 1e5, 1e7, 1e15])
def test_kernels_equal_scipy(kernel, nu):
    distance = np.linspace(0, 6, 25)
    ours = t_similarity(torch.tensor(distance**2), nu, kernel).numpy()
    np.testing.assert_allclose(ours, numpy_kernel(distance, nu, kernel), rtol=1e-6)
    assert (ours > 0).all()
    assert (ours <= 1 + 1e-12).all()
    assert (np.diff(ours) < 0).all()


def test_unknown_names_are_refused():
    tensors = [torch.tensor(a) for a in views()]
    for name in ("kernel", "target", "contrast"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            soft_contrastive(*tensors, **{name: "nonsense"})
    with pytest.raises(ValueError, match="prediction_type"):
        min_snr_weight(torch.ones(1), prediction_type="nonsense")


# ---- targets -------------------------------------------------------------------------------------


def test_targets_are_clamped_to_one():
    # All of P at its bound: only the attraction is left, whatever beta adds on top.
    y, z = torch.zeros(5, 3), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for beta in (0.0, 1.0):
        loss = soft_contrastive(y, z, y, z, kernel="unit_t", target="pair", beta=beta, nu_low=1.0)
        Q = t_similarity(squared_distances(z, z), 1.0, "unit_t")
        assert loss.item() == pytest.approx(-torch.log(Q + 1e-5).mean().item(), rel=1e-6)


def test_beta_counts_for_pairs_only():
    tensors = [torch.tensor(a) for a in views()]

    def loss(**more):
        return soft_contrastive(*tensors, kernel="t", **more).item()

    assert loss(target="own_view", beta=0.0) == loss(target="own_view", beta=1.0)
    assert loss(target="pair", beta=0.0) != loss(target="pair", beta=1.0)


def test_softmax_form_is_symmetric_in_the_views():
    y_a, z_a, y_b, z_b = (torch.tensor(a) for a in views())
    settings = {"contrast": "softmax", "target": "pair"}
    there = soft_contrastive(y_a, z_a, y_b, z_b, **settings)
    back = soft_contrastive(y_b, z_b, y_a, z_a, **settings)
    assert there.item() == pytest.approx(back.item(), rel=1e-12)


@pytest.mark.parametrize("nu", [0.5, 5.0, 100.0])
def test_t_info_nce_equals_numpy(nu):
    _, a, _, b = views()
    kernel = np.array([[stats.t.pdf(np.linalg.norm(p - q), df=nu) for q in b] for p in a])
    own = np.diag(kernel)
    expected = -0.5 * np.mean(np.log(own / kernel.sum(axis=0)) + np.log(own / kernel.sum(axis=1)))
    loss = t_info_nce(torch.tensor(a), torch.tensor(b), nu)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    tensors = [torch.tensor(v, requires_grad=True) for v in (a, b)]
    assert torch.autograd.gradcheck(lambda p, q: t_info_nce(p, q, nu), tensors)


def test_squared_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(5, 4))
    expected = ((a[:, None] - b[None]) ** 2).sum(-1)
    ours = squared_distances(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    half = squared_distances(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())
    assert half.dtype == torch.float32
    same = torch.tensor(100 + rng.normal(size=(50, 20)), dtype=torch.float32)
    assert squared_distances(same, same).min() >= 0


# ---- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "target", "contrast", "repulsion"), FORMS)
@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4, 1e9])
def test_finite_at_extremes(kernel, target, contrast, repulsion, n, scale):
    generator = torch.Generator().manual_seed(0)
    for nu_low in (0.01, 5.0):
        tensors = [
            (scale * torch.randn(n, d, generator=generator)).requires_grad_() for d in (5, 2, 5, 2)
        ]
        names = {"kernel": kernel, "target": target, "contrast": contrast}
        loss = soft_contrastive(*tensors, **names, repulsion=repulsion, nu_low=nu_low)
        assert torch.isfinite(loss)
        loss.backward()
        for tensor in tensors:
            assert tensor.grad is None or torch.isfinite(tensor.grad).all()


# ---- nt_xent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent_of_equal_views_is_the_logarithm_of_their_number(n, temperature):
    one = torch.ones(n, 3)
    expected = math.log(2 * n - 1)
    assert nt_xent(one, one, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_nt_xent_equals_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    every = np.concatenate([a, b])
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        others = [math.exp(every[i] @ every[k] / 0.3) for k in range(10) if k != i]
        total -= math.log(math.exp(every[i] @ every[partner] / 0.3) / sum(others))
    ours = nt_xent(torch.tensor(a), torch.tensor(b), 0.3).item()
    assert ours == pytest.approx(total / 10, rel=1e-10)
    single = nt_xent(torch.tensor(a).float(), torch.tensor(b).float(), 0.3).item()
    assert single == pytest.approx(ours, rel=1e-6)


def test_nt_xent_gradients_and_extremes():
    a, b = (torch.tensor(view, requires_grad=True) for view in views()[1::2])
    assert torch.autograd.gradcheck(nt_xent, (a, b))
    for scale in (0.0, 1e-30, 1e15):
        x = (scale * torch.ones(2, 3)).requires_grad_()
        loss = nt_xent(x, -x, 0.05)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()


# ---- losses of images ----------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def crops(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("n_crops", [2, 5])
def test_dino_equals_numpy(n_crops):
    student, teacher, center = crops(n_crops, 3, 6), crops(2, 3, 6, seed=1), crops(6, seed=2)
    terms = [
        -np.sum(softmax((teacher[i, b] - center) / 0.07) * np.log(softmax(student[j, b] / 0.2)))
        for i in range(2)
        for j in range(n_crops)
        for b in range(3)
        if i != j
    ]
    tensors = (torch.tensor(student), torch.tensor(teacher), torch.tensor(center))
    loss = dino_loss(*tensors, 0.2, 0.07)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)
    single = dino_loss(*(t.float() for t in tensors), 0.2, torch.tensor(0.07))
    assert single.item() == pytest.approx(np.mean(terms), rel=1e-6)
    listed = dino_loss(list(tensors[0]), list(tensors[1]), tensors[2], 0.2, 0.07)
    assert listed.item() == loss.item()


def test_dino_teaches_the_student_only_and_refuses_a_single_crop():
    student, teacher = (torch.tensor(crops(2, 3, 6, seed=s), requires_grad=True) for s in (0, 1))
    center = torch.zeros(6, dtype=torch.float64)
    dino_loss(student, teacher, center).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center, 0.5, 0.3), (student,))
    with pytest.raises(ValueError, match="two different crops"):
        dino_loss(student[:1], teacher[:1], center)


@pytest.mark.parametrize("alpha", [0.3, [0.0, 0.5, 1.0]])
def test_disentanglement_equals_numpy(alpha):
    ours, first, second = (crops(3, 6, seed=seed) for seed in range(3))
    center, shares = crops(6, seed=4), np.broadcast_to(alpha, 3)
    terms = []
    for b in range(3):
        mixed = shares[b] * first[b] + (1 - shares[b]) * second[b]  # Eq. 5: logits, and then ...
        target = softmax((mixed - center) / 0.05)  # ... centred and sharpened, Eq. 6
        terms.append(-np.sum(target * np.log(softmax(ours[b] / 0.1))))
    given = torch.tensor(alpha, dtype=torch.float64)
    tensors = [torch.tensor(a, requires_grad=True) for a in (ours, first, second)]
    loss = disentanglement_loss(*tensors, given, torch.tensor(center), 0.1, 0.05)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)
    loss.backward()
    assert tensors[0].grad.abs().sum() > 0
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_disentanglement_at_the_ends_is_dino_of_one_source():
    ours, first, second, center = (torch.tensor(crops(1, 4, 6, seed=s)) for s in range(4))
    center = center[0, 0]
    both = torch.cat([ours, ours]), torch.cat([first, first])
    for alpha, source in ((1.0, first), (0.0, second)):
        loss = disentanglement_loss(ours[0], first[0], second[0], alpha, center)
        same = dino_loss(torch.cat([ours, ours]), torch.cat([source, source]), center)
        assert loss.item() == pytest.approx(same.item(), rel=1e-12)
    assert dino_loss(*both, center) != loss


def test_info_nce_queue_equals_numpy():
    queries, keys, queue = crops(4, 3), crops(4, 3, seed=1), crops(7, 3, seed=2)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    q, k, old = unit(queries), unit(keys), unit(queue)
    terms = [
        -np.log(softmax(np.concatenate([[q[i] @ k[i]], old @ q[i]]) / 0.3)[0]) for i in range(4)
    ]
    tensors = [torch.tensor(a, requires_grad=True) for a in (queries, keys, queue)]
    loss = info_nce_queue(*tensors, temperature=0.3)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)
    loss.backward()
    assert tensors[1].grad is None
    assert torch.autograd.gradcheck(lambda a: info_nce_queue(a, *tensors[1:]), (tensors[0],))


def test_negative_cosine_equals_numpy():
    a, b = crops(5, 3), crops(5, 3, seed=1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    tensors = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    loss = negative_cosine(*tensors)
    assert loss.item() == pytest.approx(-np.mean((a * b).sum(1) / lengths), rel=1e-10)
    # BYOL's Eq. 2: squared distance of normalised vectors.
    unit_a, unit_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    byol = np.mean(((unit_a - unit_b) ** 2).sum(1))
    assert 2 + 2 * loss.item() == pytest.approx(byol, rel=1e-10)
    loss.backward()
    assert tensors[1].grad is None
    assert torch.autograd.gradcheck(lambda x: negative_cosine(x, tensors[1]), (tensors[0],))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4])
def test_image_losses_are_finite_at_extremes(scale):
    x = (scale * torch.ones(2, 3, 4)).requires_grad_()
    center = torch.zeros(4)
    for loss in (
        dino_loss(x, -x, center),
        disentanglement_loss(x[0], x[1], -x[0], 0.5, center),
        info_nce_queue(x[0], x[1], -x[0]),
        negative_cosine(x[0], -x[1]),
    ):
        assert torch.isfinite(loss)
        loss.backward(retain_graph=True)
        assert torch.isfinite(x.grad).all()


# ---- weights of timesteps ------------------------------------------------------------------------


def test_p2_is_one_minus_alpha_bar():
    alpha_bar = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    weight = p2_weight(alpha_bar / (1 - alpha_bar))
    torch.testing.assert_close(weight, 1 - alpha_bar)
    torch.testing.assert_close(p2_weight(torch.tensor(3.0), k=1.0, gamma=0.5), torch.tensor(0.5))


def test_min_snr_is_the_same_weight_on_the_sample_for_every_prediction():
    alpha_bar = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    snr = alpha_bar / (1 - alpha_bar)
    on_sample = min_snr_weight(snr, prediction_type="sample")
    torch.testing.assert_close(on_sample, snr.clamp(max=5))
    # An error e of x0 is one of sqrt(snr) e in the noise and of e / sqrt(1 - alpha_bar) in v.
    noise = min_snr_weight(snr, prediction_type="epsilon")
    torch.testing.assert_close(noise * snr, on_sample)
    velocity = min_snr_weight(snr, prediction_type="v_prediction")
    torch.testing.assert_close(velocity / (1 - alpha_bar), on_sample)
    assert min_snr_weight(torch.tensor(0.0)).item() == 1.0


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_distances_far_from_zero(offset):
    generator = torch.Generator().manual_seed(0)
    z = (0.1 * torch.randn(64, 2, generator=generator) + offset).requires_grad_()
    exact = torch.cdist(z.detach().double(), z.detach().double()).square()
    torch.testing.assert_close(squared_distances(z, z).double(), exact, atol=1e-6, rtol=1e-5)
    weight = torch.rand(64, 64, generator=generator)
    (own,) = torch.autograd.grad((weight * squared_distances(z, z)).sum(), z)
    double = z.detach().double().requires_grad_()
    far = (double[:, None] - double[None]).square().sum(2)
    (right,) = torch.autograd.grad((weight.double() * far).sum(), double)
    torch.testing.assert_close(own.double(), right, atol=1e-3, rtol=1e-3)
