# make reproduce | test | wheel | lint | lab | bench | gpu | lock | clean. Each target sets up what it needs; nothing is done twice.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: env gl reproduce test wheel lint lab bench gpu lock clean help

PYTHON  ?= python3
PROFILE ?= cpu
WORKERS ?= 2
DEVICE  ?= cuda
SIZE    ?= true
MINUTES ?= 8
WHEEL_PYTHON ?= python3.12
# Package index of torch. A smaller build without CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK  := requirements.lock
TORCH ?= $(shell grep -m 1 '^torch==' $(LOCK))
STAMP := $(VENV)/.installed
# Present while an installation is in progress: an interrupted one is deleted and repeated.
UNDER_WAY := $(VENV)/.under-way
GL := $(BIN)/python rvlm/envs/gl.py
CAN_APT := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends

# Threads that wait must not spin (two busy ones slow each other tenfold); SVT_LOG=1 silences the AV1 banner.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export TOKENIZERS_PARALLELISM := false
export SVT_LOG := 1
WITH_GL = export MUJOCO_GL="$$($(GL))";

help:
	@echo "make reproduce  every notebook, then the report in results/ (PROFILE=smoke|cpu|gpu|full, now $(PROFILE))"
	@echo "                DRY_RUN=1: what it would download, need and take"
	@echo "make test       the test suite            make lint   style, types, spelling"
	@echo "make lab        JupyterLab                make bench  benchmarks/"
	@echo "make gpu        real models on one card, offline, at most $(MINUTES) minutes: results/gpu"
	@echo "make wheel      the wheel in an empty environment"
	@echo "make env        only set up $(VENV)         make lock   resolve $(LOCK) anew from pyproject.toml"

env: $(STAMP) gl

$(STAMP): $(LOCK) pyproject.toml
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null && $(CAN_APT); then \
	  echo "env: installing python3-venv"; apt-get -qq update; $(APT) python3 python3-venv >/dev/null; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rvlm needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -n 1)" >&2; \
	  echo "name another one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install -y python3-venv" >&2; exit 1; }
	@if [ -e $(UNDER_WAY) ]; then echo "env: the last installation was cut short, starting anew"; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNDER_WAY)
	@if ! [ -x $(BIN)/pip ]; then echo "env: making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); fi
	@echo "env: installing $(TORCH)"; $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "env: installing $$(grep -c '==' $(LOCK)) packages of $(LOCK)"; $(PIP) install -r $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@rm $(UNDER_WAY) && touch $@ && echo "env: ready; source $(BIN)/activate puts rvlm on the path"

# Rendering without a screen: EGL, else OSMesa.
gl: $(STAMP)
	@if $(GL) >/dev/null 2>&1; then exit 0; fi; \
	if $(CAN_APT); then echo "gl: installing OpenGL for rendering without a screen"; apt-get -qq update; \
	  for packages in "libegl1 libgl1-mesa-dri" libosmesa6; do \
	    $(APT) $$packages >/dev/null || true; if $(GL) >/dev/null 2>&1; then exit 0; fi; done; fi; \
	$(GL) >/dev/null

reproduce: env
	@$(WITH_GL) $(BIN)/rvlm reproduce --profile $(PROFILE) $(if $(DRY_RUN),--dry-run) $(ARGS)

# One thread per process: at these model sizes two processes of one thread are faster than one process of two.
test: env
	@$(WITH_GL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Test the wheel in an empty environment outside the clone: by default on Python 3.12 if there is one, with the locked versions.
# tests/test_wheel.py tests 3.11 without installing anything again.
wheel: $(STAMP) gl
	@python=""; for name in $(WHEEL_PYTHON) "$$HOME"/.pyenv/versions/3.12.*/bin/python; do \
	  if [ -z "$$python" ] && "$$name" -c 'import ensurepip, venv' 2>/dev/null; then python="$$name"; fi; done; \
	if [ -z "$$python" ]; then echo "wheel: no Python 3.12 on this machine; tests/test_wheel.py has tried the wheel on this one"; exit 0; fi; \
	$(WITH_GL) dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; echo "wheel: on $$($$python --version), in an empty environment"; \
	git archive HEAD | tar -x -C "$$dir" --one-top-level=source; \
	$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w "$$dir" "$$dir/source"; \
	$$python -m venv "$$dir/venv"; pip="$$dir/venv/bin/python -m pip --disable-pip-version-check -qq"; \
	$$pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"; \
	$$pip install -c $(LOCK) "$$(ls "$$dir"/*.whl)[sim]"; \
	mkdir "$$dir/empty"; cp tests/installed.py "$$dir"; cd "$$dir/empty"; \
	HF_HUB_OFFLINE=1 "$$dir/venv/bin/python" "$$dir/installed.py" sim; "$$dir/venv/bin/rvlm" --version

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/codespell
	@git ls-files -z 'notebooks/*.ipynb' | xargs -0 -r $(BIN)/nbstripout --verify --keep-id

# JupyterLab on copies in artifacts/lab; options for JupyterLab: make lab ARGS="--no-browser --port 8899"
lab: env
	@$(WITH_GL) $(BIN)/rvlm lab $(ARGS)

bench: env
	@$(WITH_GL) export RVLM_RESULTS="$${RVLM_RESULTS:-results}"; for file in benchmarks/bench_*.py; do if [ -e "$$file" ]; then $(BIN)/python "$$file"; fi; done

# Without an environment of the clone it runs on PYTHON's own torch. To try the code: make gpu DEVICE=cpu SIZE=tiny
gpu:
	@python=$(BIN)/python; [ -x "$$python" ] || python=$(PYTHON); \
	HF_HUB_OFFLINE=1 "$$python" benchmarks/gpu.py --device $(DEVICE) --size $(SIZE) --minutes $(MINUTES) $(ARGS)

# Resolve the ranges of pyproject.toml and their dependencies in a separate environment. torch keeps its locked version,
# unless another is given: make lock TORCH=torch==2.14.0
# Not locked: torch's CUDA libraries, which depend on the build of torch.
lock:
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; echo "lock: resolving pyproject.toml"; \
	$(PYTHON) -m venv "$$dir/venv"; pip="$$dir/venv/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install "$(TORCH)"; \
	$$pip install -e '.[all,dev]'; \
	sed -n '/^#/p' $(LOCK) > "$$dir/lock"; \
	$$pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//' | grep -vE '^(nvidia|cuda|triton)' > "$$dir/all"; \
	grep '^torch==' "$$dir/all" >> "$$dir/lock"; grep -v '^torch==' "$$dir/all" | LC_ALL=C sort -f >> "$$dir/lock"; \
	cp "$$dir/lock" $(LOCK); echo "lock: $$(grep -c '==' $(LOCK)) packages"

clean:
	@rm -rf $(VENV) artifacts build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
