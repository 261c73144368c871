"""Views of a sample that need no generator: mix-up with nearest neighbours.

The hand-made positives of DiffAug for biology (Zang et al., arXiv 2309.07909, section 2.2 and the
released code): ``a x + (1 - a) x_nn`` with a ~ U(0, 1) and x_nn a random one of the k nearest
neighbours of x. They train the encoder before any generator exists, and most of the time after.
"""

import numpy as np
import torch

# Exact search up to here: measured on one core, 20 000 rows of 20 features take 2 s, NN-descent 14
# s, and its compiler as much again and more.
_EXACT_LIMIT = 30_000
# Rows on disk look for neighbours among this many others, so that memory does not grow with n.
_REFERENCE_LIMIT = 50_000


def nearest_neighbors(rows, n_neighbors, *, random_state=0):
    """Find the nearest rows of each row, itself excluded.

    Exact (scikit-learn) up to 30 000 rows, approximate by NN-descent (pynndescent, where installed)
    above. Rows that lie on disk search among at most 50 000 random others.

    Parameters
    ----------
    rows : Rows or Tensor of shape (n, d)
        Euclidean distances are taken in this space.
    n_neighbors : int
        Neighbours per row, at most n - 1.
    random_state : int, default=0
        Seed of the approximate search.

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
        reference = np.random.default_rng(random_state).choice(n, _REFERENCE_LIMIT, replace=False)
        reference.sort()
    points = np.ascontiguousarray(rows[reference], dtype=np.float32)
    search = _index(points, n_neighbors + 1, random_state)
    found = np.empty((n, n_neighbors), dtype=np.int32)
    for start in range(0, n, 16_384):
        stop = min(start + 16_384, n)
        block = None if len(reference) == n else np.asarray(rows[start:stop])
        candidates = reference[search(slice(start, stop), block)]
        # A row is its own nearest neighbour, but not always first among equals, nor always found.
        itself = candidates == np.arange(start, stop)[:, None]
        itself[~itself.any(axis=1), -1] = True
        found[start:stop] = candidates[~itself].reshape(-1, n_neighbors)
    return torch.from_numpy(found)


def _index(points, k, random_state):
    """Make the search: points of a slice, or a block (m, d) of others -> indices (m, k)."""
    if len(points) > _EXACT_LIMIT:
        try:
            from pynndescent import NNDescent
        except ImportError:
            pass
        else:
            index = NNDescent(points, n_neighbors=max(k, 15), random_state=random_state, n_jobs=-1)
            graph = index.neighbor_graph[0]
            return lambda part, block: (
                graph[part, :k] if block is None else index.query(block, k=k)[0]
            )
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k).fit(points)
    return lambda part, block: index.kneighbors(
        points[part] if block is None else block, return_distance=False
    )


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
        partner = rows.index_select(0, chosen.long())
    else:
        partner = rows[chosen.cpu().numpy()].to(x.device)
    return torch.lerp(partner, x, torch.rand(len(x), 1, device=x.device))
