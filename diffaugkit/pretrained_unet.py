"""The first phase of GenSelfDiff-HIS: a U-Net pre-trained without labels, for what comes after.

What the estimators that fine-tune it share: reading images of any size, patches, the split by
groups, the network, and its pre-training by denoising or one of the paper's other pretext tasks.
"""

import copy
import os
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from diffaugkit.arrays import check_groups, warn
from diffaugkit.augmentations import RECIPES, image_recipe
from diffaugkit.base import HasMethods, Interval, StrOptions, TorchEstimator, Widths, described
from diffaugkit.batches import make_batches
from diffaugkit.data import check_X, warn_if_dim
from diffaugkit.denoisers import UNetDenoiser, unet_size
from diffaugkit.diffusion import WEIGHTINGS, Diffusion
from diffaugkit.embedding_diffusion import EmbeddingConditionedDiffusion
from diffaugkit.image_files import list_images
from diffaugkit.image_inputs import check_is_image, reading_range
from diffaugkit.image_rows import to_unit
from diffaugkit.persistence import fingerprint
from diffaugkit.runtime import isolated_rng
from diffaugkit.segmentation_data import ImageList, PatchRows, erase_boxes, swap_cells, vary_pairs
from diffaugkit.segmentation_networks import AttentionUNet
from diffaugkit.slides import Slide, SlideRows, find_slide
from diffaugkit.training import auto_epochs

__all__ = ["PretrainedUNet"]

_PRETEXTS = ("diffusion", "inpainting", "context_restoration")
# What the first phase depends on: one pre-training may serve fine-tunings of several kinds.
_SHAPE_PRETRAINING = ("pretext", "loss_weighting", "n_timesteps", "augment")
_LARGEST_AUTO_PATCH = 128
_PAPER_WIDTHS = (64, 128, 256, 512)
# A tenth, as in the paper, but not by fewer images than these: one says little of an epoch, and is
# missed. Six runs from scratch on 8 masks of GlaS: AJI 51 +- 10 with one held out, 55 +- 5 without.
_VALIDATION, _FEWEST_HELD = 0.1, 3


class PretrainedUNet(TorchEstimator):
    """Base class of those that pre-train a U-Net on images alone and fine-tune it with labels.

    A subclass lists the parameters below in its own ``__init__``, as scikit-learn reads them there;
    :class:`~diffaugkit.DiffusionSegmenter` says what they mean. Its own ``fit`` ends in
    ``_fit_phases``, which calls its ``_with_head(denoiser)``, for a network, and ``_finetune``.
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchEstimator._parameter_constraints,
        "diffusion": [HasMethods(["fit", "sample"]), StrOptions({"auto"}), None],
        "pretext": [StrOptions(set(_PRETEXTS)), None],
        "loss_weighting": [StrOptions(set(WEIGHTINGS))],
        "n_timesteps": [Interval(Integral, 2, None, closed="left")],
        "denoiser": [StrOptions({"unet", "attention_unet"})],
        "block_out_channels": [Widths(), StrOptions({"auto"})],
        "patch_size": [Interval(Integral, 1, None, closed="left"), tuple, StrOptions({"auto"})],
        "stride": [Interval(Integral, 1, None, closed="left"), tuple, StrOptions({"auto"})],
        "augment": ["boolean", StrOptions({"auto", *RECIPES}), dict],
        "classes": ["array-like", None],
        "validation_fraction": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "overlap": [Interval(Real, 0, 1, closed="left")],
        "image_shape": [tuple, list, None],
        "pretrain_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
    }

    _used_later = ("pretrain_epochs",)  # it shows in the weights

    def _fit_phases(self, pool, images, targets, train, held, seed):
        """Pre-train on the images of `pool`, and fine-tune on those of `train` with targets."""
        import pandas as pd

        self.patch_shape_ = self._make_patch_shape(images)
        self._recipe()  # a wrong one fails here, not in a step
        self.diffusion_ = None
        denoiser, history = self._pretrain(pool, seed)
        with isolated_rng(self._child_seed(seed, 2)):
            network = self._with_head(denoiser)
        self.module_, more = self._finetune(network, images, targets, train, held, seed)
        self.history_ = pd.DataFrame(history + more)
        self.n_iter_ = len(self.history_)
        return self

    def _pretrain(self, images, seed):
        """Phase one: the U-Net after its pretext task, and what it logged."""
        patches = PatchRows(images, range(len(images)), self.patch_shape_, self._strides())
        if self.diffusion not in ("auto", None):
            self.diffusion_ = self._fit_diffusion(patches, seed)
            return copy.deepcopy(self.diffusion_.module_).cpu(), _logged(self.diffusion_)
        with isolated_rng(self._child_seed(seed, 0)):
            denoiser = self._make_denoiser()
        if self.diffusion is None or self.pretext is None:
            return denoiser, []
        pixel_range, recipe = patches.pixel_range, self._recipe()
        diffusion = Diffusion(self.n_timesteps, "scaled_linear")

        def clean(x):
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)

        def loss(x):
            x = to_unit(x, pixel_range)
            if self.augment:
                x, _ = vary_pairs(x, x[:, :1], recipe, color=False)
            if self.pretext == "diffusion":
                return diffusion.loss(denoiser, x, weighting=self.loss_weighting)
            if self.pretext == "context_restoration":
                return (denoiser(swap_cells(x), clean(x)) - x).square().mean()
            erased, holes = erase_boxes(x)
            error = (denoiser(erased, clean(x)) - x).square().mean(dim=1, keepdim=True)
            return (error * holes).sum() / holes.sum().clamp(min=1)

        batches = self._batches(patches, seed=self._child_seed(seed, 1))
        steps = batches.steps_per_epoch
        denoiser, history = self._fit_loop(
            denoiser,
            loss,
            batches,
            seed=self._child_seed(seed, 1),
            max_epochs=auto_epochs(self.pretrain_epochs, steps, paper=100, most_steps=2_000),
            warmup=0.05,
            grad_clip=1.0,
            checkpoint_dir=self._folder("pretraining"),
            identity={name: described(getattr(self, name)) for name in _SHAPE_PRETRAINING},
        )
        return denoiser.cpu(), [{"phase": "pretraining", **row} for row in history]

    def _train_with_labels(self, module, loss, batches, validation, seed, held_out):
        """Phase two: the network after it, and what it logged.

        `validation` is the callback that scores each epoch and offers it to `module`, a KeepBest;
        None where nothing is held out and `module` is the network itself. `held_out` are arrays of
        what it looks at, which no batch holds.
        """
        identity = {}
        if self.checkpoint_dir is not None:
            identity = described(self) | {"held_out": fingerprint(*held_out)}
        steps = batches.steps_per_epoch
        _, history = self._fit_loop(
            module,
            loss,
            batches,
            seed=self._child_seed(seed, 3),
            max_epochs=auto_epochs(self.max_epochs, steps, paper=150),
            warmup=0.05,
            grad_clip=1.0,
            callbacks=self._callbacks_after(validation),
            checkpoint_dir=self._folder("finetuning"),
            identity=identity,
        )
        network = module if validation is None else module.restore()
        if validation is not None and module.best_score == 0:
            warn(
                "No epoch found any object of the held-out images, so that they cannot tell which "
                "is best: the last one is kept. More epochs, more images with labels, or "
                "validation_fraction=0 may help."
            )
        return network.eval(), [{"phase": "finetuning", **row} for row in history]

    def _recipe(self):
        """Give the recipe of `augment`; None is the paper's."""
        if isinstance(self.augment, str | dict):
            return image_recipe(self.augment, self.image_shape_[2], "augment")
        return None

    def _make_denoiser(self):
        shape = (self.image_shape_[2], *self.patch_shape_)
        widths = self.block_out_channels
        if self.denoiser == "attention_unet":
            return AttentionUNet(shape[0], _PAPER_WIDTHS if widths == "auto" else widths)
        size = unet_size(shape)
        if widths != "auto":
            size["block_out_channels"] = tuple(widths)
        return UNetDenoiser(shape[0], **size)

    def _fit_diffusion(self, patches, seed):
        diffusion = clone(self.diffusion)
        frozen = isinstance(diffusion, FrozenEstimator)
        model = diffusion.estimator if frozen else diffusion
        if frozen:
            check_is_fitted(model)
        # Before any training.
        if (
            not isinstance(model, EmbeddingConditionedDiffusion)
            or model.autoencoder is not None
            or (frozen and model.image_shape_ is None)
        ):
            raise TypeError(
                f"diffusion={type(model).__name__} has no U-Net of pixels, from which "
                f"{type(self).__name__} starts, but is for vectors, latents or something else: "
                "give EmbeddingConditionedDiffusion(encoder=None, autoencoder=None)."
            )
        if not frozen:
            if isinstance(model.denoiser, nn.Module):
                with isolated_rng(0):
                    self._with_head(copy.deepcopy(model.denoiser))  # refuses what has no last layer
            self._seed_part(self._hand_over(diffusion), seed, 0)
            self._fit_part(diffusion, "diffusion", patches)
        shape = model.image_shape_
        if shape[2] != patches.shape[1]:
            raise ValueError(
                f"diffusion was fitted on images of {shape[2]} channels, but X has "
                f"{patches.shape[1]}."
            )
        return diffusion

    def _build(self):
        given = self.diffusion_
        denoiser = self._make_denoiser() if given is None else copy.deepcopy(given.module_)
        return self._with_head(denoiser)

    # ---- input -----------------------------------------------------------------------------------

    def _read_labelled(self, X, y, name):
        """Read the images of ``fit``, decoded where they fit into memory."""
        self._require(y, name)
        return self._read(X, reset=True).loaded()

    def _require(self, y, name):
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: give "
                f"{name}."
            )

    def _read(self, X, *, reset, name="X"):
        """Images of any container as an ImageList; what is learned of them is of the first one."""
        if isinstance(X, Slide):
            raise TypeError(f"{name} is one slide: give a list of slides, [{name}] for one.")
        if self.image_shape is not None:
            parts = [self._checked(self, X, reset)]
        elif (items := _items(X)) is None:
            parts = [self._gated(X, reset)]
        else:
            parts = []
            for row, item in enumerate(items):
                try:
                    slide = find_slide(item)
                    one = [item] if slide is None else SlideRows(slide)
                    parts.append(self._gated(one, reset and not row))
                except (ValueError, TypeError) as error:
                    raise type(error)(f"Row {row} of {name}: {error}") from error
        n_channels = parts[0].shape[1] if reset else self.image_shape_[2]
        for row, part in enumerate(parts):
            if part.shape[1] != n_channels:
                where = f"row {row} of {name}" if len(parts) > 1 else name
                known = "row 0 has" if reset else f"{type(self).__name__} was fitted on"
                raise ValueError(
                    f"The images in {where} have {part.shape[1]} channels, but {known} "
                    f"{n_channels}."
                )
        images = ImageList(parts, [part.pixel_range for part in parts])
        if reset:
            self._pixel_range = images.common_range()
            warn_if_dim(self, parts, self._pixel_range)
            return ImageList(parts, [self._pixel_range] * len(parts))
        own = type(self).__name__
        return ImageList(parts, [reading_range(own, part, self._pixel_range) for part in parts])

    def _read_pool(self, unlabeled, images):
        """Images to pre-train on: `unlabeled`, or the labelled ones where it is None."""
        if unlabeled is None:
            return images
        return self._read(unlabeled, reset=False, name="unlabeled").loaded()

    def _gated(self, X, reset):
        # After fit images may have any size, so the gate learns the size anew, on a stand-in.
        learner = self if reset else type(self)(**self.get_params(deep=False))
        return self._checked(learner, X, True)

    def _checked(self, learner, X, reset):
        options = {"image_shape": self.image_shape, "images": True, "judge_scale": False}
        rows = check_X(learner, X, reset=reset, **options)
        check_is_image(self, rows)
        return rows

    def _split(self, n, groups, seed, labelled=slice(None)):
        """Numbers of the images to train on, and of those held out or None, by whole groups.

        `labelled` are the numbers of images that show an object: without any of them held out
        scores would tell nothing, or be best where nothing is found; with all of them held out
        there would be nothing to learn.
        """
        units = np.arange(n) if groups is None else check_groups(groups, n)
        names, unit = np.unique(units, return_inverse=True)
        fraction = self.validation_fraction
        if fraction == "auto":
            fraction = _VALIDATION if round(_VALIDATION * len(names)) >= _FEWEST_HELD else 0.0
        n_held = min(round(fraction * len(names)), len(names) - 1)
        if not n_held:
            return np.arange(n), None
        order = np.random.default_rng(self._child_seed(seed, 4)).permutation(len(names))
        is_held = np.isin(unit, order[:n_held])
        shows = is_held[labelled]
        if shows.all() or not shows.any():
            held = (
                f"the {is_held.sum()} images that validation_fraction="
                f"{self.validation_fraction!r} holds out"
            )
            why = f"None of {held} shows an object, so that they tell nothing of an epoch"
            if shows.any():
                why = f"All images that show an object are among {held}"
            warn(f"{why}: nothing is held out, and the last epoch is kept.")
            return np.arange(n), None
        return np.flatnonzero(~is_held), np.flatnonzero(is_held)

    def _make_patch_shape(self, images):
        if self.patch_size == "auto":
            sizes = np.array([images.size(row) for row in range(len(images))])
            return tuple(int(side) for side in sizes.min(axis=0).clip(max=_LARGEST_AUTO_PATCH))
        return _pair(self.patch_size, "patch_size")

    def _strides(self):
        if self.stride == "auto":
            return tuple(max(1, side // 2) for side in self.patch_shape_)
        return _pair(self.stride, "stride")

    def _batches(self, *rows, seed):
        return make_batches(*rows, batch_size=self.batch_size, seed=seed, device=self._device())

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.target_tags.required = True
        return tags


def _items(X):
    """Images of a list, an array of objects or a folder, one by one; None for anything else."""
    if isinstance(X, str | os.PathLike) and Path(X).is_dir():
        return list_images(X)[0]
    if not isinstance(X, list | tuple) and not (
        len(getattr(X, "shape", ())) == 1 and getattr(X, "dtype", None) is not None
    ):
        return None
    items = list(X)
    first = items[0] if items else None
    is_path = isinstance(first, str | os.PathLike)
    is_picture = hasattr(first, "getbands") or len(getattr(first, "shape", ())) in (2, 3)
    if not (is_path or is_picture or isinstance(first, Slide)) or str(first).endswith(".tar"):
        return None
    return items


def _pair(value, name):
    sides = (value, value) if isinstance(value, Integral) else tuple(value)
    if len(sides) != 2 or not all(isinstance(s, Integral) and s >= 1 for s in sides):
        raise ValueError(f"{name}={value!r} must be a number of pixels, or (height, width).")
    return int(sides[0]), int(sides[1])


def _logged(diffusion):
    if isinstance(diffusion, FrozenEstimator):
        return []
    return [{"phase": "pretraining", **row} for row in diffusion.history_.to_dict("records")]
