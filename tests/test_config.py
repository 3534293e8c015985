import tomllib
from pathlib import Path

import pytest

from rlloop.cli import main
from rlloop.config import RunSettings
from rlloop.errors import ConfigError
from rlloop.flags import parse

# Arguments, and what the message must say: the flag, what was expected, what came.
BAD_FLAGS = {
    "unknown flag": ("--group_sise 4", "error: --group-sise: no such setting", "did you mean --group-size?", "got '4'"),
    "unknown nested flag": ("--engine.max-num-seq 4", "--engine.max-num-seq", "did you mean --engine.max-num-seqs?"),
    "no flag": ("4", "Unrecognized arguments: 4"),
    "no value": ("--num-steps", "--num-steps requires a value"),
    "no integer": ("--group-size many", "--group-size", "valid integer", "got 'many'"),
    "fraction": ("--seed 1.5", "--seed", "valid integer", "got '1.5'"),
    "too small": ("--group-size 0", "--group-size", "greater than or equal to 1", "got '0'"),
    "too large": ("--lora.rank 600", "--lora.rank", "less than or equal to 512", "got '600'"),
    "negative": ("--optim.lr -1", "--optim.lr", "greater than 0", "got '-1'"),
    "not a number": ("--optim.lr nan", "--optim.lr", "finite number", "got 'nan'"),
    "beta of 1": ("--optim.beta1 1", "--optim.beta1", "less than 1", "got '1'"),
    "greedy": ("--sampling.temperature 0", "--sampling.temperature", "greater than 0", "got '0'"),
    "share above 1": (
        "--engine.gpu-memory-utilization 1.1",
        "--engine.gpu-memory-utilization",
        "less than or equal to 1",
    ),
    "unknown trainer": ("--trainer.kind peff", "--trainer.kind", "'peft'", "got 'peff'"),
    "unknown choice": ("--on-stale skip", "--on-stale", "'correct', 'drop' or 'wait'", "got 'skip'"),
    "torn JSON": ("--env-args {x", "--env-args: expected a table", "got '{x'"),
    "JSON of another kind": ("--env-args [1]", "--env-args", "expected a table", "got [1]"),
    "no JSON": ("--env-args x", "--env-args", "expected a table", "got 'x'"),
    "null": ('--chat-template-kwargs {"tools":null}', "--chat-template-kwargs", "without null"),
    "no room": ("--sampling.max-tokens 512", "error: --sampling.max-tokens (512)", "--engine.max-model-len (512)"),
    "floor above the group": ("--environment.min-group-size 9", "--environment.min-group-size (9)", "--group-size (8)"),
    "cap below the bound": ("--staleness-cap 1", "--staleness-cap (1)", "at least --max-staleness (2)"),
    "cap of nothing": ("--staleness-cap 9 --on-stale drop", "--staleness-cap does nothing with --on-stale drop"),
    "an estimator of no penalty": ("--kl-estimator k1", "--kl-estimator: needs a --kl-coef above 0"),
    "an estimator of the reward's": ("--kl-estimator k1 --kl-coef 0.1 --kl-in reward", "in the reward it is k1"),
    "no correction": (
        "--correction.bound none --correction.level sequence",
        "--correction: with bound none nothing is corrected",
    ),
    "no engine": ("--placement.replicas 0", "--placement.replicas", "greater than or equal to 1", "got '0'"),
    "weights through a file": ("--refit.form full --refit.transport disk", "goes through memory", "--refit.transport"),
    "both at once": ("--resume --overwrite", "--resume and --overwrite exclude each other"),
    "no config": ("--config", "--config: expected a TOML, YAML or JSON file, got nothing"),
    "no such config": ("--config nope.toml", "Config file not found: nope.toml"),
    "a folder as config": ("--config /tmp", "--config /tmp: expected a TOML, YAML or JSON file, got [Errno 21]"),
    "no number": ('--env-args {"limit":1e400}', "--env-args", "without null, NaN and dates"),
}
BAD_FILES = {
    "unknown key": ("group_sise = 4", "--group-sise", "did you mean --group-size?", "got 4"),
    "unknown nested key": ("[engine]\nmax_num_seq = 4", "did you mean --engine.max-num-seqs?", "got 4"),
    "unknown table": ("[engines]\nmax_num_seqs = 4", "--engines: no such setting"),
    "no TOML": ("group_size = ", "Invalid TOML", "bad.toml", "Invalid value"),
    "no integer": ('group_size = "many"', "--group-size", "valid integer", "got 'many'"),
    "no table": ("engine = 3", "--engine", "valid dictionary", "got 3"),
    "no targets": ("[lora]\ntargets = []", "--lora.targets", "at least 1 item"),
}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What `rlloop grpo` says to settings that it must refuse before it starts anything."""
    assert main(["grpo", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_refused_by_name(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, *parts = BAD_FLAGS[case]
    message = refused(capsys, *arguments.split())
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_key(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, *parts = BAD_FILES[case]
    (tmp_path / "bad.toml").write_text(text)
    message = refused(capsys, "--config", str(tmp_path / "bad.toml"))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(("name", "text"), [("empty.yaml", "# nothing"), ("list.json", "[1]"), ("null.json", "null")])
def test_a_file_that_holds_no_table_is_refused(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    message = refused(capsys, "--config", str(tmp_path / name), "--seed", "1")
    assert f"{name}: expected a table of settings" in message


def test_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings, _ = parse(RunSettings, ["--run-dir=~/runs/x", "--init-adapter", "~/adapter"], "rlloop")
    assert (settings.run_dir, settings.init_adapter) == (Path("/home/somebody/runs/x"), Path("/home/somebody/adapter"))
    assert "~" not in settings.to_toml()


def test_every_error_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--group-size", "0", "--optim.lr", "0")
    assert "--group-size" in message
    assert "--optim.lr" in message


def test_what_dry_run_prints_is_a_config_of_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *("--env-args", '{"max_operand": 20, "operators": "+-"}', "--lora.targets", "q_proj, v_proj,"),
        *("--engine.max_num_seqs", "7", "--optim.lr", "3e-5", "--staleness-cap", "5", "--tracking.tensorboard"),
        *("--run_dir", str(tmp_path / "run"), "--clip-high", "0.28"),
    ]
    assert main(["grpo", *flags, "--dry-run"]) == 0
    printed, _ = capsys.readouterr()
    file = tmp_path / "printed.toml"
    file.write_text(printed)
    assert main(["grpo", "--config", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    settings = tomllib.loads(printed)
    assert settings["env_args"] == {"max_operand": 20, "operators": "+-"}
    assert settings["lora"]["targets"] == ["q_proj", "v_proj"]
    assert settings["engine"]["max_num_seqs"] == 7
    assert settings["optim"]["lr"] == 3e-5
    assert settings["staleness_cap"] == 5
    assert settings["tracking"]["tensorboard"] is True
    assert settings["clip_high"] == 0.28
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("group_size = 4\nseed = 3\n[engine]\nmax_num_seqs = 5\nmax_model_len = 99\n")
    flags = ["--group-size", "6", "--engine.max_num_seqs", "7"]
    for args in (["--config", str(file), *flags], [*flags, f"--config={file}"]):
        settings, _ = parse(RunSettings, args, "rlloop")
        assert (settings.group_size, settings.seed, settings.num_steps) == (6, 3, 100)
        assert (settings.engine.max_num_seqs, settings.engine.max_model_len) == (7, 99)


def test_the_flag_resume_wins_over_overwrite_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("overwrite = true\n")
    for form in ("--resume", "--resume=True", "--resume=1", "--resume true"):
        settings, _ = parse(RunSettings, ["--config", str(file), *form.split()], "rlloop")
        assert (settings.resume, settings.overwrite) == (True, False)
    settings, _ = parse(RunSettings, ["--config", str(file), "--resume", "false"], "rlloop")
    assert (settings.resume, settings.overwrite) == (False, True)


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSettings().seed = 1


@pytest.mark.parametrize(
    ("settings", "num_slots", "limit", "num_versions"),
    [
        (RunSettings(groups_per_step=8, max_staleness=2), 24, 8, 10),
        (RunSettings(groups_per_step=8, max_staleness=2, on_stale="drop"), 24, 2, 4),
        (RunSettings(groups_per_step=3, max_staleness=0), 3, 0, 2),
        (RunSettings(groups_per_step=3, max_staleness=1, staleness_cap=3), 6, 3, 5),
        (RunSettings(groups_per_step=8, max_staleness=2, refit={"in_flight": "hop"}), 24, 8, 2),
    ],
)
def test_what_follows_from_staleness(settings: RunSettings, num_slots: int, limit: int, num_versions: int) -> None:
    assert (settings.num_slots, settings.staleness_limit, settings.num_versions) == (num_slots, limit, num_versions)


def test_the_quickstart_is_a_valid_config(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[1] / "examples" / "quickstart.toml"
    assert main(["grpo", "--config", str(quickstart), "--dry-run"]) == 0
    assert 'env = "arithmetic"' in capsys.readouterr().out


def test_an_empty_config_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="--config"):
        parse(RunSettings, ["--config="], "rlloop")


def test_rewards_are_an_argument_of_the_environment() -> None:
    settings, _ = parse(RunSettings, ["--rewards", "a:b,c:d", "--env-args", '{"path": "x"}'], "rlloop")
    assert settings.all_env_args == {"path": "x", "rewards": ["a:b", "c:d"]}
    assert RunSettings().all_env_args == {}
