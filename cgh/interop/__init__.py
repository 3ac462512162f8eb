"""To and from other people's files: plain backbones, safetensors, and the reference implementation's checkpoints."""

from cgh.interop import reference as reference
from cgh.interop.architectures import build_backbone, default_layers
from cgh.interop.backbone import backbone_state, load_backbone, save_backbone
from cgh.interop.trained import resnet, trained_backbone

__all__ = [
    "backbone_state",
    "build_backbone",
    "default_layers",
    "load_backbone",
    "reference",
    "resnet",
    "save_backbone",
    "trained_backbone",
]
