"""Denoisers: modules only, no training and no data.

Every denoiser keeps one contract, so that nobody else needs to know which one it is:

    denoiser(x_t, t, cond=None, drop=None) -> prediction

    x_t         (B, D) float    noised sample; of images (B, C, H, W)
    t           (B,)   int64    timestep, 0 (nearly clean) to n_timesteps - 1 (nearly noise)
    cond        (B, E) float    condition, or None: every row gets the learned null condition;
                                `UNetDenoiser` also takes tokens (B, L, E)
    drop        (B,)   bool     rows whose condition is replaced by the null one
    prediction  like x_t        noise, velocity or sample, as the training target says
"""

import contextlib
import copy
import inspect
import math
import threading

import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit.networks import Linear, norm_groups

__all__ = [
    "DENOISERS",
    "AttentionMaps",
    "DiffAugDenoiser",
    "MLPDenoiser",
    "UNetDenoiser",
    "check_denoiser",
    "check_signature",
    "record_attention",
    "sinusoidal_embedding",
    "unet_size",
]


def sinusoidal_embedding(t, n_dims, max_period=10_000.0):
    """Sines and cosines of the timestep at geometrically spaced frequencies.

    Parameters
    ----------
    t : Tensor of shape (B,)
        Timesteps.
    n_dims : int
        Width of the embedding; an odd width ends in a zero column.
    max_period : float, default=10000.0
        Longest wavelength over 2 pi, the value of Ho et al. (2020), appendix B.

    Returns
    -------
    embedding : Tensor of shape (B, n_dims), float32
        Sines first, then cosines. Computed in float64, so that a table built here does not depend
        on the library's single-precision sine.

    Examples
    --------
    >>> import torch
    >>> sinusoidal_embedding(torch.tensor([0, 5]), 4).shape
    torch.Size([2, 4])
    """
    half = n_dims // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64) / half)
    angle = t.to(torch.float64)[:, None] * frequency.to(t.device)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, n_dims % 2)).float()


_SEE = "diffaugkit.denoisers describes the contract."


def check_signature(denoiser, conditional=True):
    """Refuse a module whose ``forward`` cannot be called as the contract says.

    Parameters
    ----------
    denoiser : nn.Module
        A user's own network.
    conditional : bool, default=True
        Whether there is a condition; without one it is called with `x_t` and `t` alone.

    Raises
    ------
    ValueError
        If an argument is missing, or one more is needed.

    Examples
    --------
    >>> check_signature(MLPDenoiser(n_features=5, width=32))
    """
    signature = inspect.signature(denoiser.forward)
    try:
        for n_given in (2, 4) if conditional else (2,):
            signature.bind(*[None] * n_given)
    except TypeError as error:
        raise ValueError(
            f"denoiser={type(denoiser).__name__} has forward{signature}, but is called as "
            "forward(x_t, t), forward(x_t, t, cond) and forward(x_t, t, cond, drop): define "
            f"forward(self, x_t, t, cond=None, drop=None). {_SEE}"
        ) from error


def check_denoiser(denoiser, x_t, n_timesteps, cond=None):
    """Call a copy of a module once, and refuse it if what comes back is not shaped like `x_t`.

    Broadcasting would let it train on nonsense. Torch's default generators move if the network
    draws from them.

    Parameters
    ----------
    denoiser : nn.Module
        A user's own network.
    x_t : Tensor of shape (2, D) or (2, C, H, W)
        Two rows.
    n_timesteps : int
        Number of noise levels.
    cond : Tensor of shape (2, E) or (2, L, E), default=None
        Conditions; None for the unconditional model.

    Raises
    ------
    ValueError
        For another shape, or if the call fails.

    Examples
    --------
    >>> import torch
    >>> check_denoiser(MLPDenoiser(n_features=5, width=32), torch.zeros(2, 5), n_timesteps=1000)
    """
    device = next((parameter.device for parameter in denoiser.parameters()), x_t.device)
    t = torch.tensor([0, n_timesteps - 1], device=device)
    args = (x_t.to(device), t) if cond is None else (x_t.to(device), t, cond.to(device), t > 0)
    called = f"x_t of shape {tuple(x_t.shape)}"
    called += "" if cond is None else f" and cond of shape {tuple(cond.shape)}"
    trial = copy.deepcopy(denoiser).eval()
    try:
        with torch.no_grad():
            found = trial(*args)
    except Exception as error:
        raise ValueError(
            f"denoiser={type(denoiser).__name__} failed on {called}: {error} {_SEE}"
        ) from error
    shape = getattr(found, "shape", None)
    if shape != x_t.shape:
        found = type(found).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"denoiser={type(denoiser).__name__} gave {found} for {called}: the prediction must "
            f"be a tensor shaped like x_t. {_SEE}"
        )


class _ConditionalDenoiser(nn.Module):
    """What the vector denoisers share: the null condition and the checks of the contract."""

    def __init__(self, n_features, n_condition):
        super().__init__()
        self.n_features = n_features
        self.n_condition = n_condition
        if n_condition:
            self.null_condition = nn.Parameter(torch.zeros(n_condition))

    def _condition(self, x_t, cond, drop):
        """Condition of every row (B, E), the null one where dropped; None for a model without."""
        if x_t.ndim != 2 or x_t.shape[1] != self.n_features:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}, this denoiser takes (B, {self.n_features})."
            )
        if not self.n_condition:
            if cond is not None:
                raise ValueError(
                    "cond was given to a denoiser built with n_condition=0: pass cond=None, or "
                    "build it with n_condition equal to the width of the condition."
                )
            return None
        if cond is None:
            return self.null_condition.expand(len(x_t), -1)
        if cond.shape != (len(x_t), self.n_condition):
            raise ValueError(
                f"cond has shape {tuple(cond.shape)}, expected {(len(x_t), self.n_condition)}: one "
                "row per row of x_t, width n_condition."
            )
        return cond if drop is None else torch.where(drop[:, None], self.null_condition, cond)


class _ModulatedBlock(nn.Module):
    """Residual block h + W2 silu(W1 (LN(h) * scale + shift)); starts as the identity."""

    def __init__(self, width, dropout):
        super().__init__()
        self.hidden = Linear(width, width)
        self.output = Linear(width, width)
        self.dropout = dropout
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, h, scale, shift):
        out = F.silu(self.hidden(_modulate(h, scale, shift)))
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return h + self.output(out)


def _modulate(h, scale, shift):
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), scale)


class MLPDenoiser(_ConditionalDenoiser):
    """Residual MLP whose blocks are scaled and shifted by time and condition.

    Pre-LayerNorm blocks with adaptive scale and shift (AdaLN-zero of Peebles and Xie 2023,
    "Scalable Diffusion Models with Transformers", section 3.2, without its gate). The last layer
    starts at zero, and so does the output of each block: the untrained network predicts zero, and
    depth comes in as it pays. Beside the blocks a per-feature gain of the input, a function of time
    and condition, goes straight to the output: for whitened data the best linear denoiser is
    exactly such a gain, and LayerNorm hides from the blocks the size of x_t which that gain needs.

    Parameters
    ----------
    n_features : int
        Width D of a sample.
    n_condition : int, default=0
        Width E of the condition; 0 makes an unconditional network.
    width : int, default=512
        Width of the residual stream. The time and condition embedding is a quarter of it (at least
        32), since it enters one matrix product that serves all blocks.
    n_blocks : int, default=4
        Number of residual blocks.
    dropout : float in [0, 1), default=0.0
        Dropout inside the blocks.
    n_timesteps : int, default=1000
        Number of timesteps; their sinusoidal embeddings are a table made once.

    Raises
    ------
    ValueError
        In `forward`, if `x_t` or `cond` has the wrong shape.

    Examples
    --------
    >>> import torch
    >>> denoiser = MLPDenoiser(n_features=50, n_condition=8, width=64)
    >>> denoiser(torch.randn(3, 50), torch.tensor([0, 10, 999]), torch.randn(3, 8)).shape
    torch.Size([3, 50])
    """

    def __init__(
        self, n_features, n_condition=0, width=512, n_blocks=4, dropout=0.0, n_timesteps=1000
    ):
        super().__init__(n_features, n_condition)
        n_embedding = max(32, width // 4)
        table = sinusoidal_embedding(torch.arange(n_timesteps), n_embedding)
        self.register_buffer("time_table", table, persistent=False)
        self.time_mlp = _embedding_mlp(n_embedding, n_embedding)
        if n_condition:
            self.condition_mlp = _embedding_mlp(n_condition, n_embedding)
        # Scale and shift of every block and of the output, and the gain of the input. The 1 of the
        # usual "1 + scale" sits in the bias, which saves a kernel per block.
        self._parts = [width] * (2 * n_blocks + 2) + [n_features]
        self.modulation = Linear(n_embedding, sum(self._parts))
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():
            for i, bias in enumerate(self.modulation.bias.split(self._parts)):
                bias.fill_(1.0 if i % 2 == 0 and i <= 2 * n_blocks else 0.0)
        self.input = Linear(n_features, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width, dropout) for _ in range(n_blocks))
        self.output = Linear(width, n_features)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_t, t, cond=None, drop=None):
        """Predict noise, velocity or sample; shapes as in the module's contract."""
        condition = self._condition(x_t, cond, drop)
        embedding = self.time_mlp(self.time_table[t])
        if condition is not None:
            embedding = embedding + self.condition_mlp(condition)
        *modulation, gain = self.modulation(F.silu(embedding)).split(self._parts, dim=1)

        h = self.input(x_t)
        for i, block in enumerate(self.blocks):
            h = block(h, modulation[2 * i], modulation[2 * i + 1])
        return torch.addcmul(self.output(_modulate(h, *modulation[-2:])), gain, x_t)


def _embedding_mlp(n_inputs, n_embedding):
    return nn.Sequential(Linear(n_inputs, n_embedding), nn.SiLU(), Linear(n_embedding, n_embedding))


class DiffAugDenoiser(_ConditionalDenoiser):
    """The eight-block network of DiffAug for biology (arXiv 2309.07909, Listing 2).

    Four encoder and four decoder blocks with dense sums of skips; the embeddings of time and
    condition are added in front of each block. The paper's ``InstanceNorm1d`` gets a 2-D input,
    which it reads as one sample of B channels: what it does is normalise each row over its
    features, and so it is written here. Two details come from the released code: the first block
    begins with its linear layer, and the condition goes through an MLP of widths 200 and 200.

    Parameters
    ----------
    n_features : int
        Width D of a sample.
    n_condition : int, default=0
        Width E of the condition; 0 makes an unconditional network.
    width : int, default=2000
        Width inside the blocks, as in the paper.
    n_timesteps : int, default=1000
        Number of rows of the learned time embedding.

    Raises
    ------
    ValueError
        In `forward`, if `x_t` or `cond` has the wrong shape.

    Examples
    --------
    >>> import torch
    >>> denoiser = DiffAugDenoiser(n_features=20, width=64)
    >>> denoiser(torch.randn(3, 20), torch.tensor([0, 10, 999])).shape
    torch.Size([3, 20])
    """

    def __init__(self, n_features, n_condition=0, width=2000, n_timesteps=1000):
        super().__init__(n_features, n_condition)
        blocks = [_DiffAugBlock(n_features, width, first=i == 0) for i in range(8)]
        self.encoder = nn.ModuleList(blocks[:4])
        self.decoder = nn.ModuleList(blocks[4:])
        self.time_embedding = nn.Embedding(n_timesteps, n_features)
        if n_condition:
            self.condition_mlp = nn.Sequential(
                Linear(n_condition, 200),
                nn.LeakyReLU(),
                Linear(200, 200),
                nn.LeakyReLU(),
                Linear(200, n_features),
            )

    def forward(self, x_t, t, cond=None, drop=None):
        """Predict noise, velocity or sample; shapes as in the module's contract."""
        condition = self._condition(x_t, cond, drop)
        embedding = self.time_embedding(t)
        if condition is not None:
            embedding = embedding + self.condition_mlp(condition)

        enc1, enc2, enc3, enc4 = self.encoder
        e1 = enc1(x_t + embedding)
        e2 = enc2(e1 + embedding) + e1
        e3 = enc3(e2 + embedding) + e1 + e2
        e4 = enc4(e3 + embedding) + e1 + e2 + e3

        dec1, dec2, dec3, dec4 = self.decoder
        d1 = dec1(e4 + embedding)
        d2 = dec2(d1 + embedding) + e3 + d1
        d3 = dec3(d2 + embedding) + e2 + d1 + d2
        return dec4(d3 + embedding) + e1 + d1 + d2 + d3


class _DiffAugBlock(nn.Module):
    """LeakyReLU and norm (not in the first), Linear, LeakyReLU and norm, Linear."""

    def __init__(self, n_features, width, first):
        super().__init__()
        self.first = first
        self.hidden = Linear(n_features, width)
        self.output = Linear(width, n_features)

    def forward(self, h):
        if not self.first:
            h = F.layer_norm(F.leaky_relu(h), h.shape[-1:])
        h = F.leaky_relu(self.hidden(h))
        return self.output(F.layer_norm(h, h.shape[-1:]))


class UNetDenoiser(nn.Module):
    """U-Net of diffusers for images, conditioned on global tokens.

    Each token of the condition (a CLS token, a pooled embedding, registers) is L2-normalised and
    goes through one trained linear map; the U-Net attends to the results (Rombach et al. 2022,
    section 3.3), and their mean is added to the embedding of the timestep, which scales and shifts
    every residual block: so the condition reaches levels without attention, too. Unconditional
    models have no cross-attention at all.

    The last convolution and the last layer of each residual branch start at zero: the untrained
    network predicts zero. Images of any height and width are padded with zeros at the bottom and on
    the right, and the prediction is cropped.

    Parameters
    ----------
    n_channels : int
        Channels C of a sample.
    n_condition : int, default=0
        Width E of a token; 0 makes an unconditional network.
    block_out_channels : tuple of int, default=(64, 128, 128)
        Width of each level; each level but the last halves height and width.
    layers_per_block : int, default=1
        Residual blocks per level on the way down (one more on the way up).
    n_attention_levels : int, default=1
        Lowest levels with self-attention, which the middle block always has. Its cost grows with
        the square of the number of pixels.
    n_token_features : int or None, default=None
        Width of the projected tokens; None takes twice the widest level's, at most 512.
    normalize : bool, default=True
        L2-normalise each token, to the length sqrt(E). False for conditions of a few dimensions, of
        which a direction would keep too little.

    Raises
    ------
    ValueError
        In `forward`, if `x_t` or `cond` has the wrong shape.

    Notes
    -----
    The latent-diffusion code that Gen-SIS builds on drops a condition by setting the embedding to
    zero, which makes the null token the bias of the projection. Here it is a learned parameter of
    its own.

    Measured on 14 x 14 MNIST digits under 16 components (two levels, 250 steps, held-out loss; two
    seeds differ by 0.003): tokens alone 0.144, tokens and their mean 0.132, with scale and shift in
    the residual blocks 0.127 and 0.130, the mean alone 0.149.

    Examples
    --------
    >>> import torch
    >>> denoiser = UNetDenoiser(n_channels=1, n_condition=6, block_out_channels=(8, 16))
    >>> x_t, t = torch.randn(3, 1, 9, 7), torch.tensor([0, 10, 999])
    >>> denoiser(x_t, t, torch.randn(3, 6)).shape, denoiser(x_t, t, torch.randn(3, 5, 6)).shape
    (torch.Size([3, 1, 9, 7]), torch.Size([3, 1, 9, 7]))
    """

    def __init__(
        self,
        n_channels,
        n_condition=0,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        n_attention_levels=1,
        n_token_features=None,
        normalize=True,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        self.n_channels, self.n_condition, self.normalize = n_channels, n_condition, normalize
        self.multiple = 2 ** (len(widths) - 1)
        n_attention_levels = min(n_attention_levels, len(widths))
        attends = [level >= len(widths) - n_attention_levels for level in range(len(widths))]
        settings = {
            "in_channels": n_channels,
            "out_channels": n_channels,
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_groups(*widths),
            "resnet_time_scale_shift": "scale_shift",
        }
        if n_condition:
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

            n_tokens = n_token_features or min(512, 2 * max(widths))
            self.token = Linear(n_condition, n_tokens)
            self.null_token = nn.Parameter(torch.zeros(n_tokens))
            self.unet = UNet2DConditionModel(
                down_block_types=_kinds("{}DownBlock2D", "CrossAttn", attends),
                up_block_types=_kinds("{}UpBlock2D", "CrossAttn", attends[::-1]),
                cross_attention_dim=n_tokens,
                # Whatever its name says, diffusers takes the number of heads here.
                attention_head_dim=tuple(max(1, width // _HEAD_WIDTH) for width in widths),
                class_embed_type="projection",
                projection_class_embeddings_input_dim=n_tokens,
                **settings,
            )
        else:
            from diffusers.models.unets.unet_2d import UNet2DModel

            self.unet = UNet2DModel(
                down_block_types=_kinds("{}DownBlock2D", "Attn", attends),
                up_block_types=_kinds("{}UpBlock2D", "Attn", attends[::-1]),
                attention_head_dim=min(_HEAD_WIDTH, math.gcd(*widths)),
                **settings,
            )
        _start_at_zero(self.unet)

    def forward(self, x_t, t, cond=None, drop=None):
        """Predict noise, velocity or sample; shapes as in the module's contract."""
        tokens = self._tokens(x_t, cond, drop)
        height, width = x_t.shape[2:]
        x = F.pad(x_t, (0, -width % self.multiple, 0, -height % self.multiple))
        # Channels last is what GPUs multiply fastest; on a CPU it was measured slower in bf16.
        plain, last = torch.contiguous_format, torch.channels_last
        x = x.contiguous(memory_format=last if x.is_cuda else plain)
        if tokens is None:
            out = self.unet(x, t, return_dict=False)[0]
        else:
            out = self.unet(x, t, tokens, class_labels=tokens.mean(dim=1), return_dict=False)[0]
        return out[:, :, :height, :width]

    def features(self, x_t, t):
        """Features (B, F) of samples under the null condition: what the middle of the U-Net sees.

        Means over the four quarters of the map and the spread over all of it, of each channel.
        Middle layers know what a picture shows, as the classes of unseen pictures can be read off
        (Baranchuk et al. 2022, Xiang et al. 2023, "Denoising diffusion autoencoders").
        """
        with _outputs_of([self.unet.mid_block]) as found:
            self(x_t, t)
        quarters = F.adaptive_avg_pool2d(found[0], 2).flatten(1)
        return torch.cat([quarters, found[0].flatten(2).std(dim=2, correction=0)], dim=1)

    def _tokens(self, x_t, cond, drop):
        """Projected tokens of every row (B, L, K), the null one where dropped."""
        if x_t.ndim != 4 or x_t.shape[1] != self.n_channels:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}, this denoiser takes (B, {self.n_channels}, H, "
                "W)."
            )
        if not self.n_condition:
            if cond is not None:
                raise ValueError(
                    "cond was given to a denoiser built with n_condition=0: pass cond=None, or "
                    "build it with n_condition equal to the width of the condition."
                )
            return None
        if cond is None:
            return self.null_token.expand(len(x_t), 1, -1)
        cond = cond[:, None] if cond.ndim == 2 else cond
        if cond.ndim != 3 or len(cond) != len(x_t) or cond.shape[2] != self.n_condition:
            raise ValueError(
                f"cond has shape {tuple(cond.shape)}, expected {(len(x_t), self.n_condition)} or "
                f"{(len(x_t), 'L', self.n_condition)}: one row, or L tokens, per row of x_t."
            )
        if self.normalize:
            # To length sqrt(E) and not 1, so that the layer's usual start gives tokens of size 1.
            cond = F.normalize(cond, dim=2) * math.sqrt(self.n_condition)
        tokens = self.token(cond)
        return tokens if drop is None else torch.where(drop[:, None, None], self.null_token, tokens)


_HEAD_WIDTH = 32


def _kinds(form, prefix, attends):
    return tuple(form.format(prefix if attend else "") for attend in attends)


def _start_at_zero(unet):
    """Zero the last layer of the network and of each residual branch, as ADM and DiT do."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    last = [unet.conv_out]
    for part in unet.modules():
        if isinstance(part, ResnetBlock2D):
            last.append(part.conv2)
        elif isinstance(part, Transformer2DModel):
            last.append(part.proj_out)
        elif isinstance(part, Attention) and part.residual_connection:
            last.append(part.to_out[0])
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def unet_size(image_shape):
    """Widths, depth and attention levels of a U-Net that fits the size of the images.

    Parameters
    ----------
    image_shape : tuple of (int, int, int)
        Channels, height and width.

    Returns
    -------
    dict
        `block_out_channels`, `layers_per_block` and `n_attention_levels` of `UNetDenoiser`: small
        networks, which two CPU cores train in minutes. A GPU affords several times the width.

    Examples
    --------
    >>> unet_size((1, 28, 28))["block_out_channels"]
    (32, 64, 64)
    """
    side = max(image_shape[1:])
    levels = max(2, min(4, math.ceil(math.log2(side / 4))))
    return {
        "block_out_channels": (32, 64, 64, 128)[:levels],
        "layers_per_block": 1,
        "n_attention_levels": 1,
    }


class AttentionMaps:
    """What `record_attention` has seen.

    Attributes
    ----------
    self_attention : dict of (int, int) to list of Tensor (B, heads, N, N)
        By resolution (rows, columns), N = rows * columns; one tensor per layer in the order of the
        calls. Row i holds where position i looks to, and sums to 1.
    cross_attention : dict of (int, int) to list of Tensor (B, heads, N, L)
        The same to the tokens of the condition, where there is more than one.
    """

    def __init__(self):
        self.self_attention, self.cross_attention = {}, {}


@contextlib.contextmanager
def record_attention(denoiser):
    """Collect the attention maps of every call inside; what the denoiser returns is not changed.

    The maps are computed beside the network's own fused attention, from the same queries and keys,
    in float32. Each call adds its maps: take them out between calls to keep memory low.

    Parameters
    ----------
    denoiser : UNetDenoiser
        The network.

    Yields
    ------
    maps : AttentionMaps

    Raises
    ------
    TypeError
        For a denoiser without attention.

    Examples
    --------
    >>> import torch
    >>> denoiser = UNetDenoiser(n_channels=1, block_out_channels=(8, 16))
    >>> with record_attention(denoiser) as maps:
    ...     _ = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([300, 300]))
    >>> [(size, found[0].shape) for size, found in maps.self_attention.items()]
    [((4, 4), torch.Size([2, 2, 16, 16]))]
    """
    _need_unet(denoiser, "attention")
    from diffusers.models.attention_processor import Attention

    maps, size = AttentionMaps(), {}

    def note_size(_, args):
        size["height"], size["width"] = args[0].shape[2:]

    def record(attention, args, kwargs):
        hidden, tokens = args[0], kwargs.get("encoder_hidden_states")
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        if attention.group_norm is not None:
            hidden = attention.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
        n = hidden.shape[1]
        stride = round(math.sqrt(size["height"] * size["width"] / n))
        place = size["height"] // stride, size["width"] // stride
        if tokens is None:
            found, tokens = maps.self_attention, hidden
        elif tokens.shape[1] > 1:
            found = maps.cross_attention
        else:
            return
        with torch.no_grad():
            query, key = (
                layer(rows).unflatten(2, (attention.heads, -1)).transpose(1, 2).float()
                for layer, rows in ((attention.to_q, hidden), (attention.to_k, tokens))
            )
            with torch.autocast(hidden.device.type, enabled=False):
                scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
                found.setdefault(place, []).append(scores.softmax(dim=3))

    with contextlib.ExitStack() as stack:
        stack.enter_context(denoiser.unet.register_forward_pre_hook(_of_this_thread(note_size)))
        for part in denoiser.unet.modules():
            if isinstance(part, Attention):
                hook = part.register_forward_pre_hook(_of_this_thread(record), with_kwargs=True)
                stack.enter_context(hook)
        yield maps


@contextlib.contextmanager
def record_features(denoiser):
    """Collect the features of every call inside: what each block of the way up gives.

    Parameters
    ----------
    denoiser : UNetDenoiser
        The network.

    Yields
    ------
    features : list of Tensor (B, channels, rows, columns)
        One per block in the order of the calls, from the coarsest resolution on.

    Raises
    ------
    TypeError
        For another denoiser.

    Examples
    --------
    >>> import torch
    >>> denoiser = UNetDenoiser(n_channels=1, block_out_channels=(8, 16))
    >>> with record_features(denoiser) as features:
    ...     _ = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([300, 300]))
    >>> [tuple(block.shape) for block in features]
    [(2, 16, 8, 8), (2, 8, 8, 8)]
    """
    _need_unet(denoiser, "way up")
    with _outputs_of(denoiser.unet.up_blocks) as found:
        yield found


@contextlib.contextmanager
def _outputs_of(parts):
    found = []
    note = _of_this_thread(lambda _, args, out: found.append(out))
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.register_forward_hook(note))
        yield found


def _of_this_thread(hook):
    """Keep a hook that records to the thread that set it: others may run the network meanwhile."""
    own = threading.get_ident()

    def guarded(*args):
        if threading.get_ident() == own:
            hook(*args)

    return guarded


def _need_unet(denoiser, what):
    if not isinstance(denoiser, UNetDenoiser):
        raise TypeError(f"{type(denoiser).__name__} has no {what} to record: use UNetDenoiser.")


DENOISERS = {"mlp": MLPDenoiser, "diffaug": DiffAugDenoiser}
