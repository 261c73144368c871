"""Generative self-augmentation behind the scikit-learn API.

Reading order of the files, each of which imports only from those before it:

losses, segmentation_losses, arrays, metrics, rows, image_rows, image_files, image_inputs, data,
datasets, decomposition, runtime, augmentations, networks, objectives, denoisers, diffusion,
persistence, batches, training, base, preprocessing, autoencoder, encoder_fits, encoder, spaces,
embedding_diffusion, diffaug_em, image_store, gen_sis, resampling, augmenter, histo_networks,
histo_augmenter, slides, segmentation_data, segmentation_networks, segmentation_tiles,
pretrained_unet, segmenter, detection_boxes, detection_head, detector, zero_shot_segmenter, mil,
tissue, image_plotting, segmentation_plotting, plotting, geojson.
"""

import importlib

__version__ = "0.1.0.dev0"

_HOMES = {
    "AttentionDisplay": "plotting",
    "AttentionMILClassifier": "mil",
    "CellPreprocessor": "preprocessing",
    "DiffAugEM": "diffaug_em",
    "DiffusionDetector": "detector",
    "DiffusionSegmenter": "segmenter",
    "EarlyStopping": "training",
    "EmbeddingConditionedDiffusion": "embedding_diffusion",
    "EmbeddingDisplay": "plotting",
    "GenSIS": "gen_sis",
    "GenerativeAugmenter": "augmenter",
    "HistoDiffusionAugmenter": "histo_augmenter",
    "InterpolationDisplay": "plotting",
    "LatentAutoencoder": "autoencoder",
    "SampleGridDisplay": "plotting",
    "SegmentationDisplay": "plotting",
    "SelfSupervisedEncoder": "encoder",
    "SimilarityHistogramDisplay": "plotting",
    "TissueTiles": "tissue",
    "TrainingCurveDisplay": "plotting",
    "ZeroShotSegmenter": "zero_shot_segmenter",
    "boxes_from_masks": "detection_boxes",
    "load": "persistence",
    "save": "persistence",
    "to_geojson": "geojson",
}
_MODULES = {"datasets", "metrics", "plotting"}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name):
    """Import what is asked for when it is asked for: importing the package stays cheap."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
