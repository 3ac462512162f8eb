"""The whole method in one module, for those who want it and not its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh import distributed
from cgh.centring import Centring
from cgh.encoder import ContextEncoder
from cgh.finite import check_soon
from cgh.hypercolumn import HypercolumnExtractor
from cgh.losses import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CrossContextLoss, InfoNCELoss
from cgh.memory import MemoryBank
from cgh.schedules import LossWeights, Weights
from cgh.shuffle import BatchShuffle
from cgh.state import Counted
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
    """What InfoNCE and each of two relation terms count in the total, scalars of the loss's device."""
    student: dict[str, Tensor]
    """The student's embeddings of the strong view, `(N, D)` by name."""
    teacher: dict[str, Tensor]
    """The teacher's embeddings of the weak view, `(N, D)` by name; `CGH.update` puts them into the memory."""

    @override
    def __repr__(self) -> str:
        """Return the losses, and of the embeddings their shapes, a line each."""
        terms = [f"  {learner} from {guide}: {term.item():.4f}" for (learner, guide), term in self.terms.items()]
        shapes = [
            f"  {who}: " + ", ".join(f"{name} {tuple(z.shape)}" for name, z in contexts.items())
            for who, contexts in (("student", self.student), ("teacher", self.teacher))
        ]
        infonce, relation = (float(weight) for weight in self.weights)
        lines = [
            f"CGHOutput: loss {self.loss.item():.4f}",
            f"  InfoNCE: {self.infonce.item():.4f}, weight {infonce:.4g}; each relation below: weight {relation:.4g}",
            *terms,
            *shapes,
        ]
        return "\n".join(lines)


class CGH(Counted):
    """Cross-context learning between global and hypercolumn features: student, teacher, memory and losses.

    Its whole state is in `state_dict`. It may be wrapped by DistributedDataParallel: the memory is not broadcast. It
    may be compiled: `torch.compile(model)` makes one graph for the warm-up and one for all that follows. No step waits
    for an accelerator, so values that are not finite are an error a step or so later there, and at once on a CPU.

    Args:
        backbone: any module whose output is its pooled feature, or a `HypercolumnExtractor` of one. It is used in
            place, not copied, and loses its classifier if it is one of torchvision's or timm's: pass
            `copy.deepcopy(backbone)` to keep it.
        layers: dotted names of the hypercolumn's layers, by default `["layer3", "layer4"]`, or of several hypercolumns;
            see `HypercolumnExtractor`, which has them already.
        dim: width of the embeddings, one for all contexts or one for each by name.
        hidden_dim: width inside the heads.
        memory_size: rows of the banks.
        momentum: the teacher's; a float, or a function from the number of updates to it.
        student_temperature: one for all contexts, or one for each by name.
        teacher_temperature: likewise.
        infonce_temperature: of the warm-up's loss.
        warmup_steps: calls of `update` over which InfoNCE fades out; the paper's is 5 epochs' worth.
        pairs: (learner, guide) names; by default each context learns from the other. A context that learns from none
            has InfoNCE alone, and past the warm-up a gradient of zero.
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
        self.relation_loss.check_names(self.student.dims)
        self.infonce_loss = InfoNCELoss(infonce_temperature)
        self.weights = LossWeights(warmup_steps)
        self._warming_up = warmup_steps > 0
        self._finished: list[dict[str, Tensor]] = []  # what the last update was of

    if TYPE_CHECKING:

        def __call__(self, strong: Tensor, weak: Tensor, *local_views: Tensor) -> CGHOutput: ...

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_finished": []}  # a copy is of the method, not of its last batch

    @property
    def steps(self) -> int:
        """Calls of `update` so far, which are the optimiser's steps. Reading it waits for an accelerator."""
        return self._get_count()

    @steps.setter
    def steps(self, steps: int) -> None:
        self._set_count(steps)

    @override
    def _set_count(self, count: int) -> None:
        super()._set_count(count)
        self._warming_up = count < self.weights.warmup_steps

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

        terms = self.relation_loss.terms(student, teacher, self.memory, *extra)
        relation = torch.stack(list(terms.values())).mean()
        # Past the warm-up InfoNCE is not computed: it would cost as much as the relations.
        infonce = relation.new_zeros(())
        if self._warming_up:
            infonce = self.infonce_loss(student, teacher, self.memory)
        weights = self.weights.of(self._count.to(relation.dtype))
        loss = weights.infonce * infonce + 2 * weights.relation * relation
        # DistributedDataParallel waits for a gradient of every parameter, also of those that nothing learns by.
        for name in student.keys() - {learner for learner, _ in terms}:
            loss = loss + 0 * student[name].sum()
        return CGHOutput(loss, infonce, terms, weights, student, teacher)

    @override
    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    @distributed.outside_graphs
    def update(self, *outputs: CGHOutput) -> None:
        """Finish a step of the optimiser, after it: move the teacher, the centres if any, and fill the memory.

        Call it once for each step of the optimiser, with the outputs of all batches whose gradients that step took:
        one, or several where gradients are accumulated. Then the memory gets all of them, and the teacher, the warm-up
        and `steps` count one step, as they would of one batch of that size.

        Raises:
            TypeError: something else than outputs, such as their loss.
            ValueError: no output; an output that has been given before; embeddings that are not finite, or of ranks
                with batches of different sizes. On a CPU nothing has changed by then.
        """
        for output in outputs:
            if not hasattr(output, "teacher"):
                raise TypeError(f"update takes what the model returned; got a {type(output).__name__}.")
        batches = [output.teacher for output in outputs]
        if not batches:
            raise ValueError("update takes the outputs of the batches that the optimiser's step was of; got none.")
        if len({id(batch) for batch in (*batches, *self._finished)}) < len(batches) + len(self._finished):
            raise ValueError(
                "an output was given to update twice; call it once after each step of the optimiser, with the outputs "
                "of that step's batches."
            )
        teacher, student = _joined(batches), _joined([output.student for output in outputs])
        self.memory.check(teacher)
        check_soon(
            {f"{who}[{name!r}]": x for who, z in (("student", student), ("teacher", teacher)) for name, x in z.items()}
        )
        self.teacher.update(self.student)
        if self.relation_loss.centring is not None:
            self.relation_loss.centring.update(teacher, self.memory)
        self.memory.write(teacher)
        self._finished = batches
        self._advance()
        self._warming_up = self._seen < self.weights.warmup_steps


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Embeddings of several batches as of one."""
    if len(batches) == 1:
        return dict(batches[0])
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
