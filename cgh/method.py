"""The whole method in one module, for those who want it and not its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.centring import Centring
from cgh.encoder import ContextEncoder
from cgh.hypercolumn import HypercolumnExtractor
from cgh.losses import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CrossContextLoss, InfoNCELoss
from cgh.memory import MemoryBank
from cgh.schedules import LossWeights, Weights
from cgh.shuffle import BatchShuffle
from cgh.teacher import EMATeacher


class CGHOutput(NamedTuple):
    """What one batch gave."""

    loss: Tensor
    """The total to minimise, a scalar."""
    infonce: Tensor
    """The warm-up's loss, a scalar without gradient where its weight is zero."""
    terms: dict[tuple[str, str], Tensor]
    """The relation terms, scalars by (learner, guide)."""
    weights: Weights
    """What InfoNCE and each of two relation terms count in the total."""
    student: dict[str, Tensor]
    """The student's embeddings of the strong view, `(N, D)` by name."""
    teacher: dict[str, Tensor]
    """The teacher's embeddings of the weak view, `(N, D)` by name; `CGH.update` puts them into the memory."""


class CGH(nn.Module):
    """Cross-context learning between global and hypercolumn features: student, teacher, memory and losses.

    Its whole state is in `state_dict`. It may be wrapped by DistributedDataParallel: the memory is not broadcast.

    Args:
        backbone: any module whose output is its pooled feature, or a `HypercolumnExtractor` of one.
        layers: dotted names of the hypercolumn's layers, by default `["layer3", "layer4"]`, or of several hypercolumns;
            see `HypercolumnExtractor`, which has them already.
        dim: width of the embeddings, one for all contexts or one for each by name.
        hidden_dim: width inside the heads.
        memory_size: rows of the banks.
        momentum: the teacher's; a float, or a function from the number of updates to it.
        student_temperature: one for all contexts, or one for each by name.
        teacher_temperature: likewise.
        infonce_temperature: of the warm-up's loss.
        warmup_steps: optimiser steps over which InfoNCE fades out; the paper's is 5 epochs' worth.
        pairs: (learner, guide) names; by default each context learns from the other.
        centring_momentum: of the teacher's `Centring`; `None`, the paper's choice, is without.
        memory_dtype: of the banks' rows.
        shuffle: shuffle the teacher's batch; see `BatchShuffle`.
        image_shape: as in `ContextEncoder`.
        seed: of the memory's random start and of the teacher's batch shuffling.

    Shape:
        strong and weak views `(N, 3, H, W)`, extra local views `(N, 3, H', W')` -> `CGHOutput`.

    Raises:
        TypeError, ValueError: as the parts do.

    Example:
        >>> import torch, torchvision, cgh
        >>> model = cgh.CGH(torchvision.models.resnet18(), dim=64, hidden_dim=128, memory_size=256)
        >>> optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
        >>> strong, weak = torch.randn(2, 8, 3, 64, 64)
        >>> output = model(strong, weak)
        >>> output.loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> model.update(output)
        >>> model.memory.pointer
        8
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        *,
        dim: int | Mapping[str, int] = 512,
        hidden_dim: int = 4096,
        memory_size: int = 131_072,
        momentum: float | Callable[[int], float] = 0.999,
        student_temperature: float | Mapping[str, float] = STUDENT_TEMPERATURE,
        teacher_temperature: float | Mapping[str, float] = TEACHER_TEMPERATURE,
        infonce_temperature: float = 0.2,
        warmup_steps: int = 0,
        pairs: Sequence[tuple[str, str]] | None = None,
        centring_momentum: float | None = None,
        memory_dtype: torch.dtype = torch.float32,
        shuffle: bool = True,
        image_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(backbone, HypercolumnExtractor):
            if layers is not None:
                raise ValueError(f"layers is {layers}, but the extractor has its own: {list(backbone.layers)}.")
            extractor = backbone
        else:
            extractor = HypercolumnExtractor(backbone, ["layer3", "layer4"] if layers is None else layers)
        self.student = ContextEncoder(extractor, dim, hidden_dim, image_shape)
        self.teacher = EMATeacher(self.student, momentum)
        self.shuffle = BatchShuffle(seed) if shuffle else None
        self.memory = MemoryBank(self.student.dims, memory_size, memory_dtype, seed)
        centring = None if centring_momentum is None else Centring(self.memory, memory_size, centring_momentum)
        self.relation_loss = CrossContextLoss(student_temperature, teacher_temperature, pairs, centring)
        self.infonce_loss = InfoNCELoss(infonce_temperature)
        self.weights = LossWeights(warmup_steps)
        self.steps = 0

    @override
    def forward(self, strong: Tensor, weak: Tensor, *local_views: Tensor) -> CGHOutput:
        """Return the losses of one batch; call `update` with them after the optimiser's step.

        Args:
            strong: the student's view.
            weak: the teacher's view of the same images.
            *local_views: multi-crop's extra views; the student learns from them in the global context.
        """
        if len(strong) != len(weak):
            raise ValueError(f"strong has {len(strong)} images and weak {len(weak)}; they are two views of one batch.")
        student = self.student(strong)
        extra = [self.student(view, contexts=["global"]) for view in local_views]
        teacher = self.teacher(weak) if self.shuffle is None else self.shuffle(self.teacher, weak)

        weights = self.weights(self.steps)
        terms = self.relation_loss.terms(student, teacher, self.memory, *extra)
        relation = torch.stack(list(terms.values())).mean()
        # Past the warm-up InfoNCE is not computed: it would cost as much as the relations.
        infonce = self.infonce_loss(student, teacher, self.memory) if weights.infonce else relation.new_zeros(())
        loss = weights.infonce * infonce + 2 * weights.relation * relation
        return CGHOutput(loss, infonce, terms, weights, student, teacher)

    def update(self, output: CGHOutput) -> None:
        """Finish a step, after the optimiser's: move the teacher, the centres if any, and fill the memory."""
        self.memory.check(output.teacher)
        self.teacher.update(self.student)
        if self.relation_loss.centring is not None:
            self.relation_loss.centring.update(output.teacher, self.memory)
        self.memory.enqueue(output.teacher)
        self.steps += 1

    @override
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)
