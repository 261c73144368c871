"""Losses and loss weights: pure functions from tensors to a scalar, or to one weight per element.

Notation, after DiffAug (Zang et al., arXiv 2309.07909):

=========  =====================================================================================
``y``      high-dimensional embedding of a view, the space of the soft targets
``z``      low-dimensional embedding of the same view, the space of the map
``P``      soft label of a pair, from ``y`` (Eq. 2)
``Q``      similarity of the same pair in ``z`` (Eq. 9)
``H``      pair indicator: 1 where two views come from one sample, else 0 (Eq. 3)
``nu``     degrees of freedom of the Student t kernel
=========  =====================================================================================
"""

import math

import torch
import torch.nn.functional as F

KERNELS = ("squared_t", "t", "unit_t")
_LOG_FLOOR = 1e-5  # keeps log(Q) and log(1 - Q) finite, as the released DiffAug code does
_LEAST_LOG_SHARE = -60.0


def squared_distances(a, b):
    """Squared Euclidean distances between the rows of two matrices.

    Parameters
    ----------
    a : Tensor of shape (n, d)
    b : Tensor of shape (m, d)

    Returns
    -------
    Tensor of shape (n, m)
        Non-negative, in float32 or better.

    Examples
    --------
    >>> import torch
    >>> squared_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).item()
    25.0
    """
    a, b = _full_precision(a), _full_precision(b)
    if a.is_cuda:
        # TF32, which training allows there, keeps 3 digits: too few for a difference of squares.
        return _squared_distances(a.double(), b.double()).to(a.dtype)
    return _squared_distances(a, b)


def _full_precision(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _squared_distances(a, b):
    # About the mean of one side: the squares lose the digits that an offset has.
    center = b.detach().mean(dim=0)
    a, b = a - center, b - center
    # One matrix product, not an (n, m, d) difference; rounding may go below 0, hence the clamp.
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    return torch.addmm(norms, a, b.T, alpha=-2.0).clamp_min(0.0)


def log_t_constant(nu):
    """Logarithm of the constant of the Student t density with `nu` degrees of freedom."""
    if nu > 1e6:
        # Near the normal density the logarithms are huge and cancel: first terms of the series.
        return -0.5 * math.log(2 * math.pi) - 1 / (4 * nu)
    return math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)


def t_similarity(squared_distance, nu, kernel="squared_t"):
    r"""Student t similarity of pairs from their squared distance.

    Parameters
    ----------
    squared_distance : Tensor
        Any shape, non-negative.
    nu : float
        Degrees of freedom, above 0. Small values give heavy tails: distant pairs stay similar.
    kernel : {"squared_t", "t", "unit_t"}, default="squared_t"
        ``"t"`` is the t density of Eq. 9, with exponent :math:`-(\nu + 1) / 2`. ``"squared_t"`` is
        :math:`2 \pi` times its square, which the authors' released code uses; it comes close to 1
        at distance 0 for large `nu`. ``"unit_t"`` is Eq. 9 divided by its value at distance 0.

    Returns
    -------
    Tensor
        Same shape as `squared_distance`, in (0, 1].

    References
    ----------
    Zang et al., "Boosting Unsupervised Contrastive Learning Using Diffusion-Based Data
    Augmentation From Scratch", arXiv 2309.07909, Eq. 9.

    Examples
    --------
    >>> import torch
    >>> round(t_similarity(torch.tensor(0.0), nu=100.0).item(), 4)
    0.995
    """
    return torch.exp(_log_t_similarity(squared_distance, nu, kernel))


def _log_t_similarity(squared_distance, nu, kernel):
    log_kernel = -(nu + 1) / 2 * torch.log1p(squared_distance / nu)
    if kernel == "unit_t":
        return log_kernel
    if kernel == "t":
        return log_kernel + log_t_constant(nu)
    if kernel == "squared_t":
        return 2 * (log_kernel + log_t_constant(nu)) + math.log(2 * math.pi)
    raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")


def p2_weight(snr, k=1.0, gamma=1.0):
    r"""Perception-prioritised weight of a timestep, :math:`1 / (k + \mathrm{SNR})^\gamma`.

    With ``k = gamma = 1`` this is :math:`1 - \bar\alpha_t` (GenSelfDiff-HIS, Eq. 8; Choi et al.
    2022).

    Parameters
    ----------
    snr : Tensor
        Signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)`.
    k, gamma : float, default=1.0

    Returns
    -------
    Tensor
        Same shape as `snr`.

    Examples
    --------
    >>> import torch
    >>> p2_weight(torch.tensor(3.0)).item()
    0.25
    """
    return (k + snr) ** -gamma


def min_snr_weight(snr, gamma=5.0, prediction_type="epsilon"):
    """Min-SNR weight of a timestep (Hang et al. 2023), for the given prediction type.

    The weight on the error of the predicted sample is ``min(snr, gamma)``; expressed on the
    network's own target it is ``min(snr, gamma)`` divided by ``snr`` for noise, by ``snr + 1`` for
    velocity and by 1 for the sample.

    Parameters
    ----------
    snr : Tensor
        Signal-to-noise ratio.
    gamma : float, default=5.0
        Value at which the ratio is cut, the paper's default.
    prediction_type : {"epsilon", "v_prediction", "sample"}, default="epsilon"

    Returns
    -------
    Tensor
        Same shape as `snr`.

    Examples
    --------
    >>> import torch
    >>> min_snr_weight(torch.tensor([1.0, 10.0])).tolist()
    [1.0, 0.5]
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # and 1 where the ratio is 0
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "sample":
        return clipped
    raise ValueError(f"unknown prediction_type {prediction_type!r}.")


def soft_contrastive(
    y_a,
    z_a,
    y_b,
    z_b,
    *,
    nu=100.0,
    nu_low=0.1,
    kernel="squared_t",
    beta=1.0,
    target="own_view",
    contrast="pairwise",
    repulsion=1.0,
    detach_target=False,
):
    r"""Soft contrastive loss of DiffAug between two views of a batch.

    With :math:`P_{ij} = \min\{1, (1 + H_{ij}(e^\beta - 1))\, \kappa_\nu(y_i, y_j)\}` and
    :math:`Q_{ij} = \kappa_{\nu_z}(z_i, z_j)`, the pairwise form is the paper's Eq. 2,

    .. math:: L = -\frac{1}{B^2} \sum_{ij} P_{ij} \log Q_{ij} + r (1 - P_{ij}) \log(1 - Q_{ij}),

    and the softmax form puts the same soft targets into the paper's Eq. 1,

    .. math:: L = -\frac{1}{B} \sum_{ij} \frac{P_{ij}}{\sum_k P_{ik}}
              \log \frac{Q_{ij}}{\sum_k Q_{ik}},

    averaged over both directions. For hard P it is InfoNCE with a t kernel in place of the
    exponential, as in t-SimCNE (Böhm et al. 2023).

    Parameters
    ----------
    y_a, y_b : Tensor of shape (B, n_components)
        High-dimensional embeddings of the two views; row i of both comes from sample i.
    z_a, z_b : Tensor of shape (B, n_low)
        Low-dimensional embeddings of the same views.
    nu, nu_low : float, default=100.0 and 0.1
        Degrees of freedom of the kernel in y and in z.
    kernel : {"squared_t", "t", "unit_t"}, default="squared_t"
        See :func:`t_similarity`.
    beta : float, default=1.0
        How much a pair of views of one sample is preferred, in [0, 1] (Eq. 2). It acts with
        ``target="pair"`` only: with ``"own_view"`` such a pair has P at its largest already.
    target : {"own_view", "pair"}, default="own_view"
        From which distances P comes: ``"pair"`` from view a to view b, as Eq. 2 is printed;
        ``"own_view"`` within view a, as the released code does, so that a sample's own pair is at
        distance 0 and hence a sure positive.
    contrast : {"pairwise", "softmax"}, default="pairwise"
        Each pair on its own (Eq. 2), or each pair against all others of its row (Eq. 1). The
        paper's Lemma 1 shows that they agree in the limit of many negatives.
    repulsion : float, default=1.0
        Of the pairwise form: weight r of the second term. 1 is the paper's; below 1 the many pairs
        of different samples weigh less against the one pair of views, as negative sampling does in
        UMAP.
    detach_target : bool, default=False
        Whether gradients stop at P. In the paper they do not.

    Returns
    -------
    Tensor of shape ()
        Mean over the pairs, or over the rows of the softmax (the paper sums: the gradient's
        direction is the same).

    References
    ----------
    Zang et al., arXiv 2309.07909, Eqs. 1, 2 and 9.

    Examples
    --------
    >>> import torch
    >>> y, z = torch.randn(8, 50), torch.randn(8, 2)
    >>> soft_contrastive(y, z, y, z).ndim
    0
    """
    if target == "own_view":
        log_P = _log_t_similarity(squared_distances(y_a, y_a), nu, kernel)
    elif target == "pair":
        log_P = _log_t_similarity(squared_distances(y_a, y_b), nu, kernel)
        log_P = log_P + beta * torch.eye(len(log_P), device=log_P.device, dtype=log_P.dtype)
    else:
        raise ValueError(f"target must be 'own_view' or 'pair', got {target!r}.")
    log_P = log_P.clamp(max=0.0)
    if detach_target:
        log_P = log_P.detach()
    distances = squared_distances(z_a, z_b)
    if contrast == "softmax":
        exponent = -(nu_low + 1) if kernel == "squared_t" else -(nu_low + 1) / 2
        logits = exponent * torch.log1p(distances / nu_low)
        # Normalised as logarithms: where all of a row is far away, P itself would be 0 / 0.
        sides = [_softmax(log_P, dim) * logits.log_softmax(dim) for dim in (0, 1)]
        return -0.5 * (sides[0] + sides[1]).sum() / len(logits)
    if contrast != "pairwise":
        raise ValueError(f"contrast must be 'pairwise' or 'softmax', got {contrast!r}.")
    P, Q = log_P.exp(), t_similarity(distances, nu_low, kernel)
    attraction = P * torch.log(Q + _LOG_FLOOR)
    return -(attraction + repulsion * (1 - P) * torch.log(1 - Q + _LOG_FLOOR)).mean()


def _softmax(x, dim):
    """Softmax whose smallest shares are exp(-60), about 1e-26, and have no gradient.

    Shares of pairs far apart would be subnormal numbers, with which a CPU multiplies many times
    slower: measured, the backward pass of a later E-step took 1.5 times as long.
    """
    return (x - x.detach().amax(dim, keepdim=True)).clamp_min(_LEAST_LOG_SHARE).softmax(dim)


def t_info_nce(a, b, nu=5.0):
    r"""InfoNCE with a Student t kernel in place of the exponential (Böhm et al. 2023).

    .. math:: L = -\frac{1}{B} \sum_i \log
              \frac{\kappa_\nu(a_i, b_i)}{\sum_k \kappa_\nu(a_i, b_k)},

    averaged over both directions: Eq. 1 of DiffAug with hard labels. The embedding is not
    normalised, so its distances stay those of the data.

    Parameters
    ----------
    a, b : Tensor of shape (B, d)
        Embeddings of the two views; row i of both comes from sample i.
    nu : float, default=5.0
        Degrees of freedom, above 0.

    Returns
    -------
    Tensor of shape ()
        Mean over the rows and both directions.

    References
    ----------
    Böhm et al., "Unsupervised visualization of image datasets using contrastive learning", 2023.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(4, 3)  # all views alike: log(B)
    >>> round(t_info_nce(one, one).item(), 4)
    1.3863
    """
    logits = -(nu + 1) / 2 * torch.log1p(squared_distances(a, b) / nu)
    partner = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner))


def nt_xent(a, b, temperature=0.5):
    """Normalised temperature-scaled cross-entropy (InfoNCE) of SimCLR between two views.

    Parameters
    ----------
    a, b : Tensor of shape (B, d)
        Embeddings of the two views; row i of both comes from sample i. Normalised inside.
    temperature : float, default=0.5
        Divides the cosine similarities.

    Returns
    -------
    Tensor of shape ()
        Mean over the 2B anchors, each against the 2B - 1 other views.

    References
    ----------
    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    Eq. 1.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(4, 3)  # all views alike: log(2B - 1)
    >>> round(nt_xent(one, one).item(), 4)
    1.9459
    """
    views = F.normalize(_full_precision(torch.cat([a, b])))
    n = len(a)
    logits = views @ views.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=a.device), -math.inf)
    partner = torch.arange(2 * n, device=a.device).roll(n)
    return F.cross_entropy(logits, partner)


def info_nce_queue(queries, keys, queue, temperature=0.2):
    """InfoNCE of MoCo: each query against its own key and a queue of older keys.

    Parameters
    ----------
    queries : Tensor of shape (B, d)
        Of the network that learns. Normalised inside, as are the other two.
    keys : Tensor of shape (B, d)
        Of the momentum network; row i is the other view of sample i. No gradient flows into them.
    queue : Tensor of shape (K, d)
        Keys of earlier batches, the negatives.
    temperature : float, default=0.2
        MoCo v2's.

    Returns
    -------
    Tensor of shape ()
        Mean over the queries of the cross-entropy over 1 + K logits.

    References
    ----------
    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, Eq. 1;
    Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(4, 3)  # all alike: log(1 + K)
    >>> round(info_nce_queue(one, one, torch.ones(9, 3)).item(), 4)
    2.3026
    """
    queries = F.normalize(_full_precision(queries))
    keys, queue = F.normalize(_full_precision(keys.detach())), F.normalize(_full_precision(queue))
    own = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([own, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def negative_cosine(prediction, target):
    """Negative cosine similarity of BYOL and SimSiam; no gradient flows into the target.

    BYOL's squared distance of normalised vectors is 2 plus twice this.

    Parameters
    ----------
    prediction : Tensor of shape (B, d)
        Output of the predictor.
    target : Tensor of shape (B, d)
        Projection of the other view.

    Returns
    -------
    Tensor of shape ()
        Mean over the rows, in [-1, 1].

    References
    ----------
    Grill et al., "Bootstrap Your Own Latent", 2020, Eq. 2; Chen and He, "Exploring Simple Siamese
    Representation Learning", 2021, Eq. 1.

    Examples
    --------
    >>> import torch
    >>> round(negative_cosine(torch.ones(2, 3), torch.ones(2, 3)).item(), 4)
    -1.0
    """
    prediction, target = _full_precision(prediction), _full_precision(target.detach())
    return -F.cosine_similarity(prediction, target).mean()


def dino_loss(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04):
    r"""Self-distillation loss of DINO over all pairs of a teacher's and another, student's crop.

    With the teacher's centred and sharpened :math:`P_t = \mathrm{softmax}((L_t - c) / \tau_t)` and
    the student's :math:`P_s = \mathrm{softmax}(L_s / \tau_s)` it is the mean of
    :math:`-P_t(i) \log P_s(j)` over the crops :math:`j \ne i` and the samples (Eqs. 1 to 3
    of Gen-SIS).

    Parameters
    ----------
    student_logits : sequence of Tensor, or Tensor, of shape (S, B, K)
        Output of the student's head for each crop, the global ones first.
    teacher_logits : sequence of Tensor, or Tensor, of shape (T, B, K)
        Output of the teacher's head for the global crops, in the same order; T <= S. No gradient
        flows into them.
    center : Tensor of shape (K,)
        Moving average of the teacher's logits.
    student_temp, teacher_temp : float or Tensor of shape (), default=0.1, 0.04
        Temperatures.

    Returns
    -------
    Tensor of shape ()

    Raises
    ------
    ValueError
        If there is no pair of different crops.

    References
    ----------
    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, Eqs. 1 to 3.

    Examples
    --------
    >>> import torch
    >>> crops = torch.zeros(2, 4, 8)  # all prototypes alike: log(K)
    >>> round(dino_loss(crops, crops, torch.zeros(8)).item(), 4)
    2.0794
    """
    student = _full_precision(_stacked(student_logits))
    teacher = _full_precision(_stacked(teacher_logits)).detach()
    both = min(len(student), len(teacher))
    n_pairs = len(student) * len(teacher) - both
    if n_pairs < 1:
        raise ValueError(
            f"dino_loss needs two different crops, got {len(student)} of the student and "
            f"{len(teacher)} of the teacher."
        )
    target = sharpen(teacher, center, teacher_temp)
    # Sum_k P_t log P_s = sum_k P_t L_s / tau - logsumexp(L_s / tau): the teacher's side is a sum
    # over its crops, so that no (T, S, B, K) is made.
    logits = student / student_temp
    total = (target.sum(0) * logits).sum(-1) - len(teacher) * logits.logsumexp(-1)
    own = (target[:both] * logits[:both]).sum(-1) - logits[:both].logsumexp(-1)
    return -(total.sum() - own.sum()) / (n_pairs * student.shape[1])


def sharpen(teacher_logits, center, teacher_temp):
    """Teacher's distribution of DINO: softmax of the centred logits over the temperature."""
    return F.softmax((teacher_logits - center) / teacher_temp, dim=-1)


def disentanglement_loss(
    student_logits,
    teacher_logits_1,
    teacher_logits_2,
    alpha,
    center,
    student_temp=0.1,
    teacher_temp=0.04,
):
    r"""Disentanglement loss of Gen-SIS: say of an interpolated image what its two sources are.

    The teacher's logits are mixed, :math:`L = \alpha L_1 + (1 - \alpha) L_2` (Eq. 5), then centred
    and sharpened (Eq. 6), and compared with the student's view of the interpolated image by
    cross-entropy (Eqs. 4 and 7).

    Parameters
    ----------
    student_logits : Tensor of shape (B, K)
        Of a view of the interpolated image.
    teacher_logits_1, teacher_logits_2 : Tensor of shape (B, K)
        Of views of the two sources. To mix before the head, the ablation of the paper's Table 7,
        give the head's output for the mixed features as both.
    alpha : Tensor of shape (B,) or float
        Share of the first source, in [0, 1].
    center : Tensor of shape (K,)
        Moving average of the teacher's logits.
    student_temp, teacher_temp : float or Tensor of shape (), default=0.1, 0.04
        Temperatures.

    Returns
    -------
    Tensor of shape ()
        Mean over the rows.

    References
    ----------
    Belagali, Yellapragada et al., "Gen-SIS: Generative Self-augmentation Improves Self-supervised
    Learning", Eqs. 4 to 7.

    Examples
    --------
    >>> import torch
    >>> same = torch.zeros(4, 8)  # all prototypes alike: log(K)
    >>> round(disentanglement_loss(same, same, same, 0.5, torch.zeros(8)).item(), 4)
    2.0794
    """
    first = _full_precision(teacher_logits_1).detach()
    second = _full_precision(teacher_logits_2).detach()
    alpha = torch.as_tensor(alpha, dtype=first.dtype, device=first.device).reshape(-1, 1)
    mixed = alpha * first + (1 - alpha) * second
    target = sharpen(mixed, center, teacher_temp)
    return F.cross_entropy(_full_precision(student_logits) / student_temp, target)


def _stacked(crops):
    return crops if isinstance(crops, torch.Tensor) else torch.stack(list(crops))
