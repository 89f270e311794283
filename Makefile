# Everything is set up in .venv by the targets themselves: only Python 3.11 and make are needed.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
DEMO_SERIES ?= 60
DEMO_SIZE ?= 128
LIGHT_VENV ?= .venv-light
TOOLS_VENV ?= .venv-tools
BENCH ?= bench-data
BENCH_VENV ?= .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
# Loaders that need other releases than ours, NumPy's above all.
BENCH_PINNED := $(BENCH_VENV)-pinned
PEERS_PINNED := mosaicml-streaming litdata

.PHONY: help venv demo test test-one test-properties test-slow test-web test-s3 test-tools screenshots test-light lint format docs wheel audit lock sbom bench-setup bench bench-full profile clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.installed ## install everything into .venv

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard ich_prep/dataset/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,jpeg,dev]'
	touch $@

demo: venv ## phantom files -> dataset -> trained model, and a report of each
	rm -rf $(DEMO)
	$(BIN)/ich-prep synth --out $(DEMO)/rsna --series $(DEMO_SERIES) --size $(DEMO_SIZE) --seed 0
	$(BIN)/ich-prep build --recipe pipelines/smoke.toml --src $(DEMO)/rsna --out $(DEMO)/data.zarr --report
	$(BIN)/ich-prep verify $(DEMO)/data.zarr --src $(DEMO)/rsna --sample 0.05
	$(BIN)/ich-prep info $(DEMO)/data.zarr
	$(BIN)/ich-train run --recipe pipelines/smoke.toml --data $(DEMO)/data.zarr --out $(DEMO)/run
	@echo "The report of the dataset: $(abspath $(DEMO))/data.zarr.report.html"
	@echo "The report of the run: $(abspath $(DEMO))/run/report.html"

test: venv lint ## the tests, in two processes, and lint and types
	$(BIN)/pytest -n 2 --dist loadfile

test-one: venv ## one test module or test: make test-one T=tests/prep/test_folds.py
	$(BIN)/pytest -x $(or $(T),$(error say which one: make test-one T=tests/prep/test_folds.py))

test-properties: venv ## the property tests, with new random examples each time
	$(BIN)/pytest -m "hypothesis and not slow" --hypothesis-profile random

test-slow: venv ## the tests that take minutes
	$(BIN)/pytest -m slow --timeout 1200

test-web: $(VENV)/.web ## the viewer and the reports in a real browser: needs Chromium
	$(BIN)/pytest tests/web

screenshots: $(VENV)/.web ## the pictures of the README, of a phantom cohort in a real browser: needs Chromium
	$(BIN)/python docs/screenshots.py --work build/screenshots

# In a venv of its own: napari would come as plugins of every run of pytest.
test-tools: $(TOOLS_VENV)/.installed ## the snippets of docs/other-tools.md, with DuckDB, MONAI and napari
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(TOOLS_VENV)/bin/pytest -p pytest_timeout -rs tests/test_docs.py -k other-tools

$(TOOLS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev,other-tools]'
	touch $@

test-s3: $(VENV)/.test-s3 ## object stores: reading from and building into servers that the tests start
	$(BIN)/pytest -m s3 tests/s3 --timeout 1200

test-light: ## read a dataset where only the light libraries are installed
	rm -rf $(LIGHT_VENV)
	$(PYTHON) -m venv $(LIGHT_VENV)
	$(LIGHT_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt .
	$(LIGHT_VENV)/bin/pip uninstall --quiet --yes dask distributed opencv-python-headless pydicom pylibjpeg zarr pandas torch
	cd $(LIGHT_VENV) && bin/python $(CURDIR)/tests/light_reader.py $(CURDIR)/tests/contract/windows.zarr
	rm -rf $(LIGHT_VENV)

lint: venv ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

format: venv ## write the code in the house's form
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

docs: $(VENV)/.docs ## the documentation site, in site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml
	@echo "The documentation: $(abspath site)/index.html"

wheel: $(VENV)/.release ## a manylinux wheel in dist/, then installed and used without a compiler
	rm -rf build dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl
	.ci/try-wheel dist/*.whl $(PYTHON)

audit: $(VENV)/.release ## known vulnerabilities in the pinned packages; fails if any of them could not be checked
	mkdir -p build
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt --format json --output build/audit.json
	@$(BIN)/python -c "import json; print(len(json.load(open('build/audit.json'))['dependencies']) or exit('Nothing was audited.'), \
		'packages audited, no known vulnerability.')"

lock: venv ## the hashes of the required packages, in requirements.lock; read by `pip install --require-hashes`
	$(BIN)/pip --isolated install --quiet --disable-pip-version-check --dry-run --ignore-installed --report - \
		--constraint constraints.txt '.[jpeg,excel,nifti,view]' | $(BIN)/python .ci/lock

sbom: $(VENV)/.release ## the software bill of materials of the required packages, with their licences, in build/sbom.json
	rm -rf build/sbom
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt .
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON --output-file build/sbom.json build/sbom/bin/python
	rm -rf build/sbom
	@echo "The bill of materials: $(abspath build)/sbom.json"

# Tools of single targets, installed beside the rest when the target is first made.
$(VENV)/.docs $(VENV)/.release $(VENV)/.test-s3 $(VENV)/.web: $(VENV)/.%: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

bench-setup: $(BENCH_VENV)/.installed ## install the peers of the benchmarks into venvs of their own

$(BENCH_VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard ich_prep/dataset/native/*)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,jpeg,bench]'
	$(PYTHON) -m venv $(BENCH_PINNED)
	$(BENCH_PINNED)/bin/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" $(PEERS_PINNED)
	$(BENCH_PINNED)/bin/pip install --quiet --disable-pip-version-check ffcv pillow || \
		echo "FFCV is left out: it is built on the spot and needs a C++ compiler, pkg-config, OpenCV's and libturbojpeg's headers."
	touch $@

# Slow ones, and those that another one of their kind outruns.
bench: WITHOUT := --without zarr-python --without "zarr-python with zarrs" --without "DataLoader over LMDB" \
	--without "DataLoader over HDF5" --without "DataLoader over DICOM" --without "Hugging Face datasets" \
	--without "MONAI CacheDataset" --without "MosaicML Streaming" --without LitData
bench: bench-setup ## the main questions in a quarter of an hour, then docs/benchmarks.md
	$(BENCH_BIN)/python -m benchmarks.build --data $(BENCH) --question windows-512 --slices 3072
	$(BENCH_BIN)/python -m benchmarks.loader --data $(BENCH) --question 256 --slices 3072 --seconds 1 $(WITHOUT)
	$(BENCH_BIN)/python -m benchmarks.feeding --data $(BENCH) --slices 3072 --repeats 1
	$(BENCH_BIN)/python -m benchmarks.document

bench-full: bench-setup ## every question of every benchmark, then docs/benchmarks.md
	$(BENCH_BIN)/python -m benchmarks.build --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.loader --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.feeding --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.training --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.scaling --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.codecs --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.archives --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.decoding --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.planning
	$(BENCH_BIN)/python -m benchmarks.checking --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.predicting --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.volumes --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.sequences --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.scan_labels --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.explaining --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.knobs --data $(BENCH)
	$(BENCH_BIN)/python -m benchmarks.document

profile: bench-setup ## flame graphs of a build and of the loader in benchmarks/profiles
	$(BENCH_BIN)/python -m benchmarks.profile --data $(BENCH)

clean: ## remove what the targets made
	rm -rf $(VENV) $(LIGHT_VENV) $(TOOLS_VENV) $(BENCH_VENV) $(BENCH_PINNED) $(DEMO) .ruff_cache .mypy_cache .hypothesis build dist site
	find ich_prep -name '_native*.so' -delete
