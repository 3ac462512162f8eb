"""Every loop trains as the plain one does."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "loops"))


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_losses_as_the_plain_loop(package: str) -> None:
    pytest.importorskip(package)
    plain = importlib.import_module("plain").train()
    assert len(plain) == 8
    assert len(set(plain)) == 8
    assert importlib.import_module(f"with_{package}").train() == pytest.approx(plain, rel=1e-6)


def test_beside_the_loss_of_another_method() -> None:
    pytest.importorskip("lightly")
    losses = importlib.import_module("with_lightly").train(steps=16)
    for before, after in zip(losses[0], losses[-1], strict=True):
        assert after < 0.9 * before
