"""The command `rlloop`: one subcommand for each algorithm. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import shlex
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlloop import __version__
from rlloop.errors import ConfigError, EngineError, RankDied, RlloopError, Stopped

if TYPE_CHECKING:
    from rlloop.config import TrainingSettings
    from rlloop.run import SettingsT

ALGORITHMS = "rlloop.algorithms"  # a name, not an import: the library knows no algorithm
_EXCLUSIVE = ("--overwrite", "--no-overwrite", "--resume", "--no-resume")


def main(argv: list[str] | None = None) -> int:
    """Run `rlloop ALGORITHM [flags]`; returns the exit status: 0 done, 1 failed, 2 bad settings, 129 and more stopped."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"rlloop {__version__}\n")
        return 0
    from rlloop.flags import parse  # and pydantic, which the usage need not wait for

    assert logging.lastResort is not None
    # This handler writes to what is sys.stderr at that moment: while there is a live table, to what prints above it.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[logging.lastResort])
    try:
        algorithm = _algorithm(arguments[0])
        settings, dry_run = parse(algorithm.Config, arguments[1:], f"rlloop {arguments[0]}")
        if dry_run:
            sys.stdout.write(settings.to_toml())
            return 0
        before = _attempt(settings)
        algorithm.main(settings)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Stopped as stop:
        again = f"; continue with: rlloop {shlex.join(_resumed(arguments))}" if _attempt(settings) != before else ""
        cause = stop.__cause__
        with suppress(OSError):  # of a terminal that is gone
            sys.stderr.write(f"{stop}{again}\n")
            # A signal to the whole process group ends engine and ranks, too; another error was there before, or came on the way.
            if isinstance(cause, RlloopError) and not isinstance(cause, EngineError | RankDied):
                sys.stderr.write(f"it also failed, before or while it ended: {cause}\n")
        return stop.exit_code
    except RlloopError as error:
        sys.stderr.write(f"error: {error}\n")
        if _attempt(settings) == before:  # what is there is another run's, if anything
            return 2
        sys.stderr.write(f"run directory: {settings.run_dir} (logs/ has what engine, trainer and rewards said)\n")
        return 1
    return 0


def entry_point(name: str, train: Callable[[SettingsT, str], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The `main(settings=None)` of the algorithm `name`, from its `train(settings, marker)`."""

    def run_algorithm(settings: SettingsT | None = None) -> None:
        """Train; without settings, with those of the command line. Raises RlloopError."""
        if settings is None:
            sys.exit(main([name, *sys.argv[1:]]))
        from rlloop.run import run

        run(train, settings)

    return run_algorithm


def _algorithm(name: str) -> ModuleType:
    if name not in _names():
        raise ConfigError(f"expected an algorithm ({', '.join(_names())}), got {name!r}; see rlloop --help")
    return importlib.import_module(f"{ALGORITHMS}.{name}")


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(ALGORITHMS).__path__)]


def _resumed(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    for before, argument in pairwise(["", *arguments]):
        is_value = before in _EXCLUSIVE and argument.lower() in ("true", "false", "1", "0")
        if argument.partition("=")[0] not in _EXCLUSIVE and not is_value:
            kept.append(argument)
    return [*kept, "--resume"]


def _attempt(settings: TrainingSettings) -> int | None:
    """Changes when a run opens its directory."""
    from rlloop.run_directory import ATTEMPT

    with suppress(OSError):  # of a file that is not there, or cannot be looked at
        return (settings.run_dir / ATTEMPT).stat().st_mtime_ns
    return None


def _usage() -> str:
    lines = "\n".join(f"  {name}" for name in _names())
    return (
        f"rlloop {__version__}: asynchronous RL post-training\n\n"
        f"usage: rlloop ALGORITHM [--config FILE] [flags]\n\nalgorithms:\n{lines}\n\n"
        "rlloop ALGORITHM --help lists every setting; --dry-run prints them as resolved.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
