"""CGH in a plain PyTorch loop.

pip install "cgh-ssl[examples]"
python examples/loops/plain.py
"""

from __future__ import annotations

import task


def train() -> list[float]:
    """Return the loss of every step."""
    model, optimizer, loader = task.build()
    losses = []
    for strong, weak in loader:
        output = model(strong, weak)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update(output)  # the teacher follows, the memory fills
        losses.append(output.loss.item())
    return losses


if __name__ == "__main__":
    print(" ".join(f"{loss:.4f}" for loss in train()))
