"""Denoisers of vectors, and networks that embed, against their formulas recomputed plainly."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffaugkit.denoisers import DENOISERS, DiffAugDenoiser, MLPDenoiser, sinusoidal_embedding
from diffaugkit.networks import (
    DINOHead,
    EmbeddingMLP,
    ImageEmbedder,
    Linear,
    class_attention,
    feature_width,
    image_features,
    make_backbone,
    mlp_head,
    patch_size,
    patch_tokens,
    small_resnet,
    small_vit,
)


def make(name, n_features=7, n_condition=3, **kwargs):
    torch.manual_seed(0)
    return DENOISERS[name](n_features, n_condition, **{"width": 32, **kwargs})


def randomise(module):
    """Leave the zero initialisation, behind which nothing has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def batch(n=6, n_features=7, n_condition=3):
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(n, n_features, generator=generator),
        torch.randint(0, 1000, (n,), generator=generator),
        torch.randn(n, n_condition, generator=generator),
    )


both = pytest.mark.parametrize("name", sorted(DENOISERS))


def test_sinusoidal_embedding_is_the_formula():
    t = np.array([0, 1, 17, 999])
    for n_dims in (8, 9):
        got = sinusoidal_embedding(torch.from_numpy(t), n_dims).numpy()
        angle = t[:, None] / 10_000.0 ** (np.arange(4) / 4)
        np.testing.assert_allclose(got[:, :4], np.sin(angle), atol=1e-7)
        np.testing.assert_allclose(got[:, 4:8], np.cos(angle), atol=1e-7)
        assert got.shape == (4, n_dims)
        assert not got[:, 8:].any()


@both
@pytest.mark.parametrize("n", [1, 6])
def test_shape_and_rows_are_independent(name, n):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    whole = denoiser(x, t, cond)
    assert whole.shape == x.shape
    torch.testing.assert_close(denoiser(x[:n], t[:n], cond[:n]), whole[:n], atol=1e-5, rtol=1e-5)


@both
def test_dropped_rows_are_the_null_condition(name):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    drop = torch.tensor([True, False, True, False, False, True])
    mixed = denoiser(x, t, cond, drop)
    torch.testing.assert_close(mixed[drop], denoiser(x, t)[drop])
    torch.testing.assert_close(mixed[~drop], denoiser(x, t, cond)[~drop])
    null = denoiser.null_condition.expand_as(cond)
    torch.testing.assert_close(denoiser(x, t), denoiser(x, t, null))
    assert not torch.allclose(denoiser(x, t, cond), denoiser(x, t))


@both
def test_wrong_shapes_are_refused(name):
    x, t, cond = batch()
    with pytest.raises(ValueError, match="x_t has shape"):
        make(name)(x[:, :-1], t, cond)
    with pytest.raises(ValueError, match="cond has shape"):
        make(name)(x, t, cond[:, :-1])
    with pytest.raises(ValueError, match="cond has shape"):
        make(name)(x, t, cond[:1])
    with pytest.raises(ValueError, match="n_condition=0"):
        make(name, n_condition=0)(x, t, cond)


@both
@pytest.mark.parametrize("n_condition", [0, 3])
def test_gradient_reaches_every_parameter(name, n_condition):
    denoiser = randomise(make(name, n_condition=n_condition, n_timesteps=6))
    x, t, cond = batch()
    drop = torch.arange(6) < 2
    args = (cond, drop) if n_condition else ()
    denoiser(x, t.clamp(max=5) * 0 + torch.arange(6), *args).square().mean().backward()
    for key, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@both
def test_gradients_are_right(name):
    denoiser = randomise(make(name, width=8)).double()
    denoiser_buffers = dict(denoiser.named_buffers())
    assert all(buffer.dtype == torch.float64 for buffer in denoiser_buffers.values())
    x, t, cond = batch(n=2)
    x, cond = x.double().requires_grad_(), cond.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, cond: denoiser(x, t[:2], cond), (x, cond))


@both
def test_bfloat16_autocast(name):
    denoiser = randomise(make(name))
    x, t, cond = batch()
    full = denoiser(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        half = denoiser(x, t, cond)
    scale = full.abs().max()
    assert (half.float() - full).abs().max() < 0.05 * scale
    half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)


@both
def test_state_dict_holds_only_what_is_learned(name):
    denoiser = make(name)
    assert set(denoiser.state_dict()) == {key for key, _ in denoiser.named_parameters()}
    copy = make(name)
    copy.load_state_dict(randomise(denoiser).state_dict(), strict=True)
    x, t, cond = batch()
    assert torch.equal(copy(x, t, cond), denoiser(x, t, cond))


def test_mlp_starts_at_zero_and_learns_a_linear_gain_exactly():
    denoiser = make("mlp", n_condition=0)
    x, t, _ = batch()
    assert not denoiser(x, t).any()
    gain = torch.arange(7.0) / 7
    with torch.no_grad():
        denoiser.modulation.bias[-7:] = gain
    torch.testing.assert_close(denoiser(x, t), x * gain)


def test_mlp_number_of_parameters():
    d, e, w, k, b = 50, 20, 512, 128, 4
    embedding = (k * k + k) + (k * k + k) + (e * k + k) + (k * k + k)
    out = w * (2 * b + 2) + d
    expected = e + embedding + (k * out + out) + (d * w + w) + b * 2 * (w * w + w) + (w * d + d)
    assert sum(p.numel() for p in MLPDenoiser(d, e).parameters()) == expected


def test_mlp_dropout_acts_in_training_only():
    denoiser = randomise(make("mlp", dropout=0.5))
    x, t, cond = batch()
    assert not torch.equal(denoiser(x, t, cond), denoiser(x, t, cond))
    denoiser.eval()
    assert torch.equal(denoiser(x, t, cond), denoiser(x, t, cond))


def test_diffaug_number_of_parameters():
    d, e, m = 50, 20, 2000
    block = d * m + m + m * d + d
    condition = (e * 200 + 200) + (200 * 200 + 200) + (200 * d + d)
    expected = 8 * block + 1000 * d + condition + e
    assert sum(p.numel() for p in DiffAugDenoiser(d, e).parameters()) == expected


@pytest.mark.parametrize("n_condition", [0, 3])
def test_diffaug_is_listing_2(n_condition):
    """Forward pass in float64 NumPy, against the listing line by line."""
    denoiser = make("diffaug", n_condition=n_condition, width=32).double()
    x, t, cond = batch()
    p = {key: value.detach().numpy() for key, value in denoiser.state_dict().items()}

    def linear(key, h):
        return h @ p[f"{key}.weight"].T + p[f"{key}.bias"]

    def leaky(h):
        return np.where(h > 0, h, 0.01 * h)

    def norm(h):
        centred = h - h.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)

    def block(key, h, first=False):
        h = h if first else norm(leaky(h))
        return linear(f"{key}.output", norm(leaky(linear(f"{key}.hidden", h))))

    extra = p["time_embedding.weight"][t.numpy()]
    if n_condition:
        h = cond.double().numpy()
        h = linear("condition_mlp.2", leaky(linear("condition_mlp.0", h)))
        extra = extra + linear("condition_mlp.4", leaky(h))
    skips = []
    h = x.double().numpy()
    for i in range(4):
        h = block(f"encoder.{i}", h + extra, first=i == 0) + sum(skips)
        skips.append(h)
    e1, e2, e3, e4 = skips
    d1 = block("decoder.0", e4 + extra)
    d2 = block("decoder.1", d1 + extra) + e3 + d1
    d3 = block("decoder.2", d2 + extra) + e2 + d1 + d2
    expected = block("decoder.3", d3 + extra) + e1 + d1 + d2 + d3

    args = (cond.double(),) if n_condition else ()
    got = denoiser(x.double(), t, *args).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_diffaug_norm_is_the_papers_instance_norm():
    h = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nn.InstanceNorm1d(5)(h), torch.layer_norm(h, (7,)))


def test_mlp_forward_is_the_formula():
    """The modulated blocks in float64 NumPy."""
    denoiser = randomise(make("mlp", n_blocks=2)).double()
    x, t, cond = batch()
    p = {key: value.detach().numpy() for key, value in denoiser.state_dict().items()}

    def linear(key, h):
        return h @ p[f"{key}.weight"].T + p[f"{key}.bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def norm(h):
        centred = h - h.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)

    half = 16
    angle = t.numpy()[:, None] * np.exp(-math.log(1e4) * np.arange(half) / half)
    embedding = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    embedding = linear("time_mlp.2", silu(linear("time_mlp.0", embedding)))
    h = silu(linear("condition_mlp.0", cond.double().numpy()))
    modulation = linear("modulation", silu(embedding + linear("condition_mlp.2", h)))
    parts = np.split(modulation, 32 * np.arange(1, 7), axis=1)

    xn = x.double().numpy()
    h = linear("input", xn)
    for i in range(2):
        inner = norm(h) * parts[2 * i] + parts[2 * i + 1]
        h = h + linear(f"blocks.{i}.output", silu(linear(f"blocks.{i}.hidden", inner)))
    expected = linear("output", norm(h) * parts[4] + parts[5]) + parts[6] * xn
    got = denoiser(x.double(), t, cond.double()).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)


# ---- networks for images -------------------------------------------------------------------------


def images(n=3, c=3, h=16, w=16):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(3))


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (28, 28, 1), (1, 7, 1), (3, 2, 1), (32, 20, 3), (80, 100, 2)]
)
@pytest.mark.parametrize("name", ["small_resnet", "small_vit"])
def test_small_backbones_take_their_images_and_other_sizes(name, shape):
    h, w, c = shape
    backbone = seeded(make_backbone, name, shape)
    width = feature_width(backbone, shape)
    for size in ((h, w), (8, 8), (h + 3, w + 5)):
        assert backbone(images(2, c, *size)).shape == (2, width)
    x = images(4, c, h, w)
    torch.testing.assert_close(backbone(x[:1]), backbone(x)[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("vit_tiny_patch16_224", 192),
        ("convnext_atto", 320),
        ("swin_tiny_patch4_window7_224", 768),
    ],
)
@pytest.mark.slow
def test_timm_models_of_every_family(name, width):
    backbone = seeded(make_backbone, name, (64, 64, 1), drop_path=0.1)
    assert backbone(images(2, 1, 64, 64)).shape == (2, width)
    assert feature_width(backbone, (64, 64, 1)) == width


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match="backbone='resnet_of_mine' is neither"):
        make_backbone("resnet_of_mine", (8, 8, 1))
    with pytest.raises(ValueError, match="some of its"):
        make_backbone("resnet1", (8, 8, 1))


def test_backbones_that_do_not_take_a_size_are_named():
    for name in ("xcit_nano_12_p16_224", "mvitv2_tiny"):
        with pytest.raises(ValueError, match=rf"backbone='{name}' cannot .* 40 x 48 .*: .+"):
            make_backbone(name, (40, 48, 3))


def test_readings_of_a_transformer():
    vit = seeded(small_vit, (16, 16, 3), width=12, depth=5, heads=2)
    x = images()
    tokens = vit.forward_features(x)
    cls, patches = tokens[:, 0], tokens[:, 1:]
    torch.testing.assert_close(image_features(vit, x, "cls"), cls)
    torch.testing.assert_close(image_features(vit, x), cls)
    torch.testing.assert_close(image_features(vit, x, "pooled"), patches.mean(1))
    torch.testing.assert_close(patch_tokens(vit, x), patches)
    last = image_features(vit, x, "last_n", 3)
    assert last.shape == (3, 36) == (3, feature_width(vit, (16, 16, 3), "last_n", 3))
    torch.testing.assert_close(last[:, -12:], cls)
    # The blocks before the last, run by hand.
    hidden = vit._pos_embed(vit.patch_embed(x))
    for block in vit.blocks[:3]:
        hidden = block(hidden)
    torch.testing.assert_close(last[:, :12], vit.norm(hidden)[:, 0])


def test_relatives_of_the_transformer_have_a_cls_token_too():
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 8, "num_classes": 0, "embed_dim": 16, "depth": 2}
    small |= {"num_heads": 2}
    x = images(2, 3, 32, 32)
    models = [(timm.models.Eva, {"num_reg_tokens": 4}), (timm.models.Beit, {})]
    for kind, more in models:
        model = seeded(kind, **small, **more).eval()
        cls = model.forward_features(x)[:, 0]
        torch.testing.assert_close(image_features(model, x, "cls"), cls)
        torch.testing.assert_close(image_features(model, x, "last_n", 1), cls)
        assert patch_tokens(model, x).shape == (2, 16, 16)
        with pytest.raises(ValueError, match="knows timm's plain attention"):
            class_attention(model, x)
    # Two branches in one block; and a side of patches that is one number.
    parallel = {"block_fn": timm.models.vision_transformer.ParallelThingsBlock}
    with pytest.raises(ValueError, match="knows timm's plain attention"):
        class_attention(seeded(timm.models.VisionTransformer, **small, **parallel), x)
    xcit = seeded(timm.models.Xcit, **{**small, "img_size": 32})
    if hasattr(xcit, "num_prefix_tokens"):  # of newer timm
        assert patch_size(xcit) == (8, 8)
        torch.testing.assert_close(image_features(xcit, x, "cls"), xcit(x))
        message = "features='last_n' needs the CLS token of several blocks"
        with pytest.raises(ValueError, match=message):
            image_features(xcit, x, "last_n")
    with pytest.raises(ValueError, match="cannot take images of shape"):
        feature_width(seeded(timm.models.Beit, **small), (24, 24, 3))


def test_width_is_that_of_the_output():
    timm = pytest.importorskip("timm")
    x = images(2, 3, 32, 32)
    # Layers behind the pooling, and a classifier: neither is as wide as the last maps.
    mobile = seeded(make_backbone, "mobilenetv3_small_050", (32, 32, 3))
    classifier = seeded(timm.create_model, "resnet10t", num_classes=10)
    for backbone, width in ((mobile, 1024), (classifier, 10)):
        assert feature_width(backbone, (32, 32, 3)) == backbone(x).shape[1] == width
        maps = backbone.forward_features(x)
        assert feature_width(backbone, (32, 32, 3), "pooled") == maps.shape[1] != width


def test_pooled_maps_may_have_their_channels_last():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    swin = seeded(timm.models.SwinTransformer, 32, num_classes=0, **sizes)
    x = images(2, 3, 32, 32)
    pooled = image_features(swin, x, "pooled")
    torch.testing.assert_close(pooled, swin.forward_features(x).mean((1, 2)))
    torch.testing.assert_close(pooled, swin(x))


def test_pooled_maps_of_a_cnn_are_its_output():
    resnet = seeded(small_resnet, (16, 16, 3))
    torch.testing.assert_close(image_features(resnet, images(), "pooled"), resnet(images()))
    for features in ("cls", "last_n"):
        with pytest.raises(ValueError, match=r"needs a vision transformer.*features='pooled'"):
            image_features(resnet, images(), features)
    with pytest.raises(ValueError, match="needs a vision transformer"):
        class_attention(resnet, images())
    with pytest.raises(ValueError, match="needs a vision transformer"):
        patch_tokens(resnet, images())
    with pytest.raises(ValueError, match=r"must map images .* gave \(3, 4, 16, 16\)"):
        image_features(nn.Conv2d(3, 4, 1), images())


def test_attention_is_the_softmax_of_the_last_block():
    vit = seeded(small_vit, (16, 12, 3), width=12, depth=2, heads=3)
    x = images(h=16, w=12)
    maps = class_attention(vit, x)
    assert maps.shape == (3, 3, 8, 6)
    hidden = vit.blocks[0](vit._pos_embed(vit.patch_embed(x)))
    block = vit.blocks[1]
    qkv = block.attn.qkv(block.norm1(hidden)).reshape(3, 49, 3, 3, 4)
    for head in range(3):
        q, k = qkv[:, :1, 0, head], qkv[:, :, 1, head]
        weights = (q @ k.transpose(1, 2) / 2.0).softmax(-1)[:, 0]
        torch.testing.assert_close(maps[:, head].flatten(1), weights[:, 1:])
    first = class_attention(vit, x, 0)
    assert not torch.equal(first, maps)
    assert torch.equal(class_attention(vit, x, -2), first)
    with pytest.raises(ValueError, match="layer=2 must be from -2 to 1"):
        class_attention(vit, x, 2)
    assert not vit.blocks[1].attn._forward_pre_hooks


def test_dino_head_gives_cosines():
    head = seeded(DINOHead, 6, 10, 16, 8)
    y = images(4, 1, 1, 6).flatten(1)
    z = head(y)
    bottleneck = head.mlp(y)
    expected = nn.functional.cosine_similarity(bottleneck[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(z, expected)
    free = seeded(DINOHead, 6, 10, 16, 8, norm_last=False)
    assert free.gain.shape == (10,)


def test_heads():
    assert [type(m).__name__ for m in mlp_head(4, 8, 2)] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    assert [type(m).__name__ for m in mlp_head(4, 8, 2, norm_hidden=False)] == [
        "Linear",
        "ReLU",
        "Linear",
    ]
    last = mlp_head(4, 8, 2, norm_last=True)[-1]
    assert isinstance(last, nn.BatchNorm1d)
    assert last.weight is None


def test_embedders():
    resnet = seeded(small_resnet, (8, 8, 1), 4)
    network = ImageEmbedder(resnet, 16, 5, nn.Linear(5, 3)).eval()
    y, z = network(images(2, 1, 8, 8))
    assert y.shape == (2, 5)
    assert z.shape == (2, 3)
    assert torch.equal(network.embed(images(2, 1, 8, 8)), y)
    mlp = EmbeddingMLP(6, 4, head=nn.Linear(4, 9))
    y, z = mlp(torch.randn(5, 6))
    assert torch.equal(z, mlp.head(y))


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 1.0), (0.3, 0.1)])
def test_with_dropout_y_begins_near_what_the_skip_carries(dropout, share):
    network = seeded(EmbeddingMLP, 6, 4, hidden_sizes=(32,), dropout=dropout).train()
    x = torch.randn(64, 6)
    added = (network.embed(x) - x[:, :4]).detach().numpy()
    np.testing.assert_allclose(added.std(0), share, rtol=1e-3)


def test_dropout_is_of_the_hidden_layers_before_y_and_of_training():
    sizes = {"n_features": 6, "n_components": 4, "hidden_sizes": (200, 200)}
    network, x = seeded(EmbeddingMLP, **sizes, dropout=0.25).train(), torch.randn(64, 6)
    hidden = network.backbone[0](x)
    assert (hidden == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    y, other = network.embed(x), network.embed(x)
    assert not torch.equal(y, other)
    assert torch.equal(network.head(y), network.head(y))
    plain = EmbeddingMLP(**sizes)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain.eval()(x)[1], network.eval()(x)[1])


# ---- weights from files --------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["plain", "safetensors", "teacher", "module"])
def test_weights_come_from_a_file(tmp_path, wrap, monkeypatch):
    source = seeded(make_backbone, "small_resnet", (8, 8, 1))
    weights = {k: v + 1 if v.is_floating_point() else v for k, v in source.state_dict().items()}
    path = tmp_path / "weights.pth"
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    elif wrap == "teacher":
        head = {"head.weight": torch.zeros(3)}
        torch.save({"teacher": {f"backbone.{k}": v for k, v in weights.items()} | head}, path)
    else:
        prefix = "module." if wrap == "module" else ""
        torch.save({prefix + k: v for k, v in weights.items()}, path)
    loaded = make_backbone("small_resnet", (8, 8, 1), pretrained=path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, weights[key]), key
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = make_backbone("small_resnet", (8, 8, 1), pretrained=f"~/{path.name}")
    assert torch.equal(loaded.conv1.weight, weights["conv1.weight"])
    fresh = seeded(make_backbone, "small_resnet", (8, 8, 1), pretrained=path, load=False)
    assert torch.equal(fresh.conv1.weight, source.conv1.weight)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file was run')",)


def test_files_that_do_not_fit_or_hold_code_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"x": Bomb()}, path)
    with pytest.raises(ValueError, match="holds more than tensors, and is not read"):
        make_backbone("small_resnet", (8, 8, 1), pretrained=path)
    torch.save(make_backbone("small_resnet", (8, 8, 3)).state_dict(), path)
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights.*conv1.weight"):
        make_backbone("small_resnet", (8, 8, 1), pretrained=path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="lacks"):
        make_backbone("small_resnet", (8, 8, 1), pretrained=path)
    with pytest.raises(ValueError, match="is no file"):
        make_backbone("small_resnet", (8, 8, 1), pretrained=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="is no file, and no tag"):
        make_backbone("small_resnet", (8, 8, 1), pretrained="dino")


def test_a_module_is_copied():
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    made = make_backbone(own, (2, 2, 3))
    assert made is not own
    assert feature_width(made, (2, 2, 3)) == 5
    assert torch.equal(made[1].weight, own[1].weight)


@pytest.mark.parametrize("n_out", [1, 2, 4, 8, 11, 16])
@pytest.mark.parametrize("n_in", [5, 6, 50, 256])
def test_linear_rounds_a_row_the_same_wherever_it_stands(n_in, n_out):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(n_in, n_out).eval()
    x = torch.randn(1, n_in, generator=generator).repeat(64, 1)
    y = layer(x)
    assert torch.equal(y, y[:1].expand_as(y))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert layer(x[None]).shape == (1, 64, n_out)
