# Two commands on a fresh machine: `make demo` (the main job) and `make test` (what CI runs). Both build .venv first.
.PHONY: help install constraints demo results evidence test test-vllm bench-vllm nightly lab docs figures bench testbed wheel

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check
OVERLAY := build/oldest
BENCH   ?= --again

help:
	@echo "make install   .venv with everything (again only when settings.ini, setup.py or constraints.txt change)"
	@echo "make constraints  the newest versions of everything, and constraints.txt with them"
	@echo "make demo      probe -> boundaries -> schedule -> pruned answers -> figures, into build/demo"
	@echo "make results   the demo of all testbeds again, into data/ (profiles, schedules, results; then: make figures)"
	@echo "make evidence  all that rests on the testbeds' weights again, into data/ (some hours, with -j2 half; goes on where it was; then: make figures)"
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
$(STAMP): settings.ini setup.py constraints.txt
	@echo "installing into $(VENV) (some minutes, 6 GB, the first time)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -c constraints.txt torch torchvision
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

constraints: install
	$(PIP) --upgrade --upgrade-strategy eager -e '.[dev]'
	$(PY) tests/pins.py newest > constraints.txt
	@touch $(STAMP)

# The oldest supported versions as an overlay on the same torch: a folder for PYTHONPATH, not a second environment.
$(OVERLAY)/.installed: settings.ini tests/pins.py | $(STAMP)
	@rm -rf $(OVERLAY) && mkdir -p $(OVERLAY)
	$(PY) tests/pins.py oldest > $(OVERLAY)/pins.txt
	$(PIP) --no-deps --only-binary :all: --target $(OVERLAY) -r $(OVERLAY)/pins.txt
	@touch $@

demo: install
	$(VENV)/bin/seats demo --out build/demo --overwrite

# A demo ends with exit code 1 where it differs from data/, which is what renewing is for; so its files decide, all or none.
RESULTS = profiles/$$name.nc results/$$name.json results/kept_$$name.json $(foreach t,35 25 15 10,schedules/$${name}_trr$(t).json)
results: install
	rm -rf build/results
	for name in testbed testbed-qwen3 testbed-gemma4; do \
		$(VENV)/bin/seats demo --model $$name --out build/results/$$name; \
		(cd build/results/$$name && ls $(RESULTS) && tar cf - $(RESULTS) | tar xf - -C ../../../data) || exit 1; \
	done

evidence: $(addprefix evidence-,testbed testbed-qwen3 testbed-gemma4)
evidence-%: install
	sh tests/evidence.sh $*

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
	for family in qwen2.5-omni qwen3-omni gemma4; do $(VENV)/bin/seats train-testbed --config $$family --out build/testbed/$$family || exit 1; done

# setuptools builds in build/lib and ships whatever an earlier build left there.
wheel: install
	rm -rf build/lib build/bdist.*
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
