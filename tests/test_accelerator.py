"""Every estimator on a simulated GPU: the results of the CPU, and no step that waits for it."""

import pickle

import numpy as np
import pytest
import torch
from simulated_accelerator import DeviceTensor, simulated_accelerator
from sklearn.base import clone

from diffaugkit import (
    AttentionMILClassifier,
    DiffAugEM,
    DiffusionDetector,
    DiffusionSegmenter,
    EmbeddingConditionedDiffusion,
    GenerativeAugmenter,
    GenSIS,
    HistoDiffusionAugmenter,
    LatentAutoencoder,
    SelfSupervisedEncoder,
    ZeroShotSegmenter,
    boxes_from_masks,
)
from diffaugkit.networks import small_vit
from diffaugkit.runtime import isolated_rng


def _simulates():
    try:
        with simulated_accelerator():
            return isinstance(torch.ones(3, device="cuda") + 1, DeviceTensor)
    except (AttributeError, TypeError, RuntimeError):
        return False


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(not _simulates(), reason="the inner parts of torch have changed"),
    # Fits of a few steps warn of what they are.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

COMMON = {"max_epochs": 2, "batch_size": 12, "precision": "fp32", "random_state": 0}
UNET = {"block_out_channels": (8, 8), "n_timesteps": 20}
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, size=(24, 8, 8, 1), dtype=np.uint8)
LABELS = np.arange(24) % 2
IMAGES[LABELS == 1, :, :4] //= 4
MASKS = np.zeros((24, 8, 8), int)
MASKS[:, 2:6, 2:6] = 1
VECTORS = rng.normal(size=(48, 10)).astype(np.float32) + 3 * (np.arange(48) % 2)[:, None]
BAGS = [VECTORS[i : i + 2 + i % 3] for i in range(24)]


def encoder(**more):
    options = {"hidden_sizes": (8,), "n_components": 4, "n_pcs": 6}
    return SelfSupervisedEncoder(**COMMON | options | more)


def vit(**more):
    with isolated_rng(0):
        backbone = small_vit((8, 8, 1), width=8, depth=1, heads=2)
    options = {"out_dim": 16, "method_options": {"hidden": 16, "bottleneck": 8}}
    return SelfSupervisedEncoder("dino", **COMMON | options | {"backbone": backbone} | more)


def diffusion(part=None, **more):
    options = {"width": 8, "n_blocks": 1, "n_pcs": 6, "n_sampling_steps": 2, "ema_decay": 0.9}
    return EmbeddingConditionedDiffusion(part, **COMMON | options | more)


def pixels(part=None, **more):
    return EmbeddingConditionedDiffusion(part, **COMMON | UNET | {"n_sampling_steps": 2} | more)


def autoencoder(**more):
    return LatentAutoencoder(downsampling=2, **COMMON | {"block_out_channels": (8, 8)} | more)


def augmented(model):
    return model.fit_resample(VECTORS, np.arange(48) % 3 // 2)[0]


FEW = {"n_sampling_steps": 2, "ratio": 1.0}
TILES = {**UNET, "pretrain_epochs": 1, "patch_size": 8}
KINDS = {
    "encoder of vectors": (encoder(), (VECTORS,), lambda m: m.transform(VECTORS)),
    "encoder of images": (vit(), (IMAGES,), lambda m: m.transform(IMAGES)),
    "vectors": (
        diffusion(encoder(), sampler="ddpm", guidance_scale=2.0),
        (VECTORS,),
        lambda m: m.augment(VECTORS[:5], random_state=0),
    ),
    "pixels": (
        pixels(sampler="dpmsolver++", random_flip=True),
        (IMAGES,),
        lambda m: m.sample(3, random_state=0),
    ),
    "latents": (pixels(autoencoder=autoencoder()), (IMAGES,), lambda m: m.sample(3)),
    "autoencoder": (autoencoder(kind="vq"), (IMAGES,), lambda m: m.reconstruct(IMAGES)),
    "adversary": (
        autoencoder(adversarial_weight=0.5, adversarial_start=0),
        (IMAGES,),
        lambda m: m.transform(IMAGES),
    ),
    "EM": (
        DiffAugEM(encoder(), diffusion(), schedule=(1, 1, 1), n_views=1, random_state=0),
        (VECTORS,),
        lambda m: m.transform(VECTORS),
    ),
    "Gen-SIS": (
        GenSIS(vit(), pixels(), n_views=1, random_state=0),
        (IMAGES,),
        lambda m: m.transform(IMAGES),
    ),
    "augmenter": (
        GenerativeAugmenter(
            diffusion(encoder()), min_confidence=None, min_copy_ratio=None, random_state=0
        ),
        (VECTORS, np.arange(48) % 2),
        augmented,
    ),
    "histology": (
        HistoDiffusionAugmenter(
            pixels(autoencoder=autoencoder()), vit(), decoder_epochs=1, **COMMON | FEW
        ),
        (IMAGES, LABELS),
        lambda m: m.sample([0, 1], random_state=0),
    ),
    "segmenter": (
        DiffusionSegmenter(**COMMON | TILES),
        (IMAGES, MASKS),
        lambda m: m.predict_proba(IMAGES[:4]),
    ),
    "detector": (
        DiffusionDetector(head_width=32, score_threshold=0.01, **COMMON | TILES),
        (IMAGES, boxes_from_masks(MASKS)),
        lambda m: np.concatenate([found["scores"] for found in m.predict(IMAGES[:4])]),
    ),
    "zero-shot": (
        ZeroShotSegmenter(
            pixels(block_out_channels=(8, 8), n_attention_levels=2), n_segments=2, random_state=0
        ),
        (IMAGES,),
        lambda m: m.predict(IMAGES[:4]),
    ),
    "bags": (
        AttentionMILClassifier(hidden_sizes=(8,), n_attention=4, **COMMON),
        (BAGS, LABELS),
        lambda m: m.predict_proba(BAGS),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_the_cpu_does(kind):
    model, data, use = KINDS[kind]
    expected = use(clone(model).set_params(device="cpu").fit(*data))
    with simulated_accelerator():
        fitted = clone(model).set_params(device="cuda", precision="fp32").fit(*data)
        found = use(fitted)
        content = pickle.dumps(fitted)
    if np.asarray(expected).dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)
    else:
        assert np.mean(np.abs(np.asarray(found, float) - expected) > 2) < 0.05
    assert b"DeviceTensor" not in content
    there = use(pickle.loads(content).set_params(device="cpu"))  # a machine without a GPU
    np.testing.assert_allclose(
        there, found, rtol=1e-2, atol=2 if there.dtype.kind in "iu" else 2e-3
    )


LOOPS = {
    "on the device": (lambda **o: diffusion(**o), 2**40, VECTORS),
    "too large for it": (lambda **o: diffusion(n_pcs=None, **o), 500, VECTORS),
    "images too large for it": (lambda **o: vit(**o), 500, IMAGES),
    "sparse": (lambda **o: diffusion(n_pcs=None, **o), 2**40, "sparse"),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_no_step_waits_for_the_device(kind):
    import scipy.sparse as sp

    make, free, X = LOOPS[kind]
    X = sp.csr_matrix(VECTORS) if isinstance(X, str) else X
    counts = []
    for max_epochs in (2, 6):
        with simulated_accelerator(free) as waits:
            make(device="cuda", batch_size=4, max_epochs=max_epochs).fit(X)
            counts.append(len(waits))
    # At an epoch's end losses and weights are looked at, and the order of the next one is sent.
    assert counts[1] - counts[0] <= 3 * 4


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated_accelerator() as waits:
        there = torch.ones(3, device="cuda")
        assert isinstance(there, DeviceTensor)
        assert not waits
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        assert there.sum().item() == 3
        assert len(waits) == 1
