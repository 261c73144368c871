"""The segmenter: learning, both phases, whole images from tiles, masks of all kinds, checks."""

import copy
import io
import pickle
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder, load, segmenter
from diffaugkit.metrics import dice_score
from diffaugkit.runtime import isolated_rng
from diffaugkit.segmentation_data import (
    IGNORED,
    ImageList,
    PatchRows,
    erase_boxes,
    swap_cells,
    vary_pairs,
)
from diffaugkit.segmentation_networks import AttentionUNet, SegmentationNetwork
from diffaugkit.segmentation_tiles import blending_window
from diffaugkit.segmenter import DiffusionSegmenter
from diffaugkit.slides import FileSlide, Slide, SlideRows, find_slide, open_slide

pytest.importorskip("diffusers")


def tiny(**more):
    options = {
        "block_out_channels": (8, 8),
        "pretrain_epochs": 1,
        "max_epochs": 1,
        "batch_size": 16,
        "n_timesteps": 20,
        "patch_size": 8,
        "stride": 8,
        "random_state": 0,
    }
    return DiffusionSegmenter(**{**options, **more})


def blobs(n, height=16, width=16, seed=0):
    """Bright discs on a dark, noisy ground: images (n, H, W, 3) uint8, and where the discs are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        for _ in range(2):
            cy, cx = rng.uniform(0, (height, width))
            mask |= (y - cy) ** 2 + (x - cx) ** 2 < 20
    X = rng.integers(0, 100, (n, height, width, 3)) + 110 * masks[..., None]
    return X.astype(np.uint8), masks.astype(np.uint8)


@pytest.fixture(scope="module")
def data():
    return blobs(8)


@pytest.fixture(scope="module")
def fitted(data):
    return tiny().fit(*data)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", ["unet", "attention_unet"])
def test_it_learns(denoiser):
    X, masks = blobs(16)
    model = tiny(denoiser=denoiser, max_epochs=12, learning_rate=5e-3, patch_size=16, batch_size=4)
    model.fit(X[:12], masks[:12])
    assert model.score(X[12:], masks[12:]) > 0.9
    phases = model.history_["phase"].tolist()
    assert phases == ["pretraining"] + ["finetuning"] * 12
    assert {"ss", "focal"} <= set(model.history_)
    assert model.n_iter_ == 13


@pytest.mark.parametrize("pretext", ["diffusion", "inpainting", "context_restoration"])
def test_a_pretext_task_changes_the_start(data, pretext):
    model = tiny(pretext=pretext).fit(*data)
    assert np.isfinite(model.history_["loss"]).all()
    plain = tiny(pretext=None).fit(*data)
    np.testing.assert_array_equal(
        tiny(diffusion=None).fit(*data).predict_proba(data[0]), plain.predict_proba(data[0])
    )
    assert not np.array_equal(model.predict_proba(data[0]), plain.predict_proba(data[0]))
    assert set(plain.history_["phase"]) == {"finetuning"}


def test_options_change_the_result(data, fitted):
    before = fitted.predict_proba(data[0])
    for more in (
        {"loss": "cross_entropy"},
        {"loss_weighting": "min_snr"},
        {"augment": False},
        {"focal_weight": 0.1},
        {"stride": 6},
    ):
        assert not np.array_equal(tiny(**more).fit(*data).predict_proba(data[0]), before), more


def test_unlabeled_images_are_pretrained_on(data, fitted):
    X, masks = data
    same = tiny().fit(X, masks, unlabeled=X)
    np.testing.assert_array_equal(same.predict_proba(X), fitted.predict_proba(X))
    pool = blobs(5, 12, 20, seed=1)[0]
    other = tiny().fit(X, masks, unlabeled=list(pool))
    assert not np.array_equal(other.predict_proba(X), fitted.predict_proba(X))
    assert other.history_["loss"].iloc[0] != fitted.history_["loss"].iloc[0]
    grey = [pool[0][..., :1]]
    with pytest.raises(ValueError, match=r"in unlabeled have 1 channels, but .* fitted on 3"):
        tiny().fit(X, masks, unlabeled=grey)


def test_a_fitted_diffusion_gives_its_unet(data):
    X, masks = data
    generator = EmbeddingConditionedDiffusion(
        None, block_out_channels=(8, 16), max_epochs=1, random_state=0, n_sampling_steps=2
    )
    inside = tiny(diffusion=generator).fit(X, masks)
    assert not hasattr(generator, "module_")
    assert inside.history_["phase"].tolist()[0] == "pretraining"
    assert inside.diffusion_.sample(1).shape == (1, 8, 8, 3)
    frozen = FrozenEstimator(clone(generator).fit(X))
    weights = copy.deepcopy(frozen.module_.state_dict())
    model = tiny(diffusion=frozen).fit(X, masks)
    for name, weight in frozen.module_.state_dict().items():
        assert torch.equal(weight, weights[name])
    names = {name.removeprefix("denoiser.") for name in model.module_.state_dict()}
    assert names == set(weights)
    assert set(model.history_["phase"]) == {"finetuning"}
    with pytest.raises(ValueError, match="channels"):
        tiny(diffusion=frozen).fit(X[..., 0], masks)


def test_only_the_last_layer_is_new():
    with isolated_rng(0):
        network = AttentionUNet(3, (8, 16))
        before = copy.deepcopy(network.state_dict())
        segmenter = SegmentationNetwork(network, 4)
        images = torch.randn(2, 3, 9, 13)
    after = segmenter.denoiser.state_dict()
    changed = {
        n for n in before if before[n].shape != after[n].shape or (before[n] != after[n]).any()
    }
    assert changed == {"conv_out.weight", "conv_out.bias"}
    assert segmenter(images).shape == (2, 4, 9, 13)
    with pytest.raises(TypeError, match="conv_out"):
        SegmentationNetwork(torch.nn.ReLU(), 2)
    with pytest.raises(ValueError, match="condition"):
        network(images, torch.zeros(2), cond=torch.zeros(2, 1))


def test_the_paper_s_network():
    with isolated_rng(0):
        network = AttentionUNet(3)
        moved = torch.randn(1, 3, 16, 16)
        torch.nn.init.normal_(network.conv_out.weight)
        one, other = (network(moved, torch.tensor([t])) for t in (0, 900))
    assert [level.first.conv1.out_channels for level in network.down] == [64, 128, 256, 512]
    assert not torch.allclose(one, other)


def test_groups_are_held_out_together(data):
    X, masks = data
    groups = np.repeat(["a", "b", "c", "d"], 2)
    model = tiny(validation_fraction=0.25)
    train, held = model._split(8, groups, 0)
    assert len(held) == 2
    assert set(groups[train]).isdisjoint(groups[held])
    assert "validation_dice" in model.fit(X, masks, groups=groups).history_
    assert "validation_dice" not in tiny(validation_fraction=0.0).fit(X, masks).history_
    with pytest.raises(ValueError, match="groups"):
        model.fit(X, masks, groups=groups[:3])


@pytest.mark.parametrize(("n", "n_held"), [(8, 0), (25, 0), (26, 3), (85, 8)])
def test_few_images_all_serve_to_learn(n, n_held):
    train, held = tiny()._split(n, None, 0)
    assert len(train) == n - n_held
    assert (0 if held is None else len(held)) == n_held
    patients = np.arange(n) // 2
    assert tiny()._split(n, patients, 0)[1] is None or n == 85


def test_the_best_epoch_is_kept(data):
    X, masks = data
    model = tiny(max_epochs=4, validation_fraction=0.4, learning_rate=3e-3)
    model.fit(X, masks)
    dice = model.history_["validation_dice"].dropna().tolist()
    best = len(dice) - 1 - int(np.argmax(dice[::-1]))  # the last of equal ones

    def stop(epoch, history):
        return epoch == best and "validation_dice" in history[-1]

    kept = clone(model).set_params(callbacks=stop).fit(X, masks)
    assert kept.history_["validation_dice"].dropna().tolist() == dice[: best + 1]
    np.testing.assert_array_equal(kept.predict_proba(X), model.predict_proba(X))


def test_held_out_images_without_objects_choose_no_epoch():
    X, masks = blobs(8)
    groups = np.arange(8) // 2
    _, held = tiny(validation_fraction=0.25)._split(8, groups, 0)
    X[held], masks[held] = X[held] // 4, 0  # nothing to be seen: an untrained network is right
    model = tiny(validation_fraction=0.25, max_epochs=3)
    with pytest.warns(UserWarning, match="None of the 2 images that validation_frac"):
        model.fit(X, masks, groups=groups)
    assert "validation_dice" not in model.history_
    last = clone(model).set_params(validation_fraction=0.0).fit(X, masks)
    np.testing.assert_array_equal(model.predict_proba(X), last.predict_proba(X))


def test_objects_that_would_all_be_held_out_are_learned_from():
    X, masks = blobs(8)
    model = tiny(validation_fraction=0.25, max_epochs=2)
    _, held = model._split(8, None, 0)
    masks[np.setdiff1d(np.arange(8), held)] = 0
    with pytest.warns(UserWarning, match="All images that show an object are among the 2 images"):
        model.fit(X, masks)
    assert "validation_dice" not in model.history_


def test_held_out_images_are_read_as_they_are_needed(tmp_path, monkeypatch):
    X, masks = blobs(8)
    paths = []
    for number, image in enumerate(X):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    monkeypatch.setattr("diffaugkit.segmentation_data._KEPT_VALUES", 0)
    given, alive, read = [], [], ImageList.read

    def remember(images, number):
        given.append(weakref.ref(found := read(images, number)))
        return found

    def count(epoch, history):
        alive.append(len({id(found()) for found in given if found() is not None}))

    monkeypatch.setattr(ImageList, "read", remember)
    tiny(diffusion=None, validation_fraction=0.5, callbacks=count).fit(paths, masks)
    assert max(alive) <= 1


def test_masks_of_objects_are_warned_of(data):
    X, masks = data
    numbered = [mask.astype(int) * (1 + row % 3) for row, mask in enumerate(masks)]
    numbered[0][:3] = np.arange(3 * numbered[0].shape[1]).reshape(3, -1) % 24
    with pytest.warns(UserWarning, match=r"masks hold 24 labels, 0, 1, 2, 3, 4, .*give masks > 0"):
        tiny(max_epochs=1, diffusion=None).fit(X, numbered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(max_epochs=1, diffusion=None, classes=range(24)).fit(X, numbered)


def test_where_no_epoch_finds_anything_the_last_is_kept(data, monkeypatch):
    X, masks = data
    model = tiny(max_epochs=3, validation_fraction=0.4, diffusion=None)
    better = iter(range(1, 9))
    monkeypatch.setattr(segmenter, "_mean_dice", lambda *_: next(better) / 9)
    expected = clone(model).fit(X, masks).predict_proba(X)
    monkeypatch.setattr(segmenter, "_mean_dice", lambda *_: 0.0)
    with pytest.warns(UserWarning, match="No epoch found any object of the held-out im") as seen:
        found = model.fit(X, masks).predict_proba(X)
    assert seen[0].filename == __file__
    np.testing.assert_array_equal(found, expected)


# ---- whole images --------------------------------------------------------------------------------


def test_tiles_equal_patches_away_from_borders(fitted):
    X, _ = blobs(1, 40, 37, seed=3)
    whole = fitted.predict_proba(X)[0]
    # Tiles start every 6 pixels, and 2 of 8 overlap on each side: the middle 4 are one tile's.
    for top in (0, 12, 24):
        for left in (0, 6, 18):
            patch = fitted.predict_proba(X[:, top : top + 8, left : left + 8])[0]
            middle = (slice(2, 6), slice(2, 6))
            np.testing.assert_allclose(
                whole[top : top + 8, left : left + 8][middle], patch[middle], atol=1e-6
            )
    np.testing.assert_allclose(whole.sum(axis=2), 1, atol=1e-5)
    apart = clone(fitted).set_params(overlap=0.0)
    vars(apart).update({k: v for k, v in vars(fitted).items() if k.endswith("_") or k[0] == "_"})
    tiled = apart.predict_proba(X[:, :16, :16])[0]
    patches = [X[:, a : a + 8, b : b + 8] for a in (0, 8) for b in (0, 8)]
    alone = apart.predict_proba(np.concatenate(patches))
    rows = [np.concatenate(alone[i : i + 2], axis=1) for i in (0, 2)]
    np.testing.assert_allclose(tiled, np.concatenate(rows), atol=1e-6)


@pytest.mark.parametrize("kind", ["hann", "linear"])
def test_windows_sum_to_one(kind):
    for stride in (6, 4):
        window = blending_window((8, 1), (stride, 1), kind)
        total = torch.zeros(8 + 3 * stride, 1)
        for start in range(0, 4 * stride, stride):
            total[start : start + 8] += window
        middle = total[8 - stride : stride - 8]
        torch.testing.assert_close(middle, torch.ones_like(middle))
        assert window.min() > 0


def test_any_size_and_container(fitted, tmp_path):
    sizes = [(8, 8), (30, 9), (5, 21), (3, 2), (16, 16)]
    images = [blobs(1, *size, seed=i)[0][0] for i, size in enumerate(sizes)]
    together = fitted.predict_proba(images)
    for image, found in zip(images, together, strict=True):
        np.testing.assert_array_equal(fitted.predict_proba(image[None])[0], found)
    labels = fitted.predict(images)
    assert [found.shape for found in labels] == sizes
    assert labels[0].dtype == fitted.classes_.dtype == np.uint8
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    for given in (
        paths,
        tmp_path,
        np.array(paths, dtype=object),
        [Image.open(path) for path in paths],
    ):
        for one, other in zip(labels, fitted.predict(given), strict=True):
            np.testing.assert_array_equal(one, other)
    tensor = torch.from_numpy(images[1]).permute(2, 0, 1)[None]
    np.testing.assert_array_equal(fitted.predict(tensor)[0], labels[1])
    as_floats = fitted.predict([image / 255 for image in images])
    assert np.mean(as_floats[1] == labels[1]) > 0.98


def test_a_strip_is_all_that_is_in_memory(fitted, tmp_path):
    def peak(height):
        path = tmp_path / f"{height}.npy"
        np.lib.format.open_memmap(path, "w+", np.uint8, (1, height, 24, 3))[:] = 90
        picture = np.load(path, mmap_mode="r")
        images = fitted._read(picture, reset=False)
        tracemalloc.start()
        rows = sum(part.stop - part.start for _, part, _ in fitted._strips(images))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == height
        return most

    peak(16)
    assert peak(600) < 1.5 * peak(60) + 50_000


# ---- slides --------------------------------------------------------------------------------------


class Own(Slide):
    """A slide of the user's own."""

    def __init__(self, pixels):
        self.levels, self.pixels = [pixels.shape[:2]], pixels

    def read(self, level, top, left, height, width):
        return self.pixels[top : top + height, left : left + width]


def mapped(image, folder):
    np.save(folder / "x.npy", image)
    return np.load(folder / "x.npy", mmap_mode="r")


def tiff(image, folder, name="x.tif", **options):
    tifffile.imwrite(folder / name, image, photometric="rgb", **options)
    return folder / name


TILED = {"tile": (16, 16), "compression": "zlib"}
SLIDES = {
    "array": lambda image, folder: open_slide(image),
    "map": lambda image, folder: open_slide(mapped(image, folder)),
    "own": lambda image, folder: Own(image),
    "svs": lambda image, folder: tiff(image, folder, "x.svs", **TILED),
    "tiled TIFF": lambda image, folder: str(tiff(image, folder, **TILED)),
    "mapped TIFF": tiff,
    "packed TIFF": lambda image, folder: tiff(image, folder, compression="lzw", rowsperstrip=4),
}


@pytest.fixture
def in_part(monkeypatch):
    """Small files are read as large ones are."""
    monkeypatch.setattr("diffaugkit.slides._LARGE_TIFF", 1)
    monkeypatch.setattr("diffaugkit.segmentation_tiles._READ_PIXELS", 1000)


@pytest.mark.parametrize("kind", SLIDES)
def test_slides_are_predicted_as_their_arrays(kind, fitted, tmp_path, in_part, monkeypatch):
    image, small = blobs(1, 90, 37, seed=1)[0][0], blobs(1, 5, 21)[0][0]
    given, read = [], SlideRows.region

    def remember(rows, *box):
        given.append(box)
        return read(rows, *box)

    monkeypatch.setattr(SlideRows, "region", remember)
    X = [SLIDES[kind](image, tmp_path), small]
    for method in (fitted.predict, fitted.predict_proba):
        for found, whole in zip(method(X), method([image, small]), strict=True):
            np.testing.assert_array_equal(found, whole)
    assert len(given) > 4
    assert max(height * width for _, _, height, width in given) <= 1000
    assert fitted.score(X[:1], fitted.predict([image])) == 1


def test_files_that_are_no_slides_are_decoded_as_before(fitted, tmp_path, monkeypatch):
    image = blobs(1, 40, 37)[0][0]
    path = tiff(image, tmp_path, **TILED)
    assert find_slide(path) is None  # as it is small
    monkeypatch.setattr("diffaugkit.slides._LARGE_TIFF", 1)
    assert isinstance(find_slide(path), FileSlide)
    clear = np.dstack([image, np.full(image.shape[:2], 9, np.uint8)])
    alpha = tiff(clear, tmp_path, "alpha.tif", extrasamples=[2], **TILED)
    tifffile.imwrite(tmp_path / "grey.tif", image[..., 0], **TILED)
    pages = tiff(np.stack([image, image]), tmp_path, "pages.tif", **TILED)
    (tmp_path / "broken.tif").write_bytes(b"no picture")
    for other in (alpha, tmp_path / "grey.tif", pages, tmp_path / "broken.tif", "no.tif", image):
        assert find_slide(other) is None
    np.testing.assert_array_equal(fitted.predict([alpha])[0], fitted.predict([image])[0])
    with pytest.raises(ValueError, match=r"Row 0 of X: .*pages\.tif holds 2 frames or pages"):
        fitted.predict([pages])


def test_pictures_beyond_the_limit_of_pillow(fitted, tmp_path, in_part, monkeypatch):
    image = blobs(1, 40, 37)[0][0]
    Image.fromarray(image).save(tmp_path / "x.png")
    expected = fitted.predict([image])[0]
    paths = [tiff(image, tmp_path, "mapped.tif"), tiff(image, tmp_path, "tiled.tif", **TILED)]
    with monkeypatch.context() as limit:
        limit.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        for path in paths:
            np.testing.assert_array_equal(fitted.predict([path])[0], expected)
        message = r"x\.png cannot be read: .* exceeds limit of 200 pixels; raise PIL\.Image\.MAX_IM"
        with pytest.raises(ValueError, match=message):
            fitted.predict([tmp_path / "x.png"])
    np.testing.assert_array_equal(fitted.predict([tmp_path / "x.png"])[0], expected)


@pytest.mark.parametrize("kind", ["memory map", "slide", "tiled TIFF"])
def test_large_images_are_never_in_memory_as_a_whole(kind, tmp_path, in_part, monkeypatch):
    monkeypatch.setattr("diffaugkit.segmentation_tiles._READ_PIXELS", 2**16)
    X, masks = blobs(4, 64, 64)
    model = tiny(patch_size=64, stride=64, overlap=0.0).fit(X, masks)
    image = np.tile(X[:2].reshape(128, 64, 3), (6, 16, 1))  # 768 x 1024
    if kind == "tiled TIFF":
        given = tiff(image, tmp_path, tile=(64, 64))
    else:
        given = mapped(image, tmp_path)
    given = open_slide(given) if kind == "slide" else given
    find_slide(given)  # imports a reader
    labels = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.uint8, image.shape[:2])
    size, expected = image.nbytes, model.predict(image[None])[0]
    del image
    tracemalloc.start()
    found = model.predict([given], out=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is labels
    np.testing.assert_array_equal(found, expected)
    assert peak < size / 2


def test_labels_go_where_they_are_asked(fitted):
    images = [blobs(1, 30, 9)[0][0], blobs(1, 5, 21)[0][0]]
    expected = fitted.predict(images)
    tables = [np.full((30, 9), 7, np.int16), np.full((5, 21), 7, bool)]
    assert fitted.predict(images, out=tables) is tables
    stack = np.empty((2, 30, 9), np.uint8)
    fitted.predict([images[0]] * 2, out=stack)
    for found, truth in zip([*tables, stack[1]], [*expected, expected[0]], strict=True):
        np.testing.assert_array_equal(found, truth)
    message = r"out has the shapes \[\(9, 30\)\], but the images of X are \[\(30, 9\)\]"
    with pytest.raises(ValueError, match=message):
        fitted.predict(images[:1], out=np.empty((9, 30), np.uint8))
    far = copy.copy(fitted)
    far.classes_ = np.array([0, 300])
    with pytest.raises(ValueError, match=r"out has dtype uint8, .* labels \[0, 300\]"):
        far.predict(images[:1], out=np.empty((30, 9), np.uint8))


def test_slides_are_learned_from_too(data, fitted, monkeypatch):
    X, masks = data
    slides = [open_slide(image) for image in X]
    expected = fitted.predict_proba(X)
    np.testing.assert_array_equal(tiny().fit(slides, masks).predict_proba(X), expected)
    monkeypatch.setattr("diffaugkit.segmentation_data._KEPT_VALUES", 0)  # patch by patch
    np.testing.assert_array_equal(tiny().fit(slides, masks).predict_proba(X), expected)


def test_slides_that_cannot_be_read(data, fitted, tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"no slide at all")
    alpha = Own(np.zeros((20, 20, 4), np.uint8))
    X, masks = data
    for given, message in (
        ([X[0], "nowhere.svs"], r"Row 1 of X: Slide nowhere\.svs cannot be read: there is no file"),
        ([tmp_path / "broken.svs"], r"Row 0 of X: Slide .*broken\.svs cannot be read: .*slide: "),
        ([X[0], alpha], r"The slide in row 1 cannot be read: it has a region .* \(20, 20, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.predict(given)
    with pytest.raises(TypeError, match=r"X is one slide: give a list of slides, \[X\] for one"):
        fitted.predict(open_slide(X[0]))
    with pytest.raises(ValueError, match="in X have 3 channels, but DiffusionSegmenter was fitted"):
        tiny().fit(X[..., 0], masks).predict([open_slide(X[0])])


def test_long_predictions_show_their_progress(data, fitted, capsys):
    fitted.predict(data[0])
    assert not capsys.readouterr().err
    loud = copy.copy(fitted).set_params(verbose=1)
    loud.predict(data[0])
    assert "prediction" in capsys.readouterr().err


# ---- labels --------------------------------------------------------------------------------------


def test_batch_independence(data, fitted):
    X, _ = data
    whole = fitted.predict_proba(X)
    np.testing.assert_array_equal(whole[3:5], fitted.predict_proba(X[3:5]))
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(whole[order], fitted.predict_proba(X[order]))


# ---- masks ---------------------------------------------------------------------------------------


def test_labels_come_back_as_they_were(data):
    X, masks = data
    many = masks.astype(np.int32) * 40 - 7
    many[:, :4, :4] = 500
    model = tiny(max_epochs=2).fit(X, many)
    assert model.classes_.tolist() == [-7, 33, 500]
    assert model.predict_proba(X).shape == (8, 16, 16, 3)
    found = model.predict(X)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, model.classes_[model.predict_proba(X).argmax(-1)])
    truth = tiny().fit(X, masks.astype(bool))
    assert truth.predict(X).dtype == bool
    for kind in (np.float64, np.float16):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tiny().fit(X, masks.astype(kind)).classes_.tolist() == [0, 1]


def test_ignored_pixels_do_not_matter(data):
    X, masks = data
    masks = masks.copy()
    masks[:, :, :5] = 99
    model = tiny(ignore_label=99, validation_fraction=0.25).fit(X, masks)
    assert model.classes_.tolist() == [0, 1]
    assert set(np.unique(model.predict(X))) <= {0, 1}
    inverted = np.where(masks == 99, 99, model.predict(X))
    assert model.score(X, inverted) == 1.0


def test_masks_without_any_label_are_refused():
    X = np.zeros((4, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="nothing to learn from"):
        tiny(classes=[0, 1], ignore_label=9).fit(X, np.full(X.shape, 9))


def test_an_ignored_label_is_no_class(data):
    X, masks = data
    masks = np.where(np.arange(16) < 3, 9, masks)
    model = tiny(ignore_label=9).fit(X, masks)
    named = tiny(ignore_label=9, classes=[0, 1, 9]).fit(X, masks)
    assert named.classes_.tolist() == model.classes_.tolist() == [0, 1]
    np.testing.assert_array_equal(named.predict_proba(X), model.predict_proba(X))


def test_missing_classes(data):
    X, masks = data
    model = tiny(classes=[0, 1, 2]).fit(X, masks)
    assert model.predict_proba(X).shape[-1] == 3
    assert model.score(X, np.full_like(masks, 2)) >= 0
    with pytest.raises(ValueError, match="label 3"):
        model.score(X, np.full_like(masks, 3))
    with pytest.raises(ValueError, match="one class"):
        tiny().fit(X, np.zeros_like(masks))
    first = tiny(classes=[1, 0]).fit(X, masks)
    assert first.classes_.tolist() == [1, 0]
    np.testing.assert_array_equal(
        first.predict(X), np.array([1, 0])[first.predict_proba(X).argmax(-1)]
    )


def test_score_is_mean_dice(data, fitted):
    X, masks = data
    truth, found = masks.astype(int), fitted.predict(X).astype(int)
    both = (truth * found).sum((1, 2))
    either = truth.sum((1, 2)) + found.sum((1, 2))
    expected = np.mean([2 * b / e for b, e in zip(both, either, strict=True) if e])
    assert fitted.score(X, masks) == pytest.approx(expected)
    theirs = dice_score(truth, found, per_image=True, zero_division=np.nan)
    assert fitted.score(X, masks) == pytest.approx(theirs)


def test_masks_may_have_an_axis_of_channels(data):
    X, masks = data
    expected = tiny().fit(X, masks).predict_proba(X)
    for given in (masks[..., None], torch.from_numpy(masks)[:, None]):
        np.testing.assert_array_equal(tiny().fit(X, given).predict_proba(X), expected)


def test_dim_images_in_a_list_are_warned_of_once(data):
    X, masks = data
    dim = [image.astype(np.uint16) for image in X]  # up to 255 of 65 535
    with pytest.warns(UserWarning, match="for DiffusionSegmenter such images are nearly") as seen:
        model = tiny().fit(dim, list(masks))
    assert len(seen) == 1
    model.predict(dim)


def test_masks_from_files_and_of_several_sizes(tmp_path):
    pairs = [blobs(1, *size, seed=i) for i, size in enumerate([(16, 12), (9, 20), (8, 8)])]
    X, masks = [x[0] for x, _ in pairs], [mask[0] for _, mask in pairs]
    masks[2][:] = 1
    model = tiny().fit(X, masks)
    files = []
    for number, (image, mask) in enumerate(zip(X, masks, strict=True)):
        files.append((tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"))
        Image.fromarray(image).save(files[-1][0])
        Image.fromarray(mask).save(files[-1][1])
    paths, mask_paths = map(list, zip(*files, strict=True))
    read = tiny().fit(paths, mask_paths)
    for one, other in zip(model.predict_proba(X), read.predict_proba(paths), strict=True):
        np.testing.assert_array_equal(one, other)
    assert read.score(paths, mask_paths) == model.score(X, masks)
    assert model.patch_shape_ == (8, 8)
    theirs = dice_score(masks, model.predict(X), per_image=True, zero_division=np.nan)
    assert model.score(X, masks) == pytest.approx(theirs)


@pytest.mark.parametrize("lossy", [("jpg", {}), ("tif", {"compression": "jpeg"})])
def test_masks_that_jpeg_compressed_are_refused(data, tmp_path, lossy):
    X, masks = data
    suffix, options = lossy
    paths = []
    for number, mask in enumerate(masks):
        last = number == 2
        paths.append(tmp_path / f"{number}.{suffix if last else 'png'}")
        Image.fromarray(255 * mask.astype(np.uint8)).save(paths[-1], **options if last else {})
    for given in (paths, list(map(str, paths)), [Image.open(path) for path in paths]):
        with pytest.raises(ValueError, match=rf"row 2, .*2\.{suffix}, is a JPEG, .* PNG or"):
            tiny().fit(X, given)
    if suffix == "tif":  # which is still known of what was made from it
        with pytest.raises(ValueError, match="The mask in row 2 is a JPEG"):
            tiny().fit(X, [Image.open(path).convert("L") for path in paths])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, m: (X, m[:4]), "8 images, but masks has 4"),
        (lambda X, m: (X, m[:, :3]), r"row 0 has shape \(3, 16\)"),
        (lambda X, m: (X, m + 0.5), "fractions"),
        (lambda X, m: (X, m * np.nan), "NaN"),
        (lambda X, m: (X, None), "y is None"),
        (lambda X, m: (X, m.astype(str)), "label type"),
        (lambda X, m: (X.reshape(8, -1), m), "image_shape"),
        (lambda X, m: ([*X[:7], X[7][..., :1]], m), "row 7 of X have 1 channels"),
        (lambda X, m: (["nowhere.png"] * 8, m), "nowhere.png"),
        (lambda X, m: ([*X[:7], X[7] / 300], m), "mixes"),
    ],
)
def test_bad_input(data, change, message):
    with pytest.raises(ValueError, match=message):
        tiny().fit(*change(*data))


def test_classes_that_cannot_be_are_refused(data):
    X, masks = data
    with pytest.raises(ValueError, match=r"one class, \[1\]: at least two are needed"):
        tiny().fit(X, np.ones_like(masks, int))
    with pytest.raises(ValueError, match=r"hold 300 classes, .* 254 are possible at most"):
        tiny().fit(X, np.arange(masks.size).reshape(masks.shape) % 300)
    with pytest.raises(ValueError, match=r"classes=\[0, 1, 0\] names a class twice"):
        tiny(classes=[0, 1, 0]).fit(X, masks)


def test_bad_input_after_fit(data, fitted):
    X, masks = data
    with pytest.raises(ValueError, match="channels"):
        fitted.predict(X[..., 0])
    with pytest.raises(ValueError, match="0 to 255"):
        fitted.predict(X.astype(np.float32))
    with pytest.raises(ValueError, match=r"requires y .* give masks"):
        fitted.score(X, None)
    with pytest.raises(ValueError, match="patch_size"):
        tiny(patch_size=(8, 8, 8)).fit(X, masks)
    vectors = EmbeddingConditionedDiffusion(None, max_epochs=1).fit(X.reshape(8, -1)[:, :9] / 255)
    with pytest.raises(TypeError, match="pixels"):
        tiny(diffusion=FrozenEstimator(vectors)).fit(X, masks)

    def never(epoch, history):
        raise AssertionError("it is refused before it is trained")

    autoencoder = LatentAutoencoder(callbacks=never)
    latents = EmbeddingConditionedDiffusion(None, autoencoder=autoencoder)
    mixture = GaussianMixture(random_state=0)
    for other in (latents, mixture, FrozenEstimator(clone(mixture).fit([[0.0], [1.0]]))):
        with pytest.raises(TypeError, match="no U-Net of pixels"):
            tiny(diffusion=other).fit(X, masks)
    with isolated_rng(0):
        own = EmbeddingConditionedDiffusion(None, denoiser=Plain())
    with pytest.raises(TypeError, match="Plain has no convolution conv_out"):
        tiny(diffusion=own, callbacks=never).fit(X, masks)
    before = vars(fitted).copy()
    with pytest.raises(ValueError, match="masks"):
        fitted.fit(X, masks[:2])
    assert vars(fitted) == before


class Plain(torch.nn.Module):
    """A denoiser without a last layer of that name."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t, cond=None, drop=None):
        return self.convolution(x_t)


# ---- patches and what is done to them ------------------------------------------------------------


def test_patches_and_masks_stay_together():
    from diffaugkit.image_rows import ImageRows

    picture = np.arange(10 * 7, dtype=np.uint8).reshape(1, 10, 7)
    images = ImageList([ImageRows(picture), ImageRows(picture[:, :3, :2])], [(0, 255)] * 2)
    targets = [picture[0], picture[0, :3, :2]]
    patches, truth = (PatchRows(part, [0, 1], (4, 4), (3, 3)) for part in (images, targets))
    assert patches.shape == truth.shape == (7, 1, 4, 4)
    torch.testing.assert_close(patches[:6], truth[:6])
    np.testing.assert_array_equal(truth[6][0, :3, :2], targets[1])
    assert (truth[6][0, 3:] == IGNORED).all()
    assert patches[6][0].max() < 100  # mirrored


def test_patches_of_floats_keep_their_values():
    from diffaugkit.image_rows import ImageRows

    # The range that was learned is that of bytes; other images of the fit may reach beyond it.
    learned = np.linspace(0, 255, 64, dtype=np.float32).reshape(1, 8, 8)
    beyond = ImageRows(learned * 1.5 - 20)
    images = ImageList([ImageRows(learned), beyond], [(0.0, 255.0)] * 2)
    patches = PatchRows(images, [0, 1], (8, 8), (8, 8))
    np.testing.assert_array_equal(patches[0][0], learned[0])
    np.testing.assert_array_equal(patches[1], beyond[0])
    assert PatchRows(images.take([0]), [0], (8, 8), (8, 8)).dtype == np.float32


def test_variations_move_images_with_masks():
    mask = torch.arange(6 * 5 * 4).reshape(6, 1, 5, 4)
    images = mask / 60 - 1
    with isolated_rng(0):
        moved, targets = vary_pairs(images, mask, color=False)
        colored, also = vary_pairs(images, mask)
    torch.testing.assert_close(moved, targets / 60 - 1)
    assert not torch.equal(moved, images)
    assert set(also.unique().tolist()) == set(mask.unique().tolist())
    assert colored.min() >= -1
    assert colored.max() <= 1
    with isolated_rng(0):
        flat, _ = vary_pairs(torch.zeros(200, 1, 3, 3), torch.zeros(200, 1, 3, 3))
    share = (flat[:, 0, 0, 0].abs() > 1e-6).float().mean()
    assert 0.15 < share < 0.45
    torch.testing.assert_close(flat.amax((2, 3)), flat.amin((2, 3)))  # a blur of nothing


@pytest.mark.parametrize(("shape", "n"), [((5, 5), 8), ((4, 5), 4)])
def test_tissue_is_turned(shape, n):
    from diffaugkit.augmentations import image_recipe

    mask = torch.arange(shape[0] * shape[1]).reshape(1, 1, *shape).expand(400, -1, -1, -1)
    images = (mask / 30 - 1).expand(-1, 3, -1, -1)
    recipe = image_recipe("tissue", 3)
    with isolated_rng(0):
        moved, targets = vary_pairs(images, mask, recipe, color=False)
        colored, also = vary_pairs(images, mask, recipe)
    torch.testing.assert_close(moved, (targets / 30 - 1).expand(-1, 3, -1, -1))
    both = [mask[0, 0].numpy(), mask[0, 0].numpy().T]
    want = [np.rot90(m, k) for m in both for k in range(4)]
    want = {m.tobytes() for m in want if m.shape == shape}
    found, counts = np.unique(targets[:, 0].flatten(1), axis=0, return_counts=True)
    assert {row.tobytes() for row in found} == want
    assert len(want) == n
    assert counts.min() > 400 / n / 2  # 4 deviations below the mean of 50
    assert not torch.equal(colored, (also / 30 - 1).expand(-1, 3, -1, -1))
    assert colored.abs().max() <= 1


def test_augment_takes_recipes(data, tmp_path):
    images, masks = data
    fits = {}
    for augment in (False, True, "tissue", {"recipe": "tissue", "stain": 0.0}, {"flip": 0.0}):
        model = tiny(augment=augment, random_state=0).fit(images, masks)
        fits[str(augment)] = model.predict_proba(images).tobytes()
    assert len(set(fits.values())) == 5
    model.save(tmp_path / "model")
    assert load(tmp_path / "model").augment == clone(model).augment == {"flip": 0.0}
    for wrong, message in [
        ("tisue", "'augment' parameter .* must be"),
        ({"recipe": "tisue"}, "augment=.*no recipe 'tisue'"),
        ({"flips": 0.5}, "augment=.*flips is no value"),
        ({"flip": 1.5}, "augment: flip=1.5: shares"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny(augment=wrong).fit(images, masks)


def test_pretext_tasks():
    with isolated_rng(0):
        images = torch.randn(20, 3, 32, 24)
        erased, holes = erase_boxes(images)
        swapped = swap_cells(images)
        tiny_image = swap_cells(torch.randn(1, 1, 1, 1))
    assert ((erased == images) | holes).all()
    assert 0.05 < holes.float().mean() < 0.25
    assert tiny_image.shape == (1, 1, 1, 1)
    torch.testing.assert_close(swapped.flatten(1).sort().values, images.flatten(1).sort().values)
    moved = (swapped != images).any(dim=1).float().mean()
    assert moved == pytest.approx(0.25, abs=0.03)


# ---- scikit-learn, copies, resume ----------------------------------------------------------------

PIXELS = tiny(image_shape=(1, 1, -1), batch_size=32, patch_size="auto")


def expected_failures(estimator):
    return {"check_fit_score_takes_y": "the second argument of fit is called masks"}


@parametrize_with_checks([PIXELS], expected_failed_checks=expected_failures)
def test_check_estimator(estimator, check):
    check(estimator)


def test_check_parameters():
    check_param_validation("DiffusionSegmenter", tiny())


def test_composition(data):
    X, masks = data
    assert cross_val_score(tiny(), X, masks, cv=2).shape == (2,)
    search = GridSearchCV(tiny(pretext=None), {"loss": ["focal", "ss"]}, cv=2).fit(X, masks)
    assert search.best_estimator_.predict(X).shape == masks.shape
    flat = tiny(image_shape=(16, 16, 3)).fit(X.reshape(8, -1), masks.reshape(8, -1))
    assert flat.predict(X.reshape(8, -1)).shape == (8, 256)
    assert flat.predict_proba(X.reshape(8, -1)).shape == (8, 256, 2)
    # What comes back is as what was given, not as what was fitted.
    assert flat.predict(X).shape == masks.shape
    assert flat.predict_proba(X).shape == (*masks.shape, 2)
    upright = tiny(image_shape=(16, 16, 3)).fit(X, masks)
    np.testing.assert_array_equal(upright.predict(X.reshape(8, -1)), flat.predict(X.reshape(8, -1)))


def test_a_refit_is_equal_and_copies_too(data, fitted, tmp_path):
    X, masks = data
    expected = fitted.predict_proba(X)
    np.testing.assert_array_equal(tiny().fit(X, masks).predict_proba(X), expected)
    np.testing.assert_array_equal(
        pickle.load(io.BytesIO(pickle.dumps(fitted))).predict_proba(X), expected
    )
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), expected)
    assert loaded.score(X, masks) == fitted.score(X, masks)
    generator = EmbeddingConditionedDiffusion(None, block_out_channels=(8, 16), max_epochs=1)
    epochs = []
    given = tiny(
        diffusion=generator, device="cpu", callbacks=lambda epoch, history: epochs.append(epoch)
    ).fit(X, masks)
    # The part takes the common parameters of the whole, as everywhere.
    assert given.diffusion_.device == "cpu"
    assert len(epochs) == len(given.history_) == 1 + given.max_epochs
    given.set_params(callbacks=None).diffusion_.set_params(callbacks=None)
    given.save(tmp_path / "given")
    np.testing.assert_array_equal(load(tmp_path / "given").predict_proba(X), given.predict_proba(X))


@pytest.mark.parametrize("phase", [0, 1])
def test_a_killed_fit_goes_on(data, tmp_path, phase):
    X, masks = data
    options = {"pretrain_epochs": 3, "max_epochs": 3, "validation_fraction": 0.3}
    whole = tiny(**options).fit(X, masks)
    calls = []

    def die(epoch, history):
        calls.append(epoch)
        if len(calls) == 2 + 3 * phase:
            raise KeyboardInterrupt

    broken = tiny(**options, checkpoint_dir=tmp_path, callbacks=die)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(X, masks)
    resumed = tiny(**options, checkpoint_dir=tmp_path).fit(X, masks)
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))
    assert resumed.history_.equals(whole.history_)


def test_a_checkpoint_is_of_its_loss_and_masks_and_one_pretraining_serves_all(data, tmp_path):
    X, masks = data
    options = {"validation_fraction": 0.0, "checkpoint_dir": tmp_path}
    tiny(**options).fit(X, masks)
    with pytest.raises(ValueError, match=r"finetuning.*another fit; it differs in loss"):
        tiny(**options, loss="cross_entropy").fit(X, masks)
    with pytest.raises(ValueError, match=r"pretraining.*another fit; it differs in pretext"):
        tiny(**options, pretext="inpainting").fit(X, masks)
    tiny(**options, overlap=0.5).fit(X, masks)
    changed = [mask.copy() for mask in masks]
    changed[-1][:2] = 1 - changed[-1][:2]
    with pytest.raises(ValueError, match=r"finetuning.*another fit; it differs in data"):
        tiny(**options).fit(X, changed)


def test_held_out_masks_and_stopped_fits_with_validation(data, tmp_path):
    X, masks = data
    options = {"validation_fraction": 0.4, "pretrain_epochs": 1, "max_epochs": 3}
    options |= {"checkpoint_dir": tmp_path, "diffusion": None}
    stopped = tiny(**options, callbacks=lambda epoch, history: epoch == 0).fit(X, masks)
    assert len(stopped.history_) == 1
    assert len(tiny(**options).fit(X, masks).history_) == 3  # nobody stops it any more
    for row in range(len(X)):  # whichever were held out
        changed = [mask.copy() for mask in masks]
        changed[row][:2] = 1 - changed[row][:2]
        with pytest.raises(ValueError, match=r"another fit; it differs in .*(held_out|data)"):
            tiny(**options).fit(X, changed)
