"""HistoDiffusion: guidance against closed forms, what stays frozen, selection, containers."""

import copy
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import check_param_validation, parametrize_with_checks

import diffaugkit
from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder, SelfSupervisedEncoder
from diffaugkit.diffusion import Diffusion, row_noise
from diffaugkit.histo_augmenter import HistoDiffusionAugmenter
from diffaugkit.histo_networks import LatentClassifier, class_gradient, classifier_guided
from diffaugkit.runtime import isolated_rng

DIFFUSION = {"width": 8, "n_blocks": 1, "n_pcs": 4, "max_epochs": 2, "random_state": 0}
UNET = {"block_out_channels": (8, 8), "max_epochs": 1, "random_state": 0}


def tiny(diffusion=None, encoder=None, **more):
    diffusion = diffusion or EmbeddingConditionedDiffusion(None, **DIFFUSION)
    options = {"width": 8, "n_sampling_steps": 2, "max_epochs": 2, "ratio": 1.0}
    return HistoDiffusionAugmenter(diffusion, encoder, **{**options, "random_state": 0, **more})


@pytest.fixture(scope="module")
def pretrained(blobs):
    """A generator of the blobs that is good enough to be guided."""
    options = {"width": 64, "n_pcs": 4, "max_epochs": 150, "random_state": 0}
    return EmbeddingConditionedDiffusion(None, **options).fit(blobs[0])


@pytest.fixture(scope="module")
def labelled(blobs):
    """Eight rows of each class."""
    return blobs[0][::10], np.array(["a", "b", "c"])[blobs[1][::10]]


def test_quality_report(pretrained, labelled, tmp_path):
    X, y = labelled
    model = tiny(FrozenEstimator(pretrained), selection="random").fit(X, y)
    with pytest.raises(NotFittedError):
        model.quality_report_  # noqa: B018
    made, _ = model.fit_resample(X, y)
    report = model.quality_report_
    assert (report.n_generated, report.n_real) == (len(made) - len(X), len(X))
    assert set(report.class_frechet_distance) == {"a", "b", "c"}
    assert 0 <= report.label_consistency <= 1
    model.save(tmp_path / "model")
    assert diffaugkit.load(tmp_path / "model").quality_report_ == report


def test_a_frozen_generator_of_images_reads_flattened_ones():
    X = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    y = np.arange(24) % 2
    generator = EmbeddingConditionedDiffusion(None, max_epochs=1, n_sampling_steps=2).fit(X)
    model = tiny(FrozenEstimator(generator), selection="random")
    expected, _ = model.fit_resample(X, y)
    model.set_params(image_shape=(8, 8, -1))
    found, _ = model.fit_resample(X.reshape(24, -1), y)
    np.testing.assert_array_equal(found, expected.reshape(len(expected), -1))


@pytest.fixture(scope="module")
def fitted(pretrained, labelled):
    augmenter = tiny(FrozenEstimator(pretrained), width=16, max_epochs=600, n_sampling_steps=20)
    return augmenter.fit(*labelled)


@pytest.fixture(scope="module")
def images():
    """Bright left or bright right halves: (24, 8, 8, 1) uint8, and their labels."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 60, size=(24, 8, 8, 1))
    y = np.arange(24) % 2
    X[y == 0, :, :4] += 180
    X[y == 1, :, 4:] += 180
    return X.astype(np.uint8), y


@pytest.fixture(scope="module")
def latent(images):
    """A generator of latents."""
    autoencoder = LatentAutoencoder(
        downsampling=2, block_out_channels=(8, 8), max_epochs=2, random_state=0
    )
    return EmbeddingConditionedDiffusion(None, autoencoder=autoencoder, **UNET).fit(images[0])


# ---- guidance ------------------------------------------------------------------------------------


class Mixture:
    """Two Gaussians of equal spread, whose score and class posterior are known at every level."""

    prior, means, spread = np.array([0.3, 0.7]), np.array([[-2.0, 0.5], [1.0, -1.0]]), 0.4

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self.alpha_bar = diffusion._alpha_bar64.numpy()

    def log_joint(self, x, level):
        """Give log p(y) p(x_t | y) up to a constant, (B, 2); NumPy or torch."""
        variance = level * self.spread**2 + 1 - level
        square = ((x[:, None] - level**0.5 * self._like(self.means, x)) ** 2).sum(-1)
        return self._like(np.log(self.prior), x) - square / (2 * variance)

    def epsilon(self, x, level):
        """Noise that the best denoiser predicts: -sigma times the score."""
        joint = self.log_joint(x, level)
        if isinstance(x, torch.Tensor):
            share = joint.softmax(1)
        else:
            share = np.exp(joint - joint.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
        centre = level**0.5 * share @ self._like(self.means, x)
        return (1 - level) ** 0.5 * (x - centre) / (level * self.spread**2 + 1 - level)

    def gradient(self, x, level, y):
        """Gradient of log p(y | x_t), in closed form."""
        joint = self.log_joint(x, level)
        share = np.exp(joint - joint.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        variance = level * self.spread**2 + 1 - level
        return level**0.5 * (self.means[y] - share @ self.means) / variance

    def denoiser(self, x, t, cond=None, drop=None):
        level = float(self.alpha_bar[int(t[0])])
        eps = self.epsilon(x.double(), level)
        signal, sigma = level**0.5, (1 - level) ** 0.5
        x0 = (x - sigma * eps) / signal
        kinds = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - sigma * x0}
        return kinds[self.diffusion.prediction_type]

    def classifier(self, x, t):
        return self.log_joint(x.double(), float(self.alpha_bar[int(t[0])]))

    def ddim(self, noise, timesteps, y=None, scale=0.0):
        """Guided DDIM (Dhariwal and Nichol 2021, Algorithm 2) in float64."""
        x = noise.astype(np.float64)
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            level = self.alpha_bar[t]
            eps = self.epsilon(x, level)
            if scale:
                eps = eps - (1 - level) ** 0.5 * scale * self.gradient(x, level, y)
            x0 = (x - (1 - level) ** 0.5 * eps) / level**0.5
            following = 1.0 if after is None else self.alpha_bar[after]
            x = following**0.5 * x0 + (1 - following) ** 0.5 * eps
        return x

    @staticmethod
    def _like(values, x):
        return torch.from_numpy(values).to(x) if isinstance(x, torch.Tensor) else values


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_ddim_is_the_closed_form(kind, scale):
    diffusion = Diffusion(beta_schedule="linear", prediction_type=kind)
    mixture, noise = Mixture(diffusion), row_noise((2,), 0, range(400))
    y = torch.arange(400) % 2
    guided = classifier_guided(mixture.denoiser, mixture.classifier, y, scale, diffusion)
    found = diffusion.sample(guided, noise, n_steps=40).numpy()
    expected = mixture.ddim(noise.numpy(), diffusion.timesteps(40), y.numpy(), scale)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    # Without guidance the shares are the prior's; with Bayes' scale each class has its own mean.
    free = mixture.ddim(noise.numpy(), diffusion.timesteps(40))
    share = (mixture.log_joint(free, 1 - 1e-9).argmax(1) == 0).mean()
    assert abs(share - 0.3) < 0.06
    for k in range(2):
        own = found[y.numpy() == k]
        assert (mixture.log_joint(own, 1 - 1e-9).argmax(1) == k).all()
        if scale == 1:
            np.testing.assert_allclose(own.mean(0), mixture.means[k], atol=0.08)
            np.testing.assert_allclose(own.std(0), mixture.spread, atol=0.08)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_gradient_is_the_posteriors(schedule):
    diffusion = Diffusion(beta_schedule=schedule)
    mixture = Mixture(diffusion)
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    for timestep in (0, 200, 700, 999):
        t = torch.full((30,), timestep)
        with torch.no_grad():
            found = class_gradient(mixture.classifier, torch.from_numpy(x), t, torch.from_numpy(y))
        expected = mixture.gradient(x, mixture.alpha_bar[timestep], y)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "units"), [((5,), None), ((5,), np.geomspace(1, 0.1, 5)), ((2, 9, 7), None)]
)
@pytest.mark.parametrize("timed", [True, False])
def test_gradient_of_the_network_against_float64_differences(shape, units, timed):
    diffusion = Diffusion(beta_schedule="cosine")
    with isolated_rng(0):
        network = LatentClassifier(shape, 3, diffusion.alpha_bar, width=8, timed=timed, units=units)
        torch.nn.init.normal_(network.head.weight)
        x, direction = torch.randn(4, *shape).double(), torch.randn(4, *shape).double()
    network = network.double().eval()
    t, y = torch.tensor([0, 300, 700, 999]), torch.tensor([0, 1, 2, 1])

    def log_p(x):
        return network(x, t).log_softmax(1).gather(1, y[:, None])[:, 0]

    with torch.no_grad():
        slope = (log_p(x + 1e-6 * direction) - log_p(x - 1e-6 * direction)) / 2e-6
    found = class_gradient(network, x, t, y)
    np.testing.assert_allclose((found * direction).flatten(1).sum(1), slope, atol=1e-7)
    # It fades with the signal, so that a prediction of v or of the sample stays finite.
    size = (found.flatten(1).norm(dim=1) / diffusion.alpha_bar[t].sqrt()).numpy()
    assert found[3].norm() < 1e-3
    assert (size < 100).all()


def test_large_images_cost_little_more_than_smaller_ones():
    def multiplications(side):
        with isolated_rng(0):
            network = LatentClassifier((3, side, side), 2, torch.ones(1), timed=False).eval()
        found = []
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(
                    lambda layer, _, out: found.append(layer.weight.numel() * out[0, 0].numel())
                )
        with torch.no_grad():
            network(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64))
        return sum(found)

    # 16 times the pixels.
    assert multiplications(256) < 3 * multiplications(64)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (64, 4), (256, 2), (65, 65)])
def test_classifiers_of_images_of_any_size(size):
    with isolated_rng(0):
        network = LatentClassifier((1, *size), 2, torch.ones(1), width=24, timed=False).eval()
    assert network(torch.zeros(3, 1, *size), torch.zeros(3, dtype=torch.int64)).shape == (3, 2)


def test_a_row_of_the_gradient_is_its_own():
    with isolated_rng(0):
        network = LatentClassifier((2, 8, 8), 3, torch.linspace(1, 0.1, 10), width=8).eval()
        torch.nn.init.normal_(network.head.weight)
        x = torch.randn(6, 2, 8, 8)
    t, y = torch.arange(6), torch.arange(6) % 3
    whole = class_gradient(network, x, t, y)
    part = class_gradient(network, x[2:4], t[2:4], y[2:4])
    np.testing.assert_allclose(part, whole[2:4], atol=1e-6)
    with pytest.raises(ValueError, match="this classifier takes"):
        network(x[:, :1], t)


def test_scale_0_is_the_generator_itself(pretrained, fitted, labelled):
    plain = copy.deepcopy(pretrained).set_params(sampler="ddim", n_sampling_steps=20)
    free = copy.deepcopy(fitted).set_params(guidance_scale=0.0)
    y = np.repeat(["a", "b"], 4)
    free.module_.register_forward_pre_hook(lambda *_: pytest.fail("no gradient is needed"))
    np.testing.assert_array_equal(free.sample(y, random_state=5), plain.sample(8, random_state=5))
    assert not np.allclose(fitted.sample(y, random_state=5), free.sample(y, random_state=5))


def test_each_row_has_the_scale_of_its_class():
    diffusion = Diffusion(beta_schedule="cosine", prediction_type="v_prediction")
    with isolated_rng(0):
        network = LatentClassifier((2, 8, 8), 3, diffusion.alpha_bar, width=8).eval()
        torch.nn.init.normal_(network.head.weight)
        x = torch.randn(6, 2, 8, 8)
    t, y = torch.full((6,), 400), torch.arange(6) % 3

    def own(z_t, t):
        return torch.zeros_like(z_t)

    scales = torch.tensor([0.0, 1.0, 8.0])
    found = classifier_guided(own, network, y, scales[y], diffusion)(x, t)
    for row, scale in enumerate(scales[y].tolist()):
        alone = classifier_guided(own, network, y[[row]], scale, diffusion)(x[[row]], t[[row]])
        torch.testing.assert_close(found[[row]], alone)
    assert (found[[0, 3]] == 0).all()


def test_guidance_is_as_strong_as_each_class_needs(pretrained, labelled, tmp_path):
    X, y = labelled
    given = tiny(FrozenEstimator(pretrained), guidance_scale=3).fit(X, y)
    assert given.guidance_scale_.tolist() == [3, 3, 3]
    judge = KNeighborsClassifier(3).fit(X, y)
    asked = np.repeat(["a", "b", "c"], 60)

    def right(model):
        return (judge.predict(model.sample(asked)) == asked).reshape(3, 60).mean(axis=1)

    found = []
    for max_epochs in (15, 600):  # 15 learn little
        model = tiny(
            FrozenEstimator(pretrained), width=16, max_epochs=max_epochs, n_sampling_steps=20
        )
        model.fit(X, y)
        assert set(model.guidance_scale_) <= {1, 2, 4, 8, 16}
        plain = copy.deepcopy(model).set_params(guidance_scale=1.0)
        raised = model.guidance_scale_ > 1
        assert (right(model)[~raised] >= 0.8).all()
        assert (right(model)[raised] > right(plain)[raised]).all()
        found.append(model)
    assert found[0].guidance_scale_.sum() > found[1].guidance_scale_.sum()
    assert (right(found[1]) >= 0.9).all()
    found[0].save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.sample(asked), found[0].sample(asked))


def test_guidance_brings_the_class_asked_for(blobs, fitted):
    judge = KNeighborsClassifier(5).fit(blobs[0], np.array(["a", "b", "c"])[blobs[1]])
    y = np.repeat(["a", "b", "c"], 60)
    free = copy.deepcopy(fitted).set_params(guidance_scale=0.0)
    assert (judge.predict(free.sample(y)) == y).mean() < 0.5
    assert (judge.predict(fitted.sample(y)) == y).mean() > 0.9
    strong = copy.deepcopy(fitted).set_params(guidance_scale=2.0)
    assert (judge.predict(strong.sample(y)) == y).mean() > 0.95


def test_samples_do_not_depend_on_their_neighbours(fitted):
    y = np.array(["a", "c", "b", "a"] * 80)
    whole = fitted.sample(y)
    np.testing.assert_array_equal(fitted.sample(y[:1]), whole[:1])
    np.testing.assert_array_equal(fitted.sample(y[:3]), whole[:3])
    other = np.where(np.arange(320) == 3, y, "b")
    np.testing.assert_array_equal(fitted.sample(other)[3], whole[3])
    smaller = copy.deepcopy(fitted).set_params(batch_size=3)
    np.testing.assert_array_equal(smaller.sample(y), whole)
    assert not np.array_equal(fitted.sample(y, random_state=1), whole)


def test_sample_refuses_unknown_classes(fitted):
    with pytest.raises(ValueError, match=r"classes of fit.*got \['d'\]"):
        fitted.sample(["a", "d"])
    with pytest.raises(NotFittedError):
        tiny().sample([0])


# ---- what is trained and what is not -------------------------------------------------------------


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_encoder_and_diffusion_stay_bit_identical(images, latent):
    X, y = images
    denoiser, whole = weights(latent.module_), weights(latent.autoencoder_.module_)
    augmenter = tiny(FrozenEstimator(latent), decoder_epochs=2).fit(X, y)
    assert augmenter.diffusion_.estimator is latent
    assert same(weights(latent.module_), denoiser)
    assert same(weights(latent.autoencoder_.module_), whole)
    tuned = weights(augmenter.autoencoder_.module_)
    moved = {name for name in whole if not torch.equal(tuned[name], whole[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"decoder", "post_quant_conv"}
    np.testing.assert_array_equal(augmenter.autoencoder_.latents(X), latent.autoencoder_.latents(X))
    phases = list(dict.fromkeys(augmenter.history_["phase"]))
    assert phases == ["auxiliary", "decoder", "classifier"]
    assert augmenter.n_iter_ == len(augmenter.history_) == 6
    for parameter in latent.autoencoder_.module_.parameters():
        assert parameter.requires_grad


def test_tuning_brings_the_reconstructions_nearer(images, latent):
    X, y = images
    tuned = tiny(FrozenEstimator(latent), decoder_epochs=30, decoder_learning_rate=1e-3).fit(X, y)
    assert tuned.autoencoder_.score(X) > latent.autoencoder_.score(X) + 1
    off = tiny(FrozenEstimator(latent), tune_decoder=False).fit(X, y)
    assert list(off.history_["phase"].unique()) == ["classifier"]
    assert same(weights(off.autoencoder_.module_), weights(latent.autoencoder_.module_))
    without = tiny(FrozenEstimator(latent), auxiliary_weight=0.0, decoder_epochs=1).fit(X, y)
    assert list(without.history_["phase"].unique()) == ["decoder", "classifier"]


def test_perceptual_term_of_the_autoencoder_is_kept(images):
    X, y = images
    with isolated_rng(0):
        features = torch.nn.Conv2d(1, 4, 3)
    autoencoder = LatentAutoencoder(
        kind="vq", downsampling=2, block_out_channels=(8, 8), n_codes=8, max_epochs=1,
        perceptual=features,
    )  # fmt: skip
    diffusion = EmbeddingConditionedDiffusion(None, autoencoder=autoencoder, **UNET)
    augmenter = tiny(diffusion, decoder_epochs=1).fit(X, y)
    decoder = augmenter.history_.query("phase == 'decoder'")
    assert (decoder["perceptual"] > 0).all()
    before = weights(augmenter.diffusion_.autoencoder_.module_)
    moved = weights(augmenter.autoencoder_.module_)
    assert torch.equal(before["quantize.embedding.weight"], moved["quantize.embedding.weight"])


def test_classifier_of_clean_latents(labelled, pretrained):
    augmenter = tiny(FrozenEstimator(pretrained), noised_classifier=False, max_epochs=30)
    augmenter.fit(*labelled)
    z, t = torch.zeros(3, 4), torch.tensor([0, 500, 999])
    with torch.no_grad():
        logits = augmenter.module_(z, t)
    assert torch.equal(logits[0], logits[2])  # it is not told the noise level
    assert augmenter.history_["accuracy"].iloc[-1] > 0.9
    assert np.isfinite(augmenter.sample(["a", "b"])).all()


def test_the_pool_trains_the_generator(blobs, labelled):
    X, y = labelled
    with_pool = tiny().fit(X, y, unlabeled=blobs[0])
    alone = EmbeddingConditionedDiffusion(None, **DIFFUSION).fit(blobs[0])
    assert same(weights(with_pool.diffusion_.module_), weights(alone.module_))
    assert not same(weights(tiny().fit(X, y).diffusion_.module_), weights(alone.module_))
    with pytest.raises(ValueError, match="diffusion is frozen"):
        tiny(FrozenEstimator(alone)).fit(X, y, unlabeled=blobs[0])
    with pytest.raises(NotFittedError):
        tiny(FrozenEstimator(EmbeddingConditionedDiffusion(None))).fit(X, y)


def test_auto_generator(images, blobs, monkeypatch):
    X, y = images
    fitted = []

    def stop(self, X, y=None):
        fitted.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddingConditionedDiffusion, "fit", stop)
    large = np.repeat(np.repeat(X, 6, axis=1), 6, axis=2)
    for data, labels in ((X, y), (large, y), blobs):
        with pytest.raises(KeyboardInterrupt):
            HistoDiffusionAugmenter(random_state=0).fit(data, labels)
    kinds = [type(part.autoencoder) for part in fitted]
    assert kinds == [type(None), LatentAutoencoder, type(None)]
    assert all(part.encoder is None for part in fitted)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_reading_that_is_not_the_generators_is_refused(labelled, frozen):
    X, y = labelled
    generator = EmbeddingConditionedDiffusion(None, layer="scaled", **DIFFUSION)
    adata = ad.AnnData(np.zeros_like(X), layers={"scaled": X, "other": X})
    if frozen:
        generator = FrozenEstimator(generator.fit(adata))
    with pytest.raises(ValueError, match="layer='other', but the diffusion model has layer='scal"):
        tiny(generator, layer="other").fit(adata, y)
    images = np.random.default_rng(0).random((24, 64), dtype=np.float32)
    generator = EmbeddingConditionedDiffusion(None, image_shape=(8, 8, 1), **UNET)
    if frozen:
        generator = FrozenEstimator(generator.fit(images))
    with pytest.raises(ValueError, match=r"=\(4, 16, 1\), but .*=\(8, 8, 1\)"):
        tiny(generator, image_shape=(4, 16, 1)).fit(images, y)
    tiny(generator, image_shape=(8, -1, 1)).fit(images, y)


# ---- selection -----------------------------------------------------------------------------------


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_vectors_are_judged_in_units_of_the_data(blobs, labelled, pretrained):
    X, y = labelled
    augmenter = tiny(FrozenEstimator(pretrained), guidance_scale=1.0).fit(X, y)
    scores = PCA(4).fit(blobs[0]).transform(np.concatenate([X, blobs[0]]).astype(np.float64))
    scores = unit(scores)
    centroids = np.stack([scores[:24][y == c].mean(0) for c in "abc"])
    expected = np.linalg.norm(scores[24:, None] - centroids, axis=2)
    np.testing.assert_allclose(augmenter.centroid_distances(blobs[0]), expected, atol=1e-4)


def test_models_that_were_saved_before_are_judged_by_their_classifier(
    labelled, pretrained, tmp_path
):
    X, y = labelled
    model = tiny(FrozenEstimator(pretrained), guidance_scale=1.0).fit(X, y)
    del model._judge, model.guidance_scale_  # their files have neither
    model.module_.units = None  # and their classifiers read whitened vectors
    samples = model.sample(y)
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.sample(y), samples)
    z = loaded._space().encode(pretrained._check_rows(X))[np.arange(len(X))]
    with torch.no_grad():
        features = loaded.module_.features(z, torch.zeros(len(z), dtype=torch.int64))
    features = unit(features.double().numpy())
    loaded.centroids_ = np.stack([features[y == c].mean(0) for c in "abc"])
    expected = np.linalg.norm(features[:, None] - loaded.centroids_, axis=2)
    np.testing.assert_allclose(loaded.centroid_distances(X), expected, atol=1e-5)


def test_images_are_judged_by_what_the_generator_knows_without_labels(images, latent):
    X, y = images
    unconditional = EmbeddingConditionedDiffusion(None, **UNET).fit(X)
    for generator in (latent, unconditional):
        augmenter = tiny(FrozenEstimator(generator), guidance_scale=1.0).fit(X, y)
        other = copy.deepcopy(augmenter)
        with torch.no_grad():  # the classifier has no say
            for parameter in other.module_.parameters():
                parameter.zero_()
        distances = augmenter.centroid_distances(X)
        np.testing.assert_array_equal(other.centroid_distances(X), distances)
        np.testing.assert_allclose(augmenter.centroid_distances(X[:5]), distances[:5], atol=1e-5)

    # By the formula: quarters and spread of the middle of the U-Net at T / 20, standardised.
    seen, x = [], torch.from_numpy(X).permute(0, 3, 1, 2) / 127.5 - 1
    unet = unconditional.module_.unet
    with unet.mid_block.register_forward_hook(lambda _, args, out: seen.append(out.double())):
        with torch.no_grad():
            unet(x, 50)
    h = seen[0].numpy()  # (24, 8, 4, 4)
    quarters = h.reshape(24, 8, 2, 2, 2, 2).mean(axis=(3, 5)).reshape(24, -1)
    features = np.concatenate([quarters, h.std(axis=(2, 3))], axis=1)
    features = unit((features - features.mean(0)) / features.std(0))
    centroids = np.stack([features[y == k].mean(0) for k in range(2)])
    expected = np.linalg.norm(features[:, None] - centroids, axis=2)
    np.testing.assert_allclose(distances, expected, atol=1e-3)


def test_selection_against_its_definition(blobs, labelled, pretrained):
    X, y = labelled
    encoder = PCA(3, random_state=0).fit(blobs[0])
    augmenter = tiny(
        FrozenEstimator(pretrained), FrozenEstimator(encoder), ratio=2.0, guidance_scale=0.3,
        n_candidates=3.0, n_sampling_steps=10, max_epochs=20,
    )  # fmt: skip
    X_more, y_more = augmenter.fit_resample(X, y)
    real = unit(encoder.transform(X).astype(np.float64))
    centroids = np.stack([real[y == c].mean(0) for c in "abc"])
    np.testing.assert_allclose(augmenter.centroids_, centroids, atol=1e-6)
    np.testing.assert_array_equal(X_more[: len(X)], X)
    made, labels = X_more[len(X) :], y_more[len(X) :]
    features = unit(encoder.transform(made).astype(np.float64))
    distances = np.linalg.norm(features[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(np.array(list("abc"))[distances.argmin(1)], labels)
    table = augmenter.selection_.set_index("class")
    for k, c in enumerate("abc"):
        own = distances[labels == c, k]
        assert (np.diff(own) >= 0).all()
        row = table.loc[c]
        assert row["kept"] == len(own) == row["wanted"] == 16
        assert row["candidates"] % 48 == 0
        assert row["kept"] <= row["right_centroid"] <= row["candidates"]
        np.testing.assert_allclose(row["distance_kept"], own.mean())
        assert row["distance_kept"] < row["distance_rejected"]
        np.testing.assert_allclose(
            row["distance_real"], np.linalg.norm(real[y == c] - centroids[k], axis=1).mean()
        )
        # The first candidates of the class, in the order of the paper's rule.
        seed = diffaugkit.runtime.mix_seed(augmenter._sampling_seed, k, 0)
        drawn = augmenter._generate(np.full(48, k), seed)
        far = np.linalg.norm(
            unit(encoder.transform(drawn).astype(np.float64))[:, None] - centroids, axis=2
        )
        if row["candidates"] == 48:
            picked = np.argsort(np.where(far.argmin(1) == k, far[:, k], np.inf), kind="stable")
            np.testing.assert_array_equal(made[labels == c], drawn[picked[:16]])
    examples = augmenter.selection_examples()
    assert set(examples) == set("abc")
    np.testing.assert_array_equal(examples["a"]["kept"], made[labels == "a"][:8])
    assert examples["a"]["rejected"].shape == (8, 20)
    sources = augmenter.sample_indices_
    np.testing.assert_array_equal(sources[: len(X)], np.arange(len(X)))
    np.testing.assert_array_equal(y[sources], y_more)


def test_consistent_selection_keeps_the_first_on_the_right_side(labelled, pretrained):
    X, y = labelled
    augmenter = tiny(
        FrozenEstimator(pretrained), ratio=0.5, n_candidates=6.0, n_sampling_steps=10,
        max_epochs=20, selection="consistent",
    )  # fmt: skip
    X_more, y_more = augmenter.fit_resample(X, y)
    made, labels = X_more[len(X) :], y_more[len(X) :]
    n_dropped = 0
    for k, c in enumerate("abc"):
        seed = diffaugkit.runtime.mix_seed(augmenter._sampling_seed, k, 0)
        drawn = augmenter._generate(np.full(24, k), seed)
        right = augmenter.centroid_distances(drawn).argmin(axis=1) == k
        n_dropped += int((~right).sum())
        assert right.sum() >= 4
        np.testing.assert_array_equal(made[labels == c], drawn[right][:4])
    assert n_dropped > 0


def test_centroid_distances_against_numpy(blobs, labelled, pretrained):
    X, y = labelled
    encoder = PCA(3, random_state=0).fit(blobs[0])
    fitted = tiny(FrozenEstimator(pretrained), FrozenEstimator(encoder)).fit(X, y)
    features = unit(encoder.transform(blobs[0]).astype(np.float64))
    real = unit(encoder.transform(X).astype(np.float64))
    centroids = np.stack([real[y == c].mean(0) for c in "abc"])
    expected = np.linalg.norm(features[:, None] - centroids, axis=2)
    np.testing.assert_allclose(fitted.centroid_distances(blobs[0]), expected, atol=1e-6)
    with pytest.raises(ValueError, match="features"):
        fitted.centroid_distances(X[:, :3])
    with pytest.raises(NotFittedError):
        HistoDiffusionAugmenter().centroid_distances(X)


def test_random_selection_keeps_what_comes_first(fitted, labelled):
    augmenter = clone(fitted).set_params(selection="random", ratio=0.5)
    X_more, y_more = augmenter.fit_resample(*labelled)
    assert augmenter.selection_["candidates"].tolist() == [4, 4, 4]
    assert augmenter.selection_["kept"].tolist() == [4, 4, 4]
    seed = diffaugkit.runtime.mix_seed(augmenter._sampling_seed, 1, 0)
    np.testing.assert_array_equal(X_more[28:32], augmenter._generate(np.full(4, 1), seed))
    assert list(y_more[24:]) == ["a"] * 4 + ["b"] * 4 + ["c"] * 4


class Itself(BaseEstimator):
    """An encoder that gives the samples as they are."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return X


class Constant(BaseEstimator):
    """An encoder in which all centroids are one: the first class is the nearest to everything."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return np.ones((len(X), 2))


def test_a_class_that_goes_short_is_warned_of(labelled, pretrained):
    X, y = labelled
    augmenter = tiny(
        FrozenEstimator(pretrained), Constant(), n_candidates=1.5,
        sampling_strategy={"a": 10, "b": 12},
    )  # fmt: skip
    message = "1 of 3 classes .* 'b': 0 of 4 from 30 candidates"
    with pytest.warns(ConvergenceWarning, match=message) as caught:
        X_more, y_more = augmenter.fit_resample(X, y)
    assert caught[-1].filename == __file__  # the caller's own line
    assert len(X_more) == 26
    assert list(y_more[24:]) == ["a", "a"]
    table = augmenter.selection_.set_index("class")
    assert table["kept"].tolist() == [2, 0, 0]
    assert table["candidates"].tolist() == [3, 30, 0]
    assert augmenter.selection_examples()["b"]["kept"].shape == (0, 20)


@pytest.mark.parametrize("shape", [(12,), (4, 3, 1)])
def test_copies_are_warned_of(shape, blobs, monkeypatch):
    X, y = blobs[0][::10, :12].reshape(24, *shape), blobs[1][::10]
    options = UNET if len(shape) > 1 else DIFFUSION
    generator = EmbeddingConditionedDiffusion(None, **options).fit(X)
    # Judged by themselves, so that the nearest real sample is the one repeated.
    same = None if len(shape) > 1 else Itself()
    augmenter = tiny(FrozenEstimator(generator), same, selection="random", guidance_scale=1.0)

    def repeat(self, codes, seed, scales):
        first = np.flatnonzero(y == codes[0])[: len(codes)]
        noise = np.random.default_rng(0).normal(size=X[first].shape)
        return (X[first] + 0.01 * noise).astype(np.float32)

    monkeypatch.setattr(HistoDiffusionAugmenter, "_generate", repeat)
    with pytest.warns(UserWarning, match=r"copy ratio below 0\.\d+ .* they repeat"):
        augmenter.fit_resample(X, y)
    assert (augmenter.selection_["copy_ratio"] < 0.2).all()
    if same is not None:
        np.testing.assert_array_equal(augmenter.sample_indices_[24:], np.arange(24))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.0])
def test_ratio(fitted, labelled, ratio):
    X_more, y_more = clone(fitted).set_params(ratio=ratio, max_epochs=30).fit_resample(*labelled)
    assert X_more.shape == (24 + round(24 * ratio), 20)
    assert np.unique(y_more, return_counts=True)[1].tolist() == [round(8 * (1 + ratio))] * 3


def test_sampling_strategies(labelled):
    X, y = labelled
    X, y = X[:-4], y[:-4]
    strategies = {
        "auto": [8, 8, 8], "minority": [8, 8, 8], "all": [8, 8, 8],
    }  # fmt: skip
    strategies = [*strategies.items(), ({"c": 10, "a": 9}, [9, 8, 10]),
                  (lambda y: {"b": 11}, [8, 11, 4])]  # fmt: skip
    for strategy, sizes in strategies:
        augmenter = tiny(selection="random", sampling_strategy=strategy)
        _, y_more = augmenter.fit_resample(X, y)
        assert np.unique(y_more, return_counts=True)[1].tolist() == sizes
        assert list(augmenter.sampling_strategy_.values()) == [
            n - m for n, m in zip(sizes, (8, 8, 4), strict=True)
        ]


# ---- the sampler's form --------------------------------------------------------------------------


def test_containers_come_back(labelled):
    X, y = labelled
    frame = pd.DataFrame(X, columns=[f"gene{i}" for i in range(20)])
    adata = ad.AnnData(X, obs=pd.DataFrame({"kind": y}, index=[f"cell{i}" for i in range(24)]))
    adata.var_names = frame.columns
    expected, labels = tiny(selection="random").fit_resample(X, y)
    containers = {
        "frame": (frame, pd.Series(y, name="kind")),
        "csr": (sp.csr_matrix(X), y),
        "list": (X.tolist(), y.tolist()),
        "tensor": (torch.from_numpy(X), y),
        "anndata": (adata, adata.obs["kind"]),
        "float64": (X.astype(np.float64), y),
    }
    for name, (container, target) in containers.items():
        X_more, y_more = tiny(selection="random").fit_resample(container, target)
        assert type(X_more) is type(container), name
        assert type(y_more) is type(target), name
        assert list(y_more) == list(labels), name
        values = X_more.X if name == "anndata" else X_more
        values = values.toarray() if name == "csr" else np.asarray(values)
        np.testing.assert_allclose(values, expected, rtol=1e-6, err_msg=name)
        assert getattr(X_more, "dtype", None) == getattr(container, "dtype", None)
    assert X_more.dtype == np.float64


def test_frozen_generator_aligns_genes(labelled):
    X, y = labelled
    adata = ad.AnnData(X, var=pd.DataFrame(index=[f"gene{i}" for i in range(20)]))
    generator = EmbeddingConditionedDiffusion(None, **DIFFUSION).fit(adata)
    augmenter = tiny(FrozenEstimator(generator), selection="random")
    expected, _ = augmenter.fit_resample(adata, y)
    shuffled, _ = clone(augmenter).fit_resample(adata[:, ::-1].copy(), y)
    np.testing.assert_array_equal(shuffled[:, adata.var_names].X, expected.X)
    assert list(augmenter.feature_names_in_) == list(adata.var_names)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("owner", ["generator", "augmenter"])
def test_the_layer_that_was_read_is_the_one_that_grows(labelled, frozen, owner):
    X, y = labelled
    adata = ad.AnnData(np.zeros_like(X), layers={"scaled": X})
    generator = EmbeddingConditionedDiffusion(None, layer="scaled", **DIFFUSION)
    if owner == "augmenter":
        generator.set_params(layer="scaled" if frozen else None)
    if frozen:
        generator = FrozenEstimator(generator.fit(adata))
    layer = "scaled" if owner == "augmenter" else None
    more, _ = tiny(generator, selection="random", layer=layer).fit_resample(adata, y)
    np.testing.assert_array_equal(more.layers["scaled"][:24], X)
    assert np.abs(more.layers["scaled"][24:]).max() > 0


@pytest.mark.parametrize("kind", ["uint8", "float", "flat", "first", "pictures"])
def test_images_come_back_as_they_were(kind, images, latent):
    X, y = images
    image_shape = None
    if kind == "float":
        X = X.astype(np.float32) / 255
    elif kind == "flat":
        X, image_shape = X.reshape(24, 64), (8, 8, 1)
    elif kind == "first":
        X = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
    elif kind == "pictures":
        from PIL import Image

        X = [Image.fromarray(x[..., 0]) for x in X]
    generator = latent
    if kind == "flat":
        generator = EmbeddingConditionedDiffusion(None, image_shape=image_shape, **UNET).fit(X)
    augmenter = tiny(
        FrozenEstimator(generator), selection="random", decoder_epochs=1, max_epochs=1,
        image_shape=image_shape,
    )  # fmt: skip
    X_more, y_more = augmenter.fit_resample(X, y)
    assert len(X_more) == len(y_more) == 48
    if kind == "pictures":
        assert X_more.dtype == np.uint8
        return
    assert X_more.shape[1:] == X.shape[1:]
    assert X_more.dtype == X.dtype
    assert type(X_more) is type(X)
    assert bool((X_more[:24] == X).all())
    made = np.asarray(X_more[24:], np.float64)
    assert made.max() <= (1 if kind == "float" else 255)
    assert made.max() > (0.1 if kind == "float" else 10)
    np.testing.assert_array_equal(np.asarray(augmenter.sample([0, 1])).shape[1:], X.shape[1:])


def test_inside_a_pipeline_only_training_folds_grow(blobs, pretrained):
    pipeline = pytest.importorskip("imblearn.pipeline")
    from sklearn.model_selection import cross_val_score

    X, y = blobs[0][::4], blobs[1][::4]
    seen = []

    class Counting(KNeighborsClassifier):
        def fit(self, X, y):
            seen.append(len(X))
            return super().fit(X, y)

    steps = tiny(FrozenEstimator(pretrained), selection="random"), Counting(3)
    scores = cross_val_score(pipeline.make_pipeline(*steps), X, y, cv=3, error_score="raise")
    assert seen == [80, 80, 80]
    assert scores.min() > 0.3


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([tiny()], expected_failed_checks=lambda estimator: {})
def test_check_estimator(estimator, check):
    check(estimator)


def test_check_parameters():
    check_param_validation("HistoDiffusionAugmenter", tiny())


def imblearn_checks():
    checks = pytest.importorskip("imblearn.utils.estimator_checks")
    settings = [tiny(selection="random"), tiny(max_epochs=1)]
    for estimator in settings:
        yield from checks.estimator_checks_generator(estimator)
    yield tiny(), lambda e: checks.check_param_validation("HistoDiffusionAugmenter", e)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("estimator", "check"), list(imblearn_checks()))
def test_check_estimator_of_imbalanced_learn(estimator, check):
    check(estimator)


# ---- seeds, resume, copies, refusals -------------------------------------------------------------


def state(augmenter):
    return {
        **weights(augmenter.module_),
        "centroids": torch.from_numpy(augmenter.centroids_),
        "samples": torch.from_numpy(np.asarray(augmenter.sample(augmenter.classes_), np.float64)),
    }


def test_seeds(labelled):
    same_, again, other = (state(tiny(random_state=s).fit(*labelled)) for s in (3, 3, 4))
    assert same(same_, again)
    assert not same(same_, other)


@pytest.mark.parametrize(
    "phase", ["diffusion", "autoencoder", "auxiliary", "decoder", "classifier"]
)
def test_resume_is_exact(phase, images, tmp_path, monkeypatch):
    X, y = images
    autoencoder = LatentAutoencoder(downsampling=2, block_out_channels=(8, 8), max_epochs=2)
    diffusion = EmbeddingConditionedDiffusion(
        None, autoencoder=autoencoder, **{**UNET, "max_epochs": 2}
    )
    expected = state(tiny(diffusion, decoder_epochs=2).fit(X, y))
    number = {"autoencoder": 0, "diffusion": 1, "auxiliary": 2, "decoder": 3, "classifier": 4}[
        phase
    ]
    loop, calls = diffaugkit.base.fit_loop, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) - 1 == number:

            def die(epoch, history):
                raise KeyboardInterrupt

            kwargs["callbacks"] = die
        return loop(*args, **kwargs)

    monkeypatch.setattr(diffaugkit.base, "fit_loop", dying)
    augmenter = tiny(diffusion, decoder_epochs=2, checkpoint_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        augmenter.fit(X, y)
    monkeypatch.undo()
    assert same(state(augmenter.fit(X, y)), expected)


def test_copies_are_bit_equal(images, latent, labelled, pretrained, tmp_path):
    import pickle

    for number, (generator, (X, y)) in enumerate([(latent, images), (pretrained, labelled)]):
        augmenter = tiny(FrozenEstimator(generator), decoder_epochs=1, n_candidates=5.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            augmenter.fit_resample(X, y)
        augmenter.save(tmp_path / str(number))
        for other in (
            pickle.loads(pickle.dumps(augmenter)),
            copy.deepcopy(augmenter),
            diffaugkit.load(tmp_path / str(number)),
        ):
            assert same(state(other), state(augmenter))
            pd.testing.assert_frame_equal(other.selection_, augmenter.selection_)
            pd.testing.assert_frame_equal(other.history_, augmenter.history_)
            np.testing.assert_array_equal(other.classes_, augmenter.classes_)
            found, wanted = other.selection_examples(), augmenter.selection_examples()
            for label in wanted:
                np.testing.assert_array_equal(found[label]["kept"], wanted[label]["kept"])


BAD = {
    "one class": (lambda X, y: (X, np.zeros(24)), "one class"),
    "no labels": (lambda X, y: (X, None), "requires y"),
    "several labels": (lambda X, y: (X, np.eye(3)[:, [0, 1, 0]][np.arange(24) % 3]), "Multilabel"),
    "continuous": (lambda X, y: (X, np.linspace(0, 1, 24)), "Unknown label type"),
    "lengths": (lambda X, y: (X, y[:-1]), "inconsistent numbers"),
    "nan": (lambda X, y: (np.where(X == X[3, 2], np.nan, X), y), "NaN"),
    "counts": (
        lambda X, y: (sp.csr_matrix(np.arange(480.0).reshape(24, 20)), y),
        "raw counts",
    ),
    "images": (lambda X, y: (X.reshape(24, 4, 5, 1), y), "denoiser|vectors|holds images"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_and_leaves_the_fit(kind, labelled, fitted):
    bad, message = BAD[kind]
    augmenter = copy.deepcopy(fitted)
    before = state(augmenter)
    for method in ("fit", "fit_resample"):
        with pytest.raises(ValueError, match=message):
            getattr(augmenter, method)(*bad(*labelled))
    assert same(state(augmenter), before)


def test_generators_that_cannot_be_guided(labelled, images, latent):
    with pytest.raises(TypeError, match="diffusion=HistoDiffusionAugmenter cannot be guided"):
        tiny(HistoDiffusionAugmenter()).fit(*labelled)
    large = np.repeat(images[0], 2, axis=1)
    with pytest.raises(ValueError, match=r"\(16, 8, 1\).*fitted on \(8, 8, 1\)"):
        tiny(FrozenEstimator(latent)).fit(large, images[1])


@pytest.mark.parametrize("encoder", [FrozenEstimator(PCA()), PCA(21)], ids=["unfitted", "wide"])
def test_an_encoder_that_cannot_be_used_is_refused_before_training(encoder, labelled):
    epochs = []
    augmenter = tiny(None, encoder, callbacks=lambda *_: epochs.append(1))
    augmenter.set_params(diffusion__callbacks=lambda *_: epochs.append(1))
    with pytest.raises((NotFittedError, ValueError), match=r"not fitted|n_components=21"):
        augmenter.fit(*labelled)
    assert not epochs


class OwnDenoiser(torch.nn.Module):
    """A module whose `features` are a part of it."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Linear(20, 8)
        self.out = torch.nn.Linear(8, 20)

    def forward(self, x_t, t, cond=None):
        return self.out(self.features(x_t))


def test_the_features_of_a_users_denoiser_are_not_asked_for(labelled):
    with isolated_rng(0):
        own = OwnDenoiser()
    generator = EmbeddingConditionedDiffusion(
        None, denoiser=own, n_pcs=None, max_epochs=1, random_state=0
    )
    augmenter = tiny(generator, guidance_scale=1.0).fit(*labelled)
    assert augmenter.centroids_.shape == (3, 20)  # in the space of the samples


def test_a_pool_of_other_samples_is_refused_before_it_is_learned_from(images, labelled):
    X, y = images
    epochs = []
    for other, message in (
        (np.zeros((30, 10, 10, 1), np.uint8), "10"),
        (np.zeros((30, 8, 8, 3), np.uint8), "3"),
        ((X[:, :, :, 0] * 257.0).astype(np.float32), "floats"),
    ):
        augmenter = tiny(EmbeddingConditionedDiffusion(None, **UNET))
        augmenter.set_params(diffusion__callbacks=lambda *_: epochs.append(1))
        with pytest.raises(ValueError, match=message):
            augmenter.fit(X, y, unlabeled=other)
    with pytest.raises(ValueError, match=r"unlabeled: .*NaN"):
        tiny().fit(*labelled, unlabeled=np.full((30, 20), np.nan))
    assert not epochs


def test_callbacks_see_the_pretraining_too(labelled):
    seen = []
    options = {"max_epochs": 2, "n_sampling_steps": 2, "width": 8, "random_state": 0}
    augmenter = HistoDiffusionAugmenter(callbacks=lambda e, h: seen.append(e) or e == 1, **options)
    augmenter.fit(*labelled)
    assert seen == [0, 1] * 2  # the generator, which it stops, and the classifier


def test_copies_of_the_pool_are_warned_of(blobs, labelled):
    X, y = labelled
    pool = np.concatenate([X, blobs[0][1::10]])
    augmenter = tiny(max_epochs=20, n_sampling_steps=5, selection="random", guidance_scale=1.0)
    rows = iter(range(len(X), len(pool)))
    augmenter._generate = lambda codes, *_: np.stack([pool[next(rows)] for _ in codes])
    with pytest.warns(UserWarning, match=r"copy ratio below 0\.00.*repeat real samples"):
        augmenter.fit_resample(X, y, unlabeled=pool)
    assert (augmenter.selection_["copy_ratio"] < 1e-3).all()


def test_a_frozen_generator_keeps_its_own_device(pretrained, labelled):
    generator = copy.deepcopy(pretrained)
    generator.encoder_ = SelfSupervisedEncoder()
    tiny(FrozenEstimator(generator), device="cpu").fit_resample(*labelled)
    assert generator.device == generator.encoder_.device == "auto"
