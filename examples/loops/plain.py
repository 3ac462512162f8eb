"""CGH in a plain PyTorch loop.

pip install "cgh-ssl[examples]"
python examples/loops/plain.py
"""

from __future__ import annotations

import task
import tyro


def train(accumulate: int = 1) -> list[float]:
    """Return the loss of every batch; the gradients of `accumulate` of them make a step."""
    model, optimizer, loader = task.build()
    losses, outputs = [], []
    for strong, weak in loader:
        output = model(strong, weak)
        (output.loss / accumulate).backward()
        outputs.append(output)
        losses.append(output.loss.item())
        if len(outputs) == accumulate:
            optimizer.step()
            optimizer.zero_grad()
            model.update(*outputs)  # the teacher follows, the memory fills
            outputs.clear()
    return losses


if __name__ == "__main__":
    print("loss of each batch:", *(f"{loss:.4f}" for loss in tyro.cli(train)))
