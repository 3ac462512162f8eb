"""What the diagnostics look like when training goes well, and when it collapses: two runs on handwritten digits.

pip install "cgh-ssl[examples]"
python examples/diagnostics.py

The network, the views and the optimiser are the quickstart's. One run warms up by InfoNCE; the other begins with
relations at once, towards a teacher that is flatter than the student, and ends where all images relate to all alike.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import quickstart
import torch
import tyro
from torch import Tensor

import cgh
from cgh import diagnostics, plot

EVERY = 5  # steps between two looks
LAST = 20  # looks whose mean is printed


@dataclass
class Config:
    """Draw a healthy run and a collapse."""

    epochs: int = 25
    """Passes over the training images, for each run."""
    out: Path = Path("runs/diagnostics")
    """Where the pictures go."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""


def look(model: cgh.CGH, output: cgh.CGHOutput) -> dict[str, float]:
    """Return the figures of one step."""
    figures = {f"loss/{learner} from {guide}": term for (learner, guide), term in output.terms.items()}
    if output.weights.infonce:
        figures["loss/InfoNCE"] = output.infonce
    loss = model.relation_loss
    relations: dict[tuple[str, str], Tensor] = {}
    for who, contexts, temperature in (
        ("student", output.student, loss.student_temperature),
        ("teacher", output.teacher, loss.teacher_temperature),
    ):
        for name, z in contexts.items():
            tau = temperature[name] if isinstance(temperature, dict) else temperature
            relations[who, name] = cgh.RelationMatrix(tau)(z.detach(), model.memory[name])
            figures[f"entropy/{who}, {name}"] = diagnostics.relation_entropy(relations[who, name])
            if who == "student":
                figures[f"rank/{name}"] = diagnostics.effective_rank(z)
    for learner, guide in output.terms:
        agreement = diagnostics.top_neighbour_agreement(relations["student", learner], relations["teacher", guide])
        figures[f"agreement/{learner} with {guide}"] = agreement
    return {name: torch.as_tensor(figure).item() for name, figure in figures.items()}


def train(model: cgh.CGH, epochs: int) -> dict[str, tuple[list[int], list[float]]]:
    """Train the model as the quickstart does and return its figures by step."""
    images, labels = quickstart.digits()
    steps = epochs * quickstart.STEPS
    schedule = cgh.LearningRate(base=3e-3, steps=steps, warmup_steps=steps // 20)
    optimizer = torch.optim.AdamW(model.student.parameters(), weight_decay=1e-4)
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    torch.manual_seed(0)
    for epoch in range(epochs):
        for batch in torch.randperm(quickstart.TRAIN).split(quickstart.BATCH)[: quickstart.STEPS]:
            optimizer.param_groups[0]["lr"] = schedule(model.steps)
            output = model(quickstart.strong_view(images[batch]), quickstart.weak_view(images[batch]))
            figures = look(model, output) if model.steps % EVERY == 0 else {}
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            model.update(output)
            if model.steps == (epoch + 1) * quickstart.STEPS:
                figures["k-NN, %"] = quickstart.accuracies(quickstart.embed(model, images)[1], labels)[0]
            for name, figure in figures.items():
                curves[name][0].append(int(model.steps))
                curves[name][1].append(figure)
    return dict(curves)


def main(config: Config) -> None:
    """Train both, print the last figures of each, and draw them."""
    base = quickstart.Config(epochs=config.epochs)
    flat = {"student_temperature": 0.1, "teacher_temperature": 0.2}
    models = {"healthy": quickstart.method(base), "collapse": quickstart.method(base, warmup_steps=0, **flat)}
    for name, model in models.items():
        curves = train(model, config.epochs)
        rows = len(model.memory["global"])
        levels = {"entropy": {f"log {rows}": math.log(rows)}}
        plot.save(plot.groups(curves, levels=levels, size=(10.4, 7)), config.out / f"{name}.{config.format}")
        last = {quantity: sum(values[-LAST:]) / len(values[-LAST:]) for quantity, (_, values) in curves.items()}
        print(f"{name}: " + ", ".join(f"{quantity} {value:.2f}" for quantity, value in last.items()))
    print(f"the pictures healthy and collapse are in {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        sys.exit("stopped")
