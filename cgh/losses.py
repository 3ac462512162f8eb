"""The losses: relations learned across contexts, and the InfoNCE that warms them up."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.centring import Centring
from cgh.contexts import (
    Banks,
    Contexts,
    are_finite,
    check_banks,
    check_batch,
    check_contexts,
    check_same_contexts,
    check_same_device,
    check_temperature,
    check_values,
)
from cgh.kept import keeps
from cgh.streaming import Query, attach
from cgh.terms import cross_entropies, infonce

STUDENT_TEMPERATURE = {"global": 0.10, "hypercolumn": 0.08}
TEACHER_TEMPERATURE = {"global": 0.04, "hypercolumn": 0.08}


class CrossContextLoss(nn.Module):
    """Each context of the student learns the relations that another context of the teacher sees.

    An image's relation to the memory in context `c` is `softmax(z_c . M_c / temperature)`. A pair (learner, guide) has
    the term `CE(student relations in learner | teacher relations in guide)`, with `CE(p | t) = -sum_j t_j log p_j`, the
    mean over the batch; the loss is the mean over the pairs. Neither the teacher nor the memory gets a gradient.

    The relations are never stored: value and gradient come from one pass over the memory, see `cgh.streaming`.
    `cgh.relation.cross_context_term` is the equation with all relations in memory.

    Args:
        student_temperature: one for all contexts, or one for each by name.
        teacher_temperature: likewise; the lower, the sharper the target.
        pairs: (learner, guide) names; by default every ordered pair of different contexts. `[("global", "global")]` is
            the single-context method, ReSSL.
        centring: taken off the teacher's similarities, if given.

    Shape:
        student `z` and teacher `t`: `{name: (N, D)}`; `memory`: `{name: (K, D)}` -> a scalar.

    Raises:
        TypeError: contexts that are no mapping, or embeddings or banks that are not floating point.
        ValueError: a pair named twice; a temperature of zero or below or missing for a context; student, teacher and
            memory with other names, widths or batch sizes than one another, or on other devices; an empty batch; values
            that are not finite.
        RuntimeError: on differentiating twice; `cgh.relation.cross_context_term` can be.

    Example:
        >>> import torch, cgh
        >>> memory = cgh.MemoryBank({"global": 16, "hypercolumn": 16}, size=100)
        >>> z = {name: torch.nn.functional.normalize(torch.randn(4, 16), dim=1) for name in memory}
        >>> criterion = cgh.CrossContextLoss()
        >>> criterion(z, z, memory).shape, list(criterion.terms(z, z, memory))
        (torch.Size([]), [('global', 'hypercolumn'), ('hypercolumn', 'global')])
    """

    def __init__(
        self,
        student_temperature: float | Mapping[str, float] = STUDENT_TEMPERATURE,
        teacher_temperature: float | Mapping[str, float] = TEACHER_TEMPERATURE,
        pairs: Sequence[tuple[str, str]] | None = None,
        centring: Centring | None = None,
    ) -> None:
        super().__init__()
        self.student_temperature = _check_temperatures(student_temperature, "student_temperature")
        self.teacher_temperature = _check_temperatures(teacher_temperature, "teacher_temperature")
        if pairs is not None and (not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs)):
            raise ValueError(f"pairs is {pairs!r}; give (learner, guide) names, such as [('global', 'hypercolumn')].")
        self.pairs = None if pairs is None else [(learner, guide) for learner, guide in pairs]
        if self.pairs is not None and len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs is {self.pairs!r}; name each once.")
        self.centring = centring

    def check_names(self, names: Collection[str]) -> None:
        """Raise ValueError unless all pairs are of these contexts, and each of them has temperatures."""
        pairs = [*permutations(names, 2)] if self.pairs is None else self.pairs
        for learner, guide in pairs:
            for name in (learner, guide):
                if name not in names:
                    raise ValueError(f"pairs names the context {name!r}; the contexts are {[*names]}.")
            _temperature(self.student_temperature, learner)
            _temperature(self.teacher_temperature, guide)

    if TYPE_CHECKING:

        def __call__(self, z: Contexts, t: Contexts, memory: Banks, *local_views: Contexts) -> Tensor: ...

    @override
    def forward(self, z: Contexts, t: Contexts, memory: Banks, *local_views: Contexts) -> Tensor:
        """Return the mean of `terms`."""
        terms = self.terms(z, t, memory, *local_views)
        return reduce(torch.add, terms.values()) / len(terms)

    def terms(self, z: Contexts, t: Contexts, memory: Banks, *local_views: Contexts) -> dict[tuple[str, str], Tensor]:
        """Return every pair's term, a scalar by (learner, guide).

        Args:
            z: the student's embeddings of the strong view.
            t: the teacher's embeddings of the weak view.
            memory: a `MemoryBank`, or a dictionary of banks.
            *local_views: the student's embeddings of multi-crop's extra views. Each learns from the same target, in
                the contexts that it has; a learner's term is the mean over its views.
        """
        pairs = self._check(z, t, memory, local_views)
        terms = self._terms(pairs, z, t, memory, local_views)
        if not are_finite(terms.values()):
            learners, guides = _unique(pairs)
            check_values({name: z[name] for name in learners}, "student")
            check_values({name: t[name] for name in guides}, "teacher")
            for number, view in enumerate(local_views):
                check_values({name: view[name] for name in learners if name in view}, f"local view {number}")
        return terms

    def _terms(
        self,
        pairs: Sequence[tuple[str, str]],
        z: Contexts,
        t: Contexts,
        memory: Banks,
        local_views: Sequence[Contexts],
    ) -> dict[tuple[str, str], Tensor]:
        """`terms` of what has been checked."""
        learners, guides = _unique(pairs)
        rows = {name: _stacked([view[name] for view in (z, *local_views) if name in view]) for name in learners}
        students = [Query(x, name, _temperature(self.student_temperature, name)) for name, x in rows.items()]
        teachers = [
            Query(
                t[name],
                name,
                _temperature(self.teacher_temperature, name),
                centre=None if self.centring is None else self.centring[name],
            )
            for name in guides
        ]
        values, gradients = zip(*cross_entropies(pairs, students, teachers, memory), strict=True)
        return dict(zip(pairs, attach(values, [rows[learner] for learner, _ in pairs], gradients), strict=True))

    @override
    def extra_repr(self) -> str:
        return (
            f"student_temperature={self.student_temperature}, teacher_temperature={self.teacher_temperature}, "
            f"pairs={self.pairs or 'every two contexts'}"
        )

    def _check(
        self, z: Contexts, t: Contexts, memory: Banks, local_views: Sequence[Contexts]
    ) -> Sequence[tuple[str, str]]:
        """Check all inputs and return the pairs to compute."""
        pairs = self.pairs
        if pairs is None:
            check_contexts(z, "student")
            check_same_contexts(z, t)
            pairs = [(learner, guide) for learner in z for guide in z if learner != guide]
            if not pairs:
                raise ValueError(
                    f"the one context {list(z)} has no other to learn from; pass pairs=[('global', 'global')]."
                )
        learners, guides = _unique(pairs)
        check_batch(z, t, memory, learners, guides)
        for number, view in enumerate(local_views):
            names = [name for name in learners if name in view]
            owner = f"local view {number}"
            if check_contexts(view, owner, names) != len(z[learners[0]]):
                raise ValueError(f"{owner} has {len(view[names[0]])} images, the student {len(z[learners[0]])}.")
            check_banks(view, memory, owner, names)
            for name in names:
                check_same_device({f"student[{name!r}]": z[name], f"{owner}[{name!r}]": view[name]})
        return pairs


class InfoNCELoss(nn.Module):
    """MoCo's loss (He et al., 2020) in every context: the teacher's embedding against the memory.

    `-log(exp(z . t / temperature) / (exp(z . t / temperature) + sum_j exp(z . M_j / temperature)))`, the mean over the
    batch, summed over the contexts. CGH warms up with it.

    Args:
        temperature: above zero.

    Shape:
        student `z` and teacher `t`: `{name: (N, D)}`; `memory`: `{name: (K, D)}` -> a scalar.

    Raises:
        TypeError, ValueError, RuntimeError: as `CrossContextLoss`.

    Example:
        >>> import torch, cgh
        >>> memory = cgh.MemoryBank({"global": 16, "hypercolumn": 16}, size=100)
        >>> z = {name: torch.nn.functional.normalize(torch.randn(4, 16), dim=1) for name in memory}
        >>> cgh.InfoNCELoss()(z, z, memory).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    if TYPE_CHECKING:

        def __call__(self, z: Contexts, t: Contexts, memory: Banks) -> Tensor: ...

    @override
    def forward(self, z: Contexts, t: Contexts, memory: Banks) -> Tensor:
        """Return the loss of the student's embeddings `z` against the teacher's `t` and the memory."""
        check_contexts(z, "student")
        check_same_contexts(z, t)
        check_batch(z, t, memory, list(z), list(z))
        queries = [Query(x, name, self.temperature) for name, x in z.items()]
        values, gradients = zip(*infonce(queries, t, memory), strict=True)
        terms = attach(values, list(z.values()), gradients)
        # A positive that is infinite makes the sigmoid 1, and a loss of zero.
        if not keeps(queries, memory) or not are_finite(terms):
            check_values(z, "student")
            check_values(t, "teacher")
        return reduce(torch.add, terms)

    @override
    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def _stacked(views: Sequence[Tensor]) -> Tensor:
    return views[0] if len(views) == 1 else torch.cat(list(views))


def _unique(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The learners and the guides of `pairs`, each once."""
    return list(dict.fromkeys(learner for learner, _ in pairs)), list(dict.fromkeys(guide for _, guide in pairs))


def _check_temperatures(temperature: float | Mapping[str, float], name: str) -> float | dict[str, float]:
    if isinstance(temperature, Mapping):
        return {context: check_temperature(value, f"{name}[{context!r}]") for context, value in temperature.items()}
    return check_temperature(temperature, name)


def _temperature(temperature: float | Mapping[str, float], name: str) -> float:
    """The temperature of one context."""
    if not isinstance(temperature, Mapping):
        return temperature
    if name not in temperature:
        raise ValueError(
            f"no temperature for context {name!r}, only for {sorted(temperature)}; give one float, or add it."
        )
    return temperature[name]
