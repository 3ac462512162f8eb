"""A model's tensors in a file, under whatever prefixes; everything that does not fit is said at once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Entries of checkpoints, and attributes of training tasks, that hold a model whole: of this library's examples, the
# reference implementation, MoCo, Lightning and many others.
CONTAINERS = ("model", "net", "state_dict")
# Where a method keeps its backbone: `cgh.CGH`, a `ContextEncoder`, a `HypercolumnExtractor`, the reference (and MoCo).
ENCODERS = ("student.extractor.backbone", "extractor.backbone", "backbone", "encoder_q", "")


@contextlib.contextmanager
def described_by(what: str) -> Iterator[None]:
    """Raise ValueError that names the file for whatever goes wrong in building the model that a file describes.

    Example:
        >>> from cgh.interop.matching import described_by
        >>> with described_by("config.json"):
        ...     {}["image_size"]
        Traceback (most recent call last):
        ...
        ValueError: config.json: describes no model that can be built, KeyError: 'image_size'
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if type(error) is ValueError else f"describes no model that can be built, {type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def check_match(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Args:
        saved: what a file holds.
        expected: what the model holds.
        what: the file's kind, for the message.

    Raises:
        ValueError: they differ; the message lists every missing, unexpected and misshapen key.

    Example:
        >>> import torch
        >>> from cgh.interop.matching import check_match
        >>> check_match({"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(3)}, "the backbone's file")
        Traceback (most recent call last):
        ...
        ValueError: the backbone's file does not fit the model:
          missing: b (3,)
    """
    problems = [f"missing: {key} {tuple(x.shape)}" for key, x in expected.items() if key not in saved]
    problems += [f"unexpected: {key} {tuple(x.shape)}" for key, x in saved.items() if key not in expected]
    problems += [
        f"misshapen: {key} is {tuple(saved[key].shape)}, the model's is {tuple(x.shape)}"
        for key, x in expected.items()
        if key in saved and saved[key].shape != x.shape
    ]
    if problems:
        raise ValueError("\n  ".join([f"{what} does not fit the model:", *problems]))


def check_tensors(state: Mapping[str, object], what: str) -> dict[str, Tensor]:
    """Return `state`, all of whose values are tensors.

    Raises:
        ValueError: some are not, or there are none.
    """
    others = {key: type(x).__name__ for key, x in state.items() if not isinstance(x, Tensor)}
    if others or not state:
        raise ValueError(f"{what} must map names to tensors; it holds {others or 'nothing'}.")
    return {key: x for key, x in state.items() if isinstance(x, Tensor)}


def without_wrappers(name: str) -> str:
    """Return a tensor's name without what DistributedDataParallel, `torch.compile` and others put in front of it.

    Example:
        >>> from cgh.interop.matching import without_wrappers
        >>> without_wrappers("_orig_mod.module.encoder_q.conv1.weight")
        'encoder_q.conv1.weight'
    """
    while name.partition(".")[0] in WRAPPERS and "." in name:
        name = name.partition(".")[2]
    return name


def flatten(content: Mapping[str, object]) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by the names of their entries and their own, parted by dots."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value
        elif isinstance(value, Mapping):
            tensors |= {f"{key}.{name}": x for name, x in flatten(value).items()}
    return tensors


def under(tensors: Mapping[str, Tensor], encoder: str, what: str) -> dict[str, Tensor]:
    """Return the tensors, by their whole names, of one encoder.

    Raises:
        ValueError: there are none.
    """
    parts = _parts(encoder)
    found = {name: x for name, x in tensors.items() if _parts(name)[: len(parts)] == parts}
    if not found:
        raise ValueError(
            f"{what} has no tensors whose names begin with {encoder + '.'!r}; they begin with {starts(tensors)}."
        )
    return found


def starts(names: Iterable[str]) -> list[str]:
    """Return what names begin with, entries and wrappers aside."""
    return sorted({(_parts(name) or [name])[0] for name in names})


def prefixes(tensors: Iterable[str], expected: Iterable[str]) -> Counter[str]:
    """Return how many of the expected names there are behind each prefix, which ends in a dot or is empty."""
    names = {name for name in expected if not name.endswith("num_batches_tracked")}
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return found


def find_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return what is behind the prefix of a model's tensors, by their names in the model.

    Parts beside the model's own, such as a projection head, are left out where all of the model is there.

    Args:
        tensors: of a file, by their whole names.
        expected: of the model.
        what: the file, for the message.

    Raises:
        ValueError: nothing has the names of the model, or several encoders do and none is this library's student or
            the reference's; the message says what there is and what to pass.
    """
    whole = whole_sets(tensors, expected)
    encoders = {prefix: ".".join(_parts(prefix)) for prefix in whole}
    known = [encoder for encoder in ENCODERS if encoder in encoders.values()]
    chosen = [prefix for prefix, encoder in encoders.items() if not known or encoder == known[0]]
    if len(chosen) > 1:
        keys = [encoders[prefix] for prefix in chosen]
        # The same encoder in several entries, whose own names are left out of its name.
        entries = len(set(keys)) < len(keys)
        keys = [prefix.partition(".")[0] for prefix in chosen] if entries else keys
        raise ValueError(
            f"{what} has several encoders that fit, {', '.join(chosen)}; say which: "
            f"{'checkpoint_key' if entries else 'encoder_key'}={' or '.join(map(repr, keys))}."
        )
    if chosen:
        return whole[chosen[0]]
    if not (found := prefixes(tensors, expected)):
        raise ValueError(
            f"{what} has no tensor with a name of the model's, such as {[*expected][:1]}; its names begin with "
            f"{starts(tensors)}, such as {[*tensors][:3]}. Name another architecture (arch), or another entry "
            "(checkpoint_key)."
        )
    prefix = found.most_common(1)[0][0]
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def whole_sets(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what is behind each prefix that has all of a model's names, without parts that the model has not."""
    count = len([name for name in expected if not name.endswith("num_batches_tracked")])
    own = {name.partition(".")[0] for name in expected}
    whole = [prefix for prefix, hits in prefixes(tensors, expected).items() if hits == count]
    behind = {p: {name.removeprefix(p): x for name, x in tensors.items() if name.startswith(p)} for p in whole}
    return {p: {name: x for name, x in found.items() if name.partition(".")[0] in own} for p, found in behind.items()}


def _parts(name: str) -> list[str]:
    """The parts of a name, without those of wrappers and containers before the first other part."""
    parts = [part for part in name.split(".") if part]
    while parts and parts[0] in (*WRAPPERS, *CONTAINERS):
        del parts[0]
    return [part for part in parts if part not in WRAPPERS]
