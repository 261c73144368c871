"""CellPreprocessor: equal to scanpy, pure, learned on training cells, never dense as a whole."""

import pickle
import tracemalloc
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import check_estimator, check_param_validation

from diffaugkit import SelfSupervisedEncoder, load, preprocessing
from diffaugkit.preprocessing import CellPreprocessor
from diffaugkit.rows import MappedRows

sc = pytest.importorskip("scanpy")

NORMALIZATIONS = ["both", "log1p", "pearson_residuals"]
EACH = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def _negative_binomial(n=180, d=90, seed=0):
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.6, 3.0, size=d) * rng.lognormal(0, 0.4, size=(n, 1))
    mean[: n // 2, : d // 5] *= 4
    counts = rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)
    counts[:, 7] = 0  # a gene that nobody has
    counts[5] = 0  # a cell without counts
    return counts


def _pbmc():
    """The counts behind scanpy's own cells: each cell's smallest log value is one molecule."""
    log = sc.datasets.pbmc68k_reduced().raw.X.tocsr()
    values = np.expm1(log.data.astype(np.float64))
    one = np.minimum.reduceat(values, log.indptr[:-1])
    counts = np.rint(values / np.repeat(one, np.diff(log.indptr)))
    return sp.csr_matrix((counts.astype(np.float32), log.indices, log.indptr), shape=log.shape)


@pytest.fixture(scope="module")
def counts():
    return _negative_binomial()


@pytest.fixture(scope="module")
def adata(counts):
    names = [f"gene{i}" for i in range(counts.shape[1])]
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names))


def _disk(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")


# --- equal to scanpy ------------------------------------------------------------------------------

DATA = pytest.mark.parametrize("source", [_negative_binomial, _pbmc], ids=["simulated", "pbmc68k"])


def _scanpy(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@DATA
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("target_sum", [1e4, None])
def test_log1p_equals_scanpy(source, sparse, target_sum):
    counts = sp.csr_matrix(source())
    X = counts if sparse else counts.toarray()
    # scanpy counts empty cells in the median of sparse input only: give it the dense one.
    peer = ad.AnnData(counts.toarray().astype(np.float64))
    _scanpy(sc.pp.normalize_total, peer, target_sum=target_sum)
    sc.pp.log1p(peer)
    model = CellPreprocessor("log1p", target_sum=target_sum, n_top_genes=None, scale=False)
    ours = model.fit_transform(X)
    assert sp.issparse(ours) == sparse
    dense = ours.toarray() if sparse else ours
    np.testing.assert_allclose(dense, peer.X, rtol=1e-5, atol=1e-5)

    _scanpy(sc.pp.highly_variable_genes, peer, n_top_genes=50)
    fitted = CellPreprocessor("log1p", target_sum=target_sum, n_top_genes=50).fit(X)
    np.testing.assert_array_equal(fitted.genes_, np.flatnonzero(peer.var["highly_variable"]))
    np.testing.assert_allclose(
        fitted.gene_scores_, peer.var["dispersions_norm"], rtol=1e-5, atol=1e-5
    )
    peer = peer[:, peer.var["highly_variable"]].copy()
    sc.pp.scale(peer, max_value=3.0)
    fitted.set_params(max_value=3.0)
    np.testing.assert_allclose(fitted.transform(X), peer.X, rtol=1e-5, atol=1e-5)


@DATA
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"theta": 10, "clip": 2.5}])
def test_pearson_residuals_equal_scanpy(source, sparse, options):
    counts = sp.csr_matrix(source())
    counts = counts[np.asarray(counts.sum(axis=1)).ravel() > 0]  # scanpy gives NaN to empty cells
    X = counts if sparse else counts.toarray()
    peer = ad.AnnData(counts.toarray().astype(np.float64))
    functions = sc.experimental.pp
    _scanpy(functions.highly_variable_genes, peer, n_top_genes=50, **options)
    fitted = CellPreprocessor("pearson_residuals", n_top_genes=50, **options).fit(X)
    np.testing.assert_array_equal(fitted.genes_, np.flatnonzero(peer.var["highly_variable"]))
    np.testing.assert_allclose(
        fitted.gene_scores_, peer.var["residual_variances"], rtol=1e-5, atol=1e-5
    )
    peer = peer[:, peer.var["highly_variable"]].copy()
    functions.normalize_pearson_residuals(peer, **options)
    np.testing.assert_allclose(fitted.transform(X), peer.X, rtol=1e-5, atol=1e-5)


def test_flavors_mix(counts):
    mixed = CellPreprocessor("log1p", n_top_genes=20, flavor="pearson_residuals").fit(counts)
    pure = CellPreprocessor("pearson_residuals", n_top_genes=20).fit(counts)
    np.testing.assert_array_equal(mixed.genes_, pure.genes_)
    assert mixed.mean_ is not None
    mixed = CellPreprocessor("pearson_residuals", n_top_genes=20, flavor="seurat").fit(counts)
    pure = CellPreprocessor("log1p", n_top_genes=20).fit(counts)
    np.testing.assert_array_equal(mixed.genes_, pure.genes_)
    assert mixed.gene_fractions_ is not None
    for flavor in ("seurat", "pearson_residuals"):
        union = CellPreprocessor(n_top_genes=20, flavor=flavor).fit(counts)
        np.testing.assert_array_equal(union.genes_, union.residual_genes_)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_top_genes", [None, 40])
@pytest.mark.parametrize("sparse", [False, True])
def test_both_is_one_beside_the_other(counts, n_top_genes, sparse):
    X = sp.csr_array(counts) if sparse else counts
    model = CellPreprocessor(n_top_genes=n_top_genes)
    assert model.normalization == "both"
    values = model.fit_transform(X)
    assert values.dtype == np.float32
    n_log = len(model.genes_)
    log, residuals = values[:, :n_log], values[:, n_log:]
    single = CellPreprocessor("log1p", n_top_genes=n_top_genes).fit(X)
    np.testing.assert_array_equal(log, single.transform(X))
    np.testing.assert_array_equal(model.gene_scores_, single.gene_scores_)
    single = CellPreprocessor("pearson_residuals", n_top_genes=n_top_genes, clip=10).fit(X)
    np.testing.assert_array_equal(model.residual_genes_, single.genes_)
    expected = single.transform(X) - single.transform(X).mean(axis=0)
    expected *= np.sqrt(log.var(axis=0).sum() / expected.var(axis=0).sum())
    np.testing.assert_allclose(residuals, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        (residuals**2).sum(axis=1).mean(), ((log - log.mean(axis=0)) ** 2).sum(axis=1).mean(), 1e-4
    )
    names = model.get_feature_names_out()
    assert list(names[:n_log]) == [f"x{i}" for i in model.genes_]
    assert list(names[n_log:]) == [f"x{i}_residual" for i in model.residual_genes_]


def test_bounds_of_both(counts):
    assert CellPreprocessor(max_value=2.0).fit(counts).clip_ == 2.0
    assert CellPreprocessor(max_value=2.0, clip=3.0).fit(counts).clip_ == 3.0
    assert CellPreprocessor(max_value=None).fit(counts).clip_ == pytest.approx(180**0.5)


# --- containers -----------------------------------------------------------------------------------


@EACH
def test_every_container_gives_the_same(normalization, counts, adata, tmp_path):
    model = CellPreprocessor(normalization, n_top_genes=30)
    truth = clone(model).fit_transform(counts)
    assert truth.dtype == np.float32
    assert truth.shape == (180, 60 if normalization == "both" else 30)
    assert np.isfinite(truth).all()
    layered = ad.AnnData(counts * 0, layers={"counts": counts}, var=adata.var)
    containers = [
        counts.astype(int),
        pd.DataFrame(counts, columns=adata.var_names),
        sp.csr_matrix(counts),
        sp.csc_array(counts),
        adata,
        _disk(adata, tmp_path),
    ]
    for X in containers:
        other = clone(model).fit_transform(X)
        assert isinstance(other, MappedRows) == (X is containers[-1])
        np.testing.assert_array_equal(np.asarray(other), truth)
    other = clone(model).set_params(layer="counts").fit_transform(layered)
    np.testing.assert_array_equal(other, truth)
    # One cell at a time, or all at once: no cell depends on another.
    fitted = clone(model).fit(adata)
    alone = np.vstack([fitted.transform(adata[i]) for i in range(6)])
    np.testing.assert_array_equal(alone, truth[:6])
    assert list(fitted.get_feature_names_out()[:30]) == [f"gene{i}" for i in fitted.genes_]


@EACH
def test_large_results_of_sparse_input_are_lazy(normalization, counts, adata, monkeypatch):
    model = CellPreprocessor(normalization, n_top_genes=30)
    truth = model.fit_transform(counts)
    monkeypatch.setattr("diffaugkit.preprocessing._LARGEST_DENSE", truth.nbytes)
    assert isinstance(model.transform(sp.csr_array(counts)), np.ndarray)
    monkeypatch.setattr("diffaugkit.preprocessing._LARGEST_DENSE", truth.nbytes - 1)
    assert isinstance(model.transform(counts), np.ndarray)  # larger than this itself
    for X in (sp.csr_array(counts), adata):
        lazy = model.transform(X)
        assert isinstance(lazy, MappedRows)
        assert lazy.in_memory
        np.testing.assert_array_equal(np.asarray(lazy), truth)
        pca = PCA(3, svd_solver="full").fit(truth)
        np.testing.assert_allclose(pca.transform(lazy), pca.transform(truth), atol=1e-4)
    if normalization == "log1p":
        model.set_params(scale=False).fit(counts)
        assert sp.issparse(model.transform(sp.csr_array(counts)))


def test_blocks_do_not_matter(counts, monkeypatch):
    for normalization in NORMALIZATIONS:
        model = CellPreprocessor(normalization, n_top_genes=30)
        whole = clone(model).fit(counts)
        monkeypatch.setattr("diffaugkit.rows._BLOCK_VALUES", 1)  # 64 cells a block
        pieces = clone(model).fit(counts)
        monkeypatch.undo()
        np.testing.assert_array_equal(whole.genes_, pieces.genes_)
        np.testing.assert_allclose(whole.transform(counts), pieces.transform(counts), atol=2e-6)


@EACH
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), extra=st.integers(0, 4))
def test_gene_order_does_not_matter(normalization, seed, extra):
    counts = _negative_binomial(40, 25)
    names = np.array([f"g{i}" for i in range(25)])
    train = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names))
    model = CellPreprocessor(normalization, n_top_genes=10).fit(train)
    more = np.hstack([counts, np.full((40, extra), 50, np.float32)])
    order = np.random.default_rng(seed).permutation(25 + extra)
    index = np.append(names, [f"surplus{i}" for i in range(extra)])[order]
    shuffled = ad.AnnData(sp.csr_matrix(more[:, order]), var=pd.DataFrame(index=index))
    np.testing.assert_array_equal(model.transform(shuffled), model.transform(train))
    # Fitting on another order of the same genes learns the same of each of them.
    within = order[order < 25]
    refit = CellPreprocessor(normalization, n_top_genes=10).fit(train[:, within])
    assert set(refit.get_feature_names_out()) == set(model.get_feature_names_out())


@EACH
def test_input_is_not_modified(normalization, counts, adata):
    csr = sp.csr_matrix(counts)
    frame = pd.DataFrame(counts)
    dense = counts.copy()
    dense.setflags(write=False)
    before = pickle.dumps((csr, frame, adata.X))
    for X in (csr, frame, adata, dense):
        model = CellPreprocessor(normalization, n_top_genes=30)
        model.inverse_transform(model.fit_transform(X))
    assert pickle.dumps((csr, frame, adata.X)) == before
    np.testing.assert_array_equal(dense, counts)


@EACH
def test_sparse_is_never_dense_as_a_whole(normalization, monkeypatch):
    n, d = (200_000, 2000) if normalization == "log1p" else (20_000, 2000)
    rng = np.random.default_rng(0)
    columns, values = rng.integers(0, d, size=n), rng.integers(1, 9, size=n)
    X = sp.csr_matrix((values, columns, np.arange(n + 1)), shape=(n, d), dtype=np.float32)
    dense = sp.csr_array.toarray

    def small_only(self, *args, **kwargs):
        assert self.shape[0] < 10_000
        return dense(self, *args, **kwargs)

    monkeypatch.setattr(sp.csr_array, "toarray", small_only)
    tracemalloc.start()
    model = CellPreprocessor(normalization, n_top_genes=100, scale=False).fit(X)
    model.transform(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # dense: 1.6 GB and 160 MB as float32, twice that in double precision


def test_lazy_rows_do_not_change_with_a_refit(adata, tmp_path):
    model = CellPreprocessor(n_top_genes=30).fit(adata)
    lazy = model.transform(_disk(adata, tmp_path))
    before = np.asarray(lazy)
    model.set_params(n_top_genes=10).fit(adata[:90])
    np.testing.assert_array_equal(np.asarray(lazy), before)


# --- learned on the training split only -----------------------------------------------------------


@EACH
def test_new_cells(normalization, counts):
    model = CellPreprocessor(normalization, n_top_genes=None, max_value=None, clip=1e6)
    model.fit(counts[:100])
    new = model.transform(counts[100:])
    if normalization != "pearson_residuals":
        total = counts[100:].sum(axis=1, keepdims=True)
        log = np.log1p(counts[100:] / total * 1e4)
        ours = new[:, :90] * model.scale_ + model.mean_
        np.testing.assert_allclose(ours, log, rtol=1e-4, atol=1e-4)
    if normalization != "log1p":
        fractions = counts[:100].sum(axis=0) / counts[:100].sum()
        mu = counts[100:].sum(axis=1, keepdims=True) * fractions
        with np.errstate(invalid="ignore"):
            residuals = np.nan_to_num((counts[100:] - mu) / np.sqrt(mu + mu**2 / 100))
        ours = new[:, -90:]
        if normalization == "both":
            ours = ours / model.residual_factor_ + model.residual_mean_
        np.testing.assert_allclose(ours, residuals, rtol=1e-4, atol=1e-4)


@EACH
def test_inverse(normalization, counts):
    model = CellPreprocessor(normalization, n_top_genes=40, max_value=None, clip=1e6).fit(counts)
    values = model.transform(counts)
    chosen = counts[:, model.genes_]
    if normalization != "pearson_residuals":
        totals = counts.sum(axis=1)
        normalised = np.divide(chosen * 1e4, totals[:, None], where=totals[:, None] > 0,
                               out=np.zeros_like(chosen))  # fmt: skip
        np.testing.assert_allclose(model.inverse_transform(values), normalised, rtol=1e-4, atol=0.1)
    else:
        totals = chosen.sum(axis=1)
        median = model.inverse_transform(np.zeros((1, 40)))
        assert median.sum() == pytest.approx(np.median(totals), rel=1e-5)
    back = model.inverse_transform(values, total_counts=totals)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, chosen, rtol=1e-3, atol=1e-2)
    width = values.shape[1]
    assert (model.inverse_transform(np.full((3, width), -50.0)) >= 0).all()
    with pytest.raises(ValueError, match=rf"X has {width - 1} features.*gives {width}:"):
        model.inverse_transform(values[:, 1:])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.inverse_transform(values, total_counts=totals[1:])


def test_inverse_of_sparse_stays_sparse(counts):
    model = CellPreprocessor("log1p", n_top_genes=40, scale=False).fit(sp.csr_matrix(counts))
    log = model.transform(sp.csr_matrix(counts))
    back = model.inverse_transform(log, total_counts=counts.sum(axis=1))
    assert sp.issparse(back)
    np.testing.assert_allclose(back.toarray(), counts[:, model.genes_], rtol=1e-4, atol=1e-4)


# --- errors and degenerate data -------------------------------------------------------------------


def test_clear_errors(counts, adata):
    model = CellPreprocessor(n_top_genes=30)
    for bad, match in [
        (counts - 1, "Negative values in data"),
        (sp.csr_array(counts - 1), "Negative values in data"),
        (np.where(counts == 3, np.nan, counts), "contains NaN"),
        (np.where(counts == 3, np.inf, counts), "contains infinity"),
        (counts[:0], "0 sample"),
        (counts[:1], "1 sample"),
        (pd.DataFrame(counts).assign(cell="B").rename(columns=str), "hold no numbers: cell"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.fit(bad)
    assert not hasattr(model, "genes_")
    model.fit(adata)
    with pytest.raises(ValueError, match=r"lacks 1 of the 90 genes .*: gene0"):
        model.transform(adata[:, 1:])
    with (
        pytest.warns(UserWarning, match="valid feature names"),
        pytest.raises(ValueError, match="X has 89 features, but CellPreprocessor is expecting 90"),
    ):
        model.transform(counts[:, 1:])


def test_failed_fit_keeps_the_old_state(counts):
    model = CellPreprocessor(n_top_genes=30).fit(counts)
    before = model.transform(counts)
    with pytest.raises(ValueError, match="Negative"):
        model.fit(counts[:, :20] - 1)
    np.testing.assert_array_equal(model.transform(counts), before)


def test_interrupted_fit_keeps_the_old_state(counts, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, new = CellPreprocessor(n_top_genes=30).fit(counts), CellPreprocessor()
    before = model.transform(counts)
    monkeypatch.setattr(preprocessing, "_moments", interrupt)
    for each in (model, new):
        with pytest.raises(KeyboardInterrupt):
            each.fit(counts[:, :20])
    np.testing.assert_array_equal(model.transform(counts), before)
    with pytest.raises(NotFittedError):
        new.transform(counts)


def test_genes_that_tie_up_to_rounding_are_all_kept():
    scores = np.array([0.5, np.nan, 2.0, np.sqrt(0.5), np.sqrt(0.5) - 1e-15])
    np.testing.assert_array_equal(preprocessing._top_genes(scores, 2, ties=True), [2, 3, 4])
    rng = np.random.default_rng(0)
    rng.normal(size=(90, 8))
    few = rng.negative_binomial(1, 0.2, size=(90, 20)).astype(float)  # bins of one and two genes
    dense, sparse = (CellPreprocessor(n_top_genes=8).fit(X) for X in (few, sp.csr_matrix(few)))
    np.testing.assert_array_equal(dense.genes_, sparse.genes_)


def test_normalised_input_warns(counts):
    log = np.log1p(counts)
    with pytest.warns(UserWarning, match="expects raw counts") as seen:
        CellPreprocessor().fit(log)
    fitted = CellPreprocessor().fit(counts)
    with pytest.warns(UserWarning, match="layer='counts'") as later:
        fitted.transform(log)
    assert [warning.filename for warning in (*seen, *later)] == [__file__] * 2


@EACH
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"n_top_genes": None}])
def test_nothing_gives_nan(normalization, options, counts):
    cases = [np.zeros((5, 4)), np.ones((5, 4)), np.eye(5), np.zeros((5, 1)), counts[:2], counts]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for target_sum in (1e4, None):
            for X in cases:
                for make in (np.asarray, sp.csr_array):
                    model = CellPreprocessor(normalization, target_sum=target_sum, **options)
                    Z = model.fit_transform(make(X))
                    Z = Z.toarray() if sp.issparse(Z) else Z
                    assert np.isfinite(Z).all()
                    assert Z.shape == (len(X), len(model.get_feature_names_out()))
                    assert np.isfinite(model.inverse_transform(Z)).all()
                    assert np.isfinite(np.asarray(model.transform(X + 1))).all()


# --- scikit-learn ---------------------------------------------------------------------------------


@pytest.fixture
def scikit_learn_draws():
    """Its checks draw from NumPy's global stream, which no call of ours may move."""
    state = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


@pytest.mark.usefixtures("scikit_learn_draws")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "pearson_residuals"},
        {"normalization": "log1p"},
        {"normalization": "log1p", "n_top_genes": None, "scale": False},
        {"target_sum": None, "n_top_genes": 2, "flavor": "pearson_residuals"},
    ],
)
def test_check_estimator(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the checks' data are no counts
        results = check_estimator(CellPreprocessor(**options), on_skip=None)
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= {
        "check_array_api_input"  # runs only under SCIPY_ARRAY_API=1
    }


def test_param_validation():
    check_param_validation("CellPreprocessor", CellPreprocessor())


def test_a_cell_never_exceeds_its_total(counts):
    model = CellPreprocessor(n_top_genes=30).fit(counts)
    cells = np.asarray(model.transform(counts))
    back = model.inverse_transform(3 * cells)
    assert back.sum(axis=1).max() <= model.target_sum_ * (1 + 1e-6)
    np.testing.assert_allclose(
        model.inverse_transform(3 * cells, total_counts=500.0), back * 500 / model.target_sum_, 1e-5
    )


def test_a_sparse_cell_never_exceeds_its_total(counts):
    model = CellPreprocessor("log1p", n_top_genes=30, scale=False).fit(sp.csr_matrix(counts))
    cells = 3 * model.transform(sp.csr_matrix(counts))
    for totals in (None, 500.0):
        np.testing.assert_allclose(
            model.inverse_transform(cells, totals).toarray(),
            model.inverse_transform(cells.toarray(), totals),
            rtol=1e-6,
        )


def test_shares_of_genes_in_any_unit(counts):
    shares = CellPreprocessor("pearson_residuals").fit(counts).gene_fractions_
    with pytest.warns(UserWarning, match="not whole numbers"):
        tiny = CellPreprocessor("pearson_residuals").fit(counts * 1e-6)
    np.testing.assert_allclose(tiny.gene_fractions_, shares, rtol=1e-5)


@EACH
def test_cells_and_totals_as_tensors(normalization, counts):
    model = CellPreprocessor(normalization, n_top_genes=30).fit(counts)
    cells = torch.tensor(model.transform(counts)).bfloat16()
    totals = torch.full((len(cells),), 500.0, requires_grad=True)
    np.testing.assert_array_equal(
        model.inverse_transform(cells, totals), model.inverse_transform(cells.float().numpy(), 500)
    )
    with pytest.raises(ValueError, match="Negative values in data passed to total_counts"):
        model.inverse_transform(cells, -totals)


def test_set_output_and_names(counts, adata, tmp_path):
    model = CellPreprocessor(n_top_genes=30).set_output(transform="pandas")
    from_disk = model.fit_transform(_disk(adata, tmp_path))
    pd.testing.assert_frame_equal(from_disk, model.fit_transform(adata), rtol=1e-5, atol=1e-5)
    assert list(from_disk.index) == list(adata.obs_names)
    adata.obsm["X_normalised"] = from_disk
    embedder = SelfSupervisedEncoder(max_epochs=1).set_output(transform="pandas")
    adata.obsm["X_diffaug"] = Pipeline([("cells", model), ("y", embedder)]).fit_transform(adata)
    frame = model.fit_transform(pd.DataFrame(counts, columns=adata.var_names))
    expected = [f"gene{i}" for i in model.genes_]
    assert list(frame.columns) == expected + [f"gene{i}_residual" for i in model.residual_genes_]
    assert list(model.fit_transform(adata).columns) == list(frame.columns)
    unnamed = CellPreprocessor("log1p", n_top_genes=3).fit(counts)
    assert list(unnamed.get_feature_names_out()) == [f"x{i}" for i in unnamed.genes_]


@EACH
def test_in_a_pipeline(normalization, adata, tmp_path):
    labels = np.repeat([0, 1], 90)
    pipe = make_pipeline(
        CellPreprocessor(normalization, n_top_genes=30), PCA(5), KNeighborsClassifier(5)
    )
    assert cross_val_score(pipe, adata, labels, cv=3).mean() > 0.75
    memory = pipe.fit(adata, labels)[:-1].transform(adata)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipe))[:-1].transform(adata), memory)
    backed = _disk(adata, tmp_path)
    np.testing.assert_allclose(pipe[1].transform(pipe[0].transform(backed)), memory, atol=1e-4)


@pytest.mark.parametrize("normalization", ["log1p", "pearson_residuals"])
def test_counts_of_many_cells_need_little_memory_beside_themselves(normalization):
    X = np.random.default_rng(0).poisson(1.0, (40_000, 40)).astype(np.float32)
    model = CellPreprocessor(normalization, n_top_genes=None).fit(X[:2000])
    values = model.transform(X)
    tracemalloc.start()
    try:
        counts = model.inverse_transform(values, total_counts=X.sum(axis=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * counts.nbytes
    # Each cell by itself, as it would be alone.
    np.testing.assert_array_equal(
        counts[-7:], model.inverse_transform(values[-7:], total_counts=X[-7:].sum(axis=1))
    )


def test_totals_of_any_form_and_saving(counts, tmp_path):
    X = counts
    model = CellPreprocessor("log1p").fit(X)
    cells = model.transform(X)[:5]
    totals = sp.csr_matrix(X[:5]).sum(axis=1)  # a matrix of one column
    np.testing.assert_array_equal(
        model.inverse_transform(cells, totals),
        model.inverse_transform(cells, np.asarray(totals).ravel()),
    )
    np.testing.assert_array_equal(
        model.inverse_transform(cells, 500), model.inverse_transform(cells, np.full(5, 500.0))
    )
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))


def test_genes_that_equal_one_another_do_not_stand_out():
    mean, variance = 5.559653900490542, 13.573255936557942
    scores = preprocessing._seurat_dispersions(
        np.array([mean, mean, mean, 0.1, 20]), np.array([variance] * 3 + [0.3, 50])
    )
    assert np.isnan(scores[:3]).all()
