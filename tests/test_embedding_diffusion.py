"""EmbeddingConditionedDiffusion: what it generates, and that every option reaches the model."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from diffaugkit import (
    DiffAugEM,
    EarlyStopping,
    EmbeddingConditionedDiffusion,
    LatentAutoencoder,
    SelfSupervisedEncoder,
    load,
)
from diffaugkit import embedding_diffusion as diffusion_file
from diffaugkit.batches import make_batches
from diffaugkit.diffusion import BETA_SCHEDULES, PREDICTION_TYPES, SAMPLERS, WEIGHTINGS
from diffaugkit.embedding_diffusion import interpolate_rows
from diffaugkit.metrics import frechet_distance, spread_ratio
from diffaugkit.rows import DenseRows
from diffaugkit.runtime import isolated_rng, mix_seed

ENCODER = {"hidden_sizes": (16,), "n_components": 4, "n_pcs": 6, "max_epochs": 2}
TINY = {"width": 16, "n_blocks": 1, "n_pcs": 6, "n_sampling_steps": 3, "max_epochs": 2}


def tiny(**more):
    encoder = SelfSupervisedEncoder(**ENCODER)
    return EmbeddingConditionedDiffusion(**{"encoder": encoder, **TINY, "random_state": 0, **more})


# ---- what it generates ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_model():
    X, y = load_digits(return_X_y=True)
    X = (X / 16.0).astype(np.float32)
    encoder = SelfSupervisedEncoder(hidden_sizes=(64,), max_epochs=20, random_state=0).fit(X[:1200])
    model = EmbeddingConditionedDiffusion(
        FrozenEstimator(encoder), n_pcs=30, width=128, n_blocks=2, max_epochs=80, batch_size=200,
        learning_rate=2e-3, ema_decay=0.99, random_state=0,
    )  # fmt: skip
    return model.fit(X[:1200]), X[:1200], y[:1200], X[1200:], y[1200:]


@pytest.mark.slow
def test_samples_keep_class_and_spread(digits_model):
    model, X, y, held_out, held_out_y = digits_model
    classify = KNeighborsClassifier(5).fit(X, y)
    generated = model.augment(held_out)
    of_real = classify.score(held_out, held_out_y)
    assert of_real - classify.score(generated, held_out_y) < 0.12
    assert 0.8 < spread_ratio(held_out, generated) < 1.2
    report = model.quality_report(X, y)
    assert report.label_consistency > 0.85
    assert 0.8 < report.spread_ratio < 1.2
    assert report.copy_ratio > 0.2
    # Another sample of the same row is another sample, of the same kind.
    two = model.augment(held_out[:50], 2)
    assert np.abs(two[::2] - two[1::2]).max() > 0.1
    # Without the condition samples are still digits, but of any kind.
    free = clone(model).set_params(guidance_scale=0.0)
    free.__dict__.update({k: v for k, v in vars(model).items() if k not in free.get_params()})
    unguided = free.augment(held_out)
    assert classify.score(unguided, held_out_y) < 0.4
    noise = np.random.default_rng(0).normal(X.mean(), X.std(), held_out.shape)
    assert frechet_distance(held_out, unguided) < frechet_distance(held_out, noise) / 3


@pytest.mark.slow
def test_interpolations_go_from_one_class_to_the_other(digits_model):
    model, X, y, *_ = digits_model
    zeros, ones = X[y == 0][:50], X[y == 1][:50]
    classify = KNeighborsClassifier(5).fit(X, y)
    share = [
        np.mean(classify.predict(model.interpolate(zeros, ones, alpha)) == 0)
        for alpha in (0.0, 0.5, 1.0)
    ]
    assert share[0] < 0.1
    assert share[0] <= share[1] <= share[2]
    assert share[2] > 0.9


@pytest.mark.slow
def test_strength_sets_how_far_samples_go(digits_model):
    model, X, *_ = digits_model
    distances = [
        np.linalg.norm(model.augment(X[:100], strength=s) - X[:100], axis=1).mean()
        for s in (0.05, 0.3, 0.6, 1.0)
    ]
    assert (np.diff(distances) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_spread_and_classes_of_blobs(blobs, prediction_type, beta_schedule):
    if (prediction_type, beta_schedule) == ("epsilon", "cosine"):
        pytest.skip("20 000 times the error of the first step: documented")
    X, labels = blobs
    model = EmbeddingConditionedDiffusion(
        n_pcs=8, width=64, n_blocks=2, max_epochs=150, batch_size=120, ema_decay=0.99,
        prediction_type=prediction_type, beta_schedule=beta_schedule, random_state=0,
    ).fit(X, embeddings=PCA(3).fit_transform(X))  # fmt: skip
    generated = model.sample(PCA(3).fit_transform(X))
    assert KNeighborsClassifier(5).fit(X, labels).score(generated, labels) > 0.95
    real = PCA(8).fit(X)
    spread = spread_ratio(real.transform(X), real.transform(generated))
    # Errors of a predicted noise come back multiplied by 1 / sqrt(alpha_bar) at the first step.
    assert 0.8 < spread < (1.5 if prediction_type == "epsilon" else 1.2)


# ---- options -------------------------------------------------------------------------------------

OPTIONS = [
    *({"prediction_type": p} for p in PREDICTION_TYPES),
    *({"beta_schedule": b} for b in BETA_SCHEDULES),
    *({"loss_weighting": w} for w in WEIGHTINGS),
    {"loss_norm": "l1"},
    *({"sampler": s} for s in SAMPLERS),
    {"denoiser": "mlp"},
    {"denoiser": "diffaug"},
    {"n_pcs": None},
    {"n_pcs": 1},
    {"n_pcs": 1000},
    {"n_timesteps": 50},
    {"n_timesteps": 2},
    {"n_sampling_steps": 1},
    {"condition_dropout": 0.0},
    {"condition_dropout": 0.5},
    {"condition_noise": 0.7},
    {"guidance_scale": 0.0},
    {"guidance_scale": 2.5},
    {"ema_decay": None},
    {"ema_decay": 0.0},
    {"width": 24, "n_blocks": 3},
    {"batch_size": 7},
    {"learning_rate": 1e-2},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_used(blobs, options):
    X = blobs[0][::3]
    # Longer than usual here: an untrained network predicts zero whatever it is asked.
    more = {"max_epochs": 8, "learning_rate": 3e-3}
    base = tiny(**more, prediction_type="v_prediction", beta_schedule="cosine").fit(X)
    model = tiny(**{**base.get_params(deep=False), **options}).fit(X)
    samples = model.augment(X)
    assert samples.shape == X.shape
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()
    same = all(base.get_params()[k] == v for k, v in options.items()) or options in (
        {"denoiser": "mlp"},
    )
    assert np.array_equal(samples, base.augment(X)) == same


def test_components_of_all_features_span_the_data(blobs):
    X = blobs[0]
    for n_pcs, width in ((6, 6), (None, 20), (100, 20)):
        model = tiny(n_pcs=n_pcs).fit(X)
        latents = model._latents(DenseRows(X))
        assert latents.shape == (240, width)
        np.testing.assert_allclose(np.asarray(latents).std(0, ddof=1), 1, rtol=1e-3)
        back = model._decode(latents[:]).numpy()
        error = np.abs(back - X).max()
        assert error < 1e-4 if width == 20 else error > 0.1


def test_features_without_spread_come_back_as_they_are(blobs):
    X = blobs[0].copy()
    X[:, 3] = 7.5
    for n_pcs in (None, 50):
        np.testing.assert_allclose(tiny(n_pcs=n_pcs).fit(X).sample(20)[:, 3], 7.5, atol=1e-3)


def test_wide_data_need_no_square_matrix():
    rng = np.random.default_rng(0)
    X = sp.csr_array(rng.random((40, 30_000), dtype=np.float32) * (rng.random((40, 30_000)) < 1e-3))
    model = tiny(n_pcs=None, encoder=None).fit(X)
    assert model._space["components"] is None
    assert model.sample(2).shape == (2, 30_000)


# ---- encoders ------------------------------------------------------------------------------------


def test_kinds_of_encoder(blobs):
    X = blobs[0]
    fitted = SelfSupervisedEncoder(**ENCODER, random_state=7).fit(X)
    frozen = tiny(encoder=FrozenEstimator(fitted)).fit(X)
    np.testing.assert_array_equal(frozen.transform(X), fitted.transform(X))
    own = tiny(encoder=fitted).fit(X)
    assert own.encoder_ is not fitted
    np.testing.assert_array_equal(own.transform(X), fitted.transform(X))
    automatic = tiny(encoder="auto").set_params(max_epochs=1)
    automatic.encoder_ = None
    made = automatic._make_encoder(0)
    assert type(made) is SelfSupervisedEncoder
    assert made.random_state is not None
    given = tiny(encoder=SelfSupervisedEncoder(random_state=3))._make_encoder(0)
    assert given.random_state == 3


def test_automatic_encoder_gets_what_the_model_is_given(blobs, tmp_path):
    X, calls = blobs[0][::4], []
    options = {"encoder": "auto", "max_epochs": 3, "checkpoint_dir": tmp_path}
    model = tiny(**options, callbacks=lambda epoch, history: calls.append(epoch)).fit(X)
    assert calls == [0, 1, 2, 0, 1, 2]
    assert model.encoder_.n_iter_ == model.n_iter_ == 3
    assert (tmp_path / "encoder").is_dir()
    assert model.encoder_.checkpoint_dir is None
    np.testing.assert_array_equal(model.sample(3), tiny(**options).fit(X).sample(3))
    # What suits one network does not suit another.
    default = SelfSupervisedEncoder().get_params()
    made = tiny(encoder="auto", max_epochs="auto", batch_size=7, learning_rate=0.1)._make_encoder(0)
    for name in ("max_epochs", "batch_size", "learning_rate"):
        assert getattr(made, name) == default[name]


@pytest.mark.parametrize("kind", ["auto", "given", "step"])
def test_a_resumed_fit_does_not_train_the_encoder_again(blobs, tmp_path, kind):
    X, calls = blobs[0][::4], []

    def kill(epoch, history):
        calls.append(epoch)
        if len(calls) == 3:  # after two epochs of the encoder and one of the denoiser
            raise KeyboardInterrupt

    def model(**more):
        # A given encoder keeps its own callbacks.
        encoder = "auto" if kind == "auto" else SelfSupervisedEncoder(**ENCODER, callbacks=kill)
        if kind == "step":
            encoder = make_pipeline(StandardScaler(), encoder)
        return tiny(encoder=encoder, callbacks=kill, **more)

    with pytest.raises(KeyboardInterrupt):
        model(checkpoint_dir=tmp_path).fit(X)
    resumed = model(checkpoint_dir=tmp_path).fit(X)
    assert calls == [0, 1, 0, 0, 1]
    np.testing.assert_array_equal(resumed.sample(3), model().fit(X).sample(3))
    assert calls[5:] == [0, 1, 0, 1]


def test_the_steps_of_a_pipeline_have_the_seed_of_the_fit(blobs, tmp_path):
    X = blobs[0][::4]
    encoder = make_pipeline(StandardScaler(), SelfSupervisedEncoder(**ENCODER))
    first, again = (tiny(encoder=encoder, checkpoint_dir=tmp_path).fit(X) for _ in range(2))
    np.testing.assert_array_equal(first.sample(3), again.sample(3))
    own = clone(encoder).set_params(selfsupervisedencoder__random_state=7)
    fitted = tiny(encoder=own).fit(X).encoder_
    assert fitted[-1].random_state == 7
    np.testing.assert_array_equal(fitted.transform(X), own.fit(X).transform(X))


def test_an_encoder_of_ours_seeds_its_own_parts(blobs):
    X = blobs[0][::4]
    parts = SelfSupervisedEncoder(**ENCODER), tiny(max_epochs=1)
    inner = DiffAugEM(*parts, schedule=(1, 1, 1))
    for encoder in (inner, make_pipeline(StandardScaler(), inner)):
        fitted = tiny(encoder=encoder).fit(X).encoder_
        fitted = fitted if encoder is inner else fitted[-1]
        assert fitted.random_state is not None
        assert fitted.encoder.random_state is None


def test_settings_of_torch_change_nothing(blobs, tmp_path):
    X = blobs[0][::4]
    expected = tiny().fit(X)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = tiny().fit(X)
        np.testing.assert_array_equal(found.loss_by_timestep(X), expected.loss_by_timestep(X))
        np.testing.assert_array_equal(found.augment(X[:3]), expected.augment(X[:3]))
        expected.save(tmp_path / "model")
        loaded = load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.augment(X[:3]), expected.augment(X[:3]))
    finally:
        torch.set_default_dtype(torch.float32)


class Denoiser(nn.Module):
    """A network of one's own, for six components."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, width)

    def forward(self, x_t, t, cond=None, drop=None):
        return self.layer(self.norm(x_t))


class OfTwoArguments(Denoiser):
    def forward(self, x_t, t):
        return self.layer(x_t)


def test_denoiser_of_ones_own(blobs, monkeypatch):
    X, fits = blobs[0], []
    monkeypatch.setattr(
        PCA, "fit", lambda self, X, y=None, fit=PCA.fit: fits.append(1) or fit(self, X)
    )
    with isolated_rng(0):
        good, narrow, short = Denoiser(), Denoiser(1), OfTwoArguments()
    with pytest.raises(ValueError, match=r"OfTwoArguments has forward\(x_t, t\).*drop=None"):
        tiny(encoder=PCA(3), denoiser=short).fit(X)
    assert not fits
    for encoder in (PCA(3), None):
        with pytest.raises(
            ValueError, match=r"Denoiser gave shape \(2, 1\) for x_t of shape \(2, 6\)"
        ):
            tiny(encoder=encoder, denoiser=narrow).fit(X)
    assert tiny(encoder=None, denoiser=short).fit(X).sample(2).shape == (2, 20)
    # The check takes no step: what is trained is what it would be without.
    checked = tiny(encoder=PCA(3), denoiser=good).fit(X)
    monkeypatch.setattr(diffusion_file, "check_denoiser", lambda *args: None)
    unchecked = tiny(encoder=PCA(3), denoiser=good).fit(X).module_.state_dict()
    for name, value in checked.module_.state_dict().items():
        assert torch.equal(value, unchecked[name]), name


@pytest.mark.parametrize("wrong", [{"denoiser": "unet"}, {"autoencoder": LatentAutoencoder()}])
def test_parts_that_do_not_fit_are_refused_before_the_encoder_is_trained(blobs, wrong):
    def trained(epoch, history):
        pytest.fail("the encoder was trained")

    encoder = SelfSupervisedEncoder(**ENCODER, callbacks=trained)
    with pytest.raises(ValueError, match=r"does not take vectors|is for images"):
        tiny(encoder=encoder, **wrong).fit(blobs[0])


@pytest.mark.parametrize("wrap", [np.asarray, sp.csr_matrix, pd.DataFrame, ad.AnnData])
def test_any_transformer_can_be_the_encoder(blobs, wrap):
    X = blobs[0]
    for encoder in (PCA(3), FrozenEstimator(PCA(3).fit(X)), make_pipeline(PCA(3))):
        model = tiny(encoder=encoder).fit(wrap(X))
        embedding = model.transform(wrap(X))
        assert embedding.shape == (240, 3)
        np.testing.assert_allclose(np.abs(embedding), np.abs(PCA(3).fit_transform(X)), atol=1e-3)
        assert np.isfinite(model.augment(wrap(X))).all()
        assert len(model.get_feature_names_out()) == 3


def test_columns_of_a_frozen_transformer_are_compared_by_name(blobs):
    X = pd.DataFrame(blobs[0][::4]).add_prefix("g").rename(index=str)
    encoder = FrozenEstimator(PCA(3).fit(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "X does not have valid feature names"
        model = tiny(encoder=encoder).fit(X)
        np.testing.assert_allclose(model.transform(X), encoder.transform(X), rtol=1e-4, atol=1e-5)
    found = model.transform(ad.AnnData(X.iloc[:, ::-1]))  # genes go by name
    np.testing.assert_allclose(found, encoder.transform(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="same order"):
        tiny(encoder=encoder).fit(X.iloc[:, ::-1])


def test_unconditional(blobs):
    X = blobs[0]
    model = tiny(encoder=None).fit(X)
    assert model.encoder_ is None
    samples = model.sample(7)
    assert samples.shape == (7, 20)
    np.testing.assert_array_equal(model.sample(3), samples[:3])
    assert model.augment(X, 2, strength=0.1).shape == (480, 20)
    with pytest.raises(
        ValueError, match=r"from noise alone its samples have no source.*sample\(n\)"
    ):
        model.augment(X)
    report = model.quality_report(X, blobs[1])
    assert report.label_consistency is report.class_frechet_distance is None
    assert 0.3 < report.copy_ratio < 3
    with pytest.raises(ValueError, match="unconditional: give sample"):
        model.sample(X)
    with pytest.raises(ValueError, match="no encoder of its own"):
        model.transform(X)
    with pytest.raises(ValueError, match="no encoder of its own"):
        model.interpolate(X, X)
    assert not hasattr(model, "_n_features_out")
    assert "EmbeddingConditionedDiffusion" in model._repr_html_()


def test_an_unconditional_model_that_repeats_the_data_is_seen(blobs, monkeypatch):
    X = blobs[0]
    model = tiny(encoder=None, n_pcs=None).fit(X)
    copies = torch.from_numpy(np.asarray(model._latents(DenseRows(X[::-1].copy()))))
    monkeypatch.setattr(model, "_sample_latents", lambda *_: copies, raising=False)
    report = model.quality_report(X)
    assert report.copy_ratio < 1e-3
    assert report.near_copies


def test_the_report_of_few_rows(blobs, model):
    report = model.quality_report(blobs[0][::24], blobs[1][::24])
    assert report.n_generated == 10
    assert 0 <= report.label_consistency <= 1


def test_given_embeddings(blobs):
    X, labels = blobs
    one_hot = np.eye(3)[labels]
    model = tiny().fit(X, embeddings=one_hot)
    assert model.encoder_ is None
    assert model.sample(np.eye(3)).shape == (3, 20)
    of_a_network = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(model.sample(of_a_network), model.sample(np.eye(3)))
    with pytest.raises(ValueError, match="Embed X yourself and call sample"):
        model.augment(X)
    with pytest.raises(ValueError, match=r"embeddings have 4 features.*fitted on 3"):
        model.sample(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="embeddings contains NaN"):
        model.sample(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="embeddings have 239 rows, but X has 240"):
        tiny().fit(X, embeddings=one_hot[1:])
    with pytest.raises(ValueError, match="embeddings contains NaN"):
        tiny().fit(X, embeddings=one_hot * np.nan)
    constant = tiny().fit(X, embeddings=np.ones((240, 2)))
    assert np.isfinite(constant.sample(5)).all()


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(blobs):
    return tiny(max_epochs=10).fit(blobs[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("options", [{}, {"condition_noise": 0.5}, {"guidance_scale": 1.5}])
def test_samples_belong_to_their_row(blobs, model, sampler, options):
    X = blobs[0]
    model = clone(model).set_params(sampler=sampler, **options, max_epochs=3).fit(X)
    y = model.transform(X)
    whole = model.sample(y)
    np.testing.assert_array_equal(model.sample(y[:1]), whole[:1])
    np.testing.assert_array_equal(model.sample(y[:100]), whole[:100])
    np.testing.assert_array_equal(model.sample(np.tile(y, (3, 1)))[:240], whole)
    np.testing.assert_array_equal(model.set_params(batch_size=5).sample(y), whole)
    few, many = model.sample(3), model.sample(300)
    np.testing.assert_array_equal(few, many[:3])
    half = model.augment(X, strength=0.5)
    np.testing.assert_array_equal(model.augment(X[:9], strength=0.5), half[:9])


def test_seed_of_sampling(blobs, model):
    np.testing.assert_array_equal(model.sample(4), model.sample(4))
    np.testing.assert_array_equal(model.sample(4, random_state=1), model.sample(4, random_state=1))
    assert not np.array_equal(model.sample(4, random_state=1), model.sample(4, random_state=2))
    assert model.sample().shape == (1, 20)
    assert model.sample(np.int64(2)).shape == (2, 20)
    assert len(np.unique(model.sample(50), axis=0)) == 50
    for refused in (0, -3):
        with pytest.raises(ValueError, match="must be at least 1"):
            model.sample(refused)


def test_generators_of_numpy_are_seeds(blobs, model):
    X = blobs[0][:20]
    calls = {
        "sample": lambda seed: model.sample(4, random_state=seed),
        "augment": lambda seed: model.augment(X, random_state=seed),
        "interpolate": lambda seed: model.interpolate(X, X[::-1], random_state=seed),
        "quality_report": lambda seed: model.quality_report(X, random_state=seed).to_frame(),
    }
    for name, call in calls.items():
        for kind in (np.random.RandomState, np.random.default_rng):
            generator = kind(0)
            first = np.asarray(call(generator))
            np.testing.assert_array_equal(first, np.asarray(call(kind(0))), err_msg=name)
            assert not np.array_equal(first, np.asarray(call(generator))), name
        np.testing.assert_array_equal(np.asarray(call(None)), np.asarray(call(None)), err_msg=name)
        for refused in ("a", -1, 2**32, 1.5, [1]):
            with pytest.raises(ValueError, match=r"random_state=.* must be None, an integer"):
                call(refused)


def test_augment_order_and_refusals(blobs, model):
    X = blobs[0][:5]
    three = model.augment(X, 3)
    assert three.shape == (15, 20)
    np.testing.assert_array_equal(three[::3], model.augment(X))
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="n_per_sample"):
            model.augment(X, bad)
    for bad in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="strength"):
            model.augment(X, strength=bad)
    near = model.augment(X, strength=0.001)
    assert torch.dist(model._latents(DenseRows(near))[:], model._latents(DenseRows(X))[:]) < 1.0


@pytest.mark.parametrize("sparse", [False, True])
def test_what_components_leave_out_comes_back_as_noise(blobs, sparse):
    X = np.where(blobs[0] > 0, blobs[0], 0) if sparse else blobs[0]
    given = sp.csr_matrix(X) if sparse else X
    model, smooth = (tiny(n_pcs=3, residual_noise=kind).fit(given) for kind in (True, False))
    pcs = PCA(3).fit(X)

    def left(samples):
        return samples - pcs.inverse_transform(pcs.transform(samples))

    noisy = model.sample(2000)
    np.testing.assert_allclose(left(smooth.sample(2000)), 0, atol=1e-4)
    # A standard deviation from 2 000 draws has a standard error of 1.6 %.
    np.testing.assert_allclose(left(noisy).std(axis=0), left(X).std(axis=0), rtol=0.07)
    assert 0.98 < left(noisy).std() / left(X).std() < 1.02
    # The scores are those of the smooth samples: an embedding of them does not see the noise.
    np.testing.assert_allclose(pcs.transform(noisy), pcs.transform(smooth.sample(2000)), atol=1e-4)
    # Noise of its own for each row and each seed, whatever the number of rows.
    np.testing.assert_array_equal(model.sample(30), noisy[:30])
    assert np.abs(left(model.sample(30, random_state=1)) - left(noisy[:30])).max() > 0.1
    twice = model.augment(given[:2], 2)
    assert np.abs(left(twice[0::2]) - left(twice[1::2])).max() > 0.1


def test_ends_of_interpolation(blobs, model):
    a, b = blobs[0][:6], blobs[0][-6:]
    for kind in ("slerp", "lerp"):
        np.testing.assert_array_equal(
            model.interpolate(a, b, 1.0, kind=kind), model.sample(model.transform(a))
        )
        np.testing.assert_array_equal(
            model.interpolate(a, b, 0, kind=kind), model.sample(model.transform(b))
        )
        per_row = model.interpolate(a, b, [1, 0, 1, 0, 1, 0], kind=kind)
        np.testing.assert_array_equal(per_row[0], model.interpolate(a, b, 1.0, kind=kind)[0])
        np.testing.assert_array_equal(per_row[1], model.interpolate(a, b, 0.0, kind=kind)[1])


@pytest.mark.parametrize("encoder", [None, PCA(2)])
def test_loss_by_timestep_shows_what_is_known_by_heart(encoder):
    X = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    known, new = X[:30], X[30:]
    model = tiny(encoder=encoder, width=64, n_pcs=6, max_epochs=400, learning_rate=3e-3).fit(known)
    table = model.loss_by_timestep(known, n_bins=5)
    assert table["timestep"].tolist() == [0, 200, 400, 600, 800]
    pd.testing.assert_frame_equal(model.loss_by_timestep(known, n_bins=5), table)
    assert table["loss"].sum() < 0.8 * model.loss_by_timestep(new, n_bins=5)["loss"].sum()
    if encoder is None:
        with pytest.raises(ValueError, match="unconditional"):
            model.loss_by_timestep(known, embeddings=known[:, :2])
    else:
        given = model.loss_by_timestep(known, embeddings=model.transform(known), n_bins=5)
        pd.testing.assert_frame_equal(given, table)
    for n_bins in (0, 2.5, 1001):
        with pytest.raises(ValueError, match="n_bins="):
            model.loss_by_timestep(known, n_bins=n_bins)


def test_interpolate_rows():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(20, 5)) for _ in range(2))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    middle = interpolate_rows(a, b, 0.3)
    np.testing.assert_allclose(np.linalg.norm(middle, axis=1), 1)
    angle = np.arccos((a * b).sum(1))
    np.testing.assert_allclose(np.arccos((middle * b).sum(1)), 0.3 * angle)
    for special in (a, -a, np.zeros_like(a)):
        for kind in ("slerp", "lerp"):
            assert np.isfinite(interpolate_rows(a, special, 0.5, kind)).all()
            np.testing.assert_allclose(interpolate_rows(a, special, 1, kind), a, atol=1e-12)
    np.testing.assert_allclose(interpolate_rows(a, b, 0.25, "lerp"), 0.25 * a + 0.75 * b)
    assert interpolate_rows(a.astype(np.float32), b.astype(np.float32), 0.5).dtype == np.float32
    # Several tokens, here as many as rows: each from its own start to its own end.
    a4, b4, alphas = a.reshape(4, 5, 5)[:, :4], b.reshape(4, 5, 5)[:, :4], rng.uniform(size=4)
    for kind in ("slerp", "lerp"):
        tokens = [interpolate_rows(a4[:, j], b4[:, j], alphas, kind) for j in range(4)]
        np.testing.assert_array_equal(interpolate_rows(a4, b4, alphas, kind), np.stack(tokens, 1))
    for alpha in (-0.1, 1.1, np.nan, [0.5, 0.5], np.full((20, 1), 0.5)):
        with pytest.raises(ValueError, match="alpha must be"):
            interpolate_rows(a, b, alpha)
    with pytest.raises(ValueError, match="differ in shape"):
        interpolate_rows(a, b[1:], 0.5)
    with pytest.raises(ValueError, match="kind must be"):
        interpolate_rows(a, b, 0.5, "cubic")


def test_conditions_to_draw_from_are_embeddings_of_training_rows(blobs, monkeypatch):
    monkeypatch.setattr(diffusion_file, "_POOL", 10)
    model = tiny().fit(blobs[0])
    y = model.transform(blobs[0])
    assert model._pool.shape == (10, 4)
    assert all((row == y).all(axis=1).any() for row in model._pool)


def test_quality_report(blobs, model):
    report = model.quality_report(blobs[0], blobs[1])
    assert 0 <= report.label_consistency <= 1
    assert report.to_frame().shape[0] >= 1
    assert "copy" in str(report)
    again = model.quality_report(blobs[0], blobs[1])
    assert report.to_frame().equals(again.to_frame())
    without = model.quality_report(blobs[0])
    assert without.spread_ratio == report.spread_ratio


def test_quality_report_draws_rows_of_large_sets(blobs, model, monkeypatch):
    X, y = (np.tile(part, (2100 // len(part) + 1,) + (1,) * (part.ndim - 1))[:2100]
            for part in blobs)  # fmt: skip
    report = model.quality_report(X, y)
    assert report.n_generated == report.n_real == 2000
    assert report.real_label_consistency > 0.9
    # Labels that are wrong are refused before the samples are generated.
    monkeypatch.delattr(type(model), "_sample_latents")
    with pytest.raises(ValueError, match="labels has 3 labels for 2100 samples"):
        model.quality_report(X, y[:3])


def test_sampling_touches_no_state(blobs, model):
    before = {k: v.clone() for k, v in model.module_.state_dict().items()}
    names = set(vars(model))
    model.sample(3)
    model.augment(blobs[0][:3])
    assert set(vars(model)) == names
    assert not model.module_.training
    assert all(torch.equal(v, before[k]) for k, v in model.module_.state_dict().items())


def test_a_frozen_autoencoder_of_other_channels_is_refused():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    options = {"downsampling": 2, "block_out_channels": (8, 8), "max_epochs": 1}
    frozen = FrozenEstimator(LatentAutoencoder(**options).fit(colour))
    model = EmbeddingConditionedDiffusion(None, autoencoder=frozen, max_epochs=1)
    with pytest.raises(ValueError, match="X has 1 channels, but the autoencoder was fitted on 3"):
        model.fit(colour[..., 0])


@pytest.mark.parametrize("n_pcs", ["auto", None])
@pytest.mark.parametrize("case", ["large constant", "tiny", "large column"])
def test_units_of_the_features_are_their_own(n_pcs, case):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4))
    if case == "large constant":
        X = np.column_stack([X, np.full(300, 1e9)])
    elif case == "large column":
        X = np.column_stack([X, 1e7 + 1e6 * rng.normal(size=300)])
    elif case == "tiny":
        X = X * 1e-8
    if n_pcs == "auto":
        n_pcs = EmbeddingConditionedDiffusion().n_pcs
    model = EmbeddingConditionedDiffusion(None, n_pcs=n_pcs, width=16, max_epochs=1, random_state=0)
    rows = DenseRows(X)
    space = model.fit(X)._space_of()
    whitened = np.asarray(space.encode(rows))
    inside = whitened.std(axis=0)
    assert ((np.abs(inside - 1) < 0.01) | (inside < 1e-3)).all()
    assert (np.abs(inside - 1) < 0.01).sum() >= 4
    back = space.decode(torch.from_numpy(whitened)).numpy()
    scale = np.where(X.std(axis=0) > 0, X.std(axis=0), 1e9)
    assert (np.abs(back - X) <= 1e-3 * scale + 1e-6 * np.abs(X)).all()


def test_statistics_of_conditions_far_from_zero():
    rng = np.random.default_rng(0)
    embeddings = np.column_stack([np.full(300_000, 7.7), 1000 + rng.normal(size=300_000)])
    X = rng.normal(size=(300_000, 2)).astype(np.float32)
    options = {"width": 8, "n_blocks": 1, "max_epochs": 1, "batch_size": 100_000}
    model = EmbeddingConditionedDiffusion(None, random_state=0, **options)
    condition = model.fit(X, embeddings=embeddings.astype(np.float32))._condition
    np.testing.assert_allclose(condition["mean"], [7.7, 1000], rtol=1e-5)
    np.testing.assert_allclose(condition["std"], [1, 1], rtol=0.01)


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_integers_are_interpolated_too(kind):
    a, b = np.array([[4, 0]]), np.array([[0, 4]])
    middle = interpolate_rows(a, b, 0.5, kind)
    np.testing.assert_allclose(middle, interpolate_rows(a * 1.0, b * 1.0, 0.5, kind), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "width", "noise"),
    [((60, 6), 9, 0.3), ((60, 6), 3, 0.0), ((1_001, 6), 9, 0.0), ((8, 8, 8, 1), 9, 0.0)],
)
def test_few_vectors_are_generated_from_a_blurred_condition(shape, width, noise, tmp_path):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    X = X if len(shape) == 2 else (255 / (1 + np.exp(-X))).astype(np.uint8)
    given = np.random.default_rng(1).normal(size=(len(X), width)).astype(np.float32)
    size = {"width": 16} if len(shape) == 2 else {"block_out_channels": (8, 8)}
    options = {"max_epochs": 4, "n_sampling_steps": 2, "random_state": 0, **size}
    auto = EmbeddingConditionedDiffusion(**options).fit(X, embeddings=given)
    same = clone(auto).set_params(condition_noise=noise).fit(X, embeddings=given)
    samples = same.sample(given[:5])
    np.testing.assert_array_equal(auto.sample(given[:5]), samples)
    auto.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.sample(given[:5]), samples)
    other = same.set_params(condition_noise=0.8).sample(given[:5])
    assert not np.array_equal(other, samples)


def _small(**options):
    options = {"max_epochs": 3, "width": 16, "n_blocks": 1, "random_state": 0} | options
    return EmbeddingConditionedDiffusion(None, device="cpu", precision="fp32", **options)


def test_validation_loss_is_that_of_held_out_rows_and_moves_nothing():
    X = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    model = _small(validation_fraction=0.25).fit(X)
    train, held = model._hold_out(60, 0)
    assert len(held) == 15
    assert set(train) | set(held) == set(range(60))
    assert not set(train) & set(held)
    # The same as a fit that never saw those rows.
    alone = _small().fit(X[train])
    assert "validation_loss" not in alone.history_
    assert (alone.history_["loss"] == model.history_["loss"]).all()
    for ours, theirs in zip(model.module_.parameters(), alone.module_.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    space = alone._space_of()
    seed = alone._child_seed(alone._child_seed(0, 0), 0)  # another stream
    order = make_batches(
        space.encode(DenseRows(X[held])), batch_size=45, seed=model._child_seed(0, 2), device="cpu"
    )
    (x0,) = next(iter(order.epoch(0)))
    values = []
    for own in (mix_seed(0, 5, 0, 0), seed):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(own)
            values.append(alone._diffusion().loss(alone.module_, space.inside(x0))["loss"].item())
    found = model.history_["validation_loss"].iloc[-1]
    assert found == pytest.approx(values[0], rel=1e-5)
    assert found != pytest.approx(values[1], rel=1e-5)


def test_validation_loss_resumes_and_stops(tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    whole = _small(validation_fraction=0.25).fit(X)

    def kill(epoch, history):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _small(validation_fraction=0.25, checkpoint_dir=tmp_path, callbacks=kill).fit(X)
    resumed = _small(validation_fraction=0.25, checkpoint_dir=tmp_path).fit(X)
    assert resumed.history_.equals(whole.history_)
    stop = EarlyStopping("validation_loss", patience=2, min_delta=100.0)
    stopped = _small(validation_fraction=0.25, max_epochs=9, callbacks=stop).fit(X)
    assert stopped.n_iter_ == 3


def test_validation_needs_rows():
    X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for fraction in (0.01, 0.9):
        with pytest.raises(ValueError, match="validation_fraction"):
            _small(validation_fraction=fraction).fit(X)
