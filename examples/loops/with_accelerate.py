"""The same training in Hugging Face Accelerate.

pip install "cgh-ssl[examples,loops]"
python examples/loops/with_accelerate.py
"""

from __future__ import annotations

import task
from accelerate import Accelerator


def train() -> list[float]:
    """Return the loss of every step."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*task.build())
    losses = []
    for strong, weak in loader:
        output = model(strong, weak)
        optimizer.zero_grad()
        accelerator.backward(output.loss)
        optimizer.step()
        accelerator.unwrap_model(model).update(output)
        losses.append(output.loss.item())
    return losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
