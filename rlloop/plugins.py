"""Objects that users name by where they are defined: `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from typing import Any

from rlloop.errors import ConfigError


def load_object(path: str) -> Callable[..., Any]:
    """The class or function `package.module:name`.

    The working directory is searched after the installed packages, so `mine:reward` finds `./mine.py`. Raises ConfigError,
    which says what is missing.
    """
    module_name, _, name = path.partition(":")
    if not is_path(path):
        raise ConfigError(f"expected package.module:name, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        # The module itself is missing, rather than one that it imports.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"neither the installed packages nor {os.getcwd()} have a module {error.name}"
        raise ConfigError(f"{path} cannot be imported: {reason}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"module {module_name} has no function or class {name}{suggest(name, dir(module))}")
    return found


def check_installed(*packages: str) -> None:
    """Raise ConfigError for those that an extra brings, and that are not there."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ConfigError(
            f"{' and '.join(missing)} cannot be found: pip install 'rlloop[gpu]', or, on a CPU, make install in a checkout"
        )


def is_path(name: str) -> bool:
    """Whether it has the form `package.module:name`."""
    module_name, colon, attribute = name.partition(":")
    return bool(module_name and colon and attribute)


def name_or_path(value: str, names: Collection[str]) -> str:
    """The value, if it is one of the names or has the form `package.module:name`; raises ValueError."""
    if value not in names and not is_path(value):
        raise ValueError(f"expected {', '.join(names)} or package.module:name{suggest(value, names)}")
    return value


def suggest(name: str, names: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
