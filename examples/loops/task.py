"""What the loops beside this file train: a small network on two views of scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
import torchvision.transforms.v2 as T
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet

import cgh

BATCH = 48
STEPS = 8

strong_view = T.Compose([T.RandomResizedCrop(32, scale=(0.4, 1.0)), T.ColorJitter(0.4, 0.4), T.GaussianBlur(3)])
weak_view = T.RandomResizedCrop(32, scale=(0.7, 1.0))


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """A strong and a weak view of every image; which ones, its index alone decides, so every loop sees the same."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return strong_view(self.images[index]), weak_view(self.images[index])


def build() -> tuple[cgh.CGH, torch.optim.Optimizer, DataLoader[tuple[Tensor, Tensor]]]:
    """Return the method, its optimizer and the batches, alike in every call."""
    images = torch.from_numpy(load_digits().images[: BATCH * STEPS]).float().div(16).unsqueeze(1).expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    model = cgh.CGH(
        ResNet(BasicBlock, [1, 1, 1, 1]),
        layers=["layer3", "layer4"],
        dim=64,
        hidden_dim=128,
        memory_size=256,
        warmup_steps=STEPS // 2,
        image_shape=(3, 32, 32),
    )
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, DataLoader(TwoViews(images), BATCH)
