# rlloop on a Linux machine with Python >= 3.11 and make; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
MYPY := ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache
CODE := rlloop algorithms envs tests benchmarks examples scripts
BENCH ?= quickstart parity refit overlap against_trl cpu_lora loop_overhead on_stale

# Where it is set, as in many containers, each of a run's processes would compile vLLM and torch anew, for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test lint bench lock check-gpu-lock clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## Install torch (CPU), the lock and the wheel of this checkout into .venv; instant when nothing changed
	@$(PYTHON) scripts/install.py

quickstart: install  ## Train SmolLM2-135M-Instruct with GRPO for 30 steps, anew each time; more flags: ARGS="--seed 1"
	$(BIN)/rlloop grpo --config examples/quickstart.toml --overwrite $(ARGS)

# PYTHONSAFEPATH keeps the checkout off sys.path, also in the processes that tests start.
# Two processes, since a test of real processes waits for one core most of the time; a file's tests share one.
test: lint check-gpu-lock  ## Lint, types and the GPU lock, then all tests against the installed wheel; flags of pytest: ARGS="-k refit"
	PYTHONSAFEPATH=1 RLLOOP_EXPECT_WHEEL=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# mypy runs inside folders without rlloop/, or it would check the checkout's and not the installed one.
lint: install  ## ruff and mypy (strict)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	cd tests && $(MYPY) -p rlloop
	cd benchmarks && $(MYPY) *.py

bench: install  ## Run the benchmarks of a CPU (hours), or some: BENCH="refit parity"
	set -e; for name in $(BENCH); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

lock: install  ## Resolve requirements/cpu.txt anew from cpu.in and overrides.txt
	echo '# Made by `make lock` from cpu.in and overrides.txt. Install with --no-deps, after the CPU build of torch 2.13.0.' > requirements/cpu.txt.new
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 requirements/cpu.in \
		--override requirements/overrides.txt --no-annotate --no-header >> requirements/cpu.txt.new
	mv requirements/cpu.txt.new requirements/cpu.txt
	$(BIN)/python scripts/check_gpu_lock.py --write

check-gpu-lock: install
	$(BIN)/python scripts/check_gpu_lock.py

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
