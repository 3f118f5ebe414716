"""Objects that threads share without a model's turn: tokenizer, chat template, grammars, request checks, a context of the core."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils.tiny_models import build_tiny_checkpoint
from utils.together import together

from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import StructuredOutputsParams
from pellucid.core import abi
from pellucid.engine.admission import RequestChecker
from pellucid.executor.row_stats import native_row_stats
from pellucid.structure.grammar import compile_grammar
from pellucid.text.detokenizer import IncrementalDetokenizer
from pellucid.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(120)
TEXTS = [f"the quick brown fox {i} jumps over {'lazy dogs ' * i}" for i in range(12)] + ["long " * 2000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("shared"), "llama")


def all_at_once(work: Callable[[int], Any], num_threads: int = 8) -> list[Any]:
    """What each thread makes."""
    return together([partial(work, number) for number in range(num_threads)])


def test_tokenizer_when_threads_share_one_that_is_new_then_ids_texts_and_fingerprint_are_those_of_one_thread(
    model: Path,
) -> None:
    def work(number: int) -> list[object]:
        made: list[object] = [shared.fingerprint]
        for text in TEXTS[number % 3 :] + TEXTS[: number % 3]:
            ids = shared.encode(text)
            pieces = IncrementalDetokenizer(shared, [], skip_special_tokens=True)
            made.append((text, ids, shared.decode(ids), "".join([pieces.add((i,)) for i in ids]) + pieces.flush()))
        messages = [{"role": "user", "content": str(number)}]
        made.append(shared.apply_chat_template(messages) == own.apply_chat_template(messages))
        return sorted(made, key=repr)

    own = Tokenizer.from_directory(model)
    for _ in range(5):
        shared = Tokenizer.from_directory(model)  # its caches are empty
        found = all_at_once(work)
        expected = [
            (text, own.encode(text), own.decode(own.encode(text)), own.decode(own.encode(text))) for text in TEXTS
        ]
        assert found == [sorted([own.fingerprint, *expected, True], key=repr)] * 8


def test_grammar_when_threads_compile_and_follow_it_at_once_then_the_masks_are_those_of_one_thread(model: Path) -> None:
    tokenizer = Tokenizer.from_directory(model)
    tokens = tokenizer.encode("abcabc", add_special_tokens=False)

    def masks(number: int) -> list[bytes]:
        matcher = compile_grammar(spec, tokenizer, vocab_size=300).matcher()
        found = []
        for token in tokens:
            matcher.fill()
            found.append(matcher.mask.tobytes())
            assert matcher.accept(token)
        return found

    for repeat in range(5):
        spec = StructuredOutputsParams(regex=f"(abc|x{repeat}){{2,9}}")
        found = all_at_once(masks)
        assert found == [masks(0)] * 8


def test_checker_when_threads_ask_then_each_is_told_of_its_own_request(model: Path) -> None:
    checker = RequestChecker(Tokenizer.from_directory(model), 300, 64, (2,))

    def check(number: int) -> None:
        for i in range(200):
            ids = [number + 3] * (1 + i % 90)
            if len(ids) + 1 > 64:
                with pytest.raises(ValueError, match=f"prompt has {len(ids)} tokens"):
                    checker.check(ids, SamplingParams())
            else:
                checker.check(ids, SamplingParams())

    all_at_once(check)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_context_when_threads_compute_on_it_then_each_gets_its_own_results(num_threads: int) -> None:
    context = abi.Context(num_threads=num_threads)
    logits = np.random.default_rng(0).standard_normal((8, 16, 300)).astype(np.float32)

    def work(number: int) -> bool:
        source = np.ascontiguousarray(logits[number])
        for _ in range(30):
            target = np.empty_like(source)
            abi.convert(context, source.reshape(-1).view(np.uint8), abi.F32, 16, 300, target)
            stats = native_row_stats(context)(source)
            if not torch.equal(torch.from_numpy(target), torch.from_numpy(source)):
                return False
            if not np.array_equal(stats.max, source.max(axis=1)):
                return False
        return True

    assert all_at_once(work) == [True] * 8
    context.close()
