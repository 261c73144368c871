"""Where a fit runs and what it draws: random streams, device, precision, cores, processes."""

import contextlib
import functools
import math
import os
import threading
import time

import torch

from diffaugkit.arrays import warn

__all__ = [
    "SharedCores",
    "all_processes",
    "isolated_rng",
    "mix_seed",
    "process_rank",
    "progress_bar",
    "reduced_precision",
    "resolve_device",
    "resolve_precision",
    "seed_generators",
    "tf32",
]

# Below this many values in matrices and filters a CPU loses time with bf16.
_SMALL_MODULE = 2**16
# A loop is looked at over this many seconds. Alone it has its core to itself and is put aside 7
# times a second; beside one busy process on as many cores as threads, half the time or less and 50.
_LOOK_SECONDS, _LEAST_SHARE, _MOST_INTERRUPTIONS = 10, 0.75, 20

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
    >>> from diffaugkit.runtime import mix_seed
    >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
    (True, False)
    """
    mixed = _splitmix64(int(seed))
    for counter in counters:
        mixed = _splitmix64(mixed + int(counter))
    return mixed


def seed_generators(seed, device):
    """Seed the default generators of the CPU and of the device, inside :func:`isolated_rng`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


_SEEDED = threading.RLock()


@contextlib.contextmanager
def isolated_rng(seed, device="cpu"):
    """Seed torch's default generators inside, and give the caller's states back after.

    NumPy's global stream is neither read nor moved. Inside, torch's default dtype is float32.

    Parameters
    ----------
    seed : int
        Seed of the streams inside.
    device : str or torch.device, default="cpu"
        The device whose generator is forked beside the CPU's.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.runtime import isolated_rng
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
    # The default generators are of the process: fits in threads take turns, or none would repeat.
    with _SEEDED, torch.random.fork_rng(devices=devices, device_type="cuda"):
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)  # networks are built here, and data are float32
            seed_generators(mix_seed(seed), device)
            yield
        finally:
            torch.set_default_dtype(dtype)
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


# Modules whose methods are wrapped now: how many use them, and their own methods.
_WRAPPED, _WRAPPING = {}, threading.Lock()


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
    >>> from diffaugkit.runtime import reduced_precision
    >>> layer = torch.nn.Linear(4, 4)
    >>> with reduced_precision(layer, "bf16"):
    ...     layer(torch.zeros(2, 4)).dtype
    torch.float32
    """
    device = resolve_device(device)
    if resolve_precision(precision, device, module) == "fp32":
        yield
        return

    call = threading.local()

    def wrapped(forward):
        @functools.wraps(forward)
        def run(*args, **kwargs):
            if getattr(call, "inside", False) or torch.is_autocast_enabled(device.type):
                return forward(*args, **kwargs)
            call.inside = True
            try:
                with torch.autocast(device.type, torch.bfloat16):
                    output = forward(*args, **kwargs)
            finally:
                call.inside = False
            return _to_float32(output)

        return run

    # Leaves deep inside are only called by their parents, and each wrapper costs a microsecond.
    children = list(module.children())
    parts = [m for m in module.modules() if m is module or m in children or any(m.children())]
    # Several threads may predict with one module: the last one gives it its own methods back.
    with _WRAPPING:
        users, own = _WRAPPED.setdefault(id(module), [0, {}])
        _WRAPPED[id(module)][0] += 1
        if not users:
            own |= {part: part.__dict__.get("forward") for part in parts}
            for part in parts:
                part.forward = wrapped(part.forward)
    try:
        yield
    finally:
        with _WRAPPING:
            _WRAPPED[id(module)][0] -= 1
            if not _WRAPPED[id(module)][0]:
                del _WRAPPED[id(module)]
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
def tf32(device):
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


# ---- cores ---------------------------------------------------------------------------------------


class SharedCores:
    """Warn once, on a CPU, where other work runs on the cores that torch's threads wait on.

    OpenMP's threads wait for one another by spinning, so one that is put aside holds up all: a fit
    on two threads beside one other process takes ten times as long and more, on one thread not
    twice as long. The number of threads stays as it is: results depend on it in their last bits.

    Parameters
    ----------
    device : torch.device
        Where the loop trains.
    """

    def __init__(self, device):
        watched = device.type == "cpu" and torch.get_num_threads() > 1
        self._start = _time_of_thread() if watched else None

    def look(self):
        """Look at the time since the start, when enough of it has passed."""
        now = None if self._start is None else _time_of_thread()
        if now is None or now[0] - self._start[0] < _LOOK_SECONDS:
            return
        passed, running, interruptions = (b - a for a, b in zip(self._start, now, strict=True))
        self._start = None
        share = running / passed
        if share < _LEAST_SHARE and interruptions > _MOST_INTERRUPTIONS * passed:
            warn(
                f"Other work on the cores of this machine leaves the fit {share:.0%} of one, "
                f"and torch's {torch.get_num_threads()} threads hold one another up. With one "
                "thread it would be several times as fast: set OMP_NUM_THREADS=1 (with scanpy also "
                "NUMBA_NUM_THREADS=1, as numba raises torch's number) before Python starts, or "
                "call torch.set_num_threads(1) right before the fit.",
                RuntimeWarning,
            )


def _time_of_thread():
    """Seconds by the clock and on a core, and interruptions by others; None where not counted."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_THREAD)
    except (ImportError, AttributeError):  # Linux alone counts by thread
        return None
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_nivcsw


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


def progress_bar(verbose, total, description, unit, *, leave=True, delay=0):
    """Open a progress bar; of processes that train together the first one shows it.

    With a `delay`, in seconds, what is over by then shows none.
    """
    from tqdm.auto import tqdm

    # The launcher tells the rank before the processes have met; without it RANK may mean anything.
    launched = os.environ.get("WORLD_SIZE", "1") != "1"
    other = process_rank()[0] > 0 or (launched and os.environ.get("RANK", "0") != "0")
    silent = not verbose or other
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=silent,
        leave=leave,
        delay=delay,
    )


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
def all_processes(device):
    """Give the processes that train together, which may be this one alone."""
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
