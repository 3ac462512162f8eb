"""Linear evaluation: a new linear layer on a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from cgh.hypercolumn import pooled_output
from cgh.labels import check_tensor, integer_labels, integers
from cgh.schedules import LearningRate
from cgh.wrappers import own_copy


class Classifier(nn.Module):
    """A backbone and a new linear layer on its features: weights from a normal of deviation 0.01, biases zero.

    Args:
        backbone: images `(N, 3, H, W)` -> features `(N, W)`, used in place.
        width: `W`.
        classes: how many.

    Shape:
        images `(N, 3, H, W)` -> logits `(N, classes)`.

    Raises:
        ValueError: at the first images, a backbone that gives no pooled feature, or one of another width.

    Example:
        >>> import torch, cgh
        >>> model = cgh.evaluate.Classifier(cgh.interop.resnet("resnet18"), width=512, classes=10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, classes)` of `images`."""
        features = pooled_output(self.backbone(images), len(images), self.backbone)
        if features.shape[1] != self.classifier.in_features:
            raise ValueError(
                f"the backbone's features are {tuple(features.shape)} and the linear layer reads width "
                f"{self.classifier.in_features}: build it with width={features.shape[1]}."
            )
        logits: Tensor = self.classifier(features)
        return logits


class LinearProbe(Classifier):
    """A `Classifier` whose linear layer alone learns, on a frozen copy of the backbone, in evaluation mode in any case.

    The backbone itself is left as it is, so a probe may be made of one that is still in training.

    Raises:
        TypeError: a backbone that cannot be copied, as `cgh.EMATeacher` has it of a student.

    Example:
        >>> import cgh
        >>> probe = cgh.evaluate.LinearProbe(cgh.interop.resnet("resnet18"), width=512, classes=10).train()
        >>> probe.backbone.training, [name for name, x in probe.named_parameters() if x.requires_grad]
        (False, ['classifier.weight', 'classifier.bias'])
    """

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__(own_copy(backbone).requires_grad_(False), width, classes)
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.backbone.eval()
        return self


def linear_recipe(
    probe: LinearProbe, steps: int, learning_rate: float = 0.3, nesterov: bool = False
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return the protocol's optimiser of the linear layer, and its schedule, to be stepped after every batch.

    SGD with momentum 0.9 and no weight decay; a cosine from `learning_rate` to 0. The paper trains for 100 epochs of
    batches of 256, on random resized crops and flips.

    Args:
        probe: what learns.
        steps: batches in all.
        learning_rate: at the start.
        nesterov: momentum of Nesterov's kind, which the paper does without.

    Example:
        >>> import torch, cgh
        >>> probe = cgh.evaluate.LinearProbe(torch.nn.Identity(), width=2, classes=2)
        >>> optimizer, schedule = cgh.evaluate.linear_recipe(probe, steps=20)
        >>> for _ in range(20):
        ...     loss = torch.nn.functional.cross_entropy(probe(torch.eye(2)), torch.tensor([0, 1]))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     schedule.step()
        >>> cgh.evaluate.accuracy(probe(torch.eye(2)), torch.tensor([0, 1]), k=[1])
        (100.0,)
    """
    optimizer = torch.optim.SGD(probe.classifier.parameters(), lr=learning_rate, momentum=0.9, nesterov=nesterov)
    return optimizer, LearningRate(base=learning_rate, steps=steps).scheduler(optimizer)


def accuracy(logits: Tensor, labels: Tensor, k: Sequence[int] = (1, 5)) -> tuple[float, ...]:
    """Return in how many percent of the rows the true class is among the `k` likeliest, for each `k`.

    Args:
        logits: `(N, classes)`.
        labels: `(N,)`, classes from 0, of any integer type.
        k: a value above the number of classes counts all of them.

    Raises:
        ValueError: shapes that do not fit together, no rows, logits that are NaN, labels outside the classes, or a `k`
            below one.
        TypeError: logits that are no tensor of numbers, or labels or a `k` that are not integers.

    Example:
        >>> import torch, cgh
        >>> cgh.evaluate.accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]), k=[1, 2])
        (50.0, 100.0)
    """
    check_tensor(logits, "logits")
    labels, tops = integer_labels(labels), integers(k, "k")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; they must be (N, classes) and "
            "(N,), and not empty."
        )
    if logits.isnan().any():
        raise ValueError(
            f"logits hold NaN in {int(logits.isnan().any(dim=1).sum())} of {len(logits)} rows; no class is the "
            "likeliest there. Lower the learning rate, or check the features."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; the logits are of classes 0 to "
            f"{logits.shape[1] - 1}."
        )
    if min(tops, default=0) < 1:
        raise ValueError(f"k is {tops}; it is 1 or more.")
    likeliest = logits.topk(min(max(tops), logits.shape[1]), dim=1).indices == labels.to(logits.device)[:, None]
    return tuple(100 * likeliest[:, :top].any(dim=1).double().mean().item() for top in tops)
