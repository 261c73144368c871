"""Composition with scikit-learn: pipelines, searches, cross-validation, clustering, imblearn."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from diffaugkit import (
    CellPreprocessor,
    DiffAugEM,
    EmbeddingConditionedDiffusion,
    SelfSupervisedEncoder,
    load,
    save,
)


def tiny_em(**more):
    encoder = SelfSupervisedEncoder(hidden_sizes=(8,), n_components=4, n_pcs=6)
    diffusion = EmbeddingConditionedDiffusion(width=8, n_blocks=1, n_pcs=6, n_sampling_steps=2)
    return DiffAugEM(encoder, diffusion, **{"schedule": (2, 1, 2), "random_state": 0, **more})


@pytest.fixture(scope="module")
def cells(counts):
    names = [f"gene{i}" for i in range(counts[0].shape[1])]
    return ad.AnnData(counts[0], var=pd.DataFrame(index=names)), counts[1]


def test_warnings_name_the_line_of_the_caller_through_scikit_learn(counts):
    X, y = np.log1p(counts[0]), counts[1]
    model = make_pipeline(CellPreprocessor(n_top_genes=40), KNeighborsClassifier())
    with pytest.warns(UserWarning, match="expects raw counts") as seen:
        cross_val_score(model, X, y, cv=2)
    assert {warning.filename for warning in seen} == {__file__}


@pytest.mark.parametrize("n_jobs", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_grid_search_over_the_whole_way(counts, n_jobs):
    X, y = counts
    classifier = SVC(kernel="linear", random_state=0)
    model = make_pipeline(CellPreprocessor(n_top_genes=40), tiny_em(), classifier)
    grid = {
        "diffaugem__encoder__n_components": [3, 5],
        "diffaugem__augmentation_prob": [0.0, 0.5],
        "cellpreprocessor__n_top_genes": [40],
    }
    if n_jobs:
        grid.pop("diffaugem__augmentation_prob")
    search = GridSearchCV(model, grid, cv=2, error_score="raise", n_jobs=n_jobs).fit(X, y)
    assert search.best_score_ > 0.9
    em = search.best_estimator_[1]
    assert em.transform(search.best_estimator_[0].transform(X)).shape == (
        150,
        search.best_params_["diffaugem__encoder__n_components"],
    )
    np.testing.assert_array_equal(search.predict(X[:7]), search.predict(X)[:7])


def test_cross_validation_on_anndata(cells):
    adata, y = cells
    model = make_pipeline(CellPreprocessor(n_top_genes=40), tiny_em(), KNeighborsClassifier())
    scores = cross_val_score(model, adata, y, cv=3, error_score="raise")
    assert scores.mean() > 0.9
    fitted = clone(model).fit(adata, y)
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)]
    np.testing.assert_array_equal(fitted.predict(shuffled), fitted.predict(adata))


def test_backed_cells_go_through_the_pipeline(cells, tmp_path):
    adata, y = cells
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = make_pipeline(CellPreprocessor(n_top_genes=40), tiny_em())
    ours = clone(model).fit(backed).transform(backed)
    in_memory = clone(model).fit(adata).transform(adata)
    np.testing.assert_allclose(ours, in_memory, rtol=1e-2, atol=1e-2)
    assert y.shape == (len(ours),)


def test_raw_counts_without_preprocessor_are_refused(cells):
    with pytest.raises(ValueError, match=r"make_pipeline\(CellPreprocessor\(\), DiffAugEM\(\)\)"):
        tiny_em().fit(cells[0])
    normalised = np.log1p(cells[0].X)
    model = tiny_em().fit(normalised)
    for method in (model.transform, model.project, model.augment, model.quality_report):
        with pytest.raises(ValueError, match="raw counts"):
            method(cells[0].X)
    diffusion = clone(tiny_em().diffusion).set_params(max_epochs=1, encoder=tiny_em().encoder)
    diffusion.set_params(encoder__max_epochs=1).fit(normalised)
    for method in (diffusion.transform, diffusion.augment, diffusion.quality_report):
        with pytest.raises(ValueError, match="raw counts"):
            method(cells[0].X)


def test_clusters_of_the_embedding(counts):
    X, y = counts
    model = make_pipeline(
        CellPreprocessor(n_top_genes=40), tiny_em(), KMeans(3, n_init=10, random_state=0)
    )
    found = model.fit_predict(X)
    assert sum(np.bincount(y[found == k]).max() for k in range(3)) / len(y) > 0.9


def test_next_to_other_steps(blobs):
    X, y = blobs
    union = FeatureUnion([("em", tiny_em()), ("scaled", StandardScaler())])
    assert union.fit_transform(X).shape == (240, 24)
    columns = ColumnTransformer([("em", tiny_em(), slice(0, 10))], remainder="passthrough")
    assert columns.fit_transform(X).shape == (240, 14)
    frame = pd.DataFrame(X).rename(columns=lambda i: f"gene{i}")
    pandas = make_pipeline(StandardScaler(), tiny_em()).set_output(transform="pandas")
    out = pandas.fit_transform(frame, y)
    assert list(out.columns) == [f"diffaugem{i}" for i in range(4)]
    assert list(pandas.get_feature_names_out()) == list(out.columns)


def test_frozen_in_a_pipeline(blobs):
    X, y = blobs
    fitted = tiny_em().fit(X)
    model = make_pipeline(FrozenEstimator(fitted), KNeighborsClassifier()).fit(X, y)
    np.testing.assert_array_equal(model[0].transform(X), fitted.transform(X))
    assert model.score(X, y) > 0.95
    assert clone(model)[0].estimator is fitted


def test_save_and_load_of_every_step(counts, tmp_path):
    X, _ = counts
    model = make_pipeline(CellPreprocessor(n_top_genes=40), tiny_em()).fit(X)
    for number, step in enumerate(model):
        save(step, tmp_path / str(number))
    again = make_pipeline(*(load(tmp_path / str(number)) for number in range(2)))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))


def test_metadata_of_positives_goes_through_a_pipeline(blobs):
    X, _ = blobs
    encoder = SelfSupervisedEncoder(
        hidden_sizes=(8,), n_components=4, n_pcs=6, max_epochs=2, positives_prob=1.0, random_state=0
    )
    plain = make_pipeline(clone(encoder)).fit(X)
    routed = make_pipeline(clone(encoder)).fit(X, selfsupervisedencoder__positives=[X + 1])
    assert not np.array_equal(plain.transform(X), routed.transform(X))
