"""Denoisers: modules only, no training and no data.

Every denoiser keeps one contract, so that nobody else needs to know which one it is:

    denoiser(x_t, t, cond=None, drop=None) -> prediction

    x_t         (B, D) float    noised sample
    t           (B,)   int64    timestep, 0 (nearly clean) to n_timesteps - 1 (nearly noise)
    cond        (B, E) float    condition, or None: every row gets the learned null condition
    drop        (B,)   bool     rows whose condition is replaced by the null one
    prediction  (B, D) float    noise, velocity or sample, as the training target says
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DENOISERS", "DiffAugDenoiser", "MLPDenoiser", "sinusoidal_embedding"]


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
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
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
        self.modulation = nn.Linear(n_embedding, sum(self._parts))
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():
            for i, bias in enumerate(self.modulation.bias.split(self._parts)):
                bias.fill_(1.0 if i % 2 == 0 and i <= 2 * n_blocks else 0.0)
        self.input = nn.Linear(n_features, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width, dropout) for _ in range(n_blocks))
        self.output = nn.Linear(width, n_features)
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
    return nn.Sequential(
        nn.Linear(n_inputs, n_embedding), nn.SiLU(), nn.Linear(n_embedding, n_embedding)
    )


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
                nn.Linear(n_condition, 200),
                nn.LeakyReLU(),
                nn.Linear(200, 200),
                nn.LeakyReLU(),
                nn.Linear(200, n_features),
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
        self.hidden = nn.Linear(n_features, width)
        self.output = nn.Linear(width, n_features)

    def forward(self, h):
        if not self.first:
            h = F.layer_norm(F.leaky_relu(h), h.shape[-1:])
        h = F.leaky_relu(self.hidden(h))
        return self.output(F.layer_norm(h, h.shape[-1:]))


DENOISERS = {"mlp": MLPDenoiser, "diffaug": DiffAugDenoiser}
