"""Random call orders on the C API of the core: csrc/include/pellucid.h, all exported functions, through ctypes alone.

    python scripts/campaigns/fuzz_core.py --seed 1 --seconds 60
    python scripts/campaigns/fuzz_core.py --seed 1 --start 4711 --count 1 --verbose
    bash scripts/sanitize.sh address --run python scripts/campaigns/fuzz_core.py --seed 1 --count 2000
    python scripts/campaigns/core_coverage.py scripts/campaigns/fuzz_core.py --seed 1 --count 2000

A case is a sequence of 20 to 34 actions (of one or more calls each) on random objects: contexts of 1 to 3 threads and every
instruction set of the machine; BLOCK and SLOT caches of every type; random small programs, damaged descriptors, models opened from
files; good, slightly wrong and hostile batches, also with flags that stop them on their way; operations on sequences with any
ranges; sampling with any floats; conversion and packing of every type; single ops of every kind; older, shorter and longer structs.
What the header forbids outright (dangling handles, lengths that are not those of the memory) is left out.

Oracles: no crash and no hang; a status that the header allows for the function, and the expected one wherever plain rules (batches.py)
or a plain model of sequences (tests/utils/sequence_model.py) know it; pld_last_error is UTF-8 text behind a refusal and empty behind a
success; memory around outputs is untouched; a refused call changes nothing that can be seen: at the end of a sequence a twin that saw
the accepted calls alone, on one thread, holds the same keys, values, positions and free cells, and computes the same bits. In every
sixteenth sequence keys, values and rows are compared around every single call as well.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from fuzzing import single_calls
from fuzzing.actions import ACTIONS, cache_params, make_program, open_file, rows_of_program, verify_file
from fuzzing.core import COUNTERS, OK, PLANTS, Core, summary
from fuzzing.draws import Draw
from fuzzing.files import file_recipe, write_model
from fuzzing.frame import Fuzzer, Tally, main
from fuzzing.programs import describe_program, recipe_of
from fuzzing.twin import check_twin
from fuzzing.world import Context, World

from pellucid.core import abi

_RECIPES, _FILES = 256, 6


class CoreCases:
    """Sequences on worlds of their own."""

    def __init__(self, options: argparse.Namespace, tally: Tally) -> None:
        self._seed, self._tally = options.seed, tally
        self.core = Core(tally, verbose=options.verbose, plant=options.plant)
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-core-"))
        self._files = []
        for number in range(_FILES):
            path, recipe = self._folder / f"{number}.pld", file_recipe(options.seed, number)
            write_model(path, recipe, {})
            self._files.append((bytes(path), recipe))
        (self._folder / "empty").touch()
        (self._folder / "short").write_bytes(b"PLDPROG2")
        (self._folder / "text").write_text("no model\n" * 100)
        best = abi.ISA_CODES[abi.cpu_info().best_isa]
        self._isas = [isa for isa in (1, 2, 2, 3, 3, 3) if isa <= best]  # the plain one is slow
        self._twin_contexts: list[Context] = []
        weighted = [
            *ACTIONS,
            (8, single_calls.run_op),
            (4, single_calls.convert),
            (1, single_calls.sizes),
            (5, single_calls.sample),
            (5, self._make_program),
            (2, partial(open_file, files=self._files, folder=self._folder)),
            (1, partial(verify_file, files=self._files, folder=self._folder)),
        ]
        self._actions = [action for weight, action in weighted for _ in range(weight)]

    def run(self, case: int) -> None:
        """One sequence."""
        draw = Draw(f"{self._seed}:{case}")
        self.core.begin()
        world = self._world(draw)
        for _ in range(draw.between(20, 34)):
            draw.one(self._actions)(world)
            self._tally.add("actions")
        check_twin(world, self._twin_contexts)
        world.close()

    def close(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _world(self, draw: Draw) -> World:
        world = World(self.core, draw, is_careful=draw.chance(0.0625))
        threads, isa = draw.one((1,) * 30 + (2, 3)), draw.one(self._isas)
        context = world.add_context(threads, isa, draw.one((-1, 0, 5)) if threads > 1 else -1)
        recipe = recipe_of(self._seed, draw.below(_RECIPES))
        world.add_program(context, describe_program(recipe, *rows_of_program(draw)), OK)
        for _ in range(2):
            world.add_cache(cache_params(draw, recipe), OK)
        return world

    def _make_program(self, world: World) -> None:
        draw = world.draw
        recipe = world.programs[0].recipe if draw.chance(0.7) else recipe_of(self._seed, draw.below(_RECIPES))
        make_program(world, recipe)


def _summary(totals: dict[str, int]) -> str:
    return f"{totals['actions']:,} actions, {summary(totals)}"


FUZZER = Fuzzer(
    script=Path(__file__).resolve(),
    description=(__doc__ or "").split("\n\n")[0],
    counters=("actions", *COUNTERS),
    plants=PLANTS,
    start=CoreCases,
    summary=_summary,
)

if __name__ == "__main__":
    sys.exit(main(FUZZER))
