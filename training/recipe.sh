#!/usr/bin/env bash
# From nothing to a measured checkpoint on one GPU: sentences, speech, training, export, evaluation.
#
#   training/recipe.sh [WORK] [OUT]      WORK: scratch folder with 30 GB (default /tmp/sotto-demo); OUT: the checkpoint
#
# Knobs, as environment variables: HOURS of speech (220), MINUTES of training (20), PACKAGES (root of Debian's text
# packages; empty for grammars alone), PYTHON. Every step can be repeated: finished speech is kept and training goes on
# from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=${1:-/tmp/sotto-demo}
OUT=${2:-$WORK/model}
HOURS=${HOURS:-220}
MINUTES=${MINUTES:-20}
PACKAGES=${PACKAGES-/}
PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" -m training.synthesis # says what to install if a synthesiser is missing

mkdir -p "$WORK"
"$PYTHON" -m training.text --work "$WORK" ${PACKAGES:+--packages "$PACKAGES"}
"$PYTHON" -m training.speech --work "$WORK" --hours "$HOURS"
"$PYTHON" -m training.train --work "$WORK" --minutes "$MINUTES"
"$PYTHON" -m training.export --work "$WORK" --out "$OUT"
"$PYTHON" -m training.evaluate --model "$OUT"
