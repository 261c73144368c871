"""The gate and Rows: same numbers from every container, nothing modified, nothing made dense."""

import gc
import hashlib
import pickle
import tracemalloc
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import check_estimator

from diffaugkit import SelfSupervisedEncoder, decomposition
from diffaugkit.data import check_X, looks_like_counts
from diffaugkit.decomposition import PrincipalComponents, principal_components
from diffaugkit.rows import BackedRows, DenseRows, MappedRows, Rows, SparseRows

N, D = 60, 7
NAMES = np.array([f"gene{i}" for i in range(D)])


class Identity(TransformerMixin, BaseEstimator):
    """The smallest estimator behind the gate."""

    def __init__(self, layer=None):
        self.layer = layer

    def fit(self, X, y=None):
        check_X(self, X, reset=True, layer=self.layer)
        return self

    def transform(self, X):
        if not hasattr(self, "n_features_in_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("Identity is not fitted")
        return np.asarray(check_X(self, X, reset=False, layer=self.layer))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


@pytest.fixture(scope="module")
def truth():
    values = np.random.default_rng(0).integers(-3, 4, size=(N, D)).astype(np.float32)
    return values * 0.5


def _csr_messy(X):
    """CSR with unsorted indices and each stored value split over two entries."""
    csr = sp.csr_matrix(X)
    data_, indices, indptr = [], [], [0]
    for i in range(csr.shape[0]):
        row = slice(csr.indptr[i], csr.indptr[i + 1])
        data_ += list(csr.data[row][::-1] / 2) + list(csr.data[row] / 2)
        indices += list(csr.indices[row][::-1]) + list(csr.indices[row])
        indptr.append(len(data_))
    return sp.csr_matrix((data_, indices, indptr), shape=csr.shape)


def _read_only(X):
    X = X.copy()
    X.setflags(write=False)
    return X


def _anndata(X, **more):
    return ad.AnnData(X, var=pd.DataFrame(index=NAMES), **more)


def _backed(X, tmp_path, name="a"):
    path = tmp_path / f"{name}.h5ad"
    _anndata(X).write_h5ad(path)
    return ad.read_h5ad(path, backed="r")


def _backed_view(X, tmp_path):
    """Every second row and some columns of a larger file, in another order."""
    order = np.random.default_rng(1).permutation(2 * N)
    wide = np.full((2 * N, D + 3), 9.0, np.float32)
    columns = np.array([8, 0, 3, 5, 1, 9, 2])
    rows = order[:N]
    wide[np.ix_(rows, columns)] = X
    names = np.array([f"other{i}" for i in range(D + 3)], dtype=object)
    names[columns] = NAMES
    path = tmp_path / "wide.h5ad"
    ad.AnnData(sp.csr_matrix(wide), var=pd.DataFrame(index=names)).write_h5ad(path)
    return ad.read_h5ad(path, backed="r")[rows, NAMES]


def _zarr(X, tmp_path):
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "a.zarr"
    _anndata(sp.csr_matrix(X)).write_zarr(path)
    return _anndata(ad.io.sparse_dataset(zarr.open_group(path, mode="r")["X"]))


MEMORY = {
    "float32": lambda X: X.copy(),
    "float64": lambda X: X.astype(np.float64),
    "fortran": np.asfortranarray,
    "reversed": lambda X: X[::-1].copy()[::-1],
    "read-only": _read_only,
    "big-endian": lambda X: X.astype(">f4"),
    "list": lambda X: X.tolist(),
    "objects": lambda X: X.astype(object),
    "tensor": lambda X: torch.tensor(X),
    "tensor float64 with grad": lambda X: torch.tensor(X, dtype=torch.float64, requires_grad=True),
    "tensor bfloat16": lambda X: torch.tensor(X, dtype=torch.bfloat16),
    "DataFrame": lambda X: pd.DataFrame(X, columns=NAMES),
    "csr_matrix": sp.csr_matrix,
    "csr_array": lambda X: sp.csr_array(X.astype(np.float64)),
    "csr of int": lambda X: sp.csr_matrix((X * 2).astype(np.int16)) * np.float64(0.5),
    "csr unsorted, with duplicates": _csr_messy,
    "csc_matrix": sp.csc_matrix,
    "coo_array": sp.coo_array,
    "dok_matrix": sp.dok_matrix,
    "AnnData": _anndata,
    "AnnData csr": lambda X: _anndata(sp.csr_matrix(X)),
    "AnnData csc": lambda X: _anndata(sp.csc_matrix(X)),
    "AnnData view": lambda X: _anndata(sp.csr_matrix(np.vstack([X, X + 1])))[:N],
}
DISK = {
    "backed csr": lambda X, tmp: _backed(sp.csr_matrix(X), tmp),
    "backed dense": _backed,
    "backed view": _backed_view,
    "zarr csr": _zarr,
}


def _content(X):
    """Hash of everything a container holds."""
    if isinstance(X, ad.AnnData):
        parts = [X.X, X.var_names.to_numpy().astype(str), X.obs_names.to_numpy().astype(str)]
        parts += list(X.layers.values())
        return [_content(part) for part in parts]
    if isinstance(X, torch.Tensor):
        return _content(X.detach().float().numpy()), X.requires_grad
    if sp.issparse(X):
        X = X.tocoo() if X.format == "dok" else X
        parts = [X.row, X.col] if X.format == "coo" else [X.indices, X.indptr]
        return [_content(part) for part in [X.data, *parts]]
    if not isinstance(X, np.ndarray):
        return hashlib.sha256(pickle.dumps(np.asarray(X))).hexdigest()
    return hashlib.sha256(X.tobytes()).hexdigest(), str(X.dtype), X.shape


def _assert_same_numbers(rows, truth):
    assert isinstance(rows, Rows)
    assert len(rows) == N
    assert rows.shape == (N, D)
    repeated = [5, 3, 3, 59, 0, 17, 18, 19, 4]
    for index in (repeated, np.array(repeated), slice(3, 40), slice(50, 2, -7), [], [-1, -60]):
        batch = rows[index]
        assert batch.dtype == torch.float32
        np.testing.assert_array_equal(batch.numpy(), truth[index] if len(batch) else batch)
    mask = np.arange(N) % 3 == 0
    np.testing.assert_array_equal(rows[mask].numpy(), truth[mask])
    np.testing.assert_array_equal(rows[7].numpy(), truth[7])
    np.testing.assert_array_equal(rows[torch.tensor([2, 1])].numpy(), truth[[2, 1]])
    np.testing.assert_array_equal(np.asarray(rows), truth)
    seen = list(rows.batches(batch_size=25))
    assert [part for part, _ in seen] == [slice(0, 25), slice(25, 50), slice(50, 60)]
    np.testing.assert_array_equal(torch.cat([batch for _, batch in seen]).numpy(), truth)
    for bad in ([N], [-N - 1], np.zeros(N + 1, bool)):
        with pytest.raises(IndexError):
            rows[bad]


@pytest.mark.parametrize("name", MEMORY)
def test_containers_in_memory(name, truth):
    X = MEMORY[name](truth)
    before = _content(X)
    rows = check_X(PCA(), X, reset=True)
    _assert_same_numbers(rows, truth)
    for _, batch in rows.batches():
        batch.mul_(0).sub_(1)  # what is read belongs to the reader
    assert _content(X) == before
    assert rows.in_memory
    assert rows.shuffle_block == 1
    assert rows.resident == isinstance(rows, DenseRows)
    if rows.resident:
        np.testing.assert_array_equal(rows.tensor.numpy(), truth)
    copy = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(np.asarray(copy), truth)


@pytest.mark.parametrize("name", DISK)
def test_containers_on_disk(name, truth, tmp_path):
    X = DISK[name](truth, tmp_path)
    rows = check_X(PCA(), X, reset=True)
    assert isinstance(rows, BackedRows)
    assert not rows.resident
    assert not rows.in_memory
    assert rows.shuffle_block == 1024
    _assert_same_numbers(rows, truth)
    np.testing.assert_array_equal(rows.feature_names, NAMES)


def test_zero_copy(truth):
    assert np.shares_memory(check_X(PCA(), truth, reset=True).tensor.numpy(), truth)
    assert np.shares_memory(np.asarray(check_X(PCA(), truth, reset=True)), truth)
    for csr in (sp.csr_matrix(truth), sp.csr_array(truth.astype(np.float64))):
        for X in (csr, _anndata(csr)):
            assert np.shares_memory(check_X(PCA(), X, reset=True)._csr.data, csr.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_X(PCA(), _read_only(truth), reset=True).tensor.shape == (N, D)


def test_a_field_of_records(truth):
    records = np.zeros(N, dtype=[("cell", np.float32, (D,)), ("label", np.uint8)])
    records["cell"] = truth
    _assert_same_numbers(check_X(PCA(), records["cell"], reset=True), truth)
    assert check_X(PCA(), records["cell"], reset=True).tensor.shape == (N, D)


@pytest.mark.parametrize("images", [True, False])
def test_masked_values_and_collections_are_refused(images, truth):
    masked = np.ma.masked_array(truth, mask=False)
    _assert_same_numbers(check_X(PCA(), masked, reset=True, images=images), truth)
    masked[3, 2] = np.ma.masked
    for X in (masked, _anndata(masked)):
        with pytest.raises(ValueError, match=r"X is .* masked values.*X\.filled\(0\)"):
            check_X(PCA(), X, reset=True, images=images)
    with pytest.raises(ValueError, match=r"Row 3 of X is .* masked values"):
        check_X(PCA(), list(masked), reset=True, images=images)
    for table, join in ((_anndata(truth), "anndata.concat"), (pd.DataFrame(truth), "pandas.con")):
        with pytest.raises(TypeError, match=f"list of .*: join them first, as {join}"):
            check_X(PCA(), [table, table], reset=True, images=images)
    with pytest.raises(TypeError, match=r"dict with the keys data, target: .* X\[key\]"):
        check_X(PCA(), {"data": truth, "target": 1}, reset=True, images=images)


def test_groups_of_strings_and_numbers_in_a_list_are_refused():
    X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    with pytest.raises(TypeError, match="all strings or all numbers"):
        SelfSupervisedEncoder(max_epochs=1).fit(X, groups=[1, "1"] * 4)


def test_rows_pass_unchanged(truth):
    rows = check_X(PCA(), _anndata(truth), reset=True)
    second = PCA()
    assert check_X(second, rows, reset=True) is rows
    assert list(second.feature_names_in_) == list(NAMES)
    assert check_X(second, rows, reset=False) is rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_X(second, DenseRows(truth), reset=False).shape == (N, D)
    with pytest.raises(ValueError, match="X has 3 features, but PCA is expecting 7 features"):
        check_X(second, DenseRows(truth[:, :3]), reset=False)
    with pytest.raises(ValueError, match="feature names should match"):
        check_X(second, DenseRows(truth, NAMES[::-1]), reset=False)
    with pytest.raises(ValueError, match="minimum of 99 is required by PCA"):
        check_X(PCA(), rows, reset=True, ensure_min_samples=99)


def test_layers(truth, tmp_path):
    adata = _anndata(truth * 0 + 1, layers={"counts": sp.csr_matrix(truth)})
    rows = check_X(PCA(), adata, reset=True, layer="counts")
    np.testing.assert_array_equal(np.asarray(rows), truth)
    view = adata[::2, 2:]
    rows = check_X(PCA(), view, reset=True, layer="counts")
    np.testing.assert_array_equal(np.asarray(rows), truth[::2, 2:])
    adata.write_h5ad(tmp_path / "layers.h5ad")
    backed = ad.read_h5ad(tmp_path / "layers.h5ad", backed="r")
    rows = check_X(PCA(), backed[::2, 2:], reset=True, layer="counts")
    np.testing.assert_array_equal(np.asarray(rows), truth[::2, 2:])
    with pytest.raises(ValueError, match=r"layer='raw' is not in the AnnData.*counts"):
        check_X(PCA(), adata, reset=True, layer="raw")
    with pytest.raises(ValueError, match=r"no \.X.*counts"):
        check_X(PCA(), ad.AnnData(shape=truth.shape, layers={"counts": truth}), reset=True)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(D)), extra=st.integers(0, 3), kind=st.sampled_from("dsb"))
def test_genes_are_matched_by_name(order, extra, kind, tmp_path_factory):
    truth = np.random.default_rng(0).normal(size=(9, D)).astype(np.float32)
    estimator = PCA()
    check_X(estimator, _anndata(truth), reset=True)
    wide = np.hstack([truth[:, order], np.full((9, extra), 7, np.float32)])
    names = [*NAMES[list(order)], *[f"extra{i}" for i in range(extra)]]
    # Surplus genes between the known ones, not only behind them.
    shuffle = np.random.default_rng(extra).permutation(len(names))
    X = wide[:, shuffle]
    adata = ad.AnnData(
        X if kind == "d" else sp.csr_matrix(X), var=pd.DataFrame(index=np.array(names)[shuffle])
    )
    if kind == "b":
        path = tmp_path_factory.mktemp("h5") / "a.h5ad"
        adata.write_h5ad(path)
        adata = ad.read_h5ad(path, backed="r")
    rows = check_X(estimator, adata, reset=False)
    np.testing.assert_array_equal(np.asarray(rows), truth)
    assert list(rows.feature_names) == list(NAMES)


@pytest.mark.parametrize("images", [True, False])
def test_the_path_of_a_table_is_told_what_reads_it(images, tmp_path):
    path = tmp_path / "cells.h5ad"
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=r"Read it first, as X = anndata\.read_h5ad\('.*cells"):
            check_X(PCA(), source, reset=True, images=images)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, "disk"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -3.0])
def test_surplus_genes_may_hold_anything(kind, value, tmp_path):
    truth = np.arange(18.0).reshape(9, 2)
    estimator = PCA()
    check_X(estimator, ad.AnnData(truth, var=pd.DataFrame(index=["a", "b"])), reset=True)
    wide = np.c_[truth[:, 1], np.full(9, value), truth[:, 0]]

    def wrapped(X):
        X = sp.csr_matrix(X) if kind == "disk" else kind(X)
        adata = ad.AnnData(X, var=pd.DataFrame(index=["b", "protein", "a"]))
        if kind != "disk":
            return adata
        path = tmp_path / f"{X[0, 0]}.h5ad"
        adata.write_h5ad(path)
        return ad.read_h5ad(path, backed="r")

    rows = check_X(estimator, wrapped(wide), reset=False, ensure_non_negative=True)
    np.testing.assert_array_equal(np.asarray(rows), truth)
    wide[4, 0] = value
    wide[0, 0] += 1  # the name of another file
    with pytest.raises(ValueError, match=r"NaN|infinity|Negative"):
        check_X(estimator, wrapped(wide), reset=False, ensure_non_negative=True)


def test_missing_and_repeated_genes(truth):
    estimator = PCA()
    check_X(estimator, _anndata(truth), reset=True)
    with pytest.raises(ValueError, match=r"lacks 1 of the 7 genes .*PCA.*: gene3\. Genes are"):
        check_X(estimator, _anndata(truth)[:, [i for i in range(D) if i != 3]], reset=False)
    other = ad.AnnData(truth)
    with pytest.raises(
        ValueError, match=r"lacks 7 .*gene0, gene1, gene2, gene3, gene4, \.\.\. and 2 more\."
    ):
        check_X(estimator, other, reset=False)
    twice = _anndata(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice.var_names = ["a", "a", "b", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match=r"repeated: a, b\. Call adata.var_names_make_unique"):
        check_X(PCA(), twice, reset=True)
    with pytest.raises(ValueError, match="feature names should match"):
        check_X(estimator, pd.DataFrame(truth, columns=NAMES)[NAMES[::-1]], reset=False)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        check_X(estimator, truth, reset=False)


def _with(truth, value):
    X = truth.copy()
    X[4, 2] = value
    return X


@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "frame", "tensor", "anndata", "backed"])
@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_not_finite(kind, value, word, truth, tmp_path):
    make = {
        "dense": np.asarray,
        "csr": sp.csr_array,
        "csc": sp.csc_array,
        "frame": pd.DataFrame,
        "tensor": torch.tensor,
        "anndata": lambda X: _anndata(sp.csr_matrix(X)),
        "backed": lambda X: _backed(sp.csr_matrix(X), tmp_path),
    }[kind]
    with pytest.raises(ValueError, match=f"Input X contains {word}"):
        check_X(PCA(), make(_with(truth, value)), reset=True)


def test_clear_errors(truth, tmp_path):
    def fails(X, match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            check_X(PCA(), X, reset=True, **options)

    huge = truth.astype(np.float64)
    huge[0, 0] = 1e300
    for X in (huge, sp.csr_array(huge)):
        fails(X, r"too large for dtype\('float32'\)")
    fails(np.zeros((0, 3)), r"Found array with 0 sample\(s\) \(shape=\(0, 3\)\)")
    fails(np.zeros((3, 0)), r"Found array with 0 feature\(s\)")
    fails(np.zeros(3), "Expected 2D array, got 1D array")
    fails(np.zeros((2, 2, 2)), "dim 3")
    fails(truth * 1j, "Complex data not supported")
    fails(sp.csr_array(truth * 1j), "Complex data not supported")
    fails(torch.tensor(truth).to_sparse(), "to_dense", TypeError)
    fails(truth[:, :1], "minimum of 2 is required", ensure_min_features=2)
    fails(truth[:1], "minimum of 2 is required", ensure_min_samples=2)
    fails(_backed(truth[:1], tmp_path), "minimum of 2 is required", ensure_min_samples=2)
    for X in (truth, sp.csr_array(truth), _anndata(truth), _backed(truth, tmp_path, "b")):
        fails(X, "Negative values in data passed to X in PCA", ensure_non_negative=True)
    frame = pd.DataFrame(truth, columns=NAMES).assign(cell="B", day=pd.Timestamp("2020-01-01"))
    fails(frame, r"no numbers: cell, day.*select_dtypes")
    fails(pd.DataFrame({"a": [1.0, np.nan], "b": ["1", "2"]}), "NaN")
    stored_by_column = _backed(sp.csc_matrix(truth), tmp_path, "csc")
    fails(stored_by_column, r"stored by columns \(CSC\).*to_memory")


def test_failed_check_keeps_what_was_learned(truth):
    estimator = PCA()
    check_X(estimator, _anndata(truth), reset=True)
    for X in (pd.DataFrame({"a": [np.nan, 1.0]}), np.full((3, 2), np.nan), "nonsense"):
        with pytest.raises(ValueError, match=r"NaN|convert|Expected 2D"):
            check_X(estimator, X, reset=True)
        assert estimator.n_features_in_ == D
        assert list(estimator.feature_names_in_) == list(NAMES)
    fresh = PCA()
    with pytest.raises(ValueError, match="NaN"):
        check_X(fresh, np.full((3, 2), np.nan), reset=True)
    assert not hasattr(fresh, "n_features_in_")


def test_counts_are_recognised():
    counts = np.random.default_rng(0).poisson(5, size=(700, 30))
    counts[::50, 3] += 20
    assert looks_like_counts(check_X(PCA(), sp.csr_array(counts), reset=True))
    assert looks_like_counts(check_X(PCA(), ad.AnnData(counts.astype(np.float32)), reset=True))
    assert looks_like_counts(DenseRows(counts * 20))
    assert not looks_like_counts(DenseRows(counts))  # grades, digits, 8-bit pixels
    assert not looks_like_counts(DenseRows(counts + np.float32(1e8)))  # where float32 is whole
    assert not looks_like_counts(SparseRows(sp.csr_array(np.minimum(counts, 1))))
    assert not looks_like_counts(SparseRows(sp.csr_array(np.log1p(counts))))
    assert not looks_like_counts(SparseRows(sp.csr_array(counts - 20)))
    assert not looks_like_counts(SparseRows(sp.csr_array((3, 3))))
    with pytest.raises(ValueError, match=r"raw counts.*make_pipeline\(CellPreprocessor\(\), PCA"):
        check_X(PCA(), sp.csr_array(counts), reset=True, allow_counts=False)
    check_X(PCA(), counts, reset=True, allow_counts=False)


def test_rows_of_a_table_of_whole_numbers_are_no_counts_after_fit():
    # Altitudes and differences: negative in some rows, so that those without look like counts.
    table = np.random.default_rng(0).integers(-500, 3000, size=(40, 6)).astype(float)
    single = np.abs(table[:1])
    pca = PCA()
    check_X(pca, table, reset=True, allow_counts=False)
    assert np.array_equal(check_X(pca, single, reset=False, allow_counts=False).block([0]), single)
    part = PCA()  # of another estimator, which hands on its rows
    check_X(part, check_X(PCA(), table, reset=True), reset=True, allow_counts=False)
    check_X(part, single, reset=False, allow_counts=False)

    check_X(pca, table / 7, reset=True, allow_counts=False)
    with pytest.raises(ValueError, match="raw counts"):
        check_X(pca, single, reset=False, allow_counts=False)


@pytest.fixture
def scikit_learn_draws():
    """Its checks draw from NumPy's global stream, which no call of ours may move."""
    state = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


@pytest.mark.usefixtures("scikit_learn_draws")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_check_estimator():
    results = check_estimator(Identity(), on_skip=None)
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= {
        "check_array_api_input"  # runs only under SCIPY_ARRAY_API=1
    }


def test_mapped_rows(truth):
    rows = MappedRows(SparseRows(sp.csr_array(truth)), lambda batch: batch[:, :2] * 2, 2)
    np.testing.assert_array_equal(np.asarray(rows), truth[:, :2] * 2)
    np.testing.assert_array_equal(rows[[4, 2]].numpy(), truth[[4, 2], :2] * 2)
    native = MappedRows(SparseRows(sp.csr_array(truth)), lambda block: block * 3, D, native=True)
    assert sp.issparse(native.block([1]))
    np.testing.assert_array_equal(np.asarray(native), truth * 3)


def test_rows_are_split_and_become_frames(truth):
    rows = MappedRows(SparseRows(sp.csr_array(truth)), lambda batch: batch * 2, D)
    train, test = train_test_split(rows, random_state=0)
    expected = train_test_split(2 * truth, random_state=0)
    np.testing.assert_array_equal(train, expected[0])
    np.testing.assert_array_equal(test, expected[1])
    np.testing.assert_array_equal(pd.DataFrame(rows, columns=NAMES)[NAMES[2]], 2 * truth[:, 2])


class _Spy:
    """An array on disk that remembers what was read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        self.reads.append((index.start, index.stop))
        return self.array[index]


def test_neighbours_are_read_at_once():
    X = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    spy = _Spy(X)
    rows = BackedRows(spy)
    index = np.random.default_rng(1).permutation(np.r_[1024:2048, 4000, 4002, 10, 10])
    np.testing.assert_array_equal(rows[index].numpy(), X[index])
    assert spy.reads == [(10, 11), (1024, 2048), (4000, 4003)]


def test_sparse_is_never_dense_as_a_whole(monkeypatch):
    n, d = 200_000, 2000
    columns = np.random.default_rng(0).integers(0, d, size=n)
    X = sp.csr_matrix((np.full(n, 0.5), columns, np.arange(n + 1)), shape=(n, d))
    dense = sp.csr_array.toarray

    def small_only(self, *args, **kwargs):
        assert self.shape[0] < 10_000
        return dense(self, *args, **kwargs)

    monkeypatch.setattr(sp.csr_array, "toarray", small_only)
    tracemalloc.start()
    rows = check_X(PCA(), X, reset=True, allow_counts=False)
    rows[np.arange(0, n, 1000)]
    for part in (slice(0, 4096), slice(n - 4096, n)):
        rows[part]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6  # dense: 1.6 GB


def test_backed_memory_is_flat(tmp_path):
    peaks = []
    for n in (8000, 24000):
        X = sp.random(n, 400, density=0.1, random_state=0, format="csr", dtype=np.float32)
        path = tmp_path / f"{n}.h5ad"
        ad.AnnData(X).write_h5ad(path)
        del X
        adata = ad.read_h5ad(path, backed="r")
        tracemalloc.start()
        rows = check_X(PCA(), adata, reset=True)
        scores = principal_components(rows, 20).transform(rows)
        for _, batch in scores.batches(1000):
            assert batch.shape[1] == 20
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 16000 * 100  # indices and gene names, not 400 values a row


# --- principal components -------------------------------------------------------------------------


def _spectrum(n, d, rank, seed=0):
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    values = rng.normal(size=(n, rank)) * np.geomspace(10, 0.5, rank)
    return (values @ axes.T + rng.normal(size=(n, d)) * 1e-3 + 2).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(500, 40), (40, 500), (3000, 120)])
@pytest.mark.parametrize("kind", ["dense", "sparse", "backed", "krylov", "krylov sparse"])
def test_principal_components_equal_scikit_learn(n, d, kind, tmp_path, monkeypatch):
    X = _spectrum(n, d, rank=20)
    if "krylov" in kind:
        monkeypatch.setattr(decomposition, "_EXACT_PCA_LIMIT", 10)
    if kind == "backed":
        ad.AnnData(X).write_h5ad(tmp_path / "a.h5ad")
        rows = check_X(PCA(), ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), reset=True)
    else:
        rows = SparseRows(sp.csr_array(X)) if "sparse" in kind else DenseRows(X)
    pcs = principal_components(rows, 10)
    peer = PCA(10, svd_solver="full").fit(X.astype(np.float64))
    sign = np.sign((pcs.components * peer.components_).sum(axis=1))
    np.testing.assert_allclose(pcs.components, peer.components_ * sign[:, None], atol=1e-4)
    np.testing.assert_allclose(pcs.explained_std**2, peer.explained_variance_, rtol=1e-4)
    scores = pcs.transform(rows)
    assert isinstance(scores, Rows)
    assert scores.resident == (kind != "backed")
    np.testing.assert_allclose(np.asarray(scores), peer.transform(X) * sign, atol=1e-4)
    batch = pcs.transform(torch.tensor(X[:5]))
    np.testing.assert_allclose(batch.numpy(), scores[:5].numpy(), rtol=1e-6, atol=1e-6)
    back = pcs.inverse(batch)
    assert back.dtype == batch.dtype == torch.float32
    expected = peer.inverse_transform(peer.transform(X[:5]))
    np.testing.assert_allclose(back.numpy(), expected, atol=1e-4)
    assert np.all(pcs.components[np.arange(10), np.abs(pcs.components).argmax(axis=1)] > 0)


def test_principal_components_of_thin_data():
    X = _spectrum(6, 30, rank=5)
    assert len(principal_components(DenseRows(X), 50).components) == 5  # n - 1
    assert len(principal_components(DenseRows(X[:, :3]), 50).components) == 3  # d
    flat = np.repeat(X[:2], 10, axis=0)
    for wide in (flat, flat[:, :8]):
        pcs = principal_components(DenseRows(wide), 4)
        assert len(pcs.components) == 1  # the rank: no axis of pure noise
        assert pcs.explained_std[0] > 0
    for shape in ((20, 4), (4, 20)):
        constant = principal_components(DenseRows(np.full(shape, 3.0)), 2)
        assert constant.explained_std.tolist() == [0.0]
        np.testing.assert_allclose(np.linalg.norm(constant.components, axis=1), 1.0)
    with pytest.raises(ValueError, match="at least 2 rows"):
        principal_components(DenseRows(X[:1]), 2)


def test_principal_components_are_computed_once(monkeypatch):
    X = _spectrum(300, 80, rank=60)
    rows = DenseRows(X)
    calls = []
    compute = decomposition._covariance_components
    monkeypatch.setattr(
        decomposition, "_covariance_components", lambda *args: calls.append(args) or compute(*args)
    )
    few, many = principal_components(rows, 20), principal_components(rows, 50)
    assert isinstance(few, PrincipalComponents)
    np.testing.assert_array_equal(few.components, many.components[:20])
    np.testing.assert_array_equal(few.explained_std, many.explained_std[:20])
    assert len(calls) == 1
    assert principal_components(rows, 50) is many
    # Scores too, also by components that were saved, or come with other standard deviations.
    scores = many.transform(rows)
    assert many.transform(rows) is scores
    for pcs in (few, PrincipalComponents(few.mean.copy(), few.components.copy(), np.ones(20))):
        assert pcs.transform(rows).resident
        assert np.shares_memory(np.asarray(pcs.transform(rows)), np.asarray(scores))
        other = pcs.transform(DenseRows(X))
        np.testing.assert_allclose(other.tensor, scores.tensor[:, :20], atol=1e-5)
    shifted = PrincipalComponents(few.mean + 1, few.components, few.explained_std)
    assert not np.allclose(shifted.transform(rows).tensor, scores.tensor[:, :20])
    assert len(principal_components(rows, 60).components) == 60
    assert len(calls) == 2
    assert few.transform(rows).shape == (300, 20)
    assert not pickle.loads(pickle.dumps(rows))._memo
    # Data of a low rank do not count as "fewer than asked".
    flat = DenseRows(np.repeat(X[:5], 60, axis=0))
    assert len(principal_components(flat, 50).components) == 4
    assert len(principal_components(flat, 50).components) == 4
    assert len(calls) == 3


def test_principal_components_are_reproducible(monkeypatch):
    X = _spectrum(300, 20, rank=6)
    rows = DenseRows(X)
    monkeypatch.setattr(decomposition, "_EXACT_PCA_LIMIT", 10)
    first, second = (principal_components(DenseRows(X), 5, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first.components, second.components)
    assert principal_components(rows, 20, random_state=3) is principal_components(
        rows, 20, random_state=3
    )
    generator = np.random.RandomState(0)
    assert principal_components(rows, 20, random_state=generator) is not principal_components(
        rows, 20, random_state=generator
    )


@pytest.mark.parametrize("kind", ["dense", "dense, in blocks", "sparse", "lazy"])
def test_krylov_components_of_a_slow_spectrum(kind, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 20)) * np.geomspace(5, 1.5, 20) @ rng.normal(size=(20, 300)) / 10
    X = (X + rng.normal(size=(400, 300)) * 0.7 + 3).astype(np.float32)
    monkeypatch.setattr(decomposition, "_EXACT_PCA_LIMIT", 10)
    monkeypatch.setattr(decomposition, "_ONE_PASS_PCA_LIMIT", 10)
    if kind == "dense, in blocks":
        monkeypatch.setattr(decomposition, "_CENTRED_VALUES", 0)
    rows = SparseRows(sp.csr_array(X)) if kind == "sparse" else DenseRows(X)
    if kind == "lazy":
        rows = MappedRows(rows, lambda batch: batch, 300)
    pcs = principal_components(rows, 20)
    peer = PCA(20, svd_solver="full").fit(X.astype(np.float64))
    expected = peer.transform(X.astype(np.float64))
    scores = np.asarray(pcs.transform(rows))
    sign = np.sign((scores * expected).sum(axis=0))
    np.testing.assert_allclose(scores * sign, expected, atol=1e-4)
    np.testing.assert_allclose(pcs.components @ pcs.components.T, np.eye(20), atol=1e-12)
    # Rows that have no spread, or less than is asked, end the iteration early.
    constant = principal_components(DenseRows(np.full((40, 30), 3.0)), 2)
    assert constant.explained_std.tolist() == [0.0]
    low = principal_components(DenseRows(np.repeat(X[:6], 10, axis=0)), 20)
    assert len(low.components) == 5


@pytest.mark.parametrize("kind", ["dense", "sparse", "mapped"])
@pytest.mark.parametrize("exponent", [-80, 70])
def test_krylov_components_in_any_unit(kind, exponent, monkeypatch):
    monkeypatch.setattr(decomposition, "_EXACT_PCA_LIMIT", 50)
    monkeypatch.setattr(decomposition, "_ONE_PASS_PCA_LIMIT", 50)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 20)) * np.linspace(4, 1, 20) @ rng.normal(size=(20, 100))
    X = (X + rng.normal(size=X.shape)).astype(np.float32)

    def found(X):
        rows = SparseRows(sp.csr_array(X)) if kind == "sparse" else DenseRows(X)
        return principal_components(
            MappedRows(rows, torch.clone, X.shape[1]) if kind == "mapped" else rows, 5
        )

    plain, scaled = found(X), found(np.ldexp(X, exponent))
    np.testing.assert_allclose(scaled.components, plain.components, atol=1e-7)
    np.testing.assert_allclose(np.ldexp(scaled.explained_std, -exponent), plain.explained_std)


def test_half_of_the_products_of_wide_rows_are_computed():
    X, read = np.random.default_rng(0).normal(size=(256, 2**14)).astype(np.float32), []

    def count(block):
        read.append(len(block))
        return block

    rows = MappedRows(DenseRows(X), count, X.shape[1])
    assert len(list(rows.slices())) == 4
    components = principal_components(rows, 3).components
    assert sum(read) == 64 * (4 + 4 + (1 + 2 + 3 + 4) + 4)  # mean, left, right, axes
    expected = PCA(3, svd_solver="full").fit(X.astype(float)).components_
    np.testing.assert_allclose(np.abs(np.sum(components * expected, axis=1)), 1.0, atol=1e-6)


def test_scores_file_is_removed(tmp_path):
    rows = check_X(PCA(), _backed(_spectrum(50, D, rank=5), tmp_path), reset=True)
    scores = principal_components(rows, D).transform(rows)
    path = Path(scores._path)
    assert path.stat().st_size == 50 * D * 4
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(scores)
    leading = principal_components(rows, 3).transform(rows)  # the same file
    assert not leading.in_memory
    np.testing.assert_array_equal(np.asarray(leading), np.asarray(scores)[:, :3])
    del rows, scores
    gc.collect()
    assert path.exists()
    del leading
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("rank", [4, 30])
def test_components_of_large_data_of_low_rank(rank):
    rng = np.random.default_rng(0)
    A = (rng.normal(size=(1100, rank)) @ rng.normal(size=(rank, 1100))).astype(np.float32)
    centred = A.astype(np.float64) - A.mean(axis=0, dtype=np.float64)
    exact = np.linalg.svd(centred, compute_uv=False)[:rank] / np.sqrt(len(A) - 1)
    for rows in (DenseRows(A), SparseRows(sp.csr_array(A))):
        pcs = principal_components(rows, 50)
        np.testing.assert_allclose(pcs.explained_std[:rank], exact, rtol=1e-4)
        again = (centred @ pcs.components.T) @ pcs.components
        np.testing.assert_allclose(again, centred, atol=1e-3 * np.abs(centred).max())
