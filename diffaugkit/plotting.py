"""Figures as scikit-learn style displays; matplotlib is imported when one is drawn."""

import re
from collections.abc import Mapping
from numbers import Integral

import numpy as np

from diffaugkit.arrays import embedder, to_numpy
from diffaugkit.image_plotting import AttentionDisplay, InterpolationDisplay, SampleGridDisplay
from diffaugkit.segmentation_plotting import SegmentationDisplay

__all__ = [
    "PALETTE",
    "AttentionDisplay",
    "EmbeddingDisplay",
    "InterpolationDisplay",
    "SampleGridDisplay",
    "SegmentationDisplay",
    "SimilarityHistogramDisplay",
    "TrainingCurveDisplay",
]

# The first seven are Okabe and Ito's. Each later one was chosen greedily for the largest OKLab
# distance to all before it, to white and to grey, the smallest over normal (counted half),
# protanope and deuteranope vision (Machado et al. 2009). Beyond a dozen no palette is safe by hue
# alone: there `legend="on_data"` writes the names into the map.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#780040"),
    *("#8000f8", "#0000c0", "#585800", "#c00088", "#10d880", "#8878f8", "#580090", "#204060"),
    *("#984850", "#e828d8", "#20e8f8", "#f84068", "#4840c8", "#603010", "#a0e8a8", "#705890"),
    *("#f880e0", "#908048", "#8818a0", "#70c0a8", "#a8d800", "#c80030"),
)
# Nullable types of pandas whose values are names rather than a scale.
_DISCRETE = {"boolean", *(f"{sign}nt{bits}" for sign in ("I", "UI") for bits in (8, 16, 32, 64))}
_UNLABELLED = "#b4b4b4"
_LEGEND_ROWS = 18
_PHASES = {
    "E": ("E-step (encoder)", PALETTE[0]),
    "M": ("M-step (generator)", PALETTE[3]),
    "vanilla": ("first encoder", PALETTE[0]),
    "diffusion": ("generator", PALETTE[3]),
    "generative": ("encoder on generated images", PALETTE[2]),
}


class EmbeddingDisplay:
    """A 2-D map of samples, coloured by label, with generated samples drawn on top.

    Parameters
    ----------
    embedding : array-like of shape (n_samples, 2)
        Positions.
    labels : array-like of shape (n_samples,), default=None
        Float labels (pseudotime, expression) get continuous colours, all others are classes, in
        the order of a pandas categorical or sorted. Missing labels are grey.
    generated : array-like of shape (n_generated, 2), default=None
        Positions of generated samples.
    generated_labels : array-like of shape (n_generated,), default=None
        Their labels, of the kind of `labels`. None leaves them white.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the map, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    points_, generated_points_ : matplotlib PathCollection
        The samples and the generated samples (None without).
    legend_ : matplotlib Legend or None
        Legend of the classes.
    colorbar_ : matplotlib Colorbar or None
        Scale of continuous labels.

    Raises
    ------
    ValueError
        If positions are not of two columns, or labels do not match them in number.

    Examples
    --------
    >>> from diffaugkit.plotting import EmbeddingDisplay
    >>> display = EmbeddingDisplay([[0, 0], [1, 1]], labels=["B cell", "T cell"])
    >>> display.plot().ax_.get_xlabel()
    'z1'
    """

    def __init__(self, embedding, labels=None, generated=None, generated_labels=None):
        self.embedding = embedding
        self.labels = labels
        self.generated = generated
        self.generated_labels = generated_labels

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        generated=None,
        method="project",
        *,
        generated_labels=None,
        ax=None,
        **plot_params,
    ):
        """Embed `X`, and generated samples, with a fitted estimator and plot the map.

        Parameters
        ----------
        estimator : fitted estimator or Pipeline
            Maps samples to two dimensions. In a Pipeline `method` belongs to the last step, and
            the steps before it transform `X` and `generated`.
        X : array-like of shape (n_samples, n_features) or AnnData
            Real samples.
        y : array-like of shape (n_samples,), default=None
            Labels for the colours.
        generated : array-like of shape (n_generated, n_features), default=None
            Generated samples, in the space of `X`.
        method : str, default="project"
            Name of the method that embeds: `project` is the 2-D map of `DiffAugEM`; `transform`
            suits PCA, UMAP and the like.
        generated_labels : array-like of shape (n_generated,), default=None
            Labels of the generated samples.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : EmbeddingDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator has no such method, or it does not give two columns.
        """
        embed = embedder(estimator, method)
        display = cls(
            np.asarray(embed(X)),
            labels=y,
            generated=None if generated is None else np.asarray(embed(generated)),
            generated_labels=generated_labels,
        )
        return display.plot(ax=ax, **plot_params)

    def plot(
        self,
        ax=None,
        *,
        size=None,
        palette=None,
        cmap="viridis",
        legend="outside",
        label_name=None,
    ):
        """Draw the map.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        size : float, default=None
            Area of a marker in points squared. None shrinks it with the number of samples, from
            30 for a few hundred to 1 for twenty thousand and more.
        palette : sequence of colours, or dict of label to colour, default=None
            Colours of the classes, one for each at least. None takes a colour-blind friendly
            palette of 30, and evenly spaced hues for more classes than that.
        cmap : str or Colormap, default="viridis"
            Colours of float labels.
        legend : {"outside", "on_data", None}, default="outside"
            Names of the classes at the right, or at their median positions, or none.
        label_name : str, default=None
            Title of the legend or of the colour bar.

        Returns
        -------
        self : EmbeddingDisplay
            With `ax_` and `figure_`.
        """
        if legend not in ("outside", "on_data", None):
            raise ValueError(f"legend must be 'outside', 'on_data' or None, got {legend!r}.")
        points = _positions(self.embedding, "embedding")
        extra = None if self.generated is None else _positions(self.generated, "generated")
        labels = _label_values(self.labels, len(points), "labels")
        extra_labels = None
        if extra is not None:
            extra_labels = _label_values(self.generated_labels, len(extra), "generated_labels")
        coloring = _Coloring(labels, extra_labels, self.labels, palette, cmap)
        entries = coloring.entries(labels) if legend == "outside" else []
        self.figure_, self.ax_ = _axes(ax, figsize=(5.2 + _legend_width(entries), 4.8))
        size = float(np.clip(20_000 / max(len(points), 1), 1.0, 30.0)) if size is None else size

        # In random order: drawn class by class, the last one would hide the others.
        order = np.random.default_rng(0).permutation(len(points))
        self.points_ = self.ax_.scatter(
            *points[order].T,
            s=size,
            c=coloring(labels, len(points))[order],
            linewidths=0,
            alpha=0.85 if extra is None else 0.5,
            rasterized=True,
            label="real",
        )
        self.generated_points_ = None
        if extra is not None:
            self.generated_points_ = self.ax_.scatter(
                *extra.T,
                s=float(np.clip(12_000 / max(len(extra), 1), 4.0, 16.0)),
                c=coloring(extra_labels, len(extra), default="#ffffff"),
                edgecolors="#1a1a1a",
                linewidths=0.6,
                zorder=3,
                rasterized=True,
                label="generated",
            )
        self.ax_.set(xlabel="z1", ylabel="z2", xticks=[], yticks=[])
        self.ax_.margins(0.04)
        self._draw_key(coloring, entries, points, labels, legend, label_name)
        return self

    def _draw_key(self, coloring, entries, points, labels, legend, label_name):
        """Draw the legend, the names on the map or the colour bar."""
        self.legend_ = self.colorbar_ = None
        if coloring.mappable is not None:
            self.colorbar_ = self.figure_.colorbar(
                coloring.mappable, ax=self.ax_, label=label_name or "", shrink=0.8
            )
        if legend == "on_data":
            _write_names(self.ax_, coloring.names, points, labels)
        handles = [_marker(name, color) for name, color in entries]
        if self.generated_points_ is not None and legend is not None:
            handles.append(_marker("generated", "#ffffff", edge="#1a1a1a"))
        if handles and coloring.mappable is None:
            self.legend_ = self.ax_.legend(
                handles=handles,
                title=label_name,
                loc="center left",
                bbox_to_anchor=(1.01, 0.5),
                ncols=-(-len(handles) // _LEGEND_ROWS),
                fontsize="small" if len(handles) > 12 else "medium",
                frameon=False,
                handletextpad=0.2,
                columnspacing=0.8,
                borderaxespad=0.2,
            )
        elif handles:
            # The colour bar stands where the legend would.
            self.legend_ = self.ax_.legend(handles=handles[-1:], loc="best", fontsize="small")


class TrainingCurveDisplay:
    """Loss over the epochs of a fit, with the phases of an alternating fit shaded.

    The E-step (encoder) and the M-step (generator) have losses of different kinds; the first kind
    of phase is drawn against the left axis, the others against the right one (Fig. A.2 of the
    DiffAug paper shows one quantity; here both losses are seen).

    Parameters
    ----------
    history : pandas DataFrame, or list of dict
        One row per epoch, in the order of training: `loss`, and, where there are phases, `phase`
        ("E" or "M", other names are used as they are) and `round`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Left axes, after `plot`.
    right_ax_ : matplotlib Axes or None
        Right axes, where there is more than one kind of phase.
    figure_ : matplotlib Figure
        Figure of the axes.
    lines_ : list of matplotlib Line2D
        One for every stretch of a phase; then, dashed, that of `validation_loss` where the history
        of one phase has it.
    spans_ : list of matplotlib Patch
        The shaded stretches.

    Raises
    ------
    ValueError
        If there is no `loss`, or no epoch.

    Examples
    --------
    >>> from diffaugkit.plotting import TrainingCurveDisplay
    >>> display = TrainingCurveDisplay([{"loss": 2.0}, {"loss": 1.5}]).plot()
    >>> display.lines_[0].get_ydata()
    array([2. , 1.5])
    """

    def __init__(self, history):
        self.history = history

    @classmethod
    def from_estimator(cls, estimator, *, ax=None, **plot_params):
        """Plot the `history_` of a fitted estimator, or of the last step of a Pipeline.

        Parameters
        ----------
        estimator : fitted estimator or Pipeline
            Anything with a `history_`.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : TrainingCurveDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator has no history.
        """
        steps = getattr(estimator, "steps", None)
        last = steps[-1][1] if steps else estimator
        if not hasattr(last, "history_"):
            raise ValueError(f"{type(last).__name__} has no history_; fit it first.")
        return cls(last.history_).plot(ax=ax, **plot_params)

    def plot(self, ax=None, *, log="auto"):
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        log : bool or "auto", default="auto"
            Logarithmic loss axes; "auto" decides for each: positive and of a range above 20.

        Returns
        -------
        self : TrainingCurveDisplay
            With `ax_` and `figure_`.
        """
        import pandas as pd

        loss, phase, stretch = _read_history(self.history)
        self.figure_, self.ax_ = _axes(ax, figsize=(6.4, 3.6))
        kinds = list(dict.fromkeys(phase))
        self.right_ax_ = self.ax_.twinx() if len(kinds) > 1 else None
        epochs = np.arange(1, len(loss) + 1)
        # Phases that alternate every few epochs would be specks: there, one line per phase.
        joint = stretch[-1] >= 24
        self.lines_, self.spans_ = [], []
        for kind in kinds:
            axes = self.ax_ if kind in self._left(kinds) else self.right_ax_
            name, color = self._phase(kind, kinds)
            parts = [phase == kind] if joint else []
            if not joint:
                parts = [stretch == i for i in np.unique(stretch[phase == kind])]
            for part in parts:
                marker = "o" if part.sum() == 1 else None
                self.lines_ += axes.plot(
                    epochs[part], loss[part], color=color, marker=marker, lw=1.6, label=name
                )
                name = "_" + name
                if len(kinds) > 1 and not joint:
                    self._shade(epochs[part], kind, color)
        if len(kinds) == 1 and "validation_loss" in pd.DataFrame(self.history):
            held_out = pd.DataFrame(self.history)["validation_loss"]
            color = self._phase(kinds[0], kinds)[1]
            named = {"color": color, "lw": 1.6, "ls": "--", "label": "validation loss"}
            self.lines_ += self.ax_.plot(epochs, held_out, **named)
            self.ax_.legend(handles=self.lines_, frameon=False)
        for axes, own in self._sides(kinds):
            self._dress(axes, loss[np.isin(phase, own)], own, kinds, log)
        self.ax_.set(xlabel="epoch", xlim=(0.5, len(loss) + 0.5))
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        if len(kinds) > 2:
            # Below the axes: inside, it would hide a curve of the right one, which it cannot see.
            named = [line for line in self.lines_ if line.get_label()[0] != "_"]
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.5}
            self.ax_.legend(handles=named, ncols=len(named), frameon=False, **below)
        return self

    def _phase(self, kind, kinds):
        return _PHASES.get(kind, (str(kind) or "loss", PALETTE[kinds.index(kind) % 30]))

    def _sides(self, kinds):
        left = self._left(kinds)
        yield self.ax_, left
        if self.right_ax_ is not None:
            yield self.right_ax_, [kind for kind in kinds if kind not in left]

    @staticmethod
    def _left(kinds):
        """Put encoders on the left, generators on the right; of unknown kinds the first alone."""
        generators = {"M", "diffusion"} & set(kinds[1:])
        return [kind for kind in kinds if kind not in generators] if generators else kinds[:1]

    def _shade(self, epochs, kind, color):
        low, high = epochs[0] - 0.5, epochs[-1] + 0.5
        self.spans_.append(self.ax_.axvspan(low, high, color=color, alpha=0.08, lw=0, zorder=0))
        self.ax_.text(
            (low + high) / 2,
            1.01,
            str(kind),
            transform=self.ax_.get_xaxis_transform(),
            color=color,
            fontweight="bold",
            ha="center",
            va="bottom",
        )

    def _dress(self, axes, loss, own, kinds, log):
        """Label one axis in the colour of its phase and choose its scale."""
        names = [self._phase(kind, kinds) for kind in own]
        color = names[0][1] if len(kinds) > 1 and len(names) == 1 else "black"
        text = names[0][0] if len(names) == 1 else "loss"
        axes.set_ylabel(text if text == "loss" else f"{text} loss", color=color)
        axes.tick_params(axis="y", colors=color)
        finite = loss[np.isfinite(loss)]
        wide = finite.size > 0 and finite.min() > 0 and finite.max() > 20 * finite.min()
        if log is True or (log == "auto" and wide):
            axes.set_yscale("log")


class SimilarityHistogramDisplay:
    """Histograms of the similarity of samples to their augmented views (DiffAug paper, Fig. 5).

    A narrow peak at 1 means views that repeat their source, values spread far down mean views of
    another meaning; DiffAug's are smooth and broad between both.

    Parameters
    ----------
    similarities : dict of str to array-like of shape (n_samples,)
        Cosine similarities in [-1, 1] for each kind of augmentation.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes, after `plot`.
    figure_ : matplotlib Figure
        Figure of the axes.
    legend_ : matplotlib Legend
        Names and medians.

    Raises
    ------
    ValueError
        If a kind has no or non-finite values.

    Examples
    --------
    >>> from diffaugkit.plotting import SimilarityHistogramDisplay
    >>> display = SimilarityHistogramDisplay({"mix-up": [0.9, 1.0], "DiffAug": [0.5, 0.8]})
    >>> [text.get_text() for text in display.plot().legend_.get_texts()]
    ['mix-up (median 0.95)', 'DiffAug (median 0.65)']
    """

    def __init__(self, similarities):
        self.similarities = similarities

    @classmethod
    def from_embeddings(cls, original, augmented, *, ax=None, **plot_params):
        """Compare embeddings of samples and of their views row by row, and plot.

        Parameters
        ----------
        original : array-like of shape (n_samples, n_features)
            Latent embedding of the samples.
        augmented : dict of str to array-like of shape (n_samples, n_features)
            For each kind of augmentation the embedding of the views, row i from sample i.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : SimilarityHistogramDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the shapes of original and views differ.
        TypeError
            If `augmented` is no dict.
        """
        if not isinstance(augmented, Mapping):
            raise TypeError(
                "augmented must be a dict of embeddings by name, such as {'generated': views}, got "
                f"{type(augmented).__name__}."
            )
        similarities = {
            name: _row_cosine(original, views, name) for name, views in augmented.items()
        }
        return cls(similarities).plot(ax=ax, **plot_params)

    def plot(self, ax=None, *, bins=50, density=True):
        """Draw the histograms over common bins.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        bins : int, default=50
            Number of bins between the smallest and the largest similarity of all kinds.
        density : bool, default=True
            Scale each to area 1, so that kinds of different numbers compare; else counts.

        Returns
        -------
        self : SimilarityHistogramDisplay
            With `ax_` and `figure_`.
        """
        if not self.similarities:
            raise ValueError("similarities is empty; give at least one kind of augmentation.")
        values = {name: np.ravel(np.asarray(v, float)) for name, v in self.similarities.items()}
        for name, kind in values.items():
            if kind.size == 0 or not np.isfinite(kind).all():
                raise ValueError(
                    f"similarities[{name!r}] must hold finite values, and at least one."
                )
        self.figure_, self.ax_ = _axes(ax, figsize=(6.4, 3.6))
        low, high = (f([f(kind) for kind in values.values()]) for f in (np.min, np.max))
        if high - low <= 1e-6:  # rounding alone leaves no room for bins
            low, high = low - 5e-4, high + 5e-4
        edges = np.linspace(low, high, bins + 1)
        for i, (name, kind) in enumerate(values.items()):
            color = PALETTE[i % len(PALETTE)]
            style = {"bins": edges, "density": density, "color": color}
            self.ax_.hist(kind, histtype="stepfilled", alpha=0.25, **style)
            self.ax_.hist(
                kind,
                histtype="step",
                lw=1.5,
                label=f"{name} (median {np.median(kind):.2f})",
                **style,
            )
        self.ax_.set(
            xlabel="cosine similarity to the original", ylabel="density" if density else "samples"
        )
        self.legend_ = self.ax_.legend(frameon=False, loc="upper left")
        return self


# ------------------------------------------------------------------ helpers


class _Coloring:
    """Colours of real and generated labels on one scale: `mappable` if continuous, else `names`."""

    def __init__(self, labels, extra_labels, given, palette, cmap):
        given_labels = [v for v in (labels, extra_labels) if v is not None]
        self.mappable, self.names = None, {}
        kinds = {v.dtype.kind for v in given_labels}
        if "f" in kinds and kinds <= set("fiu"):
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import Normalize

            values = np.concatenate(given_labels).astype(float)
            values = values[np.isfinite(values)]
            low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
            self.mappable = ScalarMappable(Normalize(low, high), cmap)
        elif given_labels:
            present = {v for values in given_labels for v in values.tolist() if not _missing(v)}
            names = [v for v in _categories(given) if v in present]
            names += sorted(present.difference(names), key=_natural_key)
            self.names = _palette(names, palette)

    def __call__(self, labels, n, default=None):
        """Return (n, 4) colours; missing labels are grey, no labels at all the default."""
        from matplotlib.colors import to_rgba, to_rgba_array

        if labels is None:
            return np.tile(to_rgba(default or PALETTE[0]), (n, 1))
        if self.mappable is None:
            return to_rgba_array([self.names.get(v, _UNLABELLED) for v in labels.tolist()])
        colors = self.mappable.to_rgba(labels.astype(float))
        colors[~np.isfinite(labels)] = to_rgba(_UNLABELLED)
        return colors

    def entries(self, labels):
        """Return the (name, colour) pairs of the legend."""
        entries = list(self.names.items())
        if self.names and labels is not None and any(_missing(v) for v in labels.tolist()):
            entries.append(("unlabelled", _UNLABELLED))
        return entries


def _missing(value):
    # Covers None, NaN, pandas.NA and NaT without importing pandas.
    return value is None or type(value).__name__ in ("NAType", "NaTType") or value != value


def _natural_key(value):
    """Sort numbers by value and names so that "cluster 2" comes before "cluster 10"."""
    if not isinstance(value, str):
        return 0, value, ""
    parts = re.split(r"(\d+)", value)
    # Text and digits alternate, so that like is always compared with like.
    return 1, [int(part) if i % 2 else part for i, part in enumerate(parts)], value


def _categories(labels):
    """Return the categories of a pandas Series or Categorical in their own order, else none."""
    labels = getattr(labels, "cat", labels)
    return list(getattr(labels, "categories", []))


def _palette(names, palette):
    if isinstance(palette, dict):
        lacking = [name for name in names if name not in palette]
        if lacking:
            raise ValueError(f"palette has no colour for {lacking[:5]}.")
        return {name: palette[name] for name in names}
    colors = PALETTE if palette is None else list(palette)
    if len(names) > len(colors):
        if palette is not None:
            raise ValueError(f"palette has {len(colors)} colours for {len(names)} classes.")
        from matplotlib import colormaps

        colors = colormaps["turbo"](np.linspace(0.02, 0.98, len(names)))
    return dict(zip(names, colors, strict=False))


def _positions(X, name):
    X = np.asarray(to_numpy(X))
    if X.ndim != 2 or X.shape[1] != 2:
        raise ValueError(
            f"{name} must have two columns, got shape {X.shape}; take a 2-D map, such as "
            "method='project', or reduce it with PCA(2)."
        )
    return X.astype(float)


def _label_values(labels, n, name):
    if labels is None:
        return None
    if isinstance(labels, list | tuple):
        import pandas as pd

        # NumPy makes the string "nan" of a NaN among strings, pandas floats of ints beside a None.
        ints = all(v is None or isinstance(v, Integral) for v in labels)
        labels = pd.Series(labels, dtype=object if ints and None in labels else None)
    dtype = getattr(labels, "dtype", None)
    if hasattr(dtype, "categories") or str(dtype) in _DISCRETE:
        labels = labels.astype(object)  # NumPy makes numbers with a NaN floats: a scale
    labels = np.asarray(to_numpy(labels))
    if labels.dtype.kind == "M":
        labels = np.where(np.isnat(labels), None, np.datetime_as_string(labels, unit="auto"))
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},) as its positions, got {labels.shape}.")
    return labels


def _axes(ax, figsize):
    if ax is not None:
        return ax.figure, ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")


def _legend_width(entries):
    """Return the inches of a legend beside the map, so that long names do not squeeze it."""
    longest = max((len(_short(name)) for name, _ in entries), default=9)
    return -(-(len(entries) + 1) // _LEGEND_ROWS) * (0.35 + 0.085 * longest)


def _short(name):
    text = str(name)
    return text if len(text) <= 32 else text[:31] + "…"


def _marker(name, color, edge="none"):
    from matplotlib.lines import Line2D

    text = _short(name)
    # A leading underscore would hide the entry.
    text = f"\u200b{text}" if text.startswith("_") else text
    return Line2D([], [], ls="", marker="o", ms=6, mfc=color, mec=edge, mew=0.8, label=text)


def _write_names(ax, names, points, labels):
    from matplotlib.patheffects import withStroke

    if labels is None:
        return
    for name in names:
        inside = points[[not _missing(v) and v == name for v in labels.tolist()]]
        if len(inside):
            text = ax.text(
                *np.median(inside, axis=0), str(name), ha="center", va="center", zorder=4
            )
            text.set(fontsize="small", fontweight="bold")
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _read_history(history):
    """Return loss, phase and the number of the stretch of one phase and round, per epoch."""
    import pandas as pd

    frame = pd.DataFrame(history)
    if "loss" not in frame or len(frame) == 0:
        raise ValueError(
            f"history must have a column 'loss' and at least one row, got columns "
            f"{list(frame.columns)} and {len(frame)} rows."
        )
    phase = frame.get("phase", pd.Series("", index=frame.index)).fillna("").astype(str).to_numpy()
    rounds = frame.get("round", pd.Series(0, index=frame.index)).fillna(0).to_numpy()
    change = (phase[1:] != phase[:-1]) | (rounds[1:] != rounds[:-1])
    return frame["loss"].to_numpy(float), phase, np.r_[0, np.cumsum(change)]


def _row_cosine(original, views, name):
    original, views = np.asarray(original, float), np.asarray(views, float)
    if original.ndim != 2 or original.shape != views.shape:
        raise ValueError(
            f"the views {name!r} must have the shape of the original, one row per sample: got "
            f"{views.shape} and {original.shape}."
        )
    norm = np.linalg.norm(original, axis=1) * np.linalg.norm(views, axis=1)
    product = np.einsum("ij,ij->i", original, views)
    # A zero vector has no direction: similarity 0, as in scikit-learn.
    return np.clip(np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0), -1.0, 1.0)
