# Each target makes the environment it needs; a fresh machine needs Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The oldest TRL that is supported, and the only one with a PPO trainer to compare with.
VENV_TRL112 := .venv-trl112
VENV_VLLM := .venv-vllm
VENV_WANDB := .venv-wandb
VENV_QLORA := .venv-qlora
# In as many processes as that; `WORKERS=0` for one that a debugger can stop.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-trl112 test-vllm test-wandb test-qlora lint docs release-check clean

demo: $(VENV)/installed
	$(BIN)/trl-klx starter --output_dir runs/starter
	$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process 1 --config_file recipes/accelerate/cpu.yaml \
		scripts/grpo.py --config recipes/starter/grpo_exact_both_pid.yaml

test: $(VENV)/installed
	$(BIN)/python $(PYTEST)

test-trl112: $(VENV_TRL112)/installed
	$(VENV_TRL112)/bin/python $(PYTEST) -m trl

# A real vLLM engine on CPU. One process: it takes 2 GB.
test-vllm: $(VENV_VLLM)/installed
	$(VENV_VLLM)/bin/python -m pytest --confcutdir tests/engine tests/engine

# wandb, offline.
test-wandb: $(VENV_WANDB)/installed
	$(VENV_WANDB)/bin/python -m pytest --confcutdir tests/trackers tests/trackers/wandb_offline.py

# bitsandbytes on the CPU, and policies in 4 bits.
test-qlora: $(VENV_QLORA)/installed
	$(VENV_QLORA)/bin/python -m pytest --confcutdir tests/quantised tests/quantised/qlora.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every warning is an error: a broken link, a page that no list has, a docstring that does not parse.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --builder html docs docs/_build/html

# What is about to be published, installed and used as by a stranger: see CONTRIBUTING.md.
release-check:
	$(PYTHON) scripts/release_check.py

# A build of torch for CPUs has no Triton, whose interpreter runs the kernels in the tests. Beside the packages, where
# nothing else finds it.
TRITON := triton==3.9.0

$(VENV)/installed: requirements.lock pyproject.toml
	$(call install,$(VENV),cat)
	@$(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton $(TRITON)
	touch $@

$(VENV_TRL112)/installed: requirements.lock pyproject.toml
	$(call install,$(VENV_TRL112),sed 's/^trl==.*/trl==1.12.0/')
	touch $@

# vLLM's pins are others than ours, and some of what it requires (torchvision, torchaudio) has no build that fits torch's
# for CPUs and is not imported: so without dependencies.
$(VENV_VLLM)/installed: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# wandb and what it needs, over the packages of the first environment.
$(VENV_WANDB)/installed: $(VENV)/installed
	$(call install_over,$(VENV_WANDB),wandb==0.31.0)
	touch $@

# bitsandbytes, 125 MB that every process would import: peft does where it is installed.
$(VENV_QLORA)/installed: $(VENV)/installed
	$(call install_over,$(VENV_QLORA),bitsandbytes==0.50.2)
	touch $@

# $(1) the environment, $(2) what it has beside the packages of the first
define install_over
	$(PYTHON) -m venv $(1)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
endef

# $(1) the environment, $(2) a filter of the pinned versions
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(1)
	$(2) requirements.lock > $(1)/requirements.lock
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(1)/requirements.lock
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
endef

clean:
	rm -rf $(VENV) $(VENV_TRL112) $(VENV_VLLM) $(VENV_WANDB) $(VENV_QLORA) runs docs/_build
