"""Sessions: `python3 -m nox -s tests oldest lint types docs quickstart benchmarks gpu`; `--` passes the rest on."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

# PyTorch and its CUDA libraries take gigabytes, so every session that imports it shares one virtual environment, made
# on first use. It is the one that the README's test command makes.
ENVIRONMENT = Path(__file__).parent / ".venv-dev"
PYTHON = ENVIRONMENT / "bin" / "python"


def install(session: nox.Session, *packages: str) -> None:
    """Make the shared environment if there is none, and add packages to it."""
    if not PYTHON.exists():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT))
    session.run(str(PYTHON), "-m", "pip", "install", "--quiet", *packages)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests and the examples in docstrings; `-- -m slow` runs the slow ones."""
    install(session, "-e", ".[tests]")
    session.run(str(PYTHON), "-m", "pytest", *session.posargs)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Run the tests on the oldest Python and PyTorch that are supported, in an environment of their own."""
    session.install("--quiet", "-e", ".[tests]", "torch==2.6.*", "torchvision==0.21.*")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting; `ruff format .` and `ruff check --fix .` mend most of it."""
    session.install("--quiet", "ruff~=0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the library's types, strictly."""
    install(session, "-e", ".[tests]", "mypy~=2.4")
    session.run(str(PYTHON), "-m", "mypy", *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the site into `docs/_build/html`; a warning is an error, and so is a reference that leads nowhere."""
    install(session, "-e", ".[docs]")
    session.run(str(PYTHON), "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-E", "docs", "docs/_build/html")


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Pre-train on handwritten digits."""
    install(session, "-e", ".[examples]")
    session.run(str(PYTHON), "examples/quickstart.py", *session.posargs)


@nox.session(venv_backend="none")
def benchmarks(session: nox.Session) -> None:
    """Run every benchmark; `-- --quick` for a short look."""
    install(session, "-e", ".[tests]")
    for script in sorted(Path("benchmarks").glob("*.py")):
        session.run(str(PYTHON), str(script), *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Check and measure the library on a GPU, in four minutes; without one, what a CPU can show."""
    install(session, "-e", ".[tests]")
    session.run(str(PYTHON), "benchmarks/gpu.py", *session.posargs)
