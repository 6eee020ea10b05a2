# Two commands on a fresh machine: `make demo` (the main job) and `make test` (what CI runs). Both build .venv first.
.PHONY: help install demo test test-vllm bench-vllm nightly lab docs figures bench testbed wheel

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
OLDEST  := 5.17.0
OVERLAY := build/transformers-$(basename $(OLDEST))
BENCH   ?= --again

help:
	@echo "make install   .venv with everything (again only when settings.ini or setup.py change)"
	@echo "make demo      probe -> boundaries -> schedule -> pruned answers -> figures, into build/demo"
	@echo "make test      what CI runs; the last line counts passed and failed"
	@echo "make test-vllm the plug-in for vLLM, in an environment of its own (build/vllm); CI runs it as well"
	@echo "make nightly   the long version of the tests"
	@echo "make lab       JupyterLab on the notebooks (LAB=--no-browser and the like are passed on)"
	@echo "make docs      the site, in build/docs/site: notebooks, results, reference of the face"
	@echo "make figures   data/ -> figures/"
	@echo "make bench     time the stages on this machine, from the beginning (BENCH= goes on with an interrupted run)"
	@echo "make bench-vllm what the plug-in brings there"
	@echo "make testbed   train the embedded models again"
	@echo "make wheel     a wheel in dist/"

install: $(STAMP)

# The stamp is written last, so an interrupted installation is taken up again. A half-made environment (no pip) is made anew.
$(STAMP): settings.ini setup.py
	@echo "installing into $(VENV) (some minutes, 6 GB, the first time)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch torchvision
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The oldest supported transformers as an overlay on the same torch: a folder for PYTHONPATH, not a second environment.
$(OVERLAY)/.installed: | $(STAMP)
	@rm -rf $(OVERLAY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OVERLAY) transformers==$(OLDEST) "huggingface-hub>=1.5,<2"
	@touch $@

demo: install
	$(VENV)/bin/seats demo --out build/demo --overwrite

test: $(OVERLAY)/.installed
	$(PY) tests/run_all.py --overlay $(OVERLAY)

test-vllm:
	$(PYTHON) tests/run_vllm.py

bench-vllm:
	$(PYTHON) tests/run_vllm.py --bench

nightly: $(OVERLAY)/.installed
	$(PY) tests/run_all.py --overlay $(OVERLAY) --nightly

lab: install
	$(PY) -m jupyter lab --ServerApp.root_dir=. $(LAB) nbs/index.ipynb

docs: install
	$(PY) docs/build.py

figures: install
	$(VENV)/bin/seats figures --data data --out figures --overwrite

bench: install
	$(VENV)/bin/seats bench --out data/results $(BENCH)

testbed: install
	for family in qwen2.5-omni qwen3-omni; do $(VENV)/bin/seats train-testbed --family $$family --out build/testbed/$$family || exit 1; done

# setuptools builds in build/lib and ships whatever an earlier build left there.
wheel: install
	rm -rf build/lib build/bdist.*
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
