"""Registers, spills and shared memory of the CUDA kernels, by compiling them; no GPU is needed.

python benchmarks/kernels.py            # some minutes; --help for the options

Compiles the kernels of the losses for a compute capability at several widths, that of a relation with the tiling that
it takes there: the first whose program fits. NVIDIA's assembler, which comes with Triton, says what a thread and a
program need.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
import tyro
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cgh import kernels

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability times ten."""


@dataclass
class Config:
    """Compile the kernels and print what they need."""

    capabilities: tuple[int, ...] = (80, 90)
    """Compute capabilities, times ten: 80 is A100, 86 and 89 are GPUs for desktops, 90 is H100."""
    dims: tuple[int, ...] = (128, 512)
    """Widths of the embeddings, D."""
    banks: tuple[str, ...] = ("bf16", "fp32")
    """Dtypes of the banks; products are in bfloat16."""


@dataclass
class Needs:
    """What a compiled kernel needs."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's registers that are kept in memory."""
    shared: int
    """Bytes of a program."""
    tensor_cores: str
    """The instruction that multiplies."""


def taken(capability: int, dim: int, bank: str, same: bool) -> tuple[kernels.Tiling, Needs]:
    """Return the tiling of the relation kernel at one size, the first that fits, and what it needs."""
    for tiling in kernels.tilings(256, dim, dim, same, int(bank[2:]) // 8, SHARED[capability]):
        needs = relation(capability, dim, bank, same, tiling)
        if needs.shared <= SHARED[capability]:
            return tiling, needs
    raise ValueError(f"no tiling fits compute capability {capability / 10} and embeddings of width {dim}")


def relation(capability: int, dim: int, bank: str, same: bool, tiling: kernels.Tiling) -> Needs:
    """Return what the relation kernel needs at one size, in one tiling."""
    constants = {
        "SAME": same,
        "CENTRED": False,
        "WIDTH": dim,
        "TARGET_WIDTH": dim,
        "D": kernels.padded(dim),
        "E": tiling.columns,
        "ROWS": tiling.rows,
        "BANK_ROWS": tiling.bank_rows,
    }
    pointers = {"query": "*bf16", "bank": f"*{bank}", "target": f"*{bank}"}
    return compiled(kernels._relate, capability, constants, pointers, num_warps=tiling.warps, num_stages=tiling.stages)


def loss(name: str, capability: int, dim: int) -> Needs:
    """Return what the kernel that ends a loss needs, where a bank is read in as many parts as on an H100."""
    constants = {"WIDTH": dim, "D": kernels.padded(dim), "TILE": kernels.TILE, "PARTS": 64}
    if name == "_infonce":
        return compiled(kernels._infonce, capability, constants, {}, num_warps=4)
    constants["OTHER_PARTS"] = 64
    return compiled(kernels._cross_entropy, capability, constants, {"query": "*bf16"}, num_warps=4)


def compiled(
    function: Any, capability: int, constants: dict[str, Any], pointers: dict[str, str], **options: int
) -> Needs:
    """Return what a kernel needs; pointers are of float32, but for those named."""
    tensors = ("query", "centre", "positive", "values", "gradient")
    sums = ("maximum", "total", "sums")
    pointers = dict.fromkeys((*tensors, *sums, *(f"other_{name}" for name in sums)), "*fp32") | pointers
    kinds = {
        name: "constexpr" if name in constants else (pointers | {"scale": "fp32"}).get(name, "i32")
        for name in function.arg_names
    }
    # Pointers and sizes that 16 divides, as they are in a training run.
    divided = {
        (number,): [["tt.divisibility", 16]]
        for number, kind in enumerate(kinds.values())
        if kind not in ("constexpr", "fp32")
    }
    names = list(kinds)
    source = ASTSource(function, kinds, {(names.index(k),): v for k, v in constants.items()}, divided)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Needs(*assembled(kernel.asm["ptx"], capability), kernel.metadata.shared, instruction(kernel.asm["ptx"]))


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers and the bytes spilled of a thread."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [str(assembler), "-v", "-arch", architecture, str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr  # noqa: S603, a list of our own
    return int(found(r"Used (\d+) registers", said)), int(found(r"(\d+) bytes spill stores", said))


def found(pattern: str, text: str) -> str:
    """Return what the pattern's group holds."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the assembler's words are not those of a version that is known: {text}")
    return match[1]


def instruction(ptx: str) -> str:
    """Return the instruction that tensor cores are used by."""
    return next((name for name in ("wgmma", "mma.sync") if name in ptx), "none")


def main(config: Config) -> None:
    """Print two tables."""
    console = Console(width=140)
    table = Table(title="relation kernel, bfloat16 products")
    for column in ("capability", "D", "bank", "mean row of", "rows x bank rows x columns, stages, warps"):
        table.add_column(column)
    for column in ("registers", "spilled, B", "shared, KiB", "products by", "compiled in, s"):
        table.add_column(column, justify="right")
    for capability, dim, bank, same in product(config.capabilities, config.dims, config.banks, (True, False)):
        start = time.perf_counter()
        tiling, needs = taken(capability, dim, bank, same)
        table.add_row(
            f"{capability / 10}",
            f"{dim:,}",
            bank,
            "its own bank" if same else "another",
            f"{tiling.rows} x {tiling.bank_rows} x {tiling.columns}, {tiling.stages}, {tiling.warps}",
            str(needs.registers),
            str(needs.spilled),
            f"{needs.shared / 1024:.0f}",
            needs.tensor_cores,
            f"{time.perf_counter() - start:.0f}",
        )
    console.print(table)
    table = Table(title="kernels that end a loss")
    for column in ("capability", "D", "kernel"):
        table.add_column(column)
    for column in ("registers", "spilled, B", "shared, KiB"):
        table.add_column(column, justify="right")
    for capability, dim, name in product(config.capabilities, config.dims, ("_cross_entropy", "_infonce")):
        needs = loss(name, capability, dim)
        figures = (needs.registers, needs.spilled, round(needs.shared / 1024))
        table.add_row(f"{capability / 10}", f"{dim:,}", name, *map(str, figures))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
