"""Evaluation of what a backbone has learnt: nearest neighbours, a linear layer, few labels, clusters."""

from cgh.evaluate.cluster import ClusterScores, cluster_scores, kmeans
from cgh.evaluate.features import LabelledFeatures, extract_features, load_features, save_features
from cgh.evaluate.finetune import finetune_recipe, labelled_share
from cgh.evaluate.knn import knn
from cgh.evaluate.linear import Classifier, LinearProbe, accuracy, linear_recipe

__all__ = [
    "Classifier",
    "ClusterScores",
    "LabelledFeatures",
    "LinearProbe",
    "accuracy",
    "cluster_scores",
    "extract_features",
    "finetune_recipe",
    "kmeans",
    "knn",
    "labelled_share",
    "linear_recipe",
    "load_features",
    "save_features",
]
