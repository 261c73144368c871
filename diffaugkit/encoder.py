"""Self-supervised encoder: views of a sample -> loss -> embedding.

The E-step of DiffAug (Zang et al., arXiv 2309.07909): a soft contrastive loss on vectors, whose
positives are mix-ups of nearest neighbours until a generator gives better ones. The encoder knows
nothing of generators: their samples come in through ``fit(X, positives=...)``.

===========  ===================================================================
paper        here
===========  ===================================================================
x            a row of X, as scores on the first principal components
y            ``transform(X)``, high-dimensional embedding
z            ``project(X)``, low-dimensional embedding, the map
lambda       ``positives_prob``
nu^y, nu^z   ``nu``, ``nu_projection``
===========  ===================================================================
"""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from diffaugkit.augmentations import nearest_neighbors, neighbor_mixup
from diffaugkit.base import Interval, StrOptions, TorchTransformer, _fit_context, all_or_nothing
from diffaugkit.data import check_X
from diffaugkit.decomposition import PrincipalComponents, principal_components
from diffaugkit.diffusion import sample_in_batches
from diffaugkit.losses import KERNELS, nt_xent, soft_contrastive, t_info_nce
from diffaugkit.networks import EmbeddingMLP
from diffaugkit.rows import DenseRows, MappedRows
from diffaugkit.training import isolated_rng, make_batches

_DEFAULT_NEIGHBORS = 30


class SelfSupervisedEncoder(TorchTransformer):
    """Learn an embedding from unlabelled data by contrasting views of samples.

    Rows are first projected to their leading principal components (one common scale, not whitened:
    measured on five cell sets to serve better than raw genes, in a quarter of the time). Two views
    of each row, mix-ups with nearest neighbours or generated ones, then go through an MLP to a
    high-dimensional embedding y and on to a low-dimensional z; the loss pulls the views of a row
    together in z and holds the others apart, as far as y says that they differ, and in y itself.

    Parameters
    ----------
    method : {"auto", "scl", "simclr"}, default="auto"
        Loss. ``"scl"``, which is also ``"auto"``: the soft contrastive loss of DiffAug.
        ``"simclr"``: InfoNCE on z (the ablation B3 of the paper).
    backbone : {"auto", "mlp"}, default="auto"
        Network for vectors: an MLP with BatchNorm.
    n_components : int, default=50
        Width of the embedding y.
    n_projections : int, default=2
        Width of the projection z.
    hidden_sizes : tuple of int, default=(256, 256)
        Hidden layers of the encoder, and again of the head from y to z. The released code has
        (500, 500) behind raw genes; behind principal components half of that was measured to give
        the same embedding in less than half the time.
    skip : bool, default=True
        Give y a linear skip from the input, the identity at the start; see
        :class:`~diffaugkit.networks.EmbeddingMLP`.
    n_pcs : int or None, default=20
        Principal components in front of the network; clipped to what the data have. None feeds the
        features as they are, centred and brought to one common scale.
    n_neighbors : int or "auto", default="auto"
        Neighbours among which the mix-up picks; "auto" is 30, or fewer for few samples: at
        most a tenth of them, but at least 5 where there are more than 5 samples.
    nu : float, default=100.0
        Degrees of freedom of the kernel in y, the paper's.
    nu_projection : float, default=1.0
        Degrees of freedom of the kernel in z, the paper's for three of its four cell sets. Smaller
        values give heavier tails: tighter, more separate groups.
    kernel : {"t", "squared_t", "unit_t"}, default="t"
        See :func:`~diffaugkit.losses.t_similarity`.
    target : {"own_view", "pair"}, default="own_view"
        Where the soft targets are measured; see :func:`~diffaugkit.losses.soft_contrastive`.
    contrast : {"softmax", "pairwise"}, default="softmax"
        Soft targets in the paper's Eq. 1 or in its Eq. 2. On the development sets the softmax form
        keeps 2-D maps clearly more faithful; the pairwise form is what the paper optimises.
    beta : float, default=1.0
        Preference of a row's own pair, in [0, 1], with ``target="pair"``.
    repulsion : float, default=1.0
        Weight of the different pairs with ``contrast="pairwise"``.
    detach_target : bool, default=False
        Stop gradients at the soft targets.
    embedding_weight : float, default=3.0
        Weight of the same contrast taken in y itself
        (:func:`~diffaugkit.losses.t_info_nce`, 5 degrees of freedom), so that y does not only serve
        a map of two dimensions. Ours, not the paper's, whose y learns through z alone (0): measured
        on five cell sets to add 0.4 points of linear SVM and 0.6 of k-NN on y and to leave the map
        as it is. Of ``method="scl"``.
    temperature : float, default=0.5
        Of ``method="simclr"``.
    positives_prob : float, default=0.1
        lambda: share of second views that are replaced by given `positives` (Bernoulli per sample).
    weight_decay : float, default=1e-6
        Of AdamW; the paper's.
    warm_start : bool, default=False
        Go on from the weights and the principal components of the previous fit.
    layer : str or None, default=None
        Layer of an AnnData to read instead of ``.X``.
    max_epochs : int or "auto", default="auto"
        Passes over the data. "auto" is 330, the paper's E-step, or as many as make 1 000 batches if
        that is fewer, but at least 10: large data need fewer passes.
    batch_size : int, default=300
        The paper's. Other rows of the batch are the negatives.
    learning_rate : float, default=2e-3
        Peak rate of AdamW with warm-up and cosine. The released code has 1e-3, the paper prints
        1e-4, both for many more steps.
    device, precision, compile, random_state, verbose, checkpoint_dir, callbacks
        Common parameters; see :class:`~diffaugkit.base.TorchEstimator`.

    Attributes
    ----------
    module_ : EmbeddingMLP
        The network, in evaluation mode.
    mean_ : ndarray of shape (n_features,)
    components_ : ndarray of shape (n_pcs, n_features) or None
        Principal components in front of the network.
    scale_ : float
        Their common scale.
    history_ : DataFrame
        One row per epoch: epoch, loss, learning_rate.
    n_iter_ : int
        Epochs of the last fit.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if the names are strings.

    References
    ----------
    Zang et al., "Boosting Unsupervised Contrastive Learning Using Diffusion-Based Data Augmentation
    From Scratch", arXiv 2309.07909.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from diffaugkit import SelfSupervisedEncoder
    >>> X, _ = load_iris(return_X_y=True)
    >>> encoder = SelfSupervisedEncoder(max_epochs=2, hidden_sizes=(16,), random_state=0).fit(X)
    >>> encoder.transform(X).shape, encoder.project(X).shape
    ((150, 50), (150, 2))
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's form)
        **TorchTransformer._parameter_constraints,
        "method": [StrOptions({"auto", "scl", "simclr"})],
        "backbone": [StrOptions({"auto", "mlp"})],
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "n_projections": [Interval(Integral, 1, None, closed="left")],
        "hidden_sizes": [tuple, list],
        "skip": ["boolean"],
        "n_pcs": [Interval(Integral, 1, None, closed="left"), None],
        "n_neighbors": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "nu": [Interval(Real, 0, None, closed="neither")],
        "nu_projection": [Interval(Real, 0, None, closed="neither")],
        "kernel": [StrOptions(set(KERNELS))],
        "target": [StrOptions({"own_view", "pair"})],
        "contrast": [StrOptions({"softmax", "pairwise"})],
        "beta": [Interval(Real, 0, 1, closed="both")],
        "repulsion": [Interval(Real, 0, None, closed="left")],
        "detach_target": ["boolean"],
        "embedding_weight": [Interval(Real, 0, None, closed="left")],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "positives_prob": [Interval(Real, 0, 1, closed="both")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "layer": [str, None],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
    }

    def __init__(
        self,
        method="auto",
        backbone="auto",
        *,
        n_components=50,
        n_projections=2,
        hidden_sizes=(256, 256),
        skip=True,
        n_pcs=20,
        n_neighbors="auto",
        nu=100.0,
        nu_projection=1.0,
        kernel="t",
        target="own_view",
        contrast="softmax",
        beta=1.0,
        repulsion=1.0,
        detach_target=False,
        embedding_weight=3.0,
        temperature=0.5,
        positives_prob=0.1,
        weight_decay=1e-6,
        warm_start=False,
        layer=None,
        max_epochs="auto",
        batch_size=300,
        learning_rate=2e-3,
        device="auto",
        precision="auto",
        compile=False,
        random_state=None,
        verbose=0,
        checkpoint_dir=None,
        callbacks=None,
    ):
        self.method = method
        self.backbone = backbone
        self.n_components = n_components
        self.n_projections = n_projections
        self.hidden_sizes = hidden_sizes
        self.skip = skip
        self.n_pcs = n_pcs
        self.n_neighbors = n_neighbors
        self.nu = nu
        self.nu_projection = nu_projection
        self.kernel = kernel
        self.target = target
        self.contrast = contrast
        self.beta = beta
        self.repulsion = repulsion
        self.detach_target = detach_target
        self.embedding_weight = embedding_weight
        self.temperature = temperature
        self.positives_prob = positives_prob
        self.weight_decay = weight_decay
        self.warm_start = warm_start
        self.layer = layer
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.precision = precision
        self.compile = compile
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks

    @_fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None, *, positives=None):
        """Learn the embedding.

        Parameters
        ----------
        X : array-like, sparse matrix, DataFrame, AnnData or Rows of shape (n_samples, n_features)
            Normalised values; raw counts are refused (put ``CellPreprocessor()`` in front).
        y : None
            Ignored.
        positives : sequence of array-like, each of shape (n_samples, n_features), or None
            Generated views: row i of each is another view of row i of `X`. One is drawn per sample
            and step, with probability `positives_prob`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For input that cannot be used, see :func:`~diffaugkit.data.check_X`, fewer samples than
            neighbours, or positives of another shape.
        """
        rows = self._check_fit_input(X)
        state = self._prepare(rows, positives, seed=self._seed())
        module, history = self._fit_loop(
            state.module,
            state.loss,
            state.batches,
            seed=state.seed,
            max_epochs=auto_epochs(self.max_epochs, state.batches.steps_per_epoch),
            weight_decay=self.weight_decay,
            warmup=0.05,
            grad_clip=5.0,
        )
        return self._set_fitted(state, module, history)

    def transform(self, X):
        """Embed samples in y.

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components), float32
            A row's embedding does not depend on the other rows.

        Raises
        ------
        NotFittedError, ValueError
            Before ``fit``; for input that does not match it.
        """
        return self._embed(self._check_rows(X))[0]

    def project(self, X):
        """Embed samples in z, the low-dimensional map.

        Parameters
        ----------
        X : as for ``fit``, of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_projections), float32
        """
        return self._embed(self._check_rows(X))[1]

    def score(self, X, y):
        """Cross-validated accuracy with which 10 nearest neighbours in y predict the labels.

        Parameters
        ----------
        X : as for ``fit``
        y : array-like of shape (n_samples,)
            Labels.

        Returns
        -------
        float
            In [0, 1].
        """
        from diffaugkit.metrics import knn_accuracy

        return knn_accuracy(self.transform(X), y)

    # ---- pieces that DiffAugEM's joint training shares -------------------------------------------

    def _check_fit_input(self, X):
        return check_X(
            self,
            X,
            reset=not self._goes_on(),
            layer=self.layer,
            allow_counts=False,
            ensure_min_samples=2,
            ensure_min_features=2,
        )

    def _goes_on(self):
        return self.warm_start and hasattr(self, "module_")

    def _prepare(self, rows, positives, *, seed):
        """Everything a loop needs; nothing of it is kept on the estimator before the loop ends."""
        return _Fit(self, rows, positives, seed)

    def _set_fitted(self, state, module, history):
        import pandas as pd

        self.mean_, self.components_, self.scale_ = state.space
        self.module_ = module
        self.history_ = pd.DataFrame(history)
        self.n_iter_ = len(history)
        return self

    def _build(self):
        n_inputs = self.n_features_in_ if self.components_ is None else len(self.components_)
        return self._make_module(n_inputs)

    def _make_module(self, n_inputs):
        return EmbeddingMLP(
            n_inputs,
            self.n_components,
            self.n_projections,
            hidden_sizes=tuple(self.hidden_sizes),
            skip=self.skip,
        )

    def _check_rows(self, X):
        check_is_fitted(self, "module_")
        rows = check_X(self, X, reset=False, layer=self.layer, allow_counts=False)
        return self._network_input(rows)

    def _network_input(self, rows):
        return project_rows(rows, self.mean_, self.components_, self.scale_)

    def _embed(self, inputs):
        """Both embeddings of the network's input rows, in float32 and in padded batches."""
        device = self._device()
        module = self.module_.to(device).eval()

        def run(index):
            with torch.no_grad():
                return torch.cat(module(inputs[index].to(device)), dim=1).cpu()

        both = sample_in_batches(run, len(inputs)).numpy()
        return both[:, : self.n_components], both[:, self.n_components :]

    @property
    def _n_features_out(self):
        return self.n_components


class _Fit:
    """Module, batches and loss of one fit of an encoder."""

    def __init__(self, encoder, rows, positives, seed):
        device = encoder._device()
        self.encoder, self.seed = encoder, seed
        going_on = encoder._goes_on()
        if going_on:
            self.space = encoder.mean_, encoder.components_, encoder.scale_
        else:
            self.space = _fit_space(rows, encoder.n_pcs)
        n_inputs = rows.shape[1] if self.space[1] is None else len(self.space[1])
        with isolated_rng(encoder._child_seed(seed, 0)):
            self.module = encoder._make_module(n_inputs)
        if going_on:
            # A copy: a fit that fails must not leave half-trained weights.
            _copy_weights(encoder.module_, self.module)
        inputs = project_rows(rows, *self.space)
        k = encoder.n_neighbors
        if k == "auto":
            k = min(_DEFAULT_NEIGHBORS, max(5, len(rows) // 10), len(rows) - 1)
        # Neighbours depend on the directions alone, neither on the scale nor on the seed.
        key = (k, None if self.space[1] is None else self.space[1].tobytes())
        memo = rows._memo.get("neighbors")
        if memo is None or memo[0] != key:
            memo = rows._memo["neighbors"] = (key, nearest_neighbors(inputs, k))
        views = _positive_views(positives, rows, self.space)
        self.inputs = inputs.tensor.to(device) if inputs.resident else inputs
        self.batches = make_batches(
            inputs,
            memo[1],
            *views,
            batch_size=encoder.batch_size,
            seed=encoder._child_seed(seed, 1),
            device=device,
        )

    def loss(self, x, neighbors, *generated):
        encoder, n = self.encoder, len(x)
        view_a = neighbor_mixup(x, neighbors, self.inputs)
        view_b = neighbor_mixup(x, neighbors, self.inputs)
        if generated:
            pick = torch.randint(len(generated), (n, 1), device=x.device)
            replace = torch.rand(n, 1, device=x.device) < encoder.positives_prob
            for number, view in enumerate(generated):
                view_b = torch.where(replace & (pick == number), view, view_b)
        y, z = self.module(torch.cat([view_a, view_b]))
        if encoder.method == "simclr":
            return nt_xent(z[:n], z[n:], encoder.temperature)
        loss = soft_contrastive(
            y[:n],
            z[:n],
            y[n:],
            z[n:],
            nu=encoder.nu,
            nu_low=encoder.nu_projection,
            kernel=encoder.kernel,
            beta=encoder.beta,
            target=encoder.target,
            contrast=encoder.contrast,
            repulsion=encoder.repulsion,
            detach_target=encoder.detach_target,
        )
        if encoder.embedding_weight:
            loss = loss + encoder.embedding_weight * t_info_nce(y[:n], y[n:])
        return loss


def auto_epochs(max_epochs, steps_per_epoch, *, paper=330, most_steps=1_000):
    """Epochs of a phase: the paper's, or as many as make `most_steps` batches, at least 10."""
    if max_epochs != "auto":
        return max_epochs
    return max(10, min(paper, -(-most_steps // steps_per_epoch)))


def _copy_weights(source, module):
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start=True goes on with the network of the previous fit, but parameters of its "
            f"size were changed since. Restore them, or set warm_start=False. {error}"
        ) from error


def _fit_space(rows, n_pcs):
    """Mean, components or None, and the one scale that gives the input unit variance on average."""
    mean, components, std = linear_space(rows, n_pcs)
    return mean, components, float(np.sqrt(np.mean(std**2))) or 1.0


def linear_space(rows, n_pcs):
    """Mean of the features, principal components and their standard deviation; None: features."""
    if n_pcs is not None:
        pcs = principal_components(rows, n_pcs)
        return pcs.mean, pcs.components, pcs.explained_std
    mean = sum(block.astype(np.float64).sum(axis=0) for _, block in rows.blocks()) / len(rows)
    squares = sum(((b.double().numpy() - mean) ** 2).sum(axis=0) for _, b in rows.batches(None))
    return mean, None, np.sqrt(squares / (len(rows) - 1))


def project_rows(rows, mean, components, scale):
    """Rows on the principal components (or centred features), divided by a scale, or one each."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if components is None:
        shift = torch.from_numpy(mean.astype(np.float32))
        return MappedRows(rows, lambda batch: (batch - shift) / scale, rows.shape[1])
    scores = PrincipalComponents(mean, components, np.ones(len(components))).transform(rows)
    if scores.resident:
        return DenseRows(scores.tensor / scale)
    return MappedRows(scores, lambda batch: batch / scale, len(components))


def _positive_views(positives, rows, space):
    views = []
    for number, view in enumerate(() if positives is None else positives):
        try:
            view = check_X(BaseEstimator(), view, reset=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"positives[{number}]: {error}") from error
        if view.shape != rows.shape:
            raise ValueError(
                f"positives[{number}] has shape {view.shape}, but X has {rows.shape}: each set of "
                "positives holds one generated view per row of X."
            )
        views.append(project_rows(view, *space))
    return views
