"""Registers, spills and shared memory of the CUDA kernels, by compiling them; no GPU is needed.

python benchmarks/kernels.py            # some minutes; --help for the options

Compiles the relation kernel for a compute capability at several widths, with the tiling that it takes there: the
first whose program fits. NVIDIA's assembler, which comes with Triton, says what a thread and a program need.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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
    """Compile the relation kernel and print what it needs."""

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
        needs = compiled(capability, dim, bank, same, tiling)
        if needs.shared <= SHARED[capability]:
            return tiling, needs
    raise ValueError(f"no tiling fits compute capability {capability / 10} and embeddings of width {dim}")


def compiled(capability: int, dim: int, bank: str, same: bool, tiling: kernels.Tiling) -> Needs:
    """Return what the relation kernel needs at one size, in one tiling."""
    pointers = dict.fromkeys(("centre", "maximum", "total", "sums"), "*fp32")
    pointers |= dict.fromkeys(("bank", "target"), f"*{bank}") | {"query": "*bf16"}
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
    names = list(kernels._relate.arg_names)
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    # Pointers and sizes that 16 divides, as they are in a training run.
    divided = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(names) if name not in constants}
    source = ASTSource(kernels._relate, kinds, {(names.index(k),): v for k, v in constants.items()}, divided)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )
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
    """Print a table."""
    table = Table(title="relation kernel, bfloat16 products")
    for column in ("capability", "D", "bank", "mean row of", "rows x bank rows x columns, stages, warps"):
        table.add_column(column)
    for column in ("registers", "spilled, B", "shared, KiB", "products by", "compiled in, s"):
        table.add_column(column, justify="right")
    for capability in config.capabilities:
        for dim in config.dims:
            for bank in config.banks:
                for same in (True, False):
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
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
