"""`Job`: what one HTTP request wants generated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.api.structured_outputs import FIELD, StructuredOutputsParams
from pellucid.errors import InvalidRequestError
from pellucid.structure.grammar import compile_grammar
from pellucid.text.tokenizer import Tokenizer

# Where a structure that holds the grammar of calls is refused.
_OF_TOOLS = {f"{FIELD}.grammar": "tools", f"{FIELD}.json": f"{FIELD}.json", FIELD: "tools"}


@dataclass(frozen=True)
class CallStructure:
    """A structure made of calls of tools and, where `answer` is not None, of the request's own."""

    answer: StructuredOutputsParams | None = None

    def named(self, error: InvalidRequestError) -> InvalidRequestError:
        """An error of the whole structure as one of the tools."""
        return error.named(_OF_TOOLS)

    def blamed(self, error: InvalidRequestError, tokenizer: Tokenizer) -> InvalidRequestError:
        """An error of the whole structure as one of the part that is refused also when it stands alone."""
        if error.param == FIELD and self.answer is not None:
            try:
                compile_grammar(self.answer, tokenizer)
            except InvalidRequestError as own:
                return own
        return self.named(error)


@dataclass(frozen=True)
class Job:
    """What to generate. Choice `i` of prompt `p` has index `p * params.n + i`."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    options: list[RequestOptions]  # of each prompt
    calls: CallStructure | None = None  # the structure of the output is, at least in part, that of tool calls
    stream: bool = True  # deltas are read; without it only the whole
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def wants_states(self) -> bool:
        """True when an answer may be too large to be encoded on the event loop."""
        return any(one.hidden_states is not None or one.capture is not None for one in self.options)

    @property
    def engine_ids(self) -> list[str]:
        """The engine's name of each prompt's request."""
        if len(self.prompts) == 1:
            return [self.request_id]
        return [f"{self.request_id}-{number}" for number in range(len(self.prompts))]
