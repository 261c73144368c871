"""EmbeddingConditionedDiffusion on images: pixels, latents, layouts, tokens, attention."""

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import diffaugkit
from diffaugkit import EmbeddingConditionedDiffusion, LatentAutoencoder, SelfSupervisedEncoder
from diffaugkit import spaces as spaces_file
from diffaugkit.data import check_X
from diffaugkit.denoisers import UNetDenoiser
from diffaugkit.diffusion import SAMPLERS, Diffusion, row_noise
from diffaugkit.embedding_diffusion import interpolate_rows
from diffaugkit.runtime import isolated_rng
from diffaugkit.spaces import LatentSpace, PixelSpace, space_from_state

TINY = {
    "block_out_channels": (8, 16),
    "max_epochs": 2,
    "batch_size": 16,
    "n_sampling_steps": 3,
    "random_state": 0,
}
AUTOENCODER = {"downsampling": 2, "block_out_channels": (8, 8), "max_epochs": 1, "random_state": 0}


def tiny(**more):
    return EmbeddingConditionedDiffusion(**{**TINY, **more})


@pytest.fixture(scope="module")
def images():
    """Noise of odd size: (40, 10, 9, 3) uint8, and vectors that go with it."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (40, 10, 9, 3)).astype(np.uint8)
    return X, rng.normal(size=(40, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def squares():
    """Red and blue squares of 8 pixels: (192, 8, 8, 3) uint8, and which is which."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=192)
    X = np.zeros((192, 8, 8, 3))
    X[labels == 1, :, :, 0], X[labels == 0, :, :, 2] = 220, 220
    return np.clip(X + rng.integers(0, 30, X.shape), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def fitted(images):
    return tiny().fit(images[0], embeddings=images[1])


# ---- what it generates ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_squares(squares):
    X, labels = squares
    model = tiny(max_epochs=30, batch_size=48, block_out_channels=(8, 16), ema_decay=0.9)
    return model.set_params(learning_rate=5e-3, n_sampling_steps=10).fit(
        X, embeddings=np.eye(2)[labels]
    )


def test_samples_have_the_colour_of_their_condition(squares, of_squares):
    X, labels = squares
    asked = np.repeat([0, 1], 24)
    samples = of_squares.sample(np.eye(2)[asked])
    assert samples.dtype == np.uint8
    assert samples.shape == (48, 8, 8, 3)
    means = samples.mean(axis=(1, 2))
    # Every one of 48, and by far: 234 against 14 in the data.
    assert (means[asked == 1, 0] > 150).all()
    assert (means[asked == 1, 2] < 80).all()
    assert (means[asked == 0, 2] > 150).all()
    assert (means[asked == 0, 0] < 80).all()
    for label in (0, 1):
        real = X[labels == label].mean(axis=(0, 1, 2))
        np.testing.assert_allclose(means[asked == label].mean(axis=0), real, atol=25)


def test_guidance_of_zero_forgets_the_condition(of_squares):
    free = clone(of_squares).set_params(guidance_scale=0.0)
    free.__dict__.update({k: v for k, v in vars(of_squares).items() if k not in free.get_params()})
    means = free.sample(np.eye(2)[np.ones(32, int)]).mean(axis=(1, 2))
    share = np.mean(means[:, 0] > means[:, 2])
    assert 0.1 < share < 0.9


def test_strength_and_interpolation(squares, of_squares):
    X, labels = squares
    model = clone(of_squares).set_params(encoder=_MeanColour(), max_epochs=20).fit(X)
    near = model.augment(X[:16], strength=0.05).astype(float)
    assert np.abs(near - X[:16]).mean() < 20
    two = model.augment(X[:4], 2)
    assert two.shape == (8, 8, 8, 3)
    np.testing.assert_array_equal(two[::2], model.augment(X[:4]))
    red, blue = X[labels == 1][:8], X[labels == 0][:8]
    ends = [model.interpolate(red, blue, alpha).mean(axis=(1, 2)) for alpha in (0.0, 1.0)]
    assert (ends[1][:, 0] > ends[1][:, 2]).all()
    assert (ends[0][:, 0] < ends[0][:, 2]).all()
    np.testing.assert_array_equal(
        model.interpolate(red, blue, 1.0), model.sample(model.transform(red))
    )


class _MeanColour(BaseEstimator):
    """Encoder of anybody's, on images as the caller gave them."""

    def fit(self, X, y=None):
        assert X.ndim == 4
        return self

    def transform(self, X):
        assert X.shape[3] == 3
        return X.reshape(len(X), -1, 3).mean(axis=1) / 255 - 0.5


# ---- input and output ----------------------------------------------------------------------------


def test_layout_kind_and_range_follow_the_input(images):
    X = images[0]
    unit = X.astype(np.float32) / 255
    cases = {
        "uint8": (X, None, np.uint8, (0, 255)),
        "unit floats": (unit, None, np.float32, (0, 1)),
        "symmetric floats": (2 * unit.astype(np.float64) - 1, None, np.float32, (-1, 1)),
        "channels first": (torch.from_numpy(X).permute(0, 3, 1, 2), None, np.uint8, (0, 255)),
        "grey": (X[..., 0], None, np.uint8, (0, 255)),
        "flat": (unit.reshape(40, -1), (10, 9, 3), np.float32, (0, 1)),
    }
    for name, (given, image_shape, dtype, (low, high)) in cases.items():
        model = tiny(max_epochs=1, encoder=None, image_shape=image_shape).fit(given)
        for made in (model.sample(2), model.augment(given[:2], strength=0.5)):
            assert made.shape == tuple(given[:2].shape), name
            assert made.dtype == dtype, name
            assert low <= made.min() < made.max() <= high, name
    assert model.image_shape_ == (10, 9, 3)


def test_floats_into_a_model_of_bytes_mean_the_same(images):
    X, _ = images
    model = tiny(encoder=None).fit(X)
    a = model.augment(X[:5], strength=0.3).astype(int)
    b = model.augment((X[:5] / 255).astype(np.float32), strength=0.3).astype(int)
    assert np.abs(a - b).max() <= 1


def test_state_says_what_space_it_is(images, fitted):
    assert isinstance(fitted._space_of(), PixelSpace)
    assert fitted._space_of().shape == (3, 10, 9)
    again = space_from_state(fitted._space)
    assert again.state() == fitted._space
    x = row_noise((3, 10, 9), 0, [0, 1]).clamp(-1, 1)
    np.testing.assert_array_equal(again.output(x), fitted._space_of().output(x))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_belong_to_their_row(images, fitted, sampler):
    X, embeddings = images
    model = clone(fitted).set_params(sampler=sampler, guidance_scale=1.5, condition_noise=0.2)
    model.fit(X, embeddings=embeddings)
    whole = model.sample(embeddings)
    np.testing.assert_array_equal(model.sample(embeddings[:1]), whole[:1])
    np.testing.assert_array_equal(model.sample(embeddings[:17]), whole[:17])
    np.testing.assert_array_equal(model.set_params(batch_size=5).sample(embeddings), whole)
    np.testing.assert_array_equal(model.sample(3), model.sample(20)[:3])
    assert not np.array_equal(model.sample(3, random_state=1), model.sample(3))


def test_same_seed_same_samples_and_exact_resume(images, tmp_path):
    X, embeddings = images

    class Killed(Exception):
        pass

    def kill(epoch, history):
        if epoch == 1:
            raise Killed

    whole = tiny(max_epochs=4, random_flip=True).fit(X, embeddings=embeddings)
    with pytest.raises(Killed):
        tiny(max_epochs=4, random_flip=True, checkpoint_dir=tmp_path, callbacks=kill).fit(
            X, embeddings=embeddings
        )
    resumed = tiny(max_epochs=4, random_flip=True, checkpoint_dir=tmp_path)
    resumed.fit(X, embeddings=embeddings)
    np.testing.assert_array_equal(resumed.sample(5), whole.sample(5))
    for name, weight in whole.module_.state_dict().items():
        assert torch.equal(resumed.module_.state_dict()[name], weight), name


def test_flips_half_of_the_images_only_if_asked(images):
    X, embeddings = images
    seen = []

    class Spy(Diffusion):
        def loss(self, denoiser, x0, *args, **kwargs):
            seen.append(x0)
            return super().loss(denoiser, x0, *args, **kwargs)

    unit = torch.from_numpy(X).permute(0, 3, 1, 2) / 127.5 - 1
    for flip in (False, True):
        seen.clear()
        model = tiny(random_flip=flip)
        rows = check_X(model, X, reset=True, images=True)
        state = model._prepare(rows, embeddings, seed=0)
        state.diffusion = Spy()
        with isolated_rng(0):
            state.loss(rows[:], torch.from_numpy(embeddings))
        same = [(a - b).abs().max() < 1e-5 for a, b in zip(seen[0], unit, strict=True)]
        mirrored = [(a - b.flip(2)).abs().max() < 1e-5 for a, b in zip(seen[0], unit, strict=True)]
        assert all(a or b for a, b in zip(same, mirrored, strict=True))
        assert (5 < sum(mirrored) < 35) if flip else all(same)


def test_saved_model_is_the_same(images, fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.sample(3), fitted.sample(3))
    assert loaded.image_shape_ == fitted.image_shape_


# ---- condition and denoiser ----------------------------------------------------------------------


def test_several_tokens(images):
    X, _ = images
    tokens = np.random.default_rng(1).normal(size=(40, 3, 8)).astype(np.float32)
    model = tiny(condition_noise=0.1).fit(X, embeddings=tokens)
    whole = model.sample(tokens)
    assert whole.shape == X.shape
    np.testing.assert_array_equal(model.sample(tokens[:2]), whole[:2])
    assert model.sample(3).shape == (3, 10, 9, 3)
    with pytest.raises(ValueError, match=r"embeddings have \(2, 8\) features"):
        model.sample(tokens[:, :2])
    with pytest.raises(ValueError, match="several tokens per row need the U-Net"):
        tiny(denoiser="mlp", width=8).fit(X.reshape(40, -1) / 255, embeddings=tokens)


class Tokens(TransformerMixin, BaseEstimator):
    """The mean of each third of an image: three tokens of its channels."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        X = np.asarray(X, dtype=np.float32)
        return np.stack([part.mean(axis=(1, 2)) for part in np.array_split(X, 3, axis=1)], axis=1)


def test_tokens_of_an_encoder(images):
    X = images[0][:12]
    model = tiny(encoder=Tokens(), max_epochs=1).fit(X)
    tokens = model.transform(X)
    assert tokens.shape == (12, 3, 3)
    made = model.interpolate(X[:3], X[3:6], [0.2, 0.5, 1.0])
    between = interpolate_rows(tokens[:3], tokens[3:6], [0.2, 0.5, 1.0])
    np.testing.assert_array_equal(made, model.sample(between))
    assert model.quality_report(X).n_real == 12


def test_short_conditions_keep_their_length(images):
    X, embeddings = images
    for width, normalised in ((2, False), (7, False), (8, True), (12, True)):
        model = tiny(max_epochs=1).fit(X[:10], embeddings=embeddings[:10, :width])
        assert model.module_.normalize is normalised


def test_denoiser_of_ones_own(images):
    X, embeddings = images
    with isolated_rng(0):
        own = UNetDenoiser(3, 12, block_out_channels=(8, 8))
    before = [p.clone() for p in own.parameters()]
    model = tiny(denoiser=own).fit(X, embeddings=embeddings)
    assert model.sample(2).shape == (2, 10, 9, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, own.parameters(), strict=True))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x_t, t, cond=None, drop=None):
            return self.layer(x_t)

    with isolated_rng(0):
        plain = Plain()
    assert tiny(denoiser=plain, encoder=None).fit(X).sample(2).shape == (2, 10, 9, 3)


class _OneChannel(nn.Module):
    def forward(self, x_t, t, cond=None, drop=None):
        return x_t[:, :1]


def test_refusals(images, fitted):
    X, embeddings = images
    for denoiser, given, match in (
        ("mlp", X, "does not take images"),
        ("unet", X.reshape(40, -1) / 255, "does not take vectors"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny(denoiser=denoiser).fit(given, embeddings=embeddings)
    with pytest.raises(ValueError, match="autoencoder is for images"):
        tiny(autoencoder=LatentAutoencoder()).fit(X.reshape(40, -1) / 255, embeddings=embeddings)
    with pytest.raises(NotFittedError, match="This LatentAutoencoder instance"):
        tiny(autoencoder=FrozenEstimator(LatentAutoencoder())).fit(X, embeddings=embeddings)
    with pytest.raises(ValueError, match=r"gave shape \(2, 1, 10, 9\)"):
        tiny(denoiser=_OneChannel()).fit(X, embeddings=embeddings)
    with pytest.raises(ValueError, match="random_flip=True flips pixels"):
        tiny(autoencoder=LatentAutoencoder(), random_flip=True).fit(X, embeddings=embeddings)

    def started(epoch, history):
        raise AssertionError("the encoder was trained first")

    encoder = SelfSupervisedEncoder(max_epochs=1, callbacks=started)
    for widths in ((), (8, 0), [8, -2], (8, 16.0), ("a",)):
        with pytest.raises(ValueError, match=r"'block_out_channels' .* integers of at least 1"):
            tiny(encoder=encoder, block_out_channels=widths).fit(X)
    with pytest.raises(ValueError, match="power of two"):
        tiny(encoder=encoder, autoencoder=LatentAutoencoder(downsampling=3)).fit(X)
    with pytest.raises(ValueError, match="no encoder of its own"):
        fitted.augment(X)
    with pytest.raises(ValueError, match="embeddings have 11 features"):
        fitted.sample(embeddings[:, :11])


# ---- latents -------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Number of images that any LatentAutoencoder has encoded for somebody else."""
    calls = []
    encode = LatentAutoencoder.encode

    def counting(self, batch):
        calls.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(LatentAutoencoder, "encode", counting)
    return calls


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_image_is_encoded_once(images, counted, monkeypatch, on_disk):
    X, embeddings = images
    if on_disk:
        monkeypatch.setattr(spaces_file, "_LATENTS_IN_MEMORY", 0)
    autoencoder = LatentAutoencoder(**AUTOENCODER)
    model = tiny(autoencoder=autoencoder, max_epochs=5).fit(X, embeddings=embeddings)
    assert sum(counted) == 40
    assert not hasattr(autoencoder, "module_")
    assert model.autoencoder_.image_shape_ == (10, 9, 3)
    assert isinstance(model._space_of(), LatentSpace)
    assert model._space_of().shape == (3, 5, 5)
    made = model.sample(3)
    assert made.shape == (3, 10, 9, 3)
    assert made.dtype == np.uint8


def test_latents_on_disk_give_the_same_model(images, monkeypatch):
    X, embeddings = images
    model = tiny(autoencoder=LatentAutoencoder(**AUTOENCODER), batch_size=40)
    in_memory = model.fit(X, embeddings=embeddings).sample(2)
    monkeypatch.setattr(spaces_file, "_LATENTS_IN_MEMORY", 0)
    np.testing.assert_array_equal(model.fit(X, embeddings=embeddings).sample(2), in_memory)


def test_resumed_fit_does_not_train_the_autoencoder_again(images, tmp_path):
    X, embeddings = images
    epochs = []

    def count(epoch, history):
        epochs.append(epoch)

    autoencoder = LatentAutoencoder(**AUTOENCODER, callbacks=count)
    model = tiny(autoencoder=autoencoder, checkpoint_dir=tmp_path)
    first = model.fit(X, embeddings=embeddings).sample(2)
    np.testing.assert_array_equal(model.fit(X, embeddings=embeddings).sample(2), first)
    assert epochs == [0]
    assert model.autoencoder_.checkpoint_dir is None


def test_frozen_autoencoder_is_used_as_it_is(images, tmp_path):
    X, embeddings = images
    autoencoder = LatentAutoencoder(**AUTOENCODER).fit(X)
    model = tiny(autoencoder=FrozenEstimator(autoencoder)).fit(X, embeddings=embeddings)
    a, b = model.autoencoder_.module_.state_dict(), autoencoder.module_.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.sample(2), model.sample(2))
    # The latents that the network sees are those of the autoencoder.
    rows = check_X(model, X, reset=False, images=True)
    np.testing.assert_allclose(
        model._latents(rows).numpy(), autoencoder.latents(X), rtol=1e-4, atol=1e-4
    )


# ---- options -------------------------------------------------------------------------------------


def test_clipping_bounds_pixels_and_leaves_latents(images, fitted):
    assert fitted._space_of().clip == 1.0
    assert LatentSpace.clip is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clipped_predictions_stand_for_clipped_samples(prediction_type):
    diffusion = Diffusion(1000, "cosine", prediction_type=prediction_type)
    noise = row_noise((2, 4, 4), 0, range(6))
    t = torch.tensor([0, 10, 300, 500, 900, 999])
    prediction = row_noise((2, 4, 4), 1, range(6))
    clipped = diffusion._clipped(lambda x, t, cond=None: prediction, 1.0)(noise, t)
    # Near pure noise epsilon says nothing of the sample: float32 has no digits left there.
    seen = slice(0, 5) if prediction_type == "epsilon" else slice(None)
    before = diffusion.predict_x0(prediction, noise, t)[seen]
    after = diffusion.predict_x0(clipped, noise, t)[seen]
    torch.testing.assert_close(after, before.clamp(-1, 1), rtol=1e-3, atol=2e-3)
    inside = diffusion._clipped(lambda x, t, cond=None: prediction, 1e9)(noise, t)
    assert torch.equal(inside, prediction)


def test_long_sampling_shows_its_progress(images, fitted, capsys):
    model = clone(fitted).set_params(verbose=1)
    model.__dict__.update({k: v for k, v in vars(fitted).items() if k not in model.get_params()})
    model.sample(3)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert "0/3" in shown  # and it is gone when the samples are there
    fitted.sample(3)
    assert not capsys.readouterr().err


def test_batches_of_sampling_fit_the_size():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = {
        side: [PixelSpace((3, side, side), (0, 255), "flat").sampling_batch(d) for d in (cpu, gpu)]
        for side in (8, 32, 64, 512)
    }
    assert sizes == {8: [128, 512], 32: [8, 256], 64: [4, 64], 512: [4, 16]}


def test_options_reach_the_model(images):
    X, embeddings = images
    model = tiny(layers_per_block=2, n_attention_levels=0, max_epochs=1)
    model.fit(X, embeddings=embeddings)
    assert model.module_.unet.config.layers_per_block == 2
    assert "CrossAttnDownBlock2D" not in model.module_.unet.config.down_block_types
    plain = tiny(max_epochs=1, block_out_channels="auto").fit(X, embeddings=embeddings)
    assert tuple(plain.module_.unet.config.block_out_channels) == (32, 64)
    assert plain._size("batch_size", True) == 16
    assert EmbeddingConditionedDiffusion()._size("batch_size", False) == 300


def test_views_are_rows_of_images(images, fitted):
    (view,) = fitted._views(images[1], 1, seed=3)
    assert view.is_image
    assert view.shape == (40, 3, 10, 9)
    assert view.pixel_range == (0, 255)
    assert view[[0]].dtype == torch.uint8


def test_quality_report(images, monkeypatch):
    X, _ = images
    flat = X.reshape(40, -1) / 255
    for encoder in (None, PCA(8)):
        model = tiny(encoder=encoder, image_shape=(10, 9, 3)).fit(flat)
        report = model.quality_report(flat, np.arange(40) % 2)
        assert np.isfinite(report.frechet_distance)
        assert report.copy_ratio > 0
        if encoder is None:
            # Pixels of many images would not fit into memory: components come from some.
            monkeypatch.setattr("diffaugkit.spaces._PIXEL_ROWS", 5)
            assert model.quality_report(flat).spread_ratio != report.spread_ratio
    assert model.transform(flat).shape == (40, 8)


def test_attention_maps(images, fitted):
    X = images[0]
    maps = fitted.attention_maps(X[:18])
    assert set(maps) == {(5, 5)}
    found = maps[5, 5]
    assert found.shape == (18, 25, 25)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.attention_maps(X[:2])[5, 5], found[:2], rtol=1e-4, atol=1e-6)
    assert not np.array_equal(fitted.attention_maps(X[:2], t=900)[5, 5], found[:2])
    with pytest.raises(ValueError, match="t=1000"):
        fitted.attention_maps(X[:2], t=1000)
    for t in (2.5, "late"):
        with pytest.raises(ValueError, match=r"t=.* must be an int in"):
            fitted.attention_maps(X[:2], t=t)
    with pytest.raises(ValueError, match="no encoder of its own"):
        fitted.attention_maps(X[:2], conditional=True)
    flat = X.reshape(40, -1) / 255
    vectors = EmbeddingConditionedDiffusion(None, width=8, max_epochs=1).fit(flat)
    for read in (vectors.attention_maps, vectors.feature_maps):
        with pytest.raises(ValueError, match="vectors"):
            read(flat)


def test_feature_maps(images, fitted):
    X = images[0]
    blocks = fitted.feature_maps(X[:18])
    module = fitted.module_.eval()
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append(out))
        for block in module.unet.up_blocks
    ]
    x = torch.from_numpy(X[:2]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        module(x, torch.full((2,), 300))
    for hook in hooks:
        hook.remove()
    assert len(blocks) == len(seen)
    for found, expected in zip(blocks, seen, strict=True):
        rows, columns = found.shape[2:]
        np.testing.assert_allclose(found[:2], expected[:, :, :rows, :columns], rtol=1e-4, atol=1e-5)
    assert blocks[-1].shape[2:] == X.shape[1:3]
    assert not np.array_equal(fitted.feature_maps(X[:2], t=900)[-1], blocks[-1][:2])
    with pytest.raises(ValueError, match="t=1000"):
        fitted.feature_maps(X[:2], t=1000)


class _FirstPixel(BaseEstimator):
    """Encoder whose result for a row is the same bit for bit in any company."""

    _n_features_out = 1

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return np.asarray(X)[:, :1]


@parametrize_with_checks(
    [
        EmbeddingConditionedDiffusion(
            _FirstPixel(), block_out_channels=(4,), max_epochs=1, n_sampling_steps=1,
            image_shape=(1, -1, 1),
        )
    ],
    expected_failed_checks=lambda estimator: {},
)  # fmt: skip
def test_check_estimator(estimator, check):
    check(estimator)
