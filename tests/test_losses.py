"""Laws of relations and losses, against the equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cgh
from tests.conftest import embeddings, unit

DIMS = {"global": 12, "hypercolumn": 7}
sizes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 10_000))


def batch(count: int = 5, rows: int = 40, seed: int = 0, dims: dict[str, int] = DIMS) -> tuple[dict[str, Tensor], ...]:
    """Student, teacher and memory."""
    return tuple(embeddings(n, dims, seed=seed + 100 * i) for i, n in enumerate((count, count, rows)))


def permuted(memory: dict[str, Tensor], names: list[str], seed: int) -> dict[str, Tensor]:
    order = torch.randperm(len(memory["global"]), generator=torch.Generator().manual_seed(seed))
    return {name: bank[order] if name in names else bank for name, bank in memory.items()}


@given(sizes, st.floats(0.02, 2))
@settings(max_examples=30, deadline=None)
def test_rows_of_a_relation_matrix_sum_to_one(size: tuple[int, int, int], temperature: float) -> None:
    count, rows, seed = size
    z, _, memory = batch(count, rows, seed)
    relations = cgh.RelationMatrix(temperature)(z["global"], memory["global"])
    torch.testing.assert_close(relations.sum(dim=1), torch.ones(count, dtype=torch.float64))
    expected = torch.exp(z["global"] @ memory["global"].T / temperature)
    torch.testing.assert_close(relations, expected / expected.sum(dim=1, keepdim=True))


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_a_permutation_of_all_banks_changes_nothing(size: tuple[int, int, int]) -> None:
    z, t, memory = batch(*size)
    both = permuted(memory, list(memory), size[2])
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        torch.testing.assert_close(criterion(z, t, both), criterion(z, t, memory))


def test_a_permutation_of_one_bank_changes_the_loss() -> None:
    z, t, memory = batch()
    criterion = cgh.CrossContextLoss()
    difference = criterion(z, t, permuted(memory, ["global"], 0)) - criterion(z, t, memory)
    assert difference.abs() > 0.01


def test_cross_context_terms_are_the_papers_equation() -> None:
    z, t, memory = batch()
    terms = cgh.CrossContextLoss().terms(z, t, memory)
    temperatures = {"global": (0.1, 0.04), "hypercolumn": (0.08, 0.08)}
    for learner, guide in (("global", "hypercolumn"), ("hypercolumn", "global")):
        p = torch.softmax(z[learner] @ memory[learner].T / temperatures[learner][0], dim=1)
        target = torch.softmax(t[guide] @ memory[guide].T / temperatures[guide][1], dim=1)
        torch.testing.assert_close(terms[learner, guide], -(target * p.log()).sum(dim=1).mean())
    torch.testing.assert_close(cgh.CrossContextLoss()(z, t, memory), sum(terms.values()) / 2)


def test_a_pair_of_one_context_is_ressl() -> None:
    z, t, memory = batch()
    criterion = cgh.CrossContextLoss(0.1, 0.04, pairs=[("global", "global")])
    student = F.log_softmax(z["global"] @ memory["global"].T / 0.1, dim=1)
    teacher = F.softmax(t["global"] @ memory["global"].T / 0.04, dim=1)
    expected = -(teacher * student).sum(dim=1).mean()
    only = ({"global": x["global"]} for x in (z, t, memory))
    torch.testing.assert_close(criterion(*only), expected)
    torch.testing.assert_close(criterion(z, t, memory), expected)


def test_three_contexts_learn_in_six_pairs() -> None:
    z, t, memory = batch(dims={"global": 5, "shallow": 6, "deep": 7})
    criterion = cgh.CrossContextLoss(0.1, 0.05)
    terms = criterion.terms(z, t, memory)
    assert len(terms) == 6
    for pair, term in terms.items():
        torch.testing.assert_close(term, cgh.CrossContextLoss(0.1, 0.05, pairs=[pair])(z, t, memory))
    torch.testing.assert_close(criterion(z, t, memory), sum(terms.values()) / 6)


def test_infonce_is_the_cross_entropy_of_the_positive() -> None:
    z, t, memory = batch()
    expected = 0
    for name in z:
        logits = torch.cat([(z[name] * t[name]).sum(1, keepdim=True), z[name] @ memory[name].T], dim=1) / 0.2
        expected = expected + F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(cgh.InfoNCELoss()(z, t, memory), expected)


def test_only_the_student_gets_a_gradient() -> None:
    z, t, memory = ({name: x.requires_grad_() for name, x in part.items()} for part in batch())
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        criterion(z, t, memory).backward()
        assert all(x.grad is not None and x.grad.any() for x in z.values())
        assert all(x.grad is None for part in (t, memory) for x in part.values())


def test_local_views_are_averaged_within_their_term() -> None:
    z, t, memory = batch()
    views = [{"global": unit(5, 12, seed=i)} for i in range(3)]
    criterion = cgh.CrossContextLoss()
    terms, plain = criterion.terms(z, t, memory, *views), criterion.terms(z, t, memory)
    alone = [criterion.terms({**z, **view}, t, memory)["global", "hypercolumn"] for view in views]
    expected = (plain["global", "hypercolumn"] + sum(alone)) / 4
    torch.testing.assert_close(terms["global", "hypercolumn"], expected)
    torch.testing.assert_close(terms["hypercolumn", "global"], plain["hypercolumn", "global"])


def test_centring_takes_the_moving_mean_off_the_teacher() -> None:
    z, t, memory = batch()
    centring = cgh.Centring(memory, size=40).double()
    criterion = cgh.CrossContextLoss(centring=centring)
    torch.testing.assert_close(criterion(z, t, memory), cgh.CrossContextLoss()(z, t, memory))
    centring.update(t, memory)
    centre = 0.1 * (t["global"] @ memory["global"].T).mean(dim=0)
    torch.testing.assert_close(centring["global"], centre)
    target = F.softmax((t["global"] @ memory["global"].T - centre) / 0.04, dim=1)
    expected = -(target * F.log_softmax(z["hypercolumn"] @ memory["hypercolumn"].T / 0.08, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(criterion.terms(z, t, memory)["hypercolumn", "global"], expected)


def test_gradients_are_right() -> None:
    z, t, memory = batch(3, 11)
    for criterion in (cgh.CrossContextLoss(), cgh.InfoNCELoss()):
        assert torch.autograd.gradcheck(
            lambda g, h, c=criterion: c({"global": g, "hypercolumn": h}, t, memory),
            tuple(x.requires_grad_() for x in z.values()),
        )


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan"), float("inf")])
def test_bad_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}; a temperature is above zero"):
        cgh.RelationMatrix(temperature)
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        cgh.InfoNCELoss(temperature)
    with pytest.raises(ValueError, match=rf"student_temperature\['global'\] is {temperature}"):
        cgh.CrossContextLoss(student_temperature={"global": temperature})


@pytest.mark.parametrize("criterion", [cgh.CrossContextLoss(), cgh.InfoNCELoss()], ids=["relations", "infonce"])
class TestBadInput:
    def test_contexts(self, criterion: torch.nn.Module) -> None:
        z, t, memory = batch()
        with pytest.raises(TypeError, match=r"student must map context names to \(N, D\) tensors.*got Tensor"):
            criterion(z["global"], t, memory)
        with pytest.raises(ValueError, match=r"student has the contexts \['global'\] and the teacher \['global', 'hyp"):
            criterion({"global": z["global"]}, t, memory)
        with pytest.raises(ValueError, match=r"no bank for context 'hypercolumn'; it has \['global'\]"):
            criterion(z, t, {"global": memory["global"]})
        with pytest.raises(ValueError, match="holds no context"):
            criterion({}, {}, memory)

    def test_batches(self, criterion: torch.nn.Module) -> None:
        z, t, memory = batch()
        with pytest.raises(ValueError, match="student has 5 images and the teacher 4"):
            criterion(z, {name: x[:4] for name, x in t.items()}, memory)
        with pytest.raises(ValueError, match="student has contexts of different batch sizes, {'global': 5, 'hyp"):
            criterion({**z, "hypercolumn": z["hypercolumn"][:4]}, t, memory)
        with pytest.raises(ValueError, match=r"student\['global'\] is empty"):
            criterion({name: x[:0] for name, x in z.items()}, t, memory)

    def test_widths_and_banks(self, criterion: torch.nn.Module) -> None:
        z, t, memory = batch()
        with pytest.raises(
            ValueError, match=r"student\['global'\] has 12 dimensions and memory\['global'\] is \(40, 11"
        ):
            criterion(z, t, {**memory, "global": memory["global"][:, :11]})
        with pytest.raises(ValueError, match="banks have different lengths, .*row j of each"):
            criterion(z, t, {**memory, "global": memory["global"][:30]})

    def test_values(self, criterion: torch.nn.Module) -> None:
        z, t, memory = batch()
        for owner, bad in (("student", z), ("teacher", t)):
            broken = {name: x.clone() for name, x in bad.items()}
            broken["global"][3, 2] = float("nan")
            inputs = (broken, t) if owner == "student" else (z, broken)
            with pytest.raises(ValueError, match=rf"{owner}\['global'\] holds 1 values .* nan in row 3. Lower the"):
                criterion(*inputs, memory)
        with pytest.raises(TypeError, match=r"student\['global'\] is torch.int64"):
            criterion({name: x.long() for name, x in z.items()}, t, memory)


def test_bad_pairs_and_views() -> None:
    z, t, memory = batch()
    with pytest.raises(ValueError, match="give .learner, guide. names"):
        cgh.CrossContextLoss(pairs=["global"])
    with pytest.raises(ValueError, match="no other to learn from; pass pairs"):
        cgh.CrossContextLoss()({"global": z["global"]}, {"global": t["global"]}, memory)
    with pytest.raises(ValueError, match="teacher has no context 'deep'"):
        cgh.CrossContextLoss(0.1, 0.1, pairs=[("global", "deep")])(z, t, memory)
    with pytest.raises(ValueError, match="no temperature for context 'deep', only for"):
        three = batch(dims={**DIMS, "deep": 3})
        cgh.CrossContextLoss()(*three)
    with pytest.raises(ValueError, match="local view 0 has 4 images, the student 5"):
        cgh.CrossContextLoss()(z, t, memory, {"global": z["global"][:4]})


def test_a_pair_named_twice() -> None:
    with pytest.raises(ValueError, match="name each once"):
        cgh.CrossContextLoss(pairs=[("global", "global"), ("global", "global")])
