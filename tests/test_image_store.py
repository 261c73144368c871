"""Generated samples on disk: made once, whole or made again, never mixed."""

import errno
import os

import numpy as np
import pytest
import torch

from diffaugkit.image_store import StoredRows, stored_samples
from diffaugkit.persistence import ModelFileError, fingerprint
from diffaugkit.runtime import isolated_rng

N, SHAPE = 23, (3, 4, 5)
SETTINGS = {"seed": 1, "generator": "abc"}


class Generator:
    """Samples that depend on their row alone, and a list of the rows that were asked."""

    def __init__(self, dtype=torch.uint8, dies_after=None):
        self.asked, self.dtype, self.dies_after = [], dtype, dies_after

    def __call__(self, rows):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked.append(rows.tolist())
        values = np.stack([np.random.default_rng(row).integers(0, 256, SHAPE) for row in rows])
        return torch.from_numpy(values).to(self.dtype)


def expected(dtype=torch.uint8):
    return Generator(dtype)(np.arange(N))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shard_size", [1, 7, 23, 100])
@pytest.mark.parametrize("in_memory_bytes", [0, 2**20])
def test_a_store_holds_what_memory_would(tmp_path, dtype, shard_size, in_memory_bytes):
    options = {"shard_size": shard_size, "in_memory_bytes": in_memory_bytes}
    samples = stored_samples(tmp_path / "a", N, Generator(dtype), SETTINGS, **options)
    if in_memory_bytes:
        assert samples.dtype == dtype
        assert torch.equal(samples, expected(dtype))
    else:
        assert isinstance(samples, StoredRows)
        assert samples.shape == (N, *SHAPE)
        for index in ([22, 0, 7, 7, 6], slice(5, 15), np.arange(N) % 2 == 0):
            assert torch.equal(samples[index], expected(dtype)[index])
    alone = stored_samples(None, N, Generator(dtype), SETTINGS, shard_size=shard_size)
    assert torch.equal(alone, expected(dtype))


def test_a_killed_run_makes_only_what_is_missing(tmp_path):
    killed = Generator(dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        stored_samples(tmp_path, N, killed, SETTINGS, shard_size=5)
    again = Generator()
    samples = stored_samples(tmp_path, N, again, SETTINGS, shard_size=5)
    assert [rows[0] for rows in killed.asked] == [0, 5]
    assert [rows[0] for rows in again.asked] == [10, 15, 20]
    assert torch.equal(samples, expected())
    third = Generator()
    stored_samples(tmp_path, N, third, SETTINGS, shard_size=5)
    assert third.asked == []


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "remove"])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    stored_samples(tmp_path, N, Generator(), SETTINGS, shard_size=5)
    (file,) = (tmp_path / "shard-00002").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[-3] ^= 1
        file.write_bytes(content if damage == "flip a bit" else content[:-8])
    again = Generator()
    with pytest.warns(UserWarning, match="shard is generated again") as seen:
        samples = stored_samples(tmp_path, N, again, SETTINGS, shard_size=5)
    assert seen[0].filename == __file__
    assert [rows[0] for rows in again.asked] == [10]
    assert torch.equal(samples, expected())


@pytest.mark.parametrize("refusal", ["read", "write"])
def test_a_disk_that_refuses_costs_no_shard(tmp_path, monkeypatch, refusal):
    stored_samples(tmp_path, N, Generator(), SETTINGS, shard_size=5)
    if refusal == "write":
        for file in (tmp_path / "shard-00003").iterdir():
            file.unlink()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def refuse(*args, **kwargs):
        raise OSError(errno.EIO if refusal == "read" else errno.ENOSPC, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open" if refusal == "read" else "write", refuse)
        with pytest.raises((OSError, ModelFileError), match="refused"):
            stored_samples(tmp_path, N, Generator(), SETTINGS, shard_size=5)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files
    again = Generator()
    samples = stored_samples(tmp_path, N, again, SETTINGS, shard_size=5)
    assert [rows[0] for rows in again.asked] == ([] if refusal == "read" else [15])
    assert torch.equal(samples, expected())


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"generator": "abd"}, {"n": N + 1}, {"shard_size": 6}]
)
def test_another_run_is_refused_and_nothing_is_lost(tmp_path, other):
    stored_samples(tmp_path, N, Generator(), SETTINGS, shard_size=5)
    options = {"n": N, "shard_size": 5, **other}
    settings = {**SETTINGS, **{k: v for k, v in other.items() if k in SETTINGS}}
    name = next(iter(other))
    with pytest.raises(ValueError, match=rf"another run; they differ in .*{name}"):
        stored_samples(
            tmp_path, options["n"], Generator(), settings, shard_size=options["shard_size"]
        )
    unchanged = Generator()
    stored_samples(tmp_path, N, unchanged, SETTINGS, shard_size=5)
    assert unchanged.asked == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_processes_begin_at_different_shards(tmp_path, monkeypatch, rank):
    monkeypatch.setattr("diffaugkit.image_store.process_rank", lambda: (rank, 3))
    generator = Generator()
    samples = stored_samples(tmp_path, N, generator, SETTINGS, shard_size=4)
    assert generator.asked[0][0] == 4 * (rank * 6 // 3)
    assert torch.equal(samples, expected())


def test_fingerprints_tell_weights_shapes_and_types_apart():
    with isolated_rng(0):
        layer = torch.nn.Linear(2, 3)
    first = fingerprint(layer, np.zeros(2))
    assert fingerprint(layer, np.zeros(2)) == first
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    others = {fingerprint(layer, np.zeros(2)), first}
    arrays = (np.zeros(2), np.zeros((2, 1)), np.zeros(2, np.float32), np.zeros(3))
    others |= {fingerprint(array) for array in arrays}
    assert len(others) == 6
