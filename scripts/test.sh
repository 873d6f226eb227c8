#!/usr/bin/env bash
# Set up, check style, and run all tests; arguments go to pytest.
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -m "not real"        without the tests on a real model
#   ./scripts/test.sh tests/merging -x     one part
set -euo pipefail
. "$(dirname "$0")/environment.sh"
activate_environment test
cd "$root"
ruff check --quiet .
ruff format --check --quiet . || { echo "error: run 'ruff format .'" >&2; exit 1; }
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
OMP_NUM_THREADS=1 python -m pytest -q -n 2 -m "not real" # two workers, and no library that starts threads of its own
python -m pytest -q -m real # alone: a real model takes every core
