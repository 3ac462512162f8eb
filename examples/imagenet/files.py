"""Image files: which names are one, what a folder holds of them, and the pixels in their bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torchvision
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
SUFFIXES = (*JPEG, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
# Of these Pillow decodes what it was built for; the others are told as images that cannot be decoded, not passed over.
SUFFIXES += (".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".mpo", ".tga")
BITS_PER_SAMPLE = 258  # TIFF's tag
TOOLS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class BadImageError(ValueError):
    """An image that cannot be decoded."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is a tool's own, such as `.ipynb_checkpoints` or `._photo.jpg`."""
    return name in TOOLS or (name.startswith(".") and name not in (".", ".."))


def is_image(path: str) -> bool:
    """Return whether the file of a path is an image, by its name and those of its folders, which "/" parts."""
    return path.lower().endswith(SUFFIXES) and not any(map(is_hidden, path.split("/")))


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, those behind links with them.

    Raises:
        FileNotFoundError: a link without a suffix, as a folder's is, that leads nowhere.
    """
    paths = [path for path in folder.iterdir() if not is_hidden(path.name)]
    if dangling := sorted(str(path) for path in paths if not path.exists() and not path.suffix):
        raise FileNotFoundError(
            f"{len(dangling)} links in {folder} lead nowhere, such as {dangling[0]} to {os.readlink(dangling[0])}: "  # noqa: PTH115
            "put the folders back, or remove the links."
        )
    return sorted(path.name for path in paths if path.is_dir())


def list_images(folder: Path) -> list[str]:
    """Return the paths of all images below a folder, relative to it and parted by "/", sorted.

    Links are followed. One to an image that is not there is listed too: it is a bad image, as one cut short is.
    """
    return list_files(folder, is_image)


def list_files(folder: Path, fits: Callable[[str], bool]) -> list[str]:
    """Return the paths of all files below a folder whose names fit, relative to it and parted by "/", sorted."""
    return sorted(_walk(folder, fits, "", ()))


def _walk(folder: Path, fits: Callable[[str], bool], prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # by a link to a folder that this one lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, fits, f"{prefix}{entry.name}/", (*above, here))
            elif fits(entry.name):
                yield prefix + entry.name


def read_image(path: Path) -> Tensor:
    """Return the image of a file as `decode` does.

    Raises:
        BadImageError: it cannot be read or decoded.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        target = f" it is a link to {os.readlink(path)}" if path.is_symlink() else ""  # noqa: PTH115
        raise BadImageError(f"{path} cannot be read: {error.strerror}{target and ';' + target}") from error
    except ValueError as error:  # no file can have that name
        raise BadImageError(f"{path} cannot be read: {error}") from error
    return decode(encoded, str(path))


def decode(encoded: bytes, name: str) -> Tensor:
    """Return an image of any format, colour space and depth as uint8 `(3, H, W)`, the right way up.

    A photograph may be stored turned or mirrored, with a tag (EXIF) that tells how to hold it. Of 16 bits a value the
    upper eight are kept, of an animation the first picture, of transparency nothing.

    Args:
        encoded: the bytes of a file.
        name: of the image, for the error.

    Raises:
        BadImageError: Pillow cannot decode it, or its values have no known range.
    """
    if encoded.startswith(b"\xff\xd8") and decode_jpeg:
        with suppress(RuntimeError, ValueError):  # Pillow tells better what is wrong, or reads it
            return decode_jpeg(encoded)
    try:
        return decode_by_pillow(encoded)
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"{name} ({len(encoded)} bytes) cannot be decoded: no image format is known by it"
        ) from error
    except Exception as error:  # Pillow's decoders raise what they come across in bytes that are no image
        raise BadImageError(f"{name} ({len(encoded)} bytes) cannot be decoded: {error}") from error


def decode_by_pillow(encoded: bytes) -> Tensor:
    """Return what `decode` does, by Pillow alone."""
    with Image.open(io.BytesIO(encoded)) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits, which Pillow holds in 32 at times: converting would clip them
            if max(getattr(file, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))) > 16:
                raise ValueError("its values are of 32 bits and of no known range; store it in 8 or 16 bits")
            values = np.array(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65_535:
                raise ValueError(f"values from {values.min()} to {values.max()} are not of 16 bits")
            return torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
        if image.mode == "F":
            raise ValueError("its values are floats of no known range; store it in 8 or 16 bits")
        if isinstance(image.info.get("transparency"), bytes):  # of a palette, which Pillow warns of
            image = image.convert("RGBA")
        pixels = np.array(image.convert("RGB"))
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def _fast_jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """A decoder of JPEGs in half of Pillow's time: torchcodec's, or torchvision's as long as it is not deprecated."""
    with suppress(ImportError, OSError, RuntimeError):  # it is not there, or built for another PyTorch
        from torchcodec import decoders

        return lambda encoded: decoders.decode_jpeg(_as_tensor(encoded))
    if tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 29):
        from torchvision.io import decode_jpeg

        return lambda encoded: decode_jpeg(_as_tensor(encoded), "RGB", apply_exif_orientation=True)
    return None


def _as_tensor(encoded: bytes) -> Tensor:
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


decode_jpeg = _fast_jpeg_decoder()
"""Bytes to uint8 `(3, H, W)`, upright; None where Pillow has to do it."""
