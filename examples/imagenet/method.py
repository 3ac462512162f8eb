"""What is learned from what, as the command line says it: hypercolumns, pairs and temperatures by context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple


class Method(NamedTuple):
    """The method's own settings."""

    hypercolumns: dict[str, list[str]]
    """Layers by the hypercolumn's name."""
    pairs: list[tuple[str, str]]
    """(learner, guide)."""
    student_temperature: dict[str, float]
    """By context; likewise the teacher's."""
    teacher_temperature: dict[str, float]

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of all contexts."""
        return ("global", *self.hypercolumns)


def spelled(temperatures: Mapping[str, float]) -> tuple[str, ...]:
    """Return temperatures as the command line has them."""
    return tuple(f"{context}={temperature}" for context, temperature in temperatures.items())


def parse(
    layers: Sequence[str], pairs: Sequence[str], student_temperature: Sequence[str], teacher_temperature: Sequence[str]
) -> Method:
    """Return the method that the options of the same names ask for.

    Args:
        layers: LAYER of the one hypercolumn, or NAME=LAYER,LAYER for each of several.
        pairs: LEARNER:GUIDE; by default every context learns from each other one.
        student_temperature: CONTEXT=TEMPERATURE, or one number for all. A hypercolumn of another name takes that of
            "hypercolumn", if it has none of its own.
        teacher_temperature: likewise.

    Raises:
        ValueError: one of them is written in another way, or names a context that is none.

    Example:
        >>> parse(["layer3", "layer4"], [], ["0.1"], ["global=0.04", "hypercolumn=0.08"]).teacher_temperature
        {'global': 0.04, 'hypercolumn': 0.08}
    """
    hypercolumns = _hypercolumns(layers)
    contexts = ("global", *hypercolumns)
    return Method(
        hypercolumns,
        [_pair(pair, contexts) for pair in pairs] or list(permutations(contexts, 2)),
        _temperatures("--student-temperature", student_temperature, contexts),
        _temperatures("--teacher-temperature", teacher_temperature, contexts),
    )


def _hypercolumns(layers: Sequence[str]) -> dict[str, list[str]]:
    named = [layer.split("=") for layer in layers]
    if all(len(parts) == 1 for parts in named):
        return {"hypercolumn": list(layers)}
    if any(len(parts) != 2 or not all(parts) for parts in named) or len({parts[0] for parts in named}) < len(named):
        raise ValueError(
            f"--layers {' '.join(layers)}: name the layers of one hypercolumn, such as layer3 layer4, or each of "
            "several by a name of its own, such as shallow=layer1,layer2 deep=layer3,layer4."
        )
    return {name: names.split(",") for name, names in named}


def _pair(pair: str, contexts: Sequence[str]) -> tuple[str, str]:
    learner, _, guide = pair.partition(":")
    if learner not in contexts or guide not in contexts:
        raise ValueError(
            f"--pairs {pair}: it is LEARNER:GUIDE, such as global:{contexts[-1]}, of the contexts "
            f"{', '.join(contexts)}."
        )
    return learner, guide


def _temperatures(option: str, temperatures: Sequence[str], contexts: Sequence[str]) -> dict[str, float]:
    given: dict[str, float] = {}
    try:
        for temperature in temperatures:
            context, equals, value = temperature.rpartition("=")
            given |= {context: float(value)} if equals else dict.fromkeys(contexts, float(value))
    except ValueError as error:
        raise ValueError(
            f"{option} {temperature}: it is one number for all contexts, or CONTEXT=NUMBER for each of "
            f"{', '.join(contexts)}."
        ) from error
    # A hypercolumn of another name, and it alone, may leave its temperature to that of "hypercolumn".
    found = {c: given.get(c, None if c == "global" else given.get("hypercolumn")) for c in contexts}
    if given.keys() - {*contexts, "hypercolumn"} or None in found.values():
        raise ValueError(
            f"{option} {' '.join(temperatures)}: name each of the contexts {', '.join(contexts)} and no other, or one "
            "number for all."
        )
    return {context: temperature for context, temperature in found.items() if temperature is not None}
