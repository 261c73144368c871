"""Fixtures shared by the tests: tiny cell tables, and the promise that no call moves the global random streams."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch


@pytest.fixture(autouse=True)
def global_random_streams_untouched(request):
    """Every test, so every call that it makes, leaves NumPy's and torch's global streams where they were."""
    before_numpy, before_torch = np.random.get_state(), torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before_torch), "the global torch stream was moved"
    if "check_estimator" in request.node.name:
        np.random.set_state(before_numpy)  # scikit-learn's own checks seed it
    after = np.random.get_state()
    assert (after[1] == before_numpy[1]).all(), "the global NumPy stream was moved"
    assert after[2:] == before_numpy[2:], "the global NumPy stream was moved"


@pytest.fixture(scope="session")
def counts():
    """Raw counts of three made cell types: CSR of shape (150, 60), and their labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 50)
    rates = rng.gamma(1.0, 1.0, size=(3, 60))[labels] * rng.lognormal(0.0, 0.3, size=(150, 1))
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32)), labels


@pytest.fixture(scope="session")
def blobs():
    """Three Gaussian blobs in 20 dimensions: (240, 20) float32, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 80)
    centres = rng.normal(scale=3.0, size=(3, 20))
    return (centres[labels] + rng.normal(size=(240, 20))).astype(np.float32), labels
