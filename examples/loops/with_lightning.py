"""The same training in Lightning.

pip install "cgh-ssl[examples,loops]"
python examples/loops/with_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning as L  # its documentation's name
import task
import torch
import tyro
from torch import Tensor

import cgh


class LitCGH(L.LightningModule):
    """The method as a LightningModule; its checkpoints hold all of the method's state."""

    def __init__(self, model: cgh.CGH, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.outputs: list[cgh.CGHOutput] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        strong, weak = batch
        output = self.model(strong, weak)
        self.outputs.append(output)
        self.losses.append(output.loss.item())
        return output.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.model.update(*self.outputs)  # of all batches whose gradients the step took
        self.outputs.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def train(accumulate: int = 1) -> list[float]:
    """Return the loss of every batch; the gradients of `accumulate` of them make a step."""
    model, optimizer, loader = task.build()
    module = LitCGH(model, optimizer)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    print("loss of each batch:", *(f"{loss:.4f}" for loss in tyro.cli(train)))
