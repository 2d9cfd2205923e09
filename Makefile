# minippo: what can be made here
#
#   make demo         the whole of RLHF on the tiny world, ends with a table and a report
#   make seeds        the demo with four seeds, into runs/seed-0 ... runs/seed-3 (half an hour)
#   make hh           all stages on real rows: make hh HH_FILE=rows.jsonl.gz
#   make results      write docs/results.md from these runs; fails if a seed misses a bar
#   make data         rebuild data/: the packaged rows and every shipped checkpoint (40 minutes)
#   make test         everything that must hold: the next five, one after the other
#   make unit         the unit tests, two files at a time
#   make integration  whole commands, long trainings, installs, several processes, a browser
#   make notebooks    run the committed notebooks and compare their outputs
#   make exercises    run the exercise notebooks as a student gets them, unsolved
#   make staleness    check that the notebooks are what their sources say
#   make portable     run lessons and exercises with other kernels: the same numbers (13 minutes)
#   make minimums     unit tests and lessons with the lowest versions that pyproject.toml allows
#   make newest       the same with the newest of everything: make newest WITH_PYTHON=3.13
#   make mutants      put known wrong versions of the functions in place: each has to be noticed
#   make sabotage     spoil the package, thrice for each notebook: its outputs have to show it (25 minutes)
#   make mutation     change every operator and argument of formulas, rollout.py and ppo.py (20 minutes)
#   make bench        one PPO step beside TRL's, into docs/performance.md (20 minutes, 13 GB)
#   make equal-time   gold after equal seconds of PPO, minippo's and TRL's (20 minutes)
#   make changes      what each change for speed brings, into docs/performance.md (15 minutes, 13 GB)
#   make bounds       strain the reader and a long PPO run: each has a limit of memory (10 minutes)
#   make faults       kill a short demo 50 times, resume each, compare every byte (15 minutes)
#   make browser      run the notebooks in JupyterLab in Chromium; pictures go to pictures/
#   make cuda         what can only be tested where there is a CUDA device
#   make oracle       train_ppo against the exact optimum: 173 trainings (20 minutes)
#   make rebuild      run notebooks/src again and write the notebooks anew
#   make lint         ruff
#   make clean        remove .venv, .venv-* and caches (runs/ is kept)
#
# Where pip would fetch a CUDA build of torch and only the CPU is wanted, TORCH_FROM takes the
# options of pip install that name another index: make test TORCH_FROM="--index-url URL"

PYTHON ?= python3
TORCH_FROM ?=
TORCH := torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 15
NBVAL := MINIPPO_MINE=off $(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider
BUILT := $(wildcard notebooks/*.ipynb)
UNSOLVED := $(wildcard notebooks/exercises/*.ipynb)

# What torch, MKL and oneDNN use on old processors: float32 products have other last digits.
OTHER_KERNELS := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
WITH_PYTHON ?= 3.11

# Jupyter is to use the kernel of this .venv, even where a user has installed another "python3".
export JUPYTER_PREFER_ENV_PATH := 1

# $(call phase,name,command): runs the command, prints its seconds, keeps its exit status
define phase
@echo "== $(1)"; start=$$(date +%s); $(2); status=$$?; \
echo "== $(1): $$(($$(date +%s) - start)) s, exit status $$status"; exit $$status
endef

# Torch goes first and pinned, so that no later requirement can pull in another build of it.
define INSTALL
$(PYTHON) -m venv $(VENV) && \
$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_FROM) $(TORCH) && \
$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[course,test]' && \
touch $(STAMP)
endef

.NOTPARALLEL:
HH_FILE ?=
# Real HH-RLHF rows are long: these keep most of them.
HH_LIMITS := --max-prompt-tokens 384 --max-response-tokens 128

.PHONY: help demo seeds hh results data install test unit integration notebooks exercises staleness \
  portable portable-kernels portable-lessons portable-exercises minimums newest \
  mutants sabotage mutation bench equal-time changes bounds faults browser cuda oracle rebuild lint clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: install
	$(BIN)/minippo demo --overwrite

seeds: install
	for seed in 0 1 2 3; do \
	  $(BIN)/minippo demo --overwrite --name seed-$$seed --seed $$seed || exit 1; done

hh: install
	@test -f "$(HH_FILE)" || { echo "make hh needs HH_FILE=rows.jsonl.gz"; exit 2; }
	$(BIN)/minippo pretrain --overwrite --name hh --data $(HH_FILE) --steps 600 --n-positions 512
	$(BIN)/minippo sft --name hh --data $(HH_FILE) $(HH_LIMITS)
	$(BIN)/minippo reward --name hh --data $(HH_FILE) $(HH_LIMITS)
	$(BIN)/minippo ppo --name hh --data $(HH_FILE) $(HH_LIMITS) --steps 40 --batch-size 64 --kl-coef 0.1
	$(BIN)/minippo evaluate --name hh --data $(HH_FILE) $(HH_LIMITS)

results: install
	$(BIN)/python docs/make_results.py $(wildcard runs/seed-*) $(if $(wildcard runs/hh),--hh runs/hh)

data: install
	$(BIN)/minippo pretrain --overwrite --name shipped
	$(BIN)/minippo demo --name shipped
	$(BIN)/minippo data --checkpoints runs/shipped

test: install unit integration notebooks exercises staleness

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(call phase,install,$(INSTALL))

unit: install
	$(call phase,unit,$(PYTEST) -m "not integration" tests)

integration: install
	$(call phase,integration,$(PYTEST) -m integration tests)

mutants: install
	$(BIN)/python -m tests.mutants.run

sabotage: install
	$(BIN)/python -m tests.sabotage

mutation: install
	$(BIN)/python -m pip install --quiet -c constraints.txt mutmut
	$(BIN)/python -m tests.mutants.general

bench: BENCH = -m tests.benchmarks
equal-time: BENCH = -m tests.benchmarks.equal_time
changes: BENCH = -m tests.benchmarks.changes
bench equal-time changes: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python $(BENCH) --write

bounds: install
	$(BIN)/python -m tests.bounds

faults: install
	$(BIN)/python -m tests.faults --kills 50

browser: install
	$(BIN)/python -m tests.browser --out pictures

cuda: install
	$(BIN)/python -m pytest -q -m cuda tests/test_cuda.py

oracle: install
	$(BIN)/python docs/oracle_runs.py

notebooks: install
	$(if $(BUILT),$(call phase,notebooks,$(NBVAL) --nbval $(BUILT)),@echo "no notebooks")

exercises: install
	$(if $(UNSOLVED),$(call phase,exercises,$(NBVAL) --nbval-lax $(UNSOLVED)),@echo "no exercises")

staleness: install
	$(call phase,staleness,$(BIN)/python notebooks/build.py --check)

portable: portable-lessons portable-exercises

portable-kernels: install
	$(OTHER_KERNELS) $(BIN)/python -m tests.kernels

portable-lessons: portable-kernels
	$(call phase,portable lessons,$(OTHER_KERNELS) $(NBVAL) --nbval $(BUILT))

portable-exercises: portable-kernels
	$(call phase,portable exercises,$(OTHER_KERNELS) $(NBVAL) --nbval-lax $(UNSOLVED))

minimums: install
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/python -m tests.versions lowest

newest: install
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/python -m tests.versions newest --python $(WITH_PYTHON)

rebuild: install
	$(BIN)/python notebooks/build.py

lint: install
	$(BIN)/python -m pip install --quiet -c constraints.txt ruff
	$(BIN)/ruff check minippo tests notebooks docs

clean:
	rm -rf $(VENV) $(VENV)-* build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
