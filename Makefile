# Every target sets up what it needs: `.venv` is made once and found ready afterwards.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train export check test prove cuda lab docs docs-serve readme
.PHONY: lock vulnerabilities sbom build release clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv with the locked packages

# torch comes first and by itself, from wherever pip finds it; the lock holds everything else, with
# hashes.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit( \
	    0 if (3, 11) <= v[:2] <= (3, 13) else \
	    f"codex_nb needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}; " \
	    "name another one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) --require-hashes --no-deps -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e . > .venv/install.log 2>&1 \
	    || { cat .venv/install.log; exit 1; }
	@touch $(STAMP)

train: $(STAMP) ## train a tokenizer and a language model on the standard library's source
	$(BIN)/codex-nb run train -p preset tiny

export: $(STAMP) ## write the modules of codex_nb/ from their notebooks
	$(BIN)/python tools/export.py

check: $(STAMP) ## look at layout, lint, types, generated files and changed chapters: a minute
	$(BIN)/python tests/check.py

test: $(STAMP) ## run every notebook and test: ten minutes
	$(BIN)/python tests/gate.py

prove: $(STAMP) ## run everything at full counts, and keep the evidence: hours
	PROVE=1 $(BIN)/python tests/gate.py --keep

# Not in `.venv` where there is none: a machine with a GPU has a torch of its own.
cuda: ## check what only an NVIDIA GPU can show, into data/cuda.json: eight minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/cuda.py

lab: $(STAMP) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

docs: $(STAMP) ## render the site into _docs/; needs Quarto
	$(BIN)/python tools/docs.py

docs-serve: $(STAMP) ## show the rendered site on this machine
	$(BIN)/python tools/docs.py --serve

readme: $(STAMP) ## make README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lock: $(STAMP) ## refresh requirements.lock and check it
	$(BIN)/python tools/lock.py

vulnerabilities: $(STAMP) ## compare the lock with the database of known faults; needs a network
	$(BIN)/python tools/vulnerabilities.py

sbom: $(STAMP) ## write dist/sbom.cdx.json and dist/licences.md from the lock
	$(BIN)/python tools/sbom.py

build: $(STAMP) ## build wheel and source archive into dist/, twice, and compare
	$(BIN)/python tools/release.py

release: $(STAMP) ## bump to VERSION, check, build, commit and tag
	@test -n "$(VERSION)" || { echo "say which: make release VERSION=0.2.0"; exit 1; }
	$(BIN)/python tools/release.py $(VERSION)

clean: ## remove .venv, caches and built files; runs/ and store/ stay
	rm -rf .venv _docs _proc build dist *.egg-info .ci-logs .coverage .coverage.*
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
