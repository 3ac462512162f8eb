"""What `test_kernels.py` runs in a process of its own, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cgh
from cgh import colour_kernels, kernels, streaming, views
from tests.test_streaming import gradients, inputs, mean, readable

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("columns", [1, 128, 333])
def test_exponentiate(dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 128)
    torch.manual_seed(0)
    logits = 20 * torch.randn(4, columns)
    maximum, total = torch.tensor([[-torch.inf], [0.0], [5.0], [50.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])

    def run(step: Callable[..., None], dtype: torch.dtype) -> list[Tensor]:
        state = [maximum.clone(), total.clone(), torch.empty_like(total)]
        weights = torch.empty_like(logits, dtype=dtype)
        step(logits, *state, weights)
        return [*state, weights.float()]

    *state, weights = run(kernels.exponentiate, dtype)
    *expected_state, expected_weights = run(streaming.exponentiate, torch.float32)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(weights, expected_weights, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "backend", lambda x: "triton")
    monkeypatch.setattr(streaming, "BUFFER", {"triton": 1})
    monkeypatch.setattr(streaming, "MIN_CHUNK", 200)
    monkeypatch.setattr(kernels, "BLOCK", 128)


@pytest.mark.usefixtures("triton_backend")
def test_float32_losses() -> None:
    z, t, memory = inputs(dtype=torch.float32, size=501)
    exact = [
        {name: x.detach().double().requires_grad_() for name, x in contexts.items()} for contexts in (z, t, memory)
    ]
    loss, expected = cgh.CrossContextLoss(0.1, 0.05)(z, t, memory), mean(readable(*exact))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, truth in zip(gradients(loss, z), gradients(expected, exact[0]), strict=True):
        assert torch.linalg.norm(found - truth) < 1e-5 * torch.linalg.norm(truth)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_further_from_float64_than_the_readable_version(dtype: torch.dtype) -> None:
    exact_z, exact_t, exact_memory = inputs(batch=16, size=1000)
    expected = mean(readable(exact_z, exact_t, exact_memory))
    z, t, memory = (
        {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (exact_z, exact_t, exact_memory)
    )
    errors = []
    for loss in (cgh.CrossContextLoss(0.1, 0.05)(z, t, memory), mean(readable(z, t, memory))):
        pairs = zip([loss, *gradients(loss, z)], [expected, *gradients(expected, exact_z)], strict=True)
        errors.append([torch.linalg.norm(found - truth).item() for found, truth in pairs])
    assert all(ours <= theirs for ours, theirs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(
    ("blur", "sides", "memory_format"),
    [
        (True, (7, 7), torch.contiguous_format),
        (True, (18, 33), torch.channels_last),
        (False, (33, 18), torch.channels_last),
    ],
)
def test_views(
    blur: bool, sides: tuple[int, int], memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(colour_kernels, "BLOCK", 256)
    strong, weak = torch.randint(256, (2, 6, 3, *sides), dtype=torch.uint8)
    strong = strong.contiguous(memory_format=memory_format)
    augment = views.Augmentation(blur=blur, jitter=(0.9, 0.9, 0.9, 0.4), memory_format=memory_format)
    parameters = augment.draw(6, seed=3)
    for view, rows in ((strong, parameters), (weak.flip(-1), None)):
        plain, fused = augment._plain(view, rows), augment._kernels(view, rows)
        assert fused.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)


def test_views_in_half_precision() -> None:
    strong = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    augment = views.Augmentation(dtype=torch.bfloat16)
    parameters = augment.draw(2, seed=0)
    fused = augment._kernels(strong, parameters)
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused, augment._plain(strong, parameters))
