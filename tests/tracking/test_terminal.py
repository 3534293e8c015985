import io
from pathlib import Path

from rich.console import Console

from rlloop.tracking.terminal import NUM_ROWS, Terminal

METRICS = {
    "reward/mean": 0.5318,
    "loss/policy": -0.01234,
    "optim/grad_norm": float("nan"),
    "async/staleness_mean": 1.25,
    "async/staleness_max": 2.0,
    "async/in_flight": 24.0,
    "perf/gen_tokens_per_second": 1234.4,
    "perf/train_tokens_per_second": 567.0,
    "time/engine_idle_frac": 0.125,
    "time/trainer_idle_frac": 0.4,
    "time/step": 3.0,
}


def plain() -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    return Terminal(Path("runs/a"), 20, Console(file=out, width=80)), out


def test_one_plain_line_per_step():
    terminal, out = plain()
    terminal.status("waiting for rollouts [8/64]")
    terminal.log(17, METRICS)
    terminal.log(20, {})
    terminal.close()
    assert out.getvalue().splitlines() == [
        "waiting for rollouts [8/64]",
        "step 17/20  reward 0.532  loss -0.0123  grad norm nan  staleness 1.2 (max 2)  in flight 24  gen tok/s 1,234  "
        "train tok/s 567  engine idle 12%  trainer idle 40%  s/step 3.00  ETA 0:00:09",
        "step 20/20  ",
    ]


def test_a_run_without_an_engine_shows_what_it_has():
    terminal, out = plain()
    terminal.log(3, {"loss/policy": 1.5, "optim/grad_norm": 0.25, "time/step": 2.0})
    terminal.evaluation(3, {"eval/loss": 1.25})
    terminal.close()
    assert out.getvalue().splitlines() == [
        "step 3/20  loss 1.5000  grad norm 0.250  s/step 2.00  ETA 0:00:34",
        "version 3: loss 1.2500 on held-out rows",
    ]


def test_a_step_with_nothing_to_learn_from_does_not_look_like_a_failure():
    terminal, out = plain()
    nan = float("nan")
    metrics = {"reward/mean": 1.0, "reward/frac_zero_std": 1.0, "loss/policy": nan, "optim/grad_norm": nan}
    terminal.log(18, metrics | {"perf/train_tokens_per_second": nan})
    terminal.log(19, metrics | {"perf/train_tokens_per_second": 7.0})  # a critic learns from them
    terminal.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 18/20  reward 1.000  loss -  grad norm -  train tok/s -")
    assert second.startswith("step 19/20  reward 1.000  loss nan  grad norm nan  train tok/s 7")


def test_live_table_on_a_terminal():
    out = io.StringIO()
    terminal = Terminal(Path("runs/a"), 40, Console(file=out, width=160, force_terminal=True, _environ={}))
    terminal.status("starting engine")
    for step in range(1, 31):
        terminal.log(step, {**METRICS, "reward/mean": 0.5 + step / 1000})
    terminal.evaluation(30, {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.1, "eval/prompts": 8.0})
    terminal.close()
    text = out.getvalue()
    assert "version 30: reward 0.500" in text
    assert "\x1b[?25l" in text  # the cursor is hidden while it is live,
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and back after close
    last = text[text.rindex("runs/a") :]
    assert "step 30/40  ETA 0:00:30" in last
    rewards = [f"{0.5 + step / 1000:.3f}" for step in range(1, 31)]
    assert [reward for reward in rewards if reward in last] == rewards[-NUM_ROWS:]
    assert "starting engine" not in last


def test_status_is_seen_before_the_first_step():
    out = io.StringIO()
    terminal = Terminal(Path("runs/a"), 40, Console(file=out, width=100, force_terminal=True, _environ={}))
    terminal.status("starting [engine]")
    terminal._live.refresh()
    assert "starting [engine]" in out.getvalue()
    terminal.close()


def test_an_evaluation_is_a_line():
    terminal, out = plain()
    terminal.evaluation(4, {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.125, "eval/prompts": 16.0})
    terminal.close()
    assert out.getvalue() == "version 4: reward 0.500 ± 0.125 on 16 held-out prompts\n"


def test_rollouts_that_failed_are_shown():
    terminal, out = plain()
    terminal.log(1, {**METRICS, "rollout/errors": 2.0, "rollout/timeouts": 1.0})
    terminal.log(2, {**METRICS, "rollout/errors": 0.0, "rollout/timeouts": 0.0})
    found = {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.125, "eval/prompts": 16.0, "eval/failures": 4.0}
    terminal.evaluation(4, found)
    terminal.close()
    first, second, third = out.getvalue().splitlines()
    assert "  failed 3" in first
    assert "failed" not in second
    assert third.endswith("on 16 held-out prompts, 4 rollouts failed")


def test_what_is_said_stays_above_the_table():
    out = io.StringIO()
    terminal = Terminal(Path("runs/a"), 40, Console(file=out, width=160, force_terminal=True, _environ={}))
    terminal.say("W&B: https://wandb.example/[run]")
    terminal.status("starting engine")
    terminal.log(1, METRICS)
    terminal.close()
    assert out.getvalue().count("W&B: https://wandb.example/[run]\n") == 1
