"""Networks of segmentation: the paper's attention U-Net, and a denoiser with a new last layer.

GenSelfDiff-HIS (Purma et al.): the U-Net that a diffusion model trained becomes a segmenter by
replacing its last layer; it then sees clean images at t = 0. Modules only, no training and no data.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit.denoisers import sinusoidal_embedding

__all__ = ["AttentionUNet", "SegmentationNetwork"]

_HEADS, _HEAD_WIDTH = 4, 32


class AttentionUNet(nn.Module):
    """U-Net of GenSelfDiff-HIS, with linear attention at every level; keeps the denoiser contract.

    As in the released code: 7 x 7 stem, two residual blocks per level (group norm of 8 groups,
    SiLU, timestep added in between), linear attention (Shen et al. 2021; cost linear in the number
    of pixels) after them, strided 4 x 4 convolutions between levels, full attention in the middle.
    Unlike there, the features of the first level are joined in once more at the end, and the last
    layer starts at zero, the others as torch starts them. Images of any size are padded at the
    bottom and on the right.

    Parameters
    ----------
    n_channels : int
        Channels C of a sample.
    block_out_channels : tuple of int, default=(64, 128, 256, 512)
        Width of each level, the paper's.

    Raises
    ------
    ValueError
        In `forward`, if `x_t` has the wrong shape or a condition is given: there is none.

    Examples
    --------
    >>> import torch
    >>> network = AttentionUNet(3, block_out_channels=(8, 16))
    >>> network(torch.randn(2, 3, 9, 7), torch.tensor([0, 999])).shape
    torch.Size([2, 3, 9, 7])
    """

    def __init__(self, n_channels, block_out_channels=(64, 128, 256, 512)):
        super().__init__()
        widths = tuple(block_out_channels)
        self.n_channels, self.multiple = n_channels, 2 ** (len(widths) - 1)
        stem = max(1, widths[0] // 3 * 2)
        self.n_time = widths[0]
        n_hidden = 4 * widths[0]
        self.time_mlp = nn.Sequential(
            nn.Linear(self.n_time, n_hidden), nn.GELU(), nn.Linear(n_hidden, n_hidden)
        )
        self.stem = nn.Conv2d(n_channels, stem, 7, padding=3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (before, width) in enumerate(zip((stem, *widths), widths, strict=False)):
            last = level == len(widths) - 1
            step = nn.Identity() if last else nn.Conv2d(width, width, 4, 2, 1)
            self.down.append(_Level(before, width, n_hidden, step))
        self.middle = nn.ModuleList(
            [_Block(widths[-1], widths[-1], n_hidden) for _ in range(2)]
            + [_Attention(widths[-1], linear=False)]
        )
        for before, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            step = nn.ConvTranspose2d(width, width, 4, 2, 1)
            self.up.append(_Level(2 * before, width, n_hidden, step))
        # One more level, at full resolution: the skip connection of the first.
        self.last = _Block(2 * widths[0], widths[0], n_hidden)
        self.conv_out = nn.Conv2d(widths[0], n_channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x_t, t, cond=None, drop=None):
        """Predict noise, velocity or sample; shapes as in the contract of `diffaugkit.denoisers`.

        `drop` has no meaning without a condition.
        """
        if x_t.ndim != 4 or x_t.shape[1] != self.n_channels or cond is not None:
            given = "a condition" if cond is not None else f"x_t of shape {tuple(x_t.shape)}"
            raise ValueError(
                f"AttentionUNet was given {given}, but takes (B, {self.n_channels}, H, W) without "
                "condition."
            )
        height, width = x_t.shape[2:]
        h = F.pad(x_t, (0, -width % self.multiple, 0, -height % self.multiple))
        time = self.time_mlp(sinusoidal_embedding(t, self.n_time).to(h.device))
        h, skips = self.stem(h), []
        for level in self.down:
            features = level.features(h, time)
            skips.append(features)
            h = level.step(features)
        first, second, attention = self.middle
        h = second(attention(first(h, time)), time)
        for level in self.up:
            h = level.step(level.features(torch.cat([h, skips.pop()], dim=1), time))
        h = self.last(torch.cat([h, skips.pop()], dim=1), time)
        return self.conv_out(h)[:, :, :height, :width]


class _Level(nn.Module):
    """Two residual blocks and linear attention; `step` leads to the next resolution."""

    def __init__(self, n_in, n_out, n_time, step):
        super().__init__()
        self.first, self.second = _Block(n_in, n_out, n_time), _Block(n_out, n_out, n_time)
        self.attention, self.step = _Attention(n_out, linear=True), step

    def features(self, h, time):
        return self.attention(self.second(self.first(h, time), time))


class _Block(nn.Module):
    """Residual block: twice convolution, group norm, SiLU; the timestep is added in between."""

    def __init__(self, n_in, n_out, n_time):
        super().__init__()
        groups = math.gcd(8, n_out)
        self.time = nn.Linear(n_time, n_out)
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(groups, n_out)
        self.conv2, self.norm2 = nn.Conv2d(n_out, n_out, 3, padding=1), nn.GroupNorm(groups, n_out)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x, time):
        h = F.silu(self.norm1(self.conv1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + F.silu(self.norm2(self.conv2(h)))


class _Attention(nn.Module):
    """Residual self-attention with the norm in front, linear in the number of pixels or full."""

    def __init__(self, width, linear):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(1, width)
        self.qkv = nn.Conv2d(width, 3 * _HEADS * _HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(_HEADS * _HEAD_WIDTH, width, 1)
        self.out_norm = nn.GroupNorm(1, width) if linear else nn.Identity()

    def forward(self, x):
        height, width = x.shape[2:]
        parts = self.qkv(self.norm(x)).chunk(3, dim=1)
        query, key, value = (part.unflatten(1, (_HEADS, -1)).flatten(3) for part in parts)
        if self.linear:  # (B, heads, width, N)
            query = query.softmax(dim=2) / math.sqrt(_HEAD_WIDTH)
            context = key.softmax(dim=3) @ value.transpose(2, 3)
            found = context.transpose(2, 3) @ query
        else:
            found = F.scaled_dot_product_attention(*(p.mT for p in (query, key, value))).mT
        found = found.flatten(1, 2).unflatten(2, (height, width))
        return x + self.out_norm(self.out(found))


class SegmentationNetwork(nn.Module):
    """A denoiser at t = 0 whose last layer is replaced by one that scores classes.

    Parameters
    ----------
    denoiser : nn.Module
        `UNetDenoiser`, `AttentionUNet`, or any module of the denoiser contract whose last layer is
        a convolution called ``conv_out``, its own or that of its part ``unet``. Changed in place:
        give a copy.
    n_classes : int
        Classes K.

    Raises
    ------
    TypeError
        If there is no such layer.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.denoisers import UNetDenoiser
    >>> network = SegmentationNetwork(UNetDenoiser(3, block_out_channels=(8, 16)), n_classes=2)
    >>> network(torch.randn(1, 3, 9, 7)).shape
    torch.Size([1, 2, 9, 7])
    """

    def __init__(self, denoiser, n_classes):
        super().__init__()
        owner = getattr(denoiser, "unet", denoiser)
        old = getattr(owner, "conv_out", None)
        if not isinstance(old, nn.Conv2d):
            raise TypeError(
                f"{type(denoiser).__name__} has no convolution conv_out to be replaced: a "
                "segmenter needs the U-Net of image-space diffusion."
            )
        owner.conv_out = nn.Conv2d(old.in_channels, n_classes, old.kernel_size, padding=old.padding)
        self.denoiser = denoiser

    def forward(self, images):
        """Scores (B, K, H, W) before the softmax, for images (B, C, H, W) in [-1, 1]."""
        t = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return self.denoiser(images, t)
