"""Cross-context self-supervised learning between global and hypercolumn features.

The method of Gao, Feng and Patras, "Self-Supervised Representation Learning with Cross-Context Learning between Global
and Hypercolumn Features" (WACV 2024, arXiv 2308.13392), as parts that stand alone.
"""

import difflib
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

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
from cgh.parameters import parameter_groups
from cgh.relation import RelationMatrix
from cgh.schedules import LearningRate, LossWeights, TeacherMomentum
from cgh.shuffle import BatchShuffle
from cgh.teacher import EMATeacher

if TYPE_CHECKING:
    from cgh import plot as plot
    from cgh import views as views
    from cgh import watch as watch

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
    "parameter_groups",
    "plot",
    "views",
    "watch",
]

# Loaded when they are first used: what they import takes longer than all of the rest.
_LAZY = ("plot", "views", "watch")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"cgh.{name}")
    known = [*__all__, *(f"{part.__name__[4:]}.{inner}" for part in (evaluate, interop) for inner in part.__all__)]
    close = [path for path in known if path.rpartition(".")[2].lower() == name.lower()]
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    hint = f"; close names: {', '.join(f'cgh.{path}' for path in close)}" if close else ""
    raise AttributeError(f"module 'cgh' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
