"""Failures of the core leave nothing behind: no state of a step that was stopped, no broken text, no process that ends."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from utils.batch_builders import BlockBatchState, build_decode_batch
from utils.children import finished
from utils.core_model import CoreModel
from utils.quantised import packed
from utils.tiny_models import build_tiny_checkpoint

from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.core import abi, structs
from pellucid.errors import NativeError

OK, ABORTED, OUT_OF_MEMORY = 0, 2, -3
IDS = [4, 5, 6, 9, 11, 13, 17, 19]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compiled") / "llama.pld"
    checkpoint = build_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    compile_model(EngineConfig(model=str(checkpoint), dtype="bfloat16"), target)
    return target


def contents(model: CoreModel) -> list[np.ndarray]:
    return [part for layer in range(model.info.n_layers) for cell in range(64) for part in model.read(layer, cell)]


@pytest.mark.parametrize("dtype", [abi.F32, abi.BF16, abi.I8], ids=["f32", "bf16", "i8"])
def test_cells_that_are_held_when_written_again_by_a_step_that_is_stopped_then_they_are_as_before(
    compiled: Path, dtype: int
) -> None:
    model, state = CoreModel(compiled, layout="block", dtype=dtype, threads=1), BlockBatchState(16)
    assert model.decode(build_decode_batch(IDS, layout="block", block_state=state)) == OK
    before = contents(model)
    again = build_decode_batch([20, 21, 22], pos_ids=[2, 3, 4], layout="block", block_state=state)
    again.arrays["slot_mapping"][1] = -1  # is not written anyway
    hidden = abi.library().pld_program_hidden(model.program)
    ctypes.memset(hidden, 0, 4)
    again.struct.abort = hidden  # the step itself sets it
    assert model.decode(again) == ABORTED
    for found, expected in zip(contents(model), before, strict=True):
        assert np.array_equal(found, expected)
    again.struct.abort = None
    assert model.decode(again) == OK
    assert not all(np.array_equal(a, b) for a, b in zip(contents(model), before, strict=True))
    model.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"/absent/\xff\xfe", "/absent/??: cannot be opened"),
        (b"/absent/\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "/absent/ä€😀: cannot be opened"),
        (b"/absent/\xc0\xaf\xed\xa0\x80\xf5\x80\x80\x80\xe2\x82", "/absent/" + "?" * 11 + ": cannot be opened"),
        (b"/absent/" + "ä".encode() * 400, "/absent/" + "ä" * 251 + "?"),
        (b"/absent/x" + "ä".encode() * 400, "/absent/x" + "ä" * 251),
    ],
    ids=["no characters", "characters", "bytes that only look like it", "cut within a character", "cut behind one"],
)
def test_path_of_any_bytes_when_refused_then_the_text_is_utf8(name: bytes, expected: str) -> None:
    lib, context = abi.library(), abi.Context(1)
    params, out = abi.default_params(structs.ModelParamsStruct), ctypes.c_void_p()
    assert lib.pld_model_open(context.handle, name, ctypes.byref(params), ctypes.byref(out)) < 0
    assert lib.pld_last_error().decode() == expected


def run_with_little_memory(code: str) -> str:
    """What a process prints that may not map much more memory than it has when `limit()` is called."""
    start = """
import ctypes, os, resource
import numpy as np
from pellucid.core import abi
from pellucid.core import structs
lib = abi.library()
def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""
    done = finished([sys.executable, "-c", start + code])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def is_sanitized() -> bool:
    return hasattr(ctypes.CDLL(None), "__asan_init") or hasattr(ctypes.CDLL(None), "__tsan_init")


@pytest.mark.skipif(is_sanitized(), reason="a sanitizer maps more than a limit leaves")
def test_context_when_its_threads_cannot_be_started_then_out_of_memory_and_the_others_end() -> None:
    printed = run_with_little_memory("""
params, out = abi.default_params(structs.ContextParamsStruct), ctypes.c_void_p(1)
params.num_threads = 256
print(len(os.listdir("/proc/self/task")))
limit(100 * 2**20)
print(lib.pld_context_create(ctypes.byref(params), ctypes.byref(out)), out.value, lib.pld_last_error().decode())
print(len(os.listdir("/proc/self/task")))
""")
    before, told, after = printed.splitlines()
    assert told.startswith(f"{OUT_OF_MEMORY} None 256 threads cannot be started: ")
    assert after == before


@pytest.mark.skipif(is_sanitized(), reason="a sanitizer maps more than a limit leaves")
@pytest.mark.parametrize("threads", [1, 2])
def test_task_when_it_finds_no_memory_then_out_of_memory_on_any_thread_and_the_context_lives(threads: int) -> None:
    printed = run_with_little_memory(f"""
context, vocab, n = abi.Context({threads}), 2**23, 4
logits = np.zeros((1, vocab), np.float32)
ids, biases = np.zeros(1, np.int32), np.ones(1, np.float32)
rows = [structs.SampleRowStruct(ctypes.sizeof(structs.SampleRowStruct)) for _ in range(n)]
for row in rows:
    row.repetition_penalty, row.top_p, row.n_allowed = 1.0, 1.0, -1
    row.n_biases, row.bias_ids, row.biases = 1, ids.ctypes.data, biases.ctypes.data
pointers = (ctypes.c_void_p * n)(*map(ctypes.addressof, rows))
results = np.zeros(n, abi.SAMPLE_RESULT_DTYPE)
def sample(vocab):
    return lib.pld_sample(context.handle, logits.ctypes.data, vocab, vocab, pointers, 1, results.ctypes.data)
def sample_all(vocab):
    stride = vocab  # all rows lie within the first
    return lib.pld_sample(context.handle, logits.ctypes.data, stride, vocab, pointers, n, results.ctypes.data)
limit(16 * 2**20)
print(*[sample(vocab) for _ in range(5)], lib.pld_last_error().decode())
print(sample_all(100), results["token"].tolist())
""")
    assert printed.splitlines() == [f"{' '.join([str(OUT_OF_MEMORY)] * 5)} out of memory", "0 [0, 0, 0, 0]"]


@pytest.mark.skipif(is_sanitized() or shutil.which("cc") is None, reason="needs malloc of its own, and a C compiler")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_any_allocation_when_it_fails_then_out_of_memory_and_nothing_has_changed(
    compiled: Path, tmp_path: Path
) -> None:
    source, target = Path(__file__).parent / "c" / "no_memory.c", tmp_path / "no_memory"
    library, include = Path(abi.library()._name), Path(__file__).resolve().parents[2] / "csrc" / "include"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{include}", f"-Wl,-rpath,{library.parent}"]
    finished(["cc", *flags, source, library, "-o", target], check=True)
    done = finished([target, compiled], timeout=300)
    assert done.returncode == 0, done.stdout
    failures = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    can_fail = {"decode_slot", "decode_block", "copy", "shift", "again", "sample"}
    can_fail |= {"make_cache", "make_context", "open_model"}
    assert {name for name, count in failures.items() if count > 0} == can_fail
    assert {name for name, count in failures.items() if count == 0} == {"cut", "keep", "forget"}


@pytest.mark.parametrize("dtype", [abi.Q8_0, abi.Q4_0, abi.Q4_1, abi.I8], ids=["q8_0", "q4_0", "q4_1", "i8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-45])
def test_value_of_any_size_when_rounded_to_a_quantised_type_then_the_other_rows_are_as_without_it(
    dtype: int, value: float
) -> None:
    context, rows, cols = abi.Context(1), 3, 64
    values = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    spoiled = values.copy()
    spoiled[1, 5] = value
    good, bad = (packed(context, x, abi.F32, rows, cols, dtype) for x in (values, spoiled))
    found = []
    for weight in (good, bad):
        out = np.zeros((rows, cols), np.float32)
        op = abi.op_table(1, [], [cols], [weight])
        ids = np.arange(rows, dtype=np.int32)
        batch = structs.BatchStruct(ctypes.sizeof(structs.BatchStruct), rows, token_ids=ids.ctypes.data)
        abi.run_op(context, op, rows, [], [(out.ctypes.data, cols)], [weight], batch)
        found.append(out)
    assert np.array_equal(found[0][[0, 2]], found[1][[0, 2]])


@pytest.mark.parametrize(("dtype", "shift"), [(abi.F32, 1), (abi.F32, 2), (abi.BF16, 1)])
def test_table_in_rows_when_its_values_are_not_aligned_then_refused(dtype: int, shift: int) -> None:
    context, data, out = abi.Context(1), abi.aligned_bytes(256), np.zeros((1, 4), np.float32)
    weight = abi.Weight(data[shift:], 8, 4, dtype, abi.ROW_MAJOR)
    op = abi.op_table(1, [], [4], [weight])
    ids = np.zeros(1, np.int32)
    batch = structs.BatchStruct(ctypes.sizeof(structs.BatchStruct), 1, token_ids=ids.ctypes.data)
    with pytest.raises(NativeError, match="weight 0 is not aligned to its values"):
        abi.run_op(context, op, 1, [], [(out.ctypes.data, 4)], [weight], batch)
