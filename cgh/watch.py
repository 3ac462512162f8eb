"""Watching a run of any loop without touching it: neighbours, a linear probe, collapse, and where the figures go."""

from __future__ import annotations

import csv
import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from cgh import diagnostics
from cgh.contexts import Contexts
from cgh.distributed import gather, mean, rank_and_world_size, send
from cgh.evaluate import extract_features, knn
from cgh.extras import require
from cgh.interop.backbone import find_backbone
from cgh.labels import integer_labels
from cgh.method import CGH, CGHOutput
from cgh.relation import RelationMatrix
from cgh.wrappers import unwrap

COLLAPSED = 0.25  # of the highest effective rank so far
LEAST_RANK = 1.5  # one direction, up to noise
IMAGES = 64  # whose relations are looked at


class Logger(Protocol):
    """Anything that takes figures by name."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""


class Watch:
    """What a run is like while it runs: call it once a step, with what the step has anyway.

    It draws nothing from the generators that the run draws from, and gives nothing a gradient: a run that is watched
    ends with the bits of one that is not.

    | figure | is |
    | --- | --- |
    | `loss/*` | the losses of a `cgh.CGHOutput` |
    | `rank/student_CONTEXT`, `rank/teacher_CONTEXT` | effective rank of the embeddings of a batch, over all ranks |
    | `entropy/student_CONTEXT`, `entropy/teacher_CONTEXT` | of a `cgh.CGH`'s relations, where they have a temperature |
    | `probe/loss`, `probe/top1` | of the linear probe before it learns, the mean over labelled images since the last |
    | `knn/top1`, `knn/top5` | of nearest neighbours by the frozen backbone |

    A warning says once that the student's embeddings collapse: that their effective rank is below a quarter of the
    highest so far, or that of one direction.

    Args:
        model: a `cgh.CGH`, a `ContextEncoder`, or any backbone, also when wrapped.
        loggers: each is told the figures, on rank 0.
        every: steps from one look to the next.
        probe: learns from the backbone's features of every batch, where labels are given. They are seen by a hook, so
            build this before compiling the model: those of the strong view in the last call of a `cgh.CGH`, and in a
            loop of your own those of the backbone's last pass with gradient of as many images as there are labels.
            So call this after each batch that has labels, before the next one goes through the model.
        train: labelled images, as they are evaluated, whose neighbours vote.
        test: labelled images to be classified by them.
        neighbours_every: steps from one classification by neighbours to the next.
        k: neighbours that vote.
        batch_size: images at a time, for the neighbours.

    Raises:
        TypeError: a logger without `log`.
        ValueError: `every`, `neighbours_every` or `k` below 1, or one of `train` and `test` without the other.

    Example:
        >>> import torch, cgh
        >>> model = cgh.CGH(cgh.interop.build_backbone("resnet18"), dim=8, hidden_dim=16, memory_size=32)
        >>> watch = cgh.watch.Watch(model, every=1, probe=cgh.watch.OnlineProbe(width=512, classes=4))
        >>> output = model(*torch.randn(2, 8, 3, 32, 32))
        >>> sorted(watch(1, output, torch.arange(8) % 4))[:3]
        ['entropy/student_global', 'entropy/student_hypercolumn', 'entropy/teacher_global']
    """

    def __init__(
        self,
        model: nn.Module,
        loggers: Sequence[Logger] = (),
        every: int = 50,
        probe: OnlineProbe | None = None,
        train: Dataset[tuple[Tensor, Any]] | None = None,
        test: Dataset[tuple[Tensor, Any]] | None = None,
        neighbours_every: int = 1000,
        k: int = 20,
        batch_size: int = 256,
    ) -> None:
        if min(every, neighbours_every, k) < 1:
            raise ValueError(f"every is {every}, neighbours_every {neighbours_every} and k {k}; each is at least 1.")
        if (train is None) != (test is None):
            raise ValueError("neighbours need both train, whose labels vote, and test, which is classified.")
        for logger in loggers if isinstance(loggers, (list, tuple)) else [loggers]:
            if isinstance(logger, type) or not callable(getattr(logger, "log", None)):
                raise TypeError(
                    f"a logger is {logger!r:.80}; each has a method log(step, figures), as cgh.watch.CSV(path) has."
                )
        if not isinstance(loggers, (list, tuple)):
            raise TypeError(f"loggers are a {type(loggers).__name__}; pass a list of them, such as loggers=[logger].")
        self.model, self.loggers, self.every, self.probe = unwrap(model), list(loggers), every, probe
        self.train, self.test, self.neighbours_every, self.k = train, test, neighbours_every, k
        self.batch_size = batch_size
        self.backbone = find_backbone(self.model)
        self._seen = _Seen()
        if probe is not None:
            self.backbone.register_forward_hook(self._seen)
            for part in self.model.modules():
                if isinstance(part, CGH):
                    part.register_forward_pre_hook(self._seen.begin)
        self._probed: list[Tensor] = []  # of every batch since the last look: sums of loss and hits, and images
        self._highest: dict[str, float] = {}
        self._warned = False
        self._step = 0  # the last one that was looked at

    @override
    def __repr__(self) -> str:
        names = [type(logger).__name__ for logger in self.loggers]
        neighbours = f", neighbours_every={self.neighbours_every}, k={self.k}" if self.train is not None else ""
        return (
            f"Watch({type(self.model).__name__}, loggers={names}, every={self.every}, probe={self.probe}{neighbours})"
        )

    def __call__(
        self,
        step: int,
        output: CGHOutput | Contexts,
        labels: Tensor | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Look at a step before the memory takes its batch in; return the figures, if it was time for any.

        Args:
            step: counted from 1; of several calls with one step, as for the parts of a batch whose gradients are
                accumulated, the first looks, and the probe learns in each.
            output: of a `cgh.CGH`, or the student's embeddings by context.
            labels: classes `(N,)` of the images, for the probe; -1 of those that have none.
            figures: of the loop's own, such as its learning rate, to be logged too.
        """
        if self.probe is not None and labels is not None:
            labels = integer_labels(labels)
            self._probed.append(self.probe._learn(self._seen.of(labels.numel()), labels))
        self._seen.clear()
        found: dict[str, float] = {}
        new, self._step = step != self._step, step
        if new and step % self.every == 0:
            found |= dict(figures or {}) | self._look(output)
        if new and self.train is not None and self.test is not None and step % self.neighbours_every == 0:
            found |= self._neighbours(self.train, self.test)
        if found and rank_and_world_size()[0] == 0:
            for logger in self.loggers:
                logger.log(step, found)
        return found

    @torch.no_grad()
    def _look(self, output: CGHOutput | Contexts) -> dict[str, float]:
        figures: dict[str, Tensor] = {}
        if isinstance(output, CGHOutput):
            names = {f"loss/{learner}_from_{guide}": term for (learner, guide), term in output.terms.items()}
            losses = {"loss/total": output.loss, **names}
            if output.weights.infonce:
                losses["loss/infonce"] = output.infonce
            figures |= {name: mean(loss.detach()) for name, loss in losses.items()}
            embeddings = {"student": output.student, "teacher": output.teacher}
        elif not isinstance(output, Mapping):
            raise TypeError(
                f"the output is a {type(output).__name__}; pass what the CGH returned, or the student's embeddings by "
                'context, such as {"global": z}.'
            )
        else:
            embeddings = {"student": dict(output)}
        for who, contexts in embeddings.items():
            for context, z in contexts.items():
                figures[f"rank/{who}_{context}"] = diagnostics.effective_rank(gather(z.detach()))
                if isinstance(self.model, CGH):
                    relations = _relations(self.model, who, context, z[:IMAGES].detach())
                    if relations is not None:
                        figures[f"entropy/{who}_{context}"] = mean(diagnostics.relation_entropy(relations))
        if self._probed:
            loss, hits, images = mean(torch.stack(self._probed).sum(0))
            if images > 0:  # over all ranks
                figures["probe/loss"], figures["probe/top1"] = loss / images, 100 * hits / images
            self._probed.clear()
        found = {name: figure.item() for name, figure in figures.items()}
        self._warn_of_collapse({name: value for name, value in found.items() if name.startswith("rank/student")})
        return found

    def _warn_of_collapse(self, ranks: Mapping[str, float]) -> None:
        for name, rank in ranks.items():
            highest = self._highest[name] = max(rank, self._highest.get(name, 0.0))
            if rank < max(LEAST_RANK, COLLAPSED * highest) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the embeddings collapse: {name} is {rank:.1f}, and was {highest:.1f} at most. Lower the learning "
                    "rate, warm up longer with InfoNCE, or check that views, batch norm and temperatures are as meant.",
                    stacklevel=4,
                )

    def _neighbours(self, train: Dataset[tuple[Tensor, Any]], test: Dataset[tuple[Tensor, Any]]) -> dict[str, float]:
        device = next(self.backbone.parameters()).device
        modes = {module: module.training for module in self.backbone.modules()}
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            voters, asked = (extract_features(self.backbone, x, self.batch_size, device=device) for x in (train, test))
        for module, training in modes.items():
            module.training = training
        if rank_and_world_size()[0]:
            return {}
        k = min(self.k, len(voters.features))
        top1, top5 = knn(*voters, *asked, k=k)[k]
        return {"knn/top1": top1, "knn/top5": top5}


class OnlineProbe:
    """A linear classifier that learns beside a run, from features that it takes no gradient to.

    Its accuracy is that of batches that it has not learned from yet. Over several ranks each has a probe of its own.

    Args:
        width: of the features.
        classes: how many.
        learning_rate: of SGD with momentum 0.9, on features scaled to unit variance by batch norm without parameters.
        device: where the features are.

    Raises:
        TypeError: on `learn`, labels that are no integers.
        ValueError: a width below 1 or classes below 2; on `learn`, features of another width, or labels outside the
            classes.

    Example:
        >>> import torch, cgh
        >>> probe = cgh.watch.OnlineProbe(width=2, classes=2)
        >>> features, labels = torch.eye(2).repeat(4, 1), torch.arange(2).repeat(4)
        >>> for _ in range(20):
        ...     loss, top1 = probe.learn(features, labels)
        >>> top1
        tensor(100.)
    """

    def __init__(
        self, width: int, classes: int, learning_rate: float = 0.03, device: str | torch.device = "cpu"
    ) -> None:
        if width < 1 or classes < 2:
            raise ValueError(f"width is {width} and classes {classes}; they are 1 and 2 at least.")
        self.width, self.classes = width, classes
        self.norm = nn.BatchNorm1d(width, affine=False, device=device)
        self.weight = torch.zeros(classes, width, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weight, self.bias], lr=learning_rate, momentum=0.9)

    @override
    def __repr__(self) -> str:
        return f"OnlineProbe(width={self.width}, classes={self.classes})"

    def learn(self, features: Tensor, labels: Tensor) -> Tensor:
        """Take one step; return the loss and the accuracy in percent from before it, `(2,)`: NaN where nothing counts.

        Left out are images whose features, or their squares, are not finite, and whole batches with fewer than two
        others: a single image has no variance to be scaled by.

        Args:
            features: `(N, W)`.
            labels: `(N,)`, of any integer type; images below 0 are left out.
        """
        loss, hits, images = self._learn(features, labels).unbind()
        return torch.stack([loss / images, 100 * hits / images])

    def _learn(self, features: Tensor, labels: Tensor) -> Tensor:
        """As `learn`, but return the sum of the losses, the hits and the images that count, `(3,)`."""
        labels = integer_labels(labels)
        if features.ndim != 2 or features.shape[1] != self.width or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}; this probe learns from "
                f"(N, {self.width}) and (N,): build OnlineProbe(width={features.shape[-1]}, ...)."
            )
        if labels.device.type == "cpu" and labels.numel() and labels.max() >= self.classes:
            raise ValueError(f"a label is {int(labels.max())}; the probe has classes 0 to {self.classes - 1}.")
        if len(features) < 2:
            return self.bias.new_zeros(3)
        x = features.detach().float()
        finite = (len(x) * x.square()).sum(1).isfinite()  # and so is the variance
        images = finite.sum()
        # At the others' mean an image moves nothing but the variance, which is then scaled back.
        x = torch.where(finite[:, None], x, 0)
        x = torch.where(finite[:, None], x, x.sum(0) / images.clamp(min=1))
        labels = torch.where(finite & (images > 1), send(labels, x.device).clamp(min=-1), -1)
        known = (labels >= 0).sum()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            logits = F.linear(self.norm(x) * (images / len(x)).sqrt(), self.weight, self.bias)
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            self.weight.grad, self.bias.grad = torch.autograd.grad(loss / known.clamp(min=1), [self.weight, self.bias])
        self.optimizer.step()
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum(), known])


class CSV:
    """A file of rows step, figure, value, which reads back equal; a run that goes on appends to it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.write_text("step,figure,value\n")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                (step, name, int(value) if isinstance(value, numbers.Integral) else float(value))
                for name, value in figures.items()
            )


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require("tensorboard", extra="watch")
        self.writer = require("torch.utils.tensorboard", extra="watch").SummaryWriter(str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WandB:
    """A run of Weights and Biases; the options are those of `wandb.init`, such as `project` and `mode="offline"`."""

    def __init__(self, **options: Any) -> None:
        self.run = require("wandb", extra="watch").init(**options)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)


class MLflow:
    """A run of MLflow.

    Args:
        experiment: its name.
        uri: of the tracking server, or a folder or database; by default what MLflow is set to.
    """

    def __init__(self, experiment: str, uri: str | os.PathLike[str] | None = None) -> None:
        client = require("mlflow", extra="watch").MlflowClient(None if uri is None else os.fspath(uri))
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        self.client, self.run = client, client.create_run(number).info.run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.run, name, value, step=step)


def lightning_callback(watch: Watch, look: Callable[[Any, Any], tuple[CGHOutput | Contexts, Tensor | None]]) -> Any:
    """Return a callback of Lightning that calls `watch` after every batch, before the module's own hook does.

    Args:
        watch: the watch.
        look: module and batch -> what `watch` takes: the output or embeddings, and the labels or None.
    """
    base = require("lightning.pytorch.callbacks", extra="loops").Callback

    def on_train_batch_end(
        callback: object, trainer: Any, module: Any, outputs: object, batch: object, batch_idx: int
    ) -> None:
        watch(trainer.global_step, *look(module, batch))

    return type("WatchCallback", (base,), {"on_train_batch_end": on_train_batch_end})()


class _Seen:
    """A forward hook that keeps features of passes with gradient: an object, so that it copies and pickles.

    Of passes of as many images it keeps the last, as earlier ones may be of a step that was skipped; but of those in
    one call of a `cgh.CGH` the first, which is of the strong view, as later ones are of multi-crop's.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.features: list[Tensor] = []  # of every number of images
        self.in_method = False

    def begin(self, module: nn.Module, args: object) -> None:
        """Forget what a `cgh.CGH` gave before; a hook of it."""
        if torch.is_grad_enabled():
            self.features, self.in_method = [], True

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        pooled = getattr(output, "pooler_output", output)
        if not (torch.is_grad_enabled() and isinstance(pooled, Tensor)):
            return
        others = [x for x in self.features if len(x) != len(pooled)]
        if not self.in_method or len(others) == len(self.features):
            self.features = [*others, pooled.detach().flatten(1)]

    def of(self, images: int) -> Tensor:
        """Return the features of as many images.

        Raises:
            ValueError: there are none.
        """
        for x in self.features:
            if len(x) == images:
                return x
        raise ValueError(
            f"there are {images} labels, and features of {[len(x) for x in self.features]} images, which the backbone "
            "gave with gradient since the last step; call the model first, and label each image, or give it -1."
        )


def _relations(model: CGH, who: str, context: str, z: Tensor) -> Tensor | None:
    """The relations that the loss of `model` compares, or None where it has no temperature for them."""
    loss = model.relation_loss
    temperature = loss.student_temperature if who == "student" else loss.teacher_temperature
    if isinstance(temperature, Mapping):
        if context not in temperature:
            return None
        temperature = temperature[context]
    centre = loss.centring[context] if who == "teacher" and loss.centring is not None else 0.0
    relations: Tensor = RelationMatrix(temperature)(z, model.memory[context], centre)
    return relations
