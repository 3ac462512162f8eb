"""A trained backbone as a folder that timm, transformers and this library load, and that the Hugging Face hub holds.

| file | holds |
| --- | --- |
| `model.safetensors` | the backbone under its library's names, and zeros where the architecture has a classifier |
| `config.json` | architecture, size and normalisation in timm's layout, and what this library adds under "cgh" |
| `heads.safetensors` | the student's projection heads, if asked for |
| `README.md` | the model card |
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgh.encoder import ContextEncoder
from cgh.extras import require
from cgh.hypercolumn import HypercolumnExtractor, pooled_output, remove_classifier
from cgh.interop.architectures import TIMM, create
from cgh.interop.backbone import backbone_state, find_backbone, read
from cgh.interop.matching import check_match, check_tensors, described_by
from cgh.interop.trained import find_arch, has_small_stem
from cgh.layouts import declared_prefix_tokens
from cgh.method import CGH
from cgh.modes import evaluating
from cgh.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation
from cgh.wrappers import unwrap

WEIGHTS, HEADS, CONFIG, CARD = "model.safetensors", "heads.safetensors", "config.json", "README.md"
HUB = "hf-hub:"
PLACES = ("folder", "root", "workers", "device")  # of a run's configuration: they say nothing about the model


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    arch: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    heads: bool = False,
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a backbone into a folder that `from_pretrained`, timm and transformers load.

    An architecture of timm, and a ResNet of torchvision, whose names timm shares, is loaded by
    `timm.create_model("local-dir:FOLDER", pretrained=True)`, by `timm.create_model(ARCH, pretrained=True,
    pretrained_cfg_overlay={"file": "FOLDER/model.safetensors"})` and by
    `transformers.AutoModel.from_pretrained(FOLDER)`; its classifier is zeros: nothing of it was learned. A model of
    transformers is written as transformers does. Other architectures of torchvision, and the stem for small images, are
    for `from_pretrained` alone.

    Args:
        model: a `cgh.CGH` (whose student it is), a `ContextEncoder`, a `HypercolumnExtractor`, or a bare backbone.
        folder: is made if missing.
        arch: as for `build_backbone`; by default what a timm model says of itself, or the ResNet of torchvision that
            the tensors fit.
        image_size: side of the images in pixels; by default the one that the backbone is built for, or 224.
        mean: of the three channels, taken off images in 0 to 1 before the backbone sees them.
        std: of the three channels, by which they are divided then.
        heads: write the student's projection heads too.
        config: the run's, for the model card.
        figures: what evaluations found, for the model card: numbers by name, nested as they like.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the architecture is not known or is another one (keys and shapes are listed; or, where only strides,
            pooling, activations or the like differ, what the two make of an image), `heads` of a model that has none,
            or a size, mean or deviation that images cannot have.

    Example:
        >>> import tempfile, torch, cgh
        >>> folder = tempfile.mkdtemp()
        >>> student = cgh.HypercolumnExtractor(cgh.interop.build_backbone("resnet18"), ["layer3", "layer4"])
        >>> cgh.interop.save_pretrained(student, folder)
        >>> cgh.interop.from_pretrained(folder)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """
    backbone, folder = find_backbone(model), Path(folder)
    mean, std = ([float(x) for x in values] for values in (mean, std))
    check_normalisation(mean, std)
    image_size = _built_for(backbone) if image_size is None else image_size
    about: dict[str, Any] = {"image_size": image_size}
    encoder = _encoder(model)
    if heads and encoder is None:
        raise ValueError(f"heads are asked for, and a {type(model).__name__} has none; pass the CGH or its student.")
    tensors: dict[str, Tensor] = {}
    written: dict[str, Any] = {}
    if _is_transformers(backbone):
        about |= {"library": "transformers", "arch": type(backbone).__name__}
    else:
        arch = arch or _say_arch(backbone)
        small_images = has_small_stem(backbone.state_dict())
        whole = create(arch, small_images, image_size)
        tensors = backbone_state(backbone, like=whole)
        library = "timm" if arch.startswith(TIMM) else "torchvision"
        about |= {"library": library, "arch": arch, "small_images": small_images}
        if library == "timm" or (type(whole).__name__ == "ResNet" and not small_images):
            written = _timm_config(arch.removeprefix(TIMM), library, backbone, whole, image_size, mean, std)
        whole.load_state_dict(tensors)
        remove_classifier(whole)
        _check_same(backbone, whole, image_size, arch)
    if heads and encoder is not None:
        about["heads"] = _describe_heads(encoder)

    folder.mkdir(parents=True, exist_ok=True)
    save_file = require("safetensors.torch", extra="interop").save_file
    metadata = {"format": "pt"}
    if tensors:
        contiguous = {key: x.contiguous() for key, x in tensors.items()}
        _write(folder / WEIGHTS, lambda path: save_file(contiguous, path, metadata))
    else:
        backbone.save_pretrained(folder)  # type: ignore[operator]  # transformers' own
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        pictures = {
            "image_mean": list(mean),
            "image_std": list(std),
            "size": {"height": image_size, "width": image_size},
        }
        _write_text(folder / "preprocessor_config.json", json.dumps(pictures, indent=2) + "\n")
    if heads and encoder is not None:
        state = {key: x.detach().cpu().contiguous() for key, x in encoder.heads.state_dict().items()}
        _write(folder / HEADS, lambda path: save_file(state, path, metadata))
    written["cgh"] = about | {"mean": list(mean), "std": list(std)}
    _write_text(folder / CONFIG, json.dumps(written, indent=2) + "\n")
    if not heads:
        (folder / HEADS).unlink(missing_ok=True)  # of an earlier model in this folder
    _write_text(folder / CARD, model_card(written, config, figures))


def from_pretrained(folder: str | os.PathLike[str], arch: str | None = None, heads: bool = False) -> nn.Module:
    """Return the backbone of a folder, without classifier: images `(N, 3, H, W)` -> pooled features `(N, W)`.

    The folder is one that `save_pretrained` wrote, or any in timm's or transformers' layout. Weights are read as data:
    a pickle that would run code is refused.

    Args:
        folder: where `config.json` is, or "hf-hub:USER/NAME" on the Hugging Face hub ("hf-hub:USER/NAME@REVISION" for
            a branch, tag or commit of it), from where it is downloaded once.
        arch: that it has to be; by default what the folder says.
        heads: return the `ContextEncoder` with the student's projection heads.

    Raises:
        FileNotFoundError: no such folder, or no `config.json` or weights in it.
        ImportError: a package that the folder needs is not installed.
        OSError: the hub has no such folder, does not show it to who is logged in, or cannot be reached.
        ValueError: no library knows the architecture (close names are listed); the weights are of another one, and then
            every missing, unexpected and misshapen key is listed; they hold more than data; there are no heads.
    """
    if str(folder).startswith(HUB):
        folder = _download(str(folder).removeprefix(HUB))
    folder = Path(folder)
    config = pretrained_config(folder)
    about = config.get("cgh", {})
    if not isinstance(about, dict):
        raise ValueError(f"{folder / CONFIG} holds {about!r} under 'cgh'; save_pretrained writes an object there.")
    if "model_type" in config and arch is None:
        backbone: nn.Module = require("transformers", extra="hub").AutoModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True
        )
    else:
        backbone = _build(config, about, arch, folder)
    if not heads:
        return backbone
    said = about.get("heads")
    if said is None:
        raise ValueError(f"{folder} has no heads; save_pretrained(..., heads=True) writes them.")
    with described_by(str(folder / CONFIG)):
        extractor = HypercolumnExtractor(backbone, said["hypercolumns"], said["layouts"], said["prefix_tokens"])
        size = about["image_size"]
        encoder = ContextEncoder(extractor, said["dims"], said["hidden_dim"], image_shape=(3, size, size))
    state = check_tensors(read(folder / HEADS), str(folder / HEADS))
    check_match(state, encoder.heads.state_dict(), str(folder / HEADS))
    encoder.heads.load_state_dict(state)
    return encoder


def pretrained_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a folder's `config.json`; under "cgh" it has `mean` and `std`, in what `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; name a folder that save_pretrained wrote, or {HUB}USER/NAME for one on the hub."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; it is an object with an architecture.")
    return config


def push_to_hub(folder: str | os.PathLike[str], repository: str, private: bool = False) -> str:
    """Upload a folder to the Hugging Face hub, as who is logged in there; return its address.

    Args:
        folder: what `save_pretrained` wrote.
        repository: "USER/NAME"; it is made if missing.
        private: of a repository that is made.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ImportError: huggingface_hub is not installed.
    """
    pretrained_config(folder)
    api = require("huggingface_hub", extra="hub").HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        allow_patterns=[WEIGHTS, HEADS, CONFIG, CARD, "preprocessor_config.json"],
        commit_message="A backbone pre-trained by CGH",
    )
    return str(address)


def model_card(
    pretrained: Mapping[str, Any], config: Mapping[str, Any] | None = None, figures: Mapping[str, Any] | None = None
) -> str:
    """Return a model card in Markdown.

    Args:
        pretrained: the content of `config.json`.
        config: the run's.
        figures: what evaluations found.
    """
    about = pretrained["cgh"]
    loads = ['backbone = cgh.interop.from_pretrained("FOLDER")  # or "hf-hub:USER/NAME"']
    if "pretrained_cfg" in pretrained:
        loads.append('backbone = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)')
    if "pretrained_cfg" in pretrained or "model_type" in pretrained:
        loads.append('backbone = transformers.AutoModel.from_pretrained("FOLDER")')
    library = {"pretrained_cfg": "timm", "model_type": "transformers"}
    name = next((library[key] for key in library if key in pretrained), "cgh-ssl")
    parts = [
        "---",
        f"library_name: {name}",
        "pipeline_tag: image-feature-extraction",
        "tags:\n- self-supervised-learning\n- cgh",
        "---",
        "",
        f"# {about['arch'].removeprefix(TIMM)}, pre-trained by CGH",
        "",
        "A backbone that learned without labels, across the contexts of global and hypercolumn features "
        "([Gao, Feng and Patras, WACV 2024](https://arxiv.org/abs/2308.13392)).",
        "",
        "```python\n" + "\n".join(loads) + "\n```",
        "",
        f"Images are {about['image_size']} pixels a side, their channels in 0 to 1, less {_numbers(about['mean'])}, "
        f"divided by {_numbers(about['std'])}.",
    ]
    for title, head, content in (("Figures", "figure", figures), ("Training", "setting", config)):
        rows = [(key, value) for key, value in _flat(content or {}) if key.rpartition(".")[2] not in PLACES]
        if rows:
            parts += ["", f"## {title}", "", f"| {head} | |", "| --- | --- |"]
            parts += [f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in rows]
    return "\n".join(parts) + "\n"


def _download(name: str) -> str:
    """The folder that holds a repository of the hub, without files that are not read, such as other formats."""
    repository, _, revision = name.partition("@")
    fetch = require("huggingface_hub", extra="hub").snapshot_download
    for patterns in (["*.json", "*.safetensors"], ["*.json", "pytorch_model.bin"]):
        folder = fetch(repository, revision=revision or None, allow_patterns=patterns)
        if any(Path(folder).glob("*.safetensors")):
            break
    return str(folder)


def _build(config: Mapping[str, Any], about: Mapping[str, Any], arch: str | None, folder: Path) -> nn.Module:
    """The backbone of a folder in timm's layout, or of this library's own."""
    said = about.get("arch") or (f"{TIMM}{config['architecture']}" if "architecture" in config else None)
    if arch is None and said is None:
        raise ValueError(f"{folder / CONFIG} names no architecture; its entries are {sorted(config)}.")
    with described_by(str(folder / CONFIG)):
        size = about.get("image_size") or (config.get("model_args") or {}).get("img_size")
        backbone = create(arch or str(said), bool(about.get("small_images")), size)
    classifier = backbone.state_dict().keys()
    remove_classifier(backbone)
    expected = backbone.state_dict()
    weights = next((path for name in (WEIGHTS, "pytorch_model.bin") if (path := folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}.")
    state = check_tensors(read(weights), str(weights))
    state = {key: x for key, x in state.items() if key in expected or key not in classifier}
    check_match(state, expected, str(weights))
    backbone.load_state_dict(state)
    return backbone


def _timm_config(
    name: str,
    library: str,
    backbone: nn.Module,
    whole: nn.Module,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """What timm and transformers read, of an architecture that timm knows by `name`."""
    known: dict[str, Any] = {"classifier": "fc", "first_conv": "conv1", "fixed_input_size": False}  # of torchvision's
    if library == "timm":
        known = {key: getattr(require("timm", extra="timm").get_pretrained_cfg(name), key, None) for key in known}
    options: dict[str, Any] = {"img_size": size} if known["fixed_input_size"] else {}
    if getattr(backbone, "dynamic_img_size", False):
        options["dynamic_img_size"] = True
    classes = int(getattr(whole, "num_classes", 1000))
    view = {"input_size": [3, size, size], "interpolation": "bilinear", "crop_pct": 0.875}
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": classes,
        "pretrained_cfg": {**known, **view, "mean": list(mean), "std": list(std), "num_classes": classes},
    }
    return config | ({"model_args": options} if options else {})


def _encoder(model: nn.Module) -> ContextEncoder | None:
    model = unwrap(model)
    model = unwrap(model.student) if isinstance(model, CGH) else model
    return model if isinstance(model, ContextEncoder) else None


def _describe_heads(encoder: ContextEncoder) -> dict[str, Any]:
    """What a `ContextEncoder` is built from beside its backbone."""
    extractor = encoder.extractor
    declared = extractor.prefix_tokens == declared_prefix_tokens(extractor.backbone)
    return {
        "hypercolumns": {name: list(layers) for name, layers in extractor.hypercolumns.items()},
        "layouts": extractor.layouts,
        "prefix_tokens": None if declared else extractor.prefix_tokens[0],
        "dims": encoder.dims,
        "hidden_dim": encoder.heads.get_submodule("global.0").get_parameter("weight").shape[0],
    }


def _check_same(backbone: nn.Module, rebuilt: nn.Module, size: int, arch: str) -> None:
    """Raise ValueError unless two networks of the same tensors make the same of an image, up to rounding.

    They may differ in strides, pooling or activations.
    """
    like = next(backbone.parameters())
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)
    with torch.inference_mode(), evaluating(backbone), evaluating(rebuilt.to(like)):
        expected, found = (pooled_output(x(image), 1, x).float() for x in (backbone, rebuilt))
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if difference > (1e-2 if like.dtype.itemsize >= 4 else 0.1):
        raise ValueError(
            f"a {arch} with the backbone's tensors gives other features than the backbone, off by "
            f"{100 * difference:.0f} %: it was made with options that its tensors do not show, such as strides, "
            "dilation, pooling or activations, and a folder would be another network. Write its tensors by "
            "cgh.interop.save_backbone."
        )


def _say_arch(backbone: nn.Module) -> str:
    said = getattr(backbone, "pretrained_cfg", None)
    if said and "architecture" in said:
        return TIMM + str(said["architecture"])
    state = backbone.state_dict()
    try:
        return find_arch(state, has_small_stem(state), "")
    except ValueError as error:
        raise ValueError(
            f"the backbone ({type(backbone).__name__}) does not say its architecture, and is no ResNet of torchvision; "
            "name it: arch='mobilenet_v2', for example. One of no library is for save_backbone."
        ) from error


def _built_for(backbone: nn.Module) -> int:
    """The side of the images that a transformer has positions for; of others, which take any, the usual."""
    for where, name in (("patch_embed", "img_size"), ("config", "image_size")):  # of timm's and of Hugging Face's
        size = getattr(getattr(backbone, where, None), name, getattr(backbone, name, None))
        size = size[0] if isinstance(size, (list, tuple)) else size
        if isinstance(size, int):
            return size
    return 224


def _is_transformers(backbone: nn.Module) -> bool:
    return "transformers" in {cls.__module__.split(".")[0] for cls in type(backbone).__mro__}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = isinstance(value, (list, tuple))
            yield f"{prefix}{key}", " ".join(map(str, value)) if text else value


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _write(path: Path, save: Callable[[str], object]) -> None:
    """Write a file that is whole whenever the process is stopped."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
