#!/bin/sh
# Trains the embedded model on a machine with a GPU, or goes on with what another machine began.
# usage: tools/tiny/gpu.sh CACHE WORK OUT [STEPS]
set -eu
[ $# -ge 3 ] || { echo "usage: $0 CACHE WORK OUT [STEPS]" >&2; exit 2; }
PYTHONPATH=$(dirname "$0")/..
export PYTHONPATH
exec "${PYTHON:-python}" -m tiny --cache "$1" train --work "$2" --out "$3" --device cuda --threads 8 ${4:+--steps "$4"}
