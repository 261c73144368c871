"""The one way to disk: a model is a folder of safetensors and JSON, and loading it runs no code.

The folder holds three files of ours (anything else in it is left alone):

    tensors.<hash>.safetensors   every array and tensor
    document.<hash>.json         everything else: parameters, scalars, names, nested estimators
    manifest.json                format version, library versions, and for each tensor dtype and
                                 shape, for both files name, size and SHA-256

The manifest is the single commit point. Data files carry the hash of their content in their name,
so that a save never changes a file that the manifest on disk refers to. They are written beside,
fsynced and renamed; then the manifest is, in the same way; only after that are the old data files
removed. Whatever call of a save fails, or is the last one before the process dies or the power
goes, the folder holds the old model or the new one. What a died save leaves, the next one removes.

Values in the document are plain JSON where JSON has them; everything else is an object with the key
``"$"`` that names its kind (``{"$": "tuple", "items": [1, 2]}``), so types come back as they were.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import secrets
import stat
import struct
import sys
from functools import cache, partial
from importlib import metadata
from pathlib import Path, PurePath

import numpy as np
import safetensors.torch
import torch
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from torch.utils._python_dispatch import TorchDispatchMode

from diffaugkit.arrays import warn

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, one writer at a time is up to the caller
    fcntl = None

__all__ = [
    "ModelFileError",
    "check_target",
    "fingerprint",
    "load",
    "read_folder",
    "save",
    "write_folder",
]

FORMAT_VERSION = 1
# Caps, in bytes, on what is read before its checksum is known. They bind saving too, so that what
# was saved can be loaded. The header cap is safetensors' own.
MAX_MANIFEST_SIZE = 64 * 2**20
MAX_DOCUMENT_SIZE = 64 * 2**20
MAX_TENSORS_SIZE = 16 * 2**30
MAX_HEADER_SIZE = 100_000_000
MAX_DEPTH = 64
# Values that building a module may take beside several times its weights: tables, temporaries.
SPARE_VALUES = 2**28

_FORMAT = "diffaugkit-model"
_MANIFEST = "manifest.json"
# Folders that a fit makes in its `checkpoint_dir`.
_CHECKPOINT = re.compile(
    r"training|encoder|diffusion|pretraining|finetuning|vanilla|\d+-(E|M|EM)-\w+", re.ASCII
)
_NAMES = {
    "document": re.compile(r"document\.[0-9a-f]{16}\.json"),
    "tensors": re.compile(r"tensors\.[0-9a-f]{16}\.safetensors"),
}
_DATA = "|".join(pattern.pattern for pattern in _NAMES.values())
_LEFTOVER = re.compile(rf"{_DATA}|({_DATA}|manifest\.json)\.[0-9a-f]{{8}}\.tmp|\.DS_Store")
_FITTED_NAME = re.compile(r"[A-Za-z]\w*_", re.ASCII)
# set_output() keeps its choice here; clone() carries it over, so does a saved model. What
# check_X learns about whole numbers belongs to every estimator.
_EXTRA_STATE = ("_sklearn_output_config", "_whole_numbers")
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ARRAY_DTYPES = {str(dtype).removeprefix("torch.") for dtype in _CODES} - {"bfloat16"}
_GENERATORS = (np.random.RandomState, np.random.Generator, torch.Generator)
_SCALAR_DTYPES = (_ARRAY_DTYPES - {"complex64"}) | {"str"}


class ModelFileError(ValueError):
    """A model folder is missing, damaged, hostile, or from a newer version.

    The message names the file and the problem.
    """


# ---- public functions ----------------------------------------------------------------------------


def save(estimator, path):
    """Save an estimator, fitted or not, to a folder.

    Parameters and fitted attributes (names that end with an underscore, and those that the class
    lists in ``_extra_state``) are saved, nested estimators included; of a module only the weights.
    The same estimator always gives the same bytes. Nothing is written before everything was found
    savable, and a save that fails leaves the model that was there before.

    Parameters
    ----------
    estimator : estimator
        A public estimator of diffaugkit, or a :class:`~sklearn.frozen.FrozenEstimator` of one.
    path : str or path-like
        Folder to write to. It is made if missing (parents too), and written over if it holds a
        model. One process writes to a folder at a time: others wait where there are file locks.

    Raises
    ------
    ModelFileError
        If `path` is a file, or a folder that holds something else than a model.
    TypeError
        If a parameter or fitted attribute is of a type that cannot be saved.
    ValueError
        If parameters were changed after ``fit`` so that the module could not be rebuilt from them.
    OSError
        If a call of the file system fails, such as a full disk.

    Warns
    -----
    UserWarning
        For callbacks, random number generators and metadata requests, which are not saved.

    See Also
    --------
    load : Load what was saved.

    Examples
    --------
    >>> import tempfile
    >>> from diffaugkit import CellPreprocessor, load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(CellPreprocessor(n_top_genes=500), folder)
    ...     load(folder).n_top_genes
    500
    """
    kind = type(estimator).__name__
    if not isinstance(estimator, BaseEstimator):
        raise TypeError(f"save takes an estimator, got {kind}; write_folder takes plain data")
    packer = _Packer()
    document = packer.pack(estimator, kind)
    _write(Path(path).expanduser(), packer.tensors, packer.kinds, document)


def load(path):
    """Load an estimator that was saved with :func:`save`.

    Sizes, checksums, header, offsets, shapes and dtypes are verified before anything is built, and
    classes are looked up among diffaugkit's public estimators only. Modules come back on the CPU;
    the global random state is not touched.

    Parameters
    ----------
    path : str or path-like
        The folder.

    Returns
    -------
    estimator : estimator
        A new estimator, equal to the saved one bit for bit.

    Raises
    ------
    ModelFileError
        If the folder is missing, damaged, not a saved estimator, or from a newer version.

    See Also
    --------
    save : Save an estimator; has an example.
    """
    tensors, document, name = _read(Path(path).expanduser())
    unpacker = _Unpacker(tensors)
    estimator = _unpack(unpacker, document, name)
    if not isinstance(estimator, BaseEstimator):
        raise ModelFileError(f"{name}: holds plain data, not an estimator; read_folder reads it")
    if unused := sorted(set(tensors) - unpacker.used):
        raise ModelFileError(f"{name}: tensors that belong to nothing: {_some(unused)}")
    return estimator


def write_folder(path, tensors, document):
    """Write tensors and plain values to a folder, atomically.

    What :func:`save` is for estimators, this is for anything else, such as training checkpoints.

    Parameters
    ----------
    path : str or path-like
        Folder to write to, as for :func:`save`.
    tensors : dict of str to (Tensor or ndarray)
        Dense, of any shape and device; bool, integer, float16 to float64, bfloat16, complex64.
        They may share memory and hold NaN and infinity.
    document : dict
        None, bool, int, float (NaN and infinity too), str, path, NumPy scalars, string arrays, and
        lists, tuples and dicts of those. Arrays of numbers belong in `tensors`.

    Raises
    ------
    ModelFileError
        If `path` is a file, or a folder that holds something else than a model.
    TypeError
        If a value is of another type.
    OSError
        If a call of the file system fails, such as a full disk.

    Examples
    --------
    >>> import tempfile, torch
    >>> from diffaugkit.persistence import read_folder, write_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(folder, {"weight": torch.ones(2)}, {"step": 3, "loss": float("inf")})
    ...     read_folder(folder)
    ({'weight': tensor([1., 1.])}, {'step': 3, 'loss': inf})
    """
    if type(document) is not dict:
        raise TypeError(f"document must be a dict, got {type(document).__name__}")
    packer = _Packer(plain=True)
    packed = packer.pack(document, "document")
    for name, value in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"tensors: {name!r} cannot be a name")
        packer.tensors[name] = _as_tensor(value, f"tensors[{name!r}]")
        packer.kinds[name] = "tensor" if isinstance(value, torch.Tensor) else "array"
    _write(Path(path), packer.tensors, packer.kinds, packed)


def fingerprint(*values):
    """Digest of arrays and of the weights of modules, 16 hexadecimal digits.

    Parameters
    ----------
    *values : ndarray, Tensor or nn.Module
        What tells this model, or these data, from others.

    Returns
    -------
    str

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.persistence import fingerprint
    >>> fingerprint(np.zeros(2)) == fingerprint(np.zeros(2)) != fingerprint(np.ones(2))
    True
    """
    digest = hashlib.sha256()
    for value in values:
        parts = [value]
        if hasattr(value, "state_dict"):  # which may hold more than weights
            parts = [v for v in value.state_dict().values() if isinstance(v, torch.Tensor)]
        for part in parts:
            if isinstance(part, torch.Tensor):
                form = tuple(part.shape), part.dtype
                part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            else:
                part = np.ascontiguousarray(part)
                form = part.shape, part.dtype.str
            digest.update(repr(form).encode())
            digest.update(part.reshape(-1).view(np.uint8))  # tobytes() would copy all
    return digest.hexdigest()[:16]


def read_folder(path):
    """Read what :func:`write_folder` wrote, with every check of :func:`load`.

    Parameters
    ----------
    path : str or path-like
        The folder.

    Returns
    -------
    tensors : dict of str to (Tensor or ndarray)
        On the CPU, each of the kind that was given.
    document : dict
        The values, each of the type that was given.

    Raises
    ------
    ModelFileError
        If the folder is missing, damaged, not such a folder, or from a newer version.
    """
    tensors, document, name = _read(Path(path))
    if isinstance(document, dict) and document.get("$") in ("estimator", "frozen"):
        raise ModelFileError(f"{name}: holds an estimator, not plain data; load reads it")
    return tensors, _unpack(_Unpacker({}), document, name)


# ---- values to JSON ------------------------------------------------------------------------------


class _Packer:
    """Turns values into JSON; arrays go to `tensors`, unless `plain`, where they are refused."""

    def __init__(self, *, plain=False):
        self.plain = plain
        self.tensors = {}
        self.kinds = {}
        self._depth = 0
        # id -> (object, marker): an encoder that a generator shares with its owner is saved once
        # and is one object again after loading. The object is kept so that no other gets its id.
        self._seen = {}

    def pack(self, value, where):
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"{where[:99]}: nested over {MAX_DEPTH} levels, or contains itself")
        packed = self._pack_object(value, where)
        self._depth -= 1
        return packed

    def _pack_object(self, value, where):
        kind = type(value)
        pandas = sys.modules.get("pandas")
        if kind is list:
            return [self.pack(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if kind is tuple:
            return {"$": "tuple", "items": self.pack(list(value), where)}
        if kind is dict:
            packed = {key: self.pack(item, f"{where}.{key}") for key, item in value.items()}
            if all(type(key) is str for key in packed) and "$" not in packed:
                return packed
            pairs = [[self.pack(key, where), item] for key, item in packed.items()]
            return {"$": "dict", "items": pairs}
        if isinstance(value, np.generic):
            name = "str" if kind is np.str_ else value.dtype.name
            if name in _SCALAR_DTYPES:
                return {"$": "scalar", "dtype": name, "value": self.pack(value.item(), where)}
        if isinstance(value, PurePath):
            return {"$": "path", "value": str(value)}
        if isinstance(value, torch.device):
            return {"$": "device", "value": str(value)}
        if kind is np.ndarray and value.dtype.kind in "UO":
            return self._pack_objects(value, where)
        if not self.plain:
            if kind in (np.ndarray, np.memmap) or isinstance(value, torch.Tensor):
                return self._once(value, where, self._pack_tensor)
            if isinstance(value, BaseEstimator):
                return self._once(value, where, self._pack_estimator)
            if pandas is not None and kind is pandas.DataFrame:
                return self._pack_frame(value, where)
        raise _cannot_save(value, where)

    def _once(self, value, where, pack):
        if id(value) in self._seen:
            marker = self._seen[id(value)][1]
            if marker is None:
                raise ValueError(f"{where}: contains itself")
            return marker
        number = len(self._seen)
        self._seen[id(value)] = (value, None)
        packed = pack(value, where)
        marker = packed
        if packed["$"] != "tensor":
            packed["number"] = number
            marker = {"$": "again", "number": number}
        self._seen[id(value)] = (value, marker)
        return packed

    def _pack_tensor(self, value, where):
        name = where.partition(".")[2]
        while name in self.tensors:
            name += "'"
        self.tensors[name] = _as_tensor(value, where)
        self.kinds[name] = "tensor" if isinstance(value, torch.Tensor) else "array"
        return {"$": "tensor", "name": name}

    def _pack_objects(self, value, where):
        if value.nbytes > MAX_DOCUMENT_SIZE:
            raise ValueError(f"{where}: an array of {value.nbytes} bytes is too large for JSON")
        dtype = f"<U{value.dtype.itemsize // 4}" if value.dtype.kind == "U" else "object"
        items = self.pack(value.ravel().tolist(), where)
        return {"$": "objects", "dtype": dtype, "shape": list(value.shape), "items": items}

    def _pack_frame(self, frame, where):
        columns = [frame.iloc[:, i] for i in range(frame.shape[1])]
        return {
            "$": "frame",
            "index": self._pack_labels(frame.index, f"{where}.index"),
            "columns": self._pack_labels(frame.columns, f"{where}.columns"),
            "data": [self._pack_column(column, f"{where}.{column.name}") for column in columns],
        }

    def _pack_labels(self, axis, where):
        name = self.pack(axis.name, where)
        if type(axis).__name__ == "RangeIndex":
            return {"name": name, "range": [axis.start, axis.stop, axis.step]}
        return {"name": name, **self._pack_column(axis, where)}

    def _pack_column(self, column, where):
        dtype = column.dtype.name
        if dtype in ("str", "string"):
            column = column.astype(object).where(column.notna(), None)
        elif not isinstance(column.dtype, np.dtype) or getattr(column, "nlevels", 1) > 1:
            raise _cannot_save(column, where)
        return {"dtype": dtype, "values": self.pack(column.to_numpy(), where)}

    def _pack_estimator(self, estimator, where):
        if isinstance(estimator, FrozenEstimator):
            return {"$": "frozen", "estimator": self.pack(estimator.estimator, where)}
        _check_ours(estimator, where)
        params = {}
        for name, value in estimator.get_params(deep=False).items():
            if isinstance(value, _GENERATORS) or (name == "callbacks" and value):
                _warn_not_saved(f"{where}.{name}", value)
                value = None
            params[name] = self.pack(value, f"{where}.{name}")
        if "_metadata_request" in vars(estimator):
            _warn_not_saved(f"{where}._metadata_request", estimator._metadata_request)
        cls = type(estimator)
        names = [name for name in vars(estimator) if _is_state(name, cls)]
        state = {}
        # The module is last: it is built from the rest.
        for name in sorted(names, key="module_".__eq__):
            value = getattr(estimator, name)
            is_module = name == "module_" and isinstance(value, torch.nn.Module)
            pack = partial(self._pack_module, estimator) if is_module else self.pack
            state[name] = pack(value, f"{where}.{name}")
        return {"$": "estimator", "class": cls.__name__, "params": params, "state": state}

    def _pack_module(self, estimator, module, where):
        module = getattr(module, "_orig_mod", module)  # torch.compile wraps
        weights = module.state_dict()
        # A model that could be written but never read again is the worst that a save can do.
        if _shapes(weights) != _shapes(_rebuild(estimator, weights).state_dict()):
            raise ValueError(
                f"{where}: the weights do not fit the parameters of {type(estimator).__name__}, "
                "which were changed after fit; set them back or call fit again, then save"
            )
        names = {key: self._pack_tensor(w, f"{where}.{key}")["name"] for key, w in weights.items()}
        return {"$": "module", "training": module.training, "tensors": names}


def _as_tensor(value, where):
    """Copy to a CPU tensor that shares memory with no other, as safetensors demands."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and value.dtype in _CODES and value.device.type != "meta":
            plain = value.detach().cpu().resolve_conj().resolve_neg()
            return plain.clone(memory_format=torch.contiguous_format)
    elif type(value) in (np.ndarray, np.memmap) and value.dtype.name in _ARRAY_DTYPES:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    raise _cannot_save(value, where)


def _cannot_save(value, where):
    kind = type(value).__name__ + (f" of {value.dtype}" if hasattr(value, "dtype") else "")
    return TypeError(
        f"{where}: cannot save a value of type {kind}. Saved are None, bool, int, float, str, "
        "paths, lists, tuples and dicts of those, dense arrays and tensors of numbers, arrays of "
        "strings, DataFrames of those with one level of labels, diffaugkit's estimators, and one "
        "module named module_. Convert it, set it to None, or use pickle (which runs code)."
    )


def _warn_not_saved(where, value):
    kind = type(value).__name__
    warn(f"{where} ({kind}) is not saved: set it again after loading")


def _is_state(name, cls):
    extra = (*_EXTRA_STATE, *getattr(cls, "_extra_state", ()))
    return bool(_FITTED_NAME.fullmatch(name)) or name in extra


def _shapes(weights):
    return {key: tuple(value.shape) for key, value in weights.items()}


# ---- JSON to values ------------------------------------------------------------------------------


class _Unpacker:
    """Turns JSON back into values. Whatever is not as `_Packer` writes it raises."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.used = set()
        self._seen = {}

    def unpack(self, value):
        if isinstance(value, list):
            return [self.unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$" not in value:
            return {key: self.unpack(item) for key, item in value.items()}
        match value:
            case {"$": "float", "value": "nan" | "inf" | "-inf" as text}:
                return float(text)
            case {"$": "tuple", "items": list(items)}:
                return tuple(self.unpack(items))
            case {"$": "dict", "items": list(items)}:
                return {self.unpack(key): self.unpack(item) for key, item in items}
            case {"$": "scalar", "dtype": str(name), "value": item} if name in _SCALAR_DTYPES:
                scalar = np.dtype(name).type(self.unpack(item))
                if isinstance(scalar, np.integer) and scalar != item:  # NumPy 1 wraps around
                    raise OverflowError(f"{item} is no {name}")
                return scalar
            case {"$": "path", "value": str(text)}:
                return Path(text)
            case {"$": "device", "value": str(text)}:
                return torch.device(text)
            case {"$": "tensor", "name": str(name)}:
                return self._tensor(name)
            case {"$": "objects", "dtype": str(name), "shape": list(shape), "items": list(items)}:
                return self._objects(name, shape, self.unpack(items))
            case {"$": "frame", "index": dict(index), "columns": dict(columns), "data": list(data)}:
                return self._frame(index, columns, data)
            case {"$": "again", "number": int(number)}:
                return self._seen[number]
            case {"$": "frozen", "number": int(number), "estimator": dict(inner)}:
                self._seen[number] = self._frozen(inner)
                return self._seen[number]
            case {"$": "estimator", "number": int(number)}:
                self._seen[number] = self._estimator(value)
                return self._seen[number]
        raise ValueError(f"unknown kind of value {value['$']!r}")

    def _tensor(self, name):
        self.used.add(name)
        return self.tensors[name]

    def _objects(self, name, shape, items):
        if name != "object":
            width = int(re.fullmatch(r"<U(\d{1,9})", name)[1])
            size = 4 * width * len(items)
            if size > MAX_DOCUMENT_SIZE or any(len(item) > width for item in items):
                raise ValueError(f"{len(items)} strings do not fit an array of {name}")
        array = np.empty(len(items), dtype=name)
        for i, item in enumerate(items):
            array[i] = item
        return array.reshape([_size(n) for n in shape])

    def _frame(self, index, columns, data):
        import pandas as pd

        def values(packed):
            found, dtype = self.unpack(packed["values"]), packed["dtype"]
            return pd.array(found, dtype=dtype) if dtype in ("str", "string") else found

        def labels(packed):
            name = self.unpack(packed["name"])
            if "range" in packed:
                return pd.RangeIndex(*map(int, packed["range"]), name=name)
            found = values(packed)
            return pd.Index(found, dtype=found.dtype, name=name)

        index, found = labels(index), map(values, data)
        series = {i: pd.Series(x, index=index, dtype=x.dtype) for i, x in enumerate(found)}
        frame = pd.DataFrame(series, index=index)
        frame.columns = labels(columns)
        return frame

    def _frozen(self, inner):
        estimator = self.unpack(inner)
        if not isinstance(estimator, BaseEstimator):
            raise ValueError("only an estimator can be frozen")
        return FrozenEstimator(estimator)

    def _estimator(self, value):
        cls = _find_class(value["class"])
        # Parameters that an older version did not have yet keep their defaults.
        if unknown := sorted(set(value["params"]) - set(inspect.signature(cls).parameters)):
            raise ValueError(f"{cls.__name__} has no parameter {_some(unknown)}")
        estimator = cls(**{key: self.unpack(item) for key, item in value["params"].items()})
        for name, item in value["state"].items():
            if not _is_state(name, cls):
                raise ValueError(f"{name!r} cannot be a fitted attribute of {cls.__name__}")
            is_module = isinstance(item, dict) and item.get("$") == "module"
            value = self._module(item, estimator) if is_module else self.unpack(item)
            setattr(estimator, name, value)
        return estimator

    def _module(self, packed, estimator):
        weights = {key: self._tensor(name) for key, name in packed["tensors"].items()}
        estimator._validate_params()
        module = _rebuild(estimator, weights)
        for key, value in module.state_dict(keep_vars=True).items():
            # load_state_dict copies into the dtype that is there; what was bf16 shall stay so.
            if key in weights and value.is_floating_point() and weights[key].is_floating_point():
                value.data = value.data.to(weights[key].dtype)
        module.load_state_dict(weights, strict=True)
        return module.train(packed["training"] is True)


def _unpack(unpacker, document, name):
    try:
        return unpacker.unpack(document)
    # A hostile document can make each step fail in its own way; to the caller all mean the same.
    except Exception as error:
        raise ModelFileError(f"{name}: {error or type(error).__name__}") from error


def _rebuild(estimator, weights):
    with torch.random.fork_rng(devices=[]), _Bounded(sum(w.numel() for w in weights.values())):
        return estimator._build()


class _Bounded(TorchDispatchMode):
    """Stop what makes far more values than there are weights: a forged size would fill memory."""

    def __init__(self, n_weights):
        super().__init__()
        self._left = 8 * n_weights + SPARE_VALUES

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        # New is what shares no memory with an argument. Each module takes room of its own.
        if isinstance(found, torch.Tensor) and func._schema.returns[0].alias_info is None:
            self._left -= max(found.numel(), 1024)
            if self._left < 0:
                raise ValueError("the parameters make a module far larger than the saved weights")
        return found


def _find_class(name):
    """Look up a public estimator of diffaugkit; nothing else is imported or called for a file."""
    package = importlib.import_module("diffaugkit")
    known = isinstance(name, str) and name in getattr(package, "__all__", ())
    cls = getattr(package, name) if known else None
    if not (isinstance(cls, type) and issubclass(cls, BaseEstimator)):
        raise ValueError(f"unknown class {name!r}, not a public estimator of this diffaugkit")
    return cls


def _check_ours(estimator, where):
    cls = type(estimator)
    try:
        found = _find_class(cls.__name__)
    except ValueError:
        found = None
    if found is not cls:
        raise TypeError(
            f"{where}: {cls.__module__}.{cls.__qualname__} is not a public estimator of diffaugkit "
            "and cannot be saved; save diffaugkit's alone, and the rest with skops or pickle"
        )


def _size(value):
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a size")
    return value


def _some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


# ---- writing -------------------------------------------------------------------------------------
# Every call that changes something on disk is made through the module os (hence "noqa: PTH"), so
# that tests can let each one fail in turn.


def _write(folder, tensors, kinds, document):
    contents = {"document": _dumps(document), "tensors": safetensors.torch.save(tensors)}
    manifest = _manifest(contents, tensors, kinds)
    encoded = _dumps(manifest, indent=1)
    for part, size, cap in (
        ("document", len(contents["document"]), MAX_DOCUMENT_SIZE),
        ("tensors", len(contents["tensors"]), MAX_TENSORS_SIZE),
        ("manifest", len(encoded), MAX_MANIFEST_SIZE),
    ):
        if size > cap:
            raise ValueError(f"{folder}: the {part} has {size} bytes, more than the {cap} allowed")
    _make_folder(folder)
    with _locked(folder) as descriptor:
        before = check_target(folder)
        undo = []
        try:
            for part, data in contents.items():
                name = manifest["files"][part]["name"]
                if name not in before:
                    undo.append(name)
                _write_file(folder, name, data, undo)
            _sync(descriptor)
            _write_file(folder, _MANIFEST, encoded, undo, commit=True)
            _sync(descriptor)
        except BaseException:
            _remove(folder, undo)
            raise
        # The new model is safe from here on: what cannot be removed now will be next time.
        keep = {entry["name"] for entry in manifest["files"].values()}
        _remove(folder, [name for name in before if _LEFTOVER.fullmatch(name) and name not in keep])


def _manifest(contents, tensors, kinds):
    files = {}
    for part, suffix in (("document", "json"), ("tensors", "safetensors")):
        digest = hashlib.sha256(contents[part]).hexdigest()
        name = f"{part}.{digest[:16]}.{suffix}"
        files[part] = {"name": name, "size": len(contents[part]), "sha256": digest}
    table = {}
    for name, tensor in tensors.items():
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape)}
        table[name] = entry | {"kind": kinds[name], "finite": _is_finite(tensor)}
    manifest = {"format": _FORMAT, "version": FORMAT_VERSION, "libraries": _libraries()}
    manifest |= {"files": files, "tensors": table}
    return manifest | {"sha256": hashlib.sha256(_dumps(manifest)).hexdigest()}


@cache
def _libraries():
    versions = {"python": platform.python_version()}
    for library in ("diffaugkit", "torch", "numpy", "scikit-learn", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _is_finite(tensor):
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    return True


def _make_folder(folder):
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process may be making it too
            os.mkdir(new)  # noqa: PTH102
        if os.name != "nt":
            descriptor = os.open(new.parent, os.O_RDONLY)
            try:
                _sync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _locked(folder):
    """Descriptor of the folder, for fsync; it holds the lock that keeps a second writer waiting."""
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: is not a folder; a model is saved to a folder of its own")
    if os.name == "nt":
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def check_target(folder):
    """List a folder to write to; refuse one that holds anything but a model or a died save."""
    names = os.listdir(folder)  # noqa: PTH208
    if _MANIFEST in names:
        raw = _read_file(folder, _MANIFEST, MAX_MANIFEST_SIZE)
        _check_format(_loads(raw, folder / _MANIFEST), folder / _MANIFEST)
    elif others := sorted(name for name in names if not _LEFTOVER.fullmatch(name)):
        is_fit = any(_CHECKPOINT.fullmatch(name) for name in others)
        kind = "the checkpoints of a fit" if is_fit else "other files"
        raise ModelFileError(f"{folder}: holds {kind} ({_some(others)}); save to a new folder")
    return set(names)


def _write_file(folder, name, data, undo, *, commit=False):
    temporary = f"{name}.{secrets.token_hex(4)}.tmp"
    undo.append(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(folder / temporary, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        error.filename = os.fspath(folder / name)  # a full disk names no file
        raise
    finally:
        os.close(descriptor)
    if commit:
        # Once the manifest is renamed, or may have been, its data files must stay.
        undo[:] = [temporary]
    os.replace(folder / temporary, folder / name)  # noqa: PTH105


def _sync(descriptor):
    if descriptor is not None:
        os.fsync(descriptor)


def _remove(folder, names):
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(folder / name)  # noqa: PTH108


def _dumps(value, indent=None):
    separators = (",", ":") if indent is None else None
    return json.dumps(value, allow_nan=False, indent=indent, separators=separators).encode("ascii")


# ---- reading -------------------------------------------------------------------------------------


def _read(folder):
    """Return tensors, packed document, and the document's file name for messages."""
    if not folder.is_dir():
        problem = "is a file (pickles are never read)" if folder.exists() else "does not exist"
        raise ModelFileError(f"{folder}: {problem}; a saved model is a folder with a {_MANIFEST}")
    while True:
        raw = _read_file(folder, _MANIFEST, MAX_MANIFEST_SIZE)
        try:
            return _read_parts(folder, raw)
        except ModelFileError:
            # A save that ended meanwhile has removed the files of this manifest: read the new one.
            if _read_file(folder, _MANIFEST, MAX_MANIFEST_SIZE) == raw:
                raise


def _read_parts(folder, raw):
    manifest = _check_manifest(raw, folder / _MANIFEST)
    contents = {}
    for part, cap in (("document", MAX_DOCUMENT_SIZE), ("tensors", MAX_TENSORS_SIZE)):
        entry = manifest["files"][part]
        contents[part] = _read_file(folder, entry["name"], cap, entry["size"])
        if hashlib.sha256(contents[part]).hexdigest() != entry["sha256"]:
            raise ModelFileError(f"{folder / entry['name']}: damaged or altered (SHA-256 differs)")
    table = manifest["tensors"]
    name = folder / manifest["files"]["tensors"]["name"]
    _check_header(contents["tensors"], table, name)
    try:
        tensors = safetensors.torch.load(contents.pop("tensors"))
    except Exception as error:
        raise ModelFileError(f"{name}: not a valid safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if table[key]["finite"] and not _is_finite(tensor):
            raise ModelFileError(f"{name}: {key!r} holds NaN or infinity against its manifest")
        if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
            raise ModelFileError(f"{name}: {key!r} holds bytes that are no booleans")
        if table[key]["kind"] == "array":
            tensors[key] = tensor.numpy()
    ordered = {key: tensors[key] for key in table}
    name = folder / manifest["files"]["document"]["name"]
    return ordered, _loads(contents["document"], name), name


def _read_file(folder, name, cap, size=None):
    path = folder / name
    # No symbolic link is followed, and a pipe under that name must not hang the reader.
    flags = os.O_RDONLY
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: missing; the folder holds no complete model") from None
    except OSError as error:
        raise ModelFileError(f"{path}: not a readable regular file ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or path.is_symlink():
            raise ModelFileError(f"{path}: not a regular file")
        if size is not None and status.st_size != size:
            raise ModelFileError(f"{path}: has {status.st_size} bytes, its manifest says {size}")
        if status.st_size > cap:
            raise ModelFileError(f"{path}: has {status.st_size} bytes, more than the {cap} allowed")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _check_format(manifest, path):
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ModelFileError(f"{path}: not a manifest of diffaugkit")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise ModelFileError(f"{path}: not a format version: {version!r}")
    return version


def _check_manifest(raw, path):
    manifest = _loads(raw, path)
    if _check_format(manifest, path) > FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: format version {manifest['version']} is newer than {FORMAT_VERSION}, the "
            f"newest known here; upgrade diffaugkit (written with {manifest.get('libraries')})"
        )
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    try:
        # Compared as bytes too: not even white space can differ unnoticed.
        digest = hashlib.sha256(_dumps(rest)).hexdigest()
        if manifest.get("sha256") != digest or _dumps(manifest, indent=1) != raw:
            raise ValueError("damaged or altered, its own SHA-256 differs")
        if manifest.keys() != {"format", "version", "libraries", "files", "tensors", "sha256"}:
            raise ValueError("an entry is missing or unknown")
        for part, pattern in _NAMES.items():
            entry = manifest["files"][part]
            if not pattern.fullmatch(entry["name"]):
                raise ValueError(f"{entry['name']!r} is not a name for the {part}")
            if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"no SHA-256 of the {part}")
            _size(entry["size"])
        for name, entry in manifest["tensors"].items():
            kinds = ("tensor",) if entry["dtype"] == "BF16" else ("tensor", "array")
            if entry["dtype"] not in _DTYPES or entry["kind"] not in kinds:
                raise ValueError(f"unknown dtype or kind of tensor {name!r}")
            entry["shape"] = [_size(n) for n in entry["shape"]]
            entry["finite"] = entry["finite"] is not False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a valid manifest: {error!r}") from error
    return manifest


def _check_header(data, table, path):
    """Check the safetensors header against the manifest's table before the library parses it."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else MAX_HEADER_SIZE + 1
    if length > min(MAX_HEADER_SIZE, len(data) - 8):
        raise ModelFileError(f"{path}: not safetensors: header longer than the file or than 100 MB")
    header = _loads(data[8 : 8 + length], path)
    if not isinstance(header, dict) or header.keys() != table.keys():
        raise ModelFileError(f"{path}: its tensors are not those of the manifest")
    try:
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = table[name]["dtype"], table[name]["shape"]
            if entry["dtype"] != dtype or entry["shape"] != shape:
                raise ValueError(f"tensor {name!r} differs from the manifest in dtype or shape")
            size = math.prod(shape) * _DTYPES[dtype].itemsize
            if entry["data_offsets"] != [end, end + size]:
                raise ValueError(f"tensor {name!r} overlaps, leaves a gap, or has the wrong size")
            end += size
        if end != len(data) - 8 - length:
            raise ValueError("the tensors do not fill the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: not a valid safetensors file: {error}") from error


def _loads(data, path):
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from error


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")
