"""Results as rows of a CSV file, each with the commit that made it: added, never overwritten; and tables of them."""

from __future__ import annotations

import csv
import io
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


@cache
def commit() -> str:
    """Return the short name of the commit that runs, with "+" where files differ from it, or "" outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def add_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, in one write, so that several processes can add to the same file.

    Raises:
        ValueError: the file has not got a column of a row.
    """
    rows = [{"commit": commit(), **row} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.exists():
        with path.open(newline="") as file:
            known = next(csv.reader(file), columns)
        columns, unknown = known, [name for name in columns if name not in known]
        if unknown:
            raise ValueError(f"{path} has no column {unknown[0]!r}; its columns are {known}. Give another file.")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def mean_curves(
    runs: Sequence[Sequence[Mapping[str, str]]], quantities: Sequence[str]
) -> dict[str, tuple[list[int], list[float]]]:
    """Return every quantity by epoch, the mean over runs that were evaluated at the same epochs."""
    epochs = [int(row["epoch"]) for row in runs[0]]
    return {
        f"{quantity}, %": (
            epochs,
            [statistics.mean(float(row[quantity]) for row in rows) for rows in zip(*runs, strict=True)],
        )
        for quantity in quantities
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a row need not have every column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, its first row the names of the columns."""
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    return "".join([lines[0], "| --- " * len(rows[0]) + "|\n", *lines[1:]])


def mean_and_spread(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """Return the mean and the standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean
