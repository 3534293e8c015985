"""What is said of rollouts that fail."""

from string import ascii_letters

import pytest

from rlloop.failures import FailureLog
from rlloop.types import Failure


def test_each_reason_is_said_once_and_not_without_end(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog()
    log.report(7, [Failure("error", "score", "judge 503")] * 3)
    log.report(8, [Failure("error", "score", "judge 503"), Failure("error", "rollout", "judge 503")])
    first, second = caplog.messages
    assert first == "a rollout of task 7 has no reward: error in score: judge 503"
    assert second == "a rollout of task 8 has no reward: error in rollout: judge 503"
    log.report(9, [Failure("error", "score", f"judge {status}") for status in (404, 500)])  # as before, to a number
    assert len(caplog.messages) == 2
    for letter in ascii_letters[:30]:
        log.report(9, [Failure("error", "score", f"request {letter} failed")])
    assert len(caplog.messages) == 20
    assert caplog.messages[-1].endswith("request r failed (other reasons are only counted)")
