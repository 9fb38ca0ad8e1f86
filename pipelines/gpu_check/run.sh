#!/usr/bin/env bash
# Runs the GPU check from a checkout of the project. Options are passed on; --help lists them.
#
#   bash pipelines/gpu_check/run.sh --minutes 7.5
#
# OUT: directory of the results [./gpu_check_out]. PYTHON: interpreter [python3].
# WHEELS: folder of wheels that this machine lacks. They are installed into a temporary directory; Python is not changed.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/gpu_check_out}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
{ date -u; nvidia-smi; df -h "$scratch"; "$python" -m pip list; } >"$OUT/machine.txt" 2>&1
for wheel in "${WHEELS:-$scratch}"/*.whl; do # one at a time, so that a wheel for another Python affects no other
    [ -e "$wheel" ] || continue
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$wheel" \
        >>"$OUT/machine.txt" 2>&1 || echo "not installed: $wheel"
done
export PYTHONPATH=$scratch/site:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export NUMBA_CACHE_DIR=$scratch/numba TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root" && "$python" -m pipelines.gpu_check --out "$OUT" "$@" 2>&1 | tee "$OUT/log.txt"
