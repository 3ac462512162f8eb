"""The package as users meet it: quick to import, complete without extras, typed and documented."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from importlib import metadata, resources
from types import ModuleType

import pytest

import cgh

WITHOUT_EXTRAS = """
import importlib.util, sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in {extras} else PathFinder.find_spec(name, *args)

sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
assert not any(map(importlib.util.find_spec, {extras}))

import torch, torchvision, cgh

model = cgh.CGH(torchvision.models.resnet18(), dim=8, hidden_dim=8, memory_size=16, warmup_steps=2)
output = model(*torch.randn(2, 4, 3, 32, 32))
output.loss.backward()
model.update(output)
cgh.evaluate.knn(torch.eye(4), torch.arange(4), torch.eye(4), torch.arange(4), k=1)
"""


def extras() -> set[str]:
    """Import names of the packages that only an extra asks for and that are installed here."""
    wanted = {
        re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower()
        for requirement in metadata.requires("cgh-ssl") or []
        if "extra ==" in requirement
    } - {"cgh-ssl"}
    names = metadata.packages_distributions().items()
    return {name for name, distributions in names if wanted & {d.lower() for d in distributions}}


def test_import_adds_at_most_150_milliseconds() -> None:
    # Of the processor's time, which a machine that is busy with other things does not lengthen.
    code = (
        "import time, torch, torchvision; start = time.process_time(); import cgh; print(time.process_time() - start)"
    )

    def measure() -> float:
        command = [sys.executable, "-c", code]
        return 1000 * float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert statistics.median(measure() for _ in range(3)) <= 150


def test_works_without_any_extra() -> None:
    assert "matplotlib" in extras()
    subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS.format(extras=extras())], check=True)


def test_is_typed_and_has_one_version() -> None:
    assert (resources.files("cgh") / "py.typed").is_file()
    assert metadata.version("cgh-ssl") == cgh.__version__


@pytest.mark.parametrize("name", cgh.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    item = getattr(cgh, name)
    if name == "Contexts":
        return  # an alias: the site documents it
    assert item.__doc__
    if not isinstance(item, ModuleType) and not (isinstance(item, type) and issubclass(item, tuple)):
        assert "Example:" in item.__doc__
