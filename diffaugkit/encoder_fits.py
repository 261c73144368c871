"""What a fit of the encoder consists of: its views, network, objective and batches.

One class for vectors and one for images, with the same face: ``module`` is the objective, ``loss``
what the loop calls with a batch, ``batches`` where these come from, ``fitted`` what the estimator
keeps of it all beside the network.
"""

import math

import numpy as np
import torch

from diffaugkit.arrays import check_groups, warn
from diffaugkit.augmentations import (
    ImageViews,
    image_recipe,
    local_size,
    nearest_neighbors,
    neighbor_mixup,
)
from diffaugkit.batches import make_batches, take
from diffaugkit.data import check_X
from diffaugkit.decomposition import PrincipalComponents, principal_components
from diffaugkit.image_rows import to_unit
from diffaugkit.networks import feature_width, patch_size, pretrained_source
from diffaugkit.rows import DenseRows, MappedRows
from diffaugkit.runtime import isolated_rng

__all__ = ["ImageFit", "PretrainedAsItIs", "VectorFit", "linear_space", "project_rows"]

_DEFAULT_NEIGHBORS = 30
# Vectors that are few, for which the defaults hold networks back from learning them by heart.
FEW_ROWS = 1_000
_ROWS_LOOKED_AT = 4_096
# Of the variance that one column of vectors may have before a fit warns.
_MOST_SHARE = 0.95
# Attributes of an encoder fitted on vectors, None after a fit on images.
_OF_VECTORS = ("mean_", "components_", "scale_")


class VectorFit:
    """Objective, batches and loss of one fit on vectors."""

    def __init__(self, encoder, rows, positives, interpolations, groups, seed):
        device = encoder._device()
        self.encoder, self.seed = encoder, seed
        backbone = encoder.backbone
        vectors = isinstance(backbone, str) and backbone in ("auto", "mlp")
        if not vectors or encoder.pretrained is not None:
            raise ValueError(
                f"X of shape {rows.shape} holds vectors, but backbone and pretrained are for "
                "images: say how its rows make an image with image_shape=(height, width, "
                "channels), or leave both parameters out."
            )
        if interpolations is not None:
            raise ValueError("interpolations are for images; for vectors there are positives.")
        going_on = encoder._goes_on()
        if going_on and encoder.image_shape_ is not None:
            raise ValueError(
                "warm_start=True goes on with a fit on images, but these are vectors; set "
                "warm_start=False."
            )
        if going_on:
            self.space = encoder.mean_, encoder.components_, encoder.scale_
        else:
            self.space = _fit_space(rows, encoder.n_pcs)
        inputs = project_rows(rows, *self.space)
        if not going_on:
            _warn_of_far_rows(inputs)
        k = encoder.n_neighbors
        if k == "auto":
            k = min(_DEFAULT_NEIGHBORS, max(5, len(rows) // 10), len(rows) - 1)
        # Neighbours depend on the directions alone, neither on the scale nor on the seed.
        key = (k, None if self.space[1] is None else self.space[1].tobytes())
        memo = rows._memo.get("neighbors")
        if memo is None or memo[0] != key:
            found = nearest_neighbors(inputs, k, verbose=encoder.verbose)
            memo = rows._memo["neighbors"] = (key, found)
        views = _positive_views(positives, rows, self.space, encoder)
        self.batches = make_batches(
            inputs,
            memo[1],
            *views,
            batch_size=encoder.batch_size,
            seed=encoder._child_seed(seed, 1),
            device=device,
        )
        self.inputs = self.batches.sources[0]
        self.method = encoder._method(images=False)
        out_dim = auto_out_dim(encoder, rows, self.method)
        dropout = auto_dropout(len(rows)) if encoder.dropout == "auto" else encoder.dropout
        share = encoder.positives_prob
        self.positives_prob = auto_positives_prob(len(rows)) if share == "auto" else share
        self.module = _make_objective(
            self,
            lambda: encoder._make_network(inputs.shape[1], out_dim, dropout),
            images=False,
            out_dim=out_dim,
        )
        self.fitted = dict(zip(_OF_VECTORS, self.space, strict=True))
        self.fitted |= {"image_shape_": None, "out_dim_": out_dim}

    def loss(self, x, neighbors, *generated):
        """Loss of rows (B, d), positions of their neighbours (B, k) and generated views (B, d)."""
        view_a = neighbor_mixup(x, neighbors, self.inputs)
        view_b = neighbor_mixup(x, neighbors, self.inputs)
        if generated:
            pick = torch.randint(len(generated), (len(x), 1), device=x.device)
            replace = torch.rand(len(x), 1, device=x.device) < self.positives_prob
            for number, view in enumerate(generated):
                view_b = torch.where(replace & (pick == number), view, view_b)
        return self.module.loss([view_a, view_b])


class ImageFit:
    """Objective, batches and loss of one fit on images."""

    def __init__(self, encoder, rows, positives, interpolations, groups, seed):
        device = encoder._device()
        self.encoder, self.seed = encoder, seed
        self.method = encoder._method(images=True)
        _, channels, height, width = rows.shape
        shape = height, width, channels
        self.range = rows.pixel_range
        if encoder._goes_on() and encoder.image_shape_ != shape:
            raise ValueError(
                f"warm_start=True goes on with images of {encoder.image_shape_}, but these are of "
                f"{shape}; set warm_start=False."
            )
        generated = [
            _aligned_images(view, f"positives[{number}]", rows, encoder)
            for number, view in enumerate(() if positives is None else positives)
        ]
        self.n_generated = len(generated)
        self.ranges = [view.pixel_range for view in generated]
        between = self._check_interpolations(interpolations, groups, rows)
        self.batches = make_batches(
            rows,
            None,
            *generated,
            *between,
            batch_size=encoder.batch_size,
            seed=encoder._child_seed(seed, 1),
            device=device,
        )
        self.inputs = self.batches.sources[0]
        out_dim = auto_out_dim(encoder, rows, self.method)
        source = pretrained_source(encoder.backbone, encoder.pretrained)
        if encoder._goes_on():
            source = getattr(encoder, "_source", None)
        self.module = _make_objective(
            self,
            # What goes on has its weights already, and needs no file of others.
            lambda: encoder._make_image_network(shape, out_dim, source, not encoder._goes_on()),
            images=True,
            out_dim=out_dim,
        )
        self.views = self._make_views(shape)
        self.fitted = dict.fromkeys(_OF_VECTORS)
        self.fitted |= {"image_shape_": shape, "out_dim_": out_dim, "_source": source}

    def _make_views(self, shape):
        encoder = self.encoder
        n_local = encoder.n_local_crops
        if n_local == "auto":
            n_local = _auto_local_crops(shape, encoder.augmentation)
        if self.method != "dino":
            n_local = 0
        patch = patch_size(self.module.network.backbone) or (1, 1)
        size = local_size(shape[:2], patch)
        if n_local:
            network = self.module.network
            try:
                feature_width(network.backbone, (*size, shape[2]), network.features, network.n_last)
            except ValueError as error:
                raise ValueError(
                    f"{error} This is the size of DINO's local crops: set n_local_crops=0, or take "
                    "a backbone for images of any size."
                ) from error
        if not callable(encoder.augmentation):
            image_recipe(encoder.augmentation, shape[2])  # a wrong name fails here, not in a step
        return ImageViews(encoder.augmentation, n_local=n_local, local_size=size)

    def _check_interpolations(self, interpolations, groups, rows):
        """Give what a batch holds: interpolated images, positions of their partners, shares."""
        self.between = None
        if interpolations is None:
            return []
        if self.method != "dino":
            raise ValueError(
                f"interpolations teach with method='dino' only, not with {self.method!r}: the loss "
                "of Gen-SIS mixes logits of DINO's teacher."
            )
        n = len(rows)
        groups = check_groups(groups, n)
        if isinstance(interpolations, str) and interpolations == "pixels":
            self.between = "pixels"
            seed = self.encoder._child_seed(self.seed, 2)
            partners = draw_partners(n, groups, seed)
            return [torch.from_numpy(partners), torch.full((n,), 0.5)]
        if not isinstance(interpolations, tuple | list) or len(interpolations) != 3:
            raise ValueError(
                "interpolations must be a tuple (images, partners, alphas), 'pixels' or None, got "
                f"{type(interpolations).__name__}."
            )
        images, partners, alphas = interpolations
        images = _aligned_images(images, "interpolations[0]", rows, self.encoder)
        partners = np.asarray(partners)
        alphas = np.asarray(alphas, dtype=np.float32)
        if alphas.shape not in ((), (n,)):
            raise ValueError(
                f"interpolations[2] must hold {n} shares, or be one number, got shape "
                f"{alphas.shape}."
            )
        alphas = np.broadcast_to(alphas, (n,)).copy()
        if partners.shape != (n,) or partners.dtype.kind not in "iu":
            raise ValueError(
                f"interpolations[1] must hold {n} positions in X, integers of shape ({n},), got "
                f"{partners.dtype} of shape {partners.shape}."
            )
        if partners.min() < 0 or partners.max() >= n:
            raise ValueError(f"interpolations[1] must hold positions from 0 to {n - 1}.")
        if not ((alphas >= 0) & (alphas <= 1)).all():
            raise ValueError("interpolations[2] must hold shares in [0, 1].")
        if groups is not None and (groups == groups[partners]).any():
            bad = int(np.flatnonzero(groups == groups[partners])[0])
            raise ValueError(
                f"Image {bad} was interpolated with image {int(partners[bad])} of its own group "
                f"{groups.tolist()[bad]!r}: with groups, partners come from another one."
            )
        self.between = images.pixel_range
        return [images, torch.from_numpy(partners.astype(np.int64)), torch.from_numpy(alphas)]

    def loss(self, x, _, *rest):
        """Loss of images (B, C, H, W), generated ones, and interpolated ones with their sources."""
        generated, between = rest[: self.n_generated], rest[self.n_generated :]
        views = self.views
        x = to_unit(x, self.range)
        second = self._second(x, generated)
        crops = [views.global_view(x, 0), views.global_view(second, 1)]
        crops += [views.local_view(x) for _ in range(views.n_local)]
        if not between:
            return self.module.loss(crops)
        *images, partners, alphas = between
        partner = to_unit(take(self.inputs, partners).to(x.device), self.range)
        if images:
            mixed = to_unit(images[0], self.between)
        else:
            mixed = torch.lerp(partner, x, alphas[:, None, None, None])
        both = views.global_view(mixed, 0), views.global_view(partner, 0)
        return self.module.loss(crops, (*both, alphas))

    def _second(self, x, generated):
        """Where the second view comes from: the image, or one generated for it."""
        if not generated:
            return x
        prob = self.encoder.positives_prob
        prob = 1.0 if prob == "auto" else prob
        pick = torch.randint(len(generated), (len(x), 1, 1, 1), device=x.device)
        replaced = torch.rand(len(x), 1, 1, 1, device=x.device) < prob
        for number, (view, limits) in enumerate(zip(generated, self.ranges, strict=True)):
            x = torch.where(replaced & (pick == number), to_unit(view, limits), x)
        return x


class PretrainedAsItIs:
    """What a fit of no epochs on images keeps: the pretrained network, not changed."""

    def __init__(self, encoder, rows, seed):
        _, channels, height, width = rows.shape
        shape = height, width, channels
        source = pretrained_source(encoder.backbone, encoder.pretrained)
        out_dim = auto_out_dim(encoder, rows, encoder._method(images=True))
        with isolated_rng(encoder._child_seed(seed, 0)):  # of the head, which nothing uses
            self.module = encoder._make_image_network(shape, out_dim, source)
        self.fitted = dict.fromkeys(_OF_VECTORS)
        self.fitted |= {"image_shape_": shape, "out_dim_": out_dim, "_source": source}


def _make_objective(state, make_network, *, images, out_dim):
    """Network, with the weights of the fit before where it goes on, and its objective."""
    encoder = state.encoder
    with isolated_rng(encoder._child_seed(state.seed, 0)):
        network = make_network()
        if encoder._goes_on():
            # A copy: a fit that fails must not leave half-trained weights.
            _copy_weights(encoder.module_, network)
        if images:
            # What oneDNN and tensor cores multiply fastest: "small_resnet" learns 1.3 to 1.7 times
            # as fast on a CPU, in both precisions.
            network.to(memory_format=torch.channels_last)
        batches = state.batches
        return encoder._make_objective(
            network, images, out_dim, batches.n_samples, batches.steps_per_epoch
        )


def has_map(method, image_shape):
    """Whether z is a low-dimensional map."""
    return method == "scl" or (method == "simclr" and image_shape is None)


def auto_out_dim(encoder, rows, method):
    """Prototypes of DINO's head: a power of two that follows the number of samples."""
    if method != "dino":
        return None
    if encoder.out_dim != "auto":
        return encoder.out_dim
    if encoder._goes_on() and encoder.out_dim_ is not None:
        return encoder.out_dim_
    return int(min(65536, max(256, 2 ** round(math.log2(len(rows))))))


def auto_positives_prob(n_samples):
    """Share of second views of vectors that are generated: DiffAug's, and more where few are."""
    return 0.5 if n_samples <= FEW_ROWS else 0.1


def auto_dropout(n_samples):
    """Dropout for vectors: less for more rows, and none where it was measured to serve nothing."""
    share = 0.5 * min(1.0, FEW_ROWS / n_samples)
    return share if share >= 0.2 else 0.0


def auto_queue(n_samples):
    """Keys of a queue: the largest power of two up to half the samples, at most the paper's."""
    return min(65536, 2 ** max(int(math.log2(max(n_samples / 2, 2))), 1))


def _auto_local_crops(shape, augmentation):
    """DINO's 8 local crops, where they are smaller than the image."""
    return 0 if min(shape[:2]) < 16 or callable(augmentation) else 8


def draw_partners(n, groups, seed):
    """Draw another row for each row, from another group where there are groups.

    Parameters
    ----------
    n : int
        Number of rows.
    groups : array-like of shape (n,) or None
        Slide or patient of each row.
    seed : int
        Seed of the draw.

    Returns
    -------
    ndarray of int of shape (n,)

    Raises
    ------
    ValueError
        If all rows are of one group, or some of none.

    Examples
    --------
    >>> draw_partners(4, ["a", "a", "a", "b"], seed=0)[:3].tolist()
    [3, 3, 3]
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        return (np.arange(n) + rng.integers(1, n, size=n)) % n
    groups = check_groups(groups, n)
    kinds, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise ValueError(
            "groups names one group only, but the partner of an interpolation comes from another: "
            "give at least two groups, or leave groups out to take any other image."
        )
    # Rows sorted by group: those of the own group are one run, which the draw steps over.
    order = np.argsort(codes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    place = rng.integers(n - sizes[codes])
    place = np.where(place >= starts[codes], place + sizes[codes], place)
    return order[place]


def _aligned_images(images, name, rows, encoder):
    """Images that go with those of X one by one, on their scale."""
    try:
        images = check_X(
            encoder, images, reset=False, images=True, image_shape=encoder.image_shape_
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if images.shape != rows.shape:
        raise ValueError(
            f"{name} has shape {images.shape}, but X has {rows.shape}: each set holds one "
            "generated image per image of X."
        )
    return images


def _copy_weights(source, module):
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start=True goes on with the network of the previous fit, but parameters of its "
            f"size were changed since. Restore them, or set warm_start=False. {error}"
        ) from error


def _fit_space(rows, n_pcs):
    """Mean, components or None, and the one scale that gives the input unit variance on average."""
    mean, components, std = linear_space(rows, n_pcs)
    _warn_of_one_column(components, std)
    return mean, components, float(np.sqrt(np.mean(std**2))) or 1.0


def _warn_of_one_column(components, std):
    """Warn where the variance is nearly all of one column: it alone decides what is alike."""
    shares = std**2 / (np.sum(std**2) or 1.0)
    if components is not None:
        shares = shares[0] * components[0] ** 2
    column = int(shares.argmax())
    if len(std) > 1 and shares[column] > _MOST_SHARE:
        warn(
            f"Column {column} of X (counted from 0) has {shares[column]:.1%} of the variance of "
            f"all {len(shares)}, so that it decides nearly alone which samples are alike. Where "
            "columns have units of their own, put sklearn.preprocessing.StandardScaler in front."
        )


def _warn_of_far_rows(inputs):
    """Warn where next to all rows are one point beside a few: these alone set the scale."""
    looked_at = np.unique(np.linspace(0, len(inputs) - 1, _ROWS_LOOKED_AT).astype(int))
    # The squared length is the number of columns on average over all rows.
    lengths = inputs[looked_at].double().square().sum(dim=1) / inputs.shape[1]
    usual, far = float(lengths.quantile(0.95)), int(lengths.argmax())
    if usual < 0.01 and lengths[far] > 0:  # all are 0 where nothing varies
        warn(
            "95 % of the samples lie within a tenth of the root mean square distance from the "
            "mean, so that a few far ones decide what all others look like (of those looked at, "
            f"row {looked_at[far]} is the farthest, at {float(lengths[far]) ** 0.5:.3g} times that "
            "distance). Drop them if they are errors or codes for missing values; where the "
            "features have long tails, take logarithms or put "
            "sklearn.preprocessing.RobustScaler or QuantileTransformer in front."
        )


def linear_space(rows, n_pcs):
    """Mean of the features, principal components and their standard deviation; None: features."""
    if n_pcs is not None:
        pcs = principal_components(rows, n_pcs)
        return pcs.mean, pcs.components, pcs.explained_std
    mean = sum(block.astype(np.float64).sum(axis=0) for _, block in rows.blocks()) / len(rows)
    squares = sum(((b.double().numpy() - mean) ** 2).sum(axis=0) for _, b in rows.batches(None))
    return mean, None, np.sqrt(squares / (len(rows) - 1))


def project_rows(rows, mean, components, scale):
    """Rows on the principal components (or centred features), divided by a scale, or one each."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if components is None:
        shift = torch.from_numpy(mean.astype(np.float32))
        return MappedRows(rows, lambda batch: (batch - shift) / scale, rows.shape[1])
    scores = PrincipalComponents(mean, components, np.ones(len(components))).transform(rows)
    if scores.resident:
        return DenseRows(scores.tensor / scale)
    return MappedRows(scores, lambda batch: batch / scale, len(components))


def _positive_views(positives, rows, space, encoder):
    views = []
    for number, view in enumerate(() if positives is None else positives):
        # Columns go by name where both have names; what a generator returns has none.
        of_rows = type(encoder)()
        of_rows.feature_names_in_ = rows.feature_names
        named = hasattr(view, "var_names") or hasattr(view, "columns")
        plain = rows.feature_names is None or not named
        try:
            view = check_X(of_rows, view, reset=plain, layer=encoder.layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"positives[{number}]: {error}") from error
        if view.shape != rows.shape:
            raise ValueError(
                f"positives[{number}] has shape {view.shape}, but X has {rows.shape}: each set of "
                "positives holds one generated view per row of X."
            )
        views.append(project_rows(view, *space))
    return views
