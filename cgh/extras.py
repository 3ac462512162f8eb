"""Packages that only some features need: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Return the module of an optional package.

    Raises:
        ImportError: it is not installed; the message is the command that installs it.

    Example:
        >>> from cgh.extras import require
        >>> require("json", extra="plot").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'this needs {package}, which is not installed: pip install "cgh-ssl[{extra}]"') from error
