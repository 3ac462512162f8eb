"""What the site shows is true: its Python runs, page by page, its links lead somewhere, its drawings match."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import markdown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
WITH_CODE = [page for page in PAGES if markdown.BLOCK.search(page.read_text(encoding="utf-8"))]

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the site is not here")

# What pages take for granted that speak of a reader's own data: small stand-ins.
BEFORE = {
    "migration.md": """
        import torch, torchvision, cgh
        from cgh.interop import reference
        backbone, dim, memory_size, steps_per_epoch = torchvision.models.resnet18(), 8, 32, 10
        model = cgh.CGH(backbone, dim=dim, memory_size=memory_size)
        optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
        model(*torch.randn(2, 4, 3, 32, 32)).loss.backward()
        optimizer.step()
        reference.save("ImageNet_0099.pth.tar", model, optimizer, epoch=100, arch="resnet18")
    """,
    "data.md": """
        import pathlib, torch
        from torchvision.transforms.v2.functional import to_pil_image
        root, rank, world_size, workers, epochs = pathlib.Path("images"), 0, 1, 0, 1
        for number, image in enumerate(torch.randint(256, (32, 3, 40, 60), dtype=torch.uint8)):
            path = root / "train" / "class" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    """,
    "reference/watch.md": """
        import torch, torchvision, cgh
        images, labels = torch.randn(24, 3, 32, 32), torch.arange(24) % 10
        labelled = validation = torch.utils.data.TensorDataset(images, labels)
        loader = [(images, images.flip(3), labels)] * 2
        model = cgh.CGH(torchvision.models.resnet18(), dim=8, hidden_dim=8, memory_size=64, image_shape=(3, 32, 32))
        optimizer = torch.optim.SGD(model.student.parameters(), lr=0.01)
    """,
    "reference/evaluate.md": """
        import torch, torchvision, cgh
        images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 10
        train_images = test_images = [*zip(images, labels.tolist())]
        loader = [*zip(images.split(20), labels.split(20))]
        state = torchvision.models.resnet18().state_dict()
        cgh.checkpoint.save({k: x for k, x in state.items() if not k.startswith("fc")}, "runs/imagenet/checkpoint.pt")
    """,
}
NEEDS = {"backbones.md": ["timm"], "data.md": ["kornia"], "parts.md": ["kornia", "matplotlib", "safetensors"]}
NEEDS |= {
    "reference/watch.md": ["tensorboard"],
    "reference/plot.md": ["matplotlib"],
    "reference/views.md": ["kornia"],
    "reading.md": ["matplotlib"],
}
NEEDS |= {"reference/evaluate.md": ["sklearn"], "loops.md": ["accelerate", "lightning"]}


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.filterwarnings("ignore")  # of Lightning and Accelerate about the machine
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(name(page), []):
        pytest.importorskip(package)
    if name(page) == "loops.md":
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # which a process otherwise keeps from one use on
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "examples" / "imagenet")])
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(re.sub(r"^        ", "", BEFORE.get(name(page), ""), flags=re.MULTILINE), namespace)
    markdown.run(page, namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Accelerate about the machine
def test_the_complete_loop_of_accelerate_on_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    blocks = [block[1] for block in markdown.BLOCK.finditer((DOCS / "loops.md").read_text(encoding="utf-8"))]
    [shared] = [block for block in blocks if "def neighbours" in block]
    [loop] = [block for block in blocks if "Accelerator(" in block]
    check = "assert scheduler.get_last_lr() == [0.0] and method.steps == steps == 2\nassert len(batches) == 2\n"
    (tmp_path / "loop.py").write_text(shared + loop + check + 'accelerator.print("done")\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "loop.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "done"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as the site makes them."""
    headings = re.findall(r"^#{1,3} (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target
    for path in re.findall(r"`((?:examples|benchmarks|tests|cgh|docs)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_dark_drawings_are_the_light_ones_in_other_colours() -> None:
    spec = importlib.util.spec_from_file_location("darken", DOCS / "images" / "darken.py")
    assert spec is not None
    assert spec.loader is not None
    darken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(darken)
    for drawing in darken.DRAWINGS:
        light, dark = ((DOCS / "images" / f"{drawing}{end}.svg").read_text(encoding="utf-8") for end in ("", "-dark"))
        assert darken.darken(light, drawing in darken.MAPS) == dark
        for text in (light, dark):
            xml.dom.minidom.parseString(text)  # a browser shows nothing of what is not well formed
        assert not set(darken.DARK) & set(re.findall(r"#[0-9a-f]{6}", dark))
