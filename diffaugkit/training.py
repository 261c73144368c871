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
import functools
import hashlib
import math
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffaugkit.persistence import read_folder, write_folder

__all__ = [
    "Batches",
    "NonFiniteLossError",
    "fit_loop",
    "isolated_rng",
    "make_batches",
    "mix_seed",
    "process_rank",
    "reduced_precision",
    "resolve_device",
    "resolve_precision",
    "scheduled_rate",
    "take",
]

# Purposes that one seed serves: a stream of its own for each.
_STEP, _ORDER = 1, 2
# On an accelerator every look at a loss waits for the device, so it happens this often.
_LOOK_EVERY = 50
# Below this many values in matrices and filters a CPU loses time with bf16.
_SMALL_MODULE = 2**16
# Values that one read of a shuffled epoch may bring in from the disk: 256 MB of float32.
_WINDOW_VALUES = 2**26


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
    """

    def __init__(self, message, epoch, batch=None):
        super().__init__(message)
        self.epoch = epoch
        self.batch = batch


# ---- randomness ----------------------------------------------------------------------------------


def _splitmix64(value):
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def mix_seed(seed, *counters):
    """Hash a seed and counters to 64 bits, so that neighbours share nothing.

    SplitMix64 of Steele, Lea and Flood (2014), "Fast Splittable Pseudorandom Number Generators",
    figure 18, applied once per value.

    Parameters
    ----------
    seed : int
        The seed of a fit.
    *counters : int
        What the stream is for: step, rank, epoch, child number.

    Returns
    -------
    mixed : int
        In 0 to 2**64 - 1. The CPU generator of torch uses its lower half, and so does
        ``mix_seed(...) % 2**32`` where a NumPy seed is asked for.

    Examples
    --------
    >>> from diffaugkit.training import mix_seed
    >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
    (True, False)
    """
    mixed = _splitmix64(int(seed))
    for counter in counters:
        mixed = _splitmix64(mixed + int(counter))
    return mixed


def _seed_generators(seed, device):
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


@contextlib.contextmanager
def isolated_rng(seed, device="cpu"):
    """Seed torch's default generators inside, and give the caller's states back after.

    NumPy's global stream is neither read nor moved.

    Parameters
    ----------
    seed : int
        Seed of the streams inside.
    device : str or torch.device, default="cpu"
        The device whose generator is forked beside the CPU's.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.training import isolated_rng
    >>> with isolated_rng(0):
    ...     first = torch.rand(2)
    >>> with isolated_rng(0):
    ...     second = torch.rand(2)
    >>> bool((first == second).all())
    True
    """
    device = resolve_device(device)
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    devices = [_index(device)] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            _seed_generators(mix_seed(seed), device)
            yield
        finally:
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


# ---- device and precision ------------------------------------------------------------------------


def resolve_device(device="auto"):
    """Turn a device parameter into a ``torch.device``.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:<i>", "mps"} or torch.device, default="auto"
        "auto" takes CUDA, else Apple's MPS, else the CPU. In a process that a launcher started,
        "auto" and "cuda" mean the GPU of its local rank.

    Returns
    -------
    device : torch.device

    Raises
    ------
    ValueError
        If there is no such device here.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or a "
            "torch.device."
        ) from error
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(resolved.type, lambda: True)():
        raise ValueError(
            f"device={str(device)!r} was asked for, but torch sees no such device here; use "
            "device='auto' or 'cpu'."
        )
    if resolved.type == "cuda" and resolved.index is None:
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        resolved = torch.device("cuda", index)
    return resolved


def resolve_precision(precision="auto", device="cpu", module=None):
    """Turn a precision parameter into "bf16" or "fp32".

    Parameters
    ----------
    precision : {"auto", "bf16", "fp32"}, default="auto"
        "auto" takes bf16 where the device multiplies it natively: CUDA since Ampere, CPUs with
        AVX512-BF16 or AMX, where it was measured 4 to 7 times faster than fp32. Elsewhere it would
        be emulated, hence fp32.
    device : str or torch.device, default="cpu"
        Where the multiplication happens.
    module : nn.Module or None, default=None
        What multiplies, if known. On a CPU "auto" means fp32 for one of fewer than 65 536 values in
        matrices and filters: there the casts were measured to cost more than the products gain.

    Returns
    -------
    precision : {"bf16", "fp32"}

    Raises
    ------
    ValueError
        If `precision` is none of the three.
    """
    if precision in ("bf16", "fp32"):
        return precision
    if precision != "auto":
        raise ValueError(f"precision={precision!r} is not known; use 'auto', 'bf16' or 'fp32'.")
    kind = resolve_device(device).type
    if not _multiplies_bf16(kind):
        return "fp32"
    size = sum(p.numel() for p in module.parameters() if p.ndim > 1) if module else math.inf
    return "fp32" if kind == "cpu" and size < _SMALL_MODULE else "bf16"


@functools.cache
def _multiplies_bf16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


@contextlib.contextmanager
def reduced_precision(module, precision="auto", device="cpu"):
    """Let the module multiply in bf16 inside, while everything around it sees float32.

    Each outermost call, of the module or of a part of it, runs under autocast and returns float32.
    So a loss is computed in float32 without knowing, and a loss function may call parts
    (``module.head(...)``) as it likes. The casts of the weights are dropped after each call:
    autocast's cache over several calls would lose gradients after a call under ``no_grad``.

    Parameters
    ----------
    module : nn.Module
        Its forward methods are wrapped inside the context only.
    precision : {"auto", "bf16", "fp32"}, default="auto"
        With "fp32", or where "auto" means that, nothing happens.
    device : str or torch.device, default="cpu"
        Where the module lives.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.training import reduced_precision
    >>> layer = torch.nn.Linear(4, 4)
    >>> with reduced_precision(layer, "bf16"):
    ...     layer(torch.zeros(2, 4)).dtype
    torch.float32
    """
    device = resolve_device(device)
    if resolve_precision(precision, device, module) == "fp32":
        yield
        return
    inside = False

    def wrapped(forward):
        @functools.wraps(forward)
        def run(*args, **kwargs):
            nonlocal inside
            if inside or torch.is_autocast_enabled(device.type):
                return forward(*args, **kwargs)
            inside = True
            try:
                with torch.autocast(device.type, torch.bfloat16):
                    output = forward(*args, **kwargs)
            finally:
                inside = False
            return _to_float32(output)

        return run

    # Leaves deep inside are only called by their parents, and each wrapper costs a microsecond.
    children = list(module.children())
    parts = [m for m in module.modules() if m is module or m in children or any(m.children())]
    own = {part: part.__dict__.get("forward") for part in parts}
    for part in parts:
        part.forward = wrapped(part.forward)
    try:
        yield
    finally:
        for part, forward in own.items():
            if forward is None:
                del part.forward
            else:
                part.forward = forward


def _to_float32(output):
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype == torch.bfloat16 else output
    if isinstance(output, dict):
        return {key: _to_float32(value) for key, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(map(_to_float32, output))
    return output


@contextlib.contextmanager
def _tf32(device):
    """Let CUDA's float32 products use TF32 inside; the caller's setting returns after."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- batches -------------------------------------------------------------------------------------


class Batches:
    """Shuffled batches of aligned sources; epoch e is a pure function of (seed, e).

    Made by :func:`make_batches`. Under several processes each takes every ``world``-th row of the
    common batch, so `batch_size` is the size of the whole batch whatever the number of processes.

    Parameters
    ----------
    sources : list of (Tensor, Rows or None)
        Aligned by row.
    batch_size : int
        Rows of a batch.
    seed : int
        Seed of the order.
    device : torch.device
        Where the tensors of a batch lie.
    """

    def __init__(self, sources, batch_size, seed, device):
        self.sources = sources
        self.n_samples = len(sources[0])
        self.batch_size = min(int(batch_size), self.n_samples)
        self.seed = int(seed)
        self.device = device
        self._block = max((getattr(source, "shuffle_block", 1) for source in sources), default=1)
        self._reads = any(not isinstance(s, torch.Tensor) for s in sources if s is not None)

    @property
    def steps_per_epoch(self):
        """Number of batches of an epoch."""
        return len(self._bounds())

    def epoch(self, epoch, start=0):
        """Iterate over the batches of one epoch.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start : int, default=0
            Batch to begin with: what a resumed run skips is never read.

        Returns
        -------
        batches : iterator of tuples
            One tensor (B, ...) per source, None for a source that is None.
        """
        batches = self._iterate(self._order(epoch), start)
        return _ahead(batches) if self._reads and self.device.type == "cuda" else batches

    def fingerprint(self):
        """Values that tell these batches from others: sizes, seed, and a digest of some rows."""
        sample = np.linspace(0, self.n_samples - 1, min(self.n_samples, 256)).astype(np.int64)
        digest = hashlib.sha256()
        for source in self.sources:
            rows = None if source is None else take(source, torch.from_numpy(sample)).cpu()
            digest.update(repr(None if rows is None else (rows.shape, rows.dtype)).encode())
            digest.update(b"" if rows is None else rows.contiguous().view(torch.uint8).numpy())
        return {
            "n_samples": self.n_samples,
            "batch_size": self.batch_size,
            "order_seed": self.seed,
            "data": digest.hexdigest()[:16],
        }

    def _bounds(self):
        """Start and end of every batch in the order of an epoch."""
        _, world = process_rank()
        starts = list(range(0, self.n_samples, self.batch_size))
        # Batch normalisation and every contrast between samples need two rows in each process.
        if len(starts) > 1 and self.n_samples - starts[-1] < 2 * world:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.n_samples], strict=True))

    def _order(self, epoch):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, _ORDER, epoch))
        if self._block == 1:
            return torch.randperm(self.n_samples, generator=generator)
        # What comes from the disk is read in whole blocks: blocks in random order first, then rows
        # in random order within each window of several blocks.
        blocks = torch.randperm(-(-self.n_samples // self._block), generator=generator)
        order = (blocks[:, None] * self._block + torch.arange(self._block)).flatten()
        order = order[order < self.n_samples]
        size = self._window() * self.batch_size
        return torch.cat(
            [part[torch.randperm(len(part), generator=generator)] for part in order.split(size)]
        )

    def _window(self):
        """Batches per read: enough for eight blocks, within the bound on memory."""
        if self._block == 1:
            return 1
        width = sum(math.prod(s.shape[1:]) for s in self.sources if s is not None)
        fitting = _WINDOW_VALUES // max(self.batch_size * width, 1)
        return max(1, min(-(-8 * self._block // self.batch_size), fitting))

    def _iterate(self, order, start):
        rank, world = process_rank()
        bounds, step = self._bounds(), self._window()
        if not self._reads:
            order = order.to(self.device)
        while start < len(bounds):
            # A resumed epoch reads the rest of its window only.
            stop = min(start - start % step + step, len(bounds))
            parts = [order[low:high][rank::world] for low, high in bounds[start:stop]]
            sizes = [len(part) for part in parts]
            index = parts[0] if len(parts) == 1 else torch.cat(parts)
            taken = [None if s is None else self._send(take(s, index)) for s in self.sources]
            pieces = [[None] * len(sizes) if t is None else t.split(sizes) for t in taken]
            yield from zip(*pieces, strict=True)
            start = stop

    def _send(self, rows):
        if rows.device == self.device:
            return rows
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)


def make_batches(rows, *aligned, batch_size, seed=0, device="auto"):
    """Make the batches of a fit.

    Data that lie in memory as one tensor go to the device once and are indexed there; sparse and
    backed rows are made dense batch by batch, backed ones in blocks of neighbours.

    Parameters
    ----------
    rows : Rows, Tensor or ndarray of shape (n, ...)
        The samples.
    *aligned : Rows, Tensor, ndarray or None, each of shape (n, ...)
        What goes with the samples row by row: positives, embeddings, labels, row numbers. float64
        becomes float32. A None stays None in every batch, so that a loss function with an optional
        argument needs one form only.
    batch_size : int
        Rows of a batch, clipped to n; a last batch of one row joins the batch before it.
    seed : int, default=0
        Seed of the order; each epoch has its own.
    device : str or torch.device, default="auto"
        Where the loop trains.

    Returns
    -------
    batches : Batches

    Raises
    ------
    ValueError
        If the sources differ in length, or `batch_size` is below 1.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.training import make_batches
    >>> batches = make_batches(torch.zeros(7, 2), torch.arange(7), batch_size=3, device="cpu")
    >>> [len(index) for _, index in batches.epoch(0)]
    [3, 4]
    """
    device = resolve_device(device)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    sources = [_source(source) for source in (rows, *aligned)]
    lengths = [len(source) for source in sources if source is not None]
    if len(set(lengths)) != 1 or sources[0] is None:
        raise ValueError(f"Rows and what is aligned with them differ in length: {lengths}.")
    sources = [_settle(source, device) for source in sources]
    return Batches(sources, batch_size, seed, device)


def _source(source):
    if source is None or isinstance(source, torch.Tensor):
        return source
    if hasattr(source, "resident"):
        return source.tensor if source.resident else source
    return torch.as_tensor(np.asarray(source))


def _settle(source, device):
    if not isinstance(source, torch.Tensor):
        return source
    source = source.detach()
    if source.dtype == torch.float64:
        source = source.float()
    if device.type == "cuda" and not source.is_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        # The other half is for the model and its activations.
        if source.nbytes > free // 2:
            return source
    return source.to(device)


def take(source, index):
    """Read rows of a tensor or of Rows.

    Parameters
    ----------
    source : Tensor or Rows of shape (n, ...)
    index : Tensor of shape (B,), int64
        On any device.

    Returns
    -------
    Tensor of shape (B, ...)
        Where the tensor lies; on the CPU for Rows.
    """
    if isinstance(source, torch.Tensor):
        return source.index_select(0, index.to(source.device))
    return source[index.cpu().numpy()]


def _ahead(batches):
    """Fetch the next batch in a thread while the device works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


# ---- schedule and averages -----------------------------------------------------------------------


def scheduled_rate(step, n_steps, learning_rate, *, warmup=0, schedule="cosine"):
    """Learning rate of one optimiser step, in closed form.

    Linear warm-up, ``rate * (step + 1) / warmup``, then half a cosine down to zero (Loshchilov and
    Hutter 2017, "SGDR", equation 5, one period) or a constant. A function of the step has no state
    to save.

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
    schedule : {"cosine", "constant"}, default="cosine"
        What follows the warm-up.

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
    if schedule == "constant":
        return learning_rate
    progress = (step - n_warmup) / max(n_steps - n_warmup, 1)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class _Average(AveragedModel):
    """Exponential moving average of weights and statistics whose decay warms up.

    After update t = 1, 2, ... the decay is min(decay, (1 + t) / (10 + t)); the first update copies.
    Buffers of integers (counters) are copied.
    """

    def __init__(self, module, decay):
        super().__init__(module, multi_avg_fn=self._lerp, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)

    def update(self, module, n_updates):
        # Kept as a number: the tensor that torch counts with would have to come from the device.
        self._weight = 1 - min(self.decay, (1 + n_updates) / (10 + n_updates))
        self.update_parameters(module)

    @torch.no_grad()
    def _lerp(self, averages, currents, _):
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, self._weight)
        else:
            torch._foreach_copy_(averages, currents)


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
    schedule="cosine",
    ema_decay=None,
    grad_clip=None,
    clip_each=False,
    accumulate=1,
    precision="auto",
    device="auto",
    compile=False,
    seed=0,
    after_step=None,
    callbacks=(),
    patience=None,
    min_delta=0.0,
    checkpoint_dir=None,
    checkpoint_every=1,
    checkpoint_every_steps=None,
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
        From :func:`make_batches`, or any object with ``steps_per_epoch`` and
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
    schedule : {"cosine", "constant"}, default="cosine"
        Learning rate after the warm-up.
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
    callbacks : callable, iterable of callables or None, default=()
        ``callback(epoch, history)`` after each epoch; True stops the fit.
    patience : int or None, default=None
        Stop after this many epochs without a lower mean loss. The weights stay those of the last
        epoch: a loss of self-supervision is no measure by which to pick an epoch.
    min_delta : float, default=0.0
        How much lower counts as lower.
    checkpoint_dir : str, path-like or None, default=None
        Folder whose sub-folder ``training`` holds the newest checkpoint. A fit that finds one of
        the same configuration, data and initial weights goes on from it, and returns at once if it
        was finished.
    checkpoint_every : int, default=1
        Epochs between checkpoints.
    checkpoint_every_steps : int or None, default=None
        Optimiser steps between further checkpoints within an epoch.
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
        and whatever else the loss logged.

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
    >>> from diffaugkit.training import fit_loop, make_batches
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
        "schedule": schedule,
        "ema_decay": ema_decay,
        "grad_clip": grad_clip,
        "clip_each": clip_each,
        "accumulate": accumulate,
        "precision": precision,
        "seed": seed,
        "patience": patience,
        "min_delta": min_delta,
    }
    _check_settings(settings)
    callbacks = [callbacks] if callable(callbacks) else list(callbacks or ())

    with isolated_rng(seed, device), _tf32(device), contextlib.ExitStack() as stack:
        processes = stack.enter_context(_processes(device))
        module.to(device)
        step_module = processes.prepare(_Step(module, loss_fn))
        steps_per_epoch = batches.steps_per_epoch
        updates_per_epoch = -(-steps_per_epoch // accumulate)
        n_updates = max_epochs * updates_per_epoch
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = _adamw(parameters, weight_decay, device)
        average = None if ema_decay is None else _Average(module, ema_decay)
        every = 1 if device.type == "cpu" and processes.world == 1 else _LOOK_EVERY
        log = _Log(every, processes)
        state = _State(module, average, optimizer, log)
        if checkpoint_dir is not None:
            settings |= {"steps_per_epoch": steps_per_epoch, "processes": processes.world}
            state.open(Path(checkpoint_dir) / "training", settings, batches)
        good = _Snapshot(module)
        if compile:
            module.compile()
        stack.enter_context(reduced_precision(module, precision, device))
        bar = stack.enter_context(
            _bar(verbose, processes.rank, max_epochs * steps_per_epoch, description)
        )
        bar.update(state.epoch * steps_per_epoch + state.batch)
        batch = None

        try:
            while not state.finished:
                module.train()
                for batch in batches.epoch(state.epoch, start=state.batch):
                    # fetch the batch
                    batch = _on_device(batch, device)
                    position = state.epoch * steps_per_epoch + state.batch
                    _seed_generators(mix_seed(seed, _STEP, position, processes.rank), device)

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
                    rate = scheduled_rate(
                        state.step, n_updates, learning_rate, warmup=warmup, schedule=schedule
                    )
                    for param_group in optimizer.param_groups:
                        param_group["lr"] = rate
                        if final_weight_decay is not None and param_group["weight_decay"]:
                            param_group["weight_decay"] = final_weight_decay + scheduled_rate(
                                state.step, n_updates, weight_decay - final_weight_decay
                            )
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
                    if (
                        checkpoint_every_steps
                        and state.step % checkpoint_every_steps == 0
                        and state.batch < steps_per_epoch
                    ):
                        log.look()
                        good.check(state.epoch)
                        state.save(processes)

                # log
                means = log.close()
                good.check(state.epoch)
                good.take()
                state.history.append({"epoch": state.epoch, **means, "learning_rate": rate})
                bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)

                # stop?
                state.epoch, state.batch = state.epoch + 1, 0
                stops = [callback(state.epoch - 1, state.history) for callback in callbacks]
                stops.append(_has_stalled(state.history, patience, min_delta))
                state.finished = state.epoch == max_epochs or processes.any(stops)
                if state.finished or state.epoch % checkpoint_every == 0:
                    state.save(processes)
        except Exception as error:
            if isinstance(error, NonFiniteLossError):
                good.restore()
            if batch is None or not _is_out_of_memory(error):
                raise
            message = _what_fits(step_module, batch, error, device, processes.world)
            good.restore()
            raise MemoryError(message) from None

        result = module if average is None else average.module
        # Statistics follow the rows that a process saw: all take home those of the first.
        processes.share(result.buffers())

    result.eval()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result, state.history


def _check_settings(settings):
    for name, low in (("max_epochs", 1), ("accumulate", 1), ("learning_rate", 0), ("warmup", 0)):
        if not settings[name] >= low:
            raise ValueError(f"{name}={settings[name]!r} must be at least {low}.")
    if settings["schedule"] not in ("cosine", "constant"):
        raise ValueError(f"schedule={settings['schedule']!r} must be 'cosine' or 'constant'.")
    if settings["ema_decay"] is not None and not 0 <= settings["ema_decay"] < 1:
        raise ValueError(f"ema_decay={settings['ema_decay']!r} must be in [0, 1) or None.")
    for name in ("grad_clip", "patience"):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f"{name}={settings[name]!r} must be positive or None.")


class _Step(nn.Module):
    """Module and loss as one forward: what a wrapper for several processes has to see."""

    def __init__(self, module, loss_fn):
        super().__init__()
        self.module = module
        self._loss_fn = loss_fn

    def forward(self, *batch):
        losses = self._loss_fn(*batch)
        return losses if isinstance(losses, dict) else {"loss": losses}


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


@contextlib.contextmanager
def _bar(verbose, rank, total, description):
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit="batch", disable=not verbose or rank > 0) as bar:
        yield bar


def _has_stalled(history, patience, min_delta):
    if patience is None:
        return False
    best, at = math.inf, -1
    for epoch, row in enumerate(history):
        if row["loss"] < best - min_delta:
            best, at = row["loss"], epoch
    return len(history) - 1 - at >= patience


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
        "before are back. Lower learning_rate, set grad_clip, use precision='fp32', or look for "
        "extreme values in the data.",
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
        self.finished = False
        self._module, self._average, self._optimizer, self._log = module, average, optimizer, log
        self._folder = None

    def open(self, folder, settings, batches):
        """Go on from the checkpoint in the folder, if there is one."""
        self._folder = folder
        self._settings = {
            **settings,
            "parameters": {k: list(v.shape) for k, v in self._module.state_dict().items()},
            "initial_weights": _digest(self._module.state_dict()),
            **(batches.fingerprint() if hasattr(batches, "fingerprint") else {}),
        }
        if not (folder / "manifest.json").exists():
            return
        tensors, document = read_folder(folder)
        before = document.get("settings", {})
        others = [k for k, v in self._settings.items() if k not in before or before[k] != v]
        if others:
            said = ", ".join(
                key
                if key in ("parameters", "initial_weights", "data")
                else f"{key} ({before.get(key)!r} there, {self._settings[key]!r} here)"
                for key in others
            )
            raise ValueError(
                f"{folder} holds the checkpoint of another fit; it differs in {said}. Choose "
                "another checkpoint_dir, remove that folder, or restore the settings."
            )
        self._load(tensors, document)

    def _load(self, tensors, document):
        for name in ("epoch", "batch", "step", "history", "finished"):
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
            self._optimizer.state[named[of]][key] = tensor.to(named[of].device)

    def save(self, processes):
        if self._folder is None:
            return
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
                "sums": self._log.sums,
                "count": self._log.count,
            }
            write_folder(self._folder, tensors, document)
        processes.wait()


def _digest(tensors):
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- processes -----------------------------------------------------------------------------------


def process_rank():
    """Rank and number of the processes that train together.

    Returns
    -------
    rank, world : int
        ``(0, 1)`` for a process on its own.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _Alone:
    """What the loop needs from the others, where there are none."""

    rank, world = 0, 1

    def prepare(self, module):
        return module

    def no_sync(self, module):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def wait(self):
        pass

    def mean(self, table):
        return table

    def any(self, stops):
        return any(stops)

    def share(self, tensors):
        pass


class _Together:
    """The processes of a launcher: accelerate's Accelerator, and a group for what the loop says."""

    def __init__(self, accelerator, device):
        self.rank, self.world = process_rank()
        self._device = device
        self.prepare, self.backward = accelerator.prepare, accelerator.backward
        self.no_sync, self.wait = accelerator.no_sync, accelerator.wait_for_everyone
        self._group = torch.distributed.new_group()

    def mean(self, table):
        torch.distributed.all_reduce(table, group=self._group)
        return table / self.world

    def any(self, stops):
        votes = torch.tensor(int(any(stops)), device=self._device)
        torch.distributed.all_reduce(votes, group=self._group)
        return bool(votes.item())

    def share(self, tensors):
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0, group=self._group)

    def close(self):
        torch.distributed.destroy_process_group(self._group)


@contextlib.contextmanager
def _processes(device):
    launched = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not launched and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # An Accelerator fixes the device of the whole program: a fit must not do that unasked.
        yield _Alone()
        return
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # A part that a batch leaves unused (a null condition, say) must not stall the others.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[unused])
    # gloo's threads let go of a Python tensor some time after its exchange, and abort a program
    # that ends meanwhile. Closing a group ends its threads, but not if DDP has used it.
    together = _Together(accelerator, device)
    try:
        yield together
    finally:
        together.close()
