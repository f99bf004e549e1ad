#!/usr/bin/env bash
# Proves on a CUDA card what is planned without one: see scripts/gpu_proof.py. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" scripts/gpu_proof.py "$@"
