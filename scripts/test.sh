#!/usr/bin/env bash
# From a clone to passed tests: an environment of its own, the package with its test extra, lint, types, every suite.
# PYTHON chooses the interpreter, VENV the folder of the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-test}
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet -e '.[test]'
export PATH="$PWD/$venv/bin:$PATH"
case $venv in /*) PATH="$venv/bin:$PATH" ;; esac
bash scripts/lint.sh
pellucid pull smollm2-135m-instruct
python scripts/run_tests.py --suite all "$@"
