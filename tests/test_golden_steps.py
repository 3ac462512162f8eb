"""Whole training steps are the reference's: losses, gradients, final weights and banks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import cgh
from tests import golden

CASES = golden.load("steps")
TERMS = {
    "infonce": lambda output: output.infonce,
    "hypercolumn_from_global": lambda output: output.terms["hypercolumn", "global"],
    "global_from_hypercolumn": lambda output: output.terms["global", "hypercolumn"],
    "total": lambda output: output.loss,
}


def reference_key(name: str, which: str) -> str:
    """The reference's key for a `ContextEncoder`'s; `which` is "q" for the student and "k" for the teacher."""
    for ours, theirs in {
        "extractor.backbone.": f"encoder_{which}.",
        "heads.global.": f"encoder_{which}.fc.",
        "heads.hypercolumn.convolution.": f"hypercols_proj_{which}.reg_conv.0.",
        "heads.hypercolumn.norm.": f"hypercols_proj_{which}.reg_conv.1.",
        "heads.hypercolumn.projection.": f"hypercols_proj_{which}.projector.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def build(case: dict[str, Any], dtype: torch.dtype) -> cgh.CGH:
    """The case's model at its start."""
    backbone: torch.nn.Module = getattr(torchvision.models, case["arch"])()
    if case["bn_splits"] > 1:
        backbone = cgh.SplitBatchNorm2d.convert(backbone, case["bn_splits"])
    model = cgh.CGH(
        backbone,
        case["layers"],
        dim={"global": case["dim"], "hypercolumn": case["hypercolumn_dim"]},
        hidden_dim=case["hidden_dim"],
        memory_size=case["memory"],
        momentum=case["momentum"],
        student_temperature={"global": 0.1, "hypercolumn": case["temp_s"]},
        teacher_temperature={"global": 0.04, "hypercolumn": case["temp_t"]},
        infonce_temperature=case["infonce_temperature"],
        warmup_steps=case["warmup_steps"],
        centring_momentum=0.9 if case["norm_center"] else None,
        shuffle=False,
    ).to(dtype)
    for encoder in (model.student, model.teacher.encoder):
        for name, x in encoder.state_dict().items():
            if x.is_floating_point():
                x.copy_(golden.parameter(reference_key(name, "q"), tuple(x.shape)))
    for name, key in (("global", "queue"), ("hypercolumn", "queue_hyper")):
        model.memory[name].copy_(golden.unit_rows(key, tuple(model.memory[name].shape)))
    return model


def optimizer_of(model: cgh.CGH, case: dict[str, Any]) -> torch.optim.Optimizer:
    """The reference's optimiser: no weight decay where a key holds "bn" or "bias"."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.student.named_parameters():
        key = reference_key(name, "q")
        groups["bn" not in key and "bias" not in key].append(parameter)
    return torch.optim.SGD(
        [{"params": groups[True], "weight_decay": 1e-4}, {"params": groups[False]}], lr=case["lr"], momentum=0.9
    )


def views(case: dict[str, Any], step: int) -> tuple[Tensor, Tensor]:
    """The strong and the weak view of a step."""
    size = (case["batch"], 3, case["image_size"], case["image_size"])
    strong, weak = (golden.array(f"{case['name']}/image/{step}/{view}", size) for view in ("strong", "weak"))
    return strong, weak


def same(name: str, x: Tensor, expected: list[float], tolerance: float) -> bool:
    """Whether a tensor has the expected fingerprint, relative to its norm."""
    norm, product = golden.fingerprint(name, x)
    return max(abs(norm - expected[0]), abs(product - expected[1])) <= tolerance * max(1.0, expected[0])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_training_steps_in_float64(case: dict[str, Any]) -> None:
    model = build(case, torch.float64)
    optimizer = optimizer_of(model, case)
    for expected in case["steps"]:
        output = model(*views(case, expected["step"]))
        assert (output.weights.infonce, output.weights.relation) == (
            expected["weights"]["cl"],
            expected["weights"]["csist"],
        )
        for name, term in TERMS.items():
            assert term(output).item() == pytest.approx(expected[name], rel=1e-9), (expected["step"], name)
        optimizer.zero_grad()
        output.loss.backward()
        for name, parameter in model.student.named_parameters() if expected["grads"] else ():
            key = reference_key(name, "q")
            assert same(f"grad/{key}", parameter.grad, expected["grads"][key], 1e-9), key
        optimizer.step()
        # The reference moves its teacher at the start of the next step, so its last teacher lacks the last update.
        teacher = copy.deepcopy(model.teacher.encoder)
        model.update(output)

    final = {
        reference_key(name, which): x
        for which, encoder in (("q", model.student), ("k", teacher))
        for name, x in encoder.state_dict().items()
        if x.is_floating_point()
    }
    final |= {"queue": model.memory["global"].T, "queue_hyper": model.memory["hypercolumn"].T}
    if model.relation_loss.centring is not None:
        final |= {"center": model.relation_loss.centring["global"][None]}
        final |= {"center_hyper": model.relation_loss.centring["hypercolumn"][None]}
    # Without centring the reference keeps means that nothing reads.
    assert final.keys() | {"center", "center_hyper"} == case["final"].keys()
    for key, x in final.items():
        assert same(f"final/{key}", x, case["final"][key], 1e-9), key
    assert model.memory.pointer == case["queue_ptr"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_each_step_in_float32(case: dict[str, Any]) -> None:
    """Losses, and gradients of the heads, of every step taken in float32 from the float64 run's state.

    Deeper gradients are no fair comparison: where a ReLU's input is within rounding of zero they jump, by 1 % at the
    start of "r18-split", as they do in float64 when the images move by 1e-6.
    """
    model, single = build(case, torch.float64), build(case, torch.float32)
    optimizer = optimizer_of(model, case)
    for expected in case["steps"]:
        strong, weak = views(case, expected["step"])
        single.load_state_dict(model.state_dict())
        output, rounded = model(strong, weak), single(strong.float(), weak.float())
        for name, term in TERMS.items():
            assert term(rounded).item() == pytest.approx(expected[name], rel=1e-4), (expected["step"], name)
        optimizer.zero_grad()
        single.zero_grad()
        output.loss.backward()
        rounded.loss.backward()
        for name, parameter in single.student.heads.named_parameters():
            key = reference_key(f"heads.{name}", "q")
            if expected["grads"]:
                assert same(f"grad/{key}", parameter.grad, expected["grads"][key], 1e-4), key
        optimizer.step()
        model.update(output)
