#!/usr/bin/env bash
# Sets up and runs the tests.   bash tests/run.sh             what CI runs (under 10 minutes on 2 cores)
#                               bash tests/run.sh fast        without the tests that run whole stages (under 3)
#                               bash tests/run.sh all         the exhaustive ones too: 20,000 random inputs a verifier (20 minutes more)
#                               bash tests/run.sh fast -k chat -s     further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_cascade.sh setup
export OMP_NUM_THREADS=1 # two processes of a test then need two cores, not four
case "${1:-}" in
    fast) shift; set -- -m "not slow and not exhaustive" "$@" ;;
    all) shift ;;
    *) set -- -m "not exhaustive" "$@" ;;
esac
exec .venv/bin/python -m pytest -q --durations=10 "$@"
