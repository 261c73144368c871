"""Neighbours in every regime, and mix-ups that lie between a sample and one of its neighbours."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from diffaugkit import augmentations
from diffaugkit.augmentations import (
    RECIPES,
    ImageRecipe,
    ImageViews,
    image_recipe,
    local_size,
    nearest_neighbors,
    neighbor_mixup,
)
from diffaugkit.rows import DenseRows, MappedRows
from diffaugkit.runtime import isolated_rng


def obvious(X, k):
    distances = ((X[:, None].astype(np.float64) - X[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1)[:, :k]


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)


def test_equals_the_obvious_version(points):
    for rows in (torch.from_numpy(points), DenseRows(points)):
        found = nearest_neighbors(rows, 7)
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), obvious(points, 7))
    mapped = MappedRows(DenseRows(points), lambda batch: batch[:, :3], 3)
    np.testing.assert_array_equal(nearest_neighbors(mapped, 5), obvious(points[:, :3], 5))


def test_all_other_rows_can_be_neighbours(points):
    found = nearest_neighbors(torch.from_numpy(points[:4]), 3).numpy()
    np.testing.assert_array_equal(
        np.sort(found, axis=1), [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    )
    with pytest.raises(ValueError, match=r"n_neighbors=4 needs more than 4 samples.*Lower"):
        nearest_neighbors(torch.from_numpy(points[:4]), 4)


def test_a_row_is_never_its_own_neighbour_even_among_copies():
    found = nearest_neighbors(torch.zeros(30, 4), 5).numpy()
    assert found.shape == (30, 5)
    assert (found != np.arange(30)[:, None]).all()
    assert all(len(set(row)) == 5 for row in found.tolist())


@pytest.mark.slow
def test_approximate_search_is_accurate_and_repeatable(monkeypatch, points):
    pytest.importorskip("pynndescent")
    monkeypatch.setattr(augmentations, "_EXACT_LIMIT", 500)
    rng = np.random.default_rng(1)
    X = rng.normal(size=(700, 10)).astype(np.float32)
    first, second = (nearest_neighbors(torch.from_numpy(X), 10).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    exact = obvious(X, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(first, exact, strict=True)])
    assert recall > 0.9
    assert (first != np.arange(700)[:, None]).all()

    # On disk: among some of the rows only, of which the others are no part.
    monkeypatch.setattr(augmentations, "_REFERENCE_LIMIT", 600)
    rows = DenseRows(X)
    rows.in_memory = False
    found = nearest_neighbors(rows, 10).numpy()
    assert len(np.unique(found)) <= 600
    assert (found != np.arange(700)[:, None]).all()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert recall > 0.7

    # Numba's threads are all cores of the machine; what torch had been allowed stays.
    allowed = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        nearest_neighbors(torch.from_numpy(X), 10)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(allowed)


def test_without_pynndescent_search_is_exact(monkeypatch, points):
    monkeypatch.setattr(augmentations, "_EXACT_LIMIT", 50)
    monkeypatch.setitem(sys.modules, "pynndescent", None)
    found = nearest_neighbors(torch.from_numpy(points), 4)
    np.testing.assert_array_equal(found, obvious(points, 4))


def test_rows_on_disk_search_among_a_bounded_number(monkeypatch, points):
    monkeypatch.setattr(augmentations, "_REFERENCE_LIMIT", 40)
    rows = DenseRows(points)
    rows.in_memory = False
    found = nearest_neighbors(rows, 3).numpy()
    assert len(np.unique(found)) <= 40
    assert (found != np.arange(120)[:, None]).all()
    for row, neighbors in enumerate(found):
        others = [i for i in np.unique(found) if i != row]
        distances = ((points[others] - points[row]) ** 2).sum(1)
        best = {others[i] for i in np.argsort(distances)[:3]}
        # Reference rows that are nobody's neighbour are unknown here: those found are never worse.
        assert best <= set(neighbors.tolist())


@pytest.mark.parametrize("kind", ["tensor", "rows"])
def test_mixup_lies_between_a_sample_and_one_of_its_neighbours(points, kind):
    X = torch.from_numpy(points)
    rows = X if kind == "tensor" else MappedRows(DenseRows(points), lambda batch: batch, 6)
    neighbors = nearest_neighbors(X, 5)
    index = torch.arange(0, 120, 3)
    with isolated_rng(0):
        views = neighbor_mixup(X[index], neighbors[index], rows)
    with isolated_rng(0):
        assert torch.equal(views, neighbor_mixup(X[index], neighbors[index], rows))
    shares, picked = [], []
    for view, i in zip(views, index, strict=True):
        direction = X[neighbors[i].long()] - X[i]
        share = ((view - X[i]) * direction).sum(1) / direction.square().sum(1)
        misfit = (X[i] + share[:, None] * direction - view).norm(dim=1)
        picked.append(int(misfit.argmin()))
        shares.append(float(share[picked[-1]]))
        assert misfit.min() < 1e-5
    assert min(shares) >= 0
    assert max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.2)
    assert set(picked) == set(range(5))


# ---- images --------------------------------------------------------------------------------------

STILL = ImageRecipe(
    scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0,
    saturation=0.0, hue=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=(0.0, 0.0, 0.0),
)  # fmt: skip


def pictures(n=8, c=3, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, c, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(small, (side, side), mode="bilinear") * 2 - 1


def view(x, seed=0, number=0, **changes):
    recipe = dataclasses.replace(STILL, **changes)
    with isolated_rng(seed):
        return ImageViews(recipe).global_view(x, number)


@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["auto", *RECIPES])
def test_views_have_the_size_asked_for_and_stay_in_range(name, c):
    for shape in ((16, 16), (50, 60), (1, 9)):
        x = pictures(5, c, 64)[..., : shape[0], : shape[1]]
        with isolated_rng(0):
            views = ImageViews(name, n_local=2)(x)
        sizes = [tuple(v.shape) for v in views]
        assert sizes[:2] == [tuple(x.shape)] * 2
        assert sizes[2:] == [(5, c, *local_size(shape))] * 2
        for v in views:
            assert torch.isfinite(v).all()
            assert v.abs().max() <= 1 + 1e-6
        assert not torch.equal(views[0], views[1])


def test_a_recipe_without_changes_changes_nothing():
    x = pictures()
    torch.testing.assert_close(view(x), x, atol=1e-4, rtol=0)


def test_flips_and_turns_are_exact():
    x = pictures()
    torch.testing.assert_close(view(x, flip=1.0), x.flip(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(view(x, vertical_flip=1.0), x.flip(2), atol=1e-4, rtol=0)
    turned = view(pictures(64), quarter_turns=True)
    turns = [
        min(range(4), key=lambda k, i=i: (pictures(64)[i].rot90(k, (1, 2)) - turned[i]).abs().max())
        for i in range(64)
    ]
    assert set(turns) == {0, 1, 2, 3}
    for i, k in enumerate(turns):
        torch.testing.assert_close(turned[i], pictures(64)[i].rot90(k, (1, 2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(40, 40), (24, 64), (64, 24)])
def test_turns_of_any_shape_are_without_shear(shape):
    # Of the ramps x and y, in pixels, the slopes of a turned view are those of one angle.
    h, w = shape
    across, down = torch.arange(w) - w / 2, torch.arange(h) - h / 2
    ramps = torch.stack([across.expand(h, w), down[:, None].expand(h, w)]) / 64
    turned = view(ramps.expand(8, 2, h, w), degrees=30.0)
    i, j = h // 2, w // 2
    along_x = (turned[:, :, i, j + 8] - turned[:, :, i, j - 8]).numpy()  # (8, 2): of x and of y
    along_y = (turned[:, :, i + 8, j] - turned[:, :, i - 8, j]).numpy()
    angle_of_x = np.arctan2(-along_y[:, 0], along_x[:, 0])
    angle_of_y = np.arctan2(along_x[:, 1], along_y[:, 1])
    np.testing.assert_allclose(angle_of_x, angle_of_y, atol=0.02)
    assert np.abs(angle_of_x).max() > 0.2


def test_each_image_has_its_own_view_and_its_share_is_flipped():
    x = pictures(1).expand(400, -1, -1, -1)
    flipped = view(x, flip=0.3)
    share = ((flipped - x[0]).abs().amax((1, 2, 3)) > 0.01).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.08)
    cropped = view(x, scale=(0.2, 0.9))
    assert len({tuple(row) for row in cropped[:, 0, 0].round(decimals=4).tolist()}) == 400


def test_crops_take_the_area_they_say():
    # Of a ramp, a crop shows the range that it covers.
    side = 64
    ramp = torch.linspace(-1, 1, side)
    x = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)]).expand(
        300, 2, -1, -1
    )
    cropped = view(x, scale=(0.3, 0.5), aspect=(3 / 4, 4 / 3))
    reach = cropped.amax((2, 3)) - cropped.amin((2, 3))
    area = (reach[:, 0] * reach[:, 1] / 4).numpy()
    assert area.min() > 0.25
    assert area.max() < 0.53
    assert area.mean() == pytest.approx(0.4, abs=0.02)
    aspect = (reach[:, 0] / reach[:, 1]).numpy()
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.38


def test_colours_equal_the_obvious_version():
    # Brightness, saturation, hue, contrast in turn, one pixel at a time, from the same draws.
    x = pictures(3)
    changes = {
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.3,
        "hue": 0.05,
        "color_prob": 1.0,
    }
    ours = ((view(x, **changes) + 1) / 2).double().numpy()
    with isolated_rng(0):
        draws = [torch.empty(3, 1).uniform_(-1, 1) for _ in range(4)]  # crop: area, aspect, shifts
        assert torch.rand(3, 1).max() < 1
        names = ("brightness", "contrast", "hue", "saturation")
        gain, contrast, turn, saturation = (
            torch.empty(3, 1).uniform_(-changes[n], changes[n])[:, 0].double().numpy()
            for n in names
        )
    del draws
    unit = ((view(x) + 1) / 2).double().numpy()
    luma = np.array([0.299, 0.587, 0.114])
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for b in range(3):
        pixels = unit[b].reshape(3, -1) * (1 + gain[b])
        y, i, q = yiq @ pixels
        angle = 2 * np.pi * turn[b]
        rotated = [y, np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q]
        pixels = np.linalg.solve(yiq, np.array(rotated))
        grey = luma @ pixels
        pixels = grey + (1 + saturation[b]) * (pixels - grey)
        middle = (luma @ pixels).mean()
        pixels = middle + (1 + contrast[b]) * (pixels - middle)
        np.testing.assert_allclose(ours[b].reshape(3, -1), pixels.clip(0, 1), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", ["brightness", "contrast", "saturation"])
def test_large_changes_of_colour_show_no_negative(value, channels):
    still = {"scale": (1, 1), "aspect": (1, 1), "flip": 0, "color_prob": 1, "degrees": 0}
    none = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grey", "stain"), 0)
    none |= dict.fromkeys(("blur", "solarise"), (0, 0, 0))
    x = torch.linspace(-1, 0.2, 64).view(1, 1, 8, 8).repeat(500, channels, 1, 1)
    x[:, 0] += 0.3
    with isolated_rng(0):
        view = ImageViews(still | none | {value: 2.0}).global_view(x)
    assert (view.diff(dim=3) >= -1e-5).all()  # what was brighter stays brighter
    if channels == 3:
        assert (view[:, 0] - view[:, 1] >= -1e-5).all()  # what was red stays red
    if value == "brightness":  # factors from U(-1, 3) would leave a quarter of the images black
        assert (view.amax((1, 2, 3)) > -1).float().mean() > 0.99


def test_grey_and_inversion():
    x = pictures()
    grey = view(x, grey=1.0)
    torch.testing.assert_close(grey, grey[:, :1].expand_as(grey))
    luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    torch.testing.assert_close(grey[:, 0], luma, atol=1e-3, rtol=0)
    bright = view(x, number=1, solarise=(0.0, 1.0, 0.0))
    torch.testing.assert_close(bright, torch.where(x >= 0, -x, x), atol=1e-3, rtol=0)
    assert torch.equal(view(x, number=0, solarise=(0.0, 1.0, 0.0)), view(x))


def test_blur_smooths_large_images_and_leaves_small_ones():
    pytest.importorskip("kornia")
    rough = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = view(rough, blur=(1.0, 0.0, 0.0))
    assert (blurred.var((1, 2, 3)) <= rough.var((1, 2, 3)) + 1e-4).all()
    assert blurred.var() < 0.7 * rough.var()
    small = rough[..., :32, :32]
    assert torch.equal(view(small, blur=(1.0, 0.0, 0.0)), view(small))


def test_tissue_keeps_its_stain():
    # Angle of the optical density, which is what hue is to a stain.
    generator = torch.Generator().manual_seed(0)
    stains = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    density = torch.rand(16, 2, 12, 12, generator=generator) * 1.2
    x = torch.exp(-torch.einsum("nshw,sc->nchw", density, stains)) * 2 - 1

    def angles(images):
        flat = -((images + 1) / 2).clamp(1e-3).log().mean((2, 3))
        return flat / flat.norm(dim=1, keepdim=True)

    with isolated_rng(0):
        tissue, natural = (
            torch.cat([ImageViews(name).global_view(x) for _ in range(4)])
            for name in ("tissue", "natural")
        )
    before = angles(x).repeat(4, 1)
    moved = [(before * angles(v)).sum(1).clamp(max=1).acos().mean() for v in (tissue, natural)]
    assert moved[0] < 0.12
    assert moved[0] < 0.5 * moved[1]


def test_stain_jitter_equals_scikit_image():
    color = pytest.importorskip("skimage.color")
    x = pictures(2) * 0.6
    unit = ((view(x) + 1) / 2).clamp(1 / 255).double()
    ours = (view(x, stain=0.2, color_prob=0.0) + 1) / 2
    with isolated_rng(0):
        for _ in range(4):
            torch.empty(2, 1).uniform_(-1, 1)
        change = 1 + torch.empty(2, 3).uniform_(-0.2, 0.2).double().numpy()
    basis = color.rgb_from_hed / np.linalg.norm(color.rgb_from_hed, axis=1, keepdims=True)
    density = -np.log(unit.permute(0, 2, 3, 1).numpy())
    amounts = density @ np.linalg.inv(basis) * change[:, None, None]
    expected = np.exp(-amounts @ basis).clip(0, 1)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, atol=2e-3)


def test_recipes():
    assert image_recipe("auto", 1) == RECIPES["greyscale"]
    assert image_recipe("auto", 3) == RECIPES["natural"]
    assert RECIPES["greyscale"].flip == 0
    for value in ("hue", "saturation", "grey"):
        assert getattr(RECIPES["tissue"], value) == 0
    assert not any(RECIPES["tissue"].solarise)
    changed = image_recipe({"recipe": "natural", "flip": 0.0, "blur": [0, 0, 0]}, 3)
    assert changed == dataclasses.replace(RECIPES["natural"], flip=0.0, blur=(0, 0, 0))
    with pytest.raises(ValueError, match="no recipe 'fancy'"):
        image_recipe("fancy", 3)
    with pytest.raises(ValueError, match="flop is no value of a recipe"):
        image_recipe({"flop": 1}, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blur": 0.5}, "blur=0.5 must be three numbers"),
        ({"blur": (1, 0)}, r"blur=\(1, 0\) must be three numbers"),
        ({"scale": 0.5}, "scale=0.5 must be two numbers, the smaller first"),
        ({"scale": (0.9, 0.2)}, "scale=.* must be two numbers, the smaller first"),
        ({"brightness": -1}, "brightness=-1 must be a number of at least 0"),
        ({"flip": "often"}, "flip='often' must be a number"),
        ({"degrees": np.inf}, "degrees=inf must be a number"),
        ({"aspect": (0, 1)}, r"aspect=\(0, 1\) must be above 0"),
        ({"blur": (2.0, 0.1, 0.5)}, "blur=.* shares and probabilities end at 1"),
        ({"scale": (0.5, 2)}, "scale=.* shares and probabilities end at 1"),
    ],
)
def test_values_of_a_recipe_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        image_recipe(changes, 3)
    with pytest.raises(ValueError, match=message):
        image_recipe(ImageRecipe(**changes), 3)
    given = {"scale": np.array([0.2, 1.0]), "hue": np.float32(0.2), "quarter_turns": True}
    assert image_recipe(given, 3).hue == np.float32(0.2)


def test_a_function_can_make_the_views():
    x = pictures()
    with isolated_rng(0):
        views = ImageViews(lambda batch: -batch, n_local=1)(x)
    assert torch.equal(views[0], -x)
    assert torch.equal(views[1], -x)
    assert views[2].shape == (8, 3, 8, 8)


def test_a_function_may_work_in_place():
    x = pictures()
    before = x.clone()
    with isolated_rng(0):
        views = ImageViews(lambda batch: batch.mul_(-1), n_local=1)(x)
    assert torch.equal(x, before)
    assert torch.equal(views[0], -x)
    assert torch.equal(views[1], -x)


@pytest.mark.parametrize(
    ("shape", "patch", "expected"),
    [
        ((224, 224), (16, 16), (96, 96)),
        ((32, 32), (4, 4), (12, 12)),
        ((64, 48), (4, 4), (28, 20)),
        ((16, 16), (2, 2), (8, 8)),
        ((8, 4), (2, 2), (8, 4)),
    ],
)
def test_local_size(shape, patch, expected):
    assert local_size(shape, patch) == expected


def test_draws_come_from_torch_alone():
    x = pictures(side=48)
    with isolated_rng(3):
        first = ImageViews(n_local=2)(x)
    with isolated_rng(3):
        second = ImageViews(n_local=2)(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_of_images_that_are_not_square():
    x = torch.rand(2000, 1, 8, 20, generator=torch.Generator().manual_seed(0))
    recipe = {"recipe": "greyscale", "flip": 0.0, "scale": (1.0, 1.0), "aspect": (1.0, 1.0)}
    recipe |= {"brightness": 0.0, "contrast": 0.0, "degrees": 0.0, "multicrop_scale": (1.0, 1.0)}
    with isolated_rng(0):
        view = ImageViews(recipe).global_view(x, 0)
        torch.testing.assert_close(view, x, atol=1e-4, rtol=1e-4)
