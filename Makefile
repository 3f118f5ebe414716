# The few verbs that people type. They use the tools of the active environment.
.PHONY: build test lint format bench sanitize clean

build:  ## compile the core into the source tree, for work on it
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build build/dev
	cmake --install build/dev --prefix .

test:  ## every suite in this environment
	python scripts/run_tests.py --suite all

lint:
	bash scripts/lint.sh

format:
	ruff check --fix .
	ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.h' 'csrc/*.inl' | xargs clang-format -i

bench:
	python benchmarks/compare.py

sanitize:  ## core tests and hostile files under the address and undefined-behaviour sanitizers
	bash scripts/sanitize.sh address
	bash scripts/sanitize.sh undefined

clean:
	rm -rf build dist pellucid/_lib .mypy_cache .ruff_cache .pytest_cache .hypothesis
