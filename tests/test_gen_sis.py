"""Gen-SIS: three stages through public parts, generated images made once, alphas and partners."""

import copy

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.estimator_checks import parametrize_with_checks

from diffaugkit import (
    EmbeddingConditionedDiffusion,
    GenSIS,
    HistoDiffusionAugmenter,
    SelfSupervisedEncoder,
    load,
)
from diffaugkit.embedding_diffusion import interpolate_rows
from diffaugkit.gen_sis import draw_partners

pytest.importorskip("kornia")


def tiny_encoder(method="dino", **more):
    options = {"backbone": Tiny(), "max_epochs": 1, "batch_size": 16, "n_local_crops": 0}
    if method == "dino":
        options["method_options"] = {"bottleneck": 8, "hidden": 16}
        options["out_dim"] = 16
    return SelfSupervisedEncoder(method, **{**options, **more})


class Tiny(torch.nn.Module):
    """Mean and spread of each channel through a layer: any size of image."""

    num_features = 6

    def __init__(self, channels=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = (
                torch.nn.LazyLinear(6) if channels is None else torch.nn.Linear(2 * channels, 6)
            )

    def forward(self, x):
        flat = x.flatten(2)
        return self.layer(torch.cat([flat.mean(2), flat.std(2, unbiased=False)], dim=1))


def tiny_diffusion(**more):
    options = {"block_out_channels": (8, 8), "max_epochs": 1, "n_sampling_steps": 2}
    return EmbeddingConditionedDiffusion(None, **{**options, **more})


def tiny(**more):
    options = {"encoder": tiny_encoder(), "diffusion": tiny_diffusion(), "n_views": 1}
    return GenSIS(**{**options, "random_state": 0, **more})


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).integers(0, 256, size=(40, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted(X):
    return tiny().fit(X)


@pytest.fixture
def recorded(monkeypatch):
    """Keyword arguments of each fit of an encoder, and the embeddings of each call of sample."""
    calls = {"fit": [], "sample": []}
    fit, sample = SelfSupervisedEncoder.fit, EmbeddingConditionedDiffusion.sample

    def record_fit(self, X, y=None, **kwargs):
        calls["fit"].append(kwargs)
        return fit(self, X, y, **kwargs)

    def record_sample(self, n_or_embeddings=1, **kwargs):
        calls["sample"].append(np.array(n_or_embeddings))
        return sample(self, n_or_embeddings, **kwargs)

    monkeypatch.setattr(SelfSupervisedEncoder, "fit", record_fit)
    monkeypatch.setattr(EmbeddingConditionedDiffusion, "sample", record_sample)
    return calls


def test_the_three_stages(X, fitted):
    assert list(dict.fromkeys(fitted.history_["phase"])) == ["vanilla", "diffusion", "generative"]
    assert fitted.n_iter_ == len(fitted.history_) == 3
    vanilla = clone(fitted.vanilla_encoder_).fit(X)
    np.testing.assert_array_equal(vanilla.transform(X), fitted.vanilla_encoder_.transform(X))
    assert not np.array_equal(fitted.transform(X), vanilla.transform(X))
    assert "disentanglement" in fitted.history_
    with pytest.raises(ValueError, match="embeddings"):
        fitted.diffusion_.transform(X)  # it was fitted on those of the vanilla encoder


def test_outputs_have_the_form_of_the_input(X, fitted, monkeypatch):
    assert fitted.augment(X[:3], 2).shape == (6, 8, 8, 1)
    assert fitted.augment(X[:3]).dtype == np.uint8
    assert fitted.interpolate(X[:3], X[3:6], 0.3).shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(fitted.augment(X[:3], 2), fitted.augment(X[:3], 2))
    ends = fitted.interpolate(X[:3], X[3:6], 1.0)
    np.testing.assert_array_equal(
        ends, fitted.diffusion_.sample(fitted.vanilla_encoder_.transform(X[:3]))
    )
    report = fitted.quality_report(X, np.arange(40) % 2)
    assert np.isfinite([report.spread_ratio, report.copy_ratio]).all()
    # Of many images some are drawn.
    monkeypatch.setattr("diffaugkit.metrics.quality.report_rows", lambda n, *_: np.arange(n - 9, n))
    assert fitted.quality_report(X, np.arange(40) % 2).n_generated == 9
    flat = tiny(image_shape=(8, 8, 1)).fit(X.reshape(40, 64) / 255)
    assert flat.augment(X[:3].reshape(3, 64) / 255).shape == (3, 64)


def test_generated_views_and_interpolations_reach_the_encoder(X, recorded):
    model = tiny(n_views=2, alpha=(0.2, 0.6)).fit(X)
    first, second = recorded["fit"]
    assert first == {}
    assert len(second["positives"]) == 2
    images, partners, alphas = second["interpolations"]
    assert images.shape == (40, 1, 8, 8)
    assert (partners != np.arange(40)).all()
    assert set(alphas) == {np.float32(0.2), np.float32(0.6)}
    embeddings = model.vanilla_encoder_.transform(X)
    np.testing.assert_array_equal(recorded["sample"][0], embeddings)
    np.testing.assert_array_equal(recorded["sample"][1], embeddings)
    between = interpolate_rows(embeddings, embeddings[partners], alphas)
    np.testing.assert_array_equal(recorded["sample"][2], between)
    made = [np.asarray(view) for view in second["positives"]]
    assert not np.array_equal(*made)


def test_pixel_blends_are_the_ablation(X, recorded):
    tiny(n_views=0, interpolation="pixels", alpha=0.25).fit(X)
    assert recorded["sample"] == []
    assert recorded["fit"][1]["positives"] is None
    images, partners, _ = recorded["fit"][1]["interpolations"]
    blend = np.rint(0.25 * X + 0.75 * X[partners].astype(np.float64))
    np.testing.assert_array_equal(images[:].numpy()[:, 0], blend[..., 0])
    assert images[[0]].dtype == torch.uint8


def test_without_interpolations_any_method_learns(X, recorded):
    model = tiny(encoder=tiny_encoder("simclr")).fit(X)
    assert recorded["fit"][1]["interpolations"] is None
    assert model.encoder_.method == "simclr"


def test_interpolations_without_dino_are_refused_before_any_work(X, recorded):
    with pytest.raises(
        ValueError, match=r"n_interpolations=1.*method='dino', not 'simclr'.*'auto'"
    ):
        tiny(encoder=tiny_encoder("simclr"), n_interpolations=1).fit(X)
    assert recorded == {"fit": [], "sample": []}


def test_views_that_are_never_picked_are_not_made(X, recorded):
    tiny(n_views=3, positives_prob=0.0).fit(X)
    assert recorded["fit"][1]["positives"] is None
    assert len(recorded["sample"]) == 1  # the interpolations


@pytest.mark.parametrize(
    "unused",
    [
        {"n_views": 0, "n_interpolations": 0},
        {"positives_prob": 0.0, "n_interpolations": 0},
        {"encoder": tiny_encoder("simclr"), "n_views": 0},
    ],
)
def test_a_second_encoder_that_sees_nothing_new_is_refused_before_any_work(X, recorded, unused):
    with pytest.raises(ValueError, match="would see no generated image: raise one of the three"):
        tiny(**unused).fit(X)
    assert recorded == {"fit": [], "sample": []}


def test_frozen_parts_are_used_as_they_are(X, fitted):
    frozen = FrozenEstimator(fitted.vanilla_encoder_)
    generator = FrozenEstimator(fitted.diffusion_)
    model = tiny(encoder=frozen, diffusion=generator).fit(X)
    assert model.vanilla_encoder_ is frozen
    assert list(model.history_["phase"].unique()) == ["generative"]
    np.testing.assert_array_equal(model.augment(X[:2]), fitted.augment(X[:2]))


def test_a_frozen_diffusion_of_other_images_is_refused_before_any_work(X, fitted, recorded):
    def refused(diffusion, images, message, error=ValueError):
        with pytest.raises(error, match=message):
            tiny(diffusion=FrozenEstimator(diffusion)).fit(images)
        assert recorded == {"fit": [], "sample": []}

    # Bytes generated for images in [0, 1] were taken for values of up to 255 times white.
    refused(fitted.diffusion_, X / 255, "pixels from 0.0 to 1.0, but .* fitted on pixels from 0 to")
    refused(fitted.diffusion_, np.uint16(X) * 257, "pixels from 0 to 65535, but")
    refused(fitted.diffusion_, X[:, :4], r"\(4, 8, 1\), but the frozen diffusion was fitted on")
    refused(tiny_diffusion(), X, "not fitted", NotFittedError)


def test_a_frozen_diffusion_listens_to_its_own_encoder(X, recorded):
    encoder = tiny_encoder(random_state=7)  # as wide as the vanilla one, which is another
    own = tiny_diffusion(random_state=0).set_params(encoder=encoder).fit(X)
    known = own.encoder_.transform(X)
    model = tiny(diffusion=FrozenEstimator(own)).fit(X)
    assert not np.allclose(model.vanilla_encoder_.transform(X), known)
    np.testing.assert_array_equal(recorded["sample"][0], known)
    np.testing.assert_array_equal(model.augment(X), own.augment(X))
    np.testing.assert_array_equal(
        model.interpolate(X[:4], X[4:8], 0.3), own.interpolate(X[:4], X[4:8], 0.3)
    )
    assert model.quality_report(X).to_frame().equals(own.quality_report(X).to_frame())


def test_a_diffusion_of_given_embeddings_needs_a_frozen_encoder(X, fitted, recorded):
    # Its embeddings were as wide as those that the diffusion knows, and meant something else.
    with pytest.raises(ValueError, match=r"give the encoder that made them as .*FrozenEstimator"):
        tiny(diffusion=FrozenEstimator(fitted.diffusion_)).fit(X)
    assert recorded == {"fit": [], "sample": []}


def test_a_frozen_diffusion_may_have_another_layout(X, fitted):
    tensors = torch.from_numpy(X).permute(0, 3, 1, 2)
    embeddings = fitted.vanilla_encoder_.transform(X)
    frozen = FrozenEstimator(fitted.vanilla_encoder_)
    found = [
        tiny(encoder=frozen, diffusion=FrozenEstimator(diffusion)).fit(X).transform(X)
        for diffusion in (
            tiny_diffusion(random_state=0).fit(images, embeddings=embeddings)
            for images in (X, tensors, X[..., 0])
        )
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("kind", ["flat", "channels first"])
def test_what_a_frozen_diffusion_generates_has_the_form_of_the_input(X, fitted, kind):
    embeddings = fitted.vanilla_encoder_.transform(X)

    def model(images, **options):
        diffusion = tiny_diffusion(random_state=0, **options).fit(images, embeddings=embeddings)
        frozen = FrozenEstimator(fitted.vanilla_encoder_)
        return tiny(encoder=frozen, diffusion=FrozenEstimator(diffusion)).fit(X)

    if kind == "flat":
        other = model(X.reshape(40, -1), image_shape=(8, 8, 1))
    else:
        other = model(torch.from_numpy(X).permute(0, 3, 1, 2))
    same = model(X)
    np.testing.assert_array_equal(other.augment(X[:4], 2), same.augment(X[:4], 2))
    np.testing.assert_array_equal(other.interpolate(X[:4], X[4:8]), same.interpolate(X[:4], X[4:8]))
    assert other.quality_report(X).to_frame().equals(same.quality_report(X).to_frame())


def test_a_store_grows_by_more_views_and_needs_no_seed(X, tmp_path, recorded):
    first = tiny(store_dir=tmp_path / "a", random_state=None).fit(X)
    n_calls = len(recorded["sample"])
    again = tiny(store_dir=tmp_path / "a", random_state=None).fit(X)
    assert len(recorded["sample"]) == n_calls
    np.testing.assert_array_equal(first.transform(X), again.transform(X))
    tiny(store_dir=tmp_path / "a", random_state=None, n_views=3).fit(X)
    assert len(recorded["sample"]) == n_calls + 2


def test_images_are_made_once(X, tmp_path, recorded):
    first = tiny(store_dir=tmp_path / "store", n_views=2).fit(X)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "view-0",
        "view-1",
        "interpolation",
    }
    n_calls = len(recorded["sample"])
    again = tiny(store_dir=tmp_path / "store", n_views=2).fit(X)
    assert len(recorded["sample"]) == n_calls  # everything was found
    np.testing.assert_array_equal(first.transform(X), again.transform(X))
    in_memory = tiny(n_views=2).fit(X)
    np.testing.assert_array_equal(first.transform(X), in_memory.transform(X))
    n_fits = len(recorded["fit"])
    with pytest.raises(ValueError, match="another run; they differ in seed"):
        tiny(store_dir=tmp_path / "store", n_views=2, random_state=1).fit(X)
    with pytest.raises(ValueError, match="another run; they differ in n "):
        tiny(store_dir=tmp_path / "store", n_views=2).fit(X[:30])
    assert len(recorded["fit"]) == n_fits  # before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "images"),  # others of the same number
        ({"encoder": tiny_encoder(max_epochs=2)}, "vanilla max_epochs"),
        ({"encoder": tiny_encoder(temperature=0.3)}, "vanilla temperature"),
        ({"diffusion": tiny_diffusion(max_epochs=2)}, "max_epochs"),
        ({"alpha": 0.3}, "pairs"),
        ({"interpolation": "lerp"}, "interpolation"),
        ({"groups": np.arange(40) % 2}, "pairs"),
    ],
)
def test_a_store_of_another_run_is_refused_before_any_training(
    X, tmp_path, recorded, change, message
):
    change = dict(change)
    groups = change.pop("groups", None)
    tiny(store_dir=tmp_path).fit(X)
    n_fits = len(recorded["fit"])
    with pytest.raises(ValueError, match=f"another run; they differ in {message} "):
        tiny(store_dir=tmp_path, **change).fit(
            X if change or groups is not None else 255 - X, groups=groups
        )
    assert len(recorded["fit"]) == n_fits


def test_frozen_parts_of_a_store_are_checked_first(X, fitted, tmp_path, recorded):
    frozen = FrozenEstimator(fitted.vanilla_encoder_)
    tiny(encoder=frozen, store_dir=tmp_path).fit(X)
    again = clone(fitted.vanilla_encoder_).set_params(random_state=5).fit(X)
    diffusion_fits = []

    def fit(self, *args, **kwargs):
        diffusion_fits.append(args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingConditionedDiffusion, "fit", fit)
        with pytest.raises(ValueError, match="another run; they differ in vanilla weights"):
            tiny(encoder=FrozenEstimator(again), store_dir=tmp_path).fit(X)
        with pytest.raises(NotFittedError):
            tiny(encoder=FrozenEstimator(clone(again)), store_dir=tmp_path).fit(X)
    assert diffusion_fits == []
    # What the new encoder alone depends on may change: the images stay.
    n_calls = len(recorded["sample"])
    other = copy.deepcopy(fitted.vanilla_encoder_).set_params(max_epochs=2)
    tiny(encoder=FrozenEstimator(other), store_dir=tmp_path).fit(X)
    assert len(recorded["sample"]) == n_calls


def test_a_killed_fit_goes_on(X, tmp_path, monkeypatch, recorded):
    whole = tiny(n_views=2).fit(X)
    fit, calls = SelfSupervisedEncoder.fit, []

    def die_in_the_third_stage(self, X, y=None, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(self, X, y, **kwargs)

    monkeypatch.setattr(SelfSupervisedEncoder, "fit", die_in_the_third_stage)
    with pytest.raises(KeyboardInterrupt):
        tiny(n_views=2, checkpoint_dir=tmp_path).fit(X)
    monkeypatch.setattr(SelfSupervisedEncoder, "fit", fit)
    n_calls = len(recorded["sample"])
    resumed = tiny(n_views=2, checkpoint_dir=tmp_path).fit(X)
    assert len(recorded["sample"]) == n_calls
    np.testing.assert_array_equal(whole.transform(X), resumed.transform(X))


def test_a_store_of_other_samples_is_refused(X, fitted, tmp_path):
    generator = copy.deepcopy(fitted.diffusion_)
    frozen = FrozenEstimator(fitted.vanilla_encoder_)
    options = {"encoder": frozen, "diffusion": FrozenEstimator(generator), "store_dir": tmp_path}
    tiny(**options).fit(X)
    tiny(**options).fit(X)
    for changed in ({"condition_noise": 5.0}, {"clip_sample": False}, {"n_sampling_steps": 3}):
        before = {name: getattr(generator, name) for name in changed}
        generator.set_params(**changed)
        with pytest.raises(ValueError, match=f"{next(iter(changed))} .* there, .* here"):
            tiny(**options).fit(X)
        generator.set_params(**before)


def test_save_and_load(X, fitted, tmp_path):
    # A module of the user's own cannot be rebuilt from a file: parts with names can.
    options = {"backbone": "small_resnet", "max_epochs": 1, "n_local_crops": 0, "out_dim": 16}
    encoder = SelfSupervisedEncoder("dino", **options)
    model = tiny(encoder=encoder).fit(X)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))
    np.testing.assert_array_equal(loaded.augment(X[:2]), model.augment(X[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": (0.5, 1.0)}, r"alpha=\(0.5, 1.0\) must be in \(0, 1\)"),
        ({"alpha": ()}, "alpha"),
        ({"encoder": FrozenEstimator(PCA())}, "cannot learn from generated images"),
        ({"encoder": SelfSupervisedEncoder("dino", max_epochs=0)}, "which max_epochs=0 does not"),
        ({"diffusion": EmbeddingConditionedDiffusion(denoiser="mlp")}, "does not take images"),
        ({"diffusion": HistoDiffusionAugmenter()}, "does not generate images from embeddings"),
    ],
)
def test_wrong_parameters_are_refused_before_any_work(X, change, message, recorded):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**change).fit(X)
    assert recorded["fit"] == []


def test_groups_keep_partners_apart(X, recorded):
    groups = np.arange(40) // 10
    tiny().fit(X, groups=groups)
    _, partners, _ = recorded["fit"][1]["interpolations"]
    assert (groups[partners] != groups).all()
    with pytest.raises(ValueError, match="one group only"):
        tiny().fit(X, groups=np.zeros(40))
    with pytest.raises(ValueError, match="inconsistent"):
        tiny().fit(X, groups=groups[:-1])


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2]])
def test_partners_are_drawn_evenly(groups):
    n, counts = 6, np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(n), draw_partners(n, groups, seed)] += 1
    codes = np.arange(n) if groups is None else np.array(groups)
    allowed = codes[:, None] != codes[None]
    assert (counts[~allowed] == 0).all()
    expected = 3000 * allowed / allowed.sum(axis=1, keepdims=True)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


@parametrize_with_checks(
    [
        GenSIS(
            tiny_encoder(backbone="small_resnet", image_shape=(1, -1, 1)),
            tiny_diffusion(image_shape=(1, -1, 1)),
            n_views=1,
            image_shape=(1, -1, 1),
        )
    ]
)
def test_check_estimator(estimator, check):
    check(estimator)
