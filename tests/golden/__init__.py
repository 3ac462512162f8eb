"""The reference implementation's numbers, and the inputs they were computed from, rebuilt from names alone.

Every array is drawn from a generator seeded by the CRC-32 of its name, so it is the same on every machine.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def load(name: str) -> list[dict[str, Any]]:
    """The cases of `name.json`, beside this file."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def array(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float64 tensor, drawn from a generator seeded by `name`."""
    return torch.from_numpy(_generator(name).standard_normal(shape))


def unit_rows(name: str, shape: tuple[int, int]) -> Tensor:
    """`array`, each row scaled to unit length."""
    x = array(name, shape).numpy()
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def labels(name: str, count: int, classes: int) -> Tensor:
    """`count` class labels."""
    return torch.from_numpy(_generator(name).integers(0, 1 << 31, size=count) % classes)


def parameter(key: str, shape: tuple[int, ...]) -> Tensor:
    """What the reference's parameter or buffer `key` starts from; the teacher's starts as the student's."""
    x = array(key.replace("encoder_k.", "encoder_q.").replace("hypercols_proj_k.", "hypercols_proj_q."), shape)
    if key.endswith("running_mean"):
        return 0.1 * x
    if key.endswith("running_var"):
        return torch.exp(0.1 * x)
    if key.endswith("bias"):
        return 0.05 * x
    if len(shape) == 1:
        return 1.0 + 0.1 * x
    return x * np.sqrt(2.0 / np.prod(shape[1:]))


def fingerprint(name: str, x: Tensor) -> tuple[float, float]:
    """Two numbers that pin a tensor down: its norm, and its product with `array("probe/" + name)`."""
    x = x.detach().double().cpu()
    return float(np.linalg.norm(x.numpy())), float((x.numpy() * array("probe/" + name, tuple(x.shape)).numpy()).sum())


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
