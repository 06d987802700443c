# make demo: from nothing to a small trained model.   make test: everything that is promised.
# make test-quick: what needs no real processes, in the time that one waits for between two edits.
# make test-lowest: the same with every dependency at its lower bound; once a release.
# make test-install: uv sync, a build for PyPI and the first commands, with downloads; once a release.
.PHONY: demo test test-quick test-lowest test-install network-tools lint format readme notebook clean
PYTHON ?= python3
RUN := .venv/bin
AT_ONCE := --numprocesses 2 --dist worksteal

demo: .venv/installed
	$(RUN)/python prepare_data.py --config recipes/demo_data.yaml
	$(RUN)/accelerate launch --config_file accelerate_configs/$(shell $(RUN)/python -c "import torch; \
	print('multi_gpu' if torch.cuda.device_count() > 1 else 'cpu_2_processes')").yaml \
	train.py --config recipes/demo.yaml
	$(RUN)/python generate.py artifacts/demo --prompt "The ferry" --seed 1

test: .venv/installed network-tools
	$(RUN)/python -m pytest $(AT_ONCE)

test-quick: .venv/installed
	$(RUN)/python -m pytest $(AT_ONCE) -m "not slow"

# On Linux, UV_TORCH_BACKEND=cpu saves the gigabytes of a torch for GPUs.
test-lowest:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))" || \
	{ echo "The lower bounds have wheels for Python 3.10 to 3.12, $(PYTHON) is another:" \
	"make test-lowest PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python \
	--resolution lowest-direct --requirement requirements.txt --group dev
	.venv-lowest/bin/python -m pytest $(AT_ONCE) -m "not slow"

test-install: .venv/installed
	INSTALL_TESTS=1 $(RUN)/python -m pytest tests/test_first_commands.py

# The tests with hosts of their own need these; without them they are skipped, but not in CI.
network-tools:
	@for tool in ip nft ufw firewall-cmd ping faketime sshd shellcheck c++; do \
	PATH="$$PATH:/usr/sbin" command -v $$tool; done | \
	wc -l | grep -q 9 || test "$(CI)" != true || { apt-get update -qq && \
	apt-get install -y -qq --no-install-recommends iproute2 nftables ufw firewalld dbus \
	iputils-ping faketime openssh-server shellcheck g++; }

lint: .venv/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: .venv/installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# The tables of flags in docs/flags.md, from what the scripts parse.
readme: .venv/installed
	$(RUN)/python -m tests.test_readme

# The outputs that the notebook is stored with.
notebook: .venv/installed
	$(RUN)/python -m tests.test_notebook

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	{ echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --requirement requirements.txt --group dev
	@touch $@

clean:
	rm -rf artifacts/demo data/prepared/demo
