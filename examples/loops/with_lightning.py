"""The same training in Lightning.

pip install "cgh-ssl[examples,loops]"
python examples/loops/with_lightning.py
"""

from __future__ import annotations

import lightning as L  # its documentation's name
import task
import torch
from torch import Tensor

import cgh


class LitCGH(L.LightningModule):
    """The method as a LightningModule; its checkpoints hold all of the method's state."""

    def __init__(self, model: cgh.CGH, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        strong, weak = batch
        self.output = self.model(strong, weak)
        self.losses.append(self.output.loss.item())
        return self.output.loss

    def on_train_batch_end(self, *_: object) -> None:
        self.model.update(self.output)  # after the optimizer's step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def train() -> list[float]:
    """Return the loss of every step."""
    model, optimizer, loader = task.build()
    module = LitCGH(model, optimizer)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
