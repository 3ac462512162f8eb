"""To and from other people's files: plain backbones, safetensors, and the reference implementation's checkpoints."""

from cgh.interop import reference as reference
from cgh.interop.architectures import build_backbone, default_layers
from cgh.interop.backbone import backbone_state, load_backbone, save_backbone
from cgh.interop.exporting import exportable
from cgh.interop.sharing import from_pretrained, pretrained_config, push_to_hub, save_pretrained
from cgh.interop.trained import resnet, trained_backbone

__all__ = [
    "backbone_state",
    "build_backbone",
    "default_layers",
    "exportable",
    "from_pretrained",
    "load_backbone",
    "pretrained_config",
    "push_to_hub",
    "reference",
    "resnet",
    "save_backbone",
    "save_pretrained",
    "trained_backbone",
]
