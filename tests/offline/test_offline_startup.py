"""The serving path imports neither torch nor transformers once a program is packed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from utils.children import finished
from utils.tiny_models import build_tiny_checkpoint

_START = """
import sys
from pellucid import LLM, SamplingParams
with LLM(sys.argv[1], num_blocks=16, max_model_len=64) as llm:
    chat = [{"role": "user", "content": "hello"}]
    output = llm.chat(chat, SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, seed=1, logprobs=2, stop=["zzz"]))[0]
    assert output.finished
    print(llm.engine.executor.model.from_cache)
"""


def imported_modules(model: Path) -> tuple[set[str], str]:
    command = [sys.executable, "-X", "importtime", "-c", _START, str(model)]
    done = finished(command)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}, done.stdout.strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("startup"), "llama")


def test_packed_model_when_started_again_then_imports_no_torch_and_no_model_code(checkpoint: Path) -> None:
    imported_modules(checkpoint)
    modules, from_cache = imported_modules(checkpoint)
    assert from_cache == "True"
    heavy = {"torch", "transformers", "safetensors", "huggingface_hub", "rich", "typer", "matplotlib", "llguidance"}
    assert not modules & heavy
    assert not any(module.startswith(("pellucid.layers", "pellucid.models.llama")) for module in modules)
    assert "pellucid.program.runner" in modules
    assert "pellucid.structure.grammar" not in modules


def test_package_when_imported_alone_then_brings_nothing_with_it() -> None:
    command = [sys.executable, "-c", "import sys, pellucid; print('numpy' in sys.modules, 'torch' in sys.modules)"]
    done = finished(command, check=True)
    assert done.stdout.split() == ["False", "False"]
