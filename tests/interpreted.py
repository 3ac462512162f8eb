"""What `test_kernels.py` runs in a process of its own, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cgh
from cgh import kernels, streaming
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
