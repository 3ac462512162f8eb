"""Cross-context learning beside another method's own loss: SimCLR of lightly, with and without it.

pip install "cgh-ssl[examples,loops]"
python examples/with_lightly.py

Prints how well neighbours fit in the features of each, and whether relations stay clear of a collapse.
"""

from __future__ import annotations

import math
import sys

import quickstart
import torch
import tyro
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

import cgh
from cgh.diagnostics import relation_entropy

MEMORY = 1024


def train(epochs: int = 25, plug_in: bool = True) -> tuple[Tensor, float]:
    """Return the features of all digits `(1797, 128)`, and the entropy of their relations in the plug-in's memory."""
    torch.manual_seed(0)
    images, _ = quickstart.digits()
    steps = epochs * quickstart.STEPS

    # SimCLR, as lightly has it.
    features = cgh.HypercolumnExtractor(quickstart.network(), layers=["layer3", "layer4"])
    head = SimCLRProjectionHead(input_dim=128, hidden_dim=128, output_dim=64)
    ntxent = NTXentLoss(temperature=0.5)

    # The plug-in: the same features in two contexts, a teacher and a memory, warmed up as the paper does.
    student = cgh.ContextEncoder(features, dim=64, hidden_dim=256, image_shape=(1, 32, 32))
    teacher = cgh.EMATeacher(student, momentum=0.98)
    memory = cgh.MemoryBank(student.dims, size=MEMORY)
    relations, infonce = cgh.CrossContextLoss(), cgh.InfoNCELoss()
    weights = cgh.LossWeights(warmup_steps=steps // 4)

    optimizer = torch.optim.AdamW(nn.ModuleList([student, head]).parameters(), weight_decay=1e-4)
    schedule = cgh.LearningRate(base=3e-3, steps=steps, warmup_steps=steps // 20)
    torch.manual_seed(0)  # the same views with and without
    for step in range(steps):
        if step % quickstart.STEPS == 0:
            batches = torch.randperm(quickstart.TRAIN).split(quickstart.BATCH)
        batch = images[batches[step % quickstart.STEPS]]
        first, second = quickstart.strong_view(batch), quickstart.weak_view(batch)
        f = features(first)  # one pass for both methods
        loss = ntxent(head(f.pooled), head(features.pooled(second)))
        if plug_in:
            z, t = student.project(f), teacher(second)
            a = weights(step)
            loss = loss + a.infonce * infonce(z, t, memory) + 2 * a.relation * relations(z, t, memory)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if plug_in:
            teacher.update(student)
            memory.enqueue(t)

    student.eval()
    with torch.no_grad():
        f = features(images)
        z = student.project(f)
    return f.pooled, relation_entropy(cgh.RelationMatrix(0.1)(z["global"], memory["global"])).item()


def main(epochs: int = 25) -> dict[str, float]:
    """Print and return the accuracy of 20 neighbours with and without the plug-in."""
    _, labels = quickstart.digits()
    accuracies = {}
    for name, plug_in in (("SimCLR", False), ("SimCLR and relations across contexts", True)):
        features, entropy = train(epochs, plug_in)
        accuracies[name], few = quickstart.accuracies(features, labels)
        print(f"{name}: {accuracies[name]:.1f} % by 20 neighbours, {few:.1f} % with five labels a class")
        if plug_in:
            most = math.log(MEMORY)
            print(f"entropy of the student's relations: {entropy:.2f}; a collapse is at log {MEMORY} = {most:.2f}")
    return accuracies


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except KeyboardInterrupt:
        sys.exit("stopped")
