import re
from pathlib import Path

from rlloop.tracking.keys import DOCUMENTED, OPTIONAL, markdown

ROOT = Path(__file__).parents[2]
CONTRACT = """
reward/mean reward/frac_zero_std completions/mean_length completions/clipped_ratio loss/policy policy/entropy policy/kl_ref
policy/clip_frac_low policy/clip_frac_high policy/sampler_kl_mean policy/sampler_kl_max policy/mismatch_ratio_mean
policy/mismatch_ratio_max async/staleness_mean async/staleness_max async/dropped_groups async/in_flight time/step
time/wait_rollouts time/forward_backward time/optimizer time/refit time/refit_stall time/trainer_idle_frac
time/engine_idle_frac perf/overlap_efficiency perf/gen_tokens_per_second perf/train_tokens_per_second perf/mfu
optim/grad_norm optim/lr optim/skipped_steps rollout/errors rollout/timeouts
"""


def test_the_contract_is_documented():
    assert set(CONTRACT.split()) <= set(DOCUMENTED)
    assert "reward/<fn>/mean" in OPTIONAL


def test_the_page_has_the_tables():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page.endswith(markdown()), "append rlloop.tracking.keys.markdown() to the introduction of docs/metrics.md"


def test_keys_are_slash_style_and_explained():
    for key, metric in DOCUMENTED.items():
        assert re.fullmatch(r"[a-z]+/[a-z_]+", key)
        assert metric.unit
        assert metric.meaning.endswith(".")
        assert "|" not in "".join(metric)


def test_the_terminal_shows_only_documented_metrics():
    source = (ROOT / "rlloop" / "tracking" / "terminal.py").read_text()
    shown = set(re.findall(r'show\("([^"]+)"', source)) | set(re.findall(r"show\('([^']+)'", source))
    assert len(shown) >= 10
    assert shown <= set(DOCUMENTED)
