"""A run that is killed again and again ends with the bits of one that was not; and a cluster's script drives it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cgh
from tests.examples.imagenet.runs import EXAMPLE, SMALL, Started, make_images, run, same, start_ranks, trained

pytestmark = [pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here"), pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tyro")
    pytest.importorskip("tensorboard")
    return make_images(tmp_path_factory.mktemp("images"))


def test_twenty_kills(root: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--root", root, "--epochs=6", "--log-steps=1"]
    start = time.monotonic()
    run([*options, "--folder", tmp_path / "whole", "--workers=0"], tmp_path / "output.txt")
    step_time = (time.monotonic() - start) / 48

    folder = tmp_path / "killed"
    options += ["--folder", folder, "--workers=1", "--checkpoint-steps=1"]
    moments, torn = random.Random(0), 0
    for kill in range(20):
        started = Started(options, tmp_path / "output.txt")
        if kill % 4:
            started.wait_for("step ")
            time.sleep(moments.uniform(0, 2 * step_time))
        else:  # while it starts, or resumes
            time.sleep(moments.uniform(0, 10 * step_time))
        started.kill_group()
        torn += bool(list(folder.glob(".checkpoint-next.pt.*.tmp")))
        if (folder / "checkpoint.pt").exists():
            assert cgh.checkpoint.load(folder / "checkpoint.pt")["step"] < 48
    assert torn  # kills came while a checkpoint was being written, too
    run([*options, "--checkpoint-steps=0"], tmp_path / "output.txt")
    assert same(trained(folder), trained(tmp_path / "whole"))
    assert not list(folder.glob(".*.tmp"))


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def process_of_rank(rank: int) -> int:
    """The process that `torchrun` started as that rank, the loader workers aside."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = Path(f"/proc/{parent}/cmdline").read_bytes()
            if (
                f"RANK={rank}".encode() in variables
                and b"CGH_TEST=1" in variables
                and b"torch.distributed.run" in command
            ):
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def test_the_slurm_script_requeues_and_torchrun_restarts_a_rank_that_dies(root: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--root", str(root), "--checkpoint-steps=2", "--epochs=4"]
    ranks = start_ranks(2, [*options, "--folder", tmp_path / "whole"], tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]

    # SLURM's commands, for one node; a signal to a job's steps reaches their first processes alone.
    commands = tmp_path / "bin"
    commands.mkdir()
    program(commands / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    program(commands / "srun", f'while [[ $1 == --* ]]; do shift; done; echo $$ >{tmp_path}/step; exec "$@"')
    program(commands / "scancel", f'kill "-${{1#--signal=}}" "$(cat {tmp_path}/step)"')
    program(commands / "scontrol", f"if [[ $1 == show ]]; then echo localhost; else touch {tmp_path}/requeued; fi")
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CGH_TEST": "1",
        "CGH_PROJECT": str(EXAMPLE.parents[1]),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = ["bash", EXAMPLE / "slurm.sh", *options, "--folder", tmp_path / "run", "--workers=1"]
    output = tmp_path / "output.txt"

    def submit(text: str) -> subprocess.Popen[bytes]:
        """Start the job and return once it has printed `text`."""
        with output.open("wb") as file:
            job = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        end = time.monotonic() + 600
        while text not in output.read_text():
            assert job.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.01)
        return job

    job = submit("step 2/32")
    job.send_signal(signal.SIGUSR1)
    job.wait(600)
    assert (tmp_path / "requeued").exists(), output.read_text()
    assert "stopped; start it again" in output.read_text()

    (tmp_path / "requeued").unlink()
    job = submit("step 14/32")
    os.kill(process_of_rank(1), signal.SIGKILL)
    assert job.wait(600) == 0, output.read_text()
    assert "step 32 of 32: finished" in output.read_text()
    assert not (tmp_path / "requeued").exists()
    assert same(trained(tmp_path / "run"), trained(tmp_path / "whole"))
