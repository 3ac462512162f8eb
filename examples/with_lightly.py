"""Cross-context learning beside another method's own loss: SimCLR of lightly, and `CrossContextLoss` as a plug-in.

pip install "cgh-ssl[examples,loops]"
python examples/with_lightly.py
"""

from __future__ import annotations

import torch
import torchvision.transforms.v2 as T
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import cgh

view = T.Compose([T.RandomResizedCrop(32, scale=(0.4, 1.0)), T.ColorJitter(0.4, 0.4)])


def train(steps: int = 40, batch: int = 64) -> list[tuple[float, float]]:
    """Return SimCLR's loss and the relations' loss of every step."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1).expand(-1, 3, -1, -1)

    # SimCLR, as lightly has it.
    features = cgh.HypercolumnExtractor(ResNet(BasicBlock, [1, 1, 1, 1]), layers=["layer3", "layer4"])
    head = SimCLRProjectionHead(input_dim=512, hidden_dim=512, output_dim=64)
    ntxent = NTXentLoss(temperature=0.5)

    # The plug-in: the same features in two contexts, a teacher and a memory.
    student = cgh.ContextEncoder(features, dim=64, hidden_dim=128, image_shape=(3, 32, 32))
    teacher = cgh.EMATeacher(student, momentum=0.99)
    memory = cgh.MemoryBank(student.dims, size=512)
    relations = cgh.CrossContextLoss()

    optimizer = torch.optim.AdamW(nn.ModuleList([student, head]).parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        chosen = images[torch.randperm(len(images))[:batch]]
        first, second = (torch.stack([view(image) for image in chosen]) for _ in range(2))
        f = features(first)  # one pass for both methods
        contrast = ntxent(head(f.pooled), head(features.pooled(second)))
        t = teacher(second)
        relation = relations(student.project(f), t, memory)
        optimizer.zero_grad()
        (contrast + relation).backward()
        optimizer.step()
        teacher.update(student)
        memory.enqueue(t)
        losses.append((contrast.item(), relation.item()))
    return losses


if __name__ == "__main__":
    for step, (contrast, relation) in enumerate(train()):
        print(f"step {step:2}  SimCLR {contrast:.3f}  relations {relation:.3f}")
