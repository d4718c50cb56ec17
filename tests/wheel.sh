#!/usr/bin/env bash
# Builds a wheel, installs it into an empty environment in an empty folder, and trains two steps of `tiny` there.
# usage: tests/wheel.sh [PYTHON]
set -euo pipefail
python=${1:-python3}
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$repository/.venv/bin/python" -m build --quiet --wheel --outdir "$folder" "$repository"
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet moetrain-*.whl
venv/bin/moetrain train tiny train.steps=2 eval.tokens=4096 metrics.console=plain
test -f runs/tiny/loss.png -a -f runs/tiny/metrics.jsonl
echo "the wheel trains"
