"""Evaluation of frozen features."""

from cgh.evaluate.knn import knn as knn
