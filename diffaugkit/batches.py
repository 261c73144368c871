"""Shuffled batches of tensors and Rows, aligned, each epoch a pure function of its number."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from diffaugkit.runtime import mix_seed, process_rank, resolve_device

__all__ = ["Batches", "fits", "make_batches", "take"]

# The stream of a seed that orders the rows; `training` has another.
_ORDER = 2
# Values that one read of a shuffled epoch may bring in from the disk: 256 MB of float32.
_WINDOW_VALUES = 2**26


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
        self._reads = any(not _lies_on(s, device) for s in sources if s is not None)

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
        """Values that tell these batches from others: sizes, seed, and a digest of the rows.

        Of all rows in memory, and of 256 of what would have to be read, which takes long.
        """
        everywhere = torch.arange(self.n_samples).split(256)
        some = np.linspace(0, self.n_samples - 1, min(self.n_samples, 256)).astype(np.int64)
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(repr(None if source is None else tuple(source.shape)).encode())
            if source is None:
                continue
            in_memory = getattr(source, "in_memory", True)
            for part in everywhere if in_memory else [torch.from_numpy(some)]:
                rows = take(source, part).detach().cpu()
                digest.update(repr(rows.dtype).encode())
                digest.update(rows.contiguous().view(torch.uint8).numpy())
        return {
            "n_samples": self.n_samples,
            "batch_size": self.batch_size,
            "order_seed": self.seed,
            "data": digest.hexdigest()[:16],
        }

    def _bounds(self):
        """Start and end of every batch in the order of an epoch."""
        _, world = process_rank()
        if self.batch_size < world:
            raise ValueError(
                f"A batch of {self.batch_size} rows (of {self.n_samples}) cannot be shared among "
                f"{world} processes: raise batch_size, or launch fewer."
            )
        starts = list(range(0, self.n_samples, self.batch_size))
        # Batch normalisation and every contrast between samples need two rows in each process; who
        # asks for batches of one has neither.
        if self.batch_size > 1 and len(starts) > 1 and self.n_samples - starts[-1] < 2 * world:
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
        there = [_lies_on(source, self.device) for source in self.sources]
        if not self._reads:
            order = order.to(self.device)
        while start < len(bounds):
            # A resumed epoch reads the rest of its window only.
            stop = min(start - start % step + step, len(bounds))
            parts = [order[low:high][rank::world] for low, high in bounds[start:stop]]
            sizes = [len(part) for part in parts]
            index = parts[0] if len(parts) == 1 else torch.cat(parts)
            # Sent once and pinned, or the thread that reads ahead would wait for the device.
            near = self._send(index) if any(there) else None
            taken = [
                None if s is None else take(s, near) if on_device else self._send(take(s, index))
                for s, on_device in zip(self.sources, there, strict=True)
            ]
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
        Rows of a batch, clipped to n; a last batch of one row joins the batch before it, unless all
        are of one.
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
    >>> from diffaugkit.batches import make_batches
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
    return source.to(device) if source.is_cuda or fits(source.nbytes, device) else source


def fits(nbytes, device):
    """Tell whether data of a size may lie on a device as a whole.

    Parameters
    ----------
    nbytes : int
        Bytes of the data.
    device : torch.device
        Of a GPU half of the free memory may be taken: the rest is for the model and its
        activations.

    Returns
    -------
    bool
    """
    return device.type != "cuda" or nbytes <= torch.cuda.mem_get_info(device)[0] // 2


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


def _lies_on(source, device):
    return isinstance(source, torch.Tensor) and source.device == device


def _ahead(batches):
    """Fetch the next batch in a thread while the device works on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch
