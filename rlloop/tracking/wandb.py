"""Weights & Biases. Every call here may block for seconds: only to be used behind `Background`."""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlloop.config import TrainingSettings

RUN_ID = "wandb_run_id"
logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
INIT_SECONDS = 8.0
FINISH_SECONDS = 8.0


class Wandb:
    """One W&B run: metrics as curves over `step`, the completions of each step as a table."""

    def __init__(self, run: Any):
        self._run = run
        # The run's own counter cannot go back, which a resumed run does; curves over a metric can.
        run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self._run.log({"step": step, **metrics})

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One table."""
        from wandb import Table

        if rows:
            table = Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self._run.log({"step": step, "completions": table})

    def evaluation(self, policy_version: int, metrics: Mapping[str, float]) -> None:
        """One point per metric, at the step that made the version."""
        self.log(policy_version, metrics)

    def close(self) -> None:
        """Upload the rest, for FINISH_SECONDS at most."""
        import wandb

        self._run.finish()
        wandb.teardown()  # or its hook at the interpreter's exit would write to its service, which the run's end has killed


def open_wandb(settings: TrainingSettings, run_dir: Path, say: Callable[[str], None]) -> Wandb:
    """Start or resume the run whose id is in <run_dir>/wandb_run_id; offline where the server cannot be reached.

    An offline run has the same id, so that `wandb sync` later continues the curves of the online one.
    """
    # Its error reporting would hold the interpreter's exit for up to 30 s when the server hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # Silent: it would write into the live table, and ask for an API key on the terminal.
    base_url = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    arguments: dict[str, Any] = {
        "project": settings.tracking.wandb_project,
        "name": run_dir.resolve().name,
        "id": _run_id(run_dir),
        "resume": "allow",
        "dir": run_dir,
        "config": settings.model_dump(mode="json"),
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            # A run's end also ends wandb's service, and what that could not upload it must have written, for `wandb sync`.
            x_transaction_log_flush_interval=1.0,
        ),
    }
    if settings.tracking.wandb == "online":
        # wandb.init notices a server that hangs only after 18 s (10 s of login and its own timeout): ask first.
        problem = _unreachable(base_url)
        if problem is None:
            try:
                run = wandb.init(mode="online", **arguments)
            except wandb.errors.Error as error:
                problem = str(error)
                wandb.teardown()  # its service process goes on holding the run's id otherwise
            else:
                say(f"W&B: {run.url}")
                return Wandb(run)
        logger.warning("W&B at %s cannot be used (%s): offline; `wandb sync` uploads it later", base_url, problem)
    return Wandb(wandb.init(mode="offline", **arguments))


def _run_id(run_dir: Path) -> str:
    """The same for every attempt of a run."""
    file = run_dir / RUN_ID
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()


def _unreachable(base_url: str) -> str | None:
    """Why nobody answers at the server's API, or None. Any answer of a working server will do, a refusal too."""
    try:
        urllib.request.urlopen(f"{base_url.rstrip('/')}/graphql", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else str(error)
    except urllib.error.URLError as error:
        # wandb trusts other certificates than Python does: let it decide.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return None
