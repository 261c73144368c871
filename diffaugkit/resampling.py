"""What samplers share: targets, wanted sizes, pairs with a label in common, containers given back.

imbalanced-learn's words and rules, without an import of it: it changes scikit-learn's own tables.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils import InputTags, Tags, assert_all_finite, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from diffaugkit.arrays import check_groups, many_classes, refuse_missing
from diffaugkit.image_inputs import is_a
from diffaugkit.image_rows import from_unit, to_unit

__all__ = [
    "SharedLabelPairs",
    "Targets",
    "append_like",
    "check_reading",
    "count_wanted",
    "cycle",
    "read_targets",
    "sampler_tags",
    "take_like",
]

# Pairs of label sets that are held at once.
_KIND_PAIRS = 2_000_000


# ---- what imbalanced-learn asks of a sampler's tags, without an import of it ---------------------


@dataclass(slots=True)
class _SampleIndicesTags:
    sample_indices: bool = True


@dataclass(slots=True)
class _SamplerInputTags(InputTags):
    dataframe: bool = True


@dataclass(slots=True)
class _SamplerTags(Tags):
    sampler_tags: _SampleIndicesTags | None = None

    def __post_init__(self):
        self.sampler_tags = _SampleIndicesTags()


def sampler_tags(tags):
    """Tags of a sampler, as imbalanced-learn reads them, from those of any estimator.

    Parameters
    ----------
    tags : sklearn.utils.Tags
        Tags of a base class.

    Returns
    -------
    sklearn.utils.Tags
        With ``sampler_tags`` and ``input_tags.dataframe``.
    """
    inputs = {name: getattr(tags.input_tags, name) for name in InputTags.__slots__}
    return _SamplerTags(
        estimator_type="sampler",
        target_tags=tags.target_tags,
        non_deterministic=tags.non_deterministic,
        input_tags=_SamplerInputTags(**inputs),
    )


def check_reading(sampler, image_shape, layer):
    """Refuse an `image_shape` or a `layer` that are not the generator's: they would not be used.

    Parameters
    ----------
    sampler : estimator
        Whose own values count where they are not None.
    image_shape : sequence of int or None
        The generator's; None for vectors.
    layer : str or None
        The generator's.

    Raises
    ------
    ValueError
        If they differ.
    """
    asked = sampler.image_shape
    if asked is not None:
        same = image_shape is not None and len(image_shape) == len(asked)
        # -1 is the entry that follows from the others.
        same = same and all(
            -1 in pair or len(set(pair)) == 1 for pair in zip(asked, image_shape, strict=True)
        )
        if not same:
            has = "vectors" if image_shape is None else f"image_shape={image_shape!r}"
            raise ValueError(
                f"image_shape={asked!r}, but the diffusion model has {has}: leave image_shape at "
                "None, or give the same."
            )
    asked = getattr(sampler, "layer", None)
    if asked is not None and asked != layer:
        raise ValueError(
            f"layer={asked!r}, but the diffusion model has layer={layer!r}: leave layer at None, "
            "or give the same."
        )


# ---- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Classes or label sets of samples, from :func:`read_targets`.

    Parameters
    ----------
    labels : ndarray of bool of shape (n_samples, n_labels)
        Indicators; of classes, one in each row.
    codes : ndarray of int of shape (n_samples,) or None
        Number of the class; None for label sets.
    classes : list or None
        Names of the classes, as plain values.
    """

    labels: np.ndarray
    codes: np.ndarray | None
    classes: list | None

    def members(self):
        """Rows of each class; of label sets all rows, under the key "all"."""
        if self.codes is None:
            return {"all": np.arange(len(self.labels))}
        return {c: np.flatnonzero(self.codes == i) for i, c in enumerate(self.classes)}

    def sizes(self):
        """Count the rows of each class."""
        return {name: len(rows) for name, rows in self.members().items()}


def read_targets(y):
    """Read classes or label indicators from any container.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_labels)
        Indicators with one label in each row are read as classes, numbered by column.

    Returns
    -------
    Targets

    Raises
    ------
    ValueError
        If `y` is None, continuous, or has missing labels.

    Examples
    --------
    >>> from diffaugkit.resampling import read_targets
    >>> read_targets(["b", "a", "b"]).sizes()
    {'a': 1, 'b': 2}
    >>> read_targets([[1, 0], [1, 1]]).sizes()
    {'all': 2}
    """
    if y is None:
        raise ValueError("fit_resample requires y to be passed, but the target y is None")
    y = y.toarray() if sp.issparse(y) else y
    refuse_missing(y, "y")
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype == object:
        y = np.array(y.tolist())  # a table of nullable types of pandas
    if y.dtype.kind == "f":
        assert_all_finite(y, input_name="y")
    if y.ndim == 2 and y.shape[1] > 1:
        kind = type_of_target(y, input_name="y")
        if kind != "multilabel-indicator":
            raise ValueError(
                f"y has shape {y.shape} and is {kind}: give one class per sample, or indicators "
                "(0 or 1) of labels."
            )
        labels = y.astype(bool)
        if (labels.sum(axis=1) != 1).any():
            return Targets(labels, None, None)
        y = labels.argmax(axis=1)
        classes, codes = np.arange(labels.shape[1]), y
    else:
        y = column_or_1d(y, warn=True)
        with many_classes():
            check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
    return Targets(codes[:, None] == np.arange(len(classes)), codes, classes.tolist())


def count_wanted(sampling_strategy, targets, *, ratio=1.0, replace_real=False):
    """Count the samples to add to each class, by the rules of imbalanced-learn's over-sampling.

    Parameters
    ----------
    sampling_strategy : str, float, dict, list, callable or None
        As of :class:`~diffaugkit.GenerativeAugmenter`; a callable gets the class of each sample.
        None adds `ratio` to each.
    targets : Targets
        Classes.
    ratio : float, default=1.0
        Added samples per real one of a class.
    replace_real : bool, default=False
        Whether the real samples go, so that the wanted sizes are those of the generated ones.

    Returns
    -------
    dict of class to int
        Every class has an entry.

    Raises
    ------
    ValueError
        For targets that are no classes, one class only, classes that are not there, or sizes below
        the present ones.

    Examples
    --------
    >>> from diffaugkit.resampling import count_wanted, read_targets
    >>> targets = read_targets(["a"] * 5 + ["b"] * 2)
    >>> count_wanted("auto", targets), count_wanted({"b": 4}, targets)
    ({'a': 0, 'b': 3}, {'a': 0, 'b': 2})
    """
    sizes = targets.sizes()
    if sampling_strategy is None:
        # Halves up, so that a class of one is not left out, nor 3 and 5 get the same.
        return {name: math.floor(ratio * size + 0.5) for name, size in sizes.items()}
    if targets.codes is None:
        raise ValueError(
            "Multilabel and multioutput targets have no classes to balance: take "
            "sampling_strategy=None, and ratio for the number of samples."
        )
    present = {name: size for name, size in sizes.items() if size}
    if len(present) < 2:
        raise ValueError(
            f"sampling_strategy={sampling_strategy!r} balances classes, but y has one class only: "
            "take sampling_strategy=None, and ratio for the number of samples."
        )
    largest, smallest = max(present.values()), min(present.values())
    if callable(sampling_strategy):
        names = np.asarray(targets.classes)[targets.codes]
        sampling_strategy = sampling_strategy(names)
    if isinstance(sampling_strategy, str):
        major = next(name for name, size in present.items() if size == largest)
        minor = next(name for name, size in present.items() if size == smallest)
        chosen = {
            "minority": {minor},
            "not minority": set(present) - {minor},
            "all": set(present),
        }.get(sampling_strategy, set(present) - {major})
        aims = dict.fromkeys(chosen, largest)
    elif isinstance(sampling_strategy, Real):
        if len(present) != 2:
            raise ValueError(
                f"sampling_strategy={sampling_strategy} is a float, which needs two classes, but "
                f"y has {len(present)}: use a dict."
            )
        aims = {name: largest for name, size in present.items() if size == largest}
        for name in present:
            if name not in aims:
                aims[name] = int(largest * sampling_strategy)
    elif isinstance(sampling_strategy, Mapping):
        aims = dict(sampling_strategy)
    else:
        aims = dict.fromkeys(sampling_strategy, largest)
    unknown = [name for name in aims if name not in present]
    if unknown:
        raise ValueError(f"sampling_strategy names classes that are not in y: {unknown}.")
    kept = dict.fromkeys(sizes, 0) if replace_real else sizes
    fewer = {name: aim for name, aim in aims.items() if aim < kept[name]}
    if fewer:
        raise ValueError(
            f"sampling_strategy wants fewer samples than there are: {fewer}, present "
            f"{ {name: kept[name] for name in fewer} }. An over-sampler only adds."
        )
    return {name: int(aims.get(name, size) - kept[name]) for name, size in sizes.items()}


class SharedLabelPairs:
    """All pairs of samples that share a label and a group, numbered and never listed.

    Samples are sorted into kinds of equal labels and group; a block holds the pairs of two kinds
    that go together. So a number becomes a pair by arithmetic, whatever their number is.

    Parameters
    ----------
    labels : ndarray of bool of shape (n_samples, n_labels)
        Indicators. Samples without any label go with each other.
    groups : ndarray of shape (n_samples,) or None
        Pairs stay within a group.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.resampling import SharedLabelPairs
    >>> pairs = SharedLabelPairs(np.array([[1, 0], [1, 1], [0, 1]], dtype=bool))
    >>> len(pairs), sorted(map(sorted, pairs.draw(2, np.random.default_rng(0)).tolist()))
    (2, [[0, 1], [1, 2]])
    """

    def __init__(self, labels, groups=None):
        codes = np.zeros(len(labels), dtype=np.int64)
        if groups is not None:
            codes = np.unique(check_groups(groups, len(labels)), return_inverse=True)[1]
        table = np.column_stack([codes, labels])
        kinds, kind = np.unique(table, axis=0, return_inverse=True)
        self._members = np.argsort(kind.reshape(-1), kind="stable")
        self._sizes = np.bincount(kind.reshape(-1), minlength=len(kinds))
        self._starts = np.cumsum(self._sizes) - self._sizes
        # Kinds of one group stand side by side: here is where each one's group ends.
        self._group_ends = np.searchsorted(kinds[:, 0], kinds[:, 0], side="right")
        self._sets = kinds[:, 1:].astype(np.float32)
        self._own = self._sizes * (self._sizes - 1) // 2
        counts = self._own.copy()
        for few, reach in self._partners(np.arange(len(kinds))):
            counts[few] += self._sizes[few] * reach[:, -1]
        self._ends = np.cumsum(counts)

    def _partners(self, kinds):
        """Yield some of these sorted kinds, and the samples that go with them up to each later one.

        Label sets may be as many as samples: a table of all kinds with all would be too large.
        """
        start = 0
        while start < len(kinds):
            first = kinds[start]
            end = self._group_ends[first]
            in_group = np.searchsorted(kinds, end)
            stop = min(in_group, start + max(1, _KIND_PAIRS // int(end - first)))
            few, later = kinds[start:stop], slice(first, end)
            together = self._sets[few] @ self._sets[later].T > 0
            none = ~self._sets[later].any(axis=1)
            together |= none[few - first, None] & none
            together &= np.arange(first, end) > few[:, None]
            yield few, np.cumsum(together * self._sizes[later], axis=1)
            start = stop

    def __len__(self):
        """Return the number of pairs."""
        return int(self._ends[-1])

    def __getitem__(self, numbers):
        """Return the pairs of these numbers, an int array of shape (n, 2)."""
        numbers = np.asarray(numbers)
        kind = np.searchsorted(self._ends, numbers, side="right")
        rest = numbers - np.append(0, self._ends)[kind]
        m = self._sizes[kind]
        same = rest < self._own[kind]
        rest = np.where(same, rest, rest - self._own[kind])
        step, here = rest // m, rest % m
        # Within a kind: a step around the circle of its members, so that no pair comes twice.
        there = self._starts[kind] + (here + step + 1) % m
        # Else the members of all later kinds that go with it, one after the other.
        others = np.flatnonzero(~same)
        others = others[np.argsort(kind[others], kind="stable")]
        asked = np.unique(kind[others])
        bounds = np.searchsorted(kind[others], np.append(asked, len(self._sizes)))
        number = 0
        for few, reach in self._partners(asked):
            for row in reach:
                own = others[bounds[number] : bounds[number + 1]]
                v = np.searchsorted(row, step[own], side="right")
                before = np.append(0, row)[v]
                there[own] = self._starts[few[0] + v] + step[own] - before
                number += 1
        return np.column_stack([self._members[self._starts[kind] + here], self._members[there]])

    def draw(self, n, rng):
        """Draw n pairs, none of them again before all were drawn, each the one way or the other."""
        ends = self[cycle(len(self), n, rng)]
        return np.where(rng.random((n, 1)) < 0.5, ends, ends[:, ::-1])


def cycle(total, n, rng):
    """Draw n of the numbers below `total`, in random order, none again before all were drawn.

    Parameters
    ----------
    total : int
        At least 1 where n is.
    n : int
        How many to draw.
    rng : numpy.random.Generator
        Source of the order.

    Returns
    -------
    ndarray of int64 of shape (n,)

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.resampling import cycle
    >>> np.bincount(cycle(3, 6, np.random.default_rng(0))).tolist()
    [2, 2, 2]
    """
    if n == 0:
        return np.empty(0, dtype=np.int64)
    parts = [rng.permutation(total) for _ in range(n // total)]
    parts.append(rng.choice(total, size=n % total, replace=False))
    return np.concatenate(parts).astype(np.int64)


# ---- containers ----------------------------------------------------------------------------------


def take_like(y, index, X=None):
    """Take rows of targets, in the container that they came in.

    Parameters
    ----------
    y : array-like, Series, DataFrame, list or sparse matrix
        Targets.
    index : ndarray of int
        Rows.
    X : any container or None, default=None
        The samples that they go with: the rows of a Series get the names of cells.

    Returns
    -------
    the kind of `y`

    Examples
    --------
    >>> from diffaugkit.resampling import take_like
    >>> take_like(["a", "b"], [1, 1, 0])
    ['b', 'b', 'a']
    """
    if hasattr(y, "iloc"):
        y = y.iloc[index].reset_index(drop=True)
        return y.set_axis(X.obs_names) if is_a(X, "anndata", "AnnData") else y
    if isinstance(y, list | tuple):
        return [y[i] for i in index]
    if is_a(y, "torch", "Tensor"):
        return y[torch.as_tensor(index)]
    return y.tocsr()[index] if sp.issparse(y) else np.asarray(y)[index]


def append_like(X, made, rows, indices, generator):
    """Put generated samples after real ones, where these are kept, in the kind of `X`.

    Parameters
    ----------
    X : any container of samples
        As the caller gave it.
    made : ndarray of shape (n_generated, ...)
        As ``generator.sample`` gives them.
    rows : Rows of shape (n_samples, ...)
        What the gate made of `X`.
    indices : ndarray of int
        Row of `X` for each row of the result; those before the last `n_generated` are kept.
    generator : EmbeddingConditionedDiffusion
        The generator, which knows the form of its samples.

    Returns
    -------
    the kind of `X`
    """
    kept = indices[: len(indices) - len(made)]
    if rows.is_image:
        own = generator._pixel_range, generator._layout
        if own != (tuple(rows.pixel_range), rows.layout):
            again = generator._image_rows(made)
            pixels = to_unit(again[:], again.pixel_range)
            made = from_unit(pixels, rows.pixel_range, rows.layout)
        numbers = is_a(X, "numpy", "ndarray") and X.dtype.kind in "biuf"
        if not (numbers or is_a(X, "torch", "Tensor") or hasattr(X, "columns")):
            X = from_unit(to_unit(rows[:], rows.pixel_range), rows.pixel_range, rows.layout)
    if is_a(X, "anndata", "AnnData"):
        return _append_cells(X, made, kept, indices, generator)
    if hasattr(X, "iloc"):  # a table; a Series or a TissueTiles of images is an array by now
        return _append_frame(X.iloc[kept], made)
    if is_a(X, "torch", "Tensor"):
        values = torch.as_tensor(made)
        if X.dtype.is_floating_point or rows.is_image:
            values = (values if X.dtype.is_floating_point else values.round()).to(X)
        return torch.cat([X[torch.as_tensor(kept)], values.to(X.device)])
    if sp.issparse(X):
        kind = X.format if X.format in ("csr", "csc") else "csr"
        below = type(X.tocsr())(_as_dtype(made, X.dtype))
        return sp.vstack([X.tocsr()[kept], below], format=kind)
    listed = isinstance(X, list | tuple)
    array = np.asarray(X)
    if rows.is_image and array.dtype.kind in "iu":
        made = np.rint(made).astype(array.dtype)
    array = np.concatenate([array[kept], _as_dtype(made, array.dtype)])
    return array.tolist() if listed else array


def _as_dtype(made, dtype):
    """Cast generated values to the type of the real ones; integers become floats."""
    return made.astype(dtype if dtype.kind == "f" else np.result_type(dtype, made.dtype))


def _append_frame(X, made):
    import pandas as pd

    below = pd.DataFrame(made)
    above, own, new = X.set_axis(below.columns, axis=1), {}, {}
    for number, dtype in enumerate(X.dtypes):
        kind = getattr(getattr(dtype, "subtype", dtype), "kind", "O")
        if kind == "f":
            new[number] = dtype
        elif isinstance(dtype, pd.SparseDtype):
            new[number] = pd.SparseDtype(below.dtypes[number], float(dtype.fill_value))
        if kind == "b":  # pandas would make objects of bools beside floats
            own[number] = new.get(number, below.dtypes[number])
    parts = [above.astype(own), below.astype(new)]
    whole = pd.concat(parts, ignore_index=True) if len(X) else parts[1]
    return whole.set_axis(X.columns, axis=1)


def _append_cells(X, made, kept, indices, generator):
    """Cells with the observations of their sources; what is stale of them stays behind."""
    import anndata
    import pandas as pd

    layer = generator.layer
    matrix = X.X if layer is None else X.layers[layer]
    if X.isbacked or not (sp.issparse(matrix) or isinstance(matrix, np.ndarray)):
        X = X.to_memory()
    names = getattr(generator, "feature_names_in_", None)
    if names is not None and not np.array_equal(names, X.var_names):
        # By position: names of genes that the generator does not have may be repeated.
        place = {name: number for number, name in enumerate(X.var_names)}
        X = X[:, [place[name] for name in names]]
    real = X.X if layer is None else X.layers[layer]
    real = real[kept] if sp.issparse(real) else np.asarray(real[kept])
    if sp.issparse(real):
        values = sp.vstack([real, sp.csr_matrix(_as_dtype(made, real.dtype))], format="csr")
    else:
        values = np.concatenate([real, _as_dtype(made, real.dtype)])
    obs = X.obs.iloc[indices].copy()
    # What an earlier call generated stays marked, and by its row has a name of its own.
    earlier = False
    if "generated" in obs:
        # A file of text has words for them, and cells of elsewhere have none.
        known = {True: True, "True": True, False: False, "False": False}
        marks = [False if pd.isna(mark) else known.get(mark) for mark in obs["generated"].tolist()]
        if None in marks:
            obs["generated_before"] = obs["generated"]
        else:
            earlier = np.array(marks)
    obs["generated"] = (np.arange(len(indices)) >= len(kept)) | earlier
    new = [f"generated-{i}-{X.obs_names[indices[i]]}" for i in range(len(kept), len(indices))]
    obs.index = [*X.obs_names[kept], *new]
    # What the generator was not asked for, it has not made: with a layer there is no .X.
    parts = {"X": values} if layer is None else {"layers": {layer: values}}
    return anndata.AnnData(**parts, obs=obs, var=X.var.copy())
