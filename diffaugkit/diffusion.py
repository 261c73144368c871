"""The one diffusion core: schedule, training loss, sampling loop, guidance, noise per row.

Names follow the papers; t counts from 0 (nearly clean) to T - 1 (nearly noise):

    alpha_bar_t   product of (1 - beta_s) for s <= t            Ho et al. 2020, section 2
    x_t           sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps                 eq. 4
    v             sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0   Salimans and Ho 2022
    snr           alpha_bar_t / (1 - alpha_bar_t)
    eta           0 is DDIM, 1 the ancestral sampler of DDPM   Song et al. 2021, eq. 16

A step of training is plain tensor arithmetic on a table; the steps of sampling are diffusers'
schedulers, imported when the first sample is drawn.
"""

import contextlib
import itertools
import math
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from diffaugkit.arrays import warn
from diffaugkit.losses import min_snr_weight, p2_weight

__all__ = ["Diffusion", "RowNoise", "classifier_free", "row_noise", "sample_in_batches"]

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SAMPLERS = ("ddim", "ddpm", "dpmsolver++")
WEIGHTINGS = ("uniform", "p2", "min_snr")
NORMS = ("l2", "l1")

_BETA_RANGE = (1e-4, 0.02)  # of DDPM, made for 1 000 timesteps
# Amplitude of the sample at which a predicted noise is first trusted, where the last level has less
# than the other: the error of the clean sample is that of the noise divided by the amplitude.
_TRUSTED_SIGNAL, _LEAST_SIGNAL = 0.04, 0.005


class Diffusion(nn.Module):
    """Noise schedule with its training loss and its sampling loop; holds no weights.

    It never sees which network it trains: a denoiser is anything that keeps the contract of
    `diffaugkit.denoisers`, on vectors (B, D) or images (B, C, H, W). Nothing is clipped unless
    asked: data do not have to lie in [-1, 1], but should have a spread near 1.

    Parameters
    ----------
    n_timesteps : int, default=1000
        Number of noise levels T.
    beta_schedule : {"linear", "scaled_linear", "cosine"}, default="linear"
        `"linear"` is DDPM's, `"scaled_linear"` (squares of evenly spaced roots, also called
        quadratic) that of latent diffusion, `"cosine"` that of Nichol and Dhariwal (2021, eq. 17,
        betas at most 0.999).
    beta_start, beta_end : float, default=None
        Ends of the two linear schedules; None takes DDPM's 1e-4 to 0.02, multiplied by 1000 / T, so
        that the last level is noise whatever T is. Stable Diffusion's 0.00085 to 0.012 leaves 7 %
        of the sample's amplitude there, which pulls the mean of data that are not centred.
    prediction_type : {"epsilon", "v_prediction", "sample"}, default="epsilon"
        What the denoiser predicts.

    Attributes
    ----------
    alpha_bar : Tensor of shape (n_timesteps,), float32
        Computed in float64.

    Raises
    ------
    ValueError
        For an unknown name, or betas that are not in (0, 1) and increasing.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.denoisers import MLPDenoiser
    >>> diffusion, denoiser = Diffusion(), MLPDenoiser(n_features=5, width=32)
    >>> loss = diffusion.loss(denoiser, torch.randn(8, 5))["loss"]
    >>> noise = row_noise((5,), seed=0, rows=range(3))
    >>> diffusion.sample(denoiser, noise, n_steps=4).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        n_timesteps=1000,
        beta_schedule="linear",
        beta_start=None,
        beta_end=None,
        prediction_type="epsilon",
    ):
        super().__init__()
        _check_name("beta_schedule", beta_schedule, BETA_SCHEDULES)
        _check_name("prediction_type", prediction_type, PREDICTION_TYPES)
        self.n_timesteps = n_timesteps
        self.beta_schedule = beta_schedule
        self.prediction_type = prediction_type

        betas = _betas(n_timesteps, beta_schedule, beta_start, beta_end)
        alpha_bar = torch.cumprod(1.0 - betas, dim=0)
        if alpha_bar[-1] > 0.05:
            warn(
                f"the last of the {n_timesteps} noise levels still holds "
                f"{math.sqrt(alpha_bar[-1]):.0%} of the sample's amplitude, but sampling starts "
                "from pure noise: raise beta_end, or leave beta_start and beta_end at None."
            )
        snr = alpha_bar / (1.0 - alpha_bar)
        levels = torch.stack([alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()], dim=1)
        for name, table in {
            "alpha_bar": alpha_bar,
            "_levels": levels,
            "_weight_p2": p2_weight(snr),
            "_weight_min_snr": min_snr_weight(snr, prediction_type=prediction_type),
        }.items():
            self.register_buffer(name, table.float(), persistent=False)
        # The samplers' coefficients are differences of nearly equal numbers: they stay in float64.
        self._alpha_bar64 = alpha_bar

    def _level(self, t, n_dims):
        """Signal and noise amplitude of each row, each (B, 1, ...) to broadcast over a sample."""
        if self._levels.device != t.device:
            self.to(t.device)
        return self._levels[t].view(-1, 2, *[1] * (n_dims - 1)).unbind(1)

    def add_noise(self, x0, t, noise):
        """Noised sample x_t of (B, ...) clean rows, `t` (B,), `noise` like `x0`."""
        signal, sigma = self._level(t, x0.ndim)
        return torch.addcmul(signal * x0, sigma, noise)

    def target(self, x0, t, noise):
        """Tensor that the denoiser is to predict for `add_noise(x0, t, noise)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._level(t, x0.ndim)
        return torch.addcmul(signal * noise, sigma, x0, value=-1)

    def predict_x0(self, prediction, x_t, t):
        """Clean sample that a prediction stands for."""
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._level(t, x_t.ndim)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def loss(
        self,
        denoiser,
        x0,
        cond=None,
        *,
        weighting="uniform",
        drop_condition=0.1,
        condition_noise=0.0,
        norm="l2",
        t=None,
        noise=None,
    ):
        """Denoising loss of one batch (Ho et al. 2020, eq. 14), nothing in it waits for the device.

        Parameters
        ----------
        denoiser : callable
            `denoiser(x_t, t, cond, drop)`.
        x0 : Tensor of shape (B, ...), float32
            Clean samples.
        cond : Tensor of shape (B, E), default=None
            Conditions; None trains without.
        weighting : {"uniform", "p2", "min_snr"}, default="uniform"
            Weight of each timestep: 1, P2 (Choi et al. 2022, k = gamma = 1) or min-SNR (Hang et al.
            2023, gamma = 5). P2 multiplies the error of whatever is predicted.
        drop_condition : float in [0, 1], default=0.1
            Share of rows trained with the null condition, which guidance needs (Ho and Salimans
            2022).
        condition_noise : float >= 0, default=0.0
            Standard deviation of Gaussian noise added to `cond`, in its own units; a generator that
            saw noisy conditions copies its source less.
        norm : {"l2", "l1"}, default="l2"
            Squared or absolute error.
        t, noise : Tensor, default=None
            Timesteps (B,) and noise like `x0`; None draws them from torch's default generators.

        Returns
        -------
        dict
            `"loss"`, a scalar float32 tensor.

        Raises
        ------
        ValueError
            If `weighting` or `norm` is unknown.
        """
        _check_name("weighting", weighting, WEIGHTINGS)
        _check_name("norm", norm, NORMS)
        n = len(x0)
        if t is None:
            t = torch.randint(self.n_timesteps, (n,), device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        x_t = self.add_noise(x0, t, noise)
        if cond is None:
            prediction = denoiser(x_t, t)
        else:
            if condition_noise:
                cond = cond + condition_noise * torch.randn_like(cond)
            # A mask also for a share of 0: distributed training wants every parameter in the graph.
            drop = torch.zeros(n, dtype=torch.bool, device=x0.device)
            if drop_condition:
                drop = torch.rand(n, device=x0.device) < drop_condition
            prediction = denoiser(x_t, t, cond, drop)

        target = self.target(x0, t, noise)
        distance = F.mse_loss if norm == "l2" else F.l1_loss
        if weighting == "uniform":
            return {"loss": distance(prediction.float(), target)}
        error = distance(prediction.float(), target, reduction="none").flatten(1).mean(dim=1)
        return {"loss": (error * getattr(self, f"_weight_{weighting}")[t]).mean()}

    @torch.no_grad()
    def loss_by_timestep(self, denoiser, x0, cond=None, n_bins=10, generator=None):
        """Mean unweighted loss in equal bins of the timestep, a diagnostic.

        Parameters
        ----------
        denoiser, x0, cond
            As in `loss`; no condition is dropped, and the denoiser is in evaluation mode meanwhile.
        n_bins : int, default=10
            Number of bins; every row is used once in each.
        generator : torch.Generator on the CPU, default=None
            None is a fresh one with seed 0, so that two calls compare.

        Returns
        -------
        Tensor of shape (n_bins,), float32, on the CPU
            The first bin holds the smallest noise.
        """
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        edges = [i * self.n_timesteps // n_bins for i in range(n_bins + 1)]
        losses = []
        with _evaluating(denoiser):
            for low, high in itertools.pairwise(edges):
                t = torch.randint(low, high, (len(x0),), generator=generator).to(x0.device)
                noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
                out = self.loss(denoiser, x0, cond, drop_condition=0.0, t=t, noise=noise)
                losses.append(out["loss"])
        return torch.stack(losses).cpu()

    def timesteps(self, n_steps, strength=1.0):
        """Timesteps of a sampling run, noisiest first: evenly spaced from the end ("trailing").

        Trailing spacing is the one that begins at the level that pure noise stands for (Lin et al.
        2024, table 2). A strength below 1 begins at `strength * n_timesteps` and takes its share of
        the steps.
        """
        if not 1 <= n_steps <= self.n_timesteps:
            raise ValueError(
                f"n_steps={n_steps}: must be between 1 and n_timesteps={self.n_timesteps}."
            )
        n_levels = max(1, round(strength * self.n_timesteps))
        n = min(max(1, round(strength * n_steps)), n_levels)
        # Integers, since rounded multiples of a float step may repeat a timestep or add one.
        return [(2 * i * n_levels + n) // (2 * n) - 1 for i in range(n, 0, -1)]

    @torch.no_grad()
    def sample(
        self,
        denoiser,
        noise,
        cond=None,
        *,
        n_steps=50,
        sampler="ddim",
        eta=0.0,
        guidance_scale=1.0,
        x_start=None,
        strength=1.0,
        step_noise=None,
        clip=None,
        progress=None,
    ):
        """Generate samples from noise, or noise given samples in part and denoise them again.

        Parameters
        ----------
        denoiser : callable
            `denoiser(x_t, t, cond, drop)`; a module is in evaluation mode meanwhile.
        noise : Tensor of shape (B, ...), float32
            Standard normal, see `RowNoise`. Its device is where everything runs.
        cond : Tensor of shape (B, E) or (B, L, E), default=None
            Conditions; None is the null condition.
        n_steps : int in [1, n_timesteps], default=50
            Denoising steps of a full run.
        sampler : {"ddim", "ddpm", "dpmsolver++"}, default="ddim"
            DDIM (Song et al. 2021), the ancestral sampler of DDPM with the posterior's variance (it
            is DDIM at eta = 1, and so it is computed), or the second-order multistep DPM-Solver++
            (Lu et al. 2022), good at 10 to 20 steps.
        eta : float in [0, 1], default=0.0
            Share of fresh noise in each step of DDIM.
        guidance_scale : float, default=1.0
            Classifier-free guidance, see `classifier_free`.
        x_start : Tensor like `noise`, default=None
            Real samples for partial noising (SDEdit, Meng et al. 2022).
        strength : float in [0, 1], default=1.0
            How far `x_start` is noised: 0 returns it, 1 noises it to the last level.
        step_noise : callable, default=None
            `step_noise() -> Tensor like noise`, for the samplers that add noise: a `RowNoise`.
        clip : float, default=None
            Bound on the clean sample that each prediction stands for: 1 for pixels in [-1, 1].
            Never for anything else: it ruins samples that have values beyond.
        progress : callable, default=None
            Called without arguments after each step, for instance `bar.update` of tqdm.

        Returns
        -------
        Tensor like `noise`, float32

        Raises
        ------
        ValueError
            For an unknown sampler, parameters out of range, or a missing `step_noise`.

        Notes
        -----
        The cosine schedule leaves the sample 0.005 % of its amplitude at the last level, where the
        error of a predicted noise counts 20 000 times in the clean sample. Where nothing bounds
        that (`clip`), a run with "epsilon" begins at the last level with 4 % instead.
        """
        _check_name("sampler", sampler, SAMPLERS)
        if not 0.0 <= eta <= 1.0 or (eta and sampler != "ddim"):
            raise ValueError(f"eta={eta}: must be in [0, 1], and 0 for every sampler but 'ddim'.")
        if not 0.0 <= strength <= 1.0 or (strength < 1.0 and x_start is None):
            raise ValueError(f"strength={strength}: must be in [0, 1], and 1 without x_start.")
        eta = 1.0 if sampler == "ddpm" else eta
        if eta and step_noise is None:
            raise ValueError(
                f"sampler={sampler!r} with eta={eta} adds noise in each step: pass step_noise, a "
                "RowNoise, or take a deterministic sampler."
            )
        timesteps = self.timesteps(n_steps, strength)
        if strength == 0.0:
            return x_start.clone()
        if self.prediction_type == "epsilon" and clip is None:
            planned, timesteps = timesteps, self._trusted(timesteps)
            for _ in planned[len(timesteps) :] if progress is not None else ():
                progress()

        scheduler = self._scheduler(sampler, timesteps)
        denoise = classifier_free(denoiser, guidance_scale)
        if clip is not None:
            denoise = self._clipped(denoise, clip)
        x, t = noise, torch.empty(len(noise), dtype=torch.int64, device=noise.device)
        if x_start is not None:
            x = self.add_noise(x_start, t.fill_(timesteps[0]), noise)
        with _evaluating(denoiser):
            for step, timestep in zip(scheduler.timesteps.tolist(), timesteps, strict=True):
                prediction = denoise(x, t.fill_(timestep), cond).float()
                extra = {"eta": eta, "variance_noise": step_noise().to(x)} if eta else {}
                x = scheduler.step(prediction, step, x, return_dict=False, **extra)[0]
                if progress is not None:
                    progress()
        return x

    def _trusted(self, timesteps):
        """Timesteps without those at which a predicted noise says nothing of the sample."""
        signal = self._alpha_bar64.sqrt()
        if signal[-1] >= _LEAST_SIGNAL:
            return timesteps
        first = max(0, int((signal >= _TRUSTED_SIGNAL).sum()) - 1)
        return list(dict.fromkeys(min(t, first) for t in timesteps))

    def _clipped(self, denoise, bound):
        """Denoiser whose predictions stand for clean samples within the bound."""

        def clipped(x_t, t, cond=None):
            prediction = denoise(x_t, t, cond).float()
            x0 = self.predict_x0(prediction, x_t, t)
            excess = x0 - x0.clamp(-bound, bound)
            if self.prediction_type == "sample":
                return prediction - excess
            # x_t stays what it is, so what x0 loses the noise gains. Written as a difference, which
            # leaves a prediction without excess as it is, bit for bit.
            signal, sigma = self._level(t, x_t.ndim)
            if self.prediction_type == "epsilon":
                return prediction + excess * (signal / sigma)
            return prediction + excess / sigma

        return clipped

    def _scheduler(self, sampler, timesteps):
        """Scheduler of diffusers over exactly these timesteps.

        It gets a chain that has only these levels (the re-spacing of Nichol and Dhariwal 2021) and
        walks over all of it. Given the full chain, diffusers 0.42's DDIM steps by T // n_steps,
        which is not where the next trailing timestep lies unless n_steps divides T: 7 of 1 000
        steps then end at level 0 with noise left.
        """
        n = len(timesteps)
        settings = {
            "num_train_timesteps": n,
            "trained_betas": [0.5] * n,
            "prediction_type": self.prediction_type,
            "timestep_spacing": "trailing",
        }
        if sampler == "dpmsolver++":
            from diffusers.schedulers.scheduling_dpmsolver_multistep import (
                DPMSolverMultistepScheduler,
            )

            scheduler = DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver++",
                solver_order=2,
                final_sigmas_type="zero",
                lower_order_final=True,
                **settings,
            )
        else:
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            # Clipping x0 to [-1, 1], the default there, ruins everything that is not an image.
            scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **settings)
        # Set here and not through betas: 1 - beta in float32 loses the levels near pure noise.
        scheduler.alphas_cumprod = self._alpha_bar64[timesteps[::-1]]
        with warnings.catch_warnings():
            # Of diffusers' own conversion to NumPy; nothing a user could change.
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler.set_timesteps(n)
        return scheduler


def classifier_free(denoiser, scale):
    """Denoiser with classifier-free guidance (Ho and Salimans 2022), which samplers never learn of.

    The prediction is null + scale * (conditional - null): 1 is the conditional prediction and 0 the
    unconditional one (one pass each), above 1 the condition is exaggerated, below 1 weakened. Any
    other scale takes both from one batch of twice the rows.

    Parameters
    ----------
    denoiser : callable
        `denoiser(x_t, t, cond, drop)`.
    scale : float
        Guidance scale.

    Returns
    -------
    callable
        `denoise(x_t, t, cond=None) -> prediction`.

    Examples
    --------
    >>> import torch
    >>> from diffaugkit.denoisers import MLPDenoiser
    >>> denoise = classifier_free(MLPDenoiser(n_features=5, n_condition=2, width=32), scale=1.5)
    >>> denoise(torch.randn(3, 5), torch.tensor([0, 10, 999]), torch.randn(3, 2)).shape
    torch.Size([3, 5])
    """

    def denoise(x_t, t, cond=None):
        if cond is None or scale == 0:
            return denoiser(x_t, t)
        if scale == 1:
            return denoiser(x_t, t, cond)
        drop = torch.arange(2 * len(x_t), device=x_t.device) >= len(x_t)
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, cond]), drop)
        conditional, null = both.float().chunk(2)
        return torch.lerp(null, conditional, scale)

    return denoise


class RowNoise:
    """Standard normal noise in which every row has a stream of its own.

    Row i draws from numpy's Philox generator (Salmon et al. 2011) with the pair (seed, i) as its
    key, on the CPU: its noise depends neither on the rows beside it nor on batch size, order or
    device. Each call goes on in each row's stream, so one object serves the first noise and that of
    the steps.

    Parameters
    ----------
    shape_per_row : tuple of int
        Shape of one sample.
    seed : int in [0, 2**64)
        Seed of the run.
    rows : sequence of int in [0, 2**64)
        Number of each row in the run.

    Raises
    ------
    ValueError
        If `seed` or a row is negative or too large.

    Examples
    --------
    >>> noise = RowNoise((4,), seed=0, rows=[7, 2])
    >>> first, second = noise(), noise()
    >>> bool((first[1] == row_noise((4,), seed=0, rows=[2])[0]).all())
    True
    """

    def __init__(self, shape_per_row, seed, rows):
        self.shape = (len(rows), *shape_per_row)
        keys = [(int(seed), int(row)) for row in rows]
        if any(not 0 <= part < 2**64 for key in keys for part in key):
            raise ValueError("seed and rows must be integers from 0 to 2**64 - 1.")
        self._streams = [
            np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
            for key in keys
        ]

    def __call__(self):
        """Next noise of every row, Tensor (B, ...), float32, on the CPU."""
        out = np.empty(self.shape, dtype=np.float32)
        for stream, row in zip(self._streams, out, strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out)


def row_noise(shape_per_row, seed, rows):
    """First draw of `RowNoise`: Tensor (len(rows), *shape_per_row), float32, on the CPU.

    Examples
    --------
    >>> row_noise((2, 3), seed=0, rows=range(4)).shape
    torch.Size([4, 2, 3])
    """
    return RowNoise(shape_per_row, seed, rows)()


def sample_in_batches(fn, n, batch_size=256):
    """Run a sampler over rows 0 to n - 1 in batches of one fixed size, and join the results.

    Matrix products round differently for different numbers of rows, so noise per row alone gives
    equal samples only up to rounding: measured on a CPU, 1e-6 in float32 (below 16 rows), but 1e-2
    in bfloat16. Here the last batch is filled up with its last row; with `batch_size` unchanged, a
    row's sample is the same bit for bit however many are drawn, in whatever order. So this size
    belongs to the library, not to a user's `batch_size`.

    Parameters
    ----------
    fn : callable
        `fn(rows) -> Tensor (batch_size, ...)`, rows an int64 array of `batch_size` positions.
    n : int >= 1
        Number of rows.
    batch_size : int, default=256
        Rows of a batch: larger ones are no faster on a CPU; take some thousands on a GPU.

    Returns
    -------
    Tensor of shape (n, ...)

    Raises
    ------
    ValueError
        If `n` or `batch_size` is below 1.

    Examples
    --------
    >>> sample_in_batches(lambda rows: row_noise((2,), 0, rows), n=5, batch_size=4).shape
    torch.Size([5, 2])
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n={n} and batch_size={batch_size} must be at least 1.")
    rows = np.arange(math.ceil(n / batch_size) * batch_size).clip(max=n - 1)
    return torch.cat([fn(part) for part in rows.reshape(-1, batch_size)])[:n]


def _betas(n_timesteps, schedule, start, end):
    """Noise variance of each step, (n_timesteps,) float64."""
    if schedule == "cosine":
        if start is not None or end is not None:
            raise ValueError("beta_start and beta_end have no meaning for beta_schedule='cosine'.")
        x = torch.arange(n_timesteps + 1, dtype=torch.float64) / n_timesteps
        curve = torch.cos((x + 0.008) / 1.008 * math.pi / 2).square()
        return (1.0 - curve[1:] / curve[:-1]).clamp(max=0.999)
    scale = 1000.0 / n_timesteps
    start = min(_BETA_RANGE[0] * scale, 0.999) if start is None else start
    end = min(_BETA_RANGE[1] * scale, 0.999) if end is None else end
    if not 0.0 < start <= end < 1.0:
        raise ValueError(f"0 < beta_start <= beta_end < 1 is needed, got {start} and {end}.")
    if schedule == "linear":
        return torch.linspace(start, end, n_timesteps, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, n_timesteps, dtype=torch.float64).square()


def _check_name(parameter, value, accepted):
    if value not in accepted:
        raise ValueError(f"{parameter}={value!r} is unknown: take one of {', '.join(accepted)}.")


@contextlib.contextmanager
def _evaluating(denoiser):
    """Put a module into evaluation mode for a while; a plain function passes through."""
    was_training = getattr(denoiser, "training", False)
    if was_training:
        denoiser.eval()
    try:
        yield
    finally:
        if was_training:
            denoiser.train()
