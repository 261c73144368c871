"""The display of masks: what stands where, which pixels get which colour, and what is refused."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from diffaugkit.segmentation_plotting import SegmentationDisplay

matplotlib.use("Agg")
H, W, FACTOR = 8, 10, 20  # tiles are enlarged to 160 pixels at least
ORANGE, BLUE = (np.array(to_rgb(colour)) for colour in ("#e69f00", "#56b4e9"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def X():
    return np.full((2, H, W, 3), 51, dtype=np.uint8)


@pytest.fixture
def masks():
    masks = np.zeros((2, H, W), dtype=int)
    masks[0, 2:6, 3:7] = 1
    masks[1, :, :5] = 2
    return masks


class Segmenter:
    """The smallest thing that can be drawn."""

    image_shape_ = (H, W, 3)

    def __init__(self, masks):
        self.masks = masks

    def predict(self, X):
        return self.masks[: len(X)]


def headings(display):
    return [text.get_text() for text in display.ax_.get_xticklabels()]


def tiles(display):
    """The mosaic cut into its tiles, (rows, columns, h, w, 3)."""
    mosaic = np.asarray(display.image_.get_array())
    white = (mosaic == 1.0).all(axis=2)
    rows = np.flatnonzero(~white.all(axis=1))
    columns = np.flatnonzero(~white.all(axis=0))
    starts = [
        [i for i in found if i == found[0] or i - 1 not in found] for found in (rows, columns)
    ]
    return np.array(
        [[mosaic[i : i + FACTOR * H, j : j + FACTOR * W] for j in starts[1]] for i in starts[0]]
    )


def test_image_truth_and_prediction_stand_side_by_side(X, masks):
    display = SegmentationDisplay.from_predictions(X, masks, masks[::-1], ["a", "b"])
    assert headings(display) == ["image", "truth", "prediction"]
    assert [text.get_text() for text in display.ax_.get_yticklabels()] == ["a", "b"]
    drawn = tiles(display)
    assert drawn.shape == (2, 3, FACTOR * H, FACTOR * W, 3)
    np.testing.assert_allclose(drawn[:, 0], 0.2)
    np.testing.assert_array_equal(drawn[0, 1], drawn[1, 2])
    np.testing.assert_array_equal(drawn[1, 1], drawn[0, 2])
    assert display.figure_ is display.ax_.figure


def test_regions_are_tinted_and_outlined(X, masks):
    drawn = tiles(SegmentationDisplay(X, masks).plot(alpha=0.25))
    first, second = drawn[:, 1]
    middle = first[4 * FACTOR, 5 * FACTOR]
    np.testing.assert_allclose(middle, 0.75 * 0.2 + 0.25 * ORANGE)
    np.testing.assert_allclose(second[5, 5], 0.75 * 0.2 + 0.25 * BLUE)
    # The inner edge is in full, what lies outside as it was.
    np.testing.assert_allclose(first[2 * FACTOR, 5 * FACTOR], ORANGE)
    np.testing.assert_allclose(first[2 * FACTOR - 1, 5 * FACTOR], 0.2)
    np.testing.assert_allclose(second[0, 5 * FACTOR - 1], BLUE)
    plain = tiles(SegmentationDisplay(X, masks).plot(alpha=0.25, outline=False))[0, 1]
    np.testing.assert_allclose(plain[2 * FACTOR, 5 * FACTOR], middle)
    only = tiles(SegmentationDisplay(X, masks).plot(alpha=0.0))[0, 1]
    np.testing.assert_allclose(only[4 * FACTOR, 5 * FACTOR], 0.2)
    np.testing.assert_allclose(only[2 * FACTOR, 5 * FACTOR], ORANGE)


def test_segments_without_background_all_have_a_colour(X, masks):
    drawn = tiles(SegmentationDisplay(X, masks, background=None).plot(alpha=1.0))
    np.testing.assert_allclose(drawn[0, 1, 0, 0], ORANGE)
    np.testing.assert_allclose(drawn[0, 1, 4 * FACTOR, 5 * FACTOR], BLUE)
    truth = SegmentationDisplay.from_predictions(X, masks, masks, background=None)
    np.testing.assert_allclose(tiles(truth)[0, 1, 0, 0], 0.2)
    # More labels than colours begin anew.
    many = SegmentationDisplay(X, 7 * (masks > 0), background=None).plot(alpha=1.0)
    np.testing.assert_allclose(tiles(many)[0, 1].reshape(-1, 3), np.tile(ORANGE, (32000, 1)))


def test_matched_segments_take_the_colour_of_their_region(X, masks):
    # The same regions under other numbers, and one that nothing is matched with.
    named = np.array([4, 9, 0])[masks]
    named[0, 7, :] = 6
    display = SegmentationDisplay.from_predictions(X, masks, named, match=True)
    drawn = tiles(display)
    np.testing.assert_array_equal(drawn[:, 2], drawn[:, 1])
    with pytest.raises(ValueError, match="match=True needs y_true"):
        SegmentationDisplay(X, masks).plot(match=True)


def test_every_kind_of_image_and_mask(X, masks):
    expected = tiles(SegmentationDisplay.from_predictions(X, masks, masks))
    floats = X.astype(np.float32) / 255
    for images, more in (
        (floats, {}),
        (torch.from_numpy(floats).permute(0, 3, 1, 2), {}),
        (X.reshape(2, -1), {"image_shape": (H, W, 3)}),
        (list(X), {}),
    ):
        for kind in (np.asarray, torch.from_numpy, lambda y: y.reshape(2, -1), np.uint8):
            display = SegmentationDisplay.from_predictions(images, kind(masks), kind(masks), **more)
            np.testing.assert_allclose(tiles(display), expected, atol=1e-6)
    grey = SegmentationDisplay(X[..., 0], masks > 0).plot()
    assert headings(grey) == ["image", "prediction"]


def test_paths_of_images_and_masks(X, masks, tmp_path):
    images, regions = [X[0], X[1, :5, :7]], [masks[0], masks[1, :5, :7]]
    expected = SegmentationDisplay.from_predictions(images, regions, regions).image_.get_array()
    paths = [[str(tmp_path / f"{kind}{row}.png") for row in range(2)] for kind in ("x", "y")]
    for files, arrays in zip(paths, (images, regions), strict=True):
        for path, array in zip(files, arrays, strict=True):
            Image.fromarray(array.astype(np.uint8)).save(path)
    for kind in (list, np.array, pd.Series):
        x, y = map(kind, paths)
        display = SegmentationDisplay.from_estimator(Segmenter(regions), x, y)
        np.testing.assert_array_equal(display.image_.get_array(), expected)
    (tmp_path / "folder").mkdir()
    for row in range(2):
        Image.fromarray(X[row]).save(tmp_path / "folder" / f"{row}.png")
    whole = SegmentationDisplay.from_predictions(tmp_path / "folder", masks, masks)
    expected = SegmentationDisplay.from_predictions(X, masks, masks)
    np.testing.assert_array_equal(whole.image_.get_array(), expected.image_.get_array())


def test_folders_of_images_of_several_sizes(X, masks, tmp_path):
    images, regions = [X[0], X[1, :5, :7]], [masks[0], masks[1, :5, :7]]
    for row, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    expected = SegmentationDisplay(images, regions).plot().image_.get_array()
    for folder in (tmp_path, str(tmp_path)):
        display = SegmentationDisplay(folder, regions).plot()
        np.testing.assert_array_equal(display.image_.get_array(), expected)


def test_bytes_beside_floats_are_drawn_in_their_own_range(X, masks):
    X[1] = 102
    expected = SegmentationDisplay(X, masks).plot().image_.get_array()
    mixed = SegmentationDisplay([X[0], X[1] / 255], masks).plot().image_.get_array()
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    # Floats of no known scale share one.
    dark = SegmentationDisplay([X[0] / 10.0, X[1] / 10.0], masks).plot()
    assert tiles(dark)[0, 0].max() == 0


def test_from_estimator_and_given_axes(X, masks):
    import matplotlib.pyplot as plt

    display = SegmentationDisplay.from_estimator(Segmenter(masks), X, masks)
    np.testing.assert_array_equal(tiles(display)[:, 1], tiles(display)[:, 2])
    flat = SegmentationDisplay.from_estimator(Segmenter(masks), X.reshape(2, -1))
    assert headings(flat) == ["image", "prediction"]
    figure, ax = plt.subplots(figsize=(3, 2))
    own = SegmentationDisplay(X, masks).plot(ax=ax)
    assert own.ax_ is ax
    assert figure.get_size_inches().tolist() == [3, 2]
    with pytest.raises(ValueError, match="has no method 'predict'"):
        SegmentationDisplay.from_estimator(object(), X)


def test_images_of_several_sizes_each_stand_in_their_row(X, masks):
    masks[1] = 0
    masks[1, 1:, 2:] = 2  # cut through below and on the right
    images, regions = [X[0], X[1, :5, :7]], [masks[0], masks[1, :5, :7]]
    expected = tiles(SegmentationDisplay.from_predictions(X, masks, masks))
    display = SegmentationDisplay.from_estimator(Segmenter(regions), images, regions, ["a", "b"])
    mosaic = np.asarray(display.image_.get_array())
    starts = FACTOR * W * np.array([0, 1, 2]) + np.cumsum([0, 30, 30])  # gaps of 3 * 5 %
    for number, left in enumerate(starts):
        large = mosaic[: FACTOR * H, left : left + FACTOR * W]
        np.testing.assert_allclose(large, expected[0, number])
        # In the middle of white, without an outline where it ends.
        small = np.ones((FACTOR * H, FACTOR * W, 3))
        part = expected[1, number, : FACTOR * 5, : FACTOR * 7]
        small[FACTOR : FACTOR * 6, FACTOR : FACTOR * 8] = part
        np.testing.assert_allclose(mosaic[-FACTOR * H :, left : left + FACTOR * W], small)
    renamed = [3 * (mask > 0) for mask in regions]
    matched = SegmentationDisplay.from_predictions(images, regions, renamed, match=True)
    known = SegmentationDisplay.from_predictions(images, regions, regions)
    np.testing.assert_array_equal(matched.image_.get_array(), known.image_.get_array())
    with pytest.raises(ValueError, match=r"mask 1 has shape \(8, 10\), but the image \(5, 7\)"):
        SegmentationDisplay(images, masks).plot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_pred": np.zeros((2, H, W - 1), int)}, r"y_pred .* mask 0 has shape \(8, 9\)"),
        ({"y_pred": np.zeros((2, H, W))}, "y_pred must hold bool or int"),
        ({"y_true": np.zeros((1, H, W), int)}, "y_true must hold 2 masks, one per image, got 1"),
        ({"y_pred": None}, "y_pred must hold 2 masks"),
        ({"labels": ["a"]}, "labels must name the 2 rows"),
        ({"X": np.zeros((0, H, W, 3)), "y_pred": np.zeros((0, H, W), int)}, "no images"),
    ],
)
def test_what_does_not_fit_is_refused(X, masks, change, message):
    with pytest.raises(ValueError, match=message):
        SegmentationDisplay(**{"X": X, "y_pred": masks, **change}).plot()
    with pytest.raises(ValueError, match="alpha"):
        SegmentationDisplay(X, masks).plot(alpha=2)
