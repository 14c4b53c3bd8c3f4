#!/usr/bin/env bash
#
# Set up, then run the tests.
#
#   bash tests/run.sh           what CI runs: about 18 minutes on 2 cores
#   bash tests/run.sh fast      without the tests that run whole stages: under 4 minutes
#   bash tests/run.sh all       with the exhaustive ones (20,000 random inputs a verifier): 20 minutes more
#   bash tests/run.sh fast -k chat -s       further arguments go to pytest

set -euo pipefail
cd "$(dirname "$0")/.."
bash run_cascade.sh setup
# One thread for each process: a test with two processes then needs two cores, not four.
export OMP_NUM_THREADS=1

case "${1:-}" in
    fast) shift; set -- -m "not slow and not exhaustive" "$@" ;;
    all) shift ;;
    *) set -- -m "not exhaustive" "$@" ;;
esac
exec .venv/bin/python -m pytest -q --durations=10 "$@"
