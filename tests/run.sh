#!/usr/bin/env bash
# Sets up and runs the tests.   bash tests/run.sh             everything (under 10 minutes on 2 cores)
#                               bash tests/run.sh fast        without the tests that run whole stages (under 3)
#                               bash tests/run.sh fast -k chat -s     further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_cascade.sh setup
export OMP_NUM_THREADS=1 # two processes of a test then need two cores, not four
if [ "${1:-}" = fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
exec .venv/bin/python -m pytest -q --durations=10 tests "$@"
