# Every target makes .venv by itself. `make` alone lists the targets.
#   PYTHON=python3.11  the interpreter that makes .venv       NAME=03_layer_preference  one notebook
#   ARGS="-k sites"    further words for pytest               APTHORY_DATA=folder       images of the small suite
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# A worker for each core, of one thread: more threads than cores make tests wait for each other, several times as long.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --maxprocesses 8 --dist worksteal
SUITE := embedded
NOTEBOOKS_small := 03 04 06 08 09 10# the others draw on no real images
SCRATCH := build/notebooks-$(SUITE)

.DEFAULT_GOAL := help
.PHONY: help figures figure small gpu bench test test-all lint format notebooks-check graph clean venv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-16s %s\n", $$1, $$2}'

figures: venv ## compute the embedded suite anew: every notebook, record and figure (about 9 minutes)
	$(RUN) apthory run --suite embedded --fresh

figure: ## compute one notebook of the embedded suite anew: make figure NAME=03_layer_preference
	@test -n "$(NAME)" || { echo 'which notebook? make figure NAME=03_layer_preference' >&2; exit 2; }
	@$(MAKE) --no-print-directory venv
	$(RUN) apthory run $(NAME) --suite embedded --fresh

small: ## run the small suite on the images in APTHORY_DATA; resumes where it was stopped
	@test -d "$(APTHORY_DATA)" || { echo 'where are the images? make small APTHORY_DATA=folder' >&2; exit 2; }
	@$(MAKE) --no-print-directory venv
	APTHORY_DATA="$(abspath $(APTHORY_DATA))" APTHORY_WEIGHTS="$(abspath $(APTHORY_WEIGHTS))" \
	  $(RUN) apthory run --suite small

# Every step resumes where it was stopped, after an epoch, a cell or a notebook at most, so short leases will do:
# timeout -s INT 8m make gpu APTHORY_DATA=folder, again and again. Weights stay in checkpoints/, where they are not
# trained again (remove them there after a change of the recipe); the studies take the micro backbones that ship, so put
# new ones in their place first: apthory ship checkpoints/vit_micro/vit_micro.safetensors checkpoints/vit_micro/
# vit_micro.epoch-0005.safetensors checkpoints/resnet_micro/resnet_micro.safetensors (8 MB hold the epoch of one alone).
PRETRAIN = test -f checkpoints/$$name/$$name.safetensors || $(RUN) apthory pretrain $$name --data "$(APTHORY_DATA)" \
  --output checkpoints/$$name --epochs 120 --batch-size 512 --learning-rate 0.002 --randaugment 7 --mixup 0.2 \
  --keep 5 --note "Trained on Tiny-ImageNet (ImageNet images; the test images are its official validation \
  set): for non-commercial research."
HAS_GPU = 'import sys, torch; sys.exit(not torch.cuda.is_available())'

gpu: ## what wants a GPU: backbones, costs at the paper's shapes, five seeds, wider networks; resumes
	@test -d "$(APTHORY_DATA)" || { echo 'where are the images? make gpu APTHORY_DATA=folder' >&2; exit 2; }
	@$(MAKE) --no-print-directory venv
	@$(VENV)/bin/python -c $(HAS_GPU) || { echo 'torch sees no CUDA device; on CPUs these steps take weeks' >&2; exit 2; }
	for name in vit_micro resnet_micro; do { $(PRETRAIN); } || exit; done
	$(RUN) apthory run 07 --suite paper
	$(RUN) apthory sweep S5 --suite paper --data "$(APTHORY_DATA)"
	for name in vit_small_patch8_224 resnet50; do \
	  { $(PRETRAIN); } && cp checkpoints/$$name/$$name.safetensors checkpoints || exit; done
	$(RUN) apthory sweep wide --suite paper --data "$(APTHORY_DATA)" --weights checkpoints

bench: venv ## measure the prefix cache, steps on pixels, CKA and attention distance, side by side with the usual loops
	$(RUN) apthory bench
	$(RUN) apthory bench-pixels
	$(RUN) pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(RUN) apthory bench-metrics

test: venv ## run the tests that are not slow (4 minutes on two cores); a part of them: make test ARGS='-k sites'
	$(PYTEST) -m "not slow" $(ARGS)

test-all: venv ## run all tests; resumes where it was stopped until a file changes; a seventh: ARGS='--rotate 0/7'
	$(PYTEST) --resume $(ARGS)

lint: venv ## check style, format and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: venv ## mend style and format where ruff can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# The quickstart trains as it runs, so its numbers may differ in their last digits from processor to processor: it must
# run, but only what follows from records is compared. Computing is an error here (APTHORY_COMPUTE=0), and the records
# that are asked for must be those of the list, so that no change of the code can lose a result without a word.
notebooks-check: venv ## run notebooks on the committed records and compare each byte and key: SUITE=small for that suite
	@rm -rf $(SCRATCH) && mkdir -p $(SCRATCH) && cp -R notebooks figures $(SCRATCH)
	@rm -f $(SCRATCH)/figures/$(SUITE)/keys.txt
	APTHORY_ROOT="$(CURDIR)/$(SCRATCH)" APTHORY_COMPUTE=0 APTHORY_KEYS="$(CURDIR)/$(SCRATCH)/asked.txt" \
	  $(RUN) apthory run $(NOTEBOOKS_$(SUITE)) --suite $(SUITE)
	@LC_ALL=C sort -u $(SCRATCH)/asked.txt > $(SCRATCH)/figures/$(SUITE)/keys.txt
	@for folder in notebooks figures; do \
	  diff -rq -x .ipynb_checkpoints -x __pycache__ -x '00_*' $$folder $(SCRATCH)/$$folder || exit 1; \
	done
	@echo 'notebooks and figures of the $(SUITE) suite are what the committed records give, byte for byte'

graph: ## print the rooms of the package and who imports whom
	@$(PYTHON) tests/imports.py

clean: ## remove caches and scratch files; .venv stays (delete it to install anew)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find apthory notebooks tests -name __pycache__ -prune -exec rm -rf {} +

# .venv/.installed holds the two files that it was installed from, and is written last: a change of either installs
# again, new dates alone do not. A first installation that was cut short (.venv/.incomplete) is begun again.
venv:
	@cat pyproject.toml constraints.txt | cmp -s - $(VENV)/.installed || { set -e; \
	  if [ -e $(VENV)/.incomplete ] || [ ! -x $(VENV)/bin/pip ]; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	      || { echo 'apthory needs Python 3.11 or later; name one: make PYTHON=python3.11 ...' >&2; exit 2; }; \
	    echo 'installing into $(VENV): 2 to 4 minutes and 6.7 GB, most of it torch; once'; \
	    $(PYTHON) -m venv --clear $(VENV); touch $(VENV)/.incomplete; \
	  else echo 'bringing $(VENV) up to date'; fi; \
	  rm -f $(VENV)/.installed; cat pyproject.toml constraints.txt > $(VENV)/.installing; \
	  $(RUN) pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,studies,data,open-clip]'; \
	  rm -f $(VENV)/.incomplete; mv $(VENV)/.installing $(VENV)/.installed; }
