"""The terms of the losses, to a compiler."""

from __future__ import annotations

import pytest
import torch

from cgh import terms
from tests.test_streaming import DIMS, inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_operators_keep_what_pytorch_asks_of_them(dtype: torch.dtype) -> None:
    names = list(DIMS)
    z, t, memory = ({name: x.detach() for name, x in contexts.items()} for contexts in inputs(names, dtype=dtype))
    centre = torch.randn(len(memory["third"]), dtype=dtype)
    students, guides = ["third", "global"], ["hypercolumn", "third"]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        terms._cross_entropies_operator,
        (
            [*(z[name].repeat(2, 1) for name in students), *(t[name] for name in guides)],
            [*students, *guides],
            [0.1, 0.2, 0.05, 0.04],
            [None, None, None, centre],
            ["third", "global", "third"],
            ["hypercolumn", "hypercolumn", "third"],
            names,
            list(memory.values()),
            dtype,
        ),
        test_utils=checks,
    )
    torch.library.opcheck(
        terms._infonce_operator,
        (list(z.values()), names, [0.2] * 3, list(t.values()), list(memory.values()), dtype),
        test_utils=checks,
    )
