"""The same training in Hugging Face Accelerate.

pip install "cgh-ssl[examples,loops]"
python examples/loops/with_accelerate.py
"""

from __future__ import annotations

import task
import tyro
from accelerate import Accelerator


def train(accumulate: int = 1) -> list[float]:
    """Return the loss of every batch; the gradients of `accumulate` of them make a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = accelerator.prepare(*task.build())
    losses, outputs = [], []
    for strong, weak in loader:
        with accelerator.accumulate(model):
            output = model(strong, weak)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(output)
        losses.append(output.loss.item())
        if accelerator.sync_gradients:
            accelerator.unwrap_model(model).update(*outputs)
            outputs.clear()
    return losses


if __name__ == "__main__":
    print("loss of each batch:", *(f"{loss:.4f}" for loss in tyro.cli(train)))
