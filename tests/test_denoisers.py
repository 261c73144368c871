"""UNetDenoiser: the contract at any size, what dropping does, and what is recorded of attention."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from diffaugkit.denoisers import (
    DENOISERS,
    MLPDenoiser,
    UNetDenoiser,
    check_denoiser,
    check_signature,
    record_attention,
    record_features,
    unet_size,
)
from diffaugkit.runtime import isolated_rng

SMALL = {"block_out_channels": (8, 16), "n_attention_levels": 1}


def make(n_channels=2, n_condition=6, *, started=True, **more):
    """Small U-Net; `started` moves it from its start at zero, so that outputs say something."""
    with isolated_rng(0):
        denoiser = UNetDenoiser(n_channels, n_condition, **{**SMALL, **more}).eval()
        if started:
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser


def inputs(n=3, shape=(2, 8, 8), tokens=None, seed=0):
    with isolated_rng(seed):
        cond = torch.randn(n, 6) if tokens is None else torch.randn(n, tokens, 6)
        return torch.randn(n, *shape), torch.randint(1000, (n,)), cond


# ---- contract ------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    tokens=st.sampled_from([None, 1, 4]),
    levels=st.integers(1, 3),
)
def test_any_size_and_number_of_tokens(height, width, tokens, levels):
    denoiser = make(block_out_channels=(8, 16, 16)[:levels])
    x_t, t, cond = inputs(2, (2, height, width), tokens)
    with torch.no_grad():
        out = denoiser(x_t, t, cond, torch.tensor([True, False]))
        assert out.shape == x_t.shape
        assert torch.isfinite(out).all()
        assert denoiser(x_t, t).shape == x_t.shape


@pytest.mark.parametrize("n_condition", [0, 6])
def test_starts_at_zero_and_learns_in_every_parameter(n_condition):
    denoiser = make(n_condition=n_condition, started=False)
    x_t, t, cond = inputs()
    cond = cond if n_condition else None
    assert not denoiser(x_t, t, cond).any()
    denoiser = make(n_condition=n_condition)
    drop = torch.tensor([True, False, False]) if n_condition else None
    denoiser(x_t, t, cond, drop).square().sum().backward()
    without = [name for name, p in denoiser.named_parameters() if p.grad is None]
    assert not without


def test_padding_is_zeros_at_the_far_ends():
    denoiser = make()
    x_t, t, cond = inputs(2, (2, 7, 5))
    with torch.no_grad():
        by_hand = denoiser(F.pad(x_t, (0, 1, 0, 1)), t, cond)[..., :7, :5]
        torch.testing.assert_close(denoiser(x_t, t, cond), by_hand, rtol=0, atol=0)


def test_rows_do_not_see_each_other():
    denoiser = make()
    x_t, t, cond = inputs(16)
    with torch.no_grad():
        whole = denoiser(x_t, t, cond)
        alone = torch.cat([denoiser(x_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in (3, 9)])
    torch.testing.assert_close(alone, whole[[3, 9]], rtol=1e-4, atol=1e-4)


# ---- condition -----------------------------------------------------------------------------------


def test_dropped_rows_are_those_without_condition():
    denoiser = make()
    with torch.no_grad():
        denoiser.null_token.normal_(generator=torch.Generator().manual_seed(1))
    for tokens in (None, 3):
        x_t, t, cond = inputs(4, tokens=tokens)
        drop = torch.tensor([True, False, True, False])
        with torch.no_grad():
            mixed, null, full = (
                denoiser(x_t, t, cond, drop),
                denoiser(x_t, t),
                denoiser(x_t, t, cond),
            )
        torch.testing.assert_close(mixed[drop], null[drop], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[~drop], full[~drop], rtol=1e-5, atol=1e-5)
        assert (null - full).abs().max() > 1e-3


def test_null_token_is_learned_and_not_a_bias():
    denoiser = make()
    x_t, t, cond = inputs()
    denoiser(x_t, t, cond, torch.ones(3, dtype=torch.bool)).square().sum().backward()
    assert denoiser.null_token.grad.abs().max() > 0
    assert denoiser.token.weight.grad is None or not denoiser.token.weight.grad.any()


def test_tokens_against_numpy():
    denoiser = make()
    x_t, _, cond = inputs(tokens=2)
    with torch.no_grad():
        got = denoiser._tokens(x_t, cond, None).double().numpy()
    c = cond.double().numpy()
    c = c / np.sqrt((c**2).sum(-1, keepdims=True)) * math.sqrt(6)
    weight, bias = (p.detach().double().numpy() for p in denoiser.token.parameters())
    np.testing.assert_allclose(got, c @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_length_of_the_condition_matters_only_without_normalisation():
    x_t, t, cond = inputs()
    with torch.no_grad():
        one = make()
        torch.testing.assert_close(one(x_t, t, 5 * cond), one(x_t, t, cond), rtol=1e-4, atol=1e-4)
        two = make(normalize=False)
        assert (two(x_t, t, 5 * cond) - two(x_t, t, cond)).abs().max() > 1e-3


def test_refusals():
    denoiser = make()
    x_t, t, cond = inputs()
    with pytest.raises(ValueError, match=r"x_t has shape \(3, 1, 8, 8\)"):
        denoiser(x_t[:, :1], t, cond)
    for wrong in (cond[:2], cond[:, :5], cond[:, None, None]):
        with pytest.raises(ValueError, match="cond has shape"):
            denoiser(x_t, t, wrong)
    with pytest.raises(ValueError, match="n_condition=0"):
        make(n_condition=0)(x_t, t, cond)


@pytest.mark.parametrize(("side", "levels"), [(4, 2), (8, 2), (28, 3), (32, 3), (64, 4), (256, 4)])
def test_automatic_size(side, levels):
    size = unet_size((3, side, side))
    assert len(size["block_out_channels"]) == levels
    assert size["n_attention_levels"] >= 1


def test_vector_denoisers_are_where_they_were():
    assert list(DENOISERS) == ["mlp", "diffaug"]


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_condition", [0, 6])
def test_recorded_maps_sum_to_one_and_change_nothing(n_condition):
    denoiser = make(n_condition=n_condition, block_out_channels=(8, 16, 16), n_attention_levels=2)
    x_t, t, cond = inputs(2, (2, 12, 8), tokens=3)
    args = (x_t, t, cond) if n_condition else (x_t, t)
    with torch.no_grad():
        before = denoiser(*args)
        with record_attention(denoiser) as maps:
            inside = denoiser(*args)
        after = denoiser(*args)
    assert torch.equal(inside, before)
    assert torch.equal(after, before)
    assert set(maps.self_attention) == {(6, 4), (3, 2)}
    # Two levels on the way down with one layer, up with two; the middle at the lowest resolution.
    assert {size: len(found) for size, found in maps.self_attention.items()} == {
        (6, 4): 3,
        (3, 2): 4,
    }
    found = [*maps.self_attention.values(), *maps.cross_attention.values()]
    for layers in found:
        for layer in layers:
            assert layer.dtype == torch.float32
            torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer[..., 0]))
    for (rows, columns), layers in maps.self_attention.items():
        assert layers[0].shape[0] == 2
        assert layers[0].shape[2:] == (rows * columns, rows * columns)
    sizes = {layer.shape[3] for layers in maps.cross_attention.values() for layer in layers}
    assert sizes == ({3} if n_condition else set())


def test_recorded_maps_are_those_of_the_fused_attention():
    denoiser = make(block_out_channels=(8, 16))
    x_t, t, cond = inputs(2)
    seen = {}
    part = denoiser.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    handle = part.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(hidden=args[0], out=out), with_kwargs=True
    )
    with torch.no_grad(), record_attention(denoiser) as maps:
        denoiser(x_t, t, cond)
        handle.remove()
        values = part.to_v(seen["hidden"]).unflatten(2, (part.heads, -1)).transpose(1, 2)
        candidates = [
            part.to_out[0]((layer @ values).transpose(1, 2).flatten(2))
            for layer in maps.self_attention[4, 4]
        ]
    errors = [(made - seen["out"]).abs().max() for made in candidates]
    assert min(errors) < 1e-5
    # One token only: attention to it is 1 everywhere, and not worth keeping.
    assert not maps.cross_attention


def test_recording_survives_autocast_and_stops():
    denoiser = make()
    x_t, t, cond = inputs(2)
    with torch.no_grad():
        with record_attention(denoiser) as maps, torch.autocast("cpu", torch.bfloat16):
            denoiser(x_t, t, cond)
        recorded = [len(layers) for layers in maps.self_attention.values()]
        denoiser(x_t, t, cond)
    assert [len(layers) for layers in maps.self_attention.values()] == recorded
    assert all(m.dtype == torch.float32 for layers in maps.self_attention.values() for m in layers)
    with isolated_rng(0):
        vectors = MLPDenoiser(4, width=32)
    with pytest.raises(TypeError, match="MLPDenoiser has no attention"):
        record_attention(vectors).__enter__()


# ---- networks of one's own -----------------------------------------------------------------------


def own(forward, layer=None):
    """Make a module of this ``forward(self, ...)``."""
    with isolated_rng(0):
        module = type("Own", (nn.Module,), {"forward": forward})()
        module.layer = nn.Linear(4, 4) if layer is None else layer
    return module


ACCEPTED = {
    "contract": lambda self, x_t, t, cond=None, drop=None: x_t,
    "other names, one more": lambda self, x, level, z=None, mask=None, scale=1: x,
    "any": lambda self, *args, **kwargs: args[0],
}
REFUSED = {
    "no drop": lambda self, x_t, t, cond=None: x_t,
    "needs cond": lambda self, x_t, t, cond, drop: x_t,
    "needs more": lambda self, x_t, t, cond=None, drop=None, *, labels: x_t,
    "by name": lambda self, x_t, t, *, cond=None, drop=None: x_t,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_signatures_that_keep_the_contract(name):
    check_signature(own(ACCEPTED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_signatures_that_break_the_contract(name):
    with pytest.raises(ValueError, match=r"denoiser=Own has forward\(.*diffaugkit\.denoisers"):
        check_signature(own(REFUSED[name]))


def test_without_condition_two_arguments_are_enough():
    check_signature(own(lambda self, x_t, t: x_t), conditional=False)


def test_the_call_that_checks_a_network_leaves_no_trace():
    def forward(self, x_t, t, cond=None, drop=None):
        assert not self.training
        self.calls = getattr(self, "calls", 0) + 1
        return self.layer(x_t)

    module = own(forward, nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    check_denoiser(module, torch.ones(2, 4), 10, torch.zeros(2, 3))
    assert module.training
    assert not hasattr(module, "calls")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (
            lambda self, x_t, *_: x_t[:, :1],
            r"gave shape \(2, 1\) for x_t of shape \(2, 4\) and cond",
        ),
        (lambda self, x_t, *_: (x_t,), "gave tuple for"),
        (lambda self, x_t, *_: self.layer(x_t[:, :3]), "failed on x_t of shape .*cannot be multi"),
    ],
)
def test_predictions_of_another_shape_are_refused(forward, match):
    with pytest.raises(ValueError, match=match):
        check_denoiser(own(forward), torch.zeros(2, 4), 10, torch.zeros(2, 3))


@pytest.mark.parametrize("n_condition", [0, 4])
def test_features_of_a_row_are_its_own(n_condition):
    with isolated_rng(0):
        denoiser = UNetDenoiser(1, n_condition, block_out_channels=(8, 16)).eval()
        x, t = torch.randn(5, 1, 9, 7), torch.full((5,), 50)
    before = denoiser(x, t)
    with torch.no_grad():
        features = denoiser.features(x, t)
        torch.testing.assert_close(denoiser.features(x[2:4], t[2:4]), features[2:4])
    assert features.shape == (5, 5 * 16)
    assert len(torch.unique(features, dim=0)) == 5
    torch.testing.assert_close(denoiser(x, t), before)


def test_features_are_not_those_of_another_thread():
    with isolated_rng(0):
        denoiser = UNetDenoiser(1, block_out_channels=(8, 16)).eval()
        x, t, others = torch.randn(2, 1, 8, 8), torch.full((2,), 50), []

    def meanwhile(*_):
        if not others:
            others.append(threading.Thread(target=denoiser, args=(-x, t)))
            others[0].start()
            others[0].join()

    with torch.no_grad():
        expected = denoiser.features(x, t)
        denoiser.unet.mid_block.register_forward_pre_hook(meanwhile)
        torch.testing.assert_close(denoiser.features(x, t), expected)
    assert others


@pytest.mark.parametrize("record", [record_attention, record_features])
def test_what_is_recorded_is_not_of_another_thread(record):
    with isolated_rng(0):
        denoiser = UNetDenoiser(1, block_out_channels=(8, 16)).eval()
        x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 50)

    def values(found):
        layers = found if isinstance(found, list) else found.self_attention.values()
        return [value for layer in layers for value in layer]

    with torch.no_grad(), record(denoiser) as expected:
        denoiser(x, t)
    with torch.no_grad(), record(denoiser) as found:
        other = threading.Thread(target=denoiser, args=(-x[:, :, :4], t))
        other.start()
        other.join()
        denoiser(x, t)
    torch.testing.assert_close(values(found), values(expected))
