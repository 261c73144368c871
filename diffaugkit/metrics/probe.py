"""DINO's linear probe: a linear classifier by SGD on frozen features, its learning rate swept."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, gen_batches

from diffaugkit.metrics.checks import check_known, check_labels, check_matrix, in_columns_of


def linear_probe(
    features: ArrayLike | dict[str, ArrayLike],
    y: ArrayLike,
    features_test: ArrayLike | dict[str, ArrayLike],
    y_test: ArrayLike,
    *,
    learning_rates: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    max_epochs: int = 100,
    batch_size: int = 256,
    validation_size: float = 0.1,
    random_state: Any = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Test accuracy of a linear classifier that is trained by SGD, after a sweep.

    The protocol of DINO (Caron et al. 2021, section 4.1): SGD with momentum 0.9, no weight decay,
    cosine decay over 100 epochs, learning rates in proportion to the batch size, on the frozen
    features of the last layer or of several. All learning rates are trained at once, on features
    that are standardised, so that one grid serves every encoder. The learning rate (and the
    layers) are chosen on a part of the *training* samples, and the winner is trained again on all
    of them: the test samples choose nothing, as they do in the usual scripts.

    Parameters
    ----------
    features : array-like of shape (n_samples, n_features), or dict of name to such arrays
        Features of the training samples. A dict is swept too, for instance
        ``{"last": ..., "last 4": ...}`` with the outputs of the last block and of the last four
        blocks side by side.
    y : array-like of shape (n_samples,)
        Their classes.
    features_test : as `features`, of shape (n_test, n_features)
        Features of the test samples.
    y_test : array-like of shape (n_test,)
        Their classes; one that no training sample has counts as an error.
    learning_rates : sequence of float > 0, default=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
        Learning rates for 256 samples a batch; scaled by `batch_size` / 256.
    max_epochs : int, default=100
        Passes over the samples.
    batch_size : int, default=256
        Samples per step; at most all.
    validation_size : float in (0, 1), default=0.1
        Share of the training samples that chooses.
    random_state : int, RandomState instance or None, default=0
        Seed of the split and of the batches.
    device : str, default="auto"
        Where torch trains; "auto" takes CUDA where there is one.

    Returns
    -------
    result : dict
        `accuracy` on the test samples; `learning_rate` and `layers` that were chosen (the name in
        the dict, None for an array); `validation`, a dict of (layers, learning rate) to accuracy.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or a parameter is out of its range.

    See Also
    --------
    linear_probe_accuracy : Cross-validated logistic regression, for data without a test set. It
        solves the same convex problem to its end, and so needs no sweep.

    Notes
    -----
    Weights start at zero: the problem is convex, and so no seed of them is needed.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit.metrics import linear_probe
    >>> X, y = load_iris(return_X_y=True)
    >>> linear_probe(X[::2], y[::2], X[1::2], y[1::2], max_epochs=50)["accuracy"] > 0.9
    True
    """
    rates = [float(rate) for rate in learning_rates]
    if not rates or not all(np.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"learning_rates must hold numbers > 0, got {learning_rates!r}.")
    for name, value in (("max_epochs", max_epochs), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
    if not isinstance(validation_size, Real) or not 0 < validation_size < 1:
        raise ValueError(f"validation_size must be in (0, 1), got {validation_size!r}.")
    if random_state is None:  # not from NumPy's global stream, which is the caller's
        random_state = np.random.default_rng().integers(2**31)
    elif not isinstance(random_state, Integral):
        random_state = check_random_state(random_state).randint(2**31)
    layers = _layers(features, features_test)
    n, n_test = (len(part) for part in next(iter(layers.values())))
    classes, codes = check_labels(y, n=n)
    names, test_codes = check_labels(y_test, n=n_test, name="y_test")
    n_validation = max(1, round(validation_size * n))
    if n_validation >= n:
        raise ValueError(f"{n} training samples leave none to train on beside the validation.")
    check_known(names, classes)
    # A class that training lacks gets the number -1, which no prediction has.
    known = {name: i for i, name in enumerate(classes.tolist())}
    test_codes = np.array([known.get(name, -1) for name in names.tolist()])[test_codes]
    train = _Training(len(classes), max_epochs, batch_size, int(random_state), device)

    order = np.random.default_rng(int(random_state)).permutation(n)
    held, rest = order[:n_validation], order[n_validation:]
    validation, best = {}, None
    for name, (X, _) in layers.items():
        scores = train(X[rest], codes[rest], X[held], codes[held], rates)
        for rate, (accuracy, loss) in zip(rates, scores, strict=True):
            validation[name, rate] = accuracy
            # Of equal accuracies the lower loss: a few held-out samples tie often.
            if best is None or (accuracy, -loss) > best[0]:
                best = (accuracy, -loss), name, rate
    _, name, rate = best
    X, X_test = layers[name]
    ((accuracy, _),) = train(X, codes, X_test, test_codes, [rate])
    return {
        "accuracy": accuracy,
        "learning_rate": rate,
        "layers": name,
        "validation": validation,
    }


def _layers(features, features_test):
    """Return {name: (training features, test features)}; an array gets the name None."""
    if not isinstance(features, dict):
        features, features_test = {None: features}, {None: features_test}
    if not isinstance(features_test, dict) or set(features) != set(features_test) or not features:
        raise ValueError("features and features_test must be dicts with the same names, or arrays.")
    layers = {}
    for name, X in features.items():
        own = "features" if name is None else f"features[{name!r}]"
        X_test = in_columns_of(features_test[name], X)
        X_test = check_matrix(X_test, own.replace("features", "features_test", 1))
        X = check_matrix(X, own)
        if X.shape[1] != X_test.shape[1]:
            raise ValueError(
                f"{own} has {X.shape[1]} features, but its test part has {X_test.shape[1]}."
            )
        layers[name] = X, X_test
    sizes = {(len(X), len(X_test)) for X, X_test in layers.values()}
    if len(sizes) > 1:
        raise ValueError(f"all layers must have the same samples, got numbers {sorted(sizes)}.")
    return layers


class _Training:
    """SGD on the softmax loss, one weight matrix per learning rate, all in one product."""

    def __init__(self, n_classes, max_epochs, batch_size, seed, device):
        import torch

        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        self.n_classes, self.max_epochs, self.batch_size = n_classes, max_epochs, batch_size
        self.seed = seed

    def __call__(self, X, codes, X_test, codes_test, rates):
        """Return (accuracy, loss) on the test samples for each learning rate."""
        import torch

        scaler = StandardScaler().fit(X)
        X, X_test = (self._tensor(scaler.transform(part)) for part in (X, X_test))
        # The caller's default may be another.
        options = {"dtype": torch.float32, "device": self.device}
        target = torch.eye(self.n_classes, **options)[torch.from_numpy(codes).to(self.device)]
        n, d = X.shape
        batch_size = min(self.batch_size, n)
        rate = torch.tensor(rates, **options)[:, None, None] * (batch_size / 256)
        weight = torch.zeros(len(rates), d, self.n_classes, **options)
        velocity = torch.zeros_like(weight)
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.max_epochs):
            decay = (1.0 + np.cos(np.pi * epoch / self.max_epochs)) / 2.0
            order = torch.randperm(n, generator=generator).to(self.device)
            for rows in gen_batches(n, batch_size, min_batch_size=max(1, batch_size // 2)):
                x = X[order[rows]]
                error = (x @ weight).softmax(dim=-1) - target[order[rows]]  # (rates, B, classes)
                velocity.mul_(0.9).add_(x.T @ error, alpha=1.0 / len(x))
                weight.sub_(decay * rate * velocity)
        logits = (X_test @ weight).cpu()
        codes_test = torch.from_numpy(codes_test)
        hit = (logits.argmax(dim=-1) == codes_test).double().mean(dim=-1)
        # A class that training lacks has no logit; its loss is not asked for.
        chosen = codes_test.clamp(min=0).expand(len(rates), -1)[..., None]
        loss = -logits.log_softmax(dim=-1).gather(-1, chosen).double().mean(dim=(1, 2))
        finite = torch.isfinite(loss)
        hit, loss = hit.where(finite, 0.0), loss.where(finite, torch.inf)
        return list(zip(hit.tolist(), loss.tolist(), strict=True))

    def _tensor(self, X):
        import torch

        # The bias is the weight of a column of ones.
        X = np.c_[X, np.ones(len(X))].astype(np.float32)
        return torch.from_numpy(X).to(self.device)
