"""What is drawn: artists, labels and colours are counted, pixels are not looked at."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffaugkit.plotting import (
    PALETTE,
    EmbeddingDisplay,
    SimilarityHistogramDisplay,
    TrainingCurveDisplay,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def n_colors(collection):
    return len(np.unique(collection.get_facecolors(), axis=0))


class Halves:
    """The smallest thing that can be plotted: two ways to embed, and a history."""

    history_ = pd.DataFrame({"loss": [3.0, 2.0], "epoch": [0, 1]})

    def project(self, X):
        return np.asarray(X)[:, :2]

    def transform(self, X):
        return pd.DataFrame(np.asarray(X)[:, 2:4])

    def fit(self, X, y=None):
        return self


# ------------------------------------------------------------------ colours


def simulated_oklab(rgb):
    """Colours as seen by normal, protanope and deuteranope eyes (Machado et al. 2009), in OKLab."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    eyes = [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]],
    ]  # fmt: skip
    to_lms = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696],
              [0.08830246, 0.28171884, 0.6299787]]  # fmt: skip
    to_lab = [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371],
              [0.02590404, 0.78277177, -0.80867577]]  # fmt: skip
    seen = np.stack([np.clip(linear @ np.transpose(eye), 0, 1) for eye in eyes])
    return np.cbrt(seen @ np.transpose(to_lms)) @ np.transpose(to_lab)


# 0.076 is what the seven of Okabe and Ito reach (green and pink for a deuteranope).
@pytest.mark.parametrize(("n", "least"), [(7, 0.075), (12, 0.075), (20, 0.06), (30, 0.05)])
def test_palette_stays_apart_in_colour_blind_eyes(n, least):
    from matplotlib.colors import to_rgb

    assert len(PALETTE) == len(set(PALETTE)) == 30
    lab = simulated_oklab(np.array([to_rgb(color) for color in (*PALETTE[:n], "white")]))
    distance = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)
    distance[:, np.arange(n + 1), np.arange(n + 1)] = np.inf
    assert distance.min() > least


# ------------------------------------------------------------------ EmbeddingDisplay


def test_embedding_display_without_labels():
    display = EmbeddingDisplay(normal(50, 2))
    assert display.plot() is display
    assert display.ax_.figure is display.figure_
    assert len(display.ax_.collections) == 1
    assert len(display.points_.get_offsets()) == 50
    assert n_colors(display.points_) == 1
    assert display.points_.get_rasterized()
    assert display.legend_ is None
    assert display.colorbar_ is None
    assert display.generated_points_ is None


@pytest.mark.parametrize("n_classes", [1, 3, 30, 45])
def test_embedding_display_colours_classes(n_classes):
    X, y = normal(200, 2), np.arange(200) % n_classes
    names = np.array([f"type {i}" for i in range(n_classes)])
    display = EmbeddingDisplay(X, names[y]).plot(label_name="cell type")
    assert n_colors(display.points_) == n_classes
    # "type 2" before "type 10"
    assert texts(display.legend_) == names.tolist()
    assert display.legend_.get_title().get_text() == "cell type"
    # Points are shuffled, but keep their own colour.
    handles = display.legend_.legend_handles
    where = {tuple(point): i for i, point in enumerate(X)}
    for point, color in zip(
        display.points_.get_offsets(), display.points_.get_facecolors(), strict=True
    ):
        handle = handles[y[where[tuple(point)]]]
        expected = matplotlib.colors.to_rgb(handle.get_markerfacecolor())
        assert np.allclose(color[:3], expected)


def test_embedding_display_legend_lies_outside_the_map():
    y = [f"a long name of a cell type, number {i % 25}" for i in range(100)]
    display = EmbeddingDisplay(normal(100, 2), y).plot()
    display.figure_.canvas.draw()
    map_box, key_box = display.ax_.get_window_extent(), display.legend_.get_window_extent()
    assert key_box.x0 >= map_box.x1
    assert key_box.x1 <= display.figure_.bbox.x1 + 1
    assert key_box.y0 >= -1
    assert map_box.width > 300
    assert max(map(len, texts(display.legend_))) == 32


def test_embedding_display_keeps_the_order_of_categories():
    y = pd.Series(pd.Categorical(["low", "high", None, "low"], categories=["low", "mid", "high"]))
    display = EmbeddingDisplay(normal(4, 2), y).plot()
    assert texts(display.legend_) == ["low", "high", "unlabelled"]
    assert n_colors(display.points_) == 3
    display = EmbeddingDisplay(normal(4, 2), ["_b", None, np.nan, pd.NA]).plot(legend="on_data")
    assert [text.get_text() for text in display.ax_.texts] == ["_b"]
    display = EmbeddingDisplay(normal(3, 2), ["T cell", np.nan, "B cell"]).plot()
    assert texts(display.legend_) == ["B cell", "T cell", "unlabelled"]
    assert EmbeddingDisplay(normal(3, 2), [0.5, None, 2.0]).plot().colorbar_.vmax == 2.0
    display = EmbeddingDisplay(normal(2, 2), ["_b", "a"]).plot()
    assert len(texts(display.legend_)) == 2


def test_embedding_display_draws_float_labels_continuously():
    values = np.r_[np.linspace(-1.0, 3.0, 99), np.nan]
    display = EmbeddingDisplay(normal(100, 2), values).plot(label_name="pseudotime", cmap="magma")
    assert display.colorbar_.vmin == -1.0
    assert display.colorbar_.vmax == 3.0
    assert display.colorbar_.ax.get_ylabel() == "pseudotime"
    assert n_colors(display.points_) > 90
    assert display.legend_ is None


def test_embedding_display_draws_generated_samples_on_top():
    X, y = normal(60, 2), np.arange(60) % 3
    display = EmbeddingDisplay(X, y, X[:20] + 0.1, y[:20]).plot()
    real, generated = display.points_, display.generated_points_
    assert len(generated.get_offsets()) == 20
    assert generated.get_zorder() > real.get_zorder()
    assert generated.get_sizes()[0] < real.get_sizes()[0]
    assert generated.get_linewidths()[0] > 0.0
    assert generated.get_rasterized()
    assert texts(display.legend_) == ["0", "1", "2", "generated"]
    kinds = {tuple(c[:3]) for c in real.get_facecolors()}
    assert kinds == {tuple(c[:3]) for c in generated.get_facecolors()}

    plain = EmbeddingDisplay(X, y, X[:20]).plot()
    assert np.allclose(plain.generated_points_.get_facecolors()[:, :3], 1.0)
    smooth = EmbeddingDisplay(X, X[:, 0], X[:20] * 2, X[:20, 0] * 2).plot()
    assert smooth.colorbar_.vmax == pytest.approx(max(X[:, 0].max(), 2 * X[:20, 0].max()))
    assert texts(smooth.legend_) == ["generated"]


def test_embedding_display_writes_names_on_the_map():
    X, y = normal(60, 2), np.arange(60) % 3
    display = EmbeddingDisplay(X, y).plot(legend="on_data")
    assert [text.get_text() for text in display.ax_.texts] == ["0", "1", "2"]
    assert display.ax_.texts[1].get_position() == tuple(np.median(X[y == 1], axis=0))
    assert display.legend_ is None
    assert EmbeddingDisplay(X, y).plot(legend=None).legend_ is None


def test_embedding_display_size_and_palette():
    sizes = [
        EmbeddingDisplay(np.zeros((n, 2))).plot().points_.get_sizes()[0] for n in (9, 2000, 50_000)
    ]
    assert sizes == [30.0, 10.0, 1.0]
    y = np.array(["a", "b"] * 5)
    display = EmbeddingDisplay(normal(10, 2), y).plot(size=7, palette={"a": "red", "b": "blue"})
    assert display.points_.get_sizes()[0] == 7
    assert [h.get_markerfacecolor() for h in display.legend_.legend_handles] == ["red", "blue"]
    with pytest.raises(ValueError, match=r"no colour for \['b'\]"):
        EmbeddingDisplay(normal(10, 2), y).plot(palette={"a": "red"})
    with pytest.raises(ValueError, match="1 colours for 2 classes"):
        EmbeddingDisplay(normal(10, 2), y).plot(palette=["red"])


def test_embedding_display_of_tensors():
    tensor = torch.from_numpy(normal(4, 2)).bfloat16().requires_grad_()
    display = EmbeddingDisplay(tensor, torch.arange(4)).plot()
    assert texts(display.legend_) == list("0123")


def test_embedding_display_from_estimator():
    X, y = normal(40, 5), np.arange(40) % 2
    figure, axes = matplotlib.pyplot.subplots()
    display = EmbeddingDisplay.from_estimator(Halves(), X, y, generated=X[:7], ax=axes)
    assert display.ax_ is axes
    assert display.figure_ is figure
    assert np.array_equal(display.embedding, X[:, :2])
    assert np.array_equal(display.generated, X[:7, :2])
    display = EmbeddingDisplay.from_estimator(Halves(), X, method="transform", legend=None)
    assert np.array_equal(display.embedding, X[:, 2:4])
    pca = PCA(2).fit(X)
    display = EmbeddingDisplay.from_estimator(pca, X, y, method="transform", size=3)
    assert np.array_equal(display.embedding, pca.transform(X))


def test_embedding_display_from_pipeline():
    X = normal(40, 5) * 3.0 + 1.0
    pipeline = make_pipeline(StandardScaler(), Halves()).fit(X)
    display = EmbeddingDisplay.from_estimator(pipeline, X)
    assert np.allclose(display.embedding, StandardScaler().fit_transform(X)[:, :2])
    display = EmbeddingDisplay.from_estimator(make_pipeline(Halves()).fit(X), X)
    assert np.array_equal(display.embedding, X[:, :2])


def test_views_that_copy_their_source_have_a_histogram():
    X = normal(20, 4).astype(np.float32)
    display = SimilarityHistogramDisplay.from_embeddings(X, {"copies": X.copy()})
    assert [text.get_text() for text in display.legend_.get_texts()] == ["copies (median 1.00)"]
    low, high = display.ax_.get_xlim()
    assert low < 1 < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmbeddingDisplay(normal(9, 3)).plot(), "two columns, got shape"),
        (lambda: EmbeddingDisplay(normal(9, 2), generated=normal(9)).plot(), "generated must have"),
        (lambda: EmbeddingDisplay(normal(9, 2), [0, 1]).plot(), r"labels must have shape \(9,\)"),
        (lambda: EmbeddingDisplay(normal(9, 2)).plot(legend="left"), "legend must be"),
        (lambda: EmbeddingDisplay.from_estimator(PCA(), normal(9, 2)), "PCA has no method 'proj"),
        (lambda: TrainingCurveDisplay.from_estimator(PCA()), "PCA has no history_"),
        (lambda: TrainingCurveDisplay([{"epoch": 0}]).plot(), "column 'loss'"),
        (lambda: TrainingCurveDisplay(pd.DataFrame({"loss": []})).plot(), "0 rows"),
        (lambda: SimilarityHistogramDisplay({}).plot(), "empty"),
        (lambda: SimilarityHistogramDisplay({"a": [0.1, np.nan]}).plot(), r"\['a'\] must hold"),
        (
            lambda: SimilarityHistogramDisplay.from_embeddings(normal(9, 2), {"a": normal(8, 2)}),
            "the views 'a'",
        ),
        (
            lambda: SimilarityHistogramDisplay.from_embeddings(normal(9, 2), normal(9, 2)),
            "augmented must be a dict .* got ndarray",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ------------------------------------------------------------------ TrainingCurveDisplay


def em_history(schedule=(("E", 0, 5), ("M", 0, 4), ("E", 1, 6))):
    rows = []
    for phase, number, n in schedule:
        for epoch in range(n):
            loss = 5.0 - 0.1 * epoch if phase == "E" else 0.5 ** (2 * epoch)
            rows.append({"phase": phase, "round": number, "epoch": epoch, "loss": loss})
    return pd.DataFrame(rows)


def test_training_curves_shade_and_label_the_phases():
    display = TrainingCurveDisplay(em_history()).plot()
    assert [len(line.get_xdata()) for line in display.lines_] == [5, 6, 4]
    assert display.lines_[1].get_xdata().tolist() == [10, 11, 12, 13, 14, 15]
    assert [text.get_text() for text in display.ax_.texts] == ["E", "E", "M"]
    edges = sorted((span.get_x(), span.get_x() + span.get_width()) for span in display.spans_)
    assert edges == [(0.5, 5.5), (5.5, 9.5), (9.5, 15.5)]
    assert display.lines_[0].axes is display.ax_
    assert display.lines_[2].axes is display.right_ax_
    assert display.lines_[0].get_color() == display.lines_[1].get_color()
    assert display.lines_[0].get_color() != display.lines_[2].get_color()
    assert display.ax_.get_ylabel() == "E-step (encoder) loss"
    assert display.right_ax_.get_ylabel() == "M-step (generator) loss"
    # The generator's loss falls by a factor of 64, the encoder's hardly.
    assert display.ax_.get_yscale() == "linear"
    assert display.right_ax_.get_yscale() == "log"


def test_training_curves_of_one_phase():
    display = TrainingCurveDisplay.from_estimator(Halves())
    assert display.right_ax_ is None
    assert len(display.lines_) == 1
    assert display.spans_ == []
    assert display.ax_.get_ylabel() == "loss"
    assert display.ax_.get_xlabel() == "epoch"
    pipeline = make_pipeline(StandardScaler(), Halves())
    assert TrainingCurveDisplay.from_estimator(pipeline, log=True).ax_.get_yscale() == "log"
    single = TrainingCurveDisplay([{"loss": 1.0}]).plot()
    assert single.lines_[0].get_marker() == "o"


def test_training_curves_of_joint_training_are_lines_not_specks():
    schedule = [(phase, i, 1) for i in range(20) for phase in "EM"]
    display = TrainingCurveDisplay(em_history(schedule)).plot()
    assert [len(line.get_xdata()) for line in display.lines_] == [20, 20]
    assert display.spans_ == []


def test_training_curves_with_other_phases_and_gaps():
    history = em_history((("E", 0, 3), ("M", 0, 3), ("fine-tuning", 1, 3)))
    history.loc[1, "loss"] = np.nan
    before = history.copy()
    figure, axes = matplotlib.pyplot.subplots()
    display = TrainingCurveDisplay(history).plot(ax=axes, log=False)
    assert display.figure_ is figure
    assert len(display.lines_) == 3
    assert len(texts(axes.get_legend())) == 3
    assert axes.get_yscale() == "linear"
    pd.testing.assert_frame_equal(history, before)


# ------------------------------------------------------------------ SimilarityHistogramDisplay


def test_similarity_histogram_from_embeddings():
    original = normal(50, 4)
    views = {
        "same": 3.0 * original,
        "opposite": -original,
        "orthogonal": original[:, [1, 0, 3, 2]] * [1, -1, 1, -1],
        "zero": 0.0 * original,
        "noise": original + normal(50, 4, seed=1),
    }
    display = SimilarityHistogramDisplay.from_embeddings(original, views, bins=20)
    similarities = display.similarities
    for name, value in (("same", 1), ("opposite", -1), ("orthogonal", 0), ("zero", 0)):
        assert np.allclose(similarities[name], value, atol=1e-12)
    a, b = original[7], views["noise"][7]
    known = a @ b / np.sqrt((a @ a) * (b @ b))
    assert similarities["noise"][7] == pytest.approx(known, abs=1e-12)
    # Filled and outlined once each, over common bins.
    assert len(display.ax_.patches) == 10
    assert len({patch.get_edgecolor() for patch in display.ax_.patches[1::2]}) == 5
    assert [name.split(" (")[0] for name in texts(display.legend_)] == list(views)
    assert texts(display.legend_)[0] == "same (median 1.00)"


def test_similarity_histogram_of_equal_values_and_counts():
    display = SimilarityHistogramDisplay({"a": np.ones(5)}).plot(density=False)
    assert display.ax_.get_ylabel() == "samples"
    heights = display.ax_.patches[1].get_path().vertices[:, 1]
    assert heights.max() == 5.0


# ------------------------------------------------------------------ imports


def test_import_does_not_load_matplotlib_or_pandas():
    code = (
        "import sys, diffaugkit.plotting; "
        "print([m for m in ('matplotlib', 'pandas', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pd.Categorical([None, 1, 2] * 3), ["1", "2", "unlabelled"]),
        (pd.Categorical([0.5, 1.5, 2.5] * 3), ["0.5", "1.5", "2.5"]),
        (pd.Series([1, 2, None] * 3, dtype="Int64"), ["1", "2", "unlabelled"]),
        ([1, 2, None] * 3, ["1", "2", "unlabelled"]),
        (pd.to_datetime(["2020-01-01", "2021-02-03", None] * 3), ["2020-01-01", "2021-02-03"]),
    ],
)
def test_categories_of_numbers_and_dates_are_names(labels, names):
    display = EmbeddingDisplay(np.random.default_rng(0).normal(size=(9, 2)), labels).plot()
    assert len(display.figure_.axes) == 1  # no colour bar
    found = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert found[: len(names)] == names


def test_validation_loss_is_a_second_curve():
    history = [{"loss": 2.0, "validation_loss": 2.5}, {"loss": 1.0, "validation_loss": 3.0}]
    assert len(TrainingCurveDisplay([{"loss": 2.0}]).plot().lines_) == 1
    lines = TrainingCurveDisplay(history).plot().lines_
    assert [line.get_ydata().tolist() for line in lines] == [[2.0, 1.0], [2.5, 3.0]]
