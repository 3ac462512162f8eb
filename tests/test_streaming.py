"""The losses that stream over the memory are the equations that keep the relation matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgh
from cgh import kept, streaming
from cgh.relation import cross_context_term, infonce_term

DIMS = {"global": 12, "hypercolumn": 7, "third": 5}
Inputs = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(params=[7, 1024, None], ids=["many chunks", "one chunk", "kept"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a bank read at a time; None holds the relations, where they are few."""
    monkeypatch.setattr(streaming, "BUFFER", {"cpu": 1})
    if request.param:
        monkeypatch.setattr(kept, "LIMIT", 0)
        monkeypatch.setattr(streaming, "MIN_CHUNK", request.param)


def inputs(
    names: Sequence[str] = ("global", "hypercolumn"),
    size: int = 101,
    batch: int = 6,
    norm: float = 1.0,
    dtype: torch.dtype = torch.float64,
    bank_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Student, teacher and memory with rows of length `norm` (the memory's: 1), the teacher near the student."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, dim: int) -> Tensor:
        return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)

    z = {name: (norm * rows(batch, DIMS[name])).to(dtype).requires_grad_() for name in names}
    t = {name: norm * F.normalize(z[name].detach() + 0.3 * rows(batch, DIMS[name]).to(dtype), dim=1) for name in names}
    memory = {name: rows(size, DIMS[name]).to(bank_dtype or dtype) for name in names}
    return z, t, memory


def readable(
    z: dict[str, Tensor],
    t: dict[str, Tensor],
    memory: dict[str, Tensor],
    *local_views: dict[str, Tensor],
    pairs: Sequence[tuple[str, str]] = (("global", "hypercolumn"), ("hypercolumn", "global")),
    centring: cgh.Centring | None = None,
) -> dict[tuple[str, str], Tensor]:
    """The terms, with every relation matrix kept."""
    return {
        (learner, guide): torch.stack(
            [
                cross_context_term(
                    view[learner], t[guide], memory[learner], memory[guide], 0.1, 0.05,
                    0.0 if centring is None else centring[guide],
                )
                for view in (z, *local_views)
                if learner in view
            ]
        ).mean()
        for learner, guide in pairs
    }  # fmt: skip


def gradients(loss: Tensor, *contexts: dict[str, Tensor]) -> list[Tensor]:
    rows = [x for view in contexts for x in view.values()]
    return list(torch.autograd.grad(loss, rows, retain_graph=True, materialize_grads=True))


def mean(terms: dict[tuple[str, str], Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).mean()


CASES = {
    "two contexts": {},
    "three contexts": {"names": ("global", "hypercolumn", "third")},
    "self pair": {"pairs": [("global", "global")]},
    "one learner, two guides": {"pairs": [("global", "global"), ("global", "hypercolumn")]},
    "two learners, one guide": {"pairs": [("global", "global"), ("hypercolumn", "global")]},
}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("norm", [1.0, 300.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_terms_and_gradients_are_the_readable_ones(case: dict[str, list[tuple[str, str]]], norm: float) -> None:
    z, t, memory = inputs(case.get("names", ("global", "hypercolumn")), norm=norm)
    pairs = case.get("pairs", list(permutations(z, 2)))
    terms = cgh.CrossContextLoss(0.1, 0.05, case.get("pairs")).terms(z, t, memory)
    expected = readable(z, t, memory, pairs=pairs)
    assert list(terms) == list(expected)
    for pair in expected:
        torch.testing.assert_close(terms[pair], expected[pair], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(terms[pair], z), gradients(expected[pair], z), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("chunk")
def test_local_views_and_centring() -> None:
    z, t, memory = inputs()
    views = [{"global": inputs(seed=seed)[0]["global"]} for seed in (1, 2)]
    centring = cgh.Centring(memory, 101).double()
    centring.update(t, memory)
    total = cgh.CrossContextLoss(0.1, 0.05, centring=centring)(z, t, memory, *views)
    expected = mean(readable(z, t, memory, *views, centring=centring))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(total, z, *views), gradients(expected, z, *views), rtol=1e-11, atol=1e-12)
    assert not torch.isclose(total, cgh.CrossContextLoss(0.1, 0.05)(z, t, memory, *views))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("norm", [1.0, 300.0])
def test_infonce(norm: float) -> None:
    z, t, memory = inputs(norm=norm)
    total = cgh.InfoNCELoss(0.2)(z, t, memory)
    expected = torch.stack([infonce_term(z[name], t[name], memory[name], 0.2) for name in z]).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(total, z), gradients(expected, z), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_gradcheck(criterion: nn.Module) -> None:
    z, t, memory = inputs(batch=3, size=20)
    assert torch.autograd.gradcheck(
        lambda *rows: criterion(dict(zip(z, rows, strict=True)), t, memory), tuple(z.values())
    )


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_within_1e_5_of_float64(bank_dtype: torch.dtype) -> None:
    z, t, memory = inputs(dtype=torch.float32, bank_dtype=bank_dtype, batch=16, size=997)
    total = cgh.CrossContextLoss(0.1, 0.05)(z, t, memory)
    exact_z, exact_t, exact_memory = (
        {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (z, t, memory)
    )
    expected = mean(readable(exact_z, exact_t, exact_memory))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, exact in zip(gradients(total, z), gradients(expected, exact_z), strict=True):
        assert torch.linalg.norm(ours - exact) < 1e-5 * torch.linalg.norm(exact)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_no_further_from_float64_than_the_readable_version(autocast: bool) -> None:
    exact_z, t, memory = inputs(batch=32, size=4096)
    expected = mean(readable(exact_z, t, memory))
    expected_gradients = gradients(expected, exact_z)
    dtype = torch.float32 if autocast else torch.bfloat16
    z, t, memory = (
        {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in contexts.items()}
        for contexts in (exact_z, t, memory)
    )

    def errors(loss: Callable[..., Tensor]) -> list[float]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(z, t, memory)
        return [
            abs(value.item() - expected.item()),
            *(
                float(torch.linalg.norm(ours - exact))
                for ours, exact in zip(gradients(value, z), expected_gradients, strict=True)
            ),
        ]

    ours = errors(cgh.CrossContextLoss(0.1, 0.05))
    theirs = errors(lambda *contexts: mean(readable(*contexts)))
    assert all(mine <= other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_large_embeddings_do_not_overflow() -> None:
    z, t, memory = inputs(norm=1e6, dtype=torch.float32)
    total = cgh.CrossContextLoss()(z, t, memory) + cgh.InfoNCELoss()(z, t, memory)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(total, z))


def test_a_later_chunk_may_hold_the_largest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", {"cpu": 1})
    monkeypatch.setattr(streaming, "MIN_CHUNK", 10)
    monkeypatch.setattr(kept, "LIMIT", 0)
    z, t, memory = inputs(size=40)
    for name, bank in memory.items():
        memory[name] = bank * torch.logspace(-3, 3, 40, dtype=bank.dtype).unsqueeze(1)
    total, expected = cgh.CrossContextLoss(0.1, 0.05)(z, t, memory), mean(readable(z, t, memory))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(total, z), gradients(expected, z), rtol=1e-11, atol=1e-9)


def test_long_rows_after_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running maximum starts where the lengths no longer bound the logits."""
    monkeypatch.setattr(streaming, "BUFFER", {"cpu": 1})
    monkeypatch.setattr(streaming, "MIN_CHUNK", 10)
    monkeypatch.setattr(kept, "LIMIT", 0)
    z, t, memory = inputs(size=40, dtype=torch.float32)
    for bank in memory.values():
        bank[30:] *= 200
    exact_z, exact_t, exact_memory = (
        {name: x.detach().double().requires_grad_() for name, x in contexts.items()} for contexts in (z, t, memory)
    )
    total, expected = cgh.CrossContextLoss(0.1, 0.05)(z, t, memory), mean(readable(exact_z, exact_t, exact_memory))
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, exact in zip(gradients(total, z), gradients(expected, exact_z), strict=True):
        assert torch.linalg.norm(ours - exact) < 1e-5 * torch.linalg.norm(exact)


def test_few_relations_are_held_and_many_are_not() -> None:
    z, _, memory = inputs(size=101)
    student = streaming.Query(z["global"], "global", 0.1)
    assert kept.keeps([student, student], memory)
    many = {"global": torch.empty(0).expand(kept.LIMIT // len(z["global"]) + 1, 0)}
    assert not kept.keeps([student, student], many)


@pytest.mark.usefixtures("chunk")
def test_kernels_are_for_gpus_that_triton_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HAS_TRITON", True)
    for number, capability in enumerate([(6, 1), (7, 0), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        device = torch.device("cuda", 100 + number)  # none that is there, as what was found is kept
        half = SimpleNamespace(dtype=torch.float16, device=device)
        assert streaming.backend(half) == ("torch" if capability < (7, 0) else "triton")  # type: ignore[arg-type]
        assert streaming.backend(SimpleNamespace(**vars(half) | {"dtype": torch.float64})) == "torch"  # type: ignore[arg-type]


def test_each_term_can_be_differentiated_by_itself() -> None:
    z, t, memory = inputs()
    criterion = cgh.CrossContextLoss(0.1, 0.05)
    expected = gradients(2 * criterion(z, t, memory), z)
    for term in criterion.terms(z, t, memory).values():
        term.backward()
    for x, gradient in zip(z.values(), expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_the_order_of_the_memory_does_not_matter() -> None:
    z, t, memory = inputs()
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    shuffled = {name: bank[order] for name, bank in memory.items()}
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        torch.testing.assert_close(criterion(z, t, memory), criterion(z, t, shuffled), rtol=1e-12, atol=0)


def test_the_memory_may_be_overwritten_before_backward() -> None:
    z, t, _ = inputs(dtype=torch.float32)
    memory = cgh.MemoryBank({name: DIMS[name] for name in z}, size=50)
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        expected = gradients(criterion(z, t, memory), z)
        loss = criterion(z, t, memory)
        memory.enqueue(t)
        torch.testing.assert_close(gradients(loss, z), expected)


def test_without_gradient_the_value_is_the_same() -> None:
    z, t, memory = inputs()
    with torch.no_grad():
        value = cgh.CrossContextLoss()(z, t, memory)
    assert not value.requires_grad
    torch.testing.assert_close(value, cgh.CrossContextLoss()(z, t, memory).detach())


def test_teacher_and_memory_get_no_gradient() -> None:
    z, t, memory = inputs()
    others = [x.requires_grad_() for x in (*t.values(), *memory.values())]
    loss = cgh.CrossContextLoss()(z, t, memory) + cgh.InfoNCELoss()(z, t, memory)
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_a_second_derivative_is_refused(criterion: nn.Module) -> None:
    z, t, memory = inputs()
    (gradient,) = torch.autograd.grad(criterion(z, t, memory), z["global"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*cgh\.relation"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_torch_func(criterion: nn.Module) -> None:
    z, t, memory = inputs()
    expected = gradients(criterion(z, t, memory), z)
    rows = {name: x.detach() for name, x in z.items()}
    for transform in (torch.func.grad, torch.func.jacrev):
        found = transform(lambda z: criterion(z, t, memory))(rows)
        torch.testing.assert_close(list(found.values()), expected)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda z: criterion(z, t, memory), (rows,), (rows,))


class Step(nn.Module):
    """An encoder of two contexts and its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(4, DIMS[name]) for name in ("global", "hypercolumn")})
        self.memory = cgh.MemoryBank({name: DIMS[name] for name in self.heads}, size=300)
        self.losses = nn.ModuleList([cgh.CrossContextLoss(), cgh.InfoNCELoss()])

    def forward(self, x: Tensor, t: dict[str, Tensor]) -> Tensor:
        z = {name: F.normalize(head(x), dim=1) for name, head in self.heads.items()}
        return torch.stack([loss(z, t, self.memory) for loss in self.losses]).sum()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo", "chunk")
def test_a_compiled_step_is_the_eager_one() -> None:
    torch.manual_seed(0)
    step, x = Step(), torch.randn(6, 4)
    t = {name: rows.float() for name, rows in inputs()[1].items()}
    expected = step(x, t)
    expected_gradients = torch.autograd.grad(expected, list(step.parameters()))
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x, t)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, list(step.parameters())), expected_gradients)


@pytest.mark.usefixtures("fresh_dynamo", "chunk")
@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_a_loss_compiled_alone(criterion: nn.Module) -> None:
    z, t, memory = inputs()
    expected = criterion(z, t, memory)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled(z, t, memory), z), gradients(expected, z))
    rows = {name: x.detach() for name, x in z.items()}  # which take no gradient
    torch.testing.assert_close(compiled(rows, t, memory), expected.detach())
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, t, memory), expected.detach())


@pytest.mark.skipif(torch.__version__ < "2.14", reason="PyTorch 2.14 compiles torch.func.grad of it, 2.6 does not")
@pytest.mark.usefixtures("fresh_dynamo", "chunk")
@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
def test_a_compiled_transform(criterion: nn.Module) -> None:
    z, t, memory = inputs()
    rows = {name: x.detach() for name, x in z.items()}
    transform = torch.func.grad(lambda z: criterion(z, t, memory))
    found = torch.compile(transform, backend="aot_eager", fullgraph=True)(rows)
    torch.testing.assert_close(list(found.values()), gradients(criterion(z, t, memory), z))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda bank: bank.to("meta"), ValueError, r"one device.*memory\['global'\] on meta"),
        (lambda bank: bank.long(), TypeError, r"memory\['global'\] is torch.int64; a bank is floating point"),
        (lambda bank: bank.to(torch.complex64), TypeError, r"memory\['global'\] is torch.complex64"),
        (lambda bank: bank[:-1], ValueError, "different lengths"),
        (lambda bank: bank[:0], ValueError, r"memory\['global'\] is empty: shape \(0, 12\)"),
        (lambda bank: bank[:, :-1], ValueError, r"12 dimensions and memory\['global'\] is \(101, 11\)"),
    ],
)
def test_a_bank_that_does_not_fit(change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    z, t, memory = inputs()
    memory["global"] = change(memory["global"])
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        with pytest.raises(error, match=message):
            criterion(z, t, memory)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()])
@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite(criterion: nn.Module, owner: str, value: float) -> None:
    z, t, memory = inputs()
    with torch.no_grad():
        {"student": z, "teacher": t}[owner]["hypercolumn"][2, 1] = value
    with pytest.raises(ValueError, match=rf"{owner}\['hypercolumn'\] holds 1 values .* {value} in row 2"):
        criterion(z, t, memory)


def test_a_local_view_on_another_device() -> None:
    z, t, memory = inputs()
    view = {"global": z["global"].detach().to("meta")}
    with pytest.raises(ValueError, match=r"one device.*local view 0\['global'\] on meta"):
        cgh.CrossContextLoss()(z, t, memory, view)


def test_a_uniform_relation_has_the_entropy_of_its_size() -> None:
    memory = {"global": torch.zeros(128, 4)}
    z = {"global": torch.randn(3, 4)}
    loss = cgh.CrossContextLoss(0.1, 0.1, pairs=[("global", "global")])(z, z, memory)
    assert loss.item() == pytest.approx(math.log(128))
