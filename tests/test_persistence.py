"""Round trips, faults at every file-system call, and damaged or hostile model folders."""

import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import struct
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator

from diffaugkit import persistence
from diffaugkit.persistence import ModelFileError, load, read_folder, save, write_folder


class Toy(BaseEstimator):
    """A tiny estimator with every kind of parameter and fitted attribute."""

    _parameter_constraints: dict = {"n_components": [int]}  # noqa: RUF012
    _extra_state = ("_reference",)

    def __init__(
        self, n_components=2, schedule=(1, 2), encoder=None, random_state=None, callbacks=None
    ):
        self.n_components = n_components
        self.schedule = schedule
        self.encoder = encoder
        self.random_state = random_state
        self.callbacks = callbacks

    def _build(self):
        return torch.nn.Sequential(
            torch.nn.Linear(self.n_features_in_, self.n_components),
            torch.nn.BatchNorm1d(self.n_components),
        )

    def fit(self, d=3, seed=0):
        """Set fitted attributes."""
        self.n_features_in_ = d
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module_ = self._build().eval()
        return self


class Other(Toy):
    """A second public class."""


@pytest.fixture(autouse=True)
def _lookup(monkeypatch):
    """Let diffaugkit's public classes be those of this file."""
    package = types.SimpleNamespace(
        __all__=["Other", "Toy", "save"], Toy=Toy, Other=Other, save=save
    )
    modules = {"diffaugkit": package}
    monkeypatch.setattr(persistence, "importlib", types.SimpleNamespace(import_module=modules.get))
    # The tests follow what is fsynced by themselves; waiting for the real disk only takes time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def assert_same(a, b):
    """Same type, same bits, all the way down."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, BaseEstimator):
        assert_same(a.get_params(deep=False), b.get_params(deep=False))
        assert_same(dict(sorted(vars(a).items())), dict(sorted(vars(b).items())))
    elif isinstance(a, torch.nn.Module):
        assert a.training == b.training
        assert_same(dict(a.state_dict()), dict(b.state_dict()))
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == torch.bfloat16:
            a, b = a.view(torch.int16), b.view(torch.int16)
        assert a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
    elif isinstance(a, np.ndarray) and a.dtype != object:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, np.ndarray):
        assert a.shape == b.shape
        assert_same(a.ravel().tolist(), b.ravel().tolist())
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_column_type=True)
    elif isinstance(a, dict):
        assert list(a) == list(b) or set(map(repr, a)) == set(map(repr, b))
        for key in a:
            assert_same(
                a[key], b[key] if key in b else next(b[k] for k in b if repr(k) == repr(key))
            )
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float | np.floating) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert a == b
        assert str(a) == str(b)  # tells -0.0 from 0.0


def strays(folder):
    """Names in the folder that its manifest does not speak of."""
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {entry["name"] for entry in manifest["files"].values()} | {"manifest.json"}
    return {path.name for path in folder.iterdir()} - known


# ---- round trips ---------------------------------------------------------------------------------


def make_full():
    """Return an estimator that holds one of everything."""
    est = Toy(3, schedule=[1, (2, 3.5)], encoder=Other(4, schedule=()).fit(5, seed=1)).fit()
    est.nothing_ = None
    est.flag_ = True
    est.numbers_ = [1, 10**30, -0.0, 1e-320, float("nan"), float("inf"), -float("inf"), "ü\0\ud800"]
    est.scalars_ = (np.float32(1.1), np.float64("nan"), np.int8(-3), np.bool_(True), np.str_("s"))
    est.dict_ = {"a": (1, [2]), "$": 3, 4: {"$": "tuple"}, (1, "x"): None, np.int64(7): np.uint8(7)}
    est.place_ = Path("a/b")
    est.device_ = torch.device("cpu")
    est.feature_names_in_ = np.array(["g1", "g2", "longer"], dtype=object)
    est.classes_ = np.array([["a", "bcd"], ["", "é"]], dtype="<U7")
    est.mixed_ = np.array(["a", None, 1.5, True, float("nan")], dtype=object)
    est.arrays_ = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "zero_d": np.array(3.5),
        "empty": np.empty((0, 4), dtype=np.int16),
        "bool": np.array([True, False]),
        "nan": np.array([np.nan, -np.inf, -0.0]),
        "c64": np.array([1 + 2j], dtype=np.complex64),
        "u64": np.array([2**64 - 1], dtype=np.uint64),
    }
    est.tensors_ = [
        torch.arange(3, dtype=torch.bfloat16),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.full((2,), torch.nan, dtype=torch.float16),
    ]
    est.history_ = pd.DataFrame(
        {"epoch": [1, 2], "loss": [0.5, np.nan], "phase": ["E", "M"], "ok": [True, False]}
    )
    est.table_ = pd.DataFrame(
        np.arange(4, dtype=np.float32).reshape(2, 2), index=pd.Index(["x", "y"], name="cell")
    )
    est.encoder_ = est.encoder
    est.frozen_ = FrozenEstimator(est.encoder)
    est._reference = np.ones(2)
    est._sklearn_output_config = {"transform": "pandas"}
    return est


def test_round_trip_is_bit_equal(tmp_path):
    """Types, bits, order and identity of everything come back."""
    est = make_full()
    est._private = object()
    save(est, tmp_path / "deep" / "model")
    back = load(str(tmp_path / "deep" / "model"))
    del est._private
    assert_same(back, est)
    assert list(back.dict_) == list(est.dict_)
    assert [type(k) for k in back.dict_] == [type(k) for k in est.dict_]
    assert back.encoder_ is back.encoder
    assert back.frozen_.estimator is back.encoder
    back.arrays_["zero_d"] += 1  # what is loaded can be written to
    back.tensors_[0].add_(1)


def test_same_model_gives_same_bytes(tmp_path):
    """Saving is deterministic, also after loading."""
    save(make_full(), tmp_path / "a")
    save(make_full(), tmp_path / "b")
    save(load(tmp_path / "a"), tmp_path / "c")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in "abc"]
    assert contents[0] == contents[1] == contents[2]


def test_unfitted_and_frozen(tmp_path):
    """An unfitted estimator can be saved, and a frozen one over it."""
    save(Toy(random_state=3), tmp_path)
    assert_same(load(tmp_path), Toy(random_state=3))
    save(FrozenEstimator(Toy().fit()), tmp_path)
    assert_same(load(tmp_path).estimator, Toy().fit())
    assert not strays(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_module_dtype_mode_and_tied_weights(tmp_path, dtype):
    """Weights keep their dtype, the module its mode, tied weights their tie."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    Toy_build = Toy._build
    try:
        Toy._build = lambda self: Tied()
        est = Toy().fit()
        est.module_ = est.module_.to(dtype).train()
        save(est, tmp_path)
        before = torch.get_rng_state()
        back = load(tmp_path)
    finally:
        Toy._build = Toy_build
    assert torch.equal(torch.get_rng_state(), before)
    assert back.module_.training
    assert back.module_.b.weight is back.module_.a.weight
    assert back.module_.b.weight.requires_grad
    assert back.module_.a.bias.dtype == dtype
    assert torch.equal(back.module_.a.weight, est.module_.a.weight)


def test_write_folder_keeps_kinds(tmp_path):
    """Arrays come back as arrays and tensors as tensors, views and shared memory included."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "view": base[:, 1:3],
        "same": base,
        "bf16": torch.tensor([1.0, torch.nan], dtype=torch.bfloat16),
        "channels_last": torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
        "array": np.arange(3),
        "odd name / .. \n": np.float32([1]),
        "zero_d": torch.tensor(2, dtype=torch.int8),
    }
    document = {"step": 3, "history": [{"loss": float("nan")}], "rng": (1, np.int64(2))}
    write_folder(tmp_path, tensors, document)
    back, found = read_folder(tmp_path)
    assert_same(back, tensors)
    assert_same(found, document)
    assert list(back) == list(tensors)
    write_folder(tmp_path, {}, {})
    assert read_folder(tmp_path) == ({}, {})
    write_folder(tmp_path, {"big_endian": np.array([1, 2], dtype=">i4")}, {})
    assert read_folder(tmp_path)[0]["big_endian"].tolist() == [1, 2]


def test_conjugate_and_cuda_free_tensors(tmp_path):
    """Lazy conjugates are resolved; no graph is kept."""
    value = torch.tensor([1 + 2j, 3j], dtype=torch.complex64)
    write_folder(tmp_path, {"x": value.conj(), "g": torch.ones(2, requires_grad=True) * 2}, {})
    back, _ = read_folder(tmp_path)
    assert torch.equal(back["x"], value.conj().resolve_conj())
    assert not back["g"].requires_grad


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from([np.float32(0.1), np.int16(5), np.bool_(False), np.str_("x")])
)
keys = st.text(max_size=4) | st.integers() | st.booleans() | st.sampled_from(["$", "items"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="=")
    | hnp.unsigned_integer_dtypes(endianness="=")
    | hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64))
    | hnp.unicode_string_dtypes(endianness="=", min_len=1, max_len=4)
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(value=values)
def test_any_plain_document(tmp_path, value):
    """Whatever is nested from plain values comes back as it was."""
    write_folder(tmp_path, {}, {"value": value})
    assert_same(read_folder(tmp_path)[1]["value"], value)


@quick
@given(found=st.lists(arrays | values, max_size=3))
def test_any_fitted_attribute(tmp_path, found):
    """So it does as a fitted attribute, arrays of any shape and dtype included."""
    est = Toy()
    est.found_ = found
    save(est, tmp_path)
    assert_same(load(tmp_path).found_, found)


# ---- refusals when saving ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        object(),
        len,
        {1, 2},
        b"bytes",
        1j,
        PCA(),
        FrozenEstimator(PCA()),
        np.array([1j]),
        np.zeros(2, dtype="datetime64[s]"),
        np.ma.masked_array([1, 2]),
        np.array([object()]),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.nn.Linear(1, 1),
        type("Toy", (Toy,), {})(),
        pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}),
        pd.DataFrame({"t": pd.Categorical(["a"])}),
        pd.DataFrame({"t": [1]}, index=pd.MultiIndex.from_tuples([(1, 2)])),
        random.Random(),
        types.SimpleNamespace(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_saved_names_its_place(tmp_path, value):
    """The error names the attribute, and what was saved before stays."""
    save(Toy(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    est = Toy(encoder=Toy())
    est.encoder.odd_ = [0, value]
    with pytest.raises(TypeError, match=r"Toy\.encoder\.odd_\[1\]"):
        save(est, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_cycles_and_depth(tmp_path):
    """What contains itself raises instead of recursing for ever."""
    est = Toy()
    est.self_ = est
    with pytest.raises(ValueError, match="contains itself"):
        save(est, tmp_path / "x")
    est.self_ = []
    est.self_.append(est.self_)
    with pytest.raises(ValueError, match="contains itself"):
        save(est, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_parameters_changed_after_fit(tmp_path):
    """A model that could not be rebuilt is refused when it is saved, not when it is loaded."""
    est = Toy().fit().set_params(n_components=7)
    with pytest.raises(ValueError, match="changed after fit"):
        save(est, tmp_path)


def test_what_is_left_out_warns(tmp_path):
    """Callbacks and generators are replaced by None, with a warning that names them."""
    est = Toy(callbacks=[print], random_state=np.random.RandomState(0))
    est.encoder = Toy(random_state=np.random.default_rng(0))
    with pytest.warns(UserWarning, match="not saved") as found:
        save(est, tmp_path)
    assert {str(w.message).split(" ")[0] for w in found} == {
        "Toy.callbacks",
        "Toy.random_state",
        "Toy.encoder.random_state",
    }
    assert {w.filename for w in found} == {__file__}
    back = load(tmp_path)
    assert (back.callbacks, back.random_state, back.encoder.random_state) == (None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(Toy(callbacks=[]), tmp_path)


def test_wrong_calls(tmp_path):
    """Arguments of the wrong kind, and reading with the wrong function."""
    with pytest.raises(TypeError, match="write_folder"):
        save({"a": 1}, tmp_path / "x")
    with pytest.raises(TypeError, match="document must be a dict"):
        write_folder(tmp_path / "x", {}, [1])
    with pytest.raises(TypeError, match=r"document\.a"):
        write_folder(tmp_path / "x", {}, {"a": np.ones(2)})
    for name in ("__metadata__", 3):
        with pytest.raises(TypeError, match="cannot be a name"):
            write_folder(tmp_path / "x", {name: np.ones(2)}, {})
    with pytest.raises(TypeError, match=r"tensors\['a'\]"):
        write_folder(tmp_path / "x", {"a": np.array(["s"])}, {})
    assert not (tmp_path / "x").exists()
    save(Toy(), tmp_path / "toy")
    write_folder(tmp_path / "plain", {}, {"a": 1})
    with pytest.raises(ModelFileError, match="load reads it"):
        read_folder(tmp_path / "toy")
    with pytest.raises(ModelFileError, match="read_folder reads it"):
        load(tmp_path / "plain")


def test_refuses_to_write_over_what_is_no_model(tmp_path):
    """Files, full folders and foreign manifests are left alone; an empty folder is used."""
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "web app", "version": 1}')
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path in (file, full, foreign, link):
        with pytest.raises(ModelFileError, match=path.name):
            save(Toy(), path)
    assert file.read_text() == (full / "thesis.txt").read_text() == "mine"
    assert len(list(full.iterdir())) == len(list(foreign.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    save(Toy(), tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    save(Toy(5), tmp_path / "empty")
    assert load(tmp_path / "empty").n_components == 5
    assert strays(tmp_path / "empty") == {"notes.txt"}


# ---- faults at every file-system call ------------------------------------------------------------


class Died(BaseException):
    """The process is gone: nothing after the call has an effect."""


class FaultyOS:
    """Module `os` in which the n-th call that changes something on disk goes wrong.

    It also keeps what a power loss would leave: for each file the content of its last fsync, for
    each folder the entries of its last fsync and the changes since.
    """

    counted = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink")

    def __init__(self, root, fail_at=None, how="error"):
        self.calls = []
        self.fail_at, self.how, self.dead = fail_at, how, False
        self.root = root
        self.ids = {}  # inode -> number of ours: inodes of removed files are given again
        self.serial = itertools.count()
        self.inodes = {}  # our number -> content as of its last fsync
        self.entries = {}  # folder -> {name: inode or None for a folder}, as of its last fsync
        self.pending = {}  # folder -> list of (name, inode or None for a folder, or "gone")
        self.paths = {}  # descriptor -> path
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                self.entries[path] = {p.name: self.inode(p) for p in path.iterdir()}
            else:
                self.inodes[self.inode(path)] = path.read_bytes()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.counted:
            return real

        def call(*args, **kwargs):
            if self.dead:
                raise Died
            self.calls.append(name)
            if len(self.calls) == self.fail_at:
                if self.how == "exit":
                    os._exit(77)
                if name == "write":  # a full disk, or a kill, may come after half of it
                    os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.how == "die":
                    self.dead = True
                    raise Died
                if name == "close":
                    os.close(*args)
                raise OSError(28, "No space left on device")
            result = real(*args, **kwargs)
            self.record(name, args, result)
            return result

        return call

    def inode(self, path, *, new=False):
        """Return the number of the file under a path; None for a folder."""
        if path.is_dir():
            return None
        found = path.stat().st_ino
        if new or found not in self.ids:
            self.ids[found] = next(self.serial)
        return self.ids[found]

    def record(self, name, args, result):
        """Follow what the call did."""
        if name == "open":
            path = Path(args[0])
            self.paths[result] = path
            if args[1] & os.O_CREAT:
                self.inodes[self.inode(path, new=True)] = b""
                self.change(path, self.inode(path))
        elif name == "mkdir":
            self.entries[Path(args[0])] = {}
            self.change(Path(args[0]), None)
        elif name == "replace":
            self.change(Path(args[0]), "gone")
            self.change(Path(args[1]), self.inode(Path(args[1])))
        elif name == "unlink":
            self.change(Path(args[0]), "gone")
        elif name == "fsync":
            path = self.paths[args[0]]
            if path.is_dir():
                self.apply(self.entries[path], self.pending.pop(path, []))
            else:
                self.inodes[self.inode(path)] = path.read_bytes()

    def change(self, path, inode):
        self.pending.setdefault(path.parent, []).append((path.name, inode))

    @staticmethod
    def apply(entries, changes):
        for name, inode in changes:
            if inode == "gone":
                entries.pop(name, None)
            else:
                entries[name] = inode

    def after_power_loss(self, target, rng):
        """Write to `target` what the disk may hold: any subset of the changes not yet fsynced."""

        def restore(source, to):
            to.mkdir()
            entries = dict(self.entries.get(source, {}))
            # Without rng nothing is kept of what was not forced to disk.
            keep = [c for c in self.pending.get(source, []) if rng is not None and rng() < 0.5]
            self.apply(entries, keep)
            for name, inode in entries.items():
                if inode is None:
                    restore(source / name, to / name)
                else:
                    (to / name).write_bytes(self.inodes[inode])

        restore(self.root, target)


OLD = {"n_components": 3, "seed": 1}
NEW = {"n_components": 4, "seed": 2}


def make(n_components, seed):
    est = Toy(n_components).fit(seed=seed)
    est.names_ = np.array(["a", "b"], dtype=object)
    est.array_ = np.arange(seed)
    return est


def state_of(path):
    """Return "old", "new" or "none"; anything else fails."""
    try:
        back = load(path)
    except ModelFileError:
        # Only a folder without a manifest may be no model.
        assert not (path / "manifest.json").exists()
        return "none"
    which = "old" if back.n_components == OLD["n_components"] else "new"
    assert_same(back, make(**(OLD if which == "old" else NEW)))
    return which


def prepared(root, start):
    """Return a folder in the state from which the save under test starts."""
    path = root / "models" / "m"
    root.mkdir()
    if start != "nothing":
        save(make(**(NEW if start == "same" else OLD)), path)
    if start == "leftovers":
        for name in ("tensors.0123456789abcdef.safetensors", "manifest.json.01234567.tmp"):
            (path / name).write_bytes(b"left by a save that died")
    return path


STARTS = ["nothing", "old", "same", "leftovers"]


def number_of_calls(tmp_path, start, monkeypatch):
    path = prepared(tmp_path / "probe", start)
    shim = FaultyOS(tmp_path / "probe")
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "os", shim)
        save(make(**NEW), path)
    assert not strays(path)
    assert set(shim.calls) >= {"open", "write", "fsync", "close", "replace"}
    return len(shim.calls)


def check_after_fault(path, start):
    """Old or new must load; the next save works and leaves nothing behind."""
    possible = {"nothing": {"none", "new"}, "same": {"new"}}.get(start, {"old", "new"})
    found = state_of(path)
    assert found in possible
    save(make(**NEW), path)
    assert state_of(path) == "new"
    assert not strays(path)
    return found


@pytest.mark.parametrize("start", STARTS)
def test_any_call_may_fail(tmp_path, monkeypatch, start):
    """An OSError from any call leaves old or new, and no temporary file of the failed save."""
    found = []
    for n in range(1, number_of_calls(tmp_path, start, monkeypatch) + 1):
        path = prepared(tmp_path / f"{n}", start)
        shim = FaultyOS(tmp_path / f"{n}", n)
        with monkeypatch.context() as patch:
            patch.setattr(persistence, "os", shim)
            failed = None
            try:
                save(make(**NEW), path)
            except (OSError, ModelFileError) as error:
                failed = str(error)
        # Only what comes after the commit may fail unseen: the removal of old files.
        assert shim.calls[n - 1] == "unlink" if failed is None else "No space left" in failed
        if shim.calls[n - 1] == "write":
            assert str(path) in failed
        if path.exists() and start != "leftovers":
            assert not list(path.glob("*.tmp"))
        found.append(check_after_fault(path, start))
        shutil.rmtree(tmp_path / f"{n}")
    # Once the new model is there, it stays there.
    assert found == sorted(found, key=["none", "old", "new"].index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start", STARTS)
def test_process_may_die_at_any_call(tmp_path, monkeypatch, start):
    """A process that ends at any call, without clean-up, leaves old or new."""
    new = make(**NEW)
    found = []
    for n in range(1, number_of_calls(tmp_path, start, monkeypatch) + 1):
        path = prepared(tmp_path / f"{n}", start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's threads
            child = os.fork()
        if child == 0:
            try:
                persistence.os = FaultyOS(tmp_path / f"{n}", n, how="exit")
                save(new, path)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
        found.append(check_after_fault(path, start))
        shutil.rmtree(tmp_path / f"{n}")
    assert found == sorted(found, key=["none", "old", "new"].index)


@pytest.mark.parametrize("start", STARTS)
def test_power_may_go_at_any_call(tmp_path, monkeypatch, start):
    """Bytes that were not fsynced are lost, changes of folders kept at will: old or new is left."""
    total = number_of_calls(tmp_path, start, monkeypatch)
    for n in range(1, total + 2):
        path = prepared(tmp_path / f"{n}", start)
        shim = FaultyOS(tmp_path / f"{n}", n, how="die")
        with monkeypatch.context() as patch:
            patch.setattr(persistence, "os", shim)
            try:
                save(make(**NEW), path)
            except Died:
                assert n <= total
            else:
                assert n == total + 1
        rngs = [None, lambda: 0.0, *(random.Random(seed).random for seed in range(4))]
        for i, rng in enumerate(rngs):
            disk = tmp_path / f"{n}-{i}"
            shim.after_power_loss(disk, rng)
            found = check_after_fault(disk / path.relative_to(tmp_path / f"{n}"), start)
            if n == total + 1:
                assert found == "new"  # a save that has returned is safe
            shutil.rmtree(disk)
        shutil.rmtree(tmp_path / f"{n}")


def test_the_power_loss_shim_finds_a_missing_fsync(tmp_path, monkeypatch):
    """Without fsync of the files the simulation does lose the model: it would notice."""
    path = prepared(tmp_path / "x", "old")
    shim = FaultyOS(tmp_path / "x")
    shim.fsync = lambda descriptor: None
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "os", shim)
        save(make(**NEW), path)
    shim.after_power_loss(tmp_path / "y", lambda: 0.0)
    with pytest.raises(ModelFileError):
        load(tmp_path / "y" / "models" / "m")


def test_reader_beside_a_writer(tmp_path, monkeypatch):
    """A reader whose files are replaced after it read the manifest reads the new model."""
    save(make(**OLD), tmp_path)
    real, pending = persistence._read_file, [True]

    def read_file(folder, name, *args):
        if name != "manifest.json" and pending:
            pending.clear()
            save(make(**NEW), tmp_path)
        return real(folder, name, *args)

    monkeypatch.setattr(persistence, "_read_file", read_file)
    assert state_of(tmp_path) == "new"


def test_writers_wait_for_each_other(tmp_path):
    """Two threads that save to one folder, and one that reads it, do not disturb each other."""
    number = itertools.count()
    write_folder(tmp_path, {"x": np.array(-1)}, {"x": -1})

    def write():
        for _ in range(15):
            x = next(number)
            write_folder(tmp_path, {"x": np.array(x)}, {"x": x})

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write) for _ in range(2)]
        while not all(job.done() for job in jobs):
            tensors, document = read_folder(tmp_path)
            assert tensors["x"] == document["x"]
        for job in jobs:
            job.result()
    assert not strays(tmp_path)


# ---- damaged and hostile files -------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """Return the folder of a saved model."""
    save(make_full(), tmp_path / "model")
    return tmp_path / "model"


def part(folder, name):
    return next(folder.glob(f"{name}.*"))


def forge(folder, *, document=None, tensors=None, change=None):
    """Alter a model as an attacker would: the manifest is made to agree with what was altered."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, data in (("document", document), ("tensors", tensors)):
        if data is not None:
            part(folder, key).unlink()
            digest = hashlib.sha256(data).hexdigest()
            name = f"{key}.{digest[:16]}." + ("json" if key == "document" else "safetensors")
            (folder / name).write_bytes(data)
            manifest["files"][key] = {"name": name, "size": len(data), "sha256": digest}
    if change is not None:
        change(manifest)
    manifest.pop("sha256", None)
    compact = json.dumps(manifest, separators=(",", ":")).encode()
    manifest["sha256"] = hashlib.sha256(compact).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def forge_document(folder, change):
    document = json.loads(part(folder, "document").read_text())
    document = change(document) or document
    forge(folder, document=json.dumps(document, separators=(",", ":")).encode())


def test_forge_alone_is_harmless(model):
    """The helper makes folders that load, so the refusals below are not by accident."""
    forge(model, tensors=part(model, "tensors").read_bytes())
    forge_document(model, lambda document: None)
    assert_same(load(model), make_full())


def test_missing_and_odd_folders(tmp_path, model):
    """Nothing there, a pickle, an empty folder, a missing file."""
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({}))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", file, tmp_path / "empty"):
        with pytest.raises(ModelFileError, match=path.name):
            load(path)
    for name in ("document", "tensors", "manifest"):
        copy = shutil.copytree(model, tmp_path / name)
        part(copy, name).unlink()
        with pytest.raises(ModelFileError, match="missing"):
            load(copy)


@pytest.mark.parametrize("name", ["manifest", "document", "tensors"])
def test_truncated_anywhere(model, name):
    """A file cut at any of many places is refused, and one with bytes added."""
    path = part(model, name)
    data = path.read_bytes()
    for n in {*range(0, len(data), max(1, len(data) // 60)), 1, 7, 8, 9, len(data) - 1}:
        path.write_bytes(data[:n])
        with pytest.raises(ModelFileError, match=path.name):
            load(model)
    for extra in (b"\0", b" ", b"\n", data):
        path.write_bytes(data + extra)
        with pytest.raises(ModelFileError, match=path.name):
            load(model)


@pytest.mark.parametrize("name", ["manifest", "document", "tensors"])
def test_any_flipped_byte_is_found(model, name):
    """Every bit of the first and last bytes, and one bit in each region of the file."""
    path = part(model, name)
    data = path.read_bytes()
    rng = random.Random(0)
    places = {*range(16), *range(len(data) - 16, len(data))}
    places |= {rng.randrange(i, min(i + 23, len(data))) for i in range(0, len(data), 23)}
    for place in sorted(places):
        bits = range(8) if place < 4 else [rng.randrange(8)]
        for bit in bits:
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ModelFileError):
                load(model)
    path.write_bytes(data)
    load(model)


@pytest.mark.parametrize("name", ["manifest", "document", "tensors"])
def test_fuzz_with_a_manifest_that_agrees(model, name):
    """Flips, cuts and repeats that pass every checksum: our error, or a model; nothing else."""
    rng = random.Random(name)
    backup = {p.name: p.read_bytes() for p in model.iterdir()}
    data = part(model, name).read_bytes()
    outcomes = {"error": 0, "loaded": 0}
    for _ in range(150):
        for path in model.iterdir():
            path.unlink()
        for file, content in backup.items():
            (model / file).write_bytes(content)
        fuzzed = bytearray(data)
        limit = 3000 if rng.random() < 0.7 else len(data)  # headers are where the parsers are
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(min(limit, len(fuzzed)))
            match rng.randrange(4):
                case 0:
                    fuzzed[i] ^= 1 << rng.randrange(8)
                case 1:
                    fuzzed[i] = rng.choice(b'0123456789-"[]{},:.eE$ \\\x00\xff')
                case 2:
                    del fuzzed[i : i + rng.randint(1, 9)]
                case 3:
                    fuzzed[i:i] = fuzzed[i : i + rng.randint(1, 9)]
        if name == "manifest":
            try:
                manifest = json.loads(fuzzed)
                manifest.items()
            except (ValueError, AttributeError):
                (model / "manifest.json").write_bytes(fuzzed)
            else:
                forge(model, change=lambda m, new=manifest: (m.clear(), m.update(new)))
        else:
            forge(model, **{name: bytes(fuzzed)})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(model)
            outcomes["loaded"] += 1
        except ModelFileError:
            outcomes["error"] += 1
    assert outcomes["error"] > 20


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", ["manifest", "document", "tensors"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_pickles_are_never_run(tmp_path, model, name, kind):
    """Pickle bytes in the place of any file are refused and not run."""
    target = tmp_path / "was_run"
    if kind == "pickle":
        data = pickle.dumps(Bomb(target))
    else:
        store = tmp_path / "data.npy"
        if kind == "torch":
            torch.save(Bomb(target), store)
        else:
            np.save(store, np.array([Bomb(target)], dtype=object), allow_pickle=True)
        data = store.read_bytes()
    if name == "manifest":
        (model / "manifest.json").write_bytes(data)
    else:
        forge(model, **{name: data})
    with pytest.raises(ModelFileError):
        load(model)
    assert not target.exists()


def set_name(name):
    def change(manifest):
        manifest["files"]["document"]["name"] = name

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "/etc/passwd",
        "sub/document.0123456789abcdef.json",
        "document.0123456789abcdef.json/../x",
        "document.0123456789abcdef.json\n",
        "..",
        "",
        "manifest.json",
        "C:\\x.json",
        None,
        3,
        ["document.0123456789abcdef.json"],
    ],
)
def test_manifest_that_points_elsewhere(tmp_path, model, name):
    """Names with a path in them, or any that a save would not give, are refused."""
    (tmp_path / "outside.json").write_bytes(part(model, "document").read_bytes())
    forge(model, change=set_name(name))
    with pytest.raises(ModelFileError, match=r"manifest\.json"):
        load(model)


@pytest.mark.parametrize("name", ["manifest", "document", "tensors"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_files_that_are_no_files(tmp_path, model, name, kind):
    """Symbolic links, folders and pipes in the place of a file are refused without hanging."""
    path = part(model, name)
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(ModelFileError, match="regular file"):
        load(model)


def broken_tensors(change):
    """Return safetensors bytes with a header that `change` has altered."""

    def make_bytes(data):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        header, body = change(header, body) or (header, body)
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + body

    return make_bytes


def _overlap(header, body):
    first, second = list(header)[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def _gap(header, body):
    return header, body + b"\0" * 8


def _beyond(header, body):
    entry = header[max(header, key=lambda name: header[name]["data_offsets"][1])]
    entry["data_offsets"][1] += 2**40


def _negative(header, body):
    header[next(iter(header))]["data_offsets"] = [-4, 0]


def _dtype(header, body):
    header[next(iter(header))]["dtype"] = "F4"


def _shape(header, body):
    header[next(iter(header))]["shape"] = [2**62, 2**62]


def _rename(header, body):
    header["../x"] = header.pop(next(iter(header)))


def _metadata(header, body):
    header["__metadata__"] = {"a": "b"}


def _twice(header, body):
    text = json.dumps(header)
    return (text[:-1] + "," + text[1:]).encode(), body


def _deep(header, body):
    return b"[" * 100_000, body


def _list(header, body):
    return b"[1, 2]", body


@pytest.mark.parametrize(
    "change",
    [_overlap, _gap, _beyond, _negative, _dtype, _shape, _rename, _metadata, _twice, _deep, _list],
)
def test_hostile_tensor_headers(model, change):
    """Headers that lie are refused though every checksum agrees."""
    data = part(model, "tensors").read_bytes()
    forge(model, tensors=broken_tensors(change)(data))
    with pytest.raises(ModelFileError, match=r"tensors\.[0-9a-f]{16}\.safetensors"):
        load(model)


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 2**64 - 1, 100_000_001, 10_000])
def test_header_of_ten_gigabytes(model, length):
    """A length field that promises more than there is, or than allowed, is refused at once."""
    forge(model, tensors=struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelFileError, match="header"):
        load(model)


def test_sizes_are_capped(model, monkeypatch):
    """Files above the caps are not read, though the manifest allows them, and not written."""
    for name, cap in (("manifest", "MANIFEST"), ("document", "DOCUMENT"), ("tensors", "TENSORS")):
        with monkeypatch.context() as patch:
            patch.setattr(persistence, f"MAX_{cap}_SIZE", 100)
            with pytest.raises(ModelFileError, match="more than the 100 allowed"):
                load(model)
            with pytest.raises(ValueError, match=r"bytes, more than the 100|too large"):
                save(make_full(), model.parent / "other")
        assert part(model, name).exists()
    assert not (model.parent / "other").exists()
    with part(model, "manifest").open("r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no room
    with pytest.raises(ModelFileError, match="1099511627776 bytes"):
        load(model)


def test_hostile_manifest_values(model):
    """Sizes, hashes, shapes and kinds of the wrong type."""
    original = (model / "manifest.json").read_bytes()

    def first(manifest):
        return manifest["tensors"][next(iter(manifest["tensors"]))]

    changes = [
        lambda m: m.update(files=3),
        lambda m: m.update(files={}),
        lambda m: m.update(tensors=[]),
        lambda m: m.update(tensors={}),
        lambda m: m["tensors"].update(more=first(m)),
        lambda m: first(m).update(shape=[-1]),
        lambda m: first(m).update(shape=[1.5]),
        lambda m: first(m).update(shape="ab"),
        lambda m: first(m).update(dtype=["F32"]),
        lambda m: first(m).update(dtype="F8"),
        lambda m: first(m).update(kind="pickle"),
        lambda m: first(m).pop("finite"),
        lambda m: m["files"]["tensors"].update(size=10**30),
        lambda m: m["files"]["tensors"].update(size="1"),
        lambda m: m["files"]["tensors"].update(sha256="0" * 64),
        lambda m: m["files"]["tensors"].update(sha256=0),
        lambda m: m.update(version="1"),
        lambda m: m.update(version=0),
        lambda m: m.update(version=True),
        lambda m: m.update(format="zip"),
        lambda m: m.update(more=json.loads("[" * 900 + "]" * 900)),
    ]
    for change in changes:
        (model / "manifest.json").write_bytes(original)
        forge(model, change=change)
        with pytest.raises(ModelFileError):
            load(model)
    text = original.replace(b'"version": 1', b'"version": 1, "x": 1e999')
    assert text != original
    for raw in (
        text,
        b"",
        b"[]",
        b"null",
        b'{"a": 1, "a": 2}',
        b"\xff",
        b"[" * 10**5,
        b"NaN",
        b"9" * 9999,
    ):
        (model / "manifest.json").write_bytes(raw)
        with pytest.raises(ModelFileError, match=r"manifest\.json"):
            load(model)


def test_newer_format_says_upgrade(model):
    """A newer format is refused before anything else is looked at; a save may replace it."""
    forge(model, change=lambda m: (m.clear(), m.update(format="diffaugkit-model", version=2)))
    for read in (load, read_folder):
        with pytest.raises(
            ModelFileError, match=r"format version 2 is newer .* upgrade diffaugkit"
        ):
            read(model)
    save(make(**NEW), model)
    assert state_of(model) == "new"


def test_nan_where_the_manifest_rules_it_out(tmp_path):
    """The finite flag of each tensor is checked, and so are the bytes of booleans."""
    write_folder(tmp_path, {"x": torch.ones(2), "b": torch.tensor([True])}, {})
    bad = {"x": torch.tensor([1, torch.nan]), "b": torch.tensor([True])}
    forge(tmp_path, tensors=safetensors.torch.save(bad))
    with pytest.raises(ModelFileError, match="NaN or infinity"):
        read_folder(tmp_path)
    good = safetensors.torch.save({"x": torch.ones(2), "b": torch.tensor([True])})
    forge(tmp_path, tensors=good[:-1] + b"\7")
    with pytest.raises(ModelFileError, match="no booleans"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "eval", "exec", "open", "object", "__import__", "os.system", "builtins.eval", "save",
        "__builtins__", "PCA", "sklearn.decomposition.PCA", "ModelFileError", "BaseEstimator",
        "Bomb", "", None, 3, ["Toy"], {"$": "tuple", "items": []},
    ],
)  # fmt: skip
def test_unknown_classes_are_refused(model, name):
    """Only public estimators are looked up, nested ones included."""
    backup = part(model, "document").read_bytes()
    forge_document(model, lambda document: document.update({"class": name}))
    with pytest.raises(ModelFileError, match="unknown class"):
        load(model)
    forge(model, document=backup)
    forge_document(model, lambda document: document["params"]["encoder"].update({"class": name}))
    with pytest.raises(ModelFileError, match="unknown class"):
        load(model)


def _put(where, name, value):
    return lambda document: document[where].update({name: value})


def _weights(change):
    return lambda document: change(document["state"]["module_"]["tensors"])


HOSTILE = {
    "method replaced": _put("state", "fit", 1),
    "private": _put("state", "__class__", 1),
    "private end": _put("state", "__dict___", {}),
    "odd attribute": _put("state", "a b_", 1),
    "other extra": _put("state", "_secret", 1),
    "unknown parameter": _put("params", "evil", 1),
    "unknown kind": _put("state", "x_", {"$": "call", "name": "os.system"}),
    "kind of method": _put("state", "x_", {"$": "unpack"}),
    "kind unhashable": _put("state", "x_", {"$": ["tuple"]}),
    "unknown tensor": _put("state", "x_", {"$": "tensor", "name": "nope"}),
    "unused tensor": lambda document: document["state"].pop("_reference"),
    "forward reference": _put("params", "schedule", {"$": "again", "number": 0}),
    "frozen thing": _put("state", "x_", {"$": "frozen", "number": 99, "estimator": {"a": 1}}),
    "wide strings": _put(
        "state", "x_", {"$": "objects", "dtype": "<U999999999", "shape": [1], "items": ["a"]}
    ),
    "odd dtype": _put("state", "x_", {"$": "objects", "dtype": "V8", "shape": [1], "items": ["a"]}),
    "odd shape": _put(
        "state", "x_", {"$": "objects", "dtype": "object", "shape": [-1], "items": [1]}
    ),
    "odd scalar": _put("state", "x_", {"$": "scalar", "dtype": "object", "value": 1}),
    "scalar overflow": _put("state", "x_", {"$": "scalar", "dtype": "int8", "value": 1000}),
    "odd float": _put("state", "x_", {"$": "float", "value": "1"}),
    "unhashable key": _put("state", "x_", {"$": "dict", "items": [[[], 1]]}),
    "odd pair": _put("state", "x_", {"$": "dict", "items": [[1, 2, 3]]}),
    "odd device": _put("state", "x_", {"$": "device", "value": "moon"}),
    "odd path": _put("state", "x_", {"$": "path"}),
    "missing part": lambda document: document.pop("params"),
    "state a list": lambda document: document.update(state=[]),
    "parameter of the wrong type": _put("params", "n_components", "3"),
    "huge module": _put("params", "n_components", 10**12),
    "weights missing": _weights(dict.popitem),
    "weights more": _weights(lambda weights: weights.update(x=next(iter(weights.values())))),
    "weights swapped": _weights(lambda w: w.update({"0.bias": w["0.weight"]})),
    "weights no dict": lambda document: document["state"].update(module_={"$": "module"}),
    "module elsewhere": lambda document: document["state"].update(
        x_={"$": "tuple", "items": [document["state"]["module_"]]}
    ),
    "other root": lambda document: {"$": "tuple", "items": [document]},
    "number root": lambda document: 3,
    "frame": _put("state", "x_", {"$": "frame", "index": {}, "columns": {}, "data": []}),
    "frame lengths": lambda document: document["state"]["history_"]["index"].update(
        range=[0, 9, 1]
    ),
    "deep": _put("state", "x_", json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_documents(model, change):
    """Documents that no save would write are refused though every checksum agrees."""
    forge_document(model, change)
    with pytest.raises(ModelFileError, match=r"document\.[0-9a-f]{16}\.json"):
        load(model)


def test_a_small_file_does_not_fill_the_memory(model):
    """A forged size is refused before its module is made, however much memory there is."""
    forge_document(model, _put("params", "n_components", 10**8))
    with pytest.raises(ModelFileError, match="far larger than the saved weights"):
        load(model)


@pytest.mark.parametrize("raw", [b"NaN", b"Infinity", b"[" * 10**5, b'{"a":1,"a":2}', b"\xff", b""])
def test_documents_that_are_no_json(model, raw):
    """Neither are those that are not strict JSON."""
    forge(model, document=raw)
    with pytest.raises(ModelFileError, match="not valid JSON"):
        load(model)


def test_parameters_of_later_versions_default(model):
    """A model that an older version wrote, without a parameter, loads with its default."""
    forge_document(model, lambda document: document["params"].pop("schedule", None) and None)
    assert load(model).schedule == (1, 2)


def test_lookup_is_in_the_package_only(monkeypatch):
    """`_find_class` asks diffaugkit's `__all__`, and nothing that only happens to be importable."""
    monkeypatch.undo()
    package = types.ModuleType("diffaugkit")
    package.__all__ = ["Toy"]
    package.Toy, package.Other = Toy, Other
    monkeypatch.setitem(sys.modules, "diffaugkit", package)
    assert persistence._find_class("Toy") is Toy
    with pytest.raises(ValueError, match="unknown class"):
        persistence._find_class("Other")
