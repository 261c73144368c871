"""Fixtures shared by the tests: tiny cell tables, and untouched global random streams."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

# The networks of the tests are so small that a second thread only waits for the first.
torch.set_num_threads(1)


# Tests of parts below the estimators draw from torch's global stream themselves.
_PARTS = ("base", "diffusion", "losses", "networks", "persistence")
_DRAWING = {f"test_{name}.py" for name in _PARTS}


@pytest.fixture(autouse=True)
def global_random_streams_untouched(request):
    """Every test leaves the global streams as they were; a call that moves them fails it."""
    before_numpy, before_torch = np.random.get_state(), torch.get_rng_state()
    yield
    after_numpy, after_torch = np.random.get_state(), torch.get_rng_state()
    np.random.set_state(before_numpy)
    torch.set_rng_state(before_torch)
    if request.node.path.name not in _DRAWING:
        assert torch.equal(after_torch, before_torch), "the global torch stream was moved"
    if "check_estimator" not in request.node.name:  # scikit-learn's own checks seed NumPy's
        same = (after_numpy[1] == before_numpy[1]).all() and after_numpy[2:] == before_numpy[2:]
        assert same, "the global NumPy stream was moved"


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
