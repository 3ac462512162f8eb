"""The mean and deviation that images are normalised by."""

from __future__ import annotations

from collections.abc import Sequence

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless both are of three channels in 0 to 1."""
    if len(mean) != 3 or len(std) != 3 or not all(0 <= x <= 1 for x in mean) or not all(0 < x <= 1 for x in std):
        raise ValueError(
            f"mean is {tuple(mean)} and std {tuple(std)}; each is of three channels in 0 to 1, so both lie there, and "
            "std above 0."
        )
