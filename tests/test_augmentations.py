"""Neighbours in every regime, and mix-ups that lie between a sample and one of its neighbours."""

import sys

import numpy as np
import pytest
import torch

from diffaugkit import augmentations
from diffaugkit.augmentations import nearest_neighbors, neighbor_mixup
from diffaugkit.rows import DenseRows, MappedRows
from diffaugkit.training import isolated_rng


def obvious(X, k):
    distances = ((X[:, None].astype(np.float64) - X[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1)[:, :k]


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)


def test_equals_the_obvious_version(points):
    for rows in (torch.from_numpy(points), DenseRows(points)):
        found = nearest_neighbors(rows, 7)
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), obvious(points, 7))
    mapped = MappedRows(DenseRows(points), lambda batch: batch[:, :3], 3)
    np.testing.assert_array_equal(nearest_neighbors(mapped, 5), obvious(points[:, :3], 5))


def test_all_other_rows_can_be_neighbours(points):
    found = nearest_neighbors(torch.from_numpy(points[:4]), 3).numpy()
    np.testing.assert_array_equal(
        np.sort(found, axis=1), [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    )
    with pytest.raises(ValueError, match=r"n_neighbors=4 needs more than 4 samples.*Lower"):
        nearest_neighbors(torch.from_numpy(points[:4]), 4)


def test_a_row_is_never_its_own_neighbour_even_among_copies():
    found = nearest_neighbors(torch.zeros(30, 4), 5).numpy()
    assert found.shape == (30, 5)
    assert (found != np.arange(30)[:, None]).all()
    assert all(len(set(row)) == 5 for row in found.tolist())


@pytest.mark.slow
def test_approximate_search_is_accurate_and_repeatable(monkeypatch, points):
    pytest.importorskip("pynndescent")
    monkeypatch.setattr(augmentations, "_EXACT_LIMIT", 500)
    rng = np.random.default_rng(1)
    X = rng.normal(size=(700, 10)).astype(np.float32)
    first, second = (nearest_neighbors(torch.from_numpy(X), 10).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    exact = obvious(X, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(first, exact, strict=True)])
    assert recall > 0.9
    assert (first != np.arange(700)[:, None]).all()

    # On disk: among some of the rows only, of which the others are no part.
    monkeypatch.setattr(augmentations, "_REFERENCE_LIMIT", 600)
    rows = DenseRows(X)
    rows.in_memory = False
    found = nearest_neighbors(rows, 10).numpy()
    assert len(np.unique(found)) <= 600
    assert (found != np.arange(700)[:, None]).all()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert recall > 0.7


def test_without_pynndescent_search_is_exact(monkeypatch, points):
    monkeypatch.setattr(augmentations, "_EXACT_LIMIT", 50)
    monkeypatch.setitem(sys.modules, "pynndescent", None)
    found = nearest_neighbors(torch.from_numpy(points), 4)
    np.testing.assert_array_equal(found, obvious(points, 4))


def test_rows_on_disk_search_among_a_bounded_number(monkeypatch, points):
    monkeypatch.setattr(augmentations, "_REFERENCE_LIMIT", 40)
    rows = DenseRows(points)
    rows.in_memory = False
    found = nearest_neighbors(rows, 3).numpy()
    assert len(np.unique(found)) <= 40
    assert (found != np.arange(120)[:, None]).all()
    for row, neighbors in enumerate(found):
        others = [i for i in np.unique(found) if i != row]
        distances = ((points[others] - points[row]) ** 2).sum(1)
        best = {others[i] for i in np.argsort(distances)[:3]}
        # Reference rows that are nobody's neighbour are unknown here: those found are never worse.
        assert best <= set(neighbors.tolist())


@pytest.mark.parametrize("kind", ["tensor", "rows"])
def test_mixup_lies_between_a_sample_and_one_of_its_neighbours(points, kind):
    X = torch.from_numpy(points)
    rows = X if kind == "tensor" else MappedRows(DenseRows(points), lambda batch: batch, 6)
    neighbors = nearest_neighbors(X, 5)
    index = torch.arange(0, 120, 3)
    with isolated_rng(0):
        views = neighbor_mixup(X[index], neighbors[index], rows)
    with isolated_rng(0):
        assert torch.equal(views, neighbor_mixup(X[index], neighbors[index], rows))
    shares, picked = [], []
    for view, i in zip(views, index, strict=True):
        direction = X[neighbors[i].long()] - X[i]
        share = ((view - X[i]) * direction).sum(1) / direction.square().sum(1)
        misfit = (X[i] + share[:, None] * direction - view).norm(dim=1)
        picked.append(int(misfit.argmin()))
        shares.append(float(share[picked[-1]]))
        assert misfit.min() < 1e-5
    assert min(shares) >= 0
    assert max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.2)
    assert set(picked) == set(range(5))
