"""From raw counts of single cells to the values that the other estimators expect."""

from functools import partial
from numbers import Integral, Real

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_array, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from diffaugkit.arrays import to_numpy, warn
from diffaugkit.data import check_X, keep_names_of_rows, sample_range, unchanged_on_failure
from diffaugkit.rows import MappedRows

__all__ = ["CellPreprocessor"]

DEFAULT_NORMALIZATION = "both"
DEFAULT_N_TOP_GENES = 2000
_FLAVORS = {"log1p": "seurat", "pearson_residuals": "pearson_residuals"}
_LARGEST_DENSE = 2**30  # bytes of a dense result that sparse input is turned into at once
_BLOCK_VALUES = 2**17  # values that are brought back to counts at once, in double precision
_N_BINS = 20  # of mean expression, as in Seurat and scanpy


# --------------------------------------------------------------------------------------------------
# Block by block: pure functions of float32 (B, d) ndarray or CSR blocks
# --------------------------------------------------------------------------------------------------


def _normalised(block, target_sum):
    """Scale the counts of each cell to ``target_sum``: float64, of the same kind as the block."""
    block = block.astype(np.float64)
    totals = np.asarray(block.sum(axis=1)).ravel()
    # A cell without counts stays zero.
    factors = np.divide(target_sum, totals, out=np.ones_like(totals), where=totals > 0)
    if sp.issparse(block):
        return _with_data(block, block.data * np.repeat(factors, np.diff(block.indptr)))
    return block * factors[:, None]


def _log_normalised(block, target_sum, genes=slice(None)):
    """log(1 + normalised counts) of some genes; totals are over all."""
    block = _normalised(block, target_sum)[:, genes]
    return _with_data(block, np.log1p(block.data)) if sp.issparse(block) else np.log1p(block)


def _log_block(block, *, target_sum, genes, mean, scale, max_value):
    """Run the log1p pipeline: float32 ndarray, or CSR where CSR comes in and nothing is scaled."""
    block = _log_normalised(block, target_sum, genes)
    if scale is not None:
        block = ((block.toarray() if sp.issparse(block) else block) - mean) / scale
        if max_value is not None:
            block = np.clip(block, -max_value, max_value)
    return block.astype(np.float32)


def _residuals(block, *, fractions, theta, clip, genes=None):
    """Analytic Pearson residuals, float64 (B, k): (x - mu) / sqrt(mu + mu^2 / theta), clipped.

    ``mu`` is the cell's total over the same genes times their share of all training counts. A gene
    or a cell without counts says nothing: its residual is 0.
    """
    block = block if genes is None else block[:, genes]
    counts = (block.toarray() if sp.issparse(block) else block).astype(np.float64)
    mu = counts.sum(axis=1, keepdims=True) * fractions
    counts -= mu
    # In place from here on: this is the one step whose cost is every cell times every gene.
    spread = mu / theta
    spread += 1.0
    spread *= mu
    np.sqrt(spread, out=spread)
    residuals = np.divide(counts, spread, out=np.zeros_like(mu), where=spread > 0)
    return np.clip(residuals, -clip, clip, out=residuals)


def _residual_block(block, **parameters):
    return _residuals(block, **parameters).astype(np.float32)


def _both_blocks(block, *, log, residual, mean, factor):
    """Log values beside residuals that are centred and brought to the same total variance."""
    residuals = (_residuals(block, **residual) - mean) * factor
    return np.hstack([_log_block(block, **log), residuals.astype(np.float32)])


def _with_data(csr, data):
    return sp.csr_array((data, csr.indices, csr.indptr), shape=csr.shape)


# --------------------------------------------------------------------------------------------------
# Statistics over all rows, one block at a time
# --------------------------------------------------------------------------------------------------


def _moments(rows, *functions):
    """Mean and variance (over n - 1) per column of each function of the rows, in one pass.

    Means and sums of squares of blocks are merged by the pairwise update of Chan, Golub and
    LeVeque (1979), which keeps digits that a difference of sums would lose.
    """
    merged = [None] * len(functions)
    n = 0
    for _, block in rows.blocks():
        m = block.shape[0]
        for i, function in enumerate(functions):
            mean, squares = _block_moments(function(block))
            if n:
                delta = mean - merged[i][0]
                mean = merged[i][0] + delta * (m / (n + m))
                squares = merged[i][1] + squares + delta**2 * (n * m / (n + m))
            merged[i] = mean, squares
        n += m
    return [(mean, squares / max(n - 1, 1)) for mean, squares in merged]


def _block_moments(block):
    """Mean and sum of squared deviations per column."""
    if not sp.issparse(block):
        mean = block.mean(axis=0)
        return mean, ((block - mean) ** 2).sum(axis=0)
    n, d = block.shape
    mean = np.bincount(block.indices, weights=block.data, minlength=d) / n
    stored = np.bincount(block.indices, minlength=d)
    squares = np.bincount(
        block.indices, weights=(block.data - mean[block.indices]) ** 2, minlength=d
    )
    return mean, squares + (n - stored) * mean**2


def _totals(rows):
    """Total counts per cell (n,) and per gene (d,), float64."""
    cells, genes = np.empty(len(rows)), np.zeros(rows.shape[1])
    for part, block in rows.blocks():
        block = block.astype(np.float64)
        cells[part] = np.asarray(block.sum(axis=1)).ravel()
        genes += np.asarray(block.sum(axis=0)).ravel()
    return cells, genes


def _seurat_dispersions(mean, variance):
    """Dispersion of each gene, standardised among genes of similar mean (Satija et al. 2015).

    ``mean`` and ``variance`` are those of the normalised counts, not of their logarithm. NaN marks
    genes without any variance. A bin of a single gene gives it 1, as in Seurat and scanpy.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = variance / mean
    with np.errstate(divide="ignore"):
        dispersion = np.where(dispersion == 0, np.nan, np.log(dispersion))
    mean = np.log1p(mean)
    low, high = mean.min(), mean.max()
    if low == high:
        bins = np.zeros(len(mean), dtype=int)
    else:
        edges = np.linspace(low, high, _N_BINS + 1)
        edges[0] -= (high - low) * 1e-3
        bins = np.searchsorted(edges, mean, side="left") - 1
    standardised = np.full(len(mean), np.nan)
    for b in np.unique(bins):
        members = np.flatnonzero((bins == b) & ~np.isnan(dispersion))
        values = dispersion[members]
        if len(values) == 1:
            standardised[members] = 1.0
        elif len(values):
            spread = values.std(ddof=1)
            # Equal up to rounding: none stands out.
            if spread > 1e-12 * abs(values.mean()):
                standardised[members] = (values - values.mean()) / spread
    return standardised


def _top_genes(scores, n_top_genes, *, ties):
    """Sorted positions of the best genes; ``ties`` takes all that equal the last one."""
    known = np.flatnonzero(~np.isnan(scores))
    if not len(known):
        return np.arange(len(scores))  # nothing varies: nothing to choose by
    n_top_genes = min(n_top_genes, len(known))
    if ties:
        last = np.sort(scores[known])[-n_top_genes]
        # Up to rounding, which differs between dense and sparse input.
        return known[scores[known] >= last - 1e-9 * abs(last)]
    return np.sort(known[np.argsort(-scores[known], kind="stable")[:n_top_genes]])


# --------------------------------------------------------------------------------------------------
# The estimator
# --------------------------------------------------------------------------------------------------


class CellPreprocessor(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Raw counts of single cells to normalised, highly variable, scaled genes.

    Two standard matrices, equal to scanpy's own functions, and their union:

    - ``"log1p"``: counts of each cell scaled to ``target_sum``, log(1 + x), the most variable genes
      by Seurat's dispersion [1]_, each gene to mean 0 and variance 1, clipped to ``max_value``
      (``normalize_total``, ``log1p``, ``highly_variable_genes``, ``scale``);
    - ``"pearson_residuals"``: the genes whose analytic Pearson residuals [2]_ vary most, and these
      residuals, computed on the chosen genes
      (``scanpy.experimental.pp.recipe_pearson_residuals`` up to its PCA);
    - ``"both"``, the default: the first beside the second, each with its own genes. Residuals are
      clipped as the log values are, centred, and multiplied by one number so that both blocks have
      the same total variance. Which matrix separates cell types better differs from data set to
      data set and cannot be known without labels; on five labelled sets the union came close
      to the better one of each.

    All statistics are learned by ``fit``, from the training cells alone, in passes over blocks of
    cells: the input is never copied or made dense as a whole. A transformed cell depends on no
    other cell.

    Parameters
    ----------
    normalization : {"both", "log1p", "pearson_residuals"}, default="both"
        Which matrix.
    target_sum : float > 0 or None, default=10_000
        Total counts of a cell after normalisation (log values only); None takes the median total of
        the training cells that have counts. The fixed default makes values comparable between data
        sets.
    n_top_genes : int >= 1 or None, default=2000
        Number of highly variable genes, of each block for "both"; None keeps all genes. With flavor
        "seurat" genes without variance are never chosen (unless no gene has any: then all are), and
        genes that tie with the last one are all kept.
    flavor : {"seurat", "pearson_residuals"} or None, default=None
        How variable genes are found; None takes the one that belongs to the matrix, or to each
        block of "both".
    scale : bool, default=True
        Whether "log1p" values are brought to mean 0 and variance 1 per gene. Without it sparse
        input gives sparse output. Pearson residuals are on one scale by construction; "both" always
        scales.
    max_value : float > 0 or None, default=10.0
        Scaled values are clipped to [-max_value, max_value], so that single cells with a rare gene
        do not rule; None does not clip.
    theta : float > 0, default=100
        Overdispersion of the negative binomial behind Pearson residuals: variance
        ``mu + mu^2 / theta``. 100 fits technical noise of UMI counts [2]_.
    clip : float >= 0 or None, default=None
        Residuals are clipped to [-clip, clip]; None takes the square root of the number of training
        cells, as in [2]_, but ``max_value``, where that is given, for "both".
    layer : str or None, default=None
        Layer of an AnnData that holds the counts; None reads ``.X``.

    Attributes
    ----------
    genes_ : ndarray of shape (n_genes,), int64
        Positions of the chosen genes, rising; for "both" those of the log block.
    gene_scores_ : ndarray of shape (n_features,) or None
        What they were chosen by: standardised dispersion (NaN: no variance) or variance of the
        residuals; None if all genes are kept.
    residual_genes_, residual_gene_scores_ : ndarray or None
        The same for the residual block of "both".
    target_sum_ : float or None
        The total that cells are scaled to (log values).
    mean_, scale_ : ndarray of shape (n_genes,) or None
        Mean and standard deviation (over n - 1; 1 for constant genes) of the log values.
    gene_fractions_ : ndarray of shape (n_residual_genes,) or None
        Share of each gene of the residuals in the counts of all these genes.
    clip_ : float or None
        The bound on residuals.
    median_total_counts_ : float or None
        Median total over the genes of the residuals of the training cells.
    residual_mean_ : ndarray of shape (n_residual_genes,) or None
        What the residual block of "both" is centred by.
    residual_factor_ : float or None
        What it is then multiplied by.
    n_features_in_ : int
        Number of genes seen in ``fit``.
    feature_names_in_ : ndarray of shape (n_features,)
        Their names, where X had names.

    See Also
    --------
    sklearn.decomposition.PCA : Often the next step.

    Notes
    -----
    Values that are not whole numbers give a warning: every step assumes raw counts. Cells without
    counts become log1p zeros (before scaling) or residuals of 0; genes without counts become 0.

    In-memory input gives an ndarray (CSR for sparse input without scaling), float32. An AnnData
    backed by a file, and sparse input whose dense result would exceed 1 GB, give
    :class:`~diffaugkit.rows.MappedRows`, computed as they are read: every estimator of this package
    takes them, ``np.asarray`` makes them an array.

    References
    ----------
    .. [1] R. Satija et al., "Spatial reconstruction of single-cell gene expression data",
       Nature Biotechnology 33, 495-502, 2015.
    .. [2] J. Lause, P. Berens and D. Kobak, "Analytic Pearson residuals for normalization of
       single-cell RNA-seq UMI data", Genome Biology 22, 258, 2021, equations 3 to 5.

    Examples
    --------
    >>> import numpy as np
    >>> from diffaugkit.preprocessing import CellPreprocessor
    >>> counts = np.random.default_rng(0).poisson(2.0, size=(50, 30))
    >>> CellPreprocessor(n_top_genes=10).fit_transform(counts).shape
    (50, 20)
    >>> CellPreprocessor("log1p", n_top_genes=10).fit_transform(counts).shape
    (50, 10)
    """

    # Not by way of base.py, which needs torch: plain preprocessing must not import that.
    _parameter_constraints: dict = {  # noqa: RUF012 - scikit-learn's form
        "normalization": [StrOptions({*_FLAVORS, "both"})],
        "target_sum": [Interval(Real, 0, None, closed="neither"), None],
        "n_top_genes": [Interval(Integral, 1, None, closed="left"), None],
        "flavor": [StrOptions(set(_FLAVORS.values())), None],
        "scale": ["boolean"],
        "max_value": [Interval(Real, 0, None, closed="neither"), None],
        "theta": [Interval(Real, 0, None, closed="neither")],
        "clip": [Interval(Real, 0, None, closed="left"), None],
        "layer": [str, None],
    }

    def __init__(
        self,
        normalization=DEFAULT_NORMALIZATION,
        *,
        target_sum=10_000,
        n_top_genes=DEFAULT_N_TOP_GENES,
        flavor=None,
        scale=True,
        max_value=10.0,
        theta=100,
        clip=None,
        layer=None,
    ):
        self.normalization = normalization
        self.target_sum = target_sum
        self.n_top_genes = n_top_genes
        self.flavor = flavor
        self.scale = scale
        self.max_value = max_value
        self.theta = theta
        self.clip = clip
        self.layer = layer

    def fit(self, X, y=None):
        """Learn genes and their statistics from training cells.

        Parameters
        ----------
        X : array-like, tensor, DataFrame, sparse matrix, AnnData or Rows of shape (n_cells, d)
            Raw counts, n_cells >= 2.
        y : None
            Ignored.

        Returns
        -------
        self : CellPreprocessor
            The fitted estimator.

        Raises
        ------
        ValueError
            For a parameter out of range; for NaN, infinite or negative values, too few cells,
            repeated gene names or columns that hold no numbers.
        """
        self._validate_params()
        with unchanged_on_failure(self):
            self._learn(self._rows(X, reset=True, ensure_min_samples=2))
        return self

    def _learn(self, rows):
        """Choose genes and compute all statistics."""
        both = self.normalization == "both"
        matrices = tuple(_FLAVORS) if both else (self.normalization,)
        has_log, has_residuals = (matrix in matrices for matrix in _FLAVORS)
        scaled = both or (has_log and self.scale)
        select = self.n_top_genes is not None
        flavors = {matrix: self.flavor or _FLAVORS[matrix] for matrix in matrices}
        wanted = set(flavors.values()) if select else set()
        clip = self.max_value if self.clip is None and both else self.clip
        clip = float(np.sqrt(len(rows)) if clip is None else clip)
        target_sum = self.target_sum

        if target_sum is None or has_residuals or "pearson_residuals" in wanted:
            cells, gene_totals = _totals(rows)
        if target_sum is None:
            # Cells without counts have no say, as in scanpy; without any count all is zero anyway.
            target_sum = float(np.median(cells[cells > 0])) if cells.any() else 1.0

        functions = {}
        if "seurat" in wanted:
            functions["seurat"] = partial(_normalised, target_sum=target_sum)
        if "pearson_residuals" in wanted:
            fractions = gene_totals / (gene_totals.sum() or 1.0)
            functions["pearson_residuals"] = partial(
                _residuals, fractions=fractions, theta=self.theta, clip=clip
            )
        if scaled:
            functions["log"] = partial(_log_normalised, target_sum=target_sum)
        moments = {}
        if functions:  # one reading serves all
            moments = dict(zip(functions, _moments(rows, *functions.values()), strict=True))
        scores = {}
        if "seurat" in wanted:
            scores["seurat"] = _seurat_dispersions(*moments["seurat"])
        if "pearson_residuals" in wanted:
            # Over n, as in scanpy.
            over_n = (len(rows) - 1) / len(rows)
            scores["pearson_residuals"] = moments["pearson_residuals"][1] * over_n

        def choose(matrix):
            flavor = flavors[matrix]
            if not select:
                return np.arange(rows.shape[1]), None
            genes = _top_genes(scores[flavor], self.n_top_genes, ties=flavor == "seurat")
            return genes, scores[flavor]

        (genes, gene_scores), *second = [choose(matrix) for matrix in matrices]
        residual_genes, residual_scores = second[0] if both else (None, None)

        mean = scale = shares = median = None
        if scaled:
            mean, variance = moments["log"]
            # Below this share of the mean a deviation is the rounding of float32 counts.
            constant = variance <= (1e-7 * mean) ** 2
            mean, scale = mean[genes], np.where(constant, 1.0, np.sqrt(variance))[genes]
        if has_residuals:
            used = residual_genes if both else genes
            shares = gene_totals[used] / (gene_totals[used].sum() or 1.0)
            if len(used) < rows.shape[1]:
                cells = np.concatenate(
                    [np.asarray(block[:, used].sum(axis=1)).ravel() for _, block in rows.blocks()]
                )
            median = float(np.median(cells))

        residual_mean = factor = None
        if both:
            log = {"target_sum": target_sum, "genes": genes, "mean": mean, "scale": scale}
            moments = _moments(
                rows,
                # In double precision: the sum must not depend on the order of the input's bytes.
                lambda x: _log_block(x, **log, max_value=self.max_value).astype(np.float64),
                partial(
                    _residuals, fractions=shares, theta=self.theta, clip=clip, genes=residual_genes
                ),
            )
            (_, log_variance), (residual_mean, variance) = moments
            log_total, total = log_variance.sum(), variance.sum()
            factor = float(np.sqrt(log_total / total)) if log_total and total else 1.0

        self.genes_, self.gene_scores_ = genes, gene_scores
        self.residual_genes_, self.residual_gene_scores_ = residual_genes, residual_scores
        self.target_sum_ = float(target_sum) if has_log else None
        self.mean_, self.scale_ = mean, scale
        self.gene_fractions_ = shares
        self.clip_ = clip if has_residuals else None
        self.median_total_counts_ = median
        self.residual_mean_, self.residual_factor_ = residual_mean, factor

    @keep_names_of_rows
    def transform(self, X):
        """Normalise cells by what was learned.

        Parameters
        ----------
        X : array-like, tensor, DataFrame, sparse matrix, AnnData or Rows of shape (n_cells, d)
            Raw counts. Genes of an AnnData are matched by name, surplus ones ignored.

        Returns
        -------
        ndarray or csr_matrix of shape (n_cells, n_genes), float32, or MappedRows
            CSR for sparse "log1p" input with ``scale=False``; MappedRows for input on disk, and for
            sparse input whose dense result would exceed 1 GB. For "both" the log block comes first,
            and the width is ``len(genes_) + len(residual_genes_)``.

        Raises
        ------
        ValueError
            As in ``fit``, and for a wrong width or missing genes.
        NotFittedError
            Before ``fit``.
        """
        check_is_fitted(self)
        rows = self._rows(X, reset=False)
        # Bound to the arrays, not to self: lazy rows must not change when self is fitted again.
        both = self.residual_genes_ is not None
        log = {
            "target_sum": self.target_sum_,
            "genes": self.genes_,
            "mean": self.mean_,
            "scale": self.scale_,
            "max_value": self.max_value,
        }
        residual = {
            "fractions": self.gene_fractions_,
            "theta": self.theta,
            "clip": self.clip_,
            "genes": self.residual_genes_ if both else self.genes_,
        }
        if both:
            function = partial(
                _both_blocks,
                log=log,
                residual=residual,
                mean=self.residual_mean_,
                factor=self.residual_factor_,
            )
        elif self.target_sum_ is not None:
            function = partial(_log_block, **log)
        else:
            function = partial(_residual_block, **residual)
        n_out = len(self.genes_) + (len(self.residual_genes_) if both else 0)
        # Without names: what comes of input in memory has none either.
        mapped = MappedRows(rows, function, n_out, native=True)
        if not rows.in_memory:
            return mapped
        if sp.issparse(mapped.block(slice(0, 1))):
            blocks = [block for _, block in mapped.blocks()]
            return sp.csr_matrix(sp.vstack(blocks, format="csr"))
        if not rows.resident and 4 * len(rows) * n_out > _LARGEST_DENSE:
            return mapped
        return np.asarray(mapped)

    def inverse_transform(self, X, total_counts=None):
        """Bring values back to counts of the chosen genes.

        "log1p": ``expm1(X * scale_ + mean_)``, the counts of a cell normalised to ``target_sum_``,
        times ``total_counts / target_sum_`` where totals are given. "both": the same, from the log
        block alone; the residual block is not looked at. "pearson_residuals":
        ``mu + X * sqrt(mu + mu^2 / theta)`` with ``mu = total_counts * gene_fractions_``. Negative
        results become 0. What clipping cut is lost, and genes that were not chosen stay out.
        Generated or averaged cells lack the zeros of counts, and ``expm1`` of a mean is less than
        the mean of ``expm1``; a cell whose chosen genes come to more than its total is brought down
        to it. Compare such cells with real ones in the space of ``transform``.

        Parameters
        ----------
        X : array-like, tensor, sparse matrix or Rows of the width that ``transform`` gives
            Values in the space of ``transform``, for example generated cells.
        total_counts : float, array-like of shape (n_cells,) or None, default=None
            Total counts of each cell: over all input genes for "log1p" and "both", over the chosen
            genes for "pearson_residuals". None gives counts normalised to ``target_sum_``, and for
            residuals cells of the median total of the training cells.

        Returns
        -------
        ndarray or csr_matrix of shape (n_cells, n_genes), float32
            Non-negative, not rounded; a column for each gene of ``genes_``, named by
            ``get_feature_names_out()[:len(genes_)]``. Unscaled sparse input stays sparse.

        Raises
        ------
        ValueError
            For a wrong width, NaN or infinity, or ``total_counts`` that are negative or of another
            length.
        NotFittedError
            Before ``fit``.
        """
        check_is_fitted(self)
        X = check_array(
            to_numpy(X), accept_sparse="csr", dtype=[np.float64, np.float32], input_name="X"
        )
        n_residual = 0 if self.residual_genes_ is None else len(self.residual_genes_)
        if X.shape[1] != len(self.genes_) + n_residual:
            raise ValueError(
                f"X has {X.shape[1]} features, but transform of this {type(self).__name__} gives "
                f"{len(self.genes_) + n_residual}: pass what it returned, or cells of its form."
            )
        X = X[:, : len(self.genes_)]
        if total_counts is not None:
            # The sum of a sparse matrix over its genes is a matrix of one column.
            total_counts = np.asarray(to_numpy(total_counts))
            if not total_counts.ndim:
                total_counts = np.full(X.shape[0], total_counts)
            total_counts = check_array(
                total_counts,
                ensure_2d=False,
                ensure_non_negative=True,
                dtype=np.float64,
                input_name="total_counts",
            ).ravel()
            check_consistent_length(X, total_counts)
        if sp.issparse(X) and self.target_sum_ is not None and self.scale_ is None:
            data = np.maximum(np.expm1(X.data.astype(np.float64)), 0.0)
            sums = np.asarray(_with_data(X, data).sum(axis=1)).ravel()
            data *= np.repeat(self._factors(sums, total_counts), np.diff(X.indptr))
            return sp.csr_matrix(_with_data(X, data).astype(np.float32))
        counts = np.empty(X.shape, dtype=np.float32)
        for cells in gen_batches(len(counts), max(64, _BLOCK_VALUES // X.shape[1])):
            block = X[cells].toarray() if sp.issparse(X) else X[cells]
            totals = None if total_counts is None else total_counts[cells]
            counts[cells] = self._counts(block.astype(np.float64), totals)
        return counts

    def _counts(self, X, total_counts):
        """Bring values (B, n_genes), float64, back to counts."""
        if self.target_sum_ is None:
            totals = self.median_total_counts_ if total_counts is None else total_counts
            mu = np.reshape(totals, (-1, 1)) * self.gene_fractions_
            return np.maximum(mu + X * np.sqrt(mu + mu**2 / self.theta), 0.0)
        if self.scale_ is not None:
            X = X * self.scale_ + self.mean_
        counts = np.maximum(np.expm1(X), 0.0)
        return counts * self._factors(counts.sum(axis=1), total_counts)[:, None]

    def _factors(self, sums, total_counts):
        """Find what brings normalised cells, of these sums over chosen genes, to their totals."""
        factors = 1.0 if total_counts is None else total_counts / self.target_sum_
        # No part of a cell exceeds its whole, however large the log of one generated gene.
        return factors / np.maximum(sums / self.target_sum_, 1.0)

    def save(self, path):
        """Save to a folder of safetensors and JSON, which ``diffaugkit.load(path)`` reads.

        Parameters
        ----------
        path : str or path-like
            Folder to write; see :func:`diffaugkit.save`.
        """
        from diffaugkit.persistence import save

        save(self, path)

    def get_feature_names_out(self, input_features=None):
        """Names of the chosen genes, those of a residual block as ``<gene>_residual``.

        Parameters
        ----------
        input_features : array-like of str of shape (n_features,) or None, default=None
            Names of the input genes; None takes ``feature_names_in_``, or x0, x1, ...

        Returns
        -------
        ndarray of str, one for each column of ``transform``
            The names in the order of the output's columns.
        """
        check_is_fitted(self)
        # The mixin checks names and supplies missing ones; only the chosen genes leave.
        names = super().get_feature_names_out(input_features)
        if self.residual_genes_ is None:
            return names[self.genes_]
        residuals = [f"{name}_residual" for name in names[self.residual_genes_]]
        return np.concatenate([names[self.genes_], np.array(residuals, dtype=object)])

    def _rows(self, X, *, reset, **limits):
        rows = check_X(self, X, reset=reset, layer=self.layer, ensure_non_negative=True, **limits)
        if sample_range(rows)[2] < 1:
            warn(
                f"{type(self).__name__} expects raw counts, but X holds values that are not whole "
                "numbers. If X is normalised already, leave this step out; if the counts are in a "
                "layer of the AnnData, name it: layer='counts'."
            )
        return rows

    def __sklearn_tags__(self):
        """Declare sparse and non-negative input and float32 output."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
