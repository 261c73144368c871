"""Views of a sample that need no generator: mix-up with nearest neighbours, crops and colours.

Of vectors, the hand-made positives of DiffAug for biology (Zang et al., arXiv 2309.07909, section
2.2 and the released code): ``a x + (1 - a) x_nn`` with a ~ U(0, 1) and x_nn a random one of the k
nearest neighbours of x. Of images, DINO's multi-crop and its colours, in recipes for natural
images, greyscale and H&E tissue. They train the encoder before any generator exists, and most of
the time after.
"""

import functools
import math
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from diffaugkit.runtime import progress_bar

# Exact search up to here: on one core 60 000 rows of 50 features take 13 s. NN-descent takes 20,
# nearly all of it its compiler's, and finds 88 % of them.
_EXACT_LIMIT = 60_000
# Rows on disk look for neighbours among this many others, so that memory does not grow with n.
_REFERENCE_LIMIT = 50_000


def nearest_neighbors(rows, n_neighbors, *, verbose=0):
    """Find the nearest rows of each row, itself excluded.

    Exact (scikit-learn) up to 60 000 rows, approximate by NN-descent (pynndescent, where installed)
    above. Rows that lie on disk search exactly, among at most 50 000 random others.

    Parameters
    ----------
    rows : Rows or Tensor of shape (n, d)
        Euclidean distances are taken in this space.
    n_neighbors : int
        Neighbours per row, at most n - 1.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    Tensor of shape (n, n_neighbors), int32

    Raises
    ------
    ValueError
        If there are not more rows than neighbours.

    Examples
    --------
    >>> import torch
    >>> nearest_neighbors(torch.tensor([[0.0], [1.0], [3.0]]), 1).tolist()
    [[1], [0], [1]]
    """
    n = len(rows)
    if n_neighbors >= n:
        raise ValueError(
            f"n_neighbors={n_neighbors} needs more than {n_neighbors} samples, got n_samples = "
            f"{n}. Lower n_neighbors, or leave it at 'auto'."
        )
    in_memory = isinstance(rows, torch.Tensor) or rows.in_memory
    reference = np.arange(n)
    if not in_memory and n > _REFERENCE_LIMIT:
        reference = np.random.default_rng(0).choice(n, _REFERENCE_LIMIT, replace=False)
        reference.sort()
    points = np.ascontiguousarray(rows[reference], dtype=np.float32)
    among_all = len(reference) == n
    found = np.empty((n, n_neighbors), dtype=np.int32)
    # Around the search: NN-descent works before the first row is done.
    with progress_bar(verbose, n, "neighbors", "row", leave=False) as bar:
        search = _search(points, n_neighbors + 1, among_all)
        for start in range(0, n, 16_384):
            stop = min(start + 16_384, n)
            block = points[start:stop] if among_all else np.asarray(rows[start:stop])
            candidates = reference[search(slice(start, stop), block)]
            # A row is its own nearest, but not always first among equals, nor always found.
            itself = candidates == np.arange(start, stop)[:, None]
            itself[~itself.any(axis=1), -1] = True
            found[start:stop] = candidates[~itself].reshape(-1, n_neighbors)
            bar.update(stop - start)
    return torch.from_numpy(found)


def _search(points, k, among_all):
    """Make the search: a slice of the rows, and the block that they are -> points (m, k)."""
    if among_all and len(points) > _EXACT_LIMIT:
        graph = _descend(points, k)
        if graph is not None:
            return lambda part, _: graph[part]
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k).fit(points)
    return lambda _, block: index.kneighbors(block, return_distance=False)


def _descend(points, k):
    """Find the k nearest points of each by NN-descent; None where pynndescent is missing."""
    try:
        import numba
        from pynndescent import NNDescent
    except ImportError:
        return None
    n_threads = torch.get_num_threads()
    n_jobs = min(n_threads, numba.config.NUMBA_NUM_THREADS)
    try:
        index = NNDescent(points, n_neighbors=max(k, 15), random_state=0, n_jobs=n_jobs)
        return index.neighbor_graph[0][:, :k]
    finally:
        # Numba sets OpenMP to all cores of the machine when it starts its own threads, and torch
        # with it: a process that had been told to use one then fights its neighbours for the rest.
        torch.set_num_threads(n_threads)


def neighbor_mixup(x, neighbors, rows):
    """Mix each sample with a random one of its nearest neighbours, by a random share.

    Parameters
    ----------
    x : Tensor of shape (B, d)
        Samples.
    neighbors : Tensor of shape (B, k), integer
        Their neighbours, as positions in `rows`.
    rows : Tensor or Rows of shape (n, d)
        Where the neighbours are.

    Returns
    -------
    Tensor of shape (B, d)
        ``a x + (1 - a) x_nn`` with a ~ U(0, 1), one share per sample.

    Examples
    --------
    >>> import torch
    >>> rows = torch.tensor([[0.0], [1.0]])
    >>> view = neighbor_mixup(rows[:1], torch.tensor([[1]]), rows)
    >>> bool(0 <= view <= 1)
    True
    """
    pick = torch.randint(neighbors.shape[1], (len(x), 1), device=x.device)
    chosen = neighbors.gather(1, pick)[:, 0]
    if isinstance(rows, torch.Tensor):
        partner = rows.index_select(0, chosen.long().to(rows.device)).to(x.device)
    else:
        partner = rows[chosen.cpu().numpy()].to(x.device)
    return torch.lerp(partner, x, torch.rand(len(x), 1, device=x.device))


# ---- images --------------------------------------------------------------------------------------

# Below this many pixels a blur leaves nothing to see: recipes for CIFAR have none.
_BLUR_SIDE = 48
_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001),
# each of length 1, side by side: three rows for the colours.
_STAINS = tuple(
    zip(
        *(
            [value / math.hypot(*stain) for value in stain]
            for stain in ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class ImageRecipe:
    """Values of the random views of images; what differs per view is (global 1, global 2, local).

    The defaults are DINO's (Caron et al. 2021, main_dino.py).

    Parameters
    ----------
    scale : tuple of (float, float), default=(0.14, 1.0)
        Share of the area that a global crop takes, where there are no local crops.
    multicrop_scale : tuple of (float, float), default=(0.4, 1.0)
        The same beside local crops.
    local_scale : tuple of (float, float), default=(0.05, 0.4)
        Share of the area that a local crop takes.
    aspect : tuple of (float, float), default=(3 / 4, 4 / 3)
        Width by height of a crop, log-uniform; a crop that does not fit is cut to the image.
    flip, vertical_flip : float, default=0.5, 0.0
        Probability of a mirror image, left-right and up-down.
    quarter_turns : bool, default=False
        Turn by a random multiple of 90 degrees (of 180 where an image is not square).
    degrees : float, default=0.0
        Turn by up to this angle to either side.
    brightness, contrast, saturation, hue : float, default=0.4, 0.4, 0.2, 0.1
        Largest relative change, a factor of at least 0; of the hue, in turns of the colour circle.
    color_prob : float, default=0.8
        Probability of those four.
    grey : float, default=0.2
        Probability of losing colour.
    stain : float, default=0.0
        Largest relative change of the density of haematoxylin, eosin and residual each.
    blur : tuple of float, default=(1.0, 0.1, 0.5)
        Probability of a Gaussian blur, sigma from U(0.1, 2); none below 48 pixels, or 24 of a
        local crop.
    solarise : tuple of float, default=(0.0, 0.2, 0.0)
        Probability of inverting what is brighter than the middle.
    """

    scale: tuple = (0.14, 1.0)
    multicrop_scale: tuple = (0.4, 1.0)
    local_scale: tuple = (0.05, 0.4)
    aspect: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    degrees: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    color_prob: float = 0.8
    grey: float = 0.2
    stain: float = 0.0
    blur: tuple = (1.0, 0.1, 0.5)
    solarise: tuple = (0.0, 0.2, 0.0)


# Values that are probabilities, or shares of the area.
_SHARES = {"scale", "multicrop_scale", "local_scale", "flip", "vertical_flip", "color_prob"}
_SHARES |= {"grey", "blur", "solarise"}

RECIPES = {
    "natural": ImageRecipe(),
    # A mirrored or an inverted digit is another one, or none.
    "greyscale": ImageRecipe(
        scale=(0.4, 1.0),
        local_scale=(0.15, 0.5),
        flip=0.0,
        degrees=10.0,
        saturation=0.0,
        hue=0.0,
        grey=0.0,
        solarise=(0.0, 0.0, 0.0),
    ),
    # Stain is what tissue is told apart by: no hue, no grey, no inversion. Tissue has no up.
    "tissue": ImageRecipe(
        scale=(0.2, 1.0),
        vertical_flip=0.5,
        quarter_turns=True,
        brightness=0.2,
        contrast=0.2,
        saturation=0.0,
        hue=0.0,
        grey=0.0,
        stain=0.1,
        blur=(0.5, 0.1, 0.3),
        solarise=(0.0, 0.0, 0.0),
    ),
}


def image_recipe(augmentation, channels, name="augmentation"):
    """Find the recipe that a parameter means.

    Parameters
    ----------
    augmentation : {"auto", "natural", "greyscale", "tissue"}, dict or ImageRecipe
        "auto" is "greyscale" for one channel and "natural" for others. A dict changes single values
        of a recipe: ``{"recipe": "natural", "flip": 0.0}``; without "recipe", of the automatic one.
    channels : int
        Channels of the images.
    name : str, default="augmentation"
        What the caller calls the parameter, for errors.

    Returns
    -------
    ImageRecipe

    Raises
    ------
    ValueError
        For an unknown name or value.
    """
    if isinstance(augmentation, ImageRecipe):
        _check_values(vars(augmentation), name)
        return augmentation
    changes = dict(augmentation) if isinstance(augmentation, dict) else {"recipe": augmentation}
    base = changes.pop("recipe", "auto")
    if base == "auto":
        base = "greyscale" if channels == 1 else "natural"
    if base not in RECIPES:
        raise ValueError(
            f"{name}={augmentation!r}: there is no recipe {base!r}; take 'auto', 'natural', "
            "'greyscale', 'tissue', a dict, or a function from a batch to a batch."
        )
    known = ImageRecipe.__dataclass_fields__
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"{name}={augmentation!r}: {', '.join(unknown)} is no value of a recipe; these "
            f"are: {', '.join(known)}."
        )
    _check_values(changes, name)
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return replace(RECIPES[base], **changes)


def _check_values(changes, name):
    for key, value in changes.items():
        n = np.size(ImageRecipe.__dataclass_fields__[key].default)
        values = np.atleast_1d(np.asarray(value, dtype=object))
        real = (isinstance(v, Real) and 0 <= v < math.inf for v in values.flat)
        if values.shape != (n,) or not all(real) or (n == 2 and values[0] > values[1]):
            form = {1: "a number", 2: "two numbers, the smaller first,", 3: "three numbers"}[n]
            raise ValueError(f"{name}: {key}={value!r} must be {form} of at least 0.")
        if key in _SHARES and values.max() > 1:
            raise ValueError(f"{name}: {key}={value!r}: shares and probabilities end at 1.")
        if key == "aspect" and values[0] == 0:
            raise ValueError(f"{name}: aspect={value!r} must be above 0.")


class ImageViews:
    """Random views of a batch of images, different for each image, on the batch's device.

    Crop, flip and turn are one resampling, and all changes of colour are one matrix per image: on a
    CPU that was measured at a fifth of the time of kornia's modules for the same (batch of 64 at 32
    pixels, one core: 2.2 against 10.0 ms a global view, 0.8 against 4.1 a local one). Only the blur
    is kornia's. Hue is turned in YIQ, not in HSV. All draws come from torch's default generators.

    Parameters
    ----------
    augmentation : str, dict, ImageRecipe or callable, default="auto"
        See :func:`image_recipe`. A callable maps a batch (B, C, H, W) in [-1, 1] to a view of it;
        local crops are then crops of such views.
    n_local : int, default=0
        Small crops, beside two views of the size of the image.
    local_size : tuple of (int, int) or None, default=None
        Height and width of these; None: see :func:`local_size`.

    Examples
    --------
    >>> import torch
    >>> views = ImageViews(n_local=3)(torch.rand(4, 3, 32, 32) * 2 - 1)
    >>> [tuple(view.shape[1:]) for view in views]
    [(3, 32, 32), (3, 32, 32), (3, 14, 14), (3, 14, 14), (3, 14, 14)]
    """

    def __init__(self, augmentation="auto", n_local=0, local_size=None):
        self.augmentation, self.n_local, self.local_size = augmentation, n_local, local_size

    def __call__(self, x):
        """Make views of x (B, C, H, W) in [-1, 1]: a list, the global ones first."""
        views = [self.global_view(x, number) for number in range(2)]
        return views + [self.local_view(x) for _ in range(self.n_local)]

    def global_view(self, x, number=0):
        """One view of full size; `number` tells which probabilities hold."""
        if callable(self.augmentation):
            return self._called(x)
        recipe = image_recipe(self.augmentation, x.shape[1])
        scale = recipe.multicrop_scale if self.n_local else recipe.scale
        view = _crop(x, x.shape[2:], scale, recipe)
        return recolor(view, recipe, min(number, 1))

    def local_view(self, x):
        """One small crop."""
        size = local_size(x.shape[2:]) if self.local_size is None else self.local_size
        if callable(self.augmentation):
            return _crop(self._called(x), size, ImageRecipe.local_scale, ImageRecipe(flip=0))
        recipe = image_recipe(self.augmentation, x.shape[1])
        return recolor(_crop(x, size, recipe.local_scale, recipe), recipe, 2)

    def _called(self, x):
        return self.augmentation(x.clone())  # it may work in place, and each view begins anew


def local_size(shape, patch=(1, 1)):
    """Size of a local crop: 3 / 7 of the image's as 96 to 224, in whole patches, at least 8 pixels.

    Parameters
    ----------
    shape : tuple of (int, int)
        Height and width of the image.
    patch : tuple of (int, int), default=(1, 1)
        Height and width of a patch.

    Returns
    -------
    tuple of (int, int)
        Never larger than the image.

    Examples
    --------
    >>> local_size((224, 224), (16, 16)), local_size((32, 32), (4, 4)), local_size((8, 8))
    ((96, 96), (12, 12), (8, 8))
    """
    sizes = []
    for side, step in zip(shape, patch, strict=True):
        whole = max(round(side * 3 / 7 / step), 1) * step
        sizes.append(min(max(whole, -(-8 // step) * step), side))
    return tuple(sizes)


def _uniform(x, low, high, n=1):
    """U(low, high), one row per image of the batch: (B, n)."""
    return torch.empty(len(x), n, device=x.device).uniform_(low, high)


def _happens(x, probability):
    return torch.rand(len(x), 1, device=x.device) < probability


def _crop(x, size, scale, recipe):
    """Resample a random rectangle of each image, flipped and turned, to one size."""
    height, width = x.shape[2:]
    area = _uniform(x, *scale) * height * width
    # Of the rectangle as it is seen: 1 is not stretched, whatever the sides of the view.
    aspect = torch.exp(_uniform(x, *map(math.log, recipe.aspect))) * (size[1] / size[0])
    # Half-widths of the rectangle where the image is [-1, 1]; what does not fit is cut.
    half_w = ((area * aspect).sqrt() / width).clamp(max=1.0)
    half_h = ((area / aspect).sqrt() / height).clamp(max=1.0)
    shift_x = _uniform(x, -1.0, 1.0) * (1 - half_w)
    shift_y = _uniform(x, -1.0, 1.0) * (1 - half_h)
    if recipe.flip:
        half_w = torch.where(_happens(x, recipe.flip), -half_w, half_w)
    if recipe.vertical_flip:
        half_h = torch.where(_happens(x, recipe.vertical_flip), -half_h, half_h)
    angle = torch.zeros_like(half_w)
    if recipe.quarter_turns:
        turn = math.pi / 2 if height == width else math.pi
        angle = angle + turn * torch.randint(4, (len(x), 1), device=x.device)
    if recipe.degrees:
        angle = angle + _uniform(x, -1.0, 1.0) * math.radians(recipe.degrees)
    cos, sin = angle.cos(), angle.sin()
    # The grid goes from -1 to 1 on both axes: a view that is not square would be sheared.
    ratio = size[0] / size[1]
    affine = torch.stack(
        [
            torch.cat([half_w * cos, -half_w * sin * ratio, shift_x], dim=1),
            torch.cat([half_h * sin / ratio, half_h * cos, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, (len(x), x.shape[1], *size), align_corners=False)
    view = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return view.clamp(-1.0, 1.0)


def recolor(x, recipe, number):
    """Change stain, brightness, contrast, saturation, hue, grey, sharpness of views in [-1, 1].

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W)
        Views; each gets changes of its own.
    recipe : ImageRecipe
        The changes.
    number : {0, 1, 2}
        Which of three values holds: of the first global view, the second, or local ones.

    Returns
    -------
    Tensor of shape (B, C, H, W)
    """
    unit = (x + 1) / 2
    if recipe.stain and x.shape[1] == 3:
        unit = _restain(unit, recipe.stain)
    unit = _jitter(unit, recipe).clamp(0.0, 1.0)
    if recipe.blur[number] and min(x.shape[2:]) >= (_BLUR_SIDE if number < 2 else _BLUR_SIDE // 2):
        unit = torch.where(_happens(x, recipe.blur[number])[..., None, None], _blur(unit), unit)
    if recipe.solarise[number]:
        happens = _happens(x, recipe.solarise[number])[..., None, None]
        unit = torch.where(happens & (unit >= 0.5), 1 - unit, unit)
    return unit * 2 - 1


def _jitter(unit, recipe):
    """Affine change of the colours of each image, drawn as one matrix and one offset."""
    n, channels = unit.shape[:2]
    on = _happens(unit, recipe.color_prob).float()

    def factor(strength):
        # Below 0 contrast and saturation would show the negative.
        return 1 + on * _uniform(unit, -min(strength, 1.0), strength)

    gain, contrast = factor(recipe.brightness), factor(recipe.contrast)
    if channels != 3:
        middle = unit.mean((1, 2, 3))[:, None] * gain
        scale, offset = gain * contrast, (1 - contrast) * middle
        return unit * scale[..., None, None] + offset[..., None, None]
    luma = _table(_LUMA, unit.device)
    eye, grey = torch.eye(3, device=unit.device), luma.expand(3, 3)
    matrix = eye.expand(n, 3, 3)
    if recipe.hue:
        turn = 2 * math.pi * on * _uniform(unit, -recipe.hue, recipe.hue)
        cos, sin = turn[..., None].cos(), turn[..., None].sin()
        keep, turned = torch.zeros(2, 3, 3, device=unit.device)
        keep[0, 0] = 1.0
        turned[1, 2], turned[2, 1] = -1.0, 1.0
        rotation = keep + cos * (eye - keep) + sin * turned
        matrix = _inverse(_YIQ, unit.device) @ rotation @ _table(_YIQ, unit.device)
    if recipe.saturation:
        share = factor(recipe.saturation)[..., None]
        matrix = (share * eye + (1 - share) * grey) @ matrix
    if recipe.grey:
        matrix = torch.where(_happens(unit, recipe.grey)[..., None], grey @ matrix, matrix)
    flat = unit.flatten(2)
    # None of the above moves the mean luma, which is what contrast turns about.
    middle = (flat.mean(2) @ luma)[:, None] * gain
    colored = torch.bmm(matrix * (gain * contrast)[..., None], flat)
    return (colored + ((1 - contrast) * middle)[..., None]).view_as(unit)


# Kept by device: to copy them, or to invert them there, would wait for a GPU in every view.
@functools.cache
def _table(values, device):
    return torch.tensor(values, device=device)


@functools.cache
def _inverse(values, device):
    return torch.linalg.inv(torch.tensor(values, dtype=torch.float64)).float().to(device)


def _restain(unit, strength):
    """Change the density of each stain a little: Tellez et al. 2018, in optical density."""
    change = 1 + _uniform(unit, -min(strength, 1.0), strength, 3)
    density = -unit.clamp(min=1 / 255).log()
    there = change[..., None] * _inverse(_STAINS, unit.device)
    matrix = _table(_STAINS, unit.device) @ there
    return torch.exp(-torch.bmm(matrix, density.flatten(2))).view_as(unit)


def _blur(unit):
    """Gaussian blur with one sigma per image, U(0.1, 2) at 224 pixels as at others, as DINO's."""
    try:
        from kornia.filters import gaussian_blur2d
    except ImportError as error:
        raise ImportError(
            'Blurred views need kornia: pip install "diffaugkit[images]", or set "blur" of the '
            "recipe to (0, 0, 0)."
        ) from error
    sigma = _uniform(unit, 0.1, 2.0).expand(-1, 2)
    side = min(9, (min(unit.shape[2:]) - 1) // 2 * 2 + 1)
    return gaussian_blur2d(unit, (side, side), sigma)
