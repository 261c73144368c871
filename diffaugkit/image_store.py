"""Generated samples on disk: made once, in shards, by a run that may be killed and goes on.

A store is a folder of folders, ``shard-00000`` and so on, each written atomically and with
checksums by :func:`~diffaugkit.persistence.write_folder`. A shard that is there and whole is never
made again; one that is damaged is made anew. What the samples depend on (weights, conditions, seed)
is written beside them, so that a store of another generator is refused instead of mixed in.
"""

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from diffaugkit.arrays import warn
from diffaugkit.persistence import ModelFileError, read_folder, write_folder
from diffaugkit.rows import Rows
from diffaugkit.runtime import process_rank

__all__ = ["StoredRows", "refuse_other_run", "stored_samples"]

# Samples in a shard: what a killed run has to make again at most.
_SHARD = 1024
# Up to this size all samples are held in memory, where batches are indexed on the device.
_IN_MEMORY_BYTES = 2**31


class StoredRows(Rows):
    """Samples of a store on disk, read shard by shard.

    Parameters
    ----------
    files : list of tuple
        ``(path, offset)`` of the raw values of each shard, in order.
    starts : ndarray of int of shape (n_shards + 1,)
        Row at which each shard begins; the last entry is the number of rows.
    shape : tuple of int
        ``(n, d)`` or ``(n, C, H, W)``.
    dtype : str
        "uint8" or "float32".
    """

    in_memory = False
    shuffle_block = _SHARD

    def __init__(self, files, starts, shape, dtype):
        super().__init__(shape)
        self._files, self._starts, self.dtype = files, starts, np.dtype(dtype)

    def _read(self, index):
        if isinstance(index, slice):
            index = np.arange(index.start, index.stop)
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        shards = np.searchsorted(self._starts, index, side="right") - 1
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            path, offset = self._files[shard]
            count = self._starts[shard + 1] - self._starts[shard]
            # Mapped anew for every read: pages of a lasting map count as memory of this process.
            values = np.memmap(
                path, self.dtype, mode="r", offset=offset, shape=(count, *self.shape[1:])
            )
            out[at] = values[index[at] - self._starts[shard]]
        return out


def stored_samples(
    folder, n, generate, settings, *, shard_size=_SHARD, in_memory_bytes=_IN_MEMORY_BYTES
):
    """Generate samples, or find them in a folder, or both.

    Parameters
    ----------
    folder : path-like or None
        The store; None keeps everything in memory and writes nothing.
    n : int
        Number of samples.
    generate : callable
        ``generate(rows) -> Tensor (len(rows), ...)``, uint8 or float32, for an int64 array of row
        numbers. Row i must not depend on the other rows asked with it.
    settings : dict
        Plain values that tell this run from others; see
        :func:`~diffaugkit.persistence.fingerprint`.
    shard_size : int, default=1024
        Samples of a shard.
    in_memory_bytes : int, default=2**31
        Up to this size the result is one tensor in memory.

    Returns
    -------
    Tensor of shape (n, ...) or StoredRows
        All samples.

    Raises
    ------
    ValueError
        If the folder holds samples of another run.
    OSError, ModelFileError
        If the file system refuses; shards that were written stay.

    Examples
    --------
    >>> import tempfile, torch
    >>> from diffaugkit.image_store import stored_samples
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     make = lambda rows: torch.from_numpy(rows).float()[:, None]
    ...     stored_samples(folder, 3, make, {"seed": 0}).ravel().tolist()
    [0.0, 1.0, 2.0]
    """
    starts = np.append(np.arange(0, n, shard_size), n)
    if folder is None:
        parts = [generate(np.arange(a, b)) for a, b in itertools.pairwise(starts)]
        return torch.cat(parts)
    folder = Path(folder)
    settings = {**settings, "n": int(n), "shard_size": int(shard_size)}
    rank, world = process_rank()
    numbers = np.arange(len(starts) - 1)
    # Each process begins elsewhere and leaves out what it finds: they share the work without a
    # word, and each ends when all is there.
    for number in np.roll(numbers, -(rank * len(numbers) // world)):
        path = folder / f"shard-{number:05d}"
        if _is_whole(path, settings):
            continue
        samples = generate(np.arange(starts[number], starts[number + 1])).cpu().contiguous()
        write_folder(path, {"samples": samples}, {"settings": settings})
    return _read_store(folder, starts, in_memory_bytes)


def refuse_other_run(folder, n, settings):
    """Refuse a folder of samples of another run as far as can be told before the generator is made.

    Parameters
    ----------
    folder, n, settings
        As for :func:`stored_samples`; `settings` may be a part of those.

    Raises
    ------
    ValueError
        If the folder holds samples of another run.
    """
    for path in sorted(Path(folder).glob("shard-*"))[:1]:
        with contextlib.suppress(ModelFileError):  # a damaged one is made anew later
            _refuse(path, read_folder(path)[1], {"n": int(n), **settings})


def _is_whole(path, settings):
    """Whether a shard is there, undamaged and of this run."""
    if not (path / "manifest.json").exists():
        return False
    try:
        _, document = read_folder(path)
    except ModelFileError as error:
        if isinstance(error.__cause__, OSError):
            raise  # a disk that does not answer, which is no damage
        warn(f"{error}: the shard is generated again.")
        for file in path.iterdir():
            file.unlink(missing_ok=True)  # by another process
        return False
    _refuse(path, document, settings)
    return True


def _refuse(path, document, settings):
    known = document.get("settings", {})
    others = [key for key in settings if known.get(key) != settings[key]]
    if others:
        said = ", ".join(f"{k} ({known.get(k)!r} there, {settings[k]!r} here)" for k in others)
        raise ValueError(
            f"{path.parent} holds generated samples of another run; they differ in {said}. Choose "
            "another folder, or remove that one."
        )


def _read_store(folder, starts, in_memory_bytes):
    files = []
    for number in range(len(starts) - 1):
        (path,) = (folder / f"shard-{number:05d}").glob("tensors.*.safetensors")
        files.append((path, *_layout(path)))
    _, _, shape, dtype = files[0]
    shape = (int(starts[-1]), *shape[1:])
    rows = StoredRows([file[:2] for file in files], starts, shape, dtype)
    if np.prod(shape) * np.dtype(dtype).itemsize <= in_memory_bytes:
        return torch.from_numpy(rows._read(slice(0, len(rows))))
    return rows


def _layout(path):
    """Offset, shape and type of the values in a shard that was checked before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["samples"]
    dtype = {"U8": "uint8", "F32": "float32"}[entry["dtype"]]
    return 8 + length + entry["data_offsets"][0], entry["shape"], dtype
