"""Scenarios in words, and every step that must come of them: policies `mixed` and `prefill_first` on a real engine.

Each row was checked by hand against the rules of docs/scheduler.md. Blocks have 4 tokens and a step 8 unless a table says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM
from pellucid.testing import StepTable, TableRequest, TableRow, check_step_table

BEHIND = "head of the queue waits"
AB = tuple(range(50, 58))  # two full blocks
ENGINE = {
    "num_threads": 1,
    "block_size": 4,
    "num_blocks": 8,
    "max_model_len": 32,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "enable_prefix_caching": False,
}


def row(
    after: int,
    kind: str,
    tokens: dict[str, int],
    running: list[str],
    reasons: dict[str, str],
    n_used_blocks: int,
    **more: Any,
) -> TableRow:
    """Behind a step: what it computed, who runs then, why others waited, blocks in use. Whoever computes brings a token, and
    nobody ends, unless it is said."""
    values = {
        "kind": kind,
        "tokens": tokens,
        "running": running,
        "waiting_reasons": reasons,
        "n_used_blocks": n_used_blocks,
        "request_outputs": list(tokens),
        "finished_requests": [],
        "preempted": [],
        "n_prefix_hits": 0,
    }
    return TableRow(after, {**values, **more})


def table(name: str, scenario: str, requests: list[TableRequest], rows: list[TableRow], **engine: Any) -> StepTable:
    return StepTable(name, scenario, requests, rows, {**ENGINE, **engine})


TABLES = [
    table(
        "mixed: prompts that exceed the budget",
        "Budget 8. a (6 tokens) and b (5): b gets the 2 that a leaves. c (9) gets what decodes and b's rest "
        "leave, twice.",
        [TableRequest("a", 6, 3), TableRequest("b", 5, 2), TableRequest("c", 9, 1)],
        [
            row(1, "prefill", {"a": 6, "b": 2}, ["a", "b"], {"c": "token budget of 8 spent"}, 4, request_outputs=["a"]),
            row(2, "mixed", {"a": 1, "b": 3, "c": 4}, ["a", "b", "c"], {}, 7, request_outputs=["a", "b"]),
            row(3, "mixed", {"a": 1, "b": 1, "c": 5}, [], {}, 0, finished_requests=["a", "b", "c"]),
        ],
        policy="mixed",
    ),
    table(
        "mixed: a long prompt beside a decode",
        "Budget 8. a decodes while a prompt of 20 tokens comes in pieces of 7, 7 and 6: a decode never waits for "
        "a prompt.",
        [TableRequest("a", 2, 5), TableRequest("long", 20, 2, at=1)],
        [
            row(1, "prefill", {"a": 2}, ["a"], {}, 1),
            row(2, "mixed", {"a": 1, "long": 7}, ["a", "long"], {}, 6, request_outputs=["a"]),
            row(4, "mixed", {"a": 1, "long": 6}, ["a", "long"], {}, 7),
            row(5, "decode", {"a": 1, "long": 1}, [], {}, 0, finished_requests=["a", "long"]),
        ],
        policy="mixed",
    ),
    table(
        "mixed: one place",
        "One request may run. b and c wait, b for the place, c for b.",
        [TableRequest("a", 2, 2), TableRequest("b", 2, 1), TableRequest("c", 2, 1)],
        [
            row(1, "prefill", {"a": 2}, ["a"], {"b": "max_num_seqs 1 reached", "c": BEHIND}, 1),
            row(2, "decode", {"a": 1}, [], {"b": "max_num_seqs 1 reached", "c": BEHIND}, 0, finished_requests=["a"]),
            row(3, "prefill", {"b": 2}, [], {"c": "max_num_seqs 1 reached"}, 0, finished_requests=["b"]),
            row(4, "prefill", {"c": 2}, [], {}, 0, finished_requests=["c"]),
        ],
        policy="mixed",
        max_num_seqs=1,
    ),
    table(
        "mixed: blocks run out",
        "4 blocks of 2. a needs a third: b gives way with its two tokens kept, nobody new comes in although c "
        "would fit, and b resumes over prompt and outputs as one prefill.",
        [TableRequest("a", 3, 3), TableRequest("b", 3, 4), TableRequest("c", 1, 1)],
        [
            row(1, "prefill", {"a": 3, "b": 3}, ["a", "b"], {"c": "no free blocks: needs 1, 0 free"}, 4),
            row(2, "decode", {"a": 1, "b": 1}, ["a", "b"], {"c": "no free blocks: needs 1, 0 free"}, 4),
            row(
                3,
                "decode",
                {"a": 1},
                [],
                {"b": "blocks are short: 1 preempted in this step", "c": BEHIND},
                0,
                finished_requests=["a"],
                preempted=["b"],
            ),
            row(4, "prefill", {"b": 5, "c": 1}, ["b"], {}, 3, finished_requests=["c"]),
            row(5, "decode", {"b": 1}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
        num_blocks=4,
        block_size=2,
    ),
    table(
        "mixed: the least important gives way",
        "3 blocks of 2. The unimportant a came first; when both need a block it is a who gives way, and it waits "
        "until all 3 are free.",
        [TableRequest("a", 3, 3, priority=5), TableRequest("b", 1, 4, at=1)],
        [
            row(1, "prefill", {"a": 3}, ["a"], {}, 2),
            row(2, "mixed", {"a": 1, "b": 1}, ["a", "b"], {}, 3),
            row(3, "decode", {"b": 1}, ["b"], {"a": "blocks are short: 1 preempted in this step"}, 1, preempted=["a"]),
            row(4, "decode", {"b": 1}, ["b"], {"a": "no free blocks: needs 3, 1 free"}, 2),
            row(5, "decode", {"b": 1}, [], {"a": "no free blocks: needs 3, 1 free"}, 0, finished_requests=["b"]),
            row(6, "prefill", {"a": 5}, [], {}, 0, finished_requests=["a"]),
        ],
        policy="mixed",
        num_blocks=3,
        block_size=2,
    ),
    table(
        "mixed: a prefix hit in the next step",
        "b's first 8 tokens are what a computed one step ago: it computes the 3 behind them and shares a's two blocks.",
        [
            TableRequest("a", AB, 3),
            TableRequest(
                "b",
                (
                    *AB,
                    1,
                    2,
                    3,
                ),
                1,
                at=1,
            ),
        ],
        [
            row(1, "prefill", {"a": 8}, ["a"], {}, 2),
            row(2, "mixed", {"a": 1, "b": 3}, ["a"], {}, 3, finished_requests=["b"], n_prefix_hits=1),
            row(3, "decode", {"a": 1}, [], {}, 0, finished_requests=["a"]),
        ],
        policy="mixed",
        enable_prefix_caching=True,
    ),
    table(
        "mixed: equal prompts in one step",
        "a and b have the same 4 tokens and come together: each computes its own. c comes a step later and shares.",
        [TableRequest("a", AB[:4], 2), TableRequest("b", AB[:4], 2), TableRequest("c", (*AB[:4], 9), 1, at=1)],
        [
            row(1, "prefill", {"a": 4, "b": 4}, ["a", "b"], {}, 2),
            row(2, "mixed", {"a": 1, "b": 1, "c": 1}, [], {}, 0, finished_requests=["a", "b", "c"], n_prefix_hits=1),
        ],
        policy="mixed",
        enable_prefix_caching=True,
    ),
    table(
        "mixed: a prompt that is cached whole",
        "a has ended, its blocks are still there. b is the same prompt: the last token alone is computed again. "
        "The engine was idle in between.",
        [TableRequest("a", AB, 1), TableRequest("b", AB, 2, at=2)],
        [
            row(1, "prefill", {"a": 8}, [], {}, 0, finished_requests=["a"]),
            row(2, "none", {}, [], {}, 0),
            row(3, "prefill", {"b": 1}, ["b"], {}, 2, n_prefix_hits=1),
            row(4, "decode", {"b": 1}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
        enable_prefix_caching=True,
    ),
    table(
        "mixed: cancel frees the head of the queue",
        "b needs 5 of 6 blocks and waits while a grows; a is cancelled, and in the very next step b comes in.",
        [TableRequest("a", 12, 20, cancel_at=3), TableRequest("b", 20, 2)],
        [
            row(1, "prefill", {"a": 8}, ["a"], {"b": "token budget of 8 spent"}, 3, request_outputs=[]),
            row(2, "prefill", {"a": 4}, ["a"], {"b": "no free blocks: needs 5, 3 free"}, 3),
            row(3, "decode", {"a": 1}, [], {"b": "no free blocks: needs 5, 2 free"}, 4),
            row(4, "prefill", {"b": 8}, ["b"], {}, 5, request_outputs=[]),
            row(6, "prefill", {"b": 4}, ["b"], {}, 5),
            row(7, "decode", {"b": 1}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
        num_blocks=6,
    ),
    table(
        "mixed: cancel in the queue",
        "b is cancelled while it waits; c takes its turn when a has ended.",
        [TableRequest("a", 3, 3), TableRequest("b", 3, 1, cancel_at=2), TableRequest("c", 3, 1)],
        [
            row(1, "prefill", {"a": 3}, ["a"], {"b": "max_num_seqs 1 reached", "c": BEHIND}, 1),
            row(2, "decode", {"a": 1}, ["a"], {"b": "max_num_seqs 1 reached", "c": BEHIND}, 1),
            row(3, "decode", {"a": 1}, [], {"c": "max_num_seqs 1 reached"}, 0, finished_requests=["a"]),
            row(4, "prefill", {"c": 3}, [], {}, 0, finished_requests=["c"]),
        ],
        policy="mixed",
        max_num_seqs=1,
    ),
    table(
        "mixed: cancel within a prompt",
        "a has computed 8 of its 20 tokens when it is cancelled: it ends without a token and b starts on free blocks.",
        [TableRequest("a", 20, 2, cancel_at=1), TableRequest("b", 8, 1)],
        [
            row(1, "prefill", {"a": 8}, [], {"b": "token budget of 8 spent"}, 5, request_outputs=[]),
            row(2, "prefill", {"b": 8}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
    ),
    table(
        "mixed: an important request comes late",
        "One place. c arrives last and is the most important: it comes in before b.",
        [TableRequest("a", 3, 2, priority=1), TableRequest("b", 3, 1, priority=1), TableRequest("c", 3, 1, at=1)],
        [
            row(1, "prefill", {"a": 3}, ["a"], {"b": "max_num_seqs 1 reached"}, 1),
            row(2, "decode", {"a": 1}, [], {"c": "max_num_seqs 1 reached", "b": BEHIND}, 0, finished_requests=["a"]),
            row(3, "prefill", {"c": 3}, [], {"b": "max_num_seqs 1 reached"}, 0, finished_requests=["c"]),
            row(4, "prefill", {"b": 3}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
        max_num_seqs=1,
    ),
    table(
        "mixed: impossible requests",
        "One needs more blocks than exist, one more tokens than max_model_len: both are refused at once and a and "
        "b never notice.",
        [
            TableRequest("a", 3, 2),
            TableRequest("huge", 31, 2, at=1, refused="needs 8 blocks of 4 tokens; 7 exist"),
            TableRequest("long", 32, 1, at=1, refused="max_model_len is 32"),
            TableRequest("b", 2, 1, at=1),
        ],
        [
            row(1, "prefill", {"a": 3}, ["a"], {}, 1),
            row(2, "mixed", {"a": 1, "b": 2}, [], {}, 0, finished_requests=["a", "b"]),
        ],
        policy="mixed",
        num_blocks=7,
    ),
    table(
        "mixed: a request outgrows all blocks",
        "2 blocks of 4 hold 8 tokens. a's ninth could never be computed: it ends with an error, and b, which "
        "waited, runs.",
        [TableRequest("a", 6, 9), TableRequest("b", 2, 1, at=2)],
        [
            row(1, "prefill", {"a": 6}, ["a"], {}, 2),
            row(2, "decode", {"a": 1}, ["a"], {}, 2),
            row(3, "decode", {"a": 1}, [], {"b": "no free blocks: needs 1, 0 free"}, 0, finished_requests=["a"]),
            row(4, "prefill", {"b": 2}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="mixed",
        num_blocks=2,
    ),
    table(
        "mixed: two choices of one prompt",
        "The second choice waits until the first has computed the prompt of 9, then shares its two full blocks "
        "and computes one token.",
        [TableRequest("a", 9, 2, params={"n": 2})],
        [
            row(1, "prefill", {"a/0": 8}, ["a/0"], {"a/1": "token budget of 8 spent"}, 3, request_outputs=[]),
            row(2, "prefill", {"a/0": 1}, ["a/0"], {"a/1": "waits for the shared prompt of its first choice"}, 3),
            row(3, "mixed", {"a/0": 1, "a/1": 1}, ["a/1"], {}, 3, finished_requests=["a/0"]),
            row(4, "decode", {"a/1": 1}, [], {}, 0, finished_requests=["a/1"]),
        ],
        policy="mixed",
    ),
    table(
        "prefill_first: prefills before decodes",
        "Two places. a and b are prefilled together; c comes in as soon as a's place is free, and b's next token "
        "waits for that step.",
        [TableRequest("a", 4, 2), TableRequest("b", 4, 3), TableRequest("c", 3, 2)],
        [
            row(1, "prefill", {"a": 4, "b": 4}, ["a", "b"], {"c": "max_num_seqs 2 reached"}, 2),
            row(2, "decode", {"a": 1, "b": 1}, ["b"], {"c": "max_num_seqs 2 reached"}, 2, finished_requests=["a"]),
            row(3, "prefill", {"c": 3}, ["b", "c"], {}, 3),
            row(4, "decode", {"b": 1, "c": 1}, [], {}, 0, finished_requests=["b", "c"]),
        ],
        policy="prefill_first",
        max_num_seqs=2,
    ),
    table(
        "prefill_first: nobody passes the head",
        "Budget 8. Behind a (5 tokens) 3 are left: b (4) does not fit, and c (1), which would, stays behind it. "
        "The decode comes last.",
        [TableRequest("a", 5, 2), TableRequest("b", 4, 1), TableRequest("c", 1, 1)],
        [
            row(1, "prefill", {"a": 5}, ["a"], {"b": "token budget of 8: needs 4, 3 left", "c": BEHIND}, 2),
            row(2, "prefill", {"b": 4, "c": 1}, ["a"], {}, 2, finished_requests=["b", "c"]),
            row(3, "decode", {"a": 1}, [], {}, 0, finished_requests=["a"]),
        ],
        policy="prefill_first",
    ),
    table(
        "prefill_first: a prefix hit leaves budget",
        "Budget 9. b takes 8; of c's 9 tokens 8 are cached, so that its last fits the step too.",
        [
            TableRequest("a", AB, 1),
            TableRequest("b", 8, 1, at=1),
            TableRequest(
                "c",
                (
                    *AB,
                    9,
                ),
                1,
                at=1,
            ),
        ],
        [
            row(1, "prefill", {"a": 8}, [], {}, 0, finished_requests=["a"]),
            row(2, "prefill", {"b": 8, "c": 1}, [], {}, 0, finished_requests=["b", "c"], n_prefix_hits=1),
        ],
        policy="prefill_first",
        enable_prefix_caching=True,
        max_num_batched_tokens=9,
    ),
    table(
        "prefill_first: blocks run out",
        "4 blocks of 2. As with mixed, b gives way to a; c, which comes then, is prefilled in one step with b's "
        "prompt and outputs.",
        [TableRequest("a", 3, 3), TableRequest("b", 3, 4), TableRequest("c", 1, 1, at=3)],
        [
            row(1, "prefill", {"a": 3, "b": 3}, ["a", "b"], {}, 4),
            row(2, "decode", {"a": 1, "b": 1}, ["a", "b"], {}, 4),
            row(
                3,
                "decode",
                {"a": 1},
                [],
                {"b": "blocks are short: 1 preempted in this step"},
                0,
                finished_requests=["a"],
                preempted=["b"],
            ),
            row(4, "prefill", {"b": 5, "c": 1}, ["b"], {}, 3, finished_requests=["c"]),
            row(5, "decode", {"b": 1}, [], {}, 0, finished_requests=["b"]),
        ],
        policy="prefill_first",
        num_blocks=4,
        block_size=2,
        max_num_batched_tokens=6,
    ),
    table(
        "prefill_first: cancel behind a prefill, then preemption",
        "b is cancelled right behind its prefill and leaves its blocks to c. Then a and c both need one and one "
        "is left: c gives way and waits for a's end. Its 9 tokens are one more than a step has: they are cut.",
        [TableRequest("a", 8, 9), TableRequest("b", 8, 3, at=1, cancel_at=2), TableRequest("c", 8, 2, at=1)],
        [
            row(1, "prefill", {"a": 8}, ["a"], {}, 2),
            row(2, "prefill", {"b": 8}, ["a"], {"c": "token budget of 8 spent"}, 4),
            row(3, "prefill", {"c": 8}, ["a", "c"], {}, 4),
            row(4, "decode", {"a": 1}, ["a"], {"c": "blocks are short: 1 preempted in this step"}, 3, preempted=["c"]),
            row(5, "decode", {"a": 1}, ["a"], {"c": "no free blocks: needs 3, 2 free"}, 3),
            row(8, "decode", {"a": 1}, ["a"], {"c": "no free blocks: needs 3, 2 free"}, 4),
            row(9, "decode", {"a": 1}, ["a"], {"c": "no free blocks: needs 3, 1 free"}, 4),
            row(11, "decode", {"a": 1}, [], {"c": "no free blocks: needs 3, 1 free"}, 0, finished_requests=["a"]),
            row(12, "prefill", {"c": 8}, ["c"], {}, 3, request_outputs=[]),
            row(13, "decode", {"c": 1}, [], {}, 0, finished_requests=["c"]),
        ],
        policy="prefill_first",
        num_blocks=5,
    ),
    table(
        "prefill_first: an important prompt comes late",
        "Every prompt needs most of a step. c comes last, is the most important, and is prefilled before b; a's "
        "decode waits for both.",
        [TableRequest("a", 6, 2), TableRequest("b", 6, 1), TableRequest("c", 6, 1, at=1, priority=-1)],
        [
            row(1, "prefill", {"a": 6}, ["a"], {"b": "token budget of 8: needs 6, 2 left"}, 2),
            row(2, "prefill", {"c": 6}, ["a"], {"b": "token budget of 8: needs 6, 2 left"}, 2, finished_requests=["c"]),
            row(3, "prefill", {"b": 6}, ["a"], {}, 2, finished_requests=["b"]),
            row(4, "decode", {"a": 1}, [], {}, 0, finished_requests=["a"]),
        ],
        policy="prefill_first",
    ),
    table(
        "prefill_first: a prompt longer than a step",
        "9 tokens never fit a step of 8, and prefill_first does not cut: refused at once. Its neighbours run.",
        [
            TableRequest("a", 8, 2),
            TableRequest(
                "long", 9, 1, refused="policy prefill_first computes whole prompts and max_num_batched_tokens is 8"
            ),
            TableRequest("b", 8, 1),
        ],
        [
            row(1, "prefill", {"a": 8}, ["a"], {"b": "token budget of 8 spent"}, 2),
            row(2, "prefill", {"b": 8}, ["a"], {}, 2, finished_requests=["b"]),
            row(3, "decode", {"a": 1}, [], {}, 0, finished_requests=["a"]),
        ],
        policy="prefill_first",
    ),
]
# How requests end that are not named end by length.
ENDINGS = {
    ("mixed: cancel frees the head of the queue", "a"): ("abort", 2),
    ("mixed: cancel in the queue", "b"): ("abort", 0),
    ("mixed: cancel within a prompt", "a"): ("abort", 0),
    ("mixed: a request outgrows all blocks", "a"): ("error", 3),
    ("prefill_first: cancel behind a prefill, then preemption", "b"): ("abort", 1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tables"), "llama", num_hidden_layers=2)


@pytest.mark.parametrize("one", TABLES, ids=lambda one: one.name)
def test_scenario_when_it_runs_then_every_step_is_as_in_its_table(model: Path, one: StepTable) -> None:
    with LLM(model, **one.engine) as llm:
        outputs = check_step_table(llm.engine, one)
    for request in one.requests:
        if request.refused is None:
            choice = outputs[request.request_id].outputs[0]
            expected = ENDINGS.get((one.name, request.request_id), ("length", request.max_tokens))
            assert (choice.finish_reason, len(choice.token_ids)) == expected


def test_tables_when_counted_then_both_policies_have_their_share() -> None:
    policies = [one.engine["policy"] for one in TABLES]
    assert len({one.name for one in TABLES}) == len(TABLES)
    assert policies.count("mixed") >= 12
    assert policies.count("prefill_first") >= 6
