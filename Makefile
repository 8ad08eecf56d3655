# make demo         a prompt becomes outputs/demo.mp4, from nothing but Python and pip
# make install      install everything, the packages of training and tests too
# make test         install everything and run all tests but the slow ones (make test-slow runs those), in PROCESSES=2
# make test-crash   kill a rank at a hundred file operations of a save, each time go on
# make test-slurm   the job scripts on a real Slurm cluster that is started here (root; installs Debian's slurm-wlm)
# make lint         ruff, format, types, shellcheck
# make bench-digits train and measure the diffusion core on handwritten digits (46 minutes of two cores; goes on where it
#                   was stopped); writes docs/core-results.md
# make bench-network our U-Net against those of diffusers, paired in one run; writes docs/network-speed.md
# make bench-train  our training loop against plain PyTorch and accelerate; writes docs/training-speed.md
# make bench-metrics our metrics of feature sets against torchmetrics; writes docs/metrics-speed.md
# make bench-data   measure the loader against bare decoders and plain webdataset; writes docs/data-speed.md
# make bench-ablations the recipe's choices, each made otherwise, after runs/demo; writes docs/ablations.md
# make bench-two    train and judge a model of two objects (hours of a CPU); writes docs/two-objects.md
# make bench-model  what the bundled model has learned, and how many steps it takes; writes docs/demo-model.md
# make demo-model   train the bundled model again by its recorded recipe (hours on a CPU; run it again to go on);
#                   INSTALL=1 puts the result in the place of the bundled one
# make clean        remove what was built; runs/ and outputs/ stay

PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
PROMPT ?= a large red circle moving left on a white background

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch goes first and by its exact version: an unpinned one may bring gigabytes of CUDA packages that a CPU can't use.
TORCH := $(shell sed -n 's/^\(torch==[^; ]*\).*/\1/p' constraints.txt)

.PHONY: demo install demo-model bench-digits bench-network bench-train bench-data bench-metrics bench-model bench-ablations bench-two test test-slow test-crash test-slurm lint clean

demo: $(VENV)/.demo
	@mkdir -p outputs
	$(BIN)/videodiff generate "$(PROMPT)" -o outputs/demo.mp4
	@echo "The video: $(CURDIR)/outputs/demo.mp4; its first image and its settings lie beside it."

install: $(VENV)/.all

demo-model: $(VENV)/.all
	$(BIN)/python -m stages.demo_model --out runs/demo $(if $(INSTALL),--install)

bench-digits: $(VENV)/.all
	$(BIN)/python -m benchmarks.digits

bench-network: $(VENV)/.all
	$(BIN)/python -m benchmarks.network --out docs/network-speed.md

bench-train: $(VENV)/.bench
	$(BIN)/python -m benchmarks.train --out docs/training-speed.md

bench-model: $(VENV)/.all
	$(BIN)/python -m benchmarks.model --out docs/demo-model.md

bench-ablations: $(VENV)/.all
	$(BIN)/python -m benchmarks.ablations --out docs/ablations.md

bench-two: $(VENV)/.all
	$(BIN)/python -m benchmarks.two_objects --out docs/two-objects.md

bench-data: $(VENV)/.bench
	$(BIN)/python -m benchmarks.data --out docs/data-speed.md

bench-metrics: $(VENV)/.all
	$(BIN)/python -m benchmarks.metrics --out docs/metrics-speed.md

test: $(VENV)/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile

test-slow: $(VENV)/.all
	$(BIN)/python -m pytest -q -m slow

test-crash: $(VENV)/.all
	$(BIN)/python -m pytest -q -m crash

SLURM_PACKAGES := slurm-wlm munge iproute2
test-slurm: $(VENV)/.all
	@if ! PATH="$$PATH:/usr/sbin:/sbin" sh -c 'for c in slurmctld slurmd munged sbatch ip; do command -v $$c; done' | \
	  awk 'END {exit NR < 5}'; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(SLURM_PACKAGES); \
	  else \
	    echo "test-slurm: Slurm is missing; install $(SLURM_PACKAGES) (Debian's names), and run this as root" >&2; exit 1; \
	  fi; \
	fi
	$(BIN)/python -m pytest -q -m slurm

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy videodiff
	$(BIN)/shellcheck -x slurm/*.sbatch slurm/*.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

# Both installs are editable, so the command always runs the code of this folder.
$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/.all: pyproject.toml $(VENV)/.torch
	$(PIP) install -e '.[train,dev]' -c constraints.txt
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml $(VENV)/.torch
	$(PIP) install -e '.[bench]' -c constraints.txt
	@touch $@ $(VENV)/.all $(VENV)/.demo
