"""What all estimators share: common parameters, device, seeds, and state that travels.

Private names of scikit-learn are taken from here, but for those that the gate (``data``) and
``preprocessing`` need, which do without torch's estimators.
"""

import copy
import functools
import math
import os
import secrets
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, Options, StrOptions
from torch import nn

from diffaugkit.data import unchanged_on_failure
from diffaugkit.persistence import fingerprint, save
from diffaugkit.runtime import mix_seed, resolve_device
from diffaugkit.training import fit_loop

__all__ = [
    "HasMethods",
    "Interval",
    "Options",
    "StrOptions",
    "TorchEstimator",
    "TorchTransformer",
    "Widths",
    "_fit_context",
    "all_or_nothing",
    "described",
]

_CHILD = 3
# What does not shape a fit, or what the loop compares itself: its settings, data and weights.
_SEEN_ELSEWHERE = frozenset(
    (
        *("device", "precision", "compile", "random_state", "verbose", "callbacks"),
        *("checkpoint_dir", "store_dir", "max_epochs", "batch_size", "learning_rate"),
        *("layer", "image_shape", "pretrained", "download", "n_jobs", "memory"),
    )
)


def all_or_nothing(fit):
    """Let a failed or interrupted ``fit`` leave the estimator as it was, still fitted if it was."""

    @functools.wraps(fit)
    def run(self, *args, **kwargs):
        _check_outlets(self)
        # Weights that are made in the caller's inference mode could never be trained.
        with unchanged_on_failure(self), torch.inference_mode(False):
            return fit(self, *args, **kwargs)

    return run


def _check_outlets(estimator):
    """Refuse, before any work, folders that cannot be written and callbacks that are none."""
    for name in ("checkpoint_dir", "store_dir"):
        folder = getattr(estimator, name, None)
        if folder is None:
            continue
        path = Path(folder).expanduser().absolute()
        there = next(part for part in (path, *path.parents) if os.path.lexists(part))
        if not there.is_dir():
            raise NotADirectoryError(f"{name}={str(folder)!r}: {there} is not a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{name}={str(folder)!r}: {there} may not be written to.")
    callbacks = estimator.callbacks
    for number, callback in enumerate(callbacks if isinstance(callbacks, list | tuple) else ()):
        if not callable(callback):
            raise TypeError(
                f"callbacks[{number}] is {callback!r}; it must be a function, called as "
                "callback(epoch, history)."
            )


class Widths(HasMethods):  # scikit-learn takes none but its own kinds of constraints
    """Constraint on a parameter that holds the widths of layers, at least `fewest` of them."""

    def __init__(self, fewest=1):
        super().__init__(["__len__", "__iter__"])
        self.fewest = fewest

    def is_satisfied_by(self, val):  # noqa: D102
        return (
            isinstance(val, tuple | list)
            and len(val) >= self.fewest
            and all(isinstance(width, Integral) and width >= 1 for width in val)
        )

    def __str__(self):
        """Say what is allowed, in scikit-learn's message."""
        return "a tuple of integers of at least 1"


class TorchEstimator(BaseEstimator):
    """Base class of the estimators that hold a torch module.

    A subclass lists these common parameters in its own ``__init__``, as scikit-learn reads them
    there, merges ``TorchEstimator._parameter_constraints`` into its own, and writes ``_build``.

    Parameters
    ----------
    max_epochs : int
        Passes over the data, at least 1.
    batch_size : int
        Samples of a batch, clipped to their number.
    learning_rate : float
        Peak learning rate of AdamW, above 0.
    device : {"auto", "cpu", "cuda", "cuda:<i>", "mps"} or torch.device, default="auto"
        Where to compute: "auto" takes CUDA, else MPS, else the CPU.
    precision : {"auto", "bf16", "fp32"}, default="auto"
        Precision of products: "auto" takes bf16 where the device multiplies it natively.
    compile : bool, default=False
        Compile the network with ``torch.compile``: seconds to minutes at the start, for less per
        step on large networks.
    random_state : int, RandomState or None, default=None
        Seed of a fit. An int gives the same result at each fit; a RandomState gives, and moves to,
        its next number; None draws from the operating system. Global streams are never touched.
    verbose : int, default=0
        From 1 on a progress bar.
    checkpoint_dir : str, path-like or None, default=None
        Folder from which a killed fit goes on, exactly; see :func:`~diffaugkit.training.fit_loop`.
        With ``random_state=None`` the seed is then 0: another start could not go on otherwise.
    callbacks : callable, list of callables or None, default=None
        ``callback(epoch, history)`` after each epoch; True stops the fit, or, in an estimator of
        several phases, the phase that is running. :class:`~diffaugkit.EarlyStopping` is one.
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "bf16", "fp32"})],
        "compile": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "checkpoint_dir": [str, os.PathLike, None],
        "callbacks": [callable, list, tuple, None],
    }

    # Parameters that no training sees, so that a killed fit may go on with others.
    _used_later: tuple = ()

    def _build(self):
        """Make the module, on the CPU, from ``get_params()`` and a few fitted scalars.

        ``fit`` and ``persistence.load`` both call it, so that a saved model is rebuilt the same. An
        estimator whose parts hold all the modules needs none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no module of its own")

    def save(self, path):
        """Save the estimator to a folder of safetensors and JSON.

        Parameters
        ----------
        path : str or path-like
            Folder to write. ``diffaugkit.load(path)`` reads it and runs no code from it.

        Raises
        ------
        TypeError
            If a parameter or attribute has no safe form; the message names it and the way out.
        OSError
            If the file system refuses; what was there before is then still there.
        """
        save(self, path)

    def set_params(self, **params):
        """Set parameters of this estimator and of its parts.

        Fitted parts follow `device`: a model that was trained on a GPU goes on elsewhere after
        ``set_params(device="cpu")``.

        Parameters
        ----------
        **params : dict
            Values by name, ``part__name`` for those of a part.

        Returns
        -------
        self
        """
        super().set_params(**params)
        if "device" in params:
            for name, part in vars(self).items():
                part = getattr(part, "estimator", part)  # of a frozen one
                if name.endswith("_"):
                    for each in (part, *(step for _, step in getattr(part, "steps", ()))):
                        if isinstance(each, TorchEstimator):
                            each.set_params(device=self.device)
        return self

    def _device(self):
        return resolve_device(self.device)

    def _seed(self):
        """Seed of this fit, in 0 to 2**32 - 1. Call it once per fit: a RandomState moves on."""
        state = self.random_state
        if isinstance(state, Integral):
            return int(state)
        if state is not None:
            return int(check_random_state(state).randint(np.iinfo(np.int32).max))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "random_state=None would give each of the launched processes another seed; pass an "
                "int."
            )
        return 0 if self.checkpoint_dir is not None else secrets.randbits(32)

    @staticmethod
    def _child_seed(seed, number):
        """Seed of part `number` of a fit, in 0 to 2**32 - 1: fit for a ``random_state``."""
        return mix_seed(seed, _CHILD, number) % 2**32

    def _hold_out(self, n, seed):
        """Numbers of the rows to train on, and of those of `validation_fraction`, or None."""
        if not self.validation_fraction:
            return np.arange(n), None
        n_held = round(self.validation_fraction * n)
        if not n_held or n - n_held < 2:
            raise ValueError(
                f"validation_fraction={self.validation_fraction!r} holds out {n_held} of {n} rows: "
                "it must hold out one at least and leave two to train on. Give more rows, or 0."
            )
        order = np.random.default_rng(self._child_seed(seed, 4)).permutation(n)
        return np.sort(order[n_held:]), np.sort(order[:n_held])

    def _folder(self, name):
        """Folder of a part or a phase below `checkpoint_dir`; None without one."""
        folder = self.checkpoint_dir
        return None if folder is None else str(Path(os.fspath(folder)).expanduser() / name)

    def _hand_over(self, part, **more):
        """Give a part the common parameters of this estimator, and check those of the part now."""
        names = ("device", "precision", "compile", "verbose", "callbacks")
        part.set_params(**{name: getattr(self, name) for name in names}, **more)
        part._validate_params()  # before any work, and not after the parts in front of it
        return part

    def _seed_part(self, part, seed, number):
        """Give a part a seed of this fit where it has none; of a pipeline, its steps."""
        # Our estimators seed their own parts.
        params = part.get_params(deep=not isinstance(part, TorchEstimator))
        ours = [f"{name}__" for name, value in params.items() if isinstance(value, TorchEstimator)]
        unset = [
            name
            for name, value in params.items()
            if value is None
            and name.rpartition("__")[2] == "random_state"
            and not any(name.startswith(own) and name != f"{own}random_state" for own in ours)
        ]
        part.set_params(**dict.fromkeys(unset, self._child_seed(seed, number)))

    def _fit_part(self, part, name, *given):
        """Fit a part, resumable in a folder of this name unless it has one of its own."""
        steps = part.steps if isinstance(part, Pipeline) else []
        folders = {name: part} | {f"{name}/{step}": each for step, each in steps}
        resumable = {
            name: each
            for name, each in folders.items()
            if isinstance(each, TorchEstimator) and each.checkpoint_dir is None
        }
        for name, each in resumable.items():
            each.set_params(checkpoint_dir=self._folder(name))
        part.fit(*given)
        for each in resumable.values():
            each.set_params(checkpoint_dir=None)
        return part

    def _callbacks_after(self, first):
        """Callbacks of this estimator, after one of ours that asks for no stop, or None."""
        given = [self.callbacks] if callable(self.callbacks) else list(self.callbacks or ())
        if first is None:
            return given
        first.never_stops = True
        return [first, *given]

    def _fit_loop(self, module, loss_fn, batches, *, seed, **options):
        """Run :func:`~diffaugkit.training.fit_loop` with the common parameters of this estimator.

        Parameters
        ----------
        module : nn.Module
            What is trained.
        loss_fn : callable
            ``loss_fn(*batch)`` -> scalar Tensor or dict with the key "loss".
        batches : Batches
            From :func:`~diffaugkit.batches.make_batches`.
        seed : int
            From ``_seed``.
        **options
            Any other argument of the loop; one that is a common parameter replaces it.

        Returns
        -------
        module : nn.Module
            The module, or its average.
        history : list of dict
            One per epoch.
        """
        names = ("max_epochs", "learning_rate", "precision", "compile", "callbacks")
        common = {name: getattr(self, name) for name in (*names, "checkpoint_dir", "verbose")}
        description = getattr(self, "_description", type(self).__name__)
        common |= {"device": self._device(), "seed": seed, "description": description}
        common |= options
        if common["checkpoint_dir"] is not None:
            common.setdefault("identity", described(self))
        return fit_loop(module, loss_fn, batches, **common)

    def _set_history(self, tables, first):
        """Join what the phases of a fit logged, with the columns `first` in front."""
        import pandas as pd

        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=first)
        self.history_ = table[[*first, *(name for name in table.columns if name not in first)]]
        self.n_iter_ = len(table)

    def __getstate__(self):
        """Hand modules and tensors over on the CPU, so that any machine can read them."""
        return {name: _on_cpu(value) for name, value in super().__getstate__().items()}

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        # Rows of pixels are dense.
        tags.input_tags.sparse = getattr(self, "image_shape", None) is None
        return tags


class TorchTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TorchEstimator):
    """Base class of those with ``transform``, which give float32 whatever they are given."""

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def described(value):
    """Describe a parameter or an estimator in values of JSON: equal where the fits would be.

    An estimator is its parameters but for those that training does not see, or that the loop and
    the data account for themselves. A function goes by its name, a module by a digest.

    Examples
    --------
    >>> from sklearn.decomposition import PCA
    >>> described({"part": PCA(2, random_state=0), "sizes": (8, 8)})["sizes"]
    [8, 8]
    """
    if isinstance(value, BaseEstimator):
        left_out = _SEEN_ELSEWHERE.union(getattr(value, "_used_later", ()))
        given = value.get_params(deep=False).items()
        return {"class": type(value).__name__} | {
            name: described(item) for name, item in given if name not in left_out
        }
    if isinstance(value, np.generic):
        return described(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # NaN differs from itself
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # an Enum's is a string, too
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {str(name): described(item) for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return described(parts)
    if isinstance(value, nn.Module):
        plain = {k: v for k, v in vars(value).items() if isinstance(v, bool | int | float | str)}
        form = np.frombuffer(repr((value, plain)).encode(), np.uint8)
        return f"{type(value).__qualname__} {fingerprint(value, form)}"
    if isinstance(value, torch.Tensor):
        return described(value.detach().cpu().tolist())
    if hasattr(value, "__array__") and not isinstance(value, type):
        return described(np.asarray(value).tolist())
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return copy.deepcopy(value).to("cpu")
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_on_cpu, value))
    if type(value) is dict:
        return {key: _on_cpu(item) for key, item in value.items()}
    return value
