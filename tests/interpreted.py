"""What `test_kernels.py` runs in a process of its own, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from typing_extensions import override

import cgh
from cgh import colour_kernels, colours, crop_kernels, kept, kernels, streaming, views
from cgh.relation import infonce_term
from cgh.streaming import Query
from tests.test_streaming import gradients, inputs, mean, readable

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("columns", [1, 128, 333])
def test_exponentiate(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 128)
    torch.manual_seed(0)
    logits = 20 * torch.randn(4, columns)
    maximum, total = torch.tensor([[-torch.inf], [0.0], [5.0], [50.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])

    def run(step: Callable[..., None]) -> list[Tensor]:
        state = [logits.clone(), maximum.clone(), total.clone(), torch.empty_like(total)]
        step(*state)
        return state

    torch.testing.assert_close(run(kernels.exponentiate), run(streaming.exponentiate))


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "backend", lambda x: "triton")
    monkeypatch.setattr(kept, "LIMIT", 0)
    monkeypatch.setattr(streaming, "BUFFER", {"cpu": 1})
    monkeypatch.setattr(streaming, "MIN_CHUNK", 200)
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr(kernels, "limits", lambda x: kernels.Limits(99 * 1024, 6))


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as integers, would multiply those, and cuts off where a GPU rounds."""
    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self: InterpreterBuilder, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
    )


def unit(count: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(count, dim), dim=1)


@pytest.mark.parametrize(
    ("rows", "size", "dim", "target_dim", "bank_dtype", "centred"),
    [
        (20, 300, 33, 33, torch.float32, True),
        (70, 200, 65, 12, torch.bfloat16, False),
        (5, 90, 128, 128, torch.float16, True),
        (3, 7, 8, 40, torch.float32, False),
        (17, 150, 512, 512, torch.bfloat16, False),
        (17, 70, 500, 300, torch.float32, True),
    ],
)
@pytest.mark.parametrize("products", HALF)
def test_a_relation_is_that_of_the_whole_matrix(
    rows: int, size: int, dim: int, target_dim: int, bank_dtype: torch.dtype, centred: bool, products: torch.dtype
) -> None:
    torch.manual_seed(0)
    z = unit(rows, dim)
    bank, target = (unit(size, width).to(bank_dtype) for width in (dim, target_dim))
    centre = torch.randn(size) / 4 if centred else None
    logits = z.to(products).double() @ bank.to(products).double().T / 0.05
    if centre is not None:
        logits -= centre / 0.05
    for wanted in (target, bank):
        query = Query(z.to(products), "global", 0.05, centre)
        logsumexp, mean = together(kernels.relate(query, bank, wanted))
        torch.testing.assert_close(logsumexp, logits.logsumexp(1), rtol=1e-5, atol=1e-4)
        expected = logits.softmax(1) @ wanted.to(products).double()
        assert torch.linalg.norm(mean - expected) < 5e-3 * torch.linalg.norm(expected)


def together(sums: kernels.Sums) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, and its mean row."""
    maximum, total, added = (x.double() * factor for x, factor in zip(sums, (math.log(2), 1, 1), strict=True))
    logsumexp = (maximum + total.log()).logsumexp(0)
    return logsumexp, torch.sum(added * torch.exp(maximum - logsumexp).unsqueeze(2), dim=0)


def test_logits_that_grow_along_the_bank() -> None:
    torch.manual_seed(0)
    z = unit(4, 32).bfloat16()
    bank = (unit(400, 32) * torch.logspace(-2, 2, 400).unsqueeze(1)).bfloat16()
    logits = 16 * z.double() @ bank.double().T
    logsumexp, _ = together(kernels.relate(Query(z, "global", 1 / 16), bank, bank))
    torch.testing.assert_close(logsumexp, logits.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_what_the_kernel_does_not_take_is_computed_in_chunks(
    criterion: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, t, memory = inputs(dtype=torch.bfloat16, size=501)
    fused = criterion(z, t, memory)
    query = Query(z["global"], "global", 0.1)
    with pytest.raises(kernels.TooLargeError):
        kernels.relate(query, memory["global"].double(), memory["global"].double())
    monkeypatch.setattr(kernels, "tilings", lambda *_: [])
    with pytest.raises(kernels.TooLargeError):
        kernels.relate(query, memory["global"], memory["global"])
    torch.testing.assert_close(criterion(z, t, memory), fused, rtol=1e-2, atol=0)


class Launches(TorchDispatchMode):
    """The names of what a GPU would launch, of which our kernels are not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names = list[str]()
        for name in ("_relate", "_cross_entropy", "_infonce"):
            monkeypatch.setattr(kernels, name, defaultdict(lambda name=name: partial(self.launch, name)))

    def launch(self, name: str, *_: object, **__: object) -> None:
        self.names.append(name)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("alias", "detach", "expand", "new_empty", "unbind", "view"):
            self.names.append(name)
        return func(*args, **kwargs or {})


def test_a_step_launches_a_handful_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither looks at what is on a GPU.
    monkeypatch.setattr("cgh.losses.are_finite", lambda _: True)
    monkeypatch.setattr("cgh.losses.check_values", lambda *_: None)
    monkeypatch.setattr("cgh.terms._products", lambda _: torch.bfloat16)
    z, t, memory = inputs(dtype=torch.float32, size=2000)
    with Launches(monkeypatch) as launched:
        torch.autograd.grad(cgh.CrossContextLoss()(z, t, memory), list(z.values()))
    assert launched.names == [
        "_foreach_copy_",
        *["_relate", "_relate", "_cross_entropy"] * 2,
        *("mean", "mean", "add", "div"),
        *("ones_like", "div", "mul", "mul"),
    ]
    launched.names.clear()
    with launched:
        torch.autograd.grad(cgh.InfoNCELoss()(z, t, memory), list(z.values()))
    assert launched.names == [
        "_foreach_copy_",
        *["_relate", "_infonce"] * 2,
        *("mean", "mean", "add"),
        *("ones_like", "mul", "mul"),
    ]


@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_transforms_and_compilation(criterion: torch.nn.Module) -> None:
    z, t, memory = inputs(dtype=torch.bfloat16, size=300)
    expected = gradients(criterion(z, t, memory), z)
    rows = {name: x.detach() for name, x in z.items()}
    found = torch.func.grad(lambda z: criterion(z, t, memory))(rows)
    torch.testing.assert_close(list(found.values()), expected)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled(z, t, memory), z), expected)


def test_float32_losses() -> None:
    z, t, memory = inputs(dtype=torch.float32, size=501)
    exact = [
        {name: x.detach().double().requires_grad_() for name, x in contexts.items()} for contexts in (z, t, memory)
    ]
    loss, expected = cgh.CrossContextLoss(0.1, 0.05)(z, t, memory), mean(readable(*exact))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, truth in zip(gradients(loss, z), gradients(expected, exact[0]), strict=True):
        assert torch.linalg.norm(found - truth) < 1e-5 * torch.linalg.norm(truth)


def no_further(
    ours: Tensor, theirs: Tensor, expected: Tensor, z: dict[str, Tensor], exact_z: dict[str, Tensor]
) -> None:
    """Check that `ours` and its gradients are hardly further from `expected` than `theirs`."""
    truth = [expected, *gradients(expected, exact_z)]
    errors = [
        [
            torch.linalg.norm(found.double() - exact).item()
            for found, exact in zip([loss, *gradients(loss, z)], truth, strict=True)
        ]
        for loss in (ours, theirs)
    ]
    assert all(mine <= 1.1 * other for mine, other in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_further_from_float64_than_the_readable_version(dtype: torch.dtype) -> None:
    exact_z, exact_t, exact_memory = inputs(batch=16, size=1000)
    z, t, memory = (
        {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (exact_z, exact_t, exact_memory)
    )
    no_further(
        cgh.CrossContextLoss(0.1, 0.05)(z, t, memory),
        mean(readable(z, t, memory)),
        mean(readable(exact_z, exact_t, exact_memory)),
        z,
        exact_z,
    )
    ours, theirs, expected = (
        loss
        for loss in (
            cgh.InfoNCELoss(0.2)(z, t, memory),
            torch.stack([infonce_term(z[name], t[name], memory[name], 0.2) for name in z]).sum(),
            torch.stack([infonce_term(exact_z[n], exact_t[n], exact_memory[n], 0.2) for n in z]).sum(),
        )
    )
    no_further(ours, theirs, expected, z, exact_z)


@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
@pytest.mark.parametrize("dtype", HALF)
def test_banks_in_the_dtype_of_the_products_give_the_same_bits(criterion: torch.nn.Module, dtype: torch.dtype) -> None:
    z, t, memory = inputs(batch=8, size=300, dtype=dtype, bank_dtype=torch.float32)
    rounded = {name: bank.to(dtype) for name, bank in memory.items()}
    loss, expected = criterion(z, t, rounded), criterion(z, t, memory)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients(loss, z), gradients(expected, z)))


@pytest.mark.parametrize("sign", [1, -1])
def test_infonce_of_a_positive_that_is_sure(sign: int) -> None:
    """Of which almost nothing is left of the loss, or of the softmax."""
    z, _, memory = inputs(batch=16, size=50, dtype=torch.bfloat16)
    t = {name: sign * x.detach() for name, x in z.items()}
    exact_z, exact_t, exact_memory = (
        {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (z, t, memory)
    )
    loss = cgh.InfoNCELoss(0.03)(z, t, memory)
    expected = torch.stack([infonce_term(exact_z[n], exact_t[n], exact_memory[n], 0.03) for n in z]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for found, truth in zip(gradients(loss, z), gradients(expected, exact_z), strict=True):
        assert torch.linalg.norm(found - truth) <= 1e-2 * torch.linalg.norm(truth)


def test_half_precision_with_local_views_centring_and_more_pairs() -> None:
    exact_z, exact_t, exact_memory = inputs(("global", "hypercolumn", "third"), batch=16, size=700)
    exact_view = {"global": inputs(batch=16, seed=1)[0]["global"]}
    pairs = [("global", "global"), ("global", "hypercolumn"), ("third", "hypercolumn")]
    centring = cgh.Centring(exact_memory, 700).double()
    centring.update(exact_t, exact_memory)
    expected = mean(readable(exact_z, exact_t, exact_memory, exact_view, pairs=pairs, centring=centring))
    z, t, memory, view = (
        {name: x.detach().bfloat16().requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (exact_z, exact_t, exact_memory, exact_view)
    )
    loss = cgh.CrossContextLoss(0.1, 0.05, pairs, centring.float())(z, t, memory, view)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for found, truth in zip(gradients(loss, z, view), gradients(expected, exact_z, exact_view), strict=True):
        assert torch.linalg.norm(found - truth) <= 2e-2 * torch.linalg.norm(truth)


def test_the_parameters_of_the_colours() -> None:
    uniform = colours.draw(200, torch.Generator().manual_seed(0))
    for jitter in (views.JITTER, (0.9, 0.0, 1.5, 0.5)):
        expected = colours.Draws(uniform, jitter).parameters()
        torch.testing.assert_close(colour_kernels.parameters_of(uniform, jitter), expected, rtol=1e-5, atol=1e-6)


def images(*shape: int) -> Tensor:
    torch.manual_seed(0)
    coarse = torch.rand(shape[0], 3, 6, 6)
    return F.interpolate(coarse, shape[1:], mode="bilinear").mul(255).to(torch.uint8)


@pytest.mark.parametrize("shape", [(6, 40, 40), (5, 20, 33)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_colours_and_blur(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    batch = [images(*shape), images(*shape).flip(3).contiguous(memory_format=torch.channels_last)]
    augment = views.Augmentation(jitter=(0.9, 0.9, 0.9, 0.4), memory_format=memory_format)
    uniform = augment.draw(shape[0], seed=1)
    for view, drawn, expected in zip(batch, (uniform, None), augment.transform(batch, uniform), strict=True):
        output = torch.empty_like(expected, memory_format=memory_format)
        colour_kernels.augment(view, drawn, augment.jitter, True, augment.mean, augment.std, output)
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [((8, 40, 40), 32, (0.2, 1.0)), ((5, 33, 70), 17, (0.05, 0.4)), ((3, 20, 90), 16, (0.9, 1.0))],
)
def test_crops(shape: tuple[int, ...], size: int, scale: tuple[float, float]) -> None:
    batch, crops = images(*shape), views.BatchCrops(size, scale)
    uniform = crops.draw(batch.shape, seed=3)
    strided = batch.contiguous(memory_format=torch.channels_last)
    found = crop_kernels.crop(strided, uniform, size, scale, views.RATIO)
    for view, expected in zip(found, crops.transform(batch, uniform), strict=True):
        assert (view.int() - expected.int()).abs().max() <= 1
        assert (view != expected).float().mean() < 0.05  # halves, which are rounded up
