"""The mosaics: which image stands where, what the headings say, and how values become colours."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffaugkit.plotting import AttentionDisplay, InterpolationDisplay, SampleGridDisplay

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def pictures(n, h=6, w=5, c=3, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, h, w, c), dtype=np.uint8)


def headings(display):
    return [text.get_text() for text in display.ax_.get_xticklabels()]


def row_names(display):
    return [text.get_text() for text in display.ax_.get_yticklabels()]


def tiles(display, h=6, w=5):
    """The mosaic cut into its tiles, found by the gaps of pure white columns and rows."""
    mosaic = np.asarray(display.image_.get_array())
    white = (mosaic == 1.0).all(axis=2)
    starts = []
    for axis, side in ((1, h), (0, w)):
        filled = np.flatnonzero(~white.all(axis=axis))
        starts.append([i for i in filled if (i - filled[0]) == 0 or i - 1 not in filled])
        assert all({*range(i, i + side)} <= {*filled} for i in starts[-1])
    rows, columns = starts
    return np.array([[mosaic[i : i + h, j : j + w] for j in columns] for i in rows])


class Generator:
    """The smallest thing that can be drawn: says by its pixels what it was asked."""

    def augment(self, X, n_per_sample, random_state=0):
        X = np.repeat(np.asarray(X), n_per_sample, axis=0)
        return np.where(np.arange(len(X)).reshape(-1, *[1] * (X.ndim - 1)) % 2, X, X // 2 + 9)

    def interpolate(self, X_a, X_b, alpha, random_state=0):
        return np.rint(alpha * np.asarray(X_a, float) + (1 - alpha) * X_b).astype(np.uint8)

    def attention_maps(self, X):
        return torch.arange(len(X) * 2 * 6.0).reshape(len(X), 2, 3, 2) / 100


# ------------------------------------------------------------------ SampleGridDisplay


def test_sample_grid_shows_source_generated_and_nearest():
    X, real = pictures(3), pictures(40, seed=1)
    real[7] = Generator().augment(X, 2)[2]  # a copy of a generated image of the second row
    display = SampleGridDisplay.from_estimator(
        Generator(), X, ["cat", "dog", "a frog"], n_per_sample=2, real=real
    )
    assert headings(display) == ["source", "generated", "nearest real"]
    assert row_names(display) == ["cat", "dog", "a frog"]
    shown = tiles(display)
    assert shown.shape == (3, 4, 6, 5, 3)
    assert np.allclose(shown[:, 0] * 255, X)
    assert np.allclose(shown[:, 1:3].reshape(6, 6, 5, 3) * 255, Generator().augment(X, 2))
    assert np.allclose(shown[1, 3] * 255, real[7])
    generated = Generator().augment(X, 2).reshape(3, 2, 1, -1).astype(float)
    distance = np.linalg.norm(generated - real.reshape(40, -1), axis=-1).min(axis=1)
    assert np.allclose(shown[:, 3] * 255, real[distance.argmin(axis=1)])


@pytest.mark.parametrize("scale", ["bytes", "floats"])
def test_a_copy_is_found_on_another_scale(scale):
    X, real = pictures(3), pictures(40, seed=1)
    real[[4, 11, 30]] = X
    real[0], real[1] = 0, 250  # nearest to all if bytes and floats are compared as they are
    share = real / 255.0

    class Memory:
        def augment(self, X, n_per_sample):
            return X if scale == "bytes" else X / 255.0

    known = share if scale == "bytes" else real
    display = SampleGridDisplay.from_estimator(Memory(), X, n_per_sample=1, real=known)
    shown = tiles(display)
    assert shown.shape[1] == 3
    assert np.allclose(shown * 255, X[:, None], atol=1e-3)


def test_sample_grid_of_nearest_images_under_an_extractor():
    X, real = pictures(2), pictures(30, seed=1)

    def brightness(images):
        return images.mean(axis=(1, 2, 3))[:, None]

    display = SampleGridDisplay.from_estimator(
        Generator(), X, n_per_sample=1, real=real, extractor=brightness
    )
    generated = brightness(Generator().augment(X, 1))
    nearest = np.abs(generated - brightness(real).T).argmin(axis=1)
    assert np.allclose(tiles(display)[:, 2] * 255, real[nearest])


def test_sample_grid_of_generated_images_alone():
    display = SampleGridDisplay(pictures(5)).plot(n_columns=3)
    assert headings(display) == [""]
    assert row_names(display) == []
    shown = tiles(display)
    assert np.allclose(shown.reshape(6, 6, 5, 3)[:5] * 255, pictures(5))
    assert (shown[1, 2] == 1.0).all()
    assert tiles(SampleGridDisplay(pictures(2)).plot()).shape[:2] == (1, 2)


@pytest.mark.parametrize("n_channels", [2, 5])
def test_the_first_three_of_many_channels_are_drawn(n_channels):
    X = np.random.default_rng(0).integers(0, 256, (2, 9, 8, n_channels)).astype(np.uint8)
    rgb = np.zeros((2, 9, 8, 3), np.uint8)
    rgb[..., :n_channels] = X[..., :3]
    expected = SampleGridDisplay(rgb).plot().image_.get_array()
    for images in (X, torch.from_numpy(X).permute(0, 3, 1, 2)):
        np.testing.assert_array_equal(SampleGridDisplay(images).plot().image_.get_array(), expected)


@pytest.mark.parametrize("n_columns", [0, 2.0])
def test_a_grid_without_columns_is_refused(n_columns):
    with pytest.raises(ValueError, match="n_columns must be an int >= 1, got"):
        SampleGridDisplay(pictures(2)).plot(n_columns=n_columns)


def test_sample_grid_draws_into_given_axes():
    figure, axes = matplotlib.pyplot.subplots(1, 2)
    display = SampleGridDisplay(pictures(4), pictures(4)).plot(ax=axes[1])
    assert display.ax_ is axes[1]
    assert display.figure_ is figure
    assert not axes[0].images


def test_images_of_all_kinds_show_alike():
    image = pictures(3)
    first = torch.from_numpy(image).permute(0, 3, 1, 2)
    kinds = [image, first, list(image), image / 255.0, first / 127.5 - 1.0]
    for kind in kinds:
        assert np.allclose(tiles(SampleGridDisplay(kind).plot())[0] * 255, image, atol=1e-3)
    flat = SampleGridDisplay(image.reshape(3, -1), image_shape=(6, 5, 3)).plot()
    assert np.allclose(tiles(flat)[0] * 255, image)
    # Grey values become equal red, green and blue; transparent pixels lie on white.
    grey = tiles(SampleGridDisplay(image[..., 0]).plot())[0]
    assert np.allclose(grey * 255, image[..., :1])
    alpha = np.full((3, 6, 5, 1), 51, dtype=np.uint8)
    faint = tiles(SampleGridDisplay(np.concatenate([image, alpha], axis=-1)).plot())[0]
    assert np.allclose(faint, 0.2 * image / 255 + 0.8)


def test_black_and_white_come_from_the_source():
    source = np.linspace(0.0, 16.0, 90).reshape(1, 6, 5, 3)
    shown = tiles(SampleGridDisplay(source * 2 - 1, source).plot())
    assert np.allclose(shown[0, 0], source[0] / 16)
    assert np.allclose(shown[0, 1], np.clip((source[0] * 2 - 1) / 16, 0, 1))
    shown = tiles(SampleGridDisplay(source, pixel_range=(0, 32)).plot())
    assert np.allclose(shown[0, 0], source[0] / 32)


def test_bytes_and_floats_stand_beside_each_other():
    image = pictures(2)
    share = image / 255.0
    for source, made in ((image, share), (share, image)):
        shown = tiles(SampleGridDisplay(made, source, nearest=made).plot())
        assert np.allclose(shown * 255, image[:, None], atol=1e-3)
        shown = tiles(InterpolationDisplay(source, source, [made], [0.5]).plot())
        assert np.allclose(shown * 255, image[:, None], atol=1e-3)


def test_ends_of_a_strip_on_two_scales():
    a, b = pictures(2), pictures(2, seed=1)
    for ends in ((a, b / 255.0), (a / 255.0, b), (a / 127.5 - 1, b)):
        display = InterpolationDisplay(*ends, [a], [1.0]).plot()
        assert np.allclose(tiles(display) * 255, np.stack([a, a, b], axis=1), atol=1e-3)
    # Floats of one scale keep it, though each end fills a part.
    low, high = np.full((1, 6, 5), 2.0), np.full((1, 6, 5), 8.0)
    low[0, 0, 0], high[0, 0, 0] = 0.0, 10.0
    shown = tiles(InterpolationDisplay(low, high, [low], [1.0]).plot())
    assert np.allclose(shown[0, :, 3, 3, 0], [0.2, 0.2, 0.8])


def test_paths_are_read(tmp_path):
    images = pictures(3)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)

    class Reader(Generator):
        def augment(self, X, n_per_sample):
            return images

        def interpolate(self, X_a, X_b, alpha):
            return images

    for given in (paths, np.array(paths), pd.Series(paths, index=[7, 8, 9]), str(tmp_path)):
        grid = SampleGridDisplay.from_estimator(Reader(), given, n_per_sample=1, real=given)
        assert np.allclose(tiles(grid) * 255, images[:, None])
        strips = InterpolationDisplay.from_estimator(Reader(), given, given, [0.5])
        assert np.allclose(tiles(strips) * 255, images[:, None])
    seen = AttentionDisplay.from_estimator(Generator(), paths)
    assert np.allclose(tiles(seen)[:, 0] * 255, images)


def test_small_images_keep_their_pixels_and_large_ones_are_averaged():
    small = SampleGridDisplay(pictures(2, 64, 64)).plot()
    assert small.image_.get_interpolation() == "nearest"
    large = SampleGridDisplay(pictures(2, 96, 96)).plot()
    assert large.image_.get_interpolation() != "nearest"


def test_nothing_is_cut_off():
    names = ["a rather long name of a row", "another"]
    for display in (
        SampleGridDisplay(pictures(8), pictures(2), names).plot(),
        AttentionDisplay.from_estimator(Generator(), pictures(2), labels=names),
    ):
        display.figure_.canvas.draw()
        page = display.figure_.bbox
        for text in (*display.ax_.get_xticklabels(), *display.ax_.get_yticklabels()):
            box = text.get_window_extent()
            assert box.x0 >= -1
            assert box.y1 <= page.y1 + 1
            assert box.x1 <= page.x1 + 1


# ------------------------------------------------------------------ InterpolationDisplay


def test_interpolation_strips():
    a, b = pictures(2), pictures(2, seed=1)
    display = InterpolationDisplay.from_estimator(
        Generator(), a, b, alphas=(1.0, 0.5, 0.0), labels=["x", "y"], random_state=3
    )
    assert headings(display) == ["real a", "1", "0.5", "0", "real b"]
    assert row_names(display) == ["x", "y"]
    assert display.ax_.get_xlabel() == "share of a in the embedding"
    shown = tiles(display)
    assert shown.shape[:2] == (2, 5)
    assert np.allclose(shown[:, 0], shown[:, 1])
    assert np.allclose(shown[:, 3], shown[:, 4])
    assert np.allclose(shown[:, 4] * 255, b)
    assert np.allclose(shown[:, 2], (shown[:, 0] + shown[:, 4]) / 2, atol=1 / 255)
    assert len(headings(InterpolationDisplay.from_estimator(Generator(), a, b))) == 7


def test_interpolation_passes_its_seed_and_the_fitted_shape_on():
    class Fitted:
        image_shape_ = (6, 5, 3)
        seeds = []  # noqa: RUF012

        def interpolate(self, X_a, X_b, alpha, random_state=None):
            self.seeds.append(random_state)
            return X_a

    flat = pictures(2).reshape(2, -1)
    display = InterpolationDisplay.from_estimator(Fitted(), flat, flat, [0.5], random_state=4)
    assert np.allclose(tiles(display)[:, 1] * 255, pictures(2))
    InterpolationDisplay.from_estimator(Fitted(), flat, flat, [0.5])
    assert Fitted.seeds == [4, None]


# ------------------------------------------------------------------ AttentionDisplay


def test_attention_stands_beside_its_image_on_one_scale():
    X = pictures(3, 6, 4)
    display = AttentionDisplay.from_estimator(Generator(), X, labels="abc")
    assert headings(display) == ["image", "head 1", "head 2"]
    assert row_names(display) == ["a", "b", "c"]
    assert display.colorbar_.vmin == 0.0
    assert display.colorbar_.vmax == pytest.approx(0.35)
    assert display.colorbar_.ax.get_ylabel() == "attention"
    shown = tiles(display, 6, 4)
    assert np.allclose(shown[:, 0] * 255, X)
    colours = matplotlib.colormaps["magma"]
    attention = Generator().attention_maps(X).numpy()
    # Bilinear enlargement by 2: the corners keep their values, and what is brightest stays so.
    for corner in (0, -1):
        known = colours(attention[:, :, corner, corner] / 0.35)[..., :3]
        assert np.allclose(shown[:, 1:, corner, corner], known, atol=1e-6)
    assert np.allclose(shown[-1, -1, -1, -1], colours(1.0)[:3])


def test_attention_of_equal_size_is_shown_as_it_is():
    X, attention = pictures(1, 6, 4), np.random.default_rng(0).random((1, 1, 6, 4))
    display = AttentionDisplay(X, attention).plot(cmap="viridis", vmax=2.0)
    known = matplotlib.colormaps["viridis"](attention[0, 0] / 2.0)[..., :3]
    assert np.allclose(tiles(display, 6, 4)[0, 1], known)


def test_attention_of_a_unet_is_refused():
    class UNet:
        def attention_maps(self, X):
            return {(3, 2): np.full((len(X), 6, 6), 1 / 6)}

    with pytest.raises(TypeError, match="dict of maps by resolution"):
        AttentionDisplay.from_estimator(UNet(), pictures(2))


# ------------------------------------------------------------------ errors


def test_flattened_images_in_a_table():
    X = pictures(4)
    flat = pd.DataFrame(X.reshape(4, -1)).add_prefix("pixel_")
    found = SampleGridDisplay(flat, flat[:2], image_shape=(6, 5, 3)).plot()
    expected = SampleGridDisplay(X, X[:2]).plot()
    np.testing.assert_array_equal(found.image_.get_array(), expected.image_.get_array())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampleGridDisplay(pictures(5), pictures(2)).plot(), "5 images for 2 sources"),
        (lambda: SampleGridDisplay(pictures(4, 8), pictures(2)).plot(), "one size"),
        (lambda: SampleGridDisplay(pictures(4), pictures(2), ["a"]).plot(), "name the 2 rows"),
        (lambda: SampleGridDisplay(pictures(4), pictures(2), None, pictures(3)).plot(), "as many"),
        (lambda: SampleGridDisplay(np.zeros((4, 9))).plot(), "give image_shape"),
        (lambda: SampleGridDisplay(pictures(0)).plot(), "no images to draw"),
        (lambda: InterpolationDisplay([], [], [[]], [0.5]).plot(), "no images to draw"),
        (lambda: SampleGridDisplay.from_estimator(3, pictures(2)), "int has no method 'augment'"),
        (
            lambda: InterpolationDisplay.from_estimator(3, pictures(2), pictures(2)),
            "int has no method 'interpolate'",
        ),
        (
            lambda: InterpolationDisplay(pictures(2), pictures(2), [], [0.5]).plot(),
            "each of the 1 alphas",
        ),
        (
            lambda: InterpolationDisplay(pictures(2), pictures(3), [pictures(2)], [0.5]).plot(),
            "must be as many",
        ),
        (lambda: AttentionDisplay.from_estimator(3, pictures(2)), "no method 'attention_maps'"),
        (lambda: AttentionDisplay(pictures(2), np.zeros((3, 1, 2, 2))).plot(), r"shape \(2, n_h"),
        (lambda: AttentionDisplay(pictures(1), np.full((1, 1, 2, 2), np.nan)).plot(), "finite"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
