"""A batch of images seen in several contexts: the mapping that every part passes to the next, and its checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Contexts: TypeAlias = Mapping[str, Tensor]
"""Embeddings `(N, D)` by the name of their context; each context has a `D` of its own, all share `N`."""


class Banks(Protocol):
    """Rows `(K, D)` by the name of their context: a `cgh.MemoryBank`, or a plain dictionary of tensors."""

    def __getitem__(self, name: str, /) -> Tensor: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


def check_contexts(contexts: Contexts, owner: str, names: Sequence[str] | None = None) -> int:
    """Check embeddings where they enter and return their batch size `N`.

    Args:
        contexts: embeddings `(N, D)` by name.
        owner: what they are, for the message ("student", "teacher").
        names: the contexts that must be there; all that are there are checked by default.

    Raises:
        TypeError: not a mapping, or not floating point.
        ValueError: a name is missing, a tensor is not `(N, D)`, batch sizes differ, or a batch is empty. Values are
            not looked at; see `check_values`.
    """
    if not isinstance(contexts, Mapping):
        raise TypeError(
            f"{owner} must map context names to (N, D) tensors, such as {{'global': z}}; got {type(contexts).__name__}."
        )
    names = list(contexts) if names is None else names
    if not names:
        raise ValueError(f"{owner} holds no context; pass at least one, such as {{'global': z}}.")
    sizes: dict[str, int] = {}
    for name in names:
        if name not in contexts:
            raise ValueError(f"{owner} has no context {name!r}; it has {sorted(contexts)}.")
        x = contexts[name]
        if not x.is_floating_point():
            raise TypeError(f"{owner}[{name!r}] is {x.dtype}; embeddings are floating point.")
        if x.ndim != 2:
            raise ValueError(f"{owner}[{name!r}] has shape {tuple(x.shape)}; embeddings are (N, D).")
        if not x.shape[0]:
            raise ValueError(f"{owner}[{name!r}] is empty: shape {tuple(x.shape)}. Drop batches without images.")
        sizes[name] = x.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{owner} has contexts of different batch sizes, {sizes}; all must see the same images.")
    return next(iter(sizes.values()))


def check_values(contexts: Contexts, owner: str) -> None:
    """Raise ValueError for NaN or infinity in embeddings on the CPU.

    Elsewhere this would wait for the device, and in a graph of `torch.compile` the host sees no values.
    """
    for name, x in contexts.items():
        if x.is_cpu and not torch.compiler.is_compiling():
            check_finite(x, f"{owner}[{name!r}]")


def check_banks(contexts: Contexts, memory: Banks, owner: str, names: Sequence[str]) -> None:
    """Check that every named context has a bank of its own width.

    Raises:
        TypeError: one tensor in place of the banks, or a bank that is not floating point.
        ValueError: a bank is missing or empty, or its rows are of another width than the embeddings.
    """
    if isinstance(memory, Tensor):
        raise TypeError(
            f"memory is one tensor {tuple(memory.shape)}; pass the MemoryBank, or {{name: (K, D)}} for every context."
        )
    for name in names:
        if name not in memory:
            raise ValueError(f"memory has no bank for context {name!r}; it has {sorted(memory)}.")
        width, rows = contexts[name].shape[1], tuple(memory[name].shape)
        if len(rows) != 2 or rows[1] != width:
            raise ValueError(
                f"{owner}[{name!r}] has {width} dimensions and memory[{name!r}] is {rows}; a bank is (size, {width})."
            )
        if not rows[0]:
            raise ValueError(
                f"memory[{name!r}] is empty: shape {rows}. An image needs at least one other to relate to."
            )
        if not memory[name].is_floating_point():
            raise TypeError(f"memory[{name!r}] is {memory[name].dtype}; a bank is floating point, as embeddings are.")


def are_finite(results: Iterable[Tensor]) -> bool:
    """Return whether scalars on the CPU are finite: True for others, as `check_values` does not look at them either.

    Where no value of a loss's embeddings can be NaN or infinite without its result being so too, looking at that alone
    takes a small part of the time.
    """
    return torch.compiler.is_compiling() or all(not x.is_cpu or math.isfinite(x.detach().item()) for x in results)


def check_same_device(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors, named for the message, are on one device."""
    if len({x.device for x in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"a loss reads tensors of one device; got {places}. Move them with .to(device).")


def check_same_contexts(z: Contexts, t: Contexts) -> None:
    """Raise ValueError unless student and teacher have the same contexts."""
    if set(z) != set(t):
        raise ValueError(
            f"the student has the contexts {sorted(z)} and the teacher {sorted(t)}; they must be the same."
        )


def check_batch(z: Contexts, t: Contexts, memory: Banks, learners: Sequence[str], guides: Sequence[str]) -> None:
    """Check what a loss takes: the student's learners and the teacher's guides, of one batch, with their banks.

    Raises:
        TypeError, ValueError: as `check_contexts` and `check_banks`; also student and teacher of different batch sizes,
            guides and learners with banks of different length, and tensors on different devices.
    """
    students, teachers = check_contexts(z, "student", learners), check_contexts(t, "teacher", guides)
    if students != teachers:
        raise ValueError(
            f"the student has {students} images and the teacher {teachers}; they are two views of one batch."
        )
    check_banks(z, memory, "student", learners)
    check_banks(t, memory, "teacher", guides)
    sizes = {name: len(memory[name]) for name in {*learners, *guides}}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the banks have different lengths, {sizes}; row j of each must belong to the same image.")
    check_same_device(
        {
            **{f"student[{name!r}]": z[name] for name in learners},
            **{f"teacher[{name!r}]": t[name] for name in guides},
            **{f"memory[{name!r}]": memory[name] for name in {*learners, *guides}},
        }
    )


REMEDY = "Lower the learning rate, check the inputs, or use bfloat16 in place of float16."


def check_finite(x: Tensor, name: str) -> None:
    """Raise ValueError for NaN or infinity in `x`; on an accelerator this waits for it."""
    finite = torch.isfinite(x)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {int((~finite).sum())} values that are not finite, "
            f"the first {x[row, column].item()} in row {row}. {REMEDY}"
        )


def check_temperature(temperature: float, name: str = "temperature") -> float:
    """Return `temperature`; raise ValueError unless it is above zero and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name} is {temperature}; a temperature is above zero, such as 0.1.")
    return float(temperature)
