"""Scores of embeddings and of generated samples, as NumPy functions in scikit-learn's form.

This is the one public door. Reading order of the files behind it:

checks, embeddings, probe, neighbors, generation, quality, images, segmentation,
detection.
"""

from diffaugkit.metrics.detection import box_average_precision, mean_box_iou
from diffaugkit.metrics.embeddings import (
    clustering_accuracy,
    kmeans_scores,
    knn_accuracy,
    label_consistency,
    linear_probe_accuracy,
    linear_svm_accuracy,
)
from diffaugkit.metrics.generation import (
    copy_ratio,
    density_coverage,
    effective_diversity,
    frechet_distance,
    kernel_distance,
    nearest_training_samples,
    precision_recall,
    spread_ratio,
)
from diffaugkit.metrics.images import (
    boundary_f,
    copy_detection_features,
    inception_extractor,
    jaccard_j,
    propagate_labels,
)
from diffaugkit.metrics.neighbors import (
    WeightedKNNClassifier,
    retrieval_map,
    weighted_knn_accuracy,
)
from diffaugkit.metrics.probe import linear_probe
from diffaugkit.metrics.quality import (
    NEAR_COPY,
    QualityReport,
    frechet_scorer,
    kernel_scorer,
    make_embedding_scorer,
    make_generation_scorer,
    quality_report,
)
from diffaugkit.metrics.segmentation import (
    dice_score,
    dice_scorer,
    hausdorff_distance,
    hd95,
    iou_score,
    iou_scorer,
    label_instances,
    matched_dice,
    matched_iou,
    object_aji,
    object_f1,
    panoptic_quality,
    pixel_aji,
    row_hausdorff,
    sensitivity,
    sensitivity_scorer,
    specificity,
    specificity_scorer,
)

__all__ = [
    "NEAR_COPY",
    "QualityReport",
    "WeightedKNNClassifier",
    "boundary_f",
    "box_average_precision",
    "clustering_accuracy",
    "copy_detection_features",
    "copy_ratio",
    "density_coverage",
    "dice_score",
    "dice_scorer",
    "effective_diversity",
    "frechet_distance",
    "frechet_scorer",
    "hausdorff_distance",
    "hd95",
    "inception_extractor",
    "iou_score",
    "iou_scorer",
    "jaccard_j",
    "kernel_distance",
    "kernel_scorer",
    "kmeans_scores",
    "knn_accuracy",
    "label_consistency",
    "label_instances",
    "linear_probe",
    "linear_probe_accuracy",
    "linear_svm_accuracy",
    "make_embedding_scorer",
    "make_generation_scorer",
    "matched_dice",
    "matched_iou",
    "mean_box_iou",
    "nearest_training_samples",
    "object_aji",
    "object_f1",
    "panoptic_quality",
    "pixel_aji",
    "precision_recall",
    "propagate_labels",
    "quality_report",
    "retrieval_map",
    "row_hausdorff",
    "sensitivity",
    "sensitivity_scorer",
    "specificity",
    "specificity_scorer",
    "spread_ratio",
    "weighted_knn_accuracy",
]
