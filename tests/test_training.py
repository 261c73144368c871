"""The loop: exact resume, isolated randomness, averages, schedules, guards, several processes."""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit import batches as batches_file
from diffaugkit import runtime
from diffaugkit.batches import make_batches
from diffaugkit.runtime import (
    isolated_rng,
    mix_seed,
    reduced_precision,
    resolve_device,
    resolve_precision,
)
from diffaugkit.training import (
    EarlyStopping,
    KeepBest,
    NonFiniteLossError,
    auto_epochs,
    fit_loop,
    scheduled_rate,
)

ROOT = Path(__file__).parents[1]


def network(width=16, *, norm=True, seed=0, n_out=1):
    with isolated_rng(seed):
        layers = [nn.Linear(3, width), nn.BatchNorm1d(width) if norm else nn.Identity()]
        return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, n_out))


@pytest.fixture(scope="module")
def toy():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(48, 3, generator=generator)
    return X, X @ torch.tensor([[1.0], [-2.0], [0.5]]) + 1


def train(toy, *, module=None, loss=None, batch_size=8, order_seed=0, **options):
    X, y = toy
    module = network() if module is None else module
    batches = make_batches(X, y, batch_size=batch_size, seed=order_seed, device="cpu")

    def mse(x, y):
        return F.mse_loss(module(x), y)

    defaults = {"max_epochs": 3, "learning_rate": 0.01, "precision": "fp32", "device": "cpu"}
    return fit_loop(module, loss or mse, batches, **defaults | options)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_loss_falls(toy, ema_decay):
    options = {"max_epochs": 40, "learning_rate": 0.05, "grad_clip": 5.0, "warmup": 0.1}
    module, history = train(toy, module=network(norm=False), ema_decay=ema_decay, **options)
    assert [row["epoch"] for row in history] == list(range(40))
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    assert not module.training
    with torch.no_grad():
        assert F.mse_loss(module(toy[0]), toy[1]) < 0.3


def test_logs_the_mean_of_every_entry(toy):
    module = network()
    seen = []

    def loss(x, y):
        value = F.mse_loss(module(x), y)
        seen.append((value.item(), len(x)))
        return {"loss": value, "rows": torch.tensor(float(len(x)))}

    _, history = train(toy, module=module, loss=loss, batch_size=20, max_epochs=1)
    assert history[0]["loss"] == pytest.approx(np.mean([v for v, _ in seen]))
    assert history[0]["rows"] == 16


@pytest.mark.parametrize(("n", "epochs"), [(100, 330), (10**6, 10), (5 * 10**4, 30)])
def test_auto_epochs(n, epochs):
    steps = -(-n // 300)
    assert auto_epochs("auto", steps, paper=330, most_steps=5000) == epochs
    assert auto_epochs(7, steps) == 7


@pytest.mark.parametrize("warmup", [3, 0.25, 0])
def test_learning_rate_follows_the_closed_form(toy, monkeypatch, warmup):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, history = train(toy, max_epochs=2, warmup=warmup)
    start = 3 if warmup else 0  # a quarter of 12 steps
    expected = []
    for k in range(12):
        if k < start:
            expected.append(0.01 * (k + 1) / 3)
        else:
            expected.append(0.005 * (1 + math.cos(math.pi * (k - start) / (12 - start))))
    assert seen == pytest.approx(expected)
    assert [row["learning_rate"] for row in history] == [seen[5], seen[11]]


def test_rate_reaches_its_peak_and_ends_above_zero():
    rates = [scheduled_rate(k, 50, 1.0, warmup=0.2) for k in range(50)]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[0] == 0.1
    assert 0 < rates[-1] < 0.01


def test_average_equals_hand_computation(toy):
    module = network(norm=True)
    path = []
    average, _ = train(
        toy,
        module=module,
        ema_decay=0.5,
        max_epochs=2,
        after_step=lambda step: path.append(weights(module)),
    )
    expected = path[0]
    for t, current in enumerate(path[1:], start=1):
        decay = min(0.5, (1 + t) / (10 + t))
        for name, value in current.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
    assert average is not module
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_accumulation_equals_one_large_batch(toy):
    large, _ = train(toy, module=network(norm=False), max_epochs=3, batch_size=24)
    small, _ = train(toy, module=network(norm=False), max_epochs=3, batch_size=6, accumulate=4)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_accumulation_averages_a_short_last_group(toy):
    steps = []
    train(toy, accumulate=4, max_epochs=2, after_step=steps.append)  # 6 batches: groups of 4 and 2
    assert steps == [0, 1, 2, 3]
    options = {"max_epochs": 1, "batch_size": 16}
    a, _ = train(toy, module=network(norm=False), accumulate=3, **options)
    b, _ = train(toy, module=network(norm=False), accumulate=9, **options)
    assert same(a, b)


def test_gradients_are_clipped(toy, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(toy, max_epochs=1)
    assert max(norms) > 0.02
    norms.clear()
    train(toy, max_epochs=1, grad_clip=0.01)
    assert max(norms) <= 0.01 + 1e-6


def test_weight_decay_spares_biases_and_gains(toy):
    module = network(norm=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)

    def loss(x, y):
        return sum(p.sum() * 0 for p in module.parameters())

    train(toy, module=module, loss=loss, weight_decay=0.5, learning_rate=0.1, max_epochs=1)
    assert all((p < 1).all() if p.ndim > 1 else (p == 1).all() for p in module.parameters())


def test_each_gradient_is_clipped_on_its_own(toy, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(toy, max_epochs=1)
    free = seen.copy()
    seen.clear()
    train(toy, max_epochs=1, grad_clip=0.01, clip_each=True)
    clipped = 0
    for before, after in zip(free[0], seen[0], strict=True):  # the weights are still the same
        norm = float(before.norm())
        expected = before * min(1.0, 0.01 / (norm + 1e-6))
        torch.testing.assert_close(after, expected)
        clipped += norm > 0.01
    assert clipped > 0


@pytest.mark.parametrize(("first", "last"), [(0.04, 0.4), (0.0, 0.4), (0.4, 0.0)])
def test_weight_decay_follows_its_cosine(toy, monkeypatch, first, last):
    decays = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        decays.append([group["weight_decay"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(toy, max_epochs=2, batch_size=10, weight_decay=first, final_weight_decay=last)
    n = len(decays)
    expected = last + (first - last) * 0.5 * (1 + np.cos(np.pi * np.arange(n) / n))
    np.testing.assert_allclose([matrices for matrices, _ in decays], expected, rtol=1e-12)
    assert all(gains == 0 for _, gains in decays)


def test_frozen_and_unused_parameters_stay(toy, tmp_path):
    module = nn.ModuleDict({"used": network(norm=False), "unused": network(2)})
    module["used"][0].requires_grad_(False)
    before = weights(module)
    train(
        toy,
        module=module,
        loss=lambda x, y: F.mse_loss(module["used"](x), y),
        ema_decay=0.9,
        checkpoint_dir=tmp_path,
    )
    after = module.state_dict()
    assert not torch.equal(before["used.3.weight"], after["used.3.weight"])
    for name in ("used.0.weight", "unused.0.weight"):
        assert torch.equal(before[name], after[name])


# ---- randomness ----------------------------------------------------------------------------------


def noisy(module):
    def loss(x, y):
        return F.mse_loss(module(F.dropout(x, 0.2) + 0.1 * torch.randn_like(x)), y)

    return loss


def fit_noisy(toy, seed, **options):
    module = network(seed=seed)
    return train(toy, module=module, loss=noisy(module), seed=seed, order_seed=seed, **options)


def test_same_seed_same_weights_other_seed_other_weights(toy):
    a, history_a = fit_noisy(toy, 1)
    with isolated_rng(9):
        b, history_b = fit_noisy(toy, 1)
    c, _ = fit_noisy(toy, 2)
    assert same(a, b)
    assert history_a == history_b
    assert not same(a, c)


def test_global_streams_are_untouched(toy):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fit_noisy(toy, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    with pytest.raises(RuntimeError), isolated_rng(3):
        torch.randn(2) @ torch.randn(3)
    assert torch.equal(before[0], torch.get_rng_state())


def test_settings_of_torch_change_nothing(toy):
    expected, _ = train(toy)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found, _ = train(toy)
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)


def test_each_batch_has_its_own_draws(toy):
    draws = []

    def loss(x, y):
        draws.append(torch.rand(4))
        return F.mse_loss(module(x), y)

    module = network()
    train(toy, module=module, loss=loss)
    assert len({tuple(d.tolist()) for d in draws}) == 18
    assert abs(torch.cat(draws).mean() - 0.5) < 0.1


def test_mix_seed_is_splitmix64_and_orders_its_counters():
    # First outputs of the published generator for state 0.
    state = [mix_seed(k * 0x9E3779B97F4A7C15) for k in range(2)]
    assert state == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    values = {mix_seed(s, a, b) for s in range(8) for a in range(8) for b in range(8)}
    assert len(values) == 512
    assert len({value % 2**32 for value in values}) == 512
    assert mix_seed(np.int64(5), 1) == mix_seed(5, 1)


# ---- guards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_is_named_and_the_last_good_weights_return(toy, value):
    module, ends = network(), []

    def loss(x, y):
        loss.calls += 1
        return F.mse_loss(module(x), y) * (value if loss.calls == 6 + 3 else 1.0)

    loss.calls = 0
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, batch 2.*learning_rate") as caught:
        train(toy, module=module, loss=loss, callbacks=lambda *_: ends.append(weights(module)))
    assert (caught.value.epoch, caught.value.batch) == (1, 2)
    assert isinstance(caught.value, FloatingPointError)
    assert len(ends) == 1
    assert same(module, ends[0])
    assert caught.value.module is module
    assert [row["epoch"] for row in caught.value.history] == [0]


def test_a_bad_loss_comes_home_from_a_worker(toy):
    module = network()
    with pytest.raises(NonFiniteLossError) as caught:
        train(toy, module=module, loss=lambda x, y: module(x).sum() * math.nan)
    found = pickle.loads(pickle.dumps(caught.value))
    assert str(found) == str(caught.value)
    assert (found.epoch, found.batch, found.history) == (0, 0, [])
    assert same(found.module, module)


def test_a_bad_first_epoch_gives_the_start_back(toy):
    module = network()
    before = weights(module)
    with pytest.raises(NonFiniteLossError, match="epoch 0, batch 0"):
        train(toy, module=module, loss=lambda x, y: module(x).sum() * math.nan)
    assert same(module, before)


def test_bad_weights_behind_a_good_loss_are_found(toy):
    module = network()

    def ruin(step):
        if step == 5:
            module[0].weight[0, 0] = math.inf

    before = weights(module)
    with pytest.raises(NonFiniteLossError, match="a weight became inf in epoch 0"):
        train(toy, module=module, after_step=ruin)
    assert same(module, before)


def test_looking_rarely_names_the_same_batch(toy, monkeypatch):
    import diffaugkit.training as training

    class Rarely(training._Log):
        def __init__(self, every, processes):
            super().__init__(50, processes)

    fine, history = train(toy)
    monkeypatch.setattr(training, "_Log", Rarely)
    rare, rare_history = train(toy)
    assert same(fine, rare)
    assert history[-1]["loss"] == pytest.approx(rare_history[-1]["loss"], rel=1e-6)
    test_a_bad_loss_is_named_and_the_last_good_weights_return(toy, math.nan)


def test_out_of_memory_names_a_batch_size_that_fits(toy):
    module = network()
    before = weights(module)

    def loss(x, y):
        if len(x) > 11:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return F.mse_loss(module(x), y)

    with pytest.raises(MemoryError, match=r"A batch of 48 does not fit .*Try batch_size=6"):
        train(toy, module=module, loss=loss, batch_size=48)
    assert same(module, before)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_epochs": 0},
        {"accumulate": 0},
        {"learning_rate": -1.0},
        {"ema_decay": 1.0},
        {"grad_clip": 0.0},
        {"precision": "fp16"},
        {"device": "gpu"},
    ],
)
def test_wrong_parameters_are_named(toy, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        train(toy, **wrong)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="no such device here; use device='auto'"):
        resolve_device("cuda")


# ---- stopping ------------------------------------------------------------------------------------


def test_what_a_callback_adds_to_the_history_may_be_a_tensor(toy, tmp_path):
    def callback(epoch, history):
        history[-1] |= {"tensor": torch.tensor(epoch + 0.5), "array": np.float32(2), "word": "a"}

    _, history = train(toy, max_epochs=2, callbacks=callback, checkpoint_dir=tmp_path)
    added = [[row[name] for name in ("tensor", "array", "word")] for row in history]
    assert added == [[0.5, 2.0, "a"], [1.5, 2.0, "a"]]
    assert {type(value) for row in added for value in row} == {float, str}


def test_a_callback_stops(toy):
    seen = []

    def callback(epoch, history):
        seen.append((epoch, len(history)))
        return epoch == 1

    _, history = train(toy, max_epochs=5, callbacks=[callback, lambda *_: None])
    assert len(history) == 2
    assert seen == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("values", "options", "stops_after"),
    [
        ([5, 4, 3, 3, 3, 3], {"patience": 2}, 5),
        ([5, 4, 3.9, 3.8, 3.7, 3.6], {"patience": 3, "min_delta": 0.5}, 5),
        ([5, 4, 3.6, 3.2, 3.0, 2.6], {"patience": 3, "min_delta": 0.5}, None),
        ([1, 2, 3, 2, 2, 4], {"patience": 2, "mode": "max"}, 5),
        ([1, 2, 3, 2, 4, 3], {"patience": 2, "mode": "max"}, None),
        ([3, np.nan, np.nan, 1, 1, 1], {"patience": 2}, 3),
    ],
)
def test_early_stopping_waits_for_its_patience(values, options, stops_after):
    stop = EarlyStopping("score", **options)
    history = [{"epoch": n, "loss": 0.0, "score": value} for n, value in enumerate(values)]
    asks = [n for n in range(1, 7) if stop(n - 1, history[:n])]
    assert (asks[0] if asks else None) == stops_after


def test_early_stopping_in_a_fit_that_was_killed(toy, tmp_path):
    stop = EarlyStopping(patience=1, min_delta=10.0)
    first = interrupted(toy, None, callbacks=stop)
    assert len(first[2]) == 2
    with pytest.raises(Killed):
        interrupted(toy, tmp_path, at=8, callbacks=stop)
    again = interrupted(toy, tmp_path, callbacks=stop)
    assert again[3] < 12
    assert same(first[0], again[0])
    assert first[2] == again[2]


def test_early_stopping_says_what_it_cannot_see(toy):
    with pytest.warns(UserWarning, match="looks at 'accuracy', which .* has epoch, loss") as seen:
        _, history = train(toy, max_epochs=3, callbacks=EarlyStopping("accuracy", patience=1))
    assert len(history) == 3
    assert len(seen) == 1


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -1.0}, {"mode": "least"}])
def test_early_stopping_names_wrong_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EarlyStopping(**wrong)


def test_progress_bar(toy, capsys):
    train(toy, verbose=1, description="toy")
    shown = capsys.readouterr().err
    assert "toy: 100%" in shown
    assert "18/18" in shown
    assert "loss=" in shown
    train(toy)
    assert capsys.readouterr().err == ""


def test_keep_best():
    with isolated_rng(0):
        kept = KeepBest(torch.nn.Linear(2, 2))
    first = kept.network.weight.detach().clone()
    assert kept.offer(0.3)
    torch.nn.init.zeros_(kept.network.weight)
    assert not kept.offer(0.2)
    assert not kept.offer(float("nan"))
    assert torch.equal(kept.restore().weight, first)
    torch.nn.init.ones_(kept.network.weight)
    assert kept.offer(0.3)
    torch.nn.init.zeros_(kept.network.weight)
    assert (kept.restore().weight == 1).all()


# ---- precision -----------------------------------------------------------------------------------


def test_bf16_multiplies_inside_and_shows_float32_outside():
    with isolated_rng(0):
        body = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
        module = nn.ModuleDict({"body": body, "head": nn.Linear(8, 2)})
        x = torch.randn(4, 3)
    seen = []
    body[1].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    with reduced_precision(module, "bf16"):
        hidden = module["body"](x)
        out = module["head"](hidden)
        assert not torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            module["head"](hidden)
        module["head"](hidden).sum().backward()  # a call without gradients leaves none cached
    assert seen == [torch.bfloat16]
    assert hidden.dtype == out.dtype == module["head"].weight.grad.dtype == torch.float32
    plain = module["head"](module["body"](x))
    assert not torch.equal(out, plain)
    torch.testing.assert_close(out, plain, atol=0.05, rtol=0.05)
    assert "forward" not in vars(module["head"])


def test_auto_precision():
    native = resolve_precision("auto", "cpu")
    assert native in ("bf16", "fp32")
    assert resolve_precision("auto", "cpu", network(8)) == "fp32"
    assert resolve_precision("auto", "cpu", network(2**15)) == native
    assert resolve_precision("bf16", "cpu", network(8)) == "bf16"


@pytest.mark.skipif(resolve_precision("auto", "cpu") == "fp32", reason="bf16 is not native here")
def test_bf16_trains_as_fp32_does(toy):
    options = {"max_epochs": 30, "learning_rate": 0.02}
    exact, _ = train(toy, module=network(256, norm=False), **options)
    rough, history = train(toy, module=network(256, norm=False), precision="bf16", **options)
    assert all(value.dtype == torch.float32 for value in rough.parameters())
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    torch.testing.assert_close(rough(toy[0]), exact(toy[0]), atol=0.3, rtol=0.3)


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (10, 5, [5, 5]),
        (11, 5, [5, 6]),
        (12, 5, [5, 5, 2]),
        (3, 300, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_sizes_of_batches(n, size, expected):
    batches = make_batches(torch.arange(n), batch_size=size, device="cpu")
    seen = [batch for (batch,) in batches.epoch(0)]
    assert [len(batch) for batch in seen] == expected
    assert batches.steps_per_epoch == len(expected)
    assert sorted(torch.cat(seen).tolist()) == list(range(n))


def test_a_batch_without_rows_for_each_process_is_refused(monkeypatch):
    monkeypatch.setattr(batches_file, "process_rank", lambda: (1, 2))
    batches = make_batches(torch.arange(6), batch_size=2, device="cpu")
    assert [len(batch) for (batch,) in batches.epoch(0)] == [1, 2]
    alone = make_batches(torch.arange(6), batch_size=1, device="cpu")
    with pytest.raises(ValueError, match=r"batch of 1 rows .* among 2 processes"):
        _ = alone.steps_per_epoch


class Disk:
    """Rows that are read from elsewhere, in blocks."""

    resident = False

    def __init__(self, X, shuffle_block=1):
        self.X, self.shuffle_block, self.shape, self.reads = X, shuffle_block, X.shape, []

    def __len__(self):
        return len(self.X)

    def __getitem__(self, index):
        self.reads.append(np.asarray(index))
        return self.X[torch.as_tensor(index)]


@pytest.mark.parametrize("block", [1, 4])
def test_read_rows_stay_aligned_and_resume_anywhere(block):
    X = torch.arange(103.0)[:, None] * torch.ones(1, 2)
    disk = Disk(X, block)
    batches = make_batches(disk, np.arange(103), None, batch_size=10, seed=3, device="cpu")
    full = list(batches.epoch(1))
    assert all(torch.equal(x[:, 0], i.float()) and none is None for x, i, none in full)
    assert sorted(torch.cat([i for _, i, _ in full]).tolist()) == list(range(103))
    for start in (0, 1, 4, 5, 10):
        rest = list(batches.epoch(1, start))
        assert len(rest) == len(full) - start
        assert all(torch.equal(a[1], b[1]) for a, b in zip(rest, full[start:], strict=True))
    other = torch.cat([i for _, i, _ in batches.epoch(2)])
    assert not torch.equal(other, torch.cat([i for _, i, _ in full]))


def test_blocks_of_the_disk_are_read_once():
    disk = Disk(torch.arange(128.0)[:, None], 4)
    list(make_batches(disk, batch_size=8, device="cpu").epoch(0))
    assert len(disk.reads) == 4  # windows of 32 rows
    for read in disk.reads:
        assert len(np.unique(read // 4)) == 8
        assert not np.array_equal(np.sort(read), read)


def test_rows_of_the_gate():
    data = pytest.importorskip("diffaugkit.rows")
    import scipy.sparse as sp

    X = np.random.default_rng(0).poisson(0.5, (20, 4)).astype(np.float32)
    dense = make_batches(data.DenseRows(X), batch_size=6, device="cpu")
    assert dense.sources[0].data_ptr() == X.ctypes.data
    sparse = make_batches(data.SparseRows(sp.csr_array(X)), batch_size=6, device="cpu")
    for (a,), (b,) in zip(dense.epoch(0), sparse.epoch(0), strict=True):
        assert torch.equal(a, b)
    assert dense.fingerprint() == sparse.fingerprint()


def test_the_thread_that_reads_ahead_keeps_order_and_errors():
    from diffaugkit.batches import _ahead

    def batches():
        yield from ((k,) for k in range(5))
        raise OSError("disk")

    seen = []

    def collect():
        for (k,) in _ahead(batches()):
            seen.append(k)

    with pytest.raises(OSError, match="disk"):
        collect()
    assert seen == list(range(5))


@pytest.mark.parametrize(
    ("n_threads", "used", "warns"),
    [
        (2, (12.0, 4.0, 600), True),
        (1, (12.0, 4.0, 600), False),
        (2, (12.0, 11.9, 600), False),  # interrupted, but never for long
        (2, (12.0, 4.0, 10), False),  # waits for the disk
        (2, (8.0, 2.0, 600), False),  # too early to tell
        (2, None, False),  # a system that does not count
    ],
)
def test_work_on_the_same_cores_is_warned_of_once(toy, monkeypatch, n_threads, used, warns):
    times = iter([(0.0, 0.0, 0), used, used, used] if used else [None] * 4)
    monkeypatch.setattr(runtime, "_time_of_thread", lambda: next(times))
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(toy)
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(said) == warns
    if warns:
        assert "leaves the fit 33% of one" in said[0]
        assert "OMP_NUM_THREADS=1" in said[0]


def test_misaligned_sources_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 5\]"):
        make_batches(torch.zeros(4, 1), torch.zeros(5), batch_size=2, device="cpu")
    with pytest.raises(ValueError, match="batch_size=0"):
        make_batches(torch.zeros(4, 1), batch_size=0, device="cpu")


# ---- resume --------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


OPTIONS = {"max_epochs": 4, "ema_decay": 0.9, "warmup": 3, "grad_clip": 1.0, "weight_decay": 0.1}


def interrupted(toy, folder, at=None, **options):
    """Fit with a stop before the loss of batch `at` of this process."""
    module = network()
    inner = noisy(module)

    def loss(x, y):
        loss.calls += 1
        if loss.calls - 1 == at:
            raise Killed
        return inner(x, y)

    loss.calls = 0
    result, history = train(
        toy, module=module, loss=loss, checkpoint_dir=folder, **OPTIONS | options
    )
    return result, module, history, loss.calls


@pytest.mark.parametrize("at", [0, 5, 6, 11, 23])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(toy, tmp_path, at, accumulate):
    options = {"accumulate": accumulate, "checkpoint_every_steps": 2}
    whole = interrupted(toy, None, **options)
    with pytest.raises(Killed):
        interrupted(toy, tmp_path, at, **options)
    rest = interrupted(toy, tmp_path, **options)
    assert rest[3] - 1 <= 24 - at + 3  # it did go on
    assert same(whole[0], rest[0])
    assert same(whole[1], rest[1])
    assert whole[2] == rest[2]


def test_resume_is_exact_where_weights_are_channels_last(tmp_path):
    # A fused optimiser walks weights and moments side by side as they lie in memory, and a file
    # holds the moments in plain order.
    X = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def fit(folder=None, callbacks=None):
        with isolated_rng(0):
            module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 2))
        module.to(memory_format=torch.channels_last)
        batches = make_batches(X, batch_size=8, seed=0, device="cpu")
        options = {"max_epochs": 4, "learning_rate": 0.01, "precision": "fp32", "device": "cpu"}
        return fit_loop(
            module,
            lambda x: (module(x) - x.mean()).square().mean(),
            batches,
            checkpoint_dir=folder,
            callbacks=callbacks,
            **options,
        )[0]

    def stop(epoch, _):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop)
    assert same(fit(tmp_path), fit())


def test_a_finished_checkpoint_is_returned_at_once(toy, tmp_path):
    first = interrupted(toy, tmp_path)
    again = interrupted(toy, tmp_path, at=0)
    assert again[3] == 0
    assert same(first[0], again[0])
    assert first[2] == again[2]


def test_a_stopped_fit_is_a_finished_one(toy, tmp_path):
    def stops(epoch, history):
        return epoch == 1

    first = interrupted(toy, tmp_path, callbacks=stops)
    again = interrupted(toy, tmp_path, at=0, callbacks=stops)
    assert len(again[2]) == 2
    assert same(first[0], again[0])
    # Without the callback it goes on to its end.
    whole, rest = interrupted(toy, None), interrupted(toy, tmp_path)
    assert same(whole[0], rest[0])
    assert whole[2] == rest[2]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 0.02}, r"learning_rate \(0.01 there, 0.02 here\)"),
        ({"max_epochs": 5}, "max_epochs"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 16}, "batch_size"),
        ({"order_seed": 1}, "order_seed"),
    ],
)
def test_another_configuration_is_refused(toy, tmp_path, changed, named):
    interrupted(toy, tmp_path)
    with pytest.raises(ValueError, match=rf"another fit.*{named}.*Choose another checkpoint_dir"):
        interrupted(toy, tmp_path, **changed)


def test_other_data_and_other_weights_are_refused(toy, tmp_path):
    train(toy, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="differs in data"):
        train((toy[0].flip(0), toy[1]), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="differs in initial_weights"):
        train(toy, module=network(seed=1), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="differs in parameters"):
        train(toy, module=network(8), checkpoint_dir=tmp_path)


def test_ctrl_c_keeps_the_checkpoint(toy, tmp_path):
    def stop(epoch, history):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(toy, tmp_path, callbacks=stop)
    whole, rest = interrupted(toy, None), interrupted(toy, tmp_path)
    assert same(whole[0], rest[0])
    assert whole[2] == rest[2]


KILLED = """
    import os, random, signal, sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    import test_training as t

    toy = (torch.linspace(-1, 1, 144).reshape(48, 3), torch.linspace(0, 1, 48)[:, None])

    def child(folder, out, kill):
        # Forked, as torch takes seconds to import. A kill hits a step or a call of a checkpoint.
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        try:
            module = t.network()
            inner, steps = t.noisy(module), [0]

            def die_at(kind, call):
                def run(*args, **kwargs):
                    steps[0] += kind == kill[0]
                    if steps[0] == kill[1]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)
                return run

            os.replace, os.fsync = die_at("replace", os.replace), die_at("fsync", os.fsync)
            result, history = t.train(
                toy, module=module, loss=die_at("step", inner), checkpoint_dir=folder,
                checkpoint_every_steps=2, **t.OPTIONS)
            tensors = [*module.state_dict().items(), *result.state_dict().items()]
            out.write_text(repr([(k, v.tolist()) for k, v in tensors]) + repr(history))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)

    base = Path({base!r})
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all children
    import tqdm.auto
    never = ("", -1)
    assert child(None, base / "whole", never) == 0
    random.seed(0)
    kills = [("step", s) for s in random.sample(range(1, 25), {n})]
    kills += [("replace", random.randint(1, 30)), ("fsync", random.randint(1, 50))]
    for number, kill in enumerate(kills):
        folder, out = base / f"fit{{number}}", base / f"out{{number}}"
        assert child(folder, out, kill) == signal.SIGKILL, kill
        child(folder, out, ("step", 3))
        assert child(folder, out, never) == 0, kill
        assert out.read_text() == (base / "whole").read_text(), kill
    print("equal", len(kills))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_steps_ends_bit_for_bit_equal(tmp_path):
    script = textwrap.dedent(KILLED).format(
        root=str(ROOT), tests=str(ROOT / "tests"), base=str(tmp_path), n=8
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal 10" in done.stdout


def run_python(script, **env):
    return finish(start_python(script, **env))


def start_python(script, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# ---- several processes ---------------------------------------------------------------------------

TOGETHER = """
    import sys
    sys.path[:0] = [{tests!r}]
    import torch
    import test_training as t

    torch.manual_seed({rank})
    toy = (torch.linspace(-1, 1, 144).reshape(48, 3).cos(), torch.linspace(0, 1, 48)[:, None])
    for norm, accumulate in ((False, 2), (True, 1)):
        module, history = t.train(
            toy, module=t.network(norm=norm, n_out=1), ema_decay=0.5, accumulate=accumulate,
            max_epochs=2, checkpoint_dir={folder!r} + str(norm), callbacks=lambda e, h: False)
        state = [v.double().sum().item() for v in module.state_dict().values()]
        print(state, [row["loss"] for row in history])
    assert torch.initial_seed() == {rank}
"""


def test_two_processes_train_as_one_and_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    scripts = [
        textwrap.dedent(TOGETHER).format(
            tests=str(ROOT / "tests"), rank=rank, folder=str(tmp_path / name)
        )
        for rank, name in ((0, "two"), (1, "two"), (0, "one"))
    ]
    ranks = [
        start_python(scripts[rank], RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in (0, 1)
    ]
    zero, one = map(finish, ranks)
    assert zero.returncode == one.returncode == 0, zero.stderr[-2000:] + one.stderr[-2000:]
    assert zero.stdout == one.stdout
    alone = run_python(scripts[2])
    # Without batch statistics the gradient of two halves is the gradient of the whole.
    together, single = (
        json.loads(text.splitlines()[0].replace("] [", ", "))
        for text in (zero.stdout, alone.stdout)
    )
    assert together == pytest.approx(single, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("answer", [None, 3, "text", 0.5, np.ones(2), [True]])
def test_only_true_stops(toy, answer):
    assert len(train(toy, callbacks=lambda *_: answer)[1]) == 3
    assert len(train(toy, callbacks=lambda *_: np.True_)[1]) == 1


def test_bf16_in_threads_leaves_the_module_as_it_was():
    with isolated_rng(0):
        module = torch.nn.Sequential(
            torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 4)
        )
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def predict(_):
        with reduced_precision(module, "bf16"), torch.no_grad():
            out = module(x)
            time.sleep(0.001)
            return out, module[0](x)

    alone = predict(0)
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(predict, range(40)):
            for a, b in zip(alone, together, strict=True):
                assert b.dtype == torch.float32
                assert torch.equal(a, b)
    assert not any("forward" in vars(part) for part in module.modules())


def test_fits_in_threads_repeat():
    def draw(_):
        with isolated_rng(0):
            first = torch.rand(3)
            time.sleep(0.001)
            return torch.cat([first, torch.rand(3)])

    with ThreadPoolExecutor(4) as pool:
        for drawn in pool.map(draw, range(20)):
            assert torch.equal(drawn, draw(0))
