"""The recorded program against the module that it was recorded from: the same bits, on every instruction set and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.tiny_models import FAMILIES, build_tiny_checkpoint

from pellucid.config import EngineConfig
from pellucid.contract.batch import BatchInput
from pellucid.contract.executor import Executable
from pellucid.core import abi
from pellucid.executor.eager import EagerModel
from pellucid.executor.loader import load_model
from pellucid.executor.uniproc import make_kv_cache
from pellucid.program.runner import NativeProgram

ISAS = [isa for isa, code in abi.ISA_CODES.items() if isa != "auto" and code <= abi.ISA_CODES[abi.cpu_info().best_isa]]
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int8_channel": {"quantization": "int8_channel"},
    "int4": {"quantization": "int4"},
}
BLOCK_SIZE, BLOCKS_EACH = 8, 6
# tokens of each of three sequences in each step: whole prompts, chunks and decodes together, some sequences absent
SCHEDULE = ((17, 1, 0), (1, 4, 23), (1, 1, 1), (0, 1, 9), (1, 1, 1))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PELLUCID_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, with_tokenizer=False)


def batches() -> Iterator[BatchInput]:
    """The schedule as batches of random tokens; each wants the logits of every third row."""
    random = np.random.default_rng(5)
    computed = [0] * len(SCHEDULE[0])
    for counts in SCHEDULE:
        chosen = [i for i, count in enumerate(counts) if count]
        starts = [computed[i] for i in chosen]
        for i in chosen:
            computed[i] += counts[i]
        tables = np.array([range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH) for i in chosen], np.int32)
        spans = [np.arange(start, start + counts[i]) for i, start in zip(chosen, starts, strict=True)]
        positions = np.concatenate(spans).astype(np.int32)
        cells = [i * BLOCKS_EACH * BLOCK_SIZE + span for i, span in zip(chosen, spans, strict=True)]
        yield BatchInput(
            input_ids_T=random.integers(0, 300, len(positions), np.int32),
            positions_T=positions,
            query_start=np.cumsum([0, *map(len, spans)]).astype(np.int32),
            seq_lens=np.array([computed[i] for i in chosen], np.int32),
            block_tables=tables,
            slot_mapping_T=np.concatenate(cells).astype(np.int64),
            logit_rows=np.arange(0, len(positions), 3, dtype=np.int32),
        )


def run(executable: Executable) -> list[torch.Tensor]:
    """Hidden states and logits of every step."""
    outputs = []
    for batch in batches():
        logits = executable.run(batch)
        outputs += [torch.from_numpy(logits.copy()), torch.from_numpy(executable.hidden().copy())]
    executable.close()
    return outputs


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 2 * len(SCHEDULE)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"step {step // 2}: {'hidden states' if step % 2 else 'logits'} differ"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_program_when_run_beside_its_module_then_every_bit_is_equal(checkpoint: Path, isa: str, precision: str) -> None:
    config = EngineConfig(
        model=str(checkpoint), block_size=BLOCK_SIZE, num_blocks=3 * BLOCKS_EACH, **PRECISIONS[precision]
    )
    outputs = {}
    for threads in (1, 2):
        context = abi.Context(num_threads=threads, isa=isa)
        loaded = load_model(config, context)
        _, kv = make_kv_cache(config, loaded, 64)
        outputs["program", threads] = run(NativeProgram(context, loaded.file, kv, max_tokens=64, max_logit_rows=32))
        _, kv = make_kv_cache(config, loaded, 64)
        outputs["eager", threads] = run(EagerModel(config, loaded, context, kv))
        context.close()
    for found in outputs.values():
        assert_equal(found, outputs["program", 1])
    assert all(torch.isfinite(tensor).all() for tensor in outputs["program", 1])
