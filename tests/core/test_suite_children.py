"""The suite itself: processes of tests end with them, hear interrupts, and are started in one way; nothing waits without an end."""

from __future__ import annotations

import ast
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from utils.children import Terminal, child, finished, forked
from utils.waiting import until

ROOT = Path(__file__).resolve().parents[2]
STARTER = Path("tests/utils/children.py")
_STARTS = {
    "subprocess": {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {
        "fork",
        "forkpty",
        "system",
        "popen",
        "posix_spawn",
        "posix_spawnp",
        "spawnv",
        "spawnve",
        "spawnl",
        "spawnlp",
    },
    "pty": {"fork", "spawn"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
    "multiprocessing": {"Process", "Pool", "get_context"},
    "futures": {"ProcessPoolExecutor"},
}
_TYPES = {"Popen"}  # may be imported for annotations
_WAITS = {"join", "wait", "communicate"}
# A process with a child of its own, in a session of its own, that both sleep; prints the child's pid.
_FAMILY = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleep, start_new_session=True).pid, subprocess.Popen(sleep).pid, flush=True)
time.sleep(600)
"""
_SLEEPS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
_TELLS = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"]


def problems_of(path: Path) -> Iterator[str]:
    """Calls of a test that start a process by themselves, or wait without an end."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    awaited = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            renamed = [name.name for name in node.names if name.name in _STARTS and name.asname]
            yield from (f"line {node.lineno} gives {name} another name" for name in renamed)
        if isinstance(node, ast.ImportFrom):
            starts = _STARTS.get((node.module or "").rpartition(".")[2], set())
            yield from (
                f"line {node.lineno} imports {name.name}" for name in node.names if name.name in starts - _TYPES
            )
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        module, _, name = text.rpartition(".")
        if name in _STARTS.get(module.rpartition(".")[2], set()) or name in _TYPES:
            yield f"line {node.lineno} calls {text}"
        if module and name in _WAITS and not node.args and not node.keywords and id(node) not in awaited:
            yield f"line {node.lineno}: {text}() has no limit"
        if name == "Thread" and not any(keyword.arg == "daemon" for keyword in node.keywords):
            yield f"line {node.lineno}: {text} is no daemon: a failed test would leave it, and the run would not end"


def test_all_tests_when_read_then_processes_are_started_by_the_helper_and_nothing_waits_without_an_end() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if path.relative_to(ROOT) != STARTER]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in problems_of(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import subprocess\nwith subprocess.Popen(['x']) as process: pass", "line 2 calls subprocess.Popen"),
        ("import sys\nfrom subprocess import run", "line 2 imports run"),
        ("import subprocess as s\ns.run(['x'])", "line 1 gives subprocess another name"),
        ("from subprocess import Popen\nPopen(['x'])", "line 2 calls Popen"),
        ("import os\nif os.fork(): pass", "line 2 calls os.fork"),
        ("import asyncio\nasyncio.create_subprocess_exec('x')", "line 2 calls asyncio.create_subprocess_exec"),
        ("from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor()", "imports ProcessPoolExecutor"),
        ("process.communicate()", "line 1: process.communicate() has no limit"),
        ("thread.join()", "line 1: thread.join() has no limit"),
        ("threading.Thread(target=f)", "is no daemon"),
    ],
)
def test_a_process_that_is_started_otherwise_when_read_then_it_is_named(
    tmp_path: Path, source: str, problem: str
) -> None:
    (tmp_path / "test_x.py").write_text(source)
    assert any(problem in found for found in problems_of(tmp_path / "test_x.py"))


def test_what_is_fine_when_read_then_nothing_is_named(tmp_path: Path) -> None:
    fine = "from subprocess import PIPE, Popen\ndef f(x: Popen[str]) -> str: return ''.join(x)\nasync def g(e): await e.wait()\n"
    (tmp_path / "test_x.py").write_text(fine + "thread.join(3)\nprocess.wait(timeout=3)")
    assert list(problems_of(tmp_path / "test_x.py")) == []


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_child_when_the_test_fails_in_between_then_it_and_all_that_it_started_are_gone_at_once() -> None:
    began, pids = time.monotonic(), list[int]()

    def planted() -> None:
        with child([sys.executable, "-c", _FAMILY]) as process:
            pids.extend([process.pid, *map(int, process.stdout.readline().split())])
            raise AssertionError("planted")

    with pytest.raises(AssertionError, match="planted"):
        planted()
    assert len(pids) == 3
    until(lambda: all(map(is_gone, pids)), "the end of the family", 10)
    assert time.monotonic() - began < 60


def test_a_child_when_its_leader_is_dead_already_then_its_group_ends_too() -> None:
    with child([sys.executable, "-c", _FAMILY]) as process:
        own_session, same_group = map(int, process.stdout.readline().split())
        process.kill()
        process.wait(10)
        assert not is_gone(same_group)
    os.kill(own_session, signal.SIGKILL)  # nothing tells any more whose it was
    until(lambda: is_gone(same_group), "the end of the group", 10)


def test_a_child_when_it_outlives_its_time_then_whoever_reads_from_it_sees_the_end() -> None:
    with child(_SLEEPS, seconds=1) as process:
        assert process.stdout.read() == "up\n"
        assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("ignored_here", [False, True])
def test_children_when_this_process_ignores_interrupts_then_they_hear_them_all_the_same(ignored_here: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored_here else signal.getsignal(signal.SIGINT)
    try:
        assert finished(_TELLS).stdout == "False\n"
        assert finished(_TELLS, ignores_interrupts=True).stdout == "True\n"
        with child(_SLEEPS) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) != 0
        with Terminal(_TELLS, {}) as terminal:
            assert os.read(terminal.file, 100).strip() == b"False"
        if ignored_here:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminal_when_left_then_its_program_is_gone() -> None:
    with Terminal(_SLEEPS, {}) as terminal:
        assert not is_gone(terminal.pid)
    assert is_gone(terminal.pid)
    with Terminal([sys.executable, "-c", "raise SystemExit(3)"], {}) as terminal:
        assert terminal.status() == 3


def test_bytes_that_are_no_text_when_given_to_a_process_then_it_gets_and_returns_them() -> None:
    copies = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]) + sys.stdin.buffer.read())"
    assert finished([sys.executable, "-c", copies, b"a\xff"], input=b"\xfe", text=False).stdout == b"a\xff\xfe"


def test_a_fork_when_it_returns_or_raises_then_its_status_tells_and_it_goes_on_with_no_test(tmp_path: Path) -> None:
    def leave() -> None:
        (tmp_path / "ran").write_text(f"{os.getpid()}")
        raise SystemExit(0)  # what would end a process well

    assert forked(lambda: None) == 0
    assert forked(leave) == 1
    pid = int((tmp_path / "ran").read_text())
    assert pid != os.getpid()
    assert is_gone(pid)


@pytest.mark.slow
def test_a_fork_when_it_outlives_its_time_then_the_test_fails_and_it_and_its_children_are_gone(tmp_path: Path) -> None:
    def hang() -> None:
        with child(["sleep", "600"]) as process:
            (tmp_path / "pids").write_text(f"{os.getpid()} {process.pid}")
            time.sleep(600)

    with pytest.raises(AssertionError, match="the end of the fork did not come"):
        forked(hang, seconds=5)
    pids = written_pids(tmp_path)
    assert len(pids) == 2
    until(lambda: all(map(is_gone, pids)), "the end of the fork's child", 10)


_PLANTED = """
from utils.children import child
import sys
def test_planted():
    with child([sys.executable, "-c", {family!r}]) as process:
        open({pids!r}, "w").write(process.stdout.readline())
        {then}
"""


def write_suite(folder: Path, then: str) -> list[str]:
    """A suite of one test, as a command; its children's pids go to `pids`."""
    pids = str(folder / "pids")
    (folder / "test_planted.py").write_text(_PLANTED.format(family=_FAMILY, pids=pids, then=then))
    conftest = ROOT / "tests" / "conftest.py"
    options = ["-p", "no:cacheprovider", "-q", "-o", f"pythonpath={ROOT / 'tests'}", "--rootdir", str(folder)]
    (folder / "conftest.py").write_text(conftest.read_text())
    return [sys.executable, "-m", "pytest", *options, str(folder / "test_planted.py")]


def written_pids(folder: Path) -> list[int]:
    path = folder / "pids"
    return list(map(int, path.read_text().split())) if path.exists() else []


@pytest.mark.parametrize("ignores_interrupts", [False, True], ids=["foreground", "background"])
def test_a_suite_when_a_test_fails_then_it_ends_and_no_process_stays(tmp_path: Path, ignores_interrupts: bool) -> None:
    done = finished(write_suite(tmp_path, "assert False"), ignores_interrupts=ignores_interrupts, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert len(written_pids(tmp_path)) == 2
    until(lambda: all(map(is_gone, written_pids(tmp_path))), "the end of its children", 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_suite_when_it_is_ended_in_the_middle_then_no_process_stays(tmp_path: Path, number: signal.Signals) -> None:
    with child(write_suite(tmp_path, "process.wait(600)"), cwd=tmp_path) as suite:
        until(lambda: len(written_pids(tmp_path)) == 2, "the start of its children")
        suite.send_signal(number)
        assert suite.wait(60) == 2
        until(lambda: all(map(is_gone, written_pids(tmp_path))), "the end of its children", 10)
