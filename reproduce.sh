#!/usr/bin/env bash
# bash reproduce.sh [flags of deepham_ks.py]   make an environment in .venv and run the main job
# bash reproduce.sh test                       the same environment with the test tools: lint and tests
set -euo pipefail
cd "$(dirname "$0")"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# The torch release of the committed figures. "==2.13.*" lets a CPU build (2.13.0+cpu), where pip can see one, win over
# the CUDA build, which brings several GB that a machine without a GPU has no use for. An installed torch stays.
pip show --quiet torch 2>/dev/null || pip install --quiet "torch==2.13.*"

if [ "${1:-}" = test ]; then
  pip install --quiet -r requirements-dev.txt
  .venv/bin/ruff check deepham_ks.py benchmarks examples tests tools  # and not what a user adds beside them
  .venv/bin/python -m pytest -q -n 2 --dist loadfile tests
else
  pip install --quiet -r requirements.txt
  .venv/bin/python deepham_ks.py "$@"
fi
