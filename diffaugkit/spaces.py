"""Where a diffusion model works: whitened principal components, pixels, or latents.

Each space has

    shape             shape of one sample inside, () left out the batch
    clip              bound of the values inside, or None
    encode(rows)      all rows as `make_batches` and `inside` take them
    inside(batch)     float32 samples (B, *shape) of a batch of `encode`, on its device
    decode(x, seed)   Tensor (B, *shape) -> Tensor: features, or pixels (B, C, H, W) in [-1, 1];
                      with a seed also what the space leaves out, drawn anew
    output(decoded)   ndarray as the caller gave the data: layout, kind and range
    state()           plain values from which `space_from_state` makes it again
"""

import math
import tempfile
from functools import partial

import numpy as np
import torch
from sklearn.decomposition import PCA

from diffaugkit.decomposition import PrincipalComponents
from diffaugkit.diffusion import RowNoise
from diffaugkit.encoder import linear_space, project_rows
from diffaugkit.image_rows import from_unit, to_unit
from diffaugkit.rows import MappedRows, TemporaryRows
from diffaugkit.runtime import mix_seed

__all__ = ["ComponentSpace", "CopySpace", "LatentSpace", "PixelSpace", "space_from_state"]

# Values of all latents up to which they stay in memory, 1 GB of float32; then they go to a file.
_LATENTS_IN_MEMORY = 2**28
# Values inside one batch of sampling, and its fewest and most rows. The size is fixed, and the last
# batch is filled up: a larger one makes many samples faster, and a single one slower.
_SAMPLING_ON_CPU = 2**15, 4, 128
_SAMPLING_ON_GPU = 2**20, 16, 512
# Images from which the components are learned in which copies are looked for.
_PIXEL_ROWS = 4_096
# Stream of a seed for what components leave out, and the steps to its scale at most.
_RESIDUAL, _SCALINGS = 5, 200


class ComponentSpace:
    """Vectors: the leading principal components, or the features themselves, whitened.

    Parameters
    ----------
    mean : ndarray of shape (d,), float64
        Mean of the features.
    components : ndarray of shape (k, d) or None
        Principal axes; None keeps the features.
    std : ndarray of shape (k,) or (d,), float32
        Standard deviations, by which the scores are divided.
    residual : ndarray of shape (d,), float32, or None, default=None
        Standard deviation of the noise of each feature, of which the part off the components is
        what rows have there.
    """

    clip = None

    def __init__(self, mean, components, std, residual=None):
        self.mean, self.components, self.std, self.residual = mean, components, std, residual
        self.shape = (len(std),)

    @classmethod
    def fit(cls, rows, n_pcs, residual=False):
        """Learn the space of rows (n, d); `n_pcs` None keeps all features."""
        mean, components, std = linear_space(rows, n_pcs)
        left = None
        if residual and components is not None:
            left = _residual_std(rows, components * std[:, None])
            left = None if left is None else _before_projection(left, components)
        # What has no spread must come back as it is: division by 0 avoided, the rest stays small,
        # by the measure of the data: features may be of any unit, and each of its own.
        least = 1e-8 * (float(np.max(std)) or 1.0)
        if components is None:
            least = np.maximum(least, 1e-6 * np.abs(mean))
        return cls(mean, components, np.maximum(std, least).astype(np.float32), left)

    def state(self):
        """Plain values, see :func:`space_from_state`."""
        names = ("mean", "components", "std", "residual")
        return {name: getattr(self, name) for name in names}

    def encode(self, rows):
        """Whitened scores, Rows (n, k)."""
        return project_rows(rows, self.mean, self.components, self.std)

    def inside(self, batch):
        """Give the batch as it is."""
        return batch

    def decode(self, x, seed=None):
        """Features (B, d) of whitened scores (B, k); with a seed spread as the rows of ``fit``."""
        scores = x * torch.from_numpy(self.std).to(x)
        if self.components is None:
            return scores + torch.from_numpy(self.mean).to(scores)
        decoded = PrincipalComponents(self.mean, self.components, self.std).inverse(scores)
        if self.residual is None or seed is None:
            return decoded
        components, residual = torch.from_numpy(self.components), torch.from_numpy(self.residual)
        for start in range(0, len(x), 1024):
            part = decoded[start : start + 1024]
            rows = range(start, start + len(part))
            noise = RowNoise(residual.shape, mix_seed(seed, _RESIDUAL), rows)() * residual
            # Off the components, so that scores and what is embedded by these stay; in double
            # precision, so that a row does not depend on those beside it.
            part += (noise - (noise.double() @ components.T) @ components).to(part)
        return decoded

    def output(self, decoded):
        """Features as an array."""
        return decoded.numpy()

    def sampling_batch(self, device):
        """Rows of one batch of sampling."""
        return 256 if device.type == "cpu" else 4096


class PixelSpace:
    """Images as they are, in [-1, 1].

    Parameters
    ----------
    shape : tuple of (int, int, int)
        Channels, height, width.
    pixel_range : tuple of (float, float)
        Values of the caller's black and white, see `diffaugkit.image_rows`.
    layout : str
        How the caller gave the images.
    """

    clip = 1.0

    def __init__(self, shape, pixel_range, layout):
        self.shape, self.pixel_range, self.layout = tuple(shape), tuple(pixel_range), layout

    def state(self):
        """Plain values, see :func:`space_from_state`."""
        return {"shape": self.shape, "pixel_range": self.pixel_range, "layout": self.layout}

    def encode(self, rows):
        """Give the rows as they are, if their scale is that of ``fit``: bytes stay bytes."""
        if rows.pixel_range == self.pixel_range:
            return rows
        rescale = partial(_rescale, old=rows.pixel_range, new=self.pixel_range)
        return MappedRows(rows, rescale, self.shape)

    def inside(self, batch):
        """Pixels (B, C, H, W) in [-1, 1]."""
        return to_unit(batch, self.pixel_range)

    def decode(self, x, seed=None):
        """Give the pixels as they are."""
        return x

    def output(self, decoded):
        """Pixels in the caller's layout, kind and range."""
        return from_unit(decoded, self.pixel_range, self.layout)

    def sampling_batch(self, device):
        """Rows of one batch of sampling: few on a CPU, whose caches they have to fit."""
        on_cpu = device.type == "cpu"
        values, fewest, most = _SAMPLING_ON_CPU if on_cpu else _SAMPLING_ON_GPU
        fitting = 2 ** int(math.log2(max(1, values // math.prod(self.shape))))
        return max(fewest, min(most, fitting))


class LatentSpace(PixelSpace):
    """Latents of an autoencoder, which it scales to unit spread.

    Parameters
    ----------
    pixels : PixelSpace
        The space of the images.
    autoencoder : LatentAutoencoder
        A fitted autoencoder: ``encode(batch)`` and ``decode(latents)`` on tensors in [-1, 1], and
        ``latent_shape(image_shape)``.
    """

    clip = None

    def __init__(self, pixels, autoencoder):
        super().__init__(*pixels.state().values())
        self._pixels, self._autoencoder = pixels, autoencoder
        self.shape = tuple(autoencoder.latent_shape(pixels.shape))

    def state(self):
        """Plain values of the images' space; the autoencoder is saved by its owner."""
        return self._pixels.state()

    def encode(self, rows):
        """Latents of all rows, each encoded once: a Tensor (n, c, h, w), or Rows on disk."""
        n, k = len(rows), math.prod(self.shape)
        blocks = (
            self._autoencoder.encode(to_unit(block, rows.pixel_range)).cpu()
            for _, block in rows.batches(64)
        )
        if n * k <= _LATENTS_IN_MEMORY:
            return torch.cat(list(blocks))
        with tempfile.NamedTemporaryFile(prefix="diffaugkit-", delete=False) as file:
            # From here on the file cannot be left over.
            latents = TemporaryRows(file.name, (n, *self.shape))
            for block in blocks:
                file.write(block.numpy().tobytes())
        return latents

    def inside(self, batch):
        """Give the latents as they are."""
        return batch

    def decode(self, x, seed=None):
        """Pixels (B, C, H, W) in [-1, 1]."""
        height, width = self._pixels.shape[1:]
        return torch.cat(
            [self._autoencoder.decode(part)[..., :height, :width].cpu() for part in x.split(64)]
        )


def _residual_std(rows, axes):
    """Find the spread of each feature that axes (k, d) of their spread leave; None for none."""
    variances = linear_space(rows, None)[2] ** 2
    left = variances - (axes**2).sum(axis=0)
    left = np.where(left > 1e-6 * variances, left, 0)
    return np.sqrt(left).astype(np.float32) if left.any() else None


def _before_projection(residual, components):
    """Spread of independent noise that has the spread `residual` (d,) off the components (k, d).

    Projecting takes k / d of its variance away, much where features are few. With v the variances,
    P = C^T C and M = (I - P)^2 by entries, M v is what is left; v is found by scaling, in steps.
    """
    wanted = np.asarray(residual, np.float64) ** 2
    inside = np.einsum("kd,kd->d", components, components)
    variance = wanted.copy()
    for _ in range(_SCALINGS):
        gram = (components * variance) @ components.T
        left = variance * (1 - 2 * inside) + np.einsum("kd,kd->d", gram @ components, components)
        ratio = np.divide(wanted, left, out=np.zeros_like(left), where=left > 0)
        variance *= ratio.clip(0.5, 2)
        if np.allclose(left, wanted, rtol=0.01, atol=0):
            break
    return np.sqrt(variance).astype(np.float32)


def _rescale(pixels, old, new):
    """Pixels of one range in another, as floats."""
    return (to_unit(pixels, old) + 1) * ((new[1] - new[0]) / 2) + new[0]


def space_from_state(state, autoencoder=None):
    """Make a space again from what `state()` gave, and from the autoencoder where there is one."""
    if "std" in state:
        return ComponentSpace(**state)
    pixels = PixelSpace(**state)
    return pixels if autoencoder is None else LatentSpace(pixels, autoencoder)


class CopySpace:
    """Where copies show: the compact scores of vectors, or 50 principal components of pixels.

    Embeddings would show copies everywhere: two images may have theirs in common and differ.

    Parameters
    ----------
    rows : Rows of shape (n, d) or (n, C, H, W)
        Real samples.
    space : ComponentSpace, PixelSpace or LatentSpace
        Space of the generator.
    """

    def __init__(self, rows, space):
        self.space, self.pcs = space, None
        if rows.is_image:
            some = np.linspace(0, len(rows) - 1, min(len(rows), _PIXEL_ROWS)).astype(np.int64)
            pixels = _flat_pixels(rows, some)
            self.pcs = PCA(min(50, *pixels.shape), random_state=0).fit(pixels)

    def of(self, rows):
        """Coordinates (n, k) of rows."""
        if self.pcs is None:
            return self.of_latents(self.space.encode(rows))
        parts = (_flat_pixels(rows, part) for part in rows.slices(1024))
        return np.concatenate([self.pcs.transform(part) for part in parts])

    def of_latents(self, latents):
        """Coordinates (n, k), float64, of whitened scores of vectors."""
        return np.asarray(latents, np.float64) * self.space.std


def _flat_pixels(rows, index):
    return to_unit(rows[index], rows.pixel_range).flatten(1).numpy()
