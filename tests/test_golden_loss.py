"""The losses are the reference's: values and gradients, in float64 to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cgh
from tests import golden

CASES = golden.load("loss")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("part", ["warmup", "relation"])
def test_losses_and_gradients(case: dict[str, Any], part: str, dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    name, batch, dims = case["name"], case["batch"], {c: case[f"{c}_dim"] for c in ("global", "hypercolumn")}

    def rows(which: str, count: int, dim: int) -> Tensor:
        return golden.unit_rows(f"{name}/{which}", (count, dim)).to(dtype)

    z = {c: rows(f"student/{c}", batch, dim).requires_grad_() for c, dim in dims.items()}
    t = {c: rows(f"teacher/{c}", batch, dim) for c, dim in dims.items()}
    memory = {c: rows(f"memory/{c}", case["memory"], dim) for c, dim in dims.items()}
    local = [rows(f"student/local{i}", batch, dims["global"]).requires_grad_() for i in range(case["local_views"])]

    relation_loss = cgh.CrossContextLoss(
        student_temperature={"global": 0.1, "hypercolumn": case["temp_s"]},
        teacher_temperature={"global": 0.04, "hypercolumn": case["temp_t"]},
    )
    terms = relation_loss.terms(z, t, memory, *({"global": view} for view in local))
    infonce = cgh.InfoNCELoss(case["infonce_temperature"])(z, t, memory)
    expected = case["terms"]
    assert infonce.item() == pytest.approx(expected["infonce"], rel=tolerance)
    for learner, guide in (("global", "hypercolumn"), ("hypercolumn", "global")):
        assert terms[learner, guide].item() == pytest.approx(expected[f"{learner}_from_{guide}"], rel=tolerance)

    total = infonce if part == "warmup" else relation_loss(z, t, memory, *({"global": view} for view in local))
    assert total.item() == pytest.approx(case[part]["total"], rel=tolerance)
    total.backward()
    inputs = {f"student/{c}": x for c, x in z.items()} | {f"student/local{i}": x for i, x in enumerate(local)}
    assert inputs.keys() == case[part]["grads"].keys()
    for key, x in inputs.items():
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        assert golden.fingerprint(f"{name}/{part}/{key}", gradient) == pytest.approx(
            case[part]["grads"][key], rel=tolerance, abs=tolerance
        )
