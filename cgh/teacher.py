"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Self, override

from cgh import distributed
from cgh.modes import check_module
from cgh.state import Counted, LocalTensors
from cgh.wrappers import own_copy, plain_names, unwrap

DROPPING = ("Drop", "StochasticDepth")
"""In the names of classes that drop something at a rate `p` or `prob`."""


class EMATeacher(Counted):
    """A copy of the student whose parameters follow it as an exponential moving average.

    `teacher = momentum * teacher + (1 - momentum) * student`, after each optimiser step. Only parameters are averaged:
    buffers, such as batch-norm statistics, are the teacher's own, from its own batches. Dropout and stochastic depth
    are off in the teacher: they are noise to the student, and what guides it is free of it.

    Where the teacher's parameters are in half precision, what moves in one update is less than their rounding: their
    average is kept in float32 beside them, in `averages`, and saved with them. The student may be of any precision, but
    has to be on the teacher's device.

    Args:
        student: the module to copy, also when wrapped, see `cgh.wrappers.unwrap`.
        momentum: between 0 (a copy of the student) and 1 (frozen), or a function from the number of updates made so
            far to it.

    Shape:
        That of the student; the outputs need no gradient.

    Raises:
        TypeError: a student that is no module or cannot be copied.
        ValueError: a momentum outside [0, 1]; on `update`, a student whose parameters have other names or shapes, or
            are on another device.

    Example:
        >>> import torch, cgh
        >>> student = torch.nn.Linear(4, 2)
        >>> teacher = cgh.EMATeacher(student, momentum=0.999)
        >>> _ = torch.nn.init.zeros_(student.weight)
        >>> teacher.update(student)
        >>> teacher(torch.randn(3, 4)).requires_grad
        False
    """

    def __init__(self, student: nn.Module, momentum: float | Callable[[int], float] = 0.999) -> None:
        super().__init__()
        check_module(student, "the student", "a cgh.ContextEncoder")
        self.encoder = _copy(unwrap(student)).requires_grad_(False)
        self.encoder.zero_grad(set_to_none=True)
        _turn_dropout_off(self.encoder)
        self.momentum = momentum if callable(momentum) else _check_momentum(momentum)
        self.averages = _Averages()
        _follow(self)
        self.register_load_state_dict_post_hook(_follow)  # type: ignore[no-untyped-call]  # torch's, untyped
        self._known: tuple[_Parameters, _Parameters] | None = None  # the teacher's and the student's

    @property
    def updates(self) -> int:
        """Updates made so far. Reading it waits for an accelerator."""
        return self._get_count()

    @updates.setter
    def updates(self, updates: int) -> None:
        self._set_count(updates)

    @override
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the student would, by the teacher's parameters and without gradient."""
        return self.encoder(*args, **kwargs)

    @distributed.outside_graphs
    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move every parameter towards the student's, in one grouped in-place operation."""
        ours, theirs = self._parameters_with(unwrap(student))
        if callable(self.momentum) and _is_capturing(ours):
            raise RuntimeError(
                "momentum is a function, which a CUDA graph calls once for all its replays: give a number, or update "
                "the teacher outside of the graph."
            )
        momentum = _check_momentum(self.momentum(self._seen)) if callable(self.momentum) else self.momentum
        averages, goals = [], []
        for name, x in self.averages.follow(ours).items():
            if x.is_floating_point() or x.is_complex():
                averages.append(x)
                goals.append(theirs[name] if theirs[name].dtype == x.dtype else theirs[name].to(x.dtype))
            else:
                x.copy_(theirs[name])  # of whole numbers and truth values there is no average
        if averages:
            torch._foreach_lerp_(averages, goals, 1.0 - momentum)
        self.averages.write(ours)
        self._advance()

    @override
    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"

    def _parameters_with(self, student: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The teacher's parameters and the student's by name, checked where they are not those of the last update."""
        known = self._known
        if known is None or not (known[0].are_of(self.encoder) and known[1].are_of(student)):
            known = _Parameters(self.encoder), _Parameters(student)
        ours, theirs = known[0].named(), known[1].named()
        if known is not self._known or len({x.device for x in (*ours.values(), *theirs.values())}) > 1:
            _check_alike(theirs, ours)
        self._known = known
        return ours, theirs

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _follow(self)
        nn.Module._apply(self, fn, recurse)
        self.averages.accept()
        _follow(self)
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}  # so that a copy of the teacher holds no copy of the student

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it without types
        _follow(self)


class _Averages(LocalTensors):
    """Averages in float32 of the parameters that are in half precision, by their names with "/" in place of "."."""

    def __init__(self) -> None:
        super().__init__({})
        self._versions: dict[str, int] = {}

    def follow(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what stands for each parameter: itself, or its average, begun anew where others have written to it."""
        averages = {}
        for name, x in parameters.items():
            if x.dtype.is_floating_point and x.dtype.itemsize < 4:
                average = self._tensors.get(name.replace(".", "/"))
                if average is None or self._versions.setdefault(name, x._version) != x._version:
                    average = x.detach().float()
                    self._versions[name] = x._version
                averages[name] = average.to(x.device)
        self._tensors = {name.replace(".", "/"): x for name, x in averages.items()}
        return {**parameters, **averages}

    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Round the averages into their parameters."""
        if self._tensors:
            rounded = {n: x for n, x in parameters.items() if n.replace(".", "/") in self._tensors}
            torch._foreach_copy_(list(rounded.values()), list(self._tensors.values()))
            self._versions = {name: x._version for name, x in rounded.items()}

    def accept(self) -> None:
        """Take the parameters' values at the next `follow` for the averages'."""
        self._versions = {}

    @override
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_versions": {}}  # a copy's parameters begin to count anew

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._tensors
        super()._apply(fn, recurse)
        self._tensors = {n: x if x.dtype == torch.float32 else before[n].to(x.device) for n, x in self._tensors.items()}
        return self

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
    ) -> None:
        # What is not there begins at its parameter, and what has no parameter in half precision is not needed.
        saved = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
        self._tensors = {name: x.detach().clone() for name, x in saved.items()}
        self.accept()


def _follow(teacher: EMATeacher, _: object = None) -> None:
    """Have the averages follow the parameters as they are now, such as right after both were loaded or copied."""
    teacher.averages.follow(_Parameters(teacher.encoder).named())


class _Parameters:
    """The parameters of a module, which are found again without a walk through it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts = [
            (part._modules, dict(part._modules), part._parameters, set(part._parameters)) for part in module.modules()
        ]
        slots = {
            f"{prefix}.{name}".removeprefix("."): (part._parameters, name)
            for prefix, part in module.named_modules()
            for name in part._parameters
        }
        names = plain_names(module, [name for name, _ in module.named_parameters()])
        self.slots = {plain: slots[name] for plain, name in names.items()}

    def are_of(self, module: nn.Module) -> bool:
        """Whether these are all parameters of `module`."""
        return module is self.module and all(
            children == modules and parameters.keys() == names for children, modules, parameters, names in self.parts
        )

    def named(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: parameters[key] for name, (parameters, key) in self.slots.items()}


def _copy(student: nn.Module) -> nn.Module:
    """A deep copy of the student, or an error that says what cannot be copied."""
    if isinstance(student, torch.jit.ScriptModule):
        raise TypeError(
            "the student is a ScriptModule; pass the module that it was made of, and script what you deploy."
        )
    for name, x in (*student.named_parameters(), *student.named_buffers()):
        if is_lazy(x):
            raise TypeError(f"the student's {name!r} has no shape yet; run a batch through the student first.")
    for name, part in student.named_modules():
        for key, x in (*vars(part).items(), *part._buffers.items()):
            if isinstance(x, Tensor) and not x.is_leaf:
                raise TypeError(
                    f"the student's {f'{name}.{key}'.removeprefix('.')!r} was computed with gradient and cannot be "
                    "copied. In place of torch.nn.utils.weight_norm or spectral_norm take those of "
                    "torch.nn.utils.parametrizations; end pruning by torch.nn.utils.prune.remove; else detach it."
                )
    return own_copy(student)


def _check_alike(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless student and teacher have parameters of the same names and shapes, on the same devices."""
    shapes, expected = ({n: tuple(p.shape) for n, p in parameters.items()} for parameters in (theirs, ours))
    if shapes != expected:
        names = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        raise ValueError(
            f"student and teacher differ in {len(names)} parameters, the first {names[0]!r}: "
            f"student {shapes.get(names[0])}, teacher {expected.get(names[0])}. Update from the module it copied."
        )
    for name, x in ours.items():
        if (device := theirs[name].device) != x.device:
            raise ValueError(
                f"{name!r} of the student is {theirs[name].dtype} on {device}, of the teacher {x.dtype} on {x.device}. "
                f"Move the teacher too: teacher.to({str(device)!r})."
            )


def _is_capturing(parameters: Mapping[str, Tensor]) -> bool:
    return any(x.is_cuda for x in parameters.values()) and torch.cuda.is_current_stream_capturing()


def _check_momentum(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it lies between 0 (a copy of the student) and 1 (frozen).")
    return momentum


def _turn_dropout_off(encoder: nn.Module) -> None:
    """Set each rate of dropout and stochastic depth to 0, whatever the mode of the module is."""
    for module in encoder.modules():
        # By name, as each library has classes of its own, and some keep a rate for a function.
        drops = any(part in type(module).__name__ for part in DROPPING)
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("drop" in attribute or (drops and attribute in ("p", "prob"))):
                setattr(module, attribute, 0.0)
