"""Mutated model files: opened by the Python reader and by pld_model_open, and run for a few tokens when they open.

    python scripts/campaigns/fuzz_files.py --seed 1 --seconds 60
    bash scripts/sanitize.sh address --run python scripts/campaigns/fuzz_files.py --seed 1 --count 10000 --keep /tmp/kept
    python scripts/campaigns/core_coverage.py scripts/campaigns/fuzz_files.py --seed 1 --count 5000

A case is one of a few good files of random small programs (every storage type, every op), mutated one to three times: bits, bytes
and numbers anywhere; fields, rows and weights of the tables with values near the good ones, at edges, or those of another row;
sections moved in the header, in the core's index or in both; the JSON header and the texts; truncation, and pieces of one section
over another. Behind that the checksums are made right again (`fuzzing/images.py::reseal`), so that no check hides another.

Oracles: a typed error with a text, or a run without a crash, a hang or an access outside of the weights that the file names. Under
the address sanitizer all of the mapped file but its weights is poisoned while a program runs, so that a read of the neighbours is
seen. A file that opens has weights of which shape, type and bytes agree. With `--keep FOLDER` the files of findings are kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from fuzzing.core import COUNTERS, Core, summary
from fuzzing.draws import Draw
from fuzzing.files import file_recipe, texts_of, write_model
from fuzzing.frame import Fuzzer, Tally, main
from fuzzing.images import Image, write_mutated
from fuzzing.opening import PLANTS, READERS, open_in_core, plant_fault

from pellucid.core import abi

_FILES = 12


@lru_cache(maxsize=2)
def images_of(seed: int) -> list[Image]:
    """The good files."""
    images = []
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as folder:
        for number in range(_FILES):
            path, recipe = Path(folder) / f"{number}.pld", file_recipe(seed, number)
            write_model(path, recipe, texts_of(recipe, with_tokenizer=number % 3 == 0))
            images.append(Image.of(path.read_bytes()))
    return images


def write_case(seed: int, case: int, path: Path) -> Draw:
    """Writes the file of a case; gives the draw that goes on behind it."""
    draw = Draw(f"{seed}:file:{case}")
    write_mutated(draw, draw.one(images_of(seed)), path)
    return draw


class FileCases:
    """Opens the files one by one."""

    def __init__(self, options: argparse.Namespace, tally: Tally) -> None:
        self._seed, self._tally, self._verbose = options.seed, tally, options.verbose
        self._reader = READERS[options.reader]
        plant_fault(options.plant)
        self._core = Core(tally, verbose=options.verbose)
        self._context = abi.Context(1)
        shared = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-files-", dir=shared if shared.is_dir() else None))
        self._numbers = itertools.count()
        images_of(self._seed)

    def run(self, case: int) -> None:
        """One file, by both readers."""
        self._core.begin()
        path = self._folder / f"{next(self._numbers)}.pld"  # never a name that is mapped still
        draw = write_case(self._seed, case, path)
        try:
            self._open(draw, path, self._reader, "python")
            self._open(draw, path, open_in_core, "core")
        finally:
            path.unlink()
        if case % 200 == 0:
            gc.collect()

    def _open(self, draw: Draw, path: Path, reader: Callable[[Draw, Path, abi.Context, Core], str], name: str) -> None:
        if self._verbose:
            print(f"# {name} opens {path.name}, {path.stat().st_size:,} bytes", flush=True)
        self._tally.add(f"{name} {reader(draw, path, self._context, self._core)}")

    def close(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reader",
        choices=list(READERS),
        default="model",
        help="what Python opens: the program alone, or all of the model",
    )


_OUTCOMES = tuple(f"{reader} {outcome}" for reader in ("python", "core") for outcome in ("refused", "opened", "ran"))


def _summary(totals: dict[str, int]) -> str:
    return f"{', '.join(f'{name} {totals[name]:,}' for name in _OUTCOMES)}, {summary(totals)}"


FUZZER = Fuzzer(
    script=Path(__file__).resolve(),
    description=(__doc__ or "").split("\n\n")[0],
    counters=(*_OUTCOMES, *COUNTERS),
    plants=PLANTS,
    start=FileCases,
    summary=_summary,
    add_options=_add_options,
    write_artefact=lambda options, case, path: write_case(options.seed, case, path),
    suffix=".pld",
)

if __name__ == "__main__":
    sys.exit(main(FUZZER))
