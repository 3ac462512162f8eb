"""The package as users meet it: quick to import, complete without extras, typed and documented."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
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

    added = statistics.median(measure() for _ in range(5))
    print(f"\nimport cgh adds {added:.0f} ms to import torch, torchvision")
    assert added <= 150


def test_what_takes_long_to_import_waits_until_it_is_used() -> None:
    code = """
import sys, torch, cgh
assert not {"torchvision", "matplotlib", "timm", "cgh.plot", "cgh.views", "cgh.watch"} & sys.modules.keys()
assert {"plot", "views", "watch"} <= set(dir(cgh))
cgh.HypercolumnExtractor(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), ["0"])
assert "torchvision" not in sys.modules
assert cgh.views.Crops and cgh.watch.Watch and "torchvision" in sys.modules
assert cgh.plot.curves
try:
    cgh.nothing
except AttributeError as error:
    assert str(error) == "module 'cgh' has no attribute 'nothing'"
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


USERS_SCRIPT = """
import torch
import cgh

features = cgh.HypercolumnExtractor(torch.nn.Conv2d(3, 8, 3), layers=["layer"])
student = cgh.ContextEncoder(features, dim=16)
teacher = cgh.EMATeacher(student, momentum=cgh.TeacherMomentum(0.99, steps=10))
memory = cgh.MemoryBank({"global": 16, "hypercolumn": 16}, size=32)
criterion = cgh.CrossContextLoss()
model = cgh.CGH(features, memory_size=32)
probe = cgh.watch.OnlineProbe(width=8, classes=2)
look = cgh.watch.Watch(model, [cgh.watch.CSV("log.csv")], probe=probe)
images = torch.randn(2, 3, 8, 8)
reveal_type(student(images))
reveal_type(criterion(student(images), student(images), memory))
reveal_type(model(images, images).loss)
reveal_type(look(1, model(images, images)))
reveal_type(cgh.interop.from_pretrained("folder"))
reveal_type(cgh.views.Crops(32))
"""


@pytest.mark.slow
@pytest.mark.skipif(not (Path(cgh.__file__).parents[1] / "pyproject.toml").exists(), reason="the project is not here")
def test_a_users_script_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(USERS_SCRIPT)
    root = Path(cgh.__file__).parents[1]  # with the cache of `nox -s types`, where there is one
    command = [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    revealed = re.findall(r'Revealed type is "([^"]+)"', done.stdout)
    assert [name.replace("builtins.", "") for name in revealed] == [
        "dict[str, torch._tensor.Tensor]",
        "torch._tensor.Tensor",
        "torch._tensor.Tensor",
        "dict[str, float]",
        "torch.nn.modules.module.Module",
        "cgh.views.Crops",
    ], done.stdout
    assert "error:" not in done.stdout, done.stdout


def test_works_without_any_extra() -> None:
    assert "kornia" in extras()
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
