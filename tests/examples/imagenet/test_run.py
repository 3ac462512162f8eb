"""Ranks that are restarted meet anew, a folder has one run at a time, and errors that say what to do are one line."""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.examples.imagenet.runs import EXAMPLE

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("run")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# Meeting


def test_every_start_has_a_part_of_the_store_for_itself(run: ModuleType) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second", "third"):
            if start == "third":
                store.set("cgh/name/2", "one that was killed before anyone answered it")
            parts = [pool.submit(run.meet, store, rank, 3) for rank in (2, 1, 0)]
            own = [part.result(60) for part in parts]
            assert not own[0].check(["address"])  # where an earlier start left its own
            own[0].set("address", start)
            assert [part.get("address").decode() for part in own] == [start] * 3


def test_a_rank_that_does_not_come_is_told(run: ModuleType) -> None:
    with pytest.raises(TimeoutError, match=r"1 of 2 ranks have come in 0:00:01"):
        run.meet(dist.HashStore(), 0, 2, timedelta(seconds=1))


WORKER = """
import os, signal, sys
sys.path.insert(0, {example!r})
from run import join
import torch
import torch.distributed as dist
join("cpu")
total = torch.ones(())
dist.all_reduce(total)
rank = dist.get_rank()
first = {folder!r} + "/first"
if rank == 1 and not os.path.exists(first):
    open(first, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
with open({folder!r} + f"/rank {{rank}}", "w") as met:
    met.write(f"of {{int(total)}}")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("agents", [1, 2])
def test_restarted_ranks_meet_whatever_their_agents_have_counted(agents: int, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(example=str(EXAMPLE), folder=str(tmp_path)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={agents}", f"--nproc-per-node={2 // agents}"),
        *("--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", str(script)),
    ]
    started = [subprocess.Popen(command) for _ in range(agents)]
    assert [agent.wait(timeout=400) for agent in started] == [0] * agents
    assert [(tmp_path / f"rank {rank}").read_text() for rank in range(2)] == ["of 2"] * 2
    assert (tmp_path / "first").exists()


# The folder


def test_a_folder_is_locked_where_there_is_no_fcntl(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    locked: list[int] = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        if locked:
            raise PermissionError("another process has it")
        locked.append(descriptor)

    monkeypatch.setattr(run, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    first = run.Run(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match=r"is in use by process \d+ on .*: wait until that run ends"):
        run.Run(tmp_path).lock()


def test_what_asks_to_stop(run: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in run.STOP_SIGNALS}
    try:
        assert {signal.SIGTERM, signal.SIGINT} <= {*run.STOP_SIGNALS}
        stop = run.Stop()
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        assert "stopping after this step, to save; Ctrl-C again ends the run at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Errors


@pytest.fixture
def command(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    return importlib.import_module("command")


def _in_a_worker() -> None:
    from files import decode
    from torch.utils.data import DataLoader

    class Bad:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return decode(b"no image", "a.jpg")

    next(iter(DataLoader(Bad(), num_workers=1)))  # type: ignore[arg-type]


def _missing() -> None:
    Path("nowhere.txt").read_text()


def _ours() -> None:
    import cgh

    cgh.SplitBatchNorm2d(8, num_splits=0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (_ours, "script.py: num_splits is 0; it is 1 or more.\n"),
        (_missing, "script.py: [Errno 2] No such file or directory: 'nowhere.txt'\n"),
        (_in_a_worker, "script.py: a.jpg (8 bytes) cannot be decoded: no image format is known by it\n"),
    ],
)
def test_an_error_that_says_what_to_do_is_one_line(
    command: ModuleType, capfd: pytest.CaptureFixture[str], error: Any, line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.command(error)
    assert ended.value.code == 1
    assert capfd.readouterr().err == line


def test_any_other_error_keeps_its_traceback(command: ModuleType) -> None:
    import torch

    with pytest.raises(RuntimeError, match="shapes"):
        command.command(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(ValueError, match="sequence element #0 has length 0"):
        command.command(lambda: dict([()]))  # type: ignore[list-item]  # raised here, by no file of the project


def test_of_ranks_with_one_error_one_tells_it(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(command, "agents_store", lambda: store)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            command.command(_ours)
    assert capfd.readouterr().err.count("num_splits is 0") == 1


def test_an_interrupted_script_says_so(command: ModuleType) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted; started again with the same options"):
        command.command(interrupted)


# Windows


def test_every_script_is_imported_without_posix(tmp_path: Path) -> None:
    scripts = [path for folder in ("imagenet", "study") for path in (EXAMPLE.parent / folder).glob("*.py")]
    scripts += [EXAMPLE.parent / "quickstart.py", *(EXAMPLE.parent / "loops").glob("plain.py")]
    assert len(scripts) > 12
    code = f"""
import importlib.util, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp", "posix_ipc", "syslog"):
    sys.modules[name] = None
del signal.SIGUSR1, signal.SIGCHLD
import cgh
for path in {[str(path) for path in scripts]!r}:
    folder = path.rpartition("/")[0]
    for other in [n for n, m in sys.modules.items() if "/examples/" in (getattr(m, "__file__", "") or "")]:
        del sys.modules[other]
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("script", path)
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(folder)
import run
"""
    code = code.replace("import run\n", f"sys.path.insert(0, {str(EXAMPLE)!r}); import run; print(run.STOP_SIGNALS)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SIGUSR1" not in done.stdout
