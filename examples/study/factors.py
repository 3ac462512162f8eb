"""What helps: one setting changed at a time, beside what a seed alone changes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods import METHODS, TARGETS, Settings
from results import add_rows, commit, markdown, mean_and_spread, read_rows

FACTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "target of the hypercolumn": tuple({"teacher_hypercolumn": x} for x in (0.02, 0.04, 0.08)),
    "target of the global context": tuple({"teacher_global": x} for x in (0.02, 0.04, 0.08)),
    "student's temperatures": tuple({"student_global": x, "student_hypercolumn": x} for x in (0.07, 0.15)),
    "warm-up, share of the steps": tuple({"warmup": x} for x in (0.1, 0.25, 0.5)),
    "teacher's momentum": ({"momentum": 0.96}, {"momentum": 0.99}, {"momentum_end": 1.0}),
    "layers": tuple({"layers": x} for x in (("layer4",), ("layer2", "layer3", "layer4"), ("layer2", "layer4"))),
    "width inside the heads": ({"hidden": 128}, {"hidden": 1024}),
    "both views by turns": ({"symmetric": True},),
    "rows of the memory": ({"memory_size": 512}, {"memory_size": 8192}),
}
"""What is changed, each from the same start."""


def measure(
    results: Path,
    method: str,
    start: Settings,
    noise_seeds: int,
    seeds: int,
    judge: Callable[[Settings, str, int], Mapping[str, Any]],
    names: Sequence[str] = tuple(FACTORS),
) -> None:
    """Add a row to `results` for each run of the start and of each change; what has a row is not repeated.

    Args:
        results: the CSV file.
        method: a name in `METHODS`.
        start: the settings that each change departs from.
        noise_seeds: runs of the start; its spread is the noise that a difference has to exceed.
        seeds: runs of each change.
        judge: from settings, the change in words and a seed to a run's figures.
        names: of the factors to change.

    Raises:
        ValueError: there is no such factor.
    """
    for name in names:
        if name not in FACTORS:
            raise ValueError(f"there is no factor {name!r}; there are {', '.join(map(repr, FACTORS))}.")
    commit()  # that which runs, whatever is committed until the last row
    trials: list[tuple[str, dict[str, Any], int]] = [("start", {}, noise_seeds)]
    for factor in names:
        trials += [(factor, change, seeds) for change in FACTORS[factor] if replace(start, **change) != start]
    for factor, change, count in trials:
        words = [f"{key} {' '.join(x) if isinstance(x, tuple) else x}" for key, x in change.items()]
        name = ", ".join(words) or "start"
        for seed in range(count):
            key = {"method": method, "factor": factor, "change": name, "seed": str(seed)}
            if not any(key.items() <= row.items() for row in read_rows(results)):
                add_rows(results, [{**key, **judge(replace(start, **change), name, seed)}])


def factors_table(rows: Sequence[Mapping[str, str]], judged: str, *others: str) -> str:
    """Return a table of what each change gives, less the start with the same seeds, and whether that exceeds the noise.

    The noise of a difference of means over `n` seeds is the start's standard deviation times `sqrt(2 / n)`; a change
    has moved `judged` where its difference is more than twice that.
    """
    columns, text = (judged, *others, *TARGETS), ""
    for method in dict.fromkeys(row["method"] for row in rows):
        changes: dict[tuple[str, str], dict[str, Mapping[str, str]]] = {}
        for row in rows:
            if row["method"] == method:
                changes.setdefault((row["factor"], row["change"]), {})[row["seed"]] = row
        start = {seed: float(row[judged]) for seed, row in changes["start", "start"].items()}
        noise = statistics.stdev(start.values()) if len(start) > 1 else math.nan
        cells = [[METHODS[method].title, "change", "seeds", *columns, "less the start", "moved"]]
        for (factor, change), runs in changes.items():
            values = [
                mean_and_spread([float(r[c]) for r in runs.values() if r[c]], 1 + (c in TARGETS)) for c in columns
            ]
            gains = [float(row[judged]) - start[seed] for seed, row in runs.items() if seed in start]
            gain = statistics.mean(gains)
            moved = "yes" if abs(gain) > 2 * noise * math.sqrt(2 / len(gains)) else "no"
            end = ["", f"(noise {noise:.1f})"] if factor == "start" else [f"{gain:+.1f}", moved]
            cells.append([factor, change, str(len(runs)), *values, *end])
        text += markdown(cells) + "\n"
    return text
