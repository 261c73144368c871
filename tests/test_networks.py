"""Denoisers: the contract, Listing 2 recomputed plainly, gradients, bfloat16."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffaugkit.denoisers import DENOISERS, DiffAugDenoiser, MLPDenoiser, sinusoidal_embedding


def make(name, n_features=7, n_condition=3, **kwargs):
    torch.manual_seed(0)
    return DENOISERS[name](n_features, n_condition, **{"width": 32, **kwargs})


def randomise(module):
    """Leave the zero initialisation, behind which nothing has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def batch(n=6, n_features=7, n_condition=3):
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, n_features, generator=generator),
        torch.randint(0, 1000, (n,), generator=generator),
        torch.randn(n, n_condition, generator=generator),
    )


both = pytest.mark.parametrize("name", sorted(DENOISERS))


def test_sinusoidal_embedding_is_the_formula():
    t = np.array([0, 1, 17, 999])
    for n_dims in (8, 9):
        got = sinusoidal_embedding(torch.from_numpy(t), n_dims).numpy()
        angle = t[:, None] / 10_000.0 ** (np.arange(4) / 4)
        np.testing.assert_allclose(got[:, :4], np.sin(angle), atol=1e-7)
        np.testing.assert_allclose(got[:, 4:8], np.cos(angle), atol=1e-7)
        assert got.shape == (4, n_dims)
        assert not got[:, 8:].any()


@both
@pytest.mark.parametrize("n", [1, 6])
def test_shape_and_rows_are_independent(name, n):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    whole = denoiser(x, t, cond)
    assert whole.shape == x.shape
    torch.testing.assert_close(denoiser(x[:n], t[:n], cond[:n]), whole[:n], atol=1e-5, rtol=1e-5)


@both
def test_dropped_rows_are_the_null_condition(name):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    drop = torch.tensor([True, False, True, False, False, True])
    mixed = denoiser(x, t, cond, drop)
    torch.testing.assert_close(mixed[drop], denoiser(x, t)[drop])
    torch.testing.assert_close(mixed[~drop], denoiser(x, t, cond)[~drop])
    null = denoiser.null_condition.expand_as(cond)
    torch.testing.assert_close(denoiser(x, t), denoiser(x, t, null))
    assert not torch.allclose(denoiser(x, t, cond), denoiser(x, t))


@both
def test_wrong_shapes_are_refused(name):
    x, t, cond = batch()
    with pytest.raises(ValueError, match="x_t has shape"):
        make(name)(x[:, :-1], t, cond)
    with pytest.raises(ValueError, match="cond has shape"):
        make(name)(x, t, cond[:, :-1])
    with pytest.raises(ValueError, match="cond has shape"):
        make(name)(x, t, cond[:1])
    with pytest.raises(ValueError, match="n_condition=0"):
        make(name, n_condition=0)(x, t, cond)


@both
@pytest.mark.parametrize("n_condition", [0, 3])
def test_gradient_reaches_every_parameter(name, n_condition):
    denoiser = randomise(make(name, n_condition=n_condition, n_timesteps=6))
    x, t, cond = batch()
    drop = torch.arange(6) < 2
    args = (cond, drop) if n_condition else ()
    denoiser(x, t.clamp(max=5) * 0 + torch.arange(6), *args).square().mean().backward()
    for key, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@both
def test_gradients_are_right(name):
    denoiser = randomise(make(name, width=8)).double()
    denoiser_buffers = dict(denoiser.named_buffers())
    assert all(buffer.dtype == torch.float64 for buffer in denoiser_buffers.values())
    x, t, cond = batch(n=2)
    x, cond = x.double().requires_grad_(), cond.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, cond: denoiser(x, t[:2], cond), (x, cond))


@both
def test_bfloat16_autocast(name):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    full = denoiser(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        half = denoiser(x, t, cond)
    scale = full.abs().max()
    assert (half.float() - full).abs().max() < 0.05 * scale
    half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)


@both
def test_state_dict_holds_only_what_is_learned(name):
    denoiser = make(name)
    assert set(denoiser.state_dict()) == {key for key, _ in denoiser.named_parameters()}
    copy = make(name)
    copy.load_state_dict(randomise(denoiser).state_dict(), strict=True)
    x, t, cond = batch()
    assert torch.equal(copy(x, t, cond), denoiser(x, t, cond))


def test_mlp_starts_at_zero_and_learns_a_linear_gain_exactly():
    denoiser = make("mlp", n_condition=0)
    x, t, _ = batch()
    assert not denoiser(x, t).any()
    gain = torch.arange(7.0) / 7
    with torch.no_grad():
        denoiser.modulation.bias[-7:] = gain
    torch.testing.assert_close(denoiser(x, t), x * gain)


def test_mlp_number_of_parameters():
    d, e, w, k, b = 50, 20, 512, 128, 4
    embedding = (k * k + k) + (k * k + k) + (e * k + k) + (k * k + k)
    out = w * (2 * b + 2) + d
    expected = e + embedding + (k * out + out) + (d * w + w) + b * 2 * (w * w + w) + (w * d + d)
    assert sum(p.numel() for p in MLPDenoiser(d, e).parameters()) == expected


def test_mlp_dropout_acts_in_training_only():
    denoiser = randomise(make("mlp", dropout=0.5))
    x, t, cond = batch()
    assert not torch.equal(denoiser(x, t, cond), denoiser(x, t, cond))
    denoiser.eval()
    assert torch.equal(denoiser(x, t, cond), denoiser(x, t, cond))


def test_diffaug_number_of_parameters():
    d, e, m = 50, 20, 2000
    block = d * m + m + m * d + d
    condition = (e * 200 + 200) + (200 * 200 + 200) + (200 * d + d)
    expected = 8 * block + 1000 * d + condition + e
    assert sum(p.numel() for p in DiffAugDenoiser(d, e).parameters()) == expected


@pytest.mark.parametrize("n_condition", [0, 3])
def test_diffaug_is_listing_2(n_condition):
    """Forward pass in float64 NumPy, against the listing line by line."""
    denoiser = make("diffaug", n_condition=n_condition, width=32).double()
    x, t, cond = batch()
    p = {key: value.detach().numpy() for key, value in denoiser.state_dict().items()}

    def linear(key, h):
        return h @ p[f"{key}.weight"].T + p[f"{key}.bias"]

    def leaky(h):
        return np.where(h > 0, h, 0.01 * h)

    def norm(h):
        centred = h - h.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)

    def block(key, h, first=False):
        h = h if first else norm(leaky(h))
        return linear(f"{key}.output", norm(leaky(linear(f"{key}.hidden", h))))

    extra = p["time_embedding.weight"][t.numpy()]
    if n_condition:
        h = cond.double().numpy()
        h = linear("condition_mlp.2", leaky(linear("condition_mlp.0", h)))
        extra = extra + linear("condition_mlp.4", leaky(h))
    skips = []
    h = x.double().numpy()
    for i in range(4):
        h = block(f"encoder.{i}", h + extra, first=i == 0) + sum(skips)
        skips.append(h)
    e1, e2, e3, e4 = skips
    d1 = block("decoder.0", e4 + extra)
    d2 = block("decoder.1", d1 + extra) + e3 + d1
    d3 = block("decoder.2", d2 + extra) + e2 + d1 + d2
    expected = block("decoder.3", d3 + extra) + e1 + d1 + d2 + d3

    args = (cond.double(),) if n_condition else ()
    got = denoiser(x.double(), t, *args).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_diffaug_norm_is_the_papers_instance_norm():
    h = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nn.InstanceNorm1d(5)(h), torch.layer_norm(h, (7,)))


def test_mlp_forward_is_the_formula():
    """The modulated blocks in float64 NumPy."""
    denoiser = randomise(make("mlp", n_blocks=2)).double()
    x, t, cond = batch()
    p = {key: value.detach().numpy() for key, value in denoiser.state_dict().items()}

    def linear(key, h):
        return h @ p[f"{key}.weight"].T + p[f"{key}.bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def norm(h):
        centred = h - h.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)

    half = 16
    angle = t.numpy()[:, None] * np.exp(-math.log(1e4) * np.arange(half) / half)
    embedding = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    embedding = linear("time_mlp.2", silu(linear("time_mlp.0", embedding)))
    h = silu(linear("condition_mlp.0", cond.double().numpy()))
    modulation = linear("modulation", silu(embedding + linear("condition_mlp.2", h)))
    parts = np.split(modulation, 32 * np.arange(1, 7), axis=1)

    xn = x.double().numpy()
    h = linear("input", xn)
    for i in range(2):
        inner = norm(h) * parts[2 * i] + parts[2 * i + 1]
        h = h + linear(f"blocks.{i}.output", silu(linear(f"blocks.{i}.hidden", inner)))
    expected = linear("output", norm(h) * parts[4] + parts[5]) + parts[6] * xn
    got = denoiser(x.double(), t, cond.double()).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
