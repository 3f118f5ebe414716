"""A process that is forked from one with a model: its calls are refused by a typed error, and the parent does not notice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from utils.children import finished
from utils.tiny_models import build_tiny_checkpoint

pytestmark = pytest.mark.timeout(180)

_HEAD = """
import asyncio, os, sys, threading
from pathlib import Path
from pellucid import LLM, SamplingParams
from pellucid.config import EngineConfig
from pellucid.service.async_engine import AsyncLLMEngine
from pellucid.errors import ForkedError

SETTINGS = {"max_model_len": 128, "num_blocks": 64, "block_size": 4, "num_threads": 2}
P = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

def in_child(work, leave=os._exit):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            work()
            code = 0
        finally:
            leave(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

def refused(call):
    try:
        call()
    except ForkedError as error:
        assert f"belongs to process {os.getppid()}; process {os.getpid()} was forked from it" in str(error), error
        return
    raise AssertionError("it was not refused")
"""

_LLM = """
def work():
    for call in (lambda: llm.generate([[5, 6]], P), lambda: llm.chat([{"role": "user", "content": "a"}], P),
                 lambda: next(llm.stream([5, 6], P)), lambda: llm.score([[5]], [[6]]),
                 llm.kv_cache_stats, llm.reset_prefix_cache, lambda: llm.client.submit([5], P), llm.client.step,
                 lambda: llm.client.cancel("req-0"), llm.engine.step, lambda: llm.engine.add_request([5], P)):
        refused(call)
    assert llm.encode("hello")
    if os.environ["ALONE"] == "1":  # else the steps of others have brought what can be read
        refused(lambda: next(stream))
    stream.close()
    llm.close()
    llm.close()
    if os.environ["ALONE"] == "1":  # its own model is as good as any
        with LLM(sys.argv[1], **SETTINGS) as own:
            assert own.generate([[5, 6]], P)[0]["token_ids"] == expected

with LLM(sys.argv[1], async_scheduling=os.environ["AHEAD"] == "1", **SETTINGS) as llm:
    expected = llm.generate([[5, 6]], P)[0]["token_ids"]
    stream = llm.stream([5, 6], P)
    tokens = next(stream).token_ids
    in_child(work)
    in_child(work, sys.exit)  # with all that is called at exit

    def generate():
        while not is_over.is_set():
            assert llm.generate([[5, 6]], P)[0]["token_ids"] == expected
        num_over.append(1)

    is_over, num_over = threading.Event(), []
    others = [threading.Thread(target=generate) for _ in range(3)]
    for other in others:
        other.start()
    os.environ["ALONE"] = "0"
    for _ in range(10):
        in_child(work)  # while another thread steps
    is_over.set()
    for other in others:
        other.join()
    assert len(num_over) == 3
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == expected
    assert llm.generate([[5, 6]], P)[0]["token_ids"] == expected
print("fine")
"""

_ASYNC = """
def work():
    async def ask():
        async def call():
            await engine.generate([5, 6], P)
        async def read():
            async for _ in engine.stream([5, 6], P):
                pass
        for question in (call, read, engine.stats, engine.abort_all, lambda: engine.drain(1), engine.reset_prefix_cache,
                         lambda: engine.cancel("a"), lambda: engine.status("a"), lambda: engine.collect("a")):
            try:
                await asyncio.wait_for(question(), 30)
            except ForkedError:
                continue
            raise AssertionError("it was not refused")
    asyncio.run(ask())
    assert not engine.is_alive
    engine.close()

async def serve():
    return (await engine.generate([5, 6], P)).outputs[0].token_ids

if __name__ == "__main__":
    config = EngineConfig.from_kwargs(Path(sys.argv[1]), SETTINGS)
    engine = AsyncLLMEngine.start(config, engine_process=sys.argv[2] == "process")
    expected = asyncio.run(serve())
    in_child(work)
    in_child(work, sys.exit)
    assert asyncio.run(serve()) == expected
    folder = getattr(engine._transport, "folder", None)
    engine.close()
    assert folder is None or not os.path.exists(folder)
    print("fine")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("fork"), "llama")


def run(script: str, *arguments: str, **variables: str) -> str:
    done = finished([sys.executable, "-c", _HEAD + script, *arguments], env={**os.environ, **variables}, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ahead", ["0", "1"])
def test_llm_when_its_process_is_forked_then_the_child_is_refused_and_the_parent_goes_on(
    model: Path, ahead: str
) -> None:
    assert run(_LLM, str(model), AHEAD=ahead, ALONE="1") == "fine\n"


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_async_engine_when_its_process_is_forked_then_the_child_is_refused_and_the_parent_goes_on(
    model: Path, kind: str
) -> None:
    assert run(_ASYNC, str(model), kind) == "fine\n"
