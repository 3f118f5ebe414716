#!/usr/bin/env bash
# Lint, format and types: what must hold before anything is committed. Tools come from the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.h' 'csrc/*.inl' | xargs clang-format --dry-run -Werror
