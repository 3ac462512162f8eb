"""Cross-context self-supervised learning between global and hypercolumn features.

The method of Gao, Feng and Patras, "Self-Supervised Representation Learning with Cross-Context Learning between Global
and Hypercolumn Features" (WACV 2024, arXiv 2308.13392), as parts that stand alone.
"""

from cgh import checkpoint as checkpoint
from cgh import diagnostics as diagnostics
from cgh import evaluate as evaluate
from cgh import interop as interop
from cgh.batchnorm import SplitBatchNorm2d
from cgh.centring import Centring
from cgh.contexts import Contexts
from cgh.encoder import ContextEncoder
from cgh.heads import HypercolumnHead, ProjectionHead
from cgh.hypercolumn import Features, HypercolumnExtractor
from cgh.layers import list_layers
from cgh.losses import CrossContextLoss, InfoNCELoss
from cgh.memory import MemoryBank
from cgh.method import CGH, CGHOutput
from cgh.relation import RelationMatrix
from cgh.schedules import LearningRate, LossWeights, TeacherMomentum
from cgh.shuffle import BatchShuffle
from cgh.teacher import EMATeacher

__version__ = "0.1.0"

__all__ = [
    "CGH",
    "BatchShuffle",
    "CGHOutput",
    "Centring",
    "ContextEncoder",
    "Contexts",
    "CrossContextLoss",
    "EMATeacher",
    "Features",
    "HypercolumnExtractor",
    "HypercolumnHead",
    "InfoNCELoss",
    "LearningRate",
    "LossWeights",
    "MemoryBank",
    "ProjectionHead",
    "RelationMatrix",
    "SplitBatchNorm2d",
    "TeacherMomentum",
    "checkpoint",
    "diagnostics",
    "evaluate",
    "interop",
    "list_layers",
]
