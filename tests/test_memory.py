"""A bank is a first-in-first-out list, aligned over contexts, and part of a run's state."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import cgh
from tests.conftest import embeddings

DIMS = {"global": 3, "hypercolumn": 5}


@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=8), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_equals_a_list_kept_by_hand(size: int, batches: list[int], contexts: int) -> None:
    dims = {f"context{i}": i + 2 for i in range(contexts)}
    memory = cgh.MemoryBank(dims, size)
    lists = {name: list(memory[name].clone()) for name in dims}
    pointer = 0
    for seed, count in enumerate(batches):
        rows = {name: x.float() for name, x in embeddings(count, dims, seed).items()}
        memory.enqueue(rows)
        for i in range(count):
            for name in dims:
                lists[name][(pointer + i) % size] = rows[name][i]
        pointer = (pointer + count) % size
    for name in dims:
        assert torch.equal(memory[name], torch.stack(lists[name]))
    assert memory.pointer == pointer


def test_starts_with_unit_rows_that_a_seed_fixes() -> None:
    torch.manual_seed(1)
    memory = cgh.MemoryBank(DIMS, size=50)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    twin, other = cgh.MemoryBank(DIMS, size=50), cgh.MemoryBank(DIMS, size=50, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for name, dim in DIMS.items():
        assert memory[name].shape == (50, dim)
        torch.testing.assert_close(memory[name].norm(dim=1), torch.ones(50))
        assert torch.equal(memory[name], twin[name])
        assert not torch.equal(memory[name], other[name])


def test_reading_and_writing_copy_no_bank() -> None:
    memory = cgh.MemoryBank(DIMS, size=50)
    bank = memory["global"]
    memory.enqueue({name: x.float() for name, x in embeddings(4, DIMS).items()})
    assert memory["global"].data_ptr() == bank.data_ptr()


def test_is_state_but_no_buffer() -> None:
    memory = cgh.MemoryBank(DIMS, size=50)
    assert not [x for x in memory.buffers() if x.ndim]
    memory.enqueue({name: x.float() for name, x in embeddings(4, DIMS).items()})
    twin = cgh.MemoryBank(DIMS, size=50, seed=9)
    twin.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert twin.pointer == 4
    assert all(torch.equal(twin[name], memory[name]) for name in DIMS)
    memory.double()
    assert memory["global"].dtype == torch.float64
    assert copy.deepcopy(memory)["global"].data_ptr() != memory["global"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    memory = cgh.MemoryBank(DIMS, size=50, dtype=dtype)
    rows = {name: x.float() for name, x in embeddings(4, DIMS).items()}
    memory.enqueue(rows)
    assert memory["global"].dtype == dtype
    assert torch.equal(memory["global"][:4], rows["global"].to(dtype))
    assert cgh.CrossContextLoss()(rows, rows, memory).dtype == torch.float32


def test_a_checkpoint_of_another_size_is_refused() -> None:
    memory, state = cgh.MemoryBank(DIMS, size=50), cgh.MemoryBank(DIMS, size=40).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for global: saved \(40, 3\), here \(50, 3\)"):
        memory.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.*"hypercolumn".*[\\s\\S]*Unexpected key.*"other"'):
        memory.load_state_dict(cgh.MemoryBank({"global": 3, "other": 3}, size=50).state_dict())


def broken(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    rows["hypercolumn"][2, 1] = float("inf")
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"global": rows["global"]}, r"contexts are \['global'\]; the memory keeps \['global', 'hyper"),
        (lambda rows: {**rows, "deep": rows["global"]}, "contexts are .*'deep'.*; the memory keeps"),
        (
            lambda rows: {**rows, "global": rows["global"][:, :2]},
            r"has 2 dimensions and memory\['global'\] is \(6, 3\)",
        ),
        (lambda rows: {**rows, "global": rows["global"][:2]}, "different batch sizes, {'global': 2, 'hypercolumn': 4}"),
        (lambda rows: {name: x[:0] for name, x in rows.items()}, "is empty"),
        (broken, r"contexts\['hypercolumn'\] holds 1 values .* inf in row 2"),
    ],
)
def test_bad_batches_change_nothing(change: object, message: str) -> None:
    memory = cgh.MemoryBank(DIMS, size=6)
    before = copy.deepcopy(memory.state_dict())
    rows = {name: x.float() for name, x in embeddings(4, DIMS).items()}
    with pytest.raises(ValueError, match=message):
        memory.enqueue(change(rows))
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="dims is {}"):
        cgh.MemoryBank({})
    with pytest.raises(ValueError, match="width of 1 or more"):
        cgh.MemoryBank({"global": 0})
    with pytest.raises(ValueError, match="size is 0"):
        cgh.MemoryBank(DIMS, size=0)
    with pytest.raises(ValueError, match="floating point"):
        cgh.MemoryBank(DIMS, dtype=torch.int8)
    with pytest.raises(KeyError, match="no context 'deep'; it has"):
        cgh.MemoryBank(DIMS, size=4)["deep"]


def test_ranks_without_a_process_group_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = cgh.MemoryBank(DIMS, size=6)
    rows = {name: x.float() for name, x in embeddings(4, DIMS).items()}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (lambda: memory.enqueue(rows), lambda: cgh.BatchShuffle()(lambda x: rows, rows["global"])):
        with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2, .*init_process_group\(\) first"):
            call()
    assert memory.pointer == 0


def test_can_be_emptied() -> None:
    memory, fresh = cgh.MemoryBank(DIMS, size=6, seed=2), cgh.MemoryBank(DIMS, size=6, seed=2)
    bank = memory["global"]
    memory.enqueue({name: x.float() for name, x in embeddings(4, DIMS).items()})
    memory.reset()
    assert memory["global"].data_ptr() == bank.data_ptr()
    torch.testing.assert_close(memory.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_a_batch_that_is_not_finite_is_left_out_where_nothing_waits_to_see_it() -> None:
    memory = cgh.MemoryBank(DIMS, size=6)
    rows = {name: x.float() for name, x in embeddings(4, DIMS).items()}
    memory.enqueue(rows)
    before = copy.deepcopy(memory.state_dict())
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {name: x.clone() for name, x in rows.items()}
        bad["hypercolumn"][2, 1] = value
        memory.write(bad)  # what follows the checks, which look at values on the CPU alone
        torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)
    memory.write(rows)
    assert memory.pointer == 2


def test_goes_through_meta_and_distributed_checkpoints(tmp_path: Path) -> None:
    memory = cgh.MemoryBank(DIMS, size=6, seed=1)
    memory.enqueue({name: x.float() for name, x in embeddings(4, DIMS).items()})
    with torch.device("meta"):
        empty = cgh.MemoryBank(DIMS, size=6)
    with pytest.raises(RuntimeError, match=r"global is on meta and cannot be filled; pass assign=True, or call .to_em"):
        empty.load_state_dict(memory.state_dict())
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(memory.state_dict())
    empty.load_state_dict(memory.state_dict(), assign=True)

    read = cgh.MemoryBank(DIMS, size=6, seed=2)
    dcp.save({"memory": get_model_state_dict(memory)}, checkpoint_id=tmp_path)
    state = {"memory": get_model_state_dict(read)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(read, state["memory"])
    for twin in (filled, empty, read):
        assert twin.pointer == 4
        torch.testing.assert_close(twin.state_dict(), memory.state_dict(), rtol=0, atol=0)


def test_starts_alike_whatever_the_default_device_and_dtype() -> None:
    with torch.device("meta"):
        assert cgh.MemoryBank(DIMS, size=6)["global"].is_meta


@pytest.mark.parametrize("pointer", [-1, 10, 123])
def test_a_pointer_outside_the_bank(pointer: int) -> None:
    memory = cgh.MemoryBank({"global": 4}, size=10)
    with pytest.raises(ValueError, match=f"pointer is {pointer}; it is a row of a bank, from 0 to 9"):
        memory.pointer = pointer
