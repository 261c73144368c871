"""SelfSupervisedEncoder on images: what it learns, generated images, resume, purity, refusals."""

import itertools
import json
import pickle
import shutil
import warnings

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

import diffaugkit
from diffaugkit import EmbeddingConditionedDiffusion, SelfSupervisedEncoder, encoder_fits
from diffaugkit.metrics import knn_accuracy
from diffaugkit.networks import DINOHead, EmbeddingMLP, small_vit
from diffaugkit.objectives import (
    BYOLObjective,
    CollapseWarning,
    DINOObjective,
    MoCoObjective,
    feature_spread,
)
from diffaugkit.runtime import isolated_rng

METHODS = ["dino", "simclr", "mocov2", "byol", "simsiam", "scl"]
every_method = pytest.mark.parametrize("method", METHODS)
# A fit of a few steps may well look collapsed: what is tested here is something else.
pytestmark = pytest.mark.filterwarnings("ignore::diffaugkit.objectives.CollapseWarning")


class Tiny(nn.Module):
    """Convolutions with BatchNorm that cost nothing."""

    num_features = 8

    def __init__(self, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def tiny_vit(channels=1):
    with isolated_rng(0):
        return small_vit((8, 8, channels), width=8, depth=2, heads=2)


def tiny(method="dino", **more):
    with isolated_rng(0):
        backbone = tiny_vit() if method == "dino" else Tiny()
    options = {"backbone": backbone, "max_epochs": 2, "batch_size": 16, "random_state": 0}
    if method == "dino":
        options |= {"out_dim": 16, "method_options": {"hidden": 16, "bottleneck": 8}}
    return SelfSupervisedEncoder(method, **{**options, **more})


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X * 15).astype(np.uint8).reshape(-1, 8, 8, 1), y


@pytest.fixture(scope="module")
def X(digits):
    return digits[0][:40]


# ---- what it learns ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_a_short_fit_beats_random_features(digits, method):
    X, y = digits[0][:500], digits[1][:500]
    options = {"backbone": "small_resnet", "batch_size": 50, "random_state": 0}
    options |= {"learning_rate": 3e-3, "precision": "fp32"}
    start = SelfSupervisedEncoder(method, **options | {"max_epochs": 1, "learning_rate": 1e-9})
    before = knn_accuracy(start.fit(X).transform(X), y)
    encoder = SelfSupervisedEncoder(method, max_epochs=10, **options).fit(X)
    after = knn_accuracy(encoder.transform(X), y)
    assert after >= before + 0.05, (before, after)
    assert encoder.history_["feature_spread"].iloc[-1] > 0.3
    if method == "dino":
        assert encoder.history_["teacher_entropy"].iloc[-1] < 0.95


@every_method
def test_every_method_gives_an_embedding_and_logs(X, method):
    encoder = tiny(method).fit(X)
    y = encoder.transform(X)
    assert y.shape == (40, 8)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    assert list(encoder.get_feature_names_out())[:1] == ["selfsupervisedencoder0"]
    assert len(encoder.get_feature_names_out()) == 8
    assert encoder.image_shape_ == (8, 8, 1)
    assert encoder.n_features_in_ == 64
    assert (encoder.out_dim_ == 16) if method == "dino" else encoder.out_dim_ is None
    history = encoder.history_
    assert len(history) == encoder.n_iter_ == 2
    assert np.isfinite(history.to_numpy(float)).all()
    assert history["feature_spread"].between(0, 1).all()
    assert ("teacher_entropy" in history) == (method == "dino")
    if method == "scl":
        assert encoder.project(X).shape == (40, 2)
    else:
        with pytest.raises(AttributeError, match="makes no low-dimensional map"):
            encoder.project(X)


@every_method
def test_every_method_takes_vectors_too(blobs, method):
    X, labels = blobs
    options = {"hidden_sizes": (16,), "n_components": 6, "n_pcs": 8, "batch_size": 80}
    encoder = SelfSupervisedEncoder(method, max_epochs=8, random_state=0, **options).fit(X)
    assert encoder.transform(X).shape == (240, 6)
    assert encoder.image_shape_ is None
    assert knn_accuracy(encoder.transform(X), labels) >= 0.95
    with pytest.raises(ValueError, match="for images, but the encoder was fitted on vectors"):
        encoder.attention_maps(X)


def test_auto_is_simclr_with_a_resnet(X):
    encoder = SelfSupervisedEncoder(max_epochs=1, random_state=0).fit(X)
    assert encoder.transform(X).shape == (40, 128)
    simclr = SelfSupervisedEncoder("simclr", max_epochs=1, random_state=0).fit(X)
    np.testing.assert_array_equal(simclr.transform(X), encoder.transform(X))


def test_small_transformer_has_attention(X):
    encoder = SelfSupervisedEncoder("byol", "small_vit", max_epochs=1, random_state=0).fit(X)
    assert encoder.transform(X).shape == (40, 192)
    assert encoder.attention_maps(X[:2]).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(("n", "out_dim"), [(40, 256), (1500, 2048), (5000, 4096), (10**7, 65536)])
def test_prototypes_follow_the_number_of_samples(n, out_dim):
    encoder = SelfSupervisedEncoder("dino")
    assert encoder_fits.auto_out_dim(encoder, range(n), "dino") == out_dim


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"features": "pooled"},
        {"features": "last_n", "method_options": {"hidden": 16, "bottleneck": 8, "n_last": 2}},
        {"n_components": 5},
        {"augmentation": "natural"},
        {"augmentation": "tissue"},
        {"augmentation": {"flip": 0.5}},
        {"augmentation": torch.flip},
        {"n_local_crops": 2},
        {"out_dim": 32},
        {"student_temp": 0.2},
        {"teacher_temp": 0.07},
        {"momentum": 0.5},
        {"method_options": {"hidden": 16, "bottleneck": 8, "norm_last": False}},
        {"method_options": {"hidden": 16, "bottleneck": 8, "frozen_epochs": 0}},
        {"method_options": {"hidden": 16, "bottleneck": 8, "center_momentum": 0.5}},
        {"method_options": {"hidden": 16, "bottleneck": 8, "warmup_teacher_temp": 0.1,
                            "warmup_share": 0.5}},
        {"weight_decay": 0.5},
        {"precision": "bf16"},
    ],
    ids="-".join,
)  # fmt: skip
def test_every_option_of_dino_is_used(X, options):
    if options.get("augmentation") is torch.flip:
        options = {"augmentation": mirrored}
    encoder = tiny(**options).fit(X)
    y = encoder.transform(X)
    width = {"n_components": 5, "features": 16}
    expected = 16 if options.get("features") == "last_n" else options.get("n_components", 8)
    assert y.shape == (40, expected), width
    base = tiny().fit(X).transform(X)
    assert y.shape != base.shape or not np.array_equal(y, base)


def mirrored(batch):
    return batch.flip(3)


@pytest.mark.parametrize(("given", "used"), [("auto", [0.04, 0.04]), ((0.04, 0.4), [0.04, 0.4])])
def test_weight_decay_may_rise(X, monkeypatch, given, used):
    decays, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        decays.append(self.param_groups[0]["weight_decay"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    tiny(weight_decay=given, max_epochs=20).fit(X)
    np.testing.assert_allclose([decays[0], decays[-1]], used, atol=2e-3)
    with pytest.raises(ValueError, match=r"weight_decay=\(0.1, -1\) must be"):
        tiny(weight_decay=(0.1, -1)).fit(X)
    with pytest.raises(ValueError, match=r"weight_decay=\('a',\) must be"):
        tiny(weight_decay=("a",)).fit(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "mlp"}, "is for vectors"),
        ({"backbone": "resnet_of_mine"}, "is neither"),
        ({"backbone": torch.nn.Conv2d(7, 8, 3)}, r"Conv2d cannot take images of shape \(1, "),
        ({"augmentation": "fancy"}, "no recipe 'fancy'"),
        ({"augmentation": {"flop": 1}}, "no value of a recipe"),
        ({"method_options": {"bottelneck": 8}}, "bottelneck"),
        ({"method_options": {"mix": "colours"}}, "mix"),
        ({"method_options": {"bottleneck": 0}}, r"bottleneck=0 must be an int in the range \[1"),
        ({"method_options": {"center_momentum": 2.0}}, r"center_momentum=2.0 must be a float"),
        ({"method_options": {"frozen_epochs": -1}}, r"frozen_epochs=-1 must be"),
        ({"method_options": {"hidden": "256"}}, r"hidden='256' must be an int .* or .*'auto'"),
        ({"method_options": {"norm_last": "no"}}, r"norm_last='no' must be"),
        ({"method_options": {"queue_size": 0}}, r"queue_size=0 must be"),
        ({"method_options": {"warmup_teacher_temp": 0.0}}, r"warmup_teacher_temp=0.0 must be"),
        ({"features": "cls", "backbone": "small_resnet"}, "vision transformer"),
        ({"pretrained": "nowhere"}, "is no file"),
        ({"image_shape": (3, 3, 1)}, "image_shape"),
    ],
)
def test_wrong_parameters_are_named(X, options, message):
    images = X.reshape(40, -1) if "image_shape" in options else X
    encoder = tiny(**options)
    with pytest.raises(ValueError, match=message):
        encoder.fit(images)
    assert not hasattr(encoder, "module_")


def test_local_crops_that_a_backbone_cannot_take_are_named_before_the_fit():
    X = np.zeros((12, 16, 16, 1), dtype=np.uint8)
    with isolated_rng(0):
        fixed = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\).* local crops: set n_local_crops=0"):
        tiny(backbone=fixed).fit(X)
    tiny(backbone=fixed, n_local_crops=0).fit(X)
    tiny("simclr", backbone=fixed).fit(X)


def test_pretrained_weights_are_where_a_fit_begins(X, tmp_path):
    first = tiny("simclr", backbone="small_resnet", max_epochs=1).fit(X)
    path = tmp_path / "weights.pth"
    torch.save(first.module_.backbone.state_dict(), path)
    second = tiny("byol", backbone="small_resnet", pretrained=path, learning_rate=1e-12).fit(X)
    for (name, a), b in zip(
        first.module_.backbone.named_parameters(), second.module_.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)
    second.save(tmp_path / "model")
    path.unlink()  # a saved model does without
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(X), second.transform(X))
    # Nor does a fit that goes on from its own weights need those of the file.
    assert loaded.set_params(warm_start=True).fit(X).n_iter_ == 2


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folder of a small model in the layout of timm's hub, and the model."""
    folder = tmp_path_factory.mktemp("hub") / "test_vit"
    args = {"img_size": 32, "num_classes": 3}
    with isolated_rng(0):
        model = timm.create_model("test_vit", **args)
    cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input_size": [3, 32, 32]}
    cfg |= {"num_classes": 3, "first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "test_vit", "model_args": args, "pretrained_cfg": cfg}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder, model.eval()


def in_cache(folder, monkeypatch, tmp_path):
    """Put a folder into the cache of the hub, as a download does, and be offline."""
    root = tmp_path / "models--owner--name"
    shutil.copytree(folder, root / "snapshots" / ("0" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["local-dir", "hf-hub"])
def test_a_pretrained_network_serves_as_it_is(hub, kind, monkeypatch, tmp_path):
    folder, model = hub
    pretrained = f"local-dir:{folder}"
    if kind == "hf-hub":
        if not timm.models._hub.has_hf_hub():
            pytest.skip("this timm is too old for this version of huggingface_hub")
        in_cache(folder, monkeypatch, tmp_path)
        pretrained = "hf-hub:owner/name"
    X = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    encoder = SelfSupervisedEncoder(pretrained=pretrained, max_epochs=0).fit(X)
    scaled = (X / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    x = torch.from_numpy(scaled).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
    np.testing.assert_allclose(encoder.transform(X), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.patch_tokens(X), tokens, rtol=1e-4, atol=1e-5)
    assert encoder.n_iter_ == len(encoder.history_) == 0
    # What is saved needs neither the folder nor the hub.
    encoder.save(tmp_path / "model")
    monkeypatch.setattr("diffaugkit.networks._hub_config", None)
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(X), encoder.transform(X))
    generator = EmbeddingConditionedDiffusion(FrozenEstimator(loaded), max_epochs=1)
    assert generator.fit(X).sample(loaded.transform(X[:2])).shape == (2, 32, 32, 3)


def test_a_fit_begins_at_a_pretrained_network_and_its_scale(hub):
    X = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    source = {"pretrained": f"local-dir:{hub[0]}"}
    as_it_is = SelfSupervisedEncoder(**source, max_epochs=0).fit(X)
    few = SelfSupervisedEncoder(**source, max_epochs=1, learning_rate=1e-12).fit(X)
    np.testing.assert_allclose(few.transform(X), as_it_is.transform(X), rtol=1e-4, atol=1e-5)


def test_tags_of_timm_tell_the_scale_of_pixels(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    X = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    encoder = SelfSupervisedEncoder(backbone="test_vit", pretrained="", max_epochs=0).fit(X)
    cfg = timm.models.get_pretrained_cfg("test_vit")
    np.testing.assert_allclose(encoder.module_.mean.ravel(), 2 * np.array(cfg.mean) - 1, rtol=1e-6)
    np.testing.assert_allclose(encoder.module_.std.ravel(), 2 * np.array(cfg.std), rtol=1e-6)
    grey = clone(encoder).fit(X[..., :1])
    np.testing.assert_allclose(grey.module_.mean.ravel(), 2 * np.mean(cfg.mean) - 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs=0 keeps the weights of pretrained=, or of a module"),
        ({"max_epochs": 0, "n_components": 4, "backbone": nn.Flatten()}, "leave it at 'auto', and"),
        ({"pretrained": "local-dir:/nowhere"}, "there is no file .*config.json"),
        ({"pretrained": "hf-hub:a/b", "backbone": "small_vit"}, "leave backbone at 'auto', got"),
        ({"pretrained": "nosuch", "backbone": "test_vit"}, "no tag of timm's .*test_vit.r160_in1k"),
    ],
)
def test_pretrained_networks_that_there_are_not(X, options, message):
    with pytest.raises(ValueError, match=message):
        SelfSupervisedEncoder(**options).fit(X)


def test_a_network_as_it_is_learns_nothing(X):
    encoder = SelfSupervisedEncoder(backbone=nn.Flatten(), max_epochs=0)
    assert encoder.fit(X).transform(X).shape == (40, X[0].size)
    with pytest.raises(ValueError, match="learns nothing from positives"):
        encoder.fit(X, positives=[X])
    with pytest.raises(ValueError, match="max_epochs=0 keeps the weights of pretrained="):
        encoder.fit(X.reshape(40, -1))


def test_long_embedding_shows_its_progress(X, capsys, monkeypatch):
    encoder = tiny("simclr", max_epochs=1, verbose=False).fit(X).set_params(verbose=True)
    encoder.transform(X)
    assert "embedding" not in capsys.readouterr().err  # of a moment
    clock = itertools.count(0, 3)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    encoder.transform(X)
    assert "embedding: 100%" in capsys.readouterr().err


def test_attention_and_patch_tokens(X):
    encoder = tiny().fit(X)
    maps = encoder.attention_maps(X)
    assert maps.shape == (40, 2, 4, 4)
    assert (maps >= 0).all()
    assert (maps.sum((2, 3)) <= 1 + 1e-5).all()
    np.testing.assert_array_equal(encoder.attention_maps(X[7:9]), maps[7:9])
    tokens = encoder.patch_tokens(X)
    assert tokens.shape == (40, 16, 8)
    pooled = tiny(features="pooled", learning_rate=1e-12).fit(X)
    np.testing.assert_allclose(
        pooled.transform(X), pooled.patch_tokens(X).mean(1), rtol=1e-4, atol=1e-5
    )
    for call in ("attention_maps", "patch_tokens"):
        with pytest.raises(ValueError, match="needs a vision transformer"):
            getattr(tiny("simclr").fit(X), call)(X)


@every_method
def test_compile_reaches_what_the_loss_calls(X, method, monkeypatch):
    calls = []

    def count(function, **_):
        return lambda *args: calls.append(1) or function(*args)

    monkeypatch.setattr(torch, "compile", count)
    compiled = tiny(method, compile=True).fit(X).transform(X)
    assert calls
    np.testing.assert_array_equal(compiled, tiny(method).fit(X).transform(X))


# ---- input ---------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_embedding(X):
    expected = tiny().fit(X).transform(X)
    for images, options in (
        (torch.from_numpy(X).permute(0, 3, 1, 2), {}),
        (X[..., 0], {}),
        (X.reshape(40, -1), {"image_shape": (8, 8, 1)}),
        (X.reshape(40, -1), {"image_shape": (8, -1, 1)}),
    ):
        encoder = tiny(**options).fit(images)
        np.testing.assert_array_equal(encoder.transform(images), expected)
    floats = (X / 255).astype(np.float32)
    np.testing.assert_allclose(tiny().fit(floats).transform(floats), expected, rtol=1e-3, atol=1e-3)


def test_images_go_through_a_pipeline(digits):
    X, _ = load_digits(return_X_y=True)
    pipeline = make_pipeline(tiny(image_shape=(8, 8, 1)), PCA(2)).fit(X[:60])
    assert pipeline.transform(X[:5]).shape == (5, 2)


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, 9, 9, 1), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)]
)
def test_other_sizes_are_refused(X, wrong):
    encoder = tiny().fit(X)
    with pytest.raises(ValueError, match="8"):
        encoder.transform(wrong)


def test_bad_images_are_refused(X):
    bad = X.astype(np.float32) / 255
    bad[3, 2, 2] = np.nan
    for images in (bad, X[:0], X[:1]):
        with pytest.raises(ValueError, match=r"."):
            tiny().fit(images)


# ---- generated images ----------------------------------------------------------------------------


@every_method
def test_positives_are_used(X, method):
    views = [X[::-1].copy(), 255 - X]
    fits = [
        tiny(method, positives_prob=prob).fit(X, positives=views).transform(X)
        for prob in (0.0, 0.5, 1.0)
    ]
    assert not np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[1], fits[2])
    auto = tiny(method).fit(X, positives=views).transform(X)
    np.testing.assert_array_equal(auto, fits[2])


def test_the_second_view_is_one_of_the_generated(X):
    # Images of one value each, and views that change nothing: what comes is what was given.
    seen = []

    def record(batch):
        seen.append(batch.mean((1, 2, 3)))
        return batch

    real, first, second = (np.full((40, 8, 8, 1), v, np.uint8) for v in (0, 100, 200))
    encoder = tiny("simclr", augmentation=record, max_epochs=1, batch_size=40)
    encoder.fit(real, positives=[first, second])
    global_1, global_2 = seen
    assert (global_1 == -1).all()
    values = {round((v.item() + 1) * 127.5) for v in global_2}
    assert values == {100, 200}
    seen.clear()
    encoder.set_params(positives_prob=0.25).fit(real, positives=[first])
    assert (seen[1] > -1).float().mean().item() == pytest.approx(0.25, abs=0.15)


@pytest.mark.parametrize("mix", ["logits", "features"])
@pytest.mark.parametrize("n_local_crops", [0, 1])
def test_interpolations_add_their_loss(X, mix, n_local_crops):
    options = {"hidden": 16, "bottleneck": 8, "mix": mix}
    partners = np.roll(np.arange(40), 3)
    middle = ((X.astype(int) + X[partners]) // 2).astype(np.uint8)
    encoder = tiny(method_options=options, n_local_crops=n_local_crops)
    encoder.fit(X, interpolations=(middle, partners, 0.5))
    history = encoder.history_
    assert (history["disentanglement"] > 0).all()
    assert (history["loss"] > history["disentanglement"]).all()
    other = tiny(method_options=options, n_local_crops=n_local_crops)
    other.fit(X, interpolations=(middle, partners, np.full(40, 0.3)))
    assert not np.array_equal(encoder.transform(X), other.transform(X))


def test_interpolations_bring_their_partner_and_share(X, monkeypatch):
    values = np.arange(40, dtype=np.uint8) * 5
    images = np.broadcast_to(values[:, None, None, None], (40, 8, 8, 1)).copy()
    partners = np.random.default_rng(0).permutation(40)
    alphas = np.linspace(0, 1, 40)
    between = 255 - images
    calls = []

    def record(self, views, interpolated):
        calls.append((views[0], *interpolated))
        return original(self, views, interpolated)

    original = DINOObjective.loss
    monkeypatch.setattr(DINOObjective, "loss", record)
    options = {"augmentation": lambda batch: batch, "max_epochs": 1}
    tiny(**options).fit(images, interpolations=(between, partners, alphas))
    tiny(**options).fit(images, interpolations="pixels")
    position = {int(v): i for i, v in enumerate(values)}
    for number, (first, mixed, second, share) in enumerate(calls):
        a, m, b = (((x.mean((1, 2, 3)) + 1) * 127.5).numpy() for x in (first, mixed, second))
        rows = [position[round(v)] for v in a]
        if number < 3:
            np.testing.assert_allclose(m, 255 - a, atol=1e-3)
            np.testing.assert_allclose(b, values[partners[rows]], atol=1e-3)
            np.testing.assert_allclose(share, alphas[rows], rtol=1e-6)
        else:
            np.testing.assert_allclose(m, (a + b) / 2, atol=1e-3)
            assert (share == 0.5).all()
            assert (np.abs(a - b) > 1).all()


def test_groups_keep_partners_apart(X):
    groups = np.repeat(["slide1", "slide2"], 20)
    apart = np.roll(np.arange(40), 20)
    tiny(max_epochs=1).fit(X, interpolations=(X, apart, 0.5), groups=groups)
    with pytest.raises(ValueError, match=r"Image 0 was interpolated with image 1 of its own group"):
        tiny().fit(X, interpolations=(X, np.roll(np.arange(40), -1), 0.5), groups=groups)
    drawn = encoder_fits.draw_partners(40, groups, 0)
    assert (groups[drawn] != groups).all()
    assert (encoder_fits.draw_partners(40, None, 0) != np.arange(40)).all()
    with pytest.raises(ValueError, match="at least two groups"):
        tiny().fit(X, interpolations="pixels", groups=np.zeros(40))


@pytest.mark.parametrize(
    ("method", "kind", "make", "message"),
    [
        ("dino", "positives", lambda X: [X, X[:-1]], r"positives\[1\] has shape \(39"),
        ("dino", "positives", lambda X: [X[:, :7]], r"positives\[0\]"),
        ("simclr", "interpolations", lambda X: (X, np.arange(40), 0.5), "method='dino' only"),
        ("dino", "interpolations", lambda X: X, "must be a tuple"),
        ("dino", "interpolations", lambda X: (X[1:], np.arange(40), 0.5), r"interpolations\[0\]"),
        ("dino", "interpolations", lambda X: (X, np.arange(39), 0.5), r"40 positions in X"),
        ("dino", "interpolations", lambda X: (X, np.arange(40.0), 0.5), r"integers"),
        ("dino", "interpolations", lambda X: (X, np.arange(40) + 1, 0.5), "from 0 to 39"),
        ("dino", "interpolations", lambda X: (X, np.arange(40), 1.5), r"shares in \[0, 1\]"),
        (
            "dino",
            "interpolations",
            lambda X: (X, np.arange(40), [0.1, 0.2]),
            r"interpolations\[2\]",
        ),
    ],
)
def test_wrong_generated_images_are_refused(X, method, kind, make, message):
    encoder = tiny(method)
    with pytest.raises(ValueError, match=message):
        encoder.fit(X, **{kind: make(X)})
    assert not hasattr(encoder, "module_")


def test_vectors_have_no_interpolations(blobs):
    with pytest.raises(ValueError, match="interpolations are for images"):
        SelfSupervisedEncoder(max_epochs=1).fit(blobs[0], interpolations=(1, 2, 3))


# ---- the same again ------------------------------------------------------------------------------


def test_weights_leave_a_fit_in_plain_order(X):
    # They are channels last while they learn, which safetensors refuses.
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, random_state=0).fit(X)
    assert all(value.is_contiguous() for value in encoder.module_.state_dict().values())


@every_method
def test_a_killed_fit_ends_bit_for_bit_the_same(X, method, tmp_path):
    views = {"positives": [255 - X], "interpolations": None}
    if method == "dino":
        views["interpolations"] = (X[::-1].copy(), np.roll(np.arange(40), 1), 0.4)
    options = {"max_epochs": 4, "positives_prob": 0.5}
    if method == "dino":
        options["n_local_crops"] = 1

    def stop(epoch, history):
        if epoch == 2:
            raise KeyboardInterrupt

    encoder = tiny(method, **options, checkpoint_dir=tmp_path, callbacks=stop)
    with pytest.raises(KeyboardInterrupt):
        encoder.fit(X, **views)
    resumed = encoder.set_params(callbacks=None).fit(X, **views)
    whole = tiny(method, **options).fit(X, **views)
    np.testing.assert_array_equal(resumed.transform(X), whole.transform(X))
    np.testing.assert_array_equal(resumed.history_, whole.history_)
    again = encoder.fit(X, **views)  # a finished fit comes back
    np.testing.assert_array_equal(again.transform(X), whole.transform(X))


@every_method
def test_seeds_copies_and_files(X, method, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "small_vit" if method == "dino" else "small_resnet"
        encoder = tiny(method, backbone=name, max_epochs=1).fit(X)
        expected = encoder.transform(X)
        other = tiny(method, backbone=name, max_epochs=1, random_state=1).fit(X)
    assert not np.array_equal(other.transform(X), expected)
    encoder.save(tmp_path)
    for copy in (diffaugkit.load(tmp_path), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(copy.transform(X), expected)
        assert copy.image_shape_ == (8, 8, 1)
        if method == "dino":
            np.testing.assert_array_equal(copy.attention_maps(X), encoder.attention_maps(X))
        if method == "scl":
            np.testing.assert_array_equal(copy.project(X), encoder.project(X))


@pytest.mark.parametrize("backbone", ["small_resnet", "small_vit"])
def test_an_image_does_not_depend_on_the_images_around_it(digits, backbone):
    X = digits[0][:300]
    encoder = tiny("simclr", backbone=backbone, max_epochs=1, batch_size=100).fit(X)
    before = pickle.dumps(encoder)
    whole = encoder.transform(X)
    for part in (slice(0, 1), slice(7, 30), [5, 5, 2], np.arange(300)[::-1]):
        np.testing.assert_array_equal(encoder.transform(X[part]), whole[part])
    assert pickle.dumps(encoder) == before


@pytest.mark.parametrize("method", ["dino", "byol"])
def test_warm_start_goes_on(X, method):
    encoder = tiny(method, warm_start=True).fit(X)
    before = encoder.transform(X)
    kept = {name: value.clone() for name, value in encoder.module_.state_dict().items()}
    module = encoder.module_
    encoder.set_params(learning_rate=1e-12, max_epochs=1).fit(X)
    np.testing.assert_allclose(encoder.transform(X), before, rtol=0.2, atol=0.2)
    assert all(torch.equal(kept[name], value) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match=r"."):
        encoder.fit(np.zeros((20, 64), np.float32))
    if method == "dino":
        with pytest.raises(ValueError, match="size were changed"):
            encoder.set_params(out_dim=32).fit(X)
    np.testing.assert_allclose(encoder.transform(X), before, rtol=0.2, atol=0.2)


# ---- what an objective keeps ---------------------------------------------------------------------


def vectors(n=12, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dino(**options):
    with isolated_rng(0):
        return DINOObjective(EmbeddingMLP(6, 8, head=DINOHead(8, 16, 16, 8)), 16, **options)


def test_teacher_is_an_average_without_gradients():
    objective = dino(momentum=0.9)
    objective.n_steps = 10
    start = [p.clone() for p in objective.teacher.parameters()]
    objective.loss([vectors(), vectors(seed=1)])["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    with torch.no_grad():
        for p in objective.network.parameters():
            p.add_(1.0)
    objective.after_step(0)
    for before, teacher, student in zip(
        start, objective.teacher.parameters(), objective.network.parameters(), strict=True
    ):
        torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student)
    assert objective.decay(0) == pytest.approx(0.9)
    assert objective.decay(5) == pytest.approx(0.95)
    assert objective.decay(10) == pytest.approx(1.0)
    assert objective.step == 1


@pytest.mark.parametrize(
    ("n_steps", "start"), [(10, 0.9), (1000, 0.98), (5000, 0.996), (10**6, 0.996)]
)
def test_short_fits_have_quick_teachers(n_steps, start):
    objective = dino()
    objective.n_steps = n_steps
    assert objective.decay(0) == pytest.approx(start)


def test_center_moves_after_the_loss_by_the_raw_logits():
    objective = dino(center_momentum=0.75).eval()
    views = [vectors(), vectors(seed=1)]
    objective.center.fill_(0.1)
    raw = objective.teacher(torch.cat(views))[1]
    with_old = objective.loss(views)["loss"].item()
    torch.testing.assert_close(objective.center, 0.75 * torch.full((16,), 0.1) + 0.25 * raw.mean(0))
    assert objective.loss(views)["loss"].item() != with_old


def test_prototypes_are_frozen_at_first():
    objective, n_steps = dino(frozen_steps=300), 340
    objective.n_steps = n_steps
    network, rate = objective.network, 1e-4
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    before = [network.head.prototypes.detach().clone()]
    hidden = network.head.mlp[0].weight.detach().clone()
    for step in range(n_steps):
        optimizer.zero_grad()
        objective.loss([vectors(), vectors(seed=1)])["loss"].backward()
        optimizer.step()
        objective.after_step(step)
        before.append(network.head.prototypes.detach().clone())
        if step == 0:
            assert not torch.equal(network.head.mlp[0].weight, hidden)
    moves = torch.stack([(a - b).abs().mean() for a, b in itertools.pairwise(before)])
    assert not moves[:300].any()
    # The free steps are as long as Adam's are, not several times as long.
    assert moves[300:].min() > 0
    assert moves[300:].max() < 1.5 * rate


def test_temperature_of_the_teacher_warms_up():
    objective = dino(teacher_temp=0.08, warmup_teacher_temp=0.04, warmup_share=0.5)
    objective.n_steps = 8
    found = []
    for step in range(6):
        found.append(float(objective.temperature()))
        objective.after_step(step)
    np.testing.assert_allclose(found, [0.04, 0.05, 0.06, 0.07, 0.08, 0.08], rtol=1e-5)


def test_queue_holds_the_newest_keys():
    with isolated_rng(0):
        objective = MoCoObjective(EmbeddingMLP(6, 8, head=nn.Linear(8, 4)), 4, 16).eval()
    newest = []
    for seed in range(3):
        views = [vectors(7, seed=seed), vectors(7, seed=seed + 10)]
        loss = objective.loss(views)["loss"]
        loss.backward()  # the queue may move before
        newest.append(nn.functional.normalize(objective.teacher(views[1])[1]))
    newest = torch.cat(newest)  # 21 keys in 16 places
    torch.testing.assert_close(objective.queue.roll(-5, 0), newest[-16:])
    assert objective.place == 5


def test_dropout_is_the_students_only():
    with isolated_rng(0):
        network = EmbeddingMLP(6, 8, head=nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 256)))
        objective = BYOLObjective(network, 256, 8)
    assert objective.network.head[0].p == 0.5
    assert objective.teacher.head[0].p == 0.0


class PowerMean(nn.Module):
    """Generalised mean, whose exponent has the name of Dropout's probability."""

    def __init__(self, p=3.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


def test_only_what_drops_is_switched_off_in_the_teacher():
    drops = [nn.Dropout2d(0.5), StochasticDepth(0.5, "row"), DropPath(0.5), PowerMean()]
    with isolated_rng(0):
        network = nn.Sequential(*drops, nn.MultiheadAttention(8, 2, dropout=0.5))
        teacher = BYOLObjective(network, 16, 8).teacher
        backbone = nn.Sequential(nn.Conv2d(1, 8, 3), PowerMean())
    assert [teacher[0].p, teacher[1].p, teacher[2].drop_prob, teacher[4].dropout] == [0.0] * 4
    assert teacher[3].p == 3.0
    options = {"max_epochs": 1, "n_local_crops": 0, "out_dim": 16, "random_state": 0}
    X = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    encoder = SelfSupervisedEncoder("dino", backbone, **options).fit(X)
    assert np.isfinite(encoder.transform(X)).all()


def test_spread():
    assert feature_spread(torch.ones(9, 4)).item() == pytest.approx(0, abs=1e-6)
    assert feature_spread(torch.cat([torch.eye(8), -torch.eye(8)])).item() == pytest.approx(1)


def test_collapse_is_announced(X):
    same = np.full_like(X, 7)
    with pytest.warns(CollapseWarning, match="simsiam collapsed") as seen:
        tiny("simsiam").fit(same)
    assert [warning.filename for warning in seen] == [__file__]


# ---- scikit-learn's own checks -------------------------------------------------------------------


@parametrize_with_checks(
    [
        # By name: joblib's hash of a module, which one check compares, differs from call to call.
        tiny("simclr", backbone="small_resnet", image_shape=(1, -1, 1), max_epochs=1),
        tiny("dino", backbone="small_resnet", image_shape=(1, -1, 1), max_epochs=1),
    ],
    expected_failed_checks=lambda estimator: {},
)
def test_check_estimator(estimator, check):
    check(estimator)


def test_images_of_another_scale_than_an_unusual_one_are_warned_of():
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 16, (12, 8, 8)).astype(np.float32)
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, batch_size=6).fit(X)
    message = r"fitted on floats from .* Is it the same scale\?"
    for other in (X / 255, X * 255 / 16):
        with pytest.warns(UserWarning, match=message) as seen:
            encoder.transform(other)
        assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.transform(X * 1.2)
        encoder.transform(X * 0)


def test_what_is_no_set_of_images_is_named(tmp_path):
    image = pytest.importorskip("PIL.Image")
    X = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, batch_size=6, random_state=0)
    with pytest.raises(TypeError, match=r"one PIL image: give a list of images, \[X\] for one"):
        encoder.fit(image.fromarray(X[0]))
    with pytest.raises(ValueError, match=r"one set of views: give a list .* positives=\[views\]"):
        encoder.fit(X, positives=X)
    with pytest.raises(ValueError, match="groups and X have inconsistent lengths: 3 and 12"):
        encoder.fit(X, groups=np.zeros(3))
    with pytest.raises(ValueError, match="there are no interpolations"):
        encoder.fit(X, groups=np.arange(12))
    with pytest.raises(ValueError, match="does not correct for batches"):
        SelfSupervisedEncoder().fit(X.reshape(12, -1) / 255, groups=np.arange(12))
    whole = encoder.fit(X).transform(X)
    np.testing.assert_allclose(encoder.transform((X / 255).tolist()), whole, atol=1e-4)
    with pytest.raises(ValueError, match="method was set to 'dino' after a fit with another"):
        encoder.set_params(method="dino").save(tmp_path / "model")


def test_models_that_hold_their_width_load(tmp_path):
    X = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
    encoder = SelfSupervisedEncoder("simclr", max_epochs=1, batch_size=6, random_state=0).fit(X)
    encoder._n_embedding = 256  # as they were saved until November 2026
    encoder.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(X), encoder.transform(X))
