"""From the command line, and a file that it names, to settings."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from pydantic_config import ConfigFileError, cli

from rlloop.config import TABLE, SettingsT
from rlloop.errors import ConfigError


def parse(settings: type[SettingsT], args: list[str], prog: str) -> tuple[SettingsT, bool]:
    """Command line -> (settings, whether --dry-run was given).

    Flags win over `--config FILE`, which wins over defaults. Raises ConfigError, whose message names the flag, what was
    expected and what came; `--help` prints and exits.
    """
    dry_run = "--dry-run" in args or "--dry_run" in args
    rest: list[str] = []
    pending = iter([a for a in args if a not in ("--dry-run", "--dry_run")])
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name == "--config":
            file = value if equals else next(pending, None)
            if not file:
                raise ConfigError("--config: expected a TOML, YAML or JSON file, got nothing")
            _check_readable(file)
            rest += ["@", file]
        else:
            rest.append(argument)
    for flag, other in (("--resume", "--overwrite"), ("--overwrite", "--resume")):
        # They exclude each other, and a flag wins over a file.
        if _asks(rest, flag) and not any(argument.partition("=")[0] == other for argument in rest):
            rest.append(f"--no-{other[2:]}")
    epilog = (
        "\n\n--config FILE reads settings from a TOML file; flags win over it, and add to its tables. "
        "--dry-run prints the resolved settings."
    )
    try:
        resolved = cli(settings, args=rest, prog=prog, description=(settings.__doc__ or "").strip() + epilog)
    except ConfigFileError as error:
        raise ConfigError(_readable(str(error))) from error
    except AttributeError as error:  # pydantic_config asks what it read for its items
        if "@" not in rest:
            raise
        raise ConfigError(
            f"--config {rest[rest.index('@') + 1]}: expected a table of settings, got a file without one"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{rest[rest.index(error.doc) - 1]}: expected {TABLE}: {error} (got {error.doc!r})"
        ) from error
    return resolved, dry_run


def _check_readable(file: str) -> None:
    """A file that is not there is left to pydantic_config."""
    try:
        if Path(file).exists():
            Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: expected a TOML, YAML or JSON file, got {error}") from error


def _asks(arguments: list[str], flag: str) -> bool:
    """Whether a flag is given, with no value or one that stands for true."""
    for argument, after in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name == flag:
            return (value if equals else after).lower() not in ("false", "0", "no", "off", "f", "n")
    return False


def _readable(message: str) -> str:
    """pydantic_config's message, as one line for each setting that is wrong."""
    header, *lines = message.splitlines()
    if not header.startswith("Failed to validate config"):
        return message
    text = "\n".join(lines).replace("\n  ", ": ").replace("<root>: ", "").replace("Value error, ", "")
    return text.replace("Extra inputs are not permitted", "no such setting")
