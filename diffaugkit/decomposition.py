"""Principal components of rows of any size and kind, exact or by block Krylov iteration."""

import tempfile
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from sklearn.utils import check_random_state

from diffaugkit.rows import DenseRows, MappedRows, Rows, SparseRows, TemporaryRows

__all__ = ["PrincipalComponents", "principal_components"]

# Up to this size an exact eigendecomposition is cheaper than Krylov iteration.
_EXACT_PCA_LIMIT = 1000
# The same where every pass over the data reads a disk or computes the rows anew.
_ONE_PASS_PCA_LIMIT = 3000
# Components that are computed at least: 20 and then 50 of the same rows must not cost twice.
_LEADING_COMPONENTS = 50
# Values up to which dense data are centred once for all products, not again for each.
_CENTRED_VALUES = 2**27


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The linear map between features and principal components.

    Attributes
    ----------
    mean : ndarray of shape (d,), float64
        Mean of the features.
    components : ndarray of shape (k, d), float64
        Orthonormal axes by falling variance; the largest loading of each is positive.
    explained_std : ndarray of shape (k,), float64
        Standard deviation (over n - 1) of the scores on each axis.
    """

    mean: np.ndarray
    components: np.ndarray
    explained_std: np.ndarray

    @cached_property
    def _shift(self):
        """Scores of the mean: blocks are shifted by them, not centred."""
        return self.mean @ self.components.T

    def transform(self, X):
        """Scores of rows or of a tensor.

        Parameters
        ----------
        X : Rows or tensor of shape (n, d)
            Samples in the space of the features.

        Returns
        -------
        Rows or tensor of shape (n, k), float32
            Rows for Rows: one array for rows in memory, a temporary file for rows on disk.
            The scores of the Rows that these components were computed from are kept with them.
        """
        if not isinstance(X, Rows):
            X, mean, components = self._on_device_of(X)
            return ((X - mean) @ components.T).float()
        known = [pcs for pcs in X._memo.values() if isinstance(pcs, PrincipalComponents)]
        whole = next((pcs for pcs in known if self._begins(pcs)), None)
        if whole is None:
            return self._scores_of(X)
        if whole not in X._memo:
            X._memo[whole] = whole._scores_of(X)
        scores, k = X._memo[whole], len(self.components)
        if k == scores.shape[1]:
            return scores
        if scores.resident:
            return DenseRows(np.asarray(scores)[:, :k])
        return MappedRows(scores, partial(_first_columns, k=k), k, native=True)

    def inverse(self, Z):
        """Features of scores.

        Parameters
        ----------
        Z : tensor of shape (n, k)
            Scores.

        Returns
        -------
        tensor of shape (n, d), float32
            The point of the feature space on the span of the components.
        """
        Z, mean, components = self._on_device_of(Z)
        return (Z @ components + mean).float()

    def _on_device_of(self, tensor):
        """Give tensor, mean and components on its device, in double precision where it has one."""
        import torch

        dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
        mean, components = (
            torch.as_tensor(array, dtype=dtype, device=tensor.device)
            for array in (self.mean, self.components)
        )
        return tensor.detach().to(dtype), mean, components

    def _first(self, k):
        """Take the k leading components."""
        if k >= len(self.components):
            return self
        return PrincipalComponents(self.mean, self.components[:k], self.explained_std[:k])

    def _begins(self, other):
        """Whether these are the leading components of ``other``."""
        return np.array_equal(self.components, other.components[: len(self.components)]) and (
            np.array_equal(self.mean, other.mean)
        )

    def _scores_of(self, rows):
        shape = (len(rows), len(self.components))
        if rows.in_memory:
            out = np.empty(shape, dtype=np.float32)
            for part, block in rows.blocks():
                out[part] = self._scores(block)
            return DenseRows(out)
        with tempfile.NamedTemporaryFile(prefix="diffaugkit-", delete=False) as file:
            scores = TemporaryRows(file.name, shape)  # from here on the file cannot be left over
            for _, block in rows.blocks():
                file.write(self._scores(block).tobytes())
        return scores

    def _scores(self, block):
        # In double precision, so that a row's scores do not depend on the rows beside it.
        return (block.astype(np.float64) @ self.components.T - self._shift).astype(np.float32)


def _first_columns(block, k):
    return block[:, :k]


def principal_components(rows, n_components, *, random_state=0):
    """Principal components of rows, in memory that does not grow with their number.

    Exact (covariance, or Gram matrix where there are fewer rows than features) up to 1 000 rows or
    features, whichever is fewer, and up to 3 000 features of data on disk, which one pass reads;
    beyond that by randomised block Krylov iteration [1]_ in single precision, ended by a
    Rayleigh-Ritz step in double precision. The leading 20 scores of cells in memory then agree with
    the exact ones to 1e-4; data on disk are read at most 12 times, which leaves 1e-2 or so. At
    least 50 components are computed, once for the same Rows, and kept with them: asking for fewer
    gives the leading ones of these.

    Parameters
    ----------
    rows : Rows of shape (n, d)
        The data, n >= 2.
    n_components : int
        Number of components; clipped to ``min(n - 1, d)`` and to the numerical rank of the data
        (at least 1), so that no axis is noise to be blown up by whitening.
    random_state : int or RandomState, default=0
        Start of the randomised iteration; an int makes it reproducible.

    Returns
    -------
    PrincipalComponents
        Mean, axes and standard deviations, with ``transform`` and ``inverse``.

    References
    ----------
    .. [1] C. Musco and C. Musco, "Randomized block Krylov methods for stronger and faster
       approximate singular value decomposition", NeurIPS 2015, algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.rows import DenseRows
    >>> from diffaugkit.decomposition import principal_components
    >>> rows = DenseRows(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    >>> pcs = principal_components(rows, 1)
    >>> pcs.components.round(2).tolist(), pcs.explained_std.round(2).tolist()
    ([[0.6, 0.8]], [5.0])
    """
    n, d = rows.shape
    if n < 2:
        raise ValueError(f"Principal components need at least 2 rows, got {n}.")
    k = max(1, min(int(n_components), n - 1, d))
    one_pass = n > d and d <= (_EXACT_PCA_LIMIT if _cheap_to_read(rows) else _ONE_PASS_PCA_LIMIT)
    exact = one_pass or min(n, d) <= _EXACT_PCA_LIMIT
    memoise = exact or isinstance(random_state, int | np.integer)
    seed = None if exact else random_state
    if memoise:
        for key, known in rows._memo.items():
            if isinstance(known, PrincipalComponents) and key[1] == seed and key[2] >= k:
                return known._first(k)
    n_computed = min(max(k, _LEADING_COMPONENTS), n - 1, d)
    if one_pass:
        mean, variances, components = _covariance_components(rows, n_computed)
    else:
        mean = sum(block.astype(np.float64).sum(axis=0) for _, block in rows.blocks()) / n
        if exact:
            variances, components = _gram_components(rows, mean, n_computed)
        else:
            random_state = check_random_state(random_state)
            variances, components = _krylov_components(rows, mean, n_computed, random_state)
    # What is left of a constant after rounding is no variance.
    eps = np.finfo(float).eps
    variances = np.where(variances > n * (8 * eps * np.linalg.norm(mean)) ** 2, variances, 0.0)
    rank = max(1, int(np.sum(variances > variances[0] * max(n, d) * eps)))
    variances, components = variances[:rank], components[:rank]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.where(components[np.arange(rank), largest] < 0, -1.0, 1.0)[:, None]
    pcs = PrincipalComponents(mean, components, np.sqrt(variances / (n - 1)))
    if memoise:
        rows._memo["components", seed, n_computed] = pcs
    return pcs._first(k)


def _cheap_to_read(rows):
    """Whether another pass over the rows costs next to nothing."""
    return rows.resident or isinstance(rows, SparseRows)


def _centred(block, mean):
    return (block.toarray() if sp.issparse(block) else block).astype(np.float64) - mean


def _top_eigenpairs(matrix, k):
    """Find the k largest eigenvalues, falling, of a symmetric matrix (lower half), and vectors."""
    size = len(matrix)
    values, vectors = scipy.linalg.eigh(
        matrix, lower=True, subset_by_index=(size - k, size - 1), overwrite_a=True
    )
    return values[::-1], vectors[:, ::-1].T


def _covariance_components(rows, k):
    """From the (d, d) scatter matrix, summed over blocks, with the mean, in one pass."""
    n, d = rows.shape
    scatter, total, shift = np.zeros((d, d), order="F"), np.zeros(d), None
    for _, block in rows.blocks():
        if shift is None:
            # Near the mean, so that moving to the mean afterwards costs no digits.
            shift = np.asarray(block.astype(np.float64).mean(axis=0)).ravel()
        centred = _centred(block, shift)
        total += centred.sum(axis=0)
        scatter = scipy.linalg.blas.dsyrk(
            1.0, centred.T, beta=1.0, c=scatter, overwrite_c=True, lower=1
        )
    scatter -= np.outer(total, total / n)
    return shift + total / n, *_top_eigenpairs(scatter, k)


def _gram_components(rows, mean, k):
    """From the (n, n) inner products of the rows, for more features than rows."""
    n, d = rows.shape
    gram = np.zeros((n, n), order="F")
    for left, block in rows.blocks():
        centred = _centred(block, mean)
        for right in rows.slices():
            if right.start > left.start:
                break  # the other half is the same
            gram[left, right] = centred @ _centred(rows.block(right), mean).T
    values, vectors = _top_eigenpairs(gram, k)
    components = np.zeros((k, d))
    for part, block in rows.blocks():
        components += vectors[:, part] @ _centred(block, mean)
    # Axes without variance are cut by the caller; here they only must not divide by zero.
    lengths = np.linalg.norm(components, axis=1, keepdims=True)
    empty = lengths[:, 0] == 0
    components[empty, 0] = lengths[empty] = 1.0
    return values, components / lengths


def _krylov_components(rows, mean, k, random_state):
    """From products with thin matrices only: sparse blocks stay sparse, nothing is (d, d).

    Block Lanczos iteration with full reorthogonalisation. Narrow blocks reach a high degree of the
    polynomial, so the accuracy, with the fewest operations; where a pass over the data is dear,
    wide ones reach it in the fewest passes.
    """
    d = rows.shape[1]
    cheap = _cheap_to_read(rows)
    width, n_blocks = (16, 48) if cheap else (k + max(10, k // 2), 10)
    most = min(width * n_blocks, d)
    multiply = _scatter_product(rows, mean)
    # Single precision halves the time; what it costs in digits, the last step below gives back.
    basis, products = (np.empty((d, most), np.float32, order="F") for _ in range(2))
    Q, m = random_state.standard_normal((d, min(width, most))).astype(np.float32), 0
    for number in range(1, n_blocks + 1):
        # Twice is enough for full orthogonality, but where the data have no further directions:
        # then rounding is what is left, and shrinks again.
        for turn in range(5):
            Q, R = np.linalg.qr(Q - basis[:, :m] @ (basis[:, :m].T @ Q))
            if turn and np.abs(np.diag(R)).min() > 0.9:
                break
        new = slice(m, m + Q.shape[1])
        basis[:, new], products[:, new] = Q, multiply(Q)
        m = new.stop
        last = m == most or number == n_blocks
        if last or (m >= 2 * k and (number % 6 == 0 or not cheap)):
            small = basis[:, :m].T @ products[:, :m]
            values, vectors = _top_eigenpairs(small.astype(np.float64), min(k, m))
            vectors = vectors.T.astype(np.float32)
            axes = basis[:, :m] @ vectors
            misfits = np.linalg.norm(products[:, :m] @ vectors - axes * values, axis=0)
            if last or np.all(misfits <= np.maximum(1e-4 * values, 1e-6 * values[0])):
                break
        Q = products[:, new][:, : most - m]
    axes = np.linalg.qr(axes.astype(np.float64))[0]
    small, shift = np.zeros((axes.shape[1],) * 2), mean @ axes
    for _, block in rows.blocks():
        scores = block.astype(np.float64) @ axes - shift
        small += scores.T @ scores
    values, vectors = _top_eigenpairs(small, len(small))
    return values, vectors @ axes.T


def _scatter_product(rows, mean):
    """Make the function Q -> A Q of the scatter matrix A = (X - mean)^T (X - mean) / unit^2.

    The unit is the power of two next to the spread of the data: in units that are huge or tiny,
    squares would leave single precision.
    """
    spread = np.linalg.norm(_centred(rows.block(slice(64)), mean)) / np.sqrt(64 * rows.shape[1])
    unit = np.float32(2.0 ** np.clip(np.round(np.log2(spread)), -126, 126) if spread else 1.0)
    mean_32 = mean.astype(np.float32)
    centred = None
    if rows.resident and rows.shape[0] * rows.shape[1] <= _CENTRED_VALUES:
        centred = np.asarray(rows) - mean_32
        centred /= unit

    def multiply(Q):
        if centred is not None:
            return centred.T @ (centred @ Q)
        product, wide = np.zeros(Q.shape), Q.astype(np.float64)
        shift = mean @ wide
        for _, block in rows.blocks():
            if sp.issparse(block):
                block = block.astype(np.float64)
                scores = (block @ wide - shift) / float(unit) ** 2
                product += block.T @ scores - np.outer(mean, scores.sum(axis=0))
            else:
                block = (block - mean_32) / unit
                product += block.T @ (block @ Q)
        return product

    return multiply
