"""Ways in which files go wrong, drawn by hypothesis: bytes cut, swapped or replaced, and values of another kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, "", ".", "..", "/", "\0", "é\ud800", "x" * 5000]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut, with some swapped or replaced, or others altogether."""
    kind = draw(st.sampled_from(["cut", "other", "replaced", "swapped"]))
    place = st.integers(0, len(data) - 1)
    if kind == "cut":
        return data[: draw(place)]
    if kind == "other":
        return draw(st.binary(max_size=200))
    changed = bytearray(data)
    for at in draw(st.lists(place, min_size=1, max_size=20)):
        if kind == "replaced":
            changed[at] = draw(st.integers(0, 255))
        else:
            other = draw(place)
            changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


@st.composite
def broken_tree(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A copy of nested dictionaries and lists, one to three of whose entries are missing, renamed or something else."""
    tree = {"whole": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from([*_places(tree)]))
        kind = draw(st.sampled_from(["other", "other", "missing", "renamed"]))
        if kind == "other" or holder is tree:
            holder[key] = draw(values)
        elif kind == "missing":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = holder.pop(key)
        else:
            holder.append(holder[key])
    return tree["whole"]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of nested dictionaries and lists, as its holder and its key."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def feed(
    inputs: st.SearchStrategy[Any],
    write: Callable[[Any], object],
    read: Callable[[], object],
    folder: Path,
    record_property: Callable[[str, object], None],
    count: int = 500,
    errors: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> None:
    """Write inputs into a folder and read them: the errors are these, say which file it is, and no file is changed.

    Args:
        inputs: what is written.
        write: an input into the folder.
        read: what is there.
        folder: where all files are.
        record_property: pytest's, which sums the inputs up at the end.
        count: how many inputs.
        errors: those that are documented.
    """
    tried = refused = 0

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def check(value: Any) -> None:
        nonlocal tried, refused
        write(value)
        before = _files(folder)
        tried += 1
        said = None
        try:
            read()
        except errors as error:
            said = str(error)
        refused += said is not None
        assert said is None or str(folder) in said, "the error does not say which file it is"
        assert _files(folder) == before

    check()
    record_property("inputs", tried)
    assert refused > tried / 20


def _files(folder: Path) -> dict[Path, bytes]:
    """What is in every file of a folder, the index of tar shards aside, which is made by reading."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".npz"}
