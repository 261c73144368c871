"""The one training loop: every estimator that learns by gradients hands it a module and a loss.

What the loop promises beside a falling loss:

- **The caller's random streams stay untouched**, and a refit is bit-equal: the default generators
  are forked, and before batch k they are seeded with a hash of (seed, k). No random state is kept.
- **Resume is exact**: a killed run that starts again from ``checkpoint_dir`` ends with the bits of
  an unbroken one, on the same machine, because weights, average, optimiser and counters are all the
  state there is.
- **A fit never ends in rubbish**: a loss or a weight that is not finite stops it and puts the last
  good weights back.

Devices and processes are accelerate's: a script started by ``accelerate launch`` or ``torchrun``
trains on all of them. A process on its own needs none of it and goes without.
"""

import contextlib
import copy
import math
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffaugkit.arrays import warn
from diffaugkit.persistence import (
    ModelFileError,
    check_target,
    fingerprint,
    read_folder,
    write_folder,
)
from diffaugkit.runtime import (
    SharedCores,
    all_processes,
    isolated_rng,
    mix_seed,
    progress_bar,
    reduced_precision,
    resolve_device,
    resolve_precision,
    seed_generators,
    tf32,
)

__all__ = [
    "EarlyStopping",
    "KeepBest",
    "NonFiniteLossError",
    "auto_epochs",
    "fit_loop",
    "scheduled_rate",
]

# The stream of a seed from which batches draw; `batches` has another.
_STEP = 1
# That from which validation draws, the same in each epoch.
_VALIDATION = 5
# On an accelerator every look at a loss waits for the device, so it happens this often.
_LOOK_EVERY = 50
# A killed fit loses no more work than this, however long an epoch is.
_CHECKPOINT_SECONDS = 600.0


class NonFiniteLossError(FloatingPointError):
    """The loss or the weights became NaN or infinite; the module holds the last good weights.

    Parameters
    ----------
    message : str
        What happened, and what to change.
    epoch : int
        Epoch of the first bad value, from 0.
    batch : int or None, default=None
        Batch of the first bad value within that epoch, from 0; None if only the weights showed it.

    Attributes
    ----------
    module : nn.Module or None
        What was trained, with the weights of the end of the epoch before. The estimator whose
        ``fit`` failed is as it was before the call.
    history : list of dict
        Whole epochs until then.
    """

    def __init__(self, message, epoch, batch=None):
        super().__init__(message)
        self.epoch = epoch
        self.batch = batch
        self.module, self.history = None, []

    def __reduce__(self):  # noqa: D105
        # From the worker of a parallel search it comes home pickled.
        return type(self), (*self.args, self.epoch, self.batch), vars(self)


# ---- when to stop --------------------------------------------------------------------------------


@dataclass(frozen=True)
class EarlyStopping:
    """Callback that stops a fit, or the phase that is running, when a number no longer gets better.

    It looks at the history alone and keeps no state, so a fit that was killed and goes on from its
    ``checkpoint_dir`` stops at the same epoch. The learning rate falls over all of `max_epochs`: a
    fit that stops early ends at a higher rate than one of fewer epochs does. A model keeps the
    weights of the last epoch; segmenters, detectors and ``AttentionMILClassifier`` keep those of
    the best where they validate.

    Parameters
    ----------
    monitor : str, default="loss"
        Column of ``history_``: "loss", "validation_loss" where `validation_fraction` holds
        rows or bags out, "validation_dice" of a segmenter, or what another callback
        that stands before this one in the list adds to ``history[-1]``. A phase whose history
        lacks it is not stopped, which a warning says.
    patience : int, default=10
        Epochs in a row without a better value after which the fit stops, at least 1. Means over an
        epoch are noisy where it has few batches.
    min_delta : float, default=0.0
        By how much a value must be better to count, at least 0, in units of the column.
    mode : {"min", "max"}, default="min"
        Whether smaller or larger is better.

    Raises
    ------
    ValueError
        If a parameter is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit import EarlyStopping, SelfSupervisedEncoder
    >>> X = np.random.default_rng(0).normal(size=(60, 8))
    >>> stop = EarlyStopping(patience=2, min_delta=100.0)
    >>> encoder = SelfSupervisedEncoder(max_epochs=50, callbacks=[stop], random_state=0).fit(X)
    >>> encoder.n_iter_
    3
    """

    monitor: str = "loss"
    patience: int = 10
    min_delta: float = 0.0
    mode: str = "min"

    def __post_init__(self):  # noqa: D105
        if self.patience < 1:
            raise ValueError(f"patience={self.patience!r}: must be at least 1.")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta={self.min_delta!r}: must be at least 0.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r} is not known; use 'min' or 'max'.")

    def __call__(self, epoch, history):
        """Whether to stop after epoch number `epoch`, given the rows of the history until then."""
        values = [row[self.monitor] for row in history if self.monitor in row]
        if not values:
            if len(history) == 1:
                warn(
                    f"EarlyStopping looks at {self.monitor!r}, which this history lacks; it has "
                    f"{', '.join(history[0])}. This phase runs to its end."
                )
            return False
        sign = 1.0 if self.mode == "min" else -1.0
        best, since = math.inf, 0
        for value in values:
            if sign * value < best - self.min_delta:
                best, since = sign * value, 0
            else:
                since += 1
        return since >= self.patience


class KeepBest(nn.Module):
    """A network and the weights with which it scored best, as buffers: a checkpoint holds both.

    Parameters
    ----------
    network : nn.Module
        What is trained.

    Examples
    --------
    >>> import torch
    >>> kept = KeepBest(torch.nn.Linear(1, 1))
    >>> kept.offer(0.5)
    True
    >>> before = kept.network.weight.item()
    >>> _ = torch.nn.init.zeros_(kept.network.weight)
    >>> kept.offer(0.4), kept.restore().weight.item() == before
    (False, True)
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        # No infinity: the loop refuses tensors that are not finite.
        self.register_buffer("best_score", torch.tensor(-1.0))
        for number, tensor in enumerate(network.state_dict().values()):
            self.register_buffer(f"best_{number}", tensor.detach().clone())

    def forward(self, *args):
        """Call the network."""
        return self.network(*args)

    @torch.no_grad()
    def offer(self, score):
        """Keep the present weights if no `score` so far, all of them above -1, was higher; say so.

        Of equal ones the last is kept: where nothing was found yet, later weights know more.
        """
        if not score >= self.best_score:
            return False
        self.best_score.fill_(score)
        for number, tensor in enumerate(self.network.state_dict().values()):
            getattr(self, f"best_{number}").copy_(tensor)
        return True

    @torch.no_grad()
    def restore(self):
        """Put the best weights into the network, and return it."""
        for number, tensor in enumerate(self.network.state_dict().values()):
            tensor.copy_(getattr(self, f"best_{number}"))
        return self.network


# ---- schedule and averages -----------------------------------------------------------------------


def auto_epochs(max_epochs, steps_per_epoch, *, paper=330, most_steps=1_000):
    """Epochs of a phase: the paper's, or as many as make `most_steps` batches, at least 10."""
    if max_epochs != "auto":
        return max_epochs
    return max(10, min(paper, -(-most_steps // steps_per_epoch)))


def scheduled_rate(step, n_steps, learning_rate, *, warmup=0):
    """Learning rate of one optimiser step, in closed form.

    Linear warm-up, ``rate * (step + 1) / warmup``, then half a cosine down to zero (Loshchilov and
    Hutter 2017, "SGDR", equation 5, one period). A function of the step has no state to save.

    Parameters
    ----------
    step : int
        Step, from 0 to ``n_steps - 1``.
    n_steps : int
        Steps of the whole fit.
    learning_rate : float
        Rate at the end of the warm-up.
    warmup : int or float, default=0
        Steps of warm-up, or their share of `n_steps` if between 0 and 1.

    Returns
    -------
    rate : float

    Examples
    --------
    >>> from diffaugkit.training import scheduled_rate
    >>> [round(scheduled_rate(step, 6, 1.0, warmup=2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    n_warmup = round(warmup * n_steps) if 0 < warmup < 1 else int(warmup)
    if step < n_warmup:
        return learning_rate * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(n_steps - n_warmup, 1)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class _Average(nn.Module):
    """Exponential moving average of weights and statistics whose decay warms up.

    After update t = 1, 2, ... the decay is min(decay, (1 + t) / (10 + t)); update 0 copies. Buffers
    of integers (counters) are copied. torch's ``AveragedModel`` sends its count to the device at
    every update, which waits for a GPU.
    """

    def __init__(self, module, decay):
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module, n_updates):
        weight = 1 - min(self.decay, (1 + n_updates) / (10 + n_updates)) if n_updates else 1.0
        averages, currents = ([*m.parameters(), *m.buffers()] for m in (self.module, module))
        floats, counters = [], []
        for pair in zip(averages, currents, strict=True):
            (floats if pair[0].is_floating_point() else counters).append(pair)
        if floats:
            torch._foreach_lerp_(*zip(*floats, strict=True), weight)
        if counters:
            torch._foreach_copy_(*zip(*counters, strict=True))


# ---- the loop ------------------------------------------------------------------------------------


def fit_loop(
    module,
    loss_fn,
    batches,
    *,
    max_epochs,
    learning_rate,
    weight_decay=0.0,
    final_weight_decay=None,
    warmup=0,
    ema_decay=None,
    grad_clip=None,
    clip_each=False,
    accumulate=1,
    precision="auto",
    device="auto",
    compile=False,
    seed=0,
    after_step=None,
    validation=None,
    callbacks=(),
    checkpoint_dir=None,
    checkpoint_every_steps=None,
    identity=None,
    verbose=0,
    description="",
):
    """Train a module with AdamW.

    Parameters
    ----------
    module : nn.Module
        What is trained, in place. Everything that changes during the fit must be a parameter or a
        buffer of it (a teacher, a centre): nothing else is in a checkpoint.
    loss_fn : callable
        ``loss_fn(*batch)`` -> scalar Tensor, or a dict with the key "loss" whose other entries
        (scalars) are logged. It calls the module or parts of it, gets float32 back at any
        precision, and draws with ``torch.rand`` and its kin as it likes, from no other stream.
    batches : Batches
        From :func:`~diffaugkit.batches.make_batches`, or any object with ``steps_per_epoch`` and
        ``epoch(e, start=0)`` -> iterator of tuples of tensors, a pure function of e.
    max_epochs : int
        Passes over the data.
    learning_rate : float
        Rate after the warm-up, see :func:`scheduled_rate`.
    weight_decay : float, default=0.0
        Decoupled decay (Loshchilov and Hutter 2019) of matrices and filters; biases and gains, the
        parameters with fewer than two dimensions, are spared.
    final_weight_decay : float or None, default=None
        Decay of the last step, reached from `weight_decay` along half a cosine (DINO: 0.04 to 0.4).
    warmup : int or float, default=0
        Optimiser steps of linear warm-up, or their share of all steps if between 0 and 1.
    ema_decay : float or None, default=None
        Decay of an exponential moving average of the weights, which is then what is returned.
        Update t = 1, 2, ... takes min(ema_decay, (1 + t) / (10 + t)), so that short fits forget the
        start; update 0 copies. Floating-point buffers are averaged alike.
    grad_clip : float or None, default=None
        Largest 2-norm of the gradient.
    clip_each : bool, default=False
        Bound the norm of each parameter's gradient instead of that of all together, as DINO does.
    accumulate : int, default=1
        Batches whose mean gradient makes one optimiser step.
    precision : {"auto", "bf16", "fp32"}, default="auto"
        See :func:`reduced_precision`. Weights, optimiser and losses are float32 always.
    device : str or torch.device, default="auto"
        See :func:`resolve_device`.
    compile : bool, default=False
        Compile the module's forward with ``torch.compile``.
    seed : int, default=0
        Seed of all that is drawn: batch k sees the default generators at a hash of (seed, k).
    after_step : callable or None, default=None
        ``after_step(step)`` after each optimiser step, from 0, without gradients.
    validation : Batches or None, default=None
        Held-out rows: the loss on them, in evaluation mode, with the average where `ema_decay` is
        given and with the same draws each time, goes into the history after each epoch, before the
        callbacks see it. Nothing of the fit is moved by it.
    callbacks : callable, iterable of callables or None, default=()
        ``callback(epoch, history)`` after each epoch; True stops the fit.
    checkpoint_dir : str, path-like or None, default=None
        Folder whose sub-folder ``training`` holds the newest checkpoint. A fit that finds one of
        the same configuration, data and initial weights goes on from it, and returns at once if it
        was finished. One that a callback stopped goes on where no callback is given any more.
    checkpoint_every_steps : int or None, default=None
        Optimiser steps between checkpoints within an epoch, beside those at its end. In one process
        there is one every ten minutes anyway.
    identity : dict or None, default=None
        What else tells this fit from others (what the loss depends on beside module and batches),
        as values of JSON: a checkpoint is taken up only where it is the same.
    verbose : int, default=0
        From 1 on a progress bar.
    description : str, default=""
        Label of the bar.

    Returns
    -------
    module : nn.Module
        The module, or the average where `ema_decay` is given; on the device, in evaluation mode.
    history : list of dict
        One per epoch: "epoch", "loss" (mean over the batches), "learning_rate" (of the last step)
        and whatever else the loss logged; "validation_loss" where `validation` is given.

    Raises
    ------
    NonFiniteLossError
        If the loss or a weight is NaN or infinite; the module gets the weights of the last epoch's
        end, or of the start, back.
    ValueError
        If a parameter is out of range, or `checkpoint_dir` holds another fit.
    MemoryError
        If a batch does not fit; the message names a size that does.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.batches import make_batches
    >>> from diffaugkit.training import fit_loop
    >>> X = torch.linspace(-1, 1, 40)[:, None]
    >>> line = torch.nn.Linear(1, 1)
    >>> batches = make_batches(X, 2 * X + 1, batch_size=10, device="cpu")
    >>> def loss(x, y):
    ...     return torch.nn.functional.mse_loss(line(x), y)
    >>> line, history = fit_loop(
    ...     line, loss, batches, max_epochs=100, learning_rate=0.1, device="cpu", precision="fp32"
    ... )
    >>> round(line.weight.item(), 2), round(line.bias.item(), 2), len(history)
    (2.0, 1.0, 100)
    """
    device = resolve_device(device)
    precision = resolve_precision(precision, device, module)
    settings = {
        "max_epochs": max_epochs,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "final_weight_decay": final_weight_decay,
        "warmup": warmup,
        "ema_decay": ema_decay,
        "grad_clip": grad_clip,
        "clip_each": clip_each,
        "accumulate": accumulate,
        "precision": precision,
        "seed": seed,
    }
    _check_settings(settings)
    callbacks = [callbacks] if callable(callbacks) else list(callbacks or ())

    with isolated_rng(seed, device), tf32(device), contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # whatever the caller's notebook is set to
        processes = stack.enter_context(all_processes(device))
        module.to(device)
        step_module = processes.prepare(_Step(module, loss_fn))
        steps_per_epoch = batches.steps_per_epoch
        updates_per_epoch = -(-steps_per_epoch // accumulate)
        n_updates = max_epochs * updates_per_epoch
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = _adamw(parameters, max(weight_decay, final_weight_decay or 0.0), device)
        average = None if ema_decay is None else _Average(module, ema_decay)
        every = 1 if device.type == "cpu" and processes.world == 1 else _LOOK_EVERY
        log = _Log(every, processes)
        state = _State(module, average, optimizer, log)
        if checkpoint_dir is not None:
            settings |= {"steps_per_epoch": steps_per_epoch, "processes": processes.world}
            if validation is not None:
                settings["held_out"] = validation.fingerprint()
            settings = {**(identity or {}), **settings}
            state.open(Path(checkpoint_dir).expanduser() / "training", settings, batches)
            if state.stopped and all(getattr(c, "never_stops", False) for c in callbacks):
                state.finished = state.epoch == max_epochs  # nobody asks to stop any more
        if validation is not None:
            _ = validation.steps_per_epoch  # refuses too few rows for the processes, before work
        good = _Snapshot(module)
        if compile:
            module.compile()
        stack.enter_context(reduced_precision(module, precision, device))
        bar = stack.enter_context(
            progress_bar(verbose, max_epochs * steps_per_epoch, description, "batch")
        )
        bar.update(state.epoch * steps_per_epoch + state.batch)
        cores = SharedCores(device)
        batch = None

        try:
            while not state.finished:
                module.train()
                for batch in batches.epoch(state.epoch, start=state.batch):
                    # fetch the batch
                    batch = _on_device(batch, device)
                    position = state.epoch * steps_per_epoch + state.batch
                    seed_generators(mix_seed(seed, _STEP, position, processes.rank), device)

                    # forward
                    in_group = state.batch % accumulate
                    group = min(accumulate, steps_per_epoch - state.batch + in_group)
                    closes = in_group + 1 == group
                    with contextlib.nullcontext() if closes else processes.no_sync(step_module):
                        losses = step_module(*batch)
                        log.add(losses, state.epoch, state.batch)

                        # backward
                        loss = losses["loss"]
                        processes.backward(loss if group == 1 else loss / group)
                    state.batch += 1
                    bar.update()
                    if not closes:
                        continue

                    # step
                    rate = scheduled_rate(state.step, n_updates, learning_rate, warmup=warmup)
                    for param_group in optimizer.param_groups:
                        param_group["lr"] = rate
                    if final_weight_decay is not None:
                        # The first group is what decays, also where its decay is 0 as yet.
                        decay = scheduled_rate(
                            state.step, n_updates, weight_decay - final_weight_decay
                        )
                        optimizer.param_groups[0]["weight_decay"] = final_weight_decay + decay
                    if grad_clip is not None:
                        _clip(parameters, grad_clip, each=clip_each)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if after_step is not None:
                        with torch.no_grad():
                            after_step(state.step)

                    # average weights
                    if average is not None:
                        average.update(module, state.step)
                    state.step += 1
                    due = checkpoint_every_steps and state.step % checkpoint_every_steps == 0
                    if state.batch < steps_per_epoch and (due or state.is_old(processes)):
                        log.look()
                        good.check(state.epoch)
                        state.save(processes)

                # log
                means = log.close()
                good.check(state.epoch)
                good.take()
                cores.look()
                state.history.append({"epoch": state.epoch, **means, "learning_rate": rate})
                if validation is not None:
                    live = module if average is None else average.module
                    state.history[-1]["validation_loss"] = _loss_on(
                        validation, loss_fn, module, live, good, seed, processes
                    )
                bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)

                # stop?
                state.epoch, state.batch = state.epoch + 1, 0
                stops = [_asks_to_stop(c(state.epoch - 1, state.history)) for c in callbacks]
                state.history[-1] = {k: _number(v) for k, v in state.history[-1].items()}
                state.stopped = processes.any(stops)
                state.finished = state.epoch == max_epochs or state.stopped
                state.save(processes)
        except Exception as error:
            if isinstance(error, NonFiniteLossError):
                good.restore()
                error.module, error.history = module, state.history
            if batch is None or not _is_out_of_memory(error):
                raise
            message = _what_fits(step_module, batch, error, device, processes.world)
            good.restore()
            raise MemoryError(message) from None

        result = module if average is None else average.module
        # Statistics follow the rows that a process saw: all take home those of the first.
        processes.share(module.buffers())
        if average is not None:
            processes.share(result.buffers())

    result.eval()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result, state.history


def _check_settings(settings):
    for name, low in (("max_epochs", 1), ("accumulate", 1), ("learning_rate", 0), ("warmup", 0)):
        if not settings[name] >= low:
            raise ValueError(f"{name}={settings[name]!r} must be at least {low}.")
    if settings["ema_decay"] is not None and not 0 <= settings["ema_decay"] < 1:
        raise ValueError(f"ema_decay={settings['ema_decay']!r} must be in [0, 1) or None.")
    if settings["grad_clip"] is not None and not settings["grad_clip"] > 0:
        raise ValueError(f"grad_clip={settings['grad_clip']!r} must be positive or None.")


class _Step(nn.Module):
    """Module and loss as one forward: what a wrapper for several processes has to see."""

    def __init__(self, module, loss_fn):
        super().__init__()
        self.module = module
        self._loss_fn = loss_fn

    def forward(self, *batch):
        losses = self._loss_fn(*batch)
        return losses if isinstance(losses, dict) else {"loss": losses}


@torch.no_grad()
def _loss_on(batches, loss_fn, module, weights, good, seed, processes):
    """Mean loss of held-out rows under given weights; `good` holds the module's own, put back."""
    try:
        if weights is not module:
            there, here = ([*m.parameters(), *m.buffers()] for m in (module, weights))
            torch._foreach_copy_([tensor.detach() for tensor in there], here)
        module.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for number, batch in enumerate(batches.epoch(0)):
            batch = _on_device(batch, batches.device)
            seed_generators(mix_seed(seed, _VALIDATION, number, processes.rank), batches.device)
            losses = loss_fn(*batch)
            loss = losses["loss"] if isinstance(losses, dict) else losses
            sums += len(batch[0]) * torch.tensor([loss.item(), 1.0], dtype=torch.float64)
    finally:
        # Also what a loss moves beside weights, such as a queue, a centre or running statistics.
        good.restore()
    total, n = processes.mean(sums.to(batches.device, torch.float32)).tolist()
    return total / n


def _on_device(batch, device):
    return [
        value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and value.device != device
        else value
        for value in batch
    ]


def _adamw(parameters, weight_decay, device):
    groups = [{"params": parameters, "weight_decay": weight_decay}]
    if weight_decay:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda") or None)


def _clip(parameters, most, *, each):
    """Bound the 2-norm of the whole gradient, or of that of each parameter."""
    if not each:
        nn.utils.clip_grad_norm_(parameters, most)
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    factors = [(most / (norm + 1e-6)).clamp(max=1) for norm in torch._foreach_norm(gradients)]
    torch._foreach_mul_(gradients, factors)


def _asks_to_stop(answer):
    # True alone: what a logger or a progress bar happens to return does not.
    return bool(answer) if isinstance(answer, bool | np.bool_) else False


def _number(value):
    # What callbacks add to the history may be a tensor; a checkpoint and a table hold numbers.
    return value.item() if getattr(value, "shape", None) == () else value


# ---- losses, weights and memory under watch ------------------------------------------------------


class _Log:
    """Means of the losses of an epoch; looks at them every so many batches and stops at a NaN."""

    def __init__(self, every, processes):
        self.every, self._processes = every, processes
        self.sums, self.count = {}, 0
        self._pending = []

    def add(self, losses, epoch, batch):
        if not self._pending:
            self._keys, self._epoch, self._first = list(losses), epoch, batch
        self._pending.append([torch.as_tensor(v).detach() for v in losses.values()])
        if len(self._pending) >= self.every:
            self.look()

    def look(self):
        if not self._pending:
            return
        if self.every == 1:
            rows = [[value.item() for value in self._pending[0]]]
        else:
            device = self._pending[0][0].device
            table = torch.stack(
                [torch.stack([v.to(device).float() for v in row]) for row in self._pending]
            )
            rows = self._processes.mean(table).tolist()
        self._pending = []
        for offset, row in enumerate(rows):
            values = dict(zip(self._keys, row, strict=True))
            if not math.isfinite(values["loss"]):
                raise _not_finite("loss", values["loss"], self._epoch, self._first + offset)
            for key, value in values.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
            self.count += 1

    def close(self):
        self.look()
        means = {key: total / self.count for key, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


class _Snapshot:
    """Copy of the module's tensors at the last good moment."""

    def __init__(self, module):
        self._live = [t.detach() for t in (*module.parameters(), *module.buffers())]
        self._floats = [t for t in self._live if t.is_floating_point() and t.numel()]
        self._kept = [t.clone() for t in self._live]

    def take(self):
        torch._foreach_copy_(self._kept, self._live)

    def restore(self):
        torch._foreach_copy_(self._live, self._kept)

    def check(self, epoch):
        """Raise if a weight is not finite: its loss would only show it in the next batch."""
        sizes = torch._foreach_norm(self._floats, math.inf)
        if sizes and not math.isfinite(value := torch.stack([s.float() for s in sizes]).sum()):
            raise _not_finite("a weight", float(value), epoch)


def _not_finite(what, value, epoch, batch=None):
    where = f"epoch {epoch}" + ("" if batch is None else f", batch {batch}")
    return NonFiniteLossError(
        f"{what} became {value} in {where} (counted from 0); the weights of the end of the epoch "
        "before are in this error's `module`. Lower learning_rate, use precision='fp32', or look "
        "for extreme values in X, whose features should have a spread near 1.",
        epoch,
        batch,
    )


def _is_out_of_memory(error):
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _what_fits(step_module, batch, error, device, n_processes):
    """Try smaller parts of the batch that did not fit; say which one does."""
    reason = str(error).partition("\n")[0]
    # The frames of the failed call hold its activations.
    traceback.clear_frames(error.__traceback__)
    tried = len(next(value for value in batch if isinstance(value, torch.Tensor)))
    size = tried // 2
    while n_processes == 1 and size > 1:
        step_module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        part = [v[:size] if isinstance(v, torch.Tensor) else v for v in batch]
        try:
            step_module(*part)["loss"].backward()
            break
        except Exception as again:
            if not _is_out_of_memory(again):
                raise
            traceback.clear_frames(again.__traceback__)
        size //= 2
    step_module.zero_grad(set_to_none=True)
    return (
        f"A batch of {tried * n_processes} does not fit into the memory of {device} ({reason}). "
        f"Try batch_size={max(size, 1) * n_processes}, which needs less."
    )


# ---- checkpoints ---------------------------------------------------------------------------------


class _State:
    """All that a fit consists of between two batches, and its way to the disk and back."""

    def __init__(self, module, average, optimizer, log):
        self.epoch = self.batch = self.step = 0
        self.history = []
        self.finished = self.stopped = False
        self._module, self._average, self._optimizer, self._log = module, average, optimizer, log
        self._folder, self._saved_at = None, time.monotonic()

    def open(self, folder, settings, batches):
        """Go on from the checkpoint in the folder, if there is one."""
        self._folder = folder
        self._settings = {
            **settings,
            "parameters": {k: list(v.shape) for k, v in self._module.state_dict().items()},
            "initial_weights": fingerprint(self._module),
            **(batches.fingerprint() if hasattr(batches, "fingerprint") else {}),
        }
        if folder.is_dir():
            check_target(folder)
        if not (folder / "manifest.json").exists():
            return
        try:
            tensors, document = read_folder(folder)
        except ModelFileError as error:
            raise type(error)(f"{error}. Remove that folder to start anew.") from error
        before = document.get("settings", {})
        others = [k for k, v in self._settings.items() if k not in before or before[k] != v]
        if others:
            said = ", ".join(_difference(k, before.get(k), self._settings[k]) for k in others)
            raise ValueError(
                f"{folder} holds the checkpoint of another fit; it differs in {said}. Choose "
                "another checkpoint_dir, remove that folder, or restore the settings. (Each fold "
                "of a cross-validation is another fit: take checkpoint_dir=None there.)"
            )
        self._load(tensors, document)

    def _load(self, tensors, document):
        for name in ("epoch", "batch", "step", "history", "finished", "stopped"):
            setattr(self, name, document[name])
        self._log.sums, self._log.count = document["sums"], document["count"]
        parts = {"module": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._module.load_state_dict(parts["module"])
        if self._average is not None:
            self._average.load_state_dict(parts["average"])
        named = dict(self._module.named_parameters())
        for name, tensor in parts["optimizer"].items():
            key, _, of = name.partition(".")
            own = named[of]
            if tensor.shape == own.shape:
                # Files know no memory format, and a fused optimiser reads memory as it lies.
                tensor = torch.empty_like(own, dtype=tensor.dtype).copy_(tensor)
            self._optimizer.state[own][key] = tensor.to(own.device)

    def is_old(self, processes):
        """Whether a crash would cost too much work; processes have no clock in common."""
        if self._folder is None or processes.world > 1:
            return False
        return time.monotonic() - self._saved_at > _CHECKPOINT_SECONDS

    def save(self, processes):
        if self._folder is None:
            return
        self._saved_at = time.monotonic()
        if processes.rank == 0:
            tensors = {f"module.{k}": v for k, v in self._module.state_dict().items()}
            if self._average is not None:
                averages = self._average.state_dict()
                tensors |= {f"average.{k}": v for k, v in averages.items()}
            for name, parameter in self._module.named_parameters():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
            document = {
                "settings": self._settings,
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "history": self.history,
                "finished": self.finished,
                "stopped": self.stopped,
                "sums": self._log.sums,
                "count": self._log.count,
            }
            write_folder(self._folder, tensors, document)
        processes.wait()


def _difference(name, there, here):
    """Name what differs, down to the parameter of a part."""
    if name in ("parameters", "initial_weights", "data"):
        return name
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in here if k not in there or there[k] != here[k]] or list(there)
        return ", ".join(_difference(f"{name}.{k}", there.get(k), here.get(k)) for k in keys)
    return f"{name} ({there!r} there, {here!r} here)"
