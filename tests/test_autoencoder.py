"""LatentAutoencoder: what it keeps of images, the scale of its latents, and its losses."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import diffaugkit
from diffaugkit import rows
from diffaugkit.autoencoder import (
    LatentAutoencoder,
    PatchDiscriminator,
    _Fit,
    _Networks,
    adaptive_weight,
)
from diffaugkit.image_rows import to_unit
from diffaugkit.persistence import read_folder
from diffaugkit.runtime import isolated_rng

TINY = {"downsampling": 2, "block_out_channels": (8, 16), "max_epochs": 2, "batch_size": 16}


def tiny(**more):
    return LatentAutoencoder(**{**TINY, "random_state": 0, **more})


@pytest.fixture(scope="module")
def digits():
    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def colour():
    return np.random.default_rng(0).integers(0, 256, (40, 10, 9, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(colour):
    return tiny().fit(colour)


# ---- what it keeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_digits_come_back(digits, kind):
    model = LatentAutoencoder(
        kind, 2, block_out_channels=(16, 32), max_epochs=8, batch_size=32, learning_rate=3e-3,
        random_state=0,
    ).fit(digits[:640])  # fmt: skip
    held_out = digits[640:840]
    score = model.score(held_out)
    unit = held_out.astype(np.float64) / 255
    by_hand = -10 * np.log10(np.mean((model.reconstruct(held_out) / 255.0 - unit) ** 2))
    # Pixels are rounded to bytes in one, not in the other.
    assert score == pytest.approx(by_hand, abs=0.1)
    blank = -10 * np.log10(np.mean((unit - unit.mean(axis=0)) ** 2))
    # 48 numbers for 64 pixels; the mean image reaches 11.6 dB.
    print("SCORE", kind, score, blank)
    assert score > 16.0 > blank + 4
    latents = model.transform(held_out)
    assert latents.shape == (200, 48)
    assert 0.9 < latents.std() < 1.1
    assert abs(latents.mean()) < 0.1


def test_latents_of_training_images_are_centred_and_scaled(colour, fitted):
    latents = fitted.latents(colour).astype(np.float64)
    assert latents.shape == (40, *fitted.latent_shape_) == (40, 3, 5, 5)
    np.testing.assert_allclose(latents.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(latents.std(), 1, rtol=1e-5)
    unit = to_unit(torch.from_numpy(colour).permute(0, 3, 1, 2), (0, 255))
    with torch.no_grad():
        padded = nn.functional.pad(unit, (0, 1, 0, 0), mode="replicate")
        raw = fitted.module_.encode(padded).latent_dist.mean.double().numpy()
    centred = raw - raw.mean(axis=(0, 2, 3), keepdims=True)
    assert fitted.scale_ == pytest.approx(1 / centred.std(), rel=1e-4)
    np.testing.assert_allclose(centred * fitted.scale_, latents, atol=1e-4)


def test_layout_kind_and_range_follow_the_input(colour):
    unit = colour.astype(np.float32) / 255
    cases = {
        "uint8": (colour, None, np.uint8, 255),
        "unit floats": (unit, None, np.float32, 1),
        "float64": (unit.astype(np.float64) * 2 - 1, None, np.float32, 1),
        "channels first": (torch.from_numpy(colour).permute(0, 3, 1, 2), None, np.uint8, 255),
        "grey": (colour[..., 0], None, np.uint8, 255),
        "flat": (unit.reshape(40, -1), (10, 9, 3), np.float32, 1),
    }
    for name, (X, image_shape, dtype, high) in cases.items():
        model = tiny(max_epochs=1, image_shape=image_shape).fit(X)
        made = model.reconstruct(X[:5])
        assert made.shape == tuple(X[:5].shape), name
        assert made.dtype == dtype, name
        assert made.max() <= high, name


def test_images_keep_their_brightness():
    # With a norm for each channel alone flat images came back in the wrong grey, at 20 decibels.
    grey = np.random.default_rng(0).integers(0, 256, (240, 1, 1), dtype=np.uint8)
    X = np.broadcast_to(grey, (240, 4, 4))
    model = tiny(max_epochs=60, batch_size=20).fit(X[:200])
    assert model.score(X[200:]) > 30
    assert min(model.module_.config.block_out_channels) // model.module_.config.norm_num_groups >= 4


def test_rows_do_not_see_each_other(colour, fitted):
    whole = fitted.transform(colour)
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        np.testing.assert_array_equal(fitted.transform(colour[part]), whole[part])
    images = fitted.inverse_transform(whole)
    np.testing.assert_array_equal(fitted.inverse_transform(whole[5:6]), images[5:6])
    np.testing.assert_array_equal(fitted.inverse_transform(fitted.latents(colour)), images)


def test_no_image_is_encoded_to_fill_up_batches(fitted, monkeypatch):
    encoded, original = [], type(fitted.module_).encode

    def count(self, images):
        encoded.append(len(images))
        return original(self, images)

    monkeypatch.setattr(type(fitted.module_), "encode", count)
    monkeypatch.setattr(rows, "_BLOCK_VALUES", 300)  # as of large images: one a block
    X = np.zeros((24, 10, 9, 3), np.uint8)
    fitted.transform(X)
    assert sum(encoded) == 24
    fitted.score(X)
    assert sum(encoded) == 48


def test_same_seed_same_weights_and_exact_resume(colour, tmp_path):
    class Killed(Exception):
        pass

    def kill(epoch, history):
        if epoch == 1:
            raise Killed

    options = {"max_epochs": 4, "adversarial_start": 3}
    X = np.ascontiguousarray(colour[:, :8, :8])
    whole = tiny(**options).fit(X).transform(X)
    np.testing.assert_array_equal(tiny(**options).fit(X).transform(X), whole)
    with pytest.raises(Killed):
        tiny(**options, checkpoint_dir=tmp_path, callbacks=kill).fit(X)
    resumed = tiny(**options, checkpoint_dir=tmp_path).fit(X)
    np.testing.assert_array_equal(resumed.transform(X), whole)
    assert len(resumed.history_) == 4


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_saved_model_is_the_same(colour, tmp_path, kind):
    model = tiny(kind=kind, n_codes=16, max_epochs=1).fit(colour)
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(colour), model.transform(colour))
    np.testing.assert_array_equal(loaded.reconstruct(colour), model.reconstruct(colour))


# ---- losses --------------------------------------------------------------------------------------


def test_adaptive_weight_is_its_formula():
    with isolated_rng(0):
        layer = nn.Conv2d(3, 2, 3)
        x = torch.randn(4, 3, 6, 6)
    out = layer(x)
    first, second = out.square().mean(), -out.sigmoid().mean()
    got = adaptive_weight(first, second, layer.weight)
    norms = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].double().square().sum().sqrt()
        for loss in (first, second)
    ]
    assert not got.requires_grad
    assert got.item() == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-5)
    assert adaptive_weight(1e9 * first, 0.0 * second, layer.weight).item() == 1e4


def networks_and_loss(**more):
    rng = np.random.default_rng(1)
    X = rng.integers(0, 256, (12, 16, 16, 1)).astype(np.uint8)
    model = tiny(max_epochs=1, adversarial_start=0, **more).fit(X)
    with isolated_rng(0):
        judge = PatchDiscriminator(1, (16, 16), width=8)
    networks = _Networks(model.module_, judge)
    return _Fit(model, networks, torch.device("cpu")), torch.from_numpy(X).permute(0, 3, 1, 2)


def test_loss_against_numpy():
    fit, images = networks_and_loss(kl_weight=0.3)
    with isolated_rng(5):
        parts = fit.loss(images)
    x = images.double().numpy() / 127.5 - 1
    with isolated_rng(5), torch.no_grad():
        posterior = fit.networks.autoencoder.encode(torch.from_numpy(x).float()).latent_dist
        noise = torch.randn(posterior.mean.shape)
        z = posterior.mean + posterior.std * noise
        made = fit.networks.autoencoder.decode(z).sample
        judged = fit.networks.discriminator
        of_real, of_made = judged(torch.from_numpy(x).float()), judged(made)
    mean, logvar = (v.double().numpy() for v in (posterior.mean, posterior.logvar))
    l1 = np.abs(made.double().numpy() - x).mean()
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / x.size
    hinge = 0.5 * (
        np.maximum(0, 1 - of_real.numpy()).mean() + np.maximum(0, 1 + of_made.numpy()).mean()
    )
    got = {name: value.item() for name, value in parts.items()}
    assert got["reconstruction"] == pytest.approx(l1, rel=1e-4)
    assert got["regularizer"] == pytest.approx(kl, rel=1e-4)
    assert got["discriminator"] == pytest.approx(hinge, rel=1e-4)
    assert got["adversarial"] == pytest.approx(-of_made.mean().item(), rel=1e-4, abs=1e-6)
    total = l1 + 0.3 * kl + 0.5 * got["adaptive_weight"] * got["adversarial"] + hinge
    assert got["loss"] == pytest.approx(total, rel=1e-4)


def test_each_network_learns_from_its_own_terms():
    fit, images = networks_and_loss()
    judge, autoencoder = fit.networks.discriminator, fit.networks.autoencoder
    with isolated_rng(5):
        parts = fit.loss(images)
    own = torch.autograd.grad(parts["discriminator"], list(judge.parameters()), retain_graph=True)
    parts["loss"].backward()
    for parameter, gradient in zip(judge.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    # The discriminator's own term sees reconstructions without their gradient.
    with isolated_rng(5):
        again = fit.loss(images)["discriminator"]
    of_autoencoder = torch.autograd.grad(again, list(autoencoder.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in of_autoencoder)
    assert autoencoder.decoder.conv_out.weight.grad.abs().max() > 0


def test_discriminator_waits_for_its_step(digits):
    X = np.kron(digits[:48], np.ones((2, 2), np.uint8))
    model = tiny(max_epochs=4, adversarial_start=6).fit(X)  # 3 steps an epoch
    weights = model.history_["adaptive_weight"].to_numpy()
    assert (weights[:2] == 0).all()
    assert (weights[2:] > 0).all()
    alone = tiny(max_epochs=2).fit(X)
    before = tiny(max_epochs=2, adversarial_start=10**6).fit(X)
    # Until then the autoencoder is the one without a discriminator, but for its random start.
    assert before.history_["discriminator"].eq(0).all()
    assert alone.history_.columns.tolist()[1:4] == ["loss", "reconstruction", "regularizer"]


def test_the_first_step_of_the_discriminator_is_a_first_step(digits, tmp_path):
    X = np.kron(digits[:32], np.ones((2, 2), np.uint8))
    judges = []
    for start in (10**6, 7):  # of 8 steps: never, and in the last one
        folder = tmp_path / str(start)
        model = tiny(max_epochs=4, adversarial_start=start, checkpoint_dir=folder).fit(X)
        tensors, _ = read_folder(folder / "training")
        judges.append({k: v for k, v in tensors.items() if k.startswith("module.discriminator")})
    moved = max((judges[1][name] - judges[0][name]).abs().max().item() for name in judges[0])
    # The first step of Adam is as long as the rate; after steps without gradient it was not.
    rate = model.history_["learning_rate"].iloc[-1]
    assert moved == pytest.approx(rate, rel=0.01)


def test_perceptual_features(colour):
    with isolated_rng(0):
        features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    before = [p.clone() for p in features.parameters()]
    model = tiny(max_epochs=3, perceptual=features, perceptual_weight=0.5).fit(colour)
    history = model.history_
    assert history["perceptual"].iloc[-1] < history["perceptual"].iloc[0]
    np.testing.assert_allclose(
        history["loss"],
        history["reconstruction"] + 0.5 * history["perceptual"] + 1e-6 * history["regularizer"],
        rtol=1e-5,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, features.parameters(), strict=True))
    # The network is the caller's, and may be trained elsewhere.
    assert features.training
    assert all(p.requires_grad for p in features.parameters())
    with pytest.raises(ValueError, match="download=True"):
        tiny(perceptual="resnet18.a1_in1k").fit(colour)


def test_features_of_timm_see_every_channel(colour, monkeypatch):
    import timm

    from diffaugkit.autoencoder import _feature_distance, _features

    make = timm.create_model
    # Weights of chance: there is no network here.
    monkeypatch.setattr(timm, "create_model", lambda tag, pretrained, **more: make(tag, **more))
    features = _features(tiny(perceptual="resnet10t", download=True), torch.device("cpu"))
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 4, 32, 32))).float()
    for channel in range(4):
        other = x.clone()
        other[:, channel] = x[:, channel].flip(1)
        assert _feature_distance(features, x, other) > 1e-4, channel
    grey, three = x[:, :1], x[:, :1].expand(-1, 3, -1, -1)
    for a, b in zip(features(grey), features(three), strict=True):
        torch.testing.assert_close(a, b)


# ---- weights that were trained elsewhere ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_pretrained_folder_of_diffusers(colour, tmp_path, kind, subfolder, monkeypatch):
    source = tiny(kind=kind, n_codes=16, max_epochs=1).fit(colour).module_
    source.save_pretrained(tmp_path / (subfolder or ""))
    model = LatentAutoencoder(kind, pretrained=str(tmp_path), random_state=0).fit(colour)
    assert model.n_iter_ == 0
    assert model.latent_shape_ == (3, 5, 5)
    for name, weight in model.module_.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name])
    # Grey images through a network for colour, and back.
    monkeypatch.setenv("HOME", str(tmp_path))
    grey = LatentAutoencoder(kind, pretrained="~").fit(colour[..., 0])
    assert grey.reconstruct(colour[..., 0]).shape == (40, 10, 9)
    tuned = LatentAutoencoder(kind, pretrained=str(tmp_path), max_epochs=1).fit(colour)
    assert not torch.equal(tuned.module_.decoder.conv_out.weight, source.decoder.conv_out.weight)
    with pytest.raises(ValueError, match="takes 3 channels, but X has 2"):
        LatentAutoencoder(kind, pretrained=str(tmp_path)).fit(colour[..., :2])
    with pytest.raises(ValueError, match="holds a"):
        LatentAutoencoder("vq" if kind == "kl" else "kl", pretrained=str(tmp_path)).fit(colour)


@pytest.mark.filterwarnings("error")
def test_nothing_is_downloaded(colour, tmp_path):
    for name in (str(tmp_path / "missing"), "nobody/nothing-of-this-name"):
        with pytest.raises(OSError, match=f"{name}.*download=True"):
            LatentAutoencoder(pretrained=name).fit(colour)
    with pytest.raises(OSError, match=r"no file named config\.json"):
        LatentAutoencoder(pretrained=tmp_path).fit(colour)


# ---- tensors and arrays --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_encode_and_decode_take_arrays(colour, fitted, dtype):
    unit = to_unit(torch.from_numpy(colour[:3]).movedim(3, 1).contiguous(), (0, 255))
    latents = fitted.encode(unit)
    np.testing.assert_allclose(fitted.latents(colour[:3]), latents, atol=1e-5)
    assert torch.equal(fitted.encode(unit.numpy().astype(dtype)), latents)
    images = fitted.decode(latents)
    assert images.shape == (3, 3, 10, 10)
    assert torch.equal(fitted.decode(latents.numpy().astype(dtype)), images)


def test_encode_and_decode_refuse(colour, fitted):
    for call, name in ((fitted.encode, "images"), (fitted.decode, "latents")):
        with pytest.raises(TypeError, match=f"{name} must be a tensor or an array, got list"):
            call([[1.0]])
        with pytest.raises(
            ValueError, match=rf"{name} have shape \(2, 5, 5\), expected \(B, .*3, H"
        ):
            call(np.zeros((2, 5, 5), np.float32))
        with pytest.raises(ValueError, match=rf"{name} are uint8, but must be floats"):
            call(np.zeros((2, 3, 5, 5), np.uint8))
    with pytest.raises(ValueError, match="expected"):
        fitted.encode(colour / 255)  # channels last
    for call in (tiny().encode, tiny().decode):
        with pytest.raises(NotFittedError):
            call(torch.zeros(2, 3, 8, 8))


# ---- estimator -----------------------------------------------------------------------------------


@parametrize_with_checks(
    [LatentAutoencoder(**TINY, image_shape=(1, -1, 1))],
    expected_failed_checks=lambda estimator: {},
)
def test_check_estimator(estimator, check):
    check(estimator)


def test_pipeline_clone_and_frozen(digits):
    flat = digits[:60].reshape(60, -1) / 255
    model = tiny(image_shape=(8, 8, 1), max_epochs=1)
    labels = make_pipeline(clone(model), KMeans(3, n_init=1, random_state=0)).fit_predict(flat)
    assert len(set(labels)) == 3
    model.fit(flat)
    frozen = FrozenEstimator(model)
    np.testing.assert_array_equal(clone(frozen).transform(flat), model.transform(flat))
    assert len(model.get_feature_names_out()) == model.transform(flat).shape[1]
    names = model.set_output(transform="pandas").transform(flat).columns
    assert list(names) == list(model.get_feature_names_out())


def test_refusals(colour, fitted):
    with pytest.raises(NotFittedError):
        tiny().transform(colour)
    with pytest.raises(ValueError, match="power of two"):
        tiny(downsampling=3).fit(colour)
    with pytest.raises(ValueError, match="must have 3 widths"):
        tiny(downsampling=4).fit(colour)
    with pytest.raises(ValueError, match="give image_shape"):
        tiny().fit(colour.reshape(40, -1) / 255)
    with pytest.raises(ValueError, match="Z has shape"):
        fitted.inverse_transform(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"Z has shape \(2, 5, 5, 3\), expected .*3, 5, 5"):
        fitted.inverse_transform(np.moveaxis(fitted.latents(colour[:2]), 1, -1))
    with pytest.raises(ValueError, match="at least 8 pixels"):
        tiny(adversarial_start=0).fit(colour[:, :4])
    before = fitted.transform(colour)
    with pytest.raises(ValueError, match="power of two"):
        fitted.set_params(downsampling=3).fit(colour)
    fitted.set_params(downsampling=2)
    np.testing.assert_array_equal(fitted.transform(colour), before)


def test_no_training_needs_weights(colour):
    with pytest.raises(ValueError, match=r"max_epochs=0 .* pretrained="):
        tiny(max_epochs=0).fit(colour)


def test_sixteen_bits_come_back_as_they_were(colour):
    words = colour.astype(np.uint16) * 257
    model = tiny().fit(words)
    again = model.reconstruct(words[:3])
    assert again.dtype == np.uint16
    assert model.reconstruct(again).shape == again.shape  # and are read like them
    in_bytes = tiny().fit(colour).reconstruct(colour[:3])
    np.testing.assert_allclose(again / 257, in_bytes, atol=0.51)
