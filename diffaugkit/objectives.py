"""Objectives of self-supervision: what a method keeps beside its network, and its loss.

Each holds student, heads, teacher, centre and queue as parameters or buffers of one module, which
is all that a checkpoint knows, so that a resumed fit is exact. The contract with the encoder:

- ``objective(x) -> (y, z)`` is the network that learns; ``objective.embedder`` the one that embeds;
- ``objective.loss(views) -> dict``, the global views first; "loss" and what is to be logged;
- ``objective.after_step(step)`` after each optimiser step; `objective.n_steps` is their number.

==========  ========================================  ================================
method      loss                                      network that embeds
==========  ========================================  ================================
"scl"       soft contrast of y and z (DiffAug)        the one network
"simclr"    InfoNCE within the batch                  the one network
"mocov2"    InfoNCE against a queue of older keys     the student
"byol"      cosine of a predictor with a teacher      the student
"simsiam"   cosine of a predictor with itself         the student
"dino"      cross-entropy with a sharpened teacher    the teacher, as in the paper
==========  ========================================  ================================
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from diffaugkit.losses import (
    dino_loss,
    disentanglement_loss,
    info_nce_queue,
    negative_cosine,
    nt_xent,
    sharpen,
    soft_contrastive,
    t_info_nce,
)
from diffaugkit.networks import mlp_head

__all__ = [
    "BYOLObjective",
    "CollapseWarning",
    "DINOObjective",
    "MoCoObjective",
    "Objective",
    "SimCLRObjective",
    "SimSiamObjective",
    "SoftContrastiveObjective",
    "feature_spread",
]


class CollapseWarning(UserWarning):
    """The embeddings of all samples have become the same, or nearly so."""


class Objective(nn.Module):
    """A network, and the loss that it learns by.

    Parameters
    ----------
    network : nn.Module
        ``network(x) -> (y, z)``, with parts ``embed`` and ``head``.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.n_steps = 1000

    @property
    def embedder(self):
        """The network whose embedding is the result."""
        return self.network

    def forward(self, x):
        """Both embeddings of the network that learns."""
        return self.network(x)

    def loss(self, views):
        """Loss of views, each (B, ...); the first two are the global ones."""
        raise NotImplementedError

    def after_step(self, step):
        """Move what follows the network; `step` counts from 0."""

    def compile(self, *args, **kwargs):
        """Compile the networks, which is where the time goes, and not the loss."""
        for child in self.children():
            child.compile(*args, **kwargs)


def feature_spread(y):
    """How far normalised embeddings differ: 1 where they fill the sphere, 0 where they are one.

    Standard deviation of each dimension over the batch, averaged, times the root of the dimension
    (Chen and He 2021, section 4.1).

    Parameters
    ----------
    y : Tensor of shape (B, d)

    Returns
    -------
    Tensor of shape ()

    Examples
    --------
    >>> import torch
    >>> feature_spread(torch.ones(8, 4)).item()
    0.0
    """
    y = F.normalize(y.detach().float(), dim=1)
    return y.std(dim=0, correction=0).mean() * math.sqrt(y.shape[1])


class SoftContrastiveObjective(Objective):
    """DiffAug's loss on z, whose soft targets come from y, and a contrast of y itself.

    Parameters
    ----------
    network : nn.Module
    embedding_weight : float, default=3.0
        Weight of :func:`~diffaugkit.losses.t_info_nce` on y.
    **options
        Of :func:`~diffaugkit.losses.soft_contrastive`.
    """

    def __init__(self, network, embedding_weight=3.0, **options):
        super().__init__(network)
        self.embedding_weight, self.options = embedding_weight, options

    def loss(self, views):  # noqa: D102
        n = len(views[0])
        y, z = self.network(torch.cat(views[:2]))
        loss = soft_contrastive(y[:n], z[:n], y[n:], z[n:], **self.options)
        if self.embedding_weight:
            loss = loss + self.embedding_weight * t_info_nce(y[:n], y[n:])
        return {"loss": loss, "feature_spread": feature_spread(y)}


class SimCLRObjective(Objective):
    """InfoNCE on z between the views of a batch (Chen et al. 2020).

    Parameters
    ----------
    network : nn.Module
    temperature : float, default=0.5
    """

    def __init__(self, network, temperature=0.5):
        super().__init__(network)
        self.temperature = temperature

    def loss(self, views):  # noqa: D102
        n = len(views[0])
        y, z = self.network(torch.cat(views[:2]))
        return {
            "loss": nt_xent(z[:n], z[n:], self.temperature),
            "feature_spread": feature_spread(y),
        }


class SimSiamObjective(Objective):
    """Cosine of a prediction from one view with the other's projection (Chen and He 2021).

    Parameters
    ----------
    network : nn.Module
        Its head ends in BatchNorm, see :func:`~diffaugkit.networks.mlp_head`.
    n_projections, n_hidden : int
        Width of z and of the predictor's hidden layer.
    """

    def __init__(self, network, n_projections, n_hidden):
        super().__init__(network)
        self.predictor = mlp_head(n_projections, n_hidden, n_projections)

    def loss(self, views):  # noqa: D102
        (y_a, z_a), (y_b, z_b) = (self.network(view) for view in views[:2])
        there = negative_cosine(self.predictor(z_a), z_b)
        back = negative_cosine(self.predictor(z_b), z_a)
        spread = feature_spread(torch.cat([y_a, y_b]))
        return {"loss": 0.5 * (there + back), "feature_spread": spread}


class _WithTeacher(Objective):
    """An objective whose teacher is a moving average of the network.

    The teacher gets no gradient. Its BatchNorm uses the statistics of its own batch, as the
    network's does, and keeps running ones of its own; dropout and drop-path are the student's only.

    Parameters
    ----------
    network : nn.Module
    momentum : float or "auto"
        Decay of the average at the start; "auto" makes it forget within a twentieth of the fit, but
        not slower than `slowest`, the paper's: 0.996 forgets within 250 steps, which short fits do
        not have.
    slowest : float
    constant : bool
        Keep the decay; else it goes to 1 by half a cosine.
    """

    def __init__(self, network, momentum, slowest=0.996, constant=False):
        super().__init__(network)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        for module in self.teacher.modules():
            kind = type(module).__name__
            # By the class too: the `p` of a pooling is an exponent.
            if "Drop" in kind or kind == "StochasticDepth":
                for name in ("drop_prob", "p", "prob"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        self.momentum, self.slowest, self.constant = momentum, slowest, constant

    def decay(self, step):
        """Decay of the teacher's average after optimiser step `step`."""
        start = self.momentum
        if start == "auto":
            start = min(self.slowest, max(0.9, 1 - 20 / self.n_steps))
        if self.constant:
            return start
        done = min(step / max(self.n_steps, 1), 1.0)
        return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def after_step(self, step):
        averages, currents = list(self.teacher.parameters()), list(self.network.parameters())
        torch._foreach_lerp_(averages, currents, 1 - self.decay(step))


class BYOLObjective(_WithTeacher):
    """Cosine of a prediction from one view with a teacher's projection of the other.

    Parameters
    ----------
    network : nn.Module
    n_projections, n_hidden : int
        Width of z and of the predictor's hidden layer.
    momentum : float or "auto", default="auto"
        Of the teacher, to 1 by a cosine; the paper's 0.996, less for short fits.
    """

    def __init__(self, network, n_projections, n_hidden, momentum="auto"):
        super().__init__(network, momentum)
        self.predictor = mlp_head(n_projections, n_hidden, n_projections)

    def loss(self, views):  # noqa: D102
        (y_a, z_a), (y_b, z_b) = (self.network(view) for view in views[:2])
        with torch.no_grad():
            target_a, target_b = (self.teacher(view)[1] for view in views[:2])
        there = negative_cosine(self.predictor(z_a), target_b)
        back = negative_cosine(self.predictor(z_b), target_a)
        spread = feature_spread(torch.cat([y_a, y_b]))
        return {"loss": 0.5 * (there + back), "feature_spread": spread}


class MoCoObjective(_WithTeacher):
    """InfoNCE of queries against a momentum network's keys, and a queue of older ones.

    Parameters
    ----------
    network : nn.Module
    n_projections : int
        Width of z.
    queue_size : int
        Keys in the queue.
    temperature : float, default=0.2
    momentum : float or "auto", default="auto"
        Of the momentum network, constant; the paper's 0.999, less for short fits.
    """

    def __init__(self, network, n_projections, queue_size, temperature=0.2, momentum="auto"):
        super().__init__(network, momentum, slowest=0.999, constant=True)
        self.temperature = temperature
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, n_projections)))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def loss(self, views):  # noqa: D102
        y, queries = self.network(views[0])
        with torch.no_grad():
            keys = F.normalize(self.teacher(views[1])[1].float())
        # A copy, because the queue moves on before the gradient is taken.
        loss = info_nce_queue(queries, keys, self.queue.clone(), self.temperature)
        with torch.no_grad():
            kept = keys[: len(self.queue)]
            index = (self.place + torch.arange(len(kept), device=keys.device)) % len(self.queue)
            self.queue.index_copy_(0, index, kept)
            self.place.copy_((self.place + len(kept)) % len(self.queue))
        return {"loss": loss, "feature_spread": feature_spread(y)}


class DINOObjective(_WithTeacher):
    """Self-distillation with no labels, and Gen-SIS's disentanglement.

    Parameters
    ----------
    network : nn.Module
        Its head is a :class:`~diffaugkit.networks.DINOHead`.
    out_dim : int
        Prototypes.
    student_temp, teacher_temp : float, default=0.1, 0.04
    warmup_teacher_temp : float, default=0.04
        Where the teacher's temperature begins.
    warmup_share : float, default=0.0
        Share of all steps in which it goes, linearly, to `teacher_temp`.
    center_momentum : float, default=0.9
    momentum : float or "auto", default="auto"
        Of the teacher, to 1 by a cosine; the paper's 0.996, less for short fits.
    frozen_steps : int, default=0
        Steps at the start in which the prototypes stay: the first epoch's.
    mix : {"logits", "features"}, default="logits"
        Where the teacher's outputs for the two sources of an interpolated image are mixed: behind
        the head, or before it, the ablation of Gen-SIS's Table 7.
    """

    def __init__(
        self,
        network,
        out_dim,
        student_temp=0.1,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        warmup_share=0.0,
        center_momentum=0.9,
        momentum="auto",
        frozen_steps=0,
        mix="logits",
    ):
        super().__init__(network, momentum)
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.warmup_teacher_temp, self.warmup_share = warmup_teacher_temp, warmup_share
        self.center_momentum, self.frozen_steps, self.mix = center_momentum, frozen_steps, mix
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("step", torch.zeros(()))

    @property
    def embedder(self):
        """The teacher, which DINO's authors evaluate."""
        return self.teacher

    def compile(self, *args, **kwargs):
        """Compile the parts of the networks, which the loss calls one by one."""
        for network in self.children():
            for part in network.children():
                part.compile(*args, **kwargs)

    def temperature(self):
        """Temperature of the teacher at this step, as a tensor: nobody waits for its value."""
        n_warmup = max(round(self.warmup_share * self.n_steps), 1)
        done = (self.step / n_warmup).clamp(max=1.0) if self.warmup_share else 1.0
        return self.warmup_teacher_temp + (self.teacher_temp - self.warmup_teacher_temp) * done

    def loss(self, views, interpolated=None):
        """Loss of two global views and any number of local ones, and of interpolated images.

        Parameters
        ----------
        views : list of Tensor, each of shape (B, ...)
            Global ones of one size first.
        interpolated : tuple of Tensor or None, default=None
            View of the interpolated image (B, ...), view of its second source (B, ...), share of
            the first (B,). The first view of the batch is that of the first source.

        Returns
        -------
        dict
            "loss", "feature_spread", "teacher_entropy", as a share of the largest, and with
            `interpolated` "disentanglement".
        """
        n, temperature = len(views[0]), self.temperature()
        students = (
            list(views) if interpolated is None else [*views[:2], interpolated[0], *views[2:]]
        )
        teachers = views[:2] if interpolated is None else [*views[:2], interpolated[1]]
        y = _embed_crops(self.network, students)
        student = self.network.head(y).unflatten(0, (len(students), n))
        with torch.no_grad():
            features = self.teacher.embed(torch.cat(teachers))
            raw = self.teacher.head(features).unflatten(0, (len(teachers), n))
        logged = {}
        if interpolated is not None:
            alpha = interpolated[2].float()
            ours = student[2]
            student = torch.cat([student[:2], student[3:]])
            sources = raw[0], raw[2]
            if self.mix == "features":
                first, second = features[:n], features[2 * n :]
                with torch.no_grad():
                    mixed = self.teacher.head(torch.lerp(second, first, alpha[:, None]))
                sources = mixed, mixed
            logged["disentanglement"] = disentanglement_loss(
                ours, *sources, alpha, self.center, self.student_temp, temperature
            )
        loss = dino_loss(student, raw[:2], self.center, self.student_temp, temperature)
        with torch.no_grad():
            target = sharpen(raw[:2].float(), self.center, temperature)
            entropy = torch.special.entr(target).sum(-1).mean() / math.log(target.shape[-1])
            self._move_center(raw[:2])
        return {
            "loss": loss + logged.get("disentanglement", 0.0),
            "feature_spread": feature_spread(features[:n]),
            "teacher_entropy": entropy,
            **{name: value.detach() for name, value in logged.items()},
        }

    def _move_center(self, raw):
        mean = raw.float().mean((0, 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)

    @torch.no_grad()
    def after_step(self, step):  # noqa: D102
        if step < self.frozen_steps:
            # Put back: with gradients of 0 Adam's second moment would be next to nothing by now,
            # and the first free steps several times too long.
            ours, first = self.network.head, self.teacher.head
            ours.prototypes.copy_(first.prototypes)
            if ours.gain is not None:
                ours.gain.copy_(first.gain)
        super().after_step(step)
        self.step.fill_(step + 1)


def _embed_crops(network, views):
    """Embed views one after the other, those of one size in one pass: (S * B, d)."""
    parts, start = [], 0
    for stop in range(1, len(views) + 1):
        if stop == len(views) or views[stop].shape != views[start].shape:
            parts.append(network.embed(torch.cat(views[start:stop])))
            start = stop
    return torch.cat(parts)
