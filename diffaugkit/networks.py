"""Networks that embed: modules only, no training and no data."""

import itertools

import torch
from torch import nn

__all__ = ["EmbeddingMLP"]


class EmbeddingMLP(nn.Module):
    """Encoder of DiffAug for vectors: features -> high-dimensional y -> low-dimensional z.

    Blocks of Linear, LeakyReLU(0.1) and BatchNorm1d, in this order, as in the released code
    (in -> 500 -> 500 -> 50, then a head 50 -> 500 -> 500 -> 2). Beside
    the blocks a linear skip, the identity at the start, carries the input to y: what a linear
    embedding of the input already tells apart is there from the first step, and the blocks learn
    what to add. A second skip starts z at the first `n_low` features: where these are principal
    components, the map starts from the large-scale arrangement that PCA shows, and keeps more of
    it, as t-SNE does from such a start. ``skip=False`` is the released network.

    Parameters
    ----------
    n_features : int
        Width of a sample.
    n_components : int, default=50
        Width of y.
    n_low : int, default=2
        Width of z.
    hidden_sizes : tuple of int, default=(500, 500)
        Widths of the hidden layers, of the encoder and of the head alike.
    skip : bool, default=True
        Whether y and z get their linear skips.

    Examples
    --------
    >>> import torch
    >>> y, z = EmbeddingMLP(20)(torch.randn(8, 20))
    >>> tuple(y.shape), tuple(z.shape)
    ((8, 50), (8, 2))
    """

    def __init__(self, n_features, n_components=50, n_low=2, hidden_sizes=(500, 500), skip=True):
        super().__init__()
        self.backbone = _blocks(n_features, *hidden_sizes, n_components)
        last = hidden_sizes[-1] if hidden_sizes else n_components
        self.head = nn.Sequential(*_blocks(n_components, *hidden_sizes), nn.Linear(last, n_low))
        self.skip = nn.Linear(n_features, n_components, bias=False) if skip else None
        self.low_skip = nn.Linear(n_features, n_low, bias=False) if skip else None
        if skip:
            nn.init.eye_(self.skip.weight)
            nn.init.eye_(self.low_skip.weight)
            with torch.no_grad():
                self.head[-1].weight.mul_(0.1)
                self.head[-1].bias.zero_()

    def embed(self, x):
        """High-dimensional embedding y (B, n_components) of x (B, n_features)."""
        y = self.backbone(x)
        return y if self.skip is None else y + self.skip(x)

    def forward(self, x):
        """Both embeddings: y (B, n_components) and z (B, n_low)."""
        y = self.embed(x)
        z = self.head(y)
        return y, z if self.low_skip is None else z + self.low_skip(x)


def _blocks(*sizes):
    return nn.Sequential(
        *[
            nn.Sequential(nn.Linear(n_in, n_out), nn.LeakyReLU(0.1), nn.BatchNorm1d(n_out))
            for n_in, n_out in itertools.pairwise(sizes)
        ]
    )
