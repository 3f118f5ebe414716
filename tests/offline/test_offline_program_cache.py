"""The cache of packed programs: full disks, killed packers, several at once, its bound, and damage."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from utils.children import child, finished
from utils.disks import flip, kill_when, names, pellucid, pellucid_limited, small_disk
from utils.tiny_models import build_tiny_checkpoint
from utils.waiting import PATIENCE, until

from pellucid import LLM, SamplingParams
from pellucid.commands.compile import compile_model
from pellucid.config import EngineConfig
from pellucid.errors import ConfigError, DamagedFileError, EngineDeadError, ModelNotFoundError, StorageError
from pellucid.executor.program_cache import ProgramCache
from pellucid.program import verify
from pellucid.program.checksums import BLOCK_BYTES, reseal
from pellucid.program.file import open_program_file
from pellucid.weights import hub

SETTINGS: dict[str, Any] = {"num_blocks": 600, "num_threads": 1}
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
ARGUMENTS = ("--num-blocks", "64", "--num-threads", "1", "--max-tokens", "2")
# What takes long enough to pack for a process to be killed in its midst.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4000, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12 MiB of weights."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 8192}
    return build_tiny_checkpoint(folder, "llama", **sizes)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("large"), "llama", **LARGE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification in the background begins at once."""
    monkeypatch.setattr(verify, "BACKGROUND_DELAY_SECONDS", 0.0)


def packed(cache: Path) -> Path:
    (found,) = (cache / "programs").glob("*.pld")
    return found


# ---- no room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "compile"])
def test_disk_when_it_is_full_then_one_line_says_what_is_needed_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, verb: str
) -> None:
    with small_disk(tmp_path / "disk", 3000) as disk:
        commands = {
            "generate": ("generate", "hello", "--model", str(checkpoint), *ARGUMENTS),
            "compile": ("compile", str(checkpoint), "-o", str(disk / "programs" / "m.pld")),
        }
        done = pellucid(*commands[verb], PELLUCID_CACHE=str(disk))
        assert done.returncode == 1, (done.returncode, done.stderr)
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert "No space left on device; 12,4" in line
        assert f"bytes are needed in {disk / 'programs'}, " in line
        assert "are free on that disk" in line
        assert names(disk / "programs") == []


def test_limit_on_files_when_the_program_is_larger_then_typed_error_and_nothing_is_left(
    checkpoint: Path, cache: Path
) -> None:
    done = pellucid_limited(5_000_000, "generate", "hello", "--model", str(checkpoint), *ARGUMENTS)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "File too large; 12,4" in done.stderr
    assert names(cache / "programs") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_reservation_when_it_fails_then_llm_says_so_and_the_next_start_packs(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StorageError, match=os.strerror(number)):
            LLM(checkpoint, **SETTINGS)
    assert names(cache / "programs") == []
    with LLM(checkpoint, **SETTINGS) as llm:
        assert len(llm.generate("hello", SHORT)[0].outputs[0].token_ids) == 4


def test_file_system_when_it_cannot_reserve_then_packing_on_a_full_disk_is_an_error_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with small_disk(tmp_path / "disk", 3000) as disk:
        monkeypatch.setenv("PELLUCID_CACHE", str(disk))
        with pytest.raises(StorageError, match="12,4.* bytes are needed"):
            LLM(checkpoint, **SETTINGS)
        assert names(disk / "programs") == []


def test_cache_when_it_cannot_be_a_folder_then_typed_error_that_names_the_variable(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "programs").touch()
    for place in (
        tmp_path / "file",
        tmp_path / "file" / "cache",
        tmp_path / "broken",
        Path("/dev/null"),
        Path("/proc/x"),
    ):
        monkeypatch.setenv("PELLUCID_CACHE", str(place))
        with pytest.raises(StorageError, match=r"programs cannot be used: .*; PELLUCID_CACHE names another place"):
            LLM(checkpoint, **SETTINGS)
    done = pellucid("generate", "hello", "--model", str(checkpoint), PELLUCID_CACHE=str(tmp_path / "file"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_home_when_there_is_none_then_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PELLUCID_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StorageError, match="PELLUCID_CACHE names one"):
        hub.cache_dir()


def test_cache_when_it_may_only_be_read_then_what_is_packed_is_used_and_the_rest_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", 30_000) as disk:
        monkeypatch.setenv("PELLUCID_CACHE", str(disk))
        LLM(checkpoint, **SETTINGS).close()
        finished(["mount", "-o", "remount,ro", disk], check=True)
        with LLM(checkpoint, **SETTINGS) as llm:
            assert llm.engine.executor.model.from_cache
        with pytest.raises(StorageError, match="Read-only file system"):
            LLM(checkpoint, dtype="bfloat16", **SETTINGS)


# ---- killed, and several at once --------------------------------------------------------------------------------------


def start(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pellucid.cli", "generate", "hi", "--model", str(model), *ARGUMENTS, *options]


def parts(cache: Path) -> list[Path]:
    return list((cache / "programs").glob("*.part"))


@pytest.mark.slow
def test_packer_when_killed_then_its_part_goes_at_the_next_start_of_any_model(
    large: Path, checkpoint: Path, cache: Path
) -> None:
    kill_when(start(large), lambda: bool(parts(cache)))
    assert len(parts(cache)) == 1
    LLM(checkpoint, **SETTINGS).close()
    assert [path.suffix for path in (cache / "programs").iterdir()] == [".pld"]
    kill_when(start(large), lambda: bool(parts(cache)))
    with LLM(checkpoint, **SETTINGS) as llm:  # one that packs nothing, too
        assert llm.engine.executor.model.from_cache
    assert parts(cache) == []


@pytest.mark.slow
def test_packers_when_several_start_at_once_then_all_work_and_leave_one_program(large: Path, cache: Path) -> None:
    with contextlib.ExitStack() as stack:
        packers = [stack.enter_context(child(start(large))) for _ in range(3)]
        said = [packer.communicate(timeout=PATIENCE) for packer in packers]
    assert [packer.returncode for packer in packers] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert len(names(cache / "programs")) == 1


@pytest.mark.slow
def test_packer_when_another_start_tidies_then_its_part_stays(large: Path, checkpoint: Path, cache: Path) -> None:
    with child(start(large)) as packer:
        end = time.monotonic() + PATIENCE
        while not parts(cache):
            assert packer.poll() is None
            assert time.monotonic() < end
        tidied = 0
        while packer.poll() is None and parts(cache):
            ProgramCache(cache / "programs", 0).tidy(cache / "none")
            tidied += 1
        _, errors = packer.communicate(timeout=PATIENCE)
        assert packer.returncode == 0, errors
        assert tidied > 0


# ---- the bound --------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(cache: Path, checkpoint: Path) -> ProgramCache:
    """Four programs: `0`, which was used last of all, `1`, `2` and `3`, the one that was not for the longest time."""
    LLM(checkpoint, **SETTINGS).close()
    whole, folder = packed(cache).read_bytes(), cache / "programs"
    packed(cache).unlink()
    for number in range(4):
        (folder / f"{number}.pld").write_bytes(whole)
        age = time.time() - 1000 * (number + 1)
        os.utime(folder / f"{number}.pld", (age, age))
    return ProgramCache(folder, int(2.5 * len(whole)))


def test_programs_when_beyond_the_bound_then_the_least_recently_used_go(programs: ProgramCache) -> None:
    programs.tidy(programs.path("none"))
    assert names(programs.folder) == ["0.pld", "1.pld"]


def test_program_when_opened_then_it_counts_as_used_and_its_time_of_change_stays(programs: ProgramCache) -> None:
    changed = programs.path("3").stat().st_mtime_ns
    assert programs.open("3") is not None  # dropped at once: nobody holds it
    assert programs.path("3").stat().st_mtime_ns == changed
    programs.tidy(programs.path("none"))
    assert names(programs.folder) == ["0.pld", "3.pld"]


def test_programs_when_mapped_or_in_use_then_they_stay_beyond_any_bound(programs: ProgramCache) -> None:
    held = programs.open("3")
    assert held is not None
    tight = ProgramCache(programs.folder, 0)
    tight.tidy(tight.path("2"))
    assert names(programs.folder) == ["2.pld", "3.pld"]
    del held
    tight.tidy(tight.path("2"))
    assert names(programs.folder) == ["2.pld"]


_HOLDER = """
import sys
from pellucid.program.file import open_program_file
from pathlib import Path
data = open_program_file(Path(sys.argv[1])).sections["data"]
print("mapped", flush=True)
sys.stdin.read()
"""


def test_program_when_another_process_has_mapped_it_then_it_stays_until_that_ends(programs: ProgramCache) -> None:
    command = [sys.executable, "-c", _HOLDER, str(programs.path("3"))]
    with child(command, stdin=PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mapped\n"
        tight = ProgramCache(programs.folder, 0)
        tight.tidy(tight.path("none"))
        assert names(programs.folder) == ["3.pld"]
    tight.tidy(tight.path("none"))
    assert names(programs.folder) == []


def test_bound_when_set_then_starts_keep_it(checkpoint: Path, cache: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        with LLM(checkpoint, dtype=dtype, program_cache_max_mb=13, **SETTINGS):
            assert len(names(cache / "programs")) == 1, "the one in use alone has room"
    with LLM(checkpoint, dtype="float32", **SETTINGS):
        assert len(names(cache / "programs")) == 2
    LLM(checkpoint, dtype="float32", program_cache_max_mb=0, **SETTINGS).close()
    assert len(names(cache / "programs")) == 1, "a start that packs nothing keeps a new bound too"
    with pytest.raises(ConfigError, match="program_cache_max_mb is -1"):
        LLM(checkpoint, program_cache_max_mb=-1)


def test_program_when_it_goes_between_packing_and_opening_then_it_is_packed_again(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, number = ProgramCache.open, 0

    def gone(self: ProgramCache, key: str) -> Any:
        nonlocal number
        number += 1
        if number == 2:
            self.path(key).unlink()
        return opened(self, key)

    monkeypatch.setattr(ProgramCache, "open", gone)
    with LLM(checkpoint, **SETTINGS) as llm:
        assert not llm.engine.executor.model.from_cache
    assert number == 3
    assert packed(cache).exists()


def test_transfers_when_old_or_of_a_killed_process_then_they_go_and_others_stay(cache: Path, checkpoint: Path) -> None:
    downloads, models = cache / "downloads", cache / "models" / "m"
    downloads.mkdir(parents=True)
    models.mkdir(parents=True)
    (models / "m.gguf.0123.part").touch()
    (models / "m.gguf").touch()
    for name, days in (("old.part", hub.KEPT_DAYS + 1), ("old.whl", hub.KEPT_DAYS + 1), ("new.part", 1)):
        (downloads / name).touch()
        age = time.time() - days * 86_400
        os.utime(downloads / name, (age, age))
    LLM(checkpoint, **SETTINGS).close()
    assert names(downloads) == ["new.part"]
    assert names(models) == ["m.gguf"]


# ---- damage -----------------------------------------------------------------------------------------------------------


def damage(path: Path) -> int:
    """Flips a bit of the weights, behind all that is checked when the file is opened; its block."""
    at = path.stat().st_size - 200_000
    flip(path, at)
    return at // BLOCK_BYTES


def run_on(llm: LLM) -> None:
    """Until the engine is dead, which is an error."""
    end, params = time.monotonic() + PATIENCE, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    while time.monotonic() < end:
        llm.generate(["hello", "world"], params, use_tqdm=False)
    pytest.fail("the engine goes on with damaged weights")


@pytest.mark.usefixtures("quick")
def test_program_when_damaged_then_llm_is_dead_and_the_next_start_packs_anew(checkpoint: Path, cache: Path) -> None:
    with LLM(checkpoint, **SETTINGS) as llm:
        wanted = llm.generate("hello", SHORT)[0].outputs[0].token_ids
    path = packed(cache)
    block = damage(path)
    with LLM(checkpoint, **SETTINGS) as llm:
        with pytest.raises(EngineDeadError) as raised:
            run_on(llm)
        text = f"{path.name} is damaged: block {block} of 1 MiB, at byte {block * BLOCK_BYTES:,}, differs"
        assert text in str(raised.value)
        assert "the next start packs the model anew" in str(raised.value)
        for later in (lambda: llm.generate("x"), lambda: list(llm.stream("x")), lambda: llm.score(["x"], ["y"])):
            with pytest.raises(EngineDeadError, match=f"block {block} ") as again:
                later()
            assert isinstance(again.value.__cause__, DamagedFileError)
        assert not path.exists()
    with LLM(checkpoint, **SETTINGS) as llm:
        assert not llm.engine.executor.model.from_cache
        assert llm.generate("hello", SHORT)[0].outputs[0].token_ids == wanted


def until_verification_ended(llm: LLM) -> None:
    verification = llm.engine.verification
    assert verification is not None
    until(lambda: not verification._thread.is_alive(), "the end of the verification")


@pytest.mark.usefixtures("quick")
def test_program_when_another_process_packed_it_anew_then_that_stays(checkpoint: Path, cache: Path) -> None:
    LLM(checkpoint, **SETTINGS).close()
    path = packed(cache)
    fresh = path.read_bytes()
    damage(path)
    with LLM(checkpoint, **SETTINGS) as llm:
        (cache / "fresh").write_bytes(fresh)
        os.replace(cache / "fresh", path)
        until_verification_ended(llm)
    assert path.read_bytes() == fresh


@pytest.mark.usefixtures("quick")
def test_program_when_it_is_sound_then_verified_and_the_engine_lives(checkpoint: Path, cache: Path) -> None:
    for _ in range(2):
        with LLM(checkpoint, **SETTINGS) as llm:
            until_verification_ended(llm)
            assert llm.engine.verification.is_verified
            assert len(llm.generate("hello", SHORT)) == 1
    assert packed(cache).exists()


def test_engine_when_closed_while_it_is_verified_then_at_once(checkpoint: Path, cache: Path) -> None:
    llm = LLM(checkpoint, **SETTINGS)
    began = time.monotonic()
    llm.close()
    assert llm.engine.verification is not None
    assert not llm.engine.verification.is_verified
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("quick")
def test_compiled_model_when_damaged_then_the_engine_is_dead_and_the_file_stays(
    checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.pld"
    compile_model(EngineConfig(str(checkpoint)), path)
    block = damage(path)
    with LLM(path, **SETTINGS) as llm, pytest.raises(EngineDeadError, match=f"block {block}.*compile the model again"):
        run_on(llm)
    assert path.exists()


def test_damage_when_verify_is_asked_for_then_nothing_runs_of_a_given_file_and_a_cached_one_is_packed_anew(
    checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.pld"
    compile_model(EngineConfig(str(checkpoint), verify=True), path)
    with LLM(path, verify=True, **SETTINGS) as llm:
        assert llm.engine.verification is None, "it was read already"
    block = damage(path)
    with pytest.raises(DamagedFileError, match=f"m.pld is damaged: block {block} "):
        LLM(path, verify=True, **SETTINGS)
    assert path.exists()
    for verb in (("generate", "hello", "--model", str(path)), ("info", str(path))):
        done = pellucid(*verb, "--verify", "--num-blocks", "64")
        assert done.returncode == 2
        assert f"m.pld is damaged: block {block} " in done.stderr
    assert pellucid("info", str(path), "--num-blocks", "64").returncode == 0, "nobody asked"

    LLM(checkpoint, **SETTINGS).close()
    damage(packed(cache))
    with LLM(checkpoint, verify=True, **SETTINGS) as llm:
        assert not llm.engine.executor.model.from_cache
    with LLM(checkpoint, verify=True, **SETTINGS) as llm:
        assert llm.engine.executor.model.from_cache


def test_info_when_the_file_is_sound_and_verified_then_it_says_so(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pld"
    compile_model(EngineConfig(str(checkpoint)), path)
    done = pellucid("info", str(path), "--verify", "--num-blocks", "64")
    assert done.returncode == 0, done.stderr
    assert "all 12 blocks of 1 MiB are as they were written" in done.stdout
    assert "not read" in pellucid("info", str(path), "--num-blocks", "64").stdout


def test_head_of_a_cached_program_when_damaged_then_it_is_packed_anew(checkpoint: Path, cache: Path) -> None:
    LLM(checkpoint, **SETTINGS).close()
    for at in (3, 12, 50, 300, 4000):
        flip(packed(cache), at)
        with LLM(checkpoint, **SETTINGS) as llm:
            assert not llm.engine.executor.model.from_cache


def test_program_of_an_older_version_when_in_the_cache_then_it_is_packed_anew(checkpoint: Path, cache: Path) -> None:
    LLM(checkpoint, **SETTINGS).close()
    path = packed(cache)
    path.write_bytes(b"PLDPROG2" + path.read_bytes()[8:])
    reseal(path)
    with LLM(checkpoint, **SETTINGS) as llm:
        assert not llm.engine.executor.model.from_cache
    assert open_program_file(path).meta["kind"] == "program"


def test_model_when_missing_then_the_cache_is_not_even_made(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "none")
    assert not cache.exists()
