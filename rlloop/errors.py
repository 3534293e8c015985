"""Every error that rlloop raises on purpose.

    RlloopError
    ├── ConfigError          a setting is missing, unknown or out of range; the message names the flag
    ├── RunDirectoryError    the run directory is used, foreign, or holds nothing to resume
    ├── CheckpointError      a checkpoint could not be written, or none is sound
    ├── PromptTooLong        a prompt leaves no room for an answer; the loop drops it (rlloop.environment)
    ├── BadEnvironmentError  an environment cannot be found, built, or breaks its contract
    ├── EngineError          the engine died or refused a request
    ├── TrainerError         a trainer rank died or raised; carries the rank's traceback
    │   ├── RankDied         a process of the trainer is gone, or waits for one that has failed; names the rank
    │   ├── NonFiniteError   too many steps in a row had a non-finite loss or gradient
    │   ├── TornUpdate       an update failed between two of its optimizer steps; its weights are not saved
    │   └── Interrupted      a call to the trainer was ended because another came first (rlloop.trainer.ranks)
    ├── RefitError           an adapter did not arrive, or what arrived is not what was sent
    └── Stopped              Ctrl-C, SIGTERM or SIGHUP ended the run; what it had done is saved

A message says what was expected, what came, and what to do. Failures of one rollout (an environment that raises or times
out) are data, not errors: see `rlloop.types.Failure`.
"""

import signal


class RlloopError(Exception):
    """Base of all errors below."""


class ConfigError(RlloopError):
    """A setting is missing, unknown or out of range."""


class RunDirectoryError(RlloopError):
    """The run directory is used, foreign, or holds nothing to resume."""


class CheckpointError(RlloopError):
    """A checkpoint could not be written, or none of those that exist is sound."""


class BadEnvironmentError(RlloopError):
    """An environment cannot be found, built, or breaks its contract."""


class EngineError(RlloopError):
    """The engine died or refused a request."""


class TrainerError(RlloopError):
    """A trainer rank died or raised."""


class RankDied(TrainerError):
    """A process of the trainer is gone, or waits for one that has failed."""


class NonFiniteError(TrainerError):
    """Too many steps in a row had a non-finite loss or gradient."""


class TornUpdate(TrainerError):
    """An update failed between two of its optimizer steps: the weights are those of no policy version, and are not saved."""


class RefitError(RlloopError):
    """An adapter did not arrive, or what arrived is not what was sent."""


class Stopped(RlloopError):
    """Ctrl-C, SIGTERM or SIGHUP ended the run; what it had done is saved."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.exit_code = 128 + number


def first_error(error: BaseException) -> BaseException:
    """Of an error's groups the leaf that says most: an RlloopError among several, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, RlloopError)), leaves[0])


def one_line(error: BaseException) -> str:
    """What it says, for a message of one line."""
    return " ".join(str(error).split())
