"""llama.cpp as a benchmark worker, through the C API that llama-cpp-python wraps; greedy, on exact token ids.

llama-cpp-python has no continuous batching of its own, so `mixed` fills 32 slots the way llama-server does: one batch a step, with the
next token of every running sequence and the prompts of those that were just admitted, up to n_batch tokens.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import llama_cpp as C
import numpy as np
from protocol import Measure, Prompts, serve

N_BATCH, N_UBATCH, N_SEQ = 2048, 512, 32


class Engine:
    """One context with room for 32 sequences."""

    def __init__(self, model: str, threads: int) -> None:
        C.llama_backend_init()
        self.model = C.llama_model_load_from_file(model.encode(), C.llama_model_default_params())
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 32 * 1152, N_BATCH, N_UBATCH, N_SEQ
        params.n_threads = params.n_threads_batch = threads
        # A cache each: in a unified one every token attends over the cells of all sequences, which halves decoding at 32.
        params.kv_unified = False
        self.context = C.llama_init_from_model(self.model, params)
        self.memory = C.llama_get_memory(self.context)
        self.vocab_size = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model))
        self.batch = C.llama_batch_init(N_BATCH, 0, 1)

    def _step(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Decodes (token, position, sequence, wants logits) rows; the greedy token of each sequence that wanted one."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants
        if C.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = {}
        for i, (_, _, sequence, wants) in enumerate(rows):
            if wants:
                logits = np.ctypeslib.as_array(C.llama_get_logits_ith(self.context, i), shape=(self.vocab_size,))
                found[sequence] = int(logits.argmax())
        return found

    def _prefill(self, prompts: Prompts) -> dict[int, int]:
        """Prompts into sequences 0 .. n - 1, as many as fit a batch at a time."""
        C.llama_memory_clear(self.memory, True)
        first: dict[int, int] = {}
        rows: list[tuple[int, int, int, bool]] = []
        for sequence, prompt in enumerate(prompts):
            if len(rows) + len(prompt) > N_BATCH:
                first |= self._step(rows)
                rows = []
            rows += [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
        return first | self._step(rows)

    def decode(self, prompts: Prompts, outputs: list[int]) -> Measure:
        last = self._prefill(prompts)
        began = time.perf_counter()
        for step in range(outputs[0] - 1):
            last = self._step([(token, len(prompts[s]) + step, s, True) for s, token in last.items()])
        return len(prompts) * (outputs[0] - 1), time.perf_counter() - began

    def prefill(self, prompts: Prompts, outputs: list[int]) -> Measure:
        began = time.perf_counter()
        self._prefill(prompts)
        return sum(map(len, prompts)), time.perf_counter() - began

    def single(self, prompts: Prompts, outputs: list[int]) -> Measure:
        return self.mixed(prompts, outputs)

    def mixed(self, prompts: Prompts, outputs: list[int]) -> Measure:
        C.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        waiting = list(range(len(prompts)))
        slots: dict[int, list[int]] = {}  # sequence: [request, position of the next token, token, tokens made]
        while waiting or slots:
            rows = [(token, position, s, True) for s, (_, position, token, _) in slots.items()]
            for s in range(N_SEQ):
                if s not in slots and waiting and len(rows) + len(prompts[waiting[0]]) <= N_BATCH:
                    request = waiting.pop(0)
                    prompt = prompts[request]
                    slots[s] = [request, len(prompt) - 1, 0, 0]
                    rows += [(token, i, s, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            for s, token in self._step(rows).items():
                slot = slots[s]
                slot[1], slot[2], slot[3] = slot[1] + 1, token, slot[3] + 1
                if slot[3] == outputs[slot[0]]:
                    del slots[s]
                    C.llama_memory_seq_rm(self.memory, s, -1, -1)
        return sum(outputs), time.perf_counter() - began


def load(command: dict[str, Any]) -> Engine:
    return Engine(command["model"], command["threads"])


if __name__ == "__main__":
    serve(load, lambda: {"llama-cpp-python": version("llama-cpp-python")})
