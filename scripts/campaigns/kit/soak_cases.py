"""What a soak asks for, and of whom: requests out of a bounded pool, engines of every setting. All follows from a seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams

BOUNDARIES = (16, 64, 192, 1024, 2048, 4096)  # positions at which the core changes its ways
CHUNKS = (16, 17, 32, 48, 64, 100, 128, 192, 256, 512, 512, 1024, 2048, 8192)
BLOCKS = (7, 8, 16, 16, 16, 32, 64, 100, 128, 256)
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8 a channel": {"quantization": "int8_channel"},
    "int4": {"quantization": "int4"},
    "float32, bfloat16 cache": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
    "float32, int8 cache": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "bfloat16, int8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "int8, int8 cache": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4, int8 cache": {"quantization": "int4", "kv_cache_dtype": "int8"},
}
ROOM = 64  # positions behind the longest prompt
# Of a model whose matrices are stored rounded.
STORED: dict[str, dict[str, Any]] = {
    "stored types": {},
    "stored types, int8 cache": {"kv_cache_dtype": "int8"},
    "bfloat16": PRECISIONS["bfloat16"],
    "bfloat16, int8 cache": PRECISIONS["bfloat16, int8 cache"],
}
_NEAR = 3  # tokens from a boundary
_NUM_STEMS = 6


@dataclass(frozen=True)
class Model:
    """What the cases must know of the model. `far`: the longest context."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    far: int
    first_token: int = 64  # lower ids may be special tokens


@dataclass(frozen=True)
class Group:
    """Engines whose requests must have equal bits."""

    precision: str
    isa: str

    @property
    def settings(self) -> dict[str, Any]:
        """Of an engine."""
        return {**PRECISIONS, **STORED}[self.precision] | {"isa": self.isa}


@dataclass(frozen=True)
class Asked:
    """One request of the pool."""

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    options: RequestOptions

    @property
    def num_positions(self) -> int:
        """With all its output."""
        return len(self.prompt) + (self.params.max_tokens or 1)

    def __str__(self) -> str:
        params = {name: value for name, value in vars(self.params).items() if value != getattr(_NEUTRAL, name)}
        options = {name: value for name, value in vars(self.options).items() if value != getattr(_NO_OPTIONS, name)}
        options |= {"steering": "..."} if "steering" in options else {}
        return f"request {self.number} of the pool: {len(self.prompt)} prompt tokens, {params}, {options}"


_NEUTRAL, _NO_OPTIONS = SamplingParams(), RequestOptions()


class Pool:
    """`size` requests for each group: made from the seed when they are asked for, equal whenever they are."""

    def __init__(self, seed: int, model: Model, size: int) -> None:
        self.size = size
        self._seed, self._model = seed, model
        self._stems = [self._tokens(Random(f"{seed}/stem/{i}"), model.far) for i in range(_NUM_STEMS)]

    def get(self, group: Group, number: int) -> Asked:
        """Request `number` < size of a group."""
        draw = Random(f"{self._seed}/{group}/{number}")
        params, options = self._params(draw, length := self._length(draw))
        room = self._model.far + ROOM - length
        params = replace(params, max_tokens=max(1, min(params.max_tokens or 1, room)))
        return Asked(number, tuple(self._prompt(draw, length)), params, options)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _length(self, draw: Random) -> int:
        far = self._model.far
        if draw.random() < 0.5:
            return round(math.exp(draw.uniform(0.0, math.log(far))))
        places = BOUNDARIES if draw.random() < 0.7 else (*CHUNKS, *BLOCKS)
        near = [place for place in places if place <= far - _NEAR]
        return max(1, draw.choice(near) + draw.randint(-_NEAR, _NEAR))

    def _prompt(self, draw: Random, length: int) -> list[int]:
        """Half begin as others do; some repeat themselves, so that guesses at what follows come true."""
        kind = draw.random()
        if kind < 0.2:
            return self._tokens(draw, length)
        if kind < 0.4:
            word = self._tokens(draw, draw.randint(1, 12))
            return (word * (length // len(word) + 1))[:length]
        own = draw.choice((0, 1, 5, draw.randint(0, length)))
        return [*draw.choice(self._stems)[: max(0, length - own)], *self._tokens(draw, own)][:length]

    def _tokens(self, draw: Random, count: int) -> list[int]:
        return draw.choices(range(self._model.first_token, self._model.vocab_size), k=count)

    # ---- parameters ---------------------------------------------------------------------------------------------------

    def _params(self, draw: Random, length: int) -> tuple[SamplingParams, RequestOptions]:
        asked: dict[str, Any] = {"max_tokens": _num_tokens(draw), "ignore_eos": draw.random() < 0.9}
        if draw.random() < 0.85:
            asked["logprobs"] = draw.choice((0, 1, 1, 3, 5))
        if (length <= 300 and draw.random() < 0.1) or (length <= 2100 and draw.random() < 0.01):
            asked["prompt_logprobs"] = draw.choice((0, 1, 2))
        asked |= {"temperature": 0.0} if draw.random() < 0.4 else _drawn(draw)
        for chance, extra in _EXTRAS:
            if draw.random() < chance:
                asked |= extra(draw, self._model)
        if "structured_outputs" in asked:
            asked.pop("allowed_token_ids", None)  # they mostly contradict each other, which is refused
        return SamplingParams(**asked), self._options(draw, length, asked["max_tokens"])

    def _options(self, draw: Random, length: int, max_tokens: int) -> RequestOptions:
        options = RequestOptions(priority=draw.choice((0, 0, 0, -1, 3)))
        if draw.random() < 0.05:
            options = replace(options, cache_salt=draw.choice(("a", "b")))
        if draw.random() < 0.12:
            options = replace(options, hidden_states=self._hidden_states(draw, length, max_tokens))
        if length <= 2100 and draw.random() < 0.04:
            options = replace(options, capture=CaptureParams((draw.choice(("layers.0.mlp", "layers.*", "norm")),)))
        if draw.random() < 0.08:
            vector = [draw.uniform(-1, 1) for _ in range(self._model.hidden_size)]
            options = replace(options, steering=SteeringParams.from_request({"layers.0": vector}))
        return options

    def _hidden_states(self, draw: Random, length: int, max_tokens: int) -> HiddenStatesParams:
        if draw.random() < 0.4:
            return HiddenStatesParams()
        last = length + max_tokens - 2
        positions = [draw.choice((-1, 0, length - 1, last, draw.randint(0, last))) for _ in range(draw.randint(1, 4))]
        layers = tuple(draw.sample(range(-1, self._model.num_layers + 1), 2)) if draw.random() < 0.5 else None
        return HiddenStatesParams(tuple(positions), layers)


def _num_tokens(draw: Random) -> int:
    return draw.randint(1, 8) if draw.random() < 0.85 else draw.choice((12, 16, 24, 40))


def _drawn(draw: Random) -> dict[str, Any]:
    """A draw with a seed, sometimes through the whole chain."""
    asked: dict[str, Any] = {"temperature": draw.choice((0.3, 0.8, 1.0, 1.7)), "seed": draw.randrange(2**63)}
    if draw.random() < 0.5:
        asked |= {"top_p": draw.uniform(0.3, 1.0), "top_k": draw.choice((0, 1, 7, 50)), "min_p": draw.choice((0, 0.05))}
    return asked


def _stammer(draw: Random, model: Model) -> dict[str, Any]:
    """Few tokens are allowed: guesses at them come true."""
    return {"allowed_token_ids": draw.sample(range(model.first_token, model.first_token + 200), draw.randint(1, 3))}


def _penalties(draw: Random, model: Model) -> dict[str, Any]:
    return {
        "repetition_penalty": draw.choice((1.0, 0.8, 1.3)),
        "presence_penalty": draw.choice((0.0, -1.0, 1.5)),
        "frequency_penalty": draw.choice((0.0, 0.7)),
    }


def _biases(draw: Random, model: Model) -> dict[str, Any]:
    ids = draw.sample(range(model.first_token, model.first_token + 200), draw.randint(1, 5))
    return {"logit_bias": {token: draw.uniform(-9, 9) for token in ids}}


def _structure(draw: Random, model: Model) -> dict[str, Any]:
    kinds: tuple[dict[str, Any], ...] = (
        {"choice": ["yes", "no", "maybe so"]},
        {"regex": "[a-f]{2,9}(x|yz)*"},
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["p", "q"]}}}},
        {"json_object": True},
    )
    return {"structured_outputs": draw.choice(kinds), "ignore_eos": False}


def _stops(draw: Random, model: Model) -> dict[str, Any]:
    return {"stop": draw.sample(["e", "th", "a", "\n", "zz"], 2), "include_stop_str_in_output": draw.random() < 0.5}


def _others(draw: Random, model: Model) -> dict[str, Any]:
    kinds: tuple[dict[str, Any], ...] = (
        {"bad_words": ["e", "the"]},
        {"stop_token_ids": draw.sample(range(5, 200), 9), "ignore_eos": False},
        {"min_tokens": 1, "ignore_eos": False},
        {"skip_special_tokens": False},
    )
    return draw.choice(kinds)


_EXTRAS: tuple[tuple[float, Callable[[Random, Model], dict[str, Any]]], ...] = (
    (0.1, _stammer),
    (0.12, _penalties),
    (0.05, _biases),
    (0.06, _stops),
    (0.05, _others),
    (0.07, _structure),
    (0.06, lambda draw, model: {"n": draw.choice((2, 2, 3))}),
)

# ---- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One engine and what it is asked for. `bursts`: how many are submitted before each step. `cancel_after`: index of a request
    -> steps behind its submission."""

    group: Group
    settings: dict[str, Any]
    asked: list[Asked]
    bursts: list[int]
    cancel_after: dict[int, int]
    streams: list[bool]

    def __str__(self) -> str:
        return f"{self.group.precision}, {self.group.isa}, {self.settings}"


class Rounds:
    """Round `number` of a soak over these groups, with these numbers of threads."""

    def __init__(self, pool: Pool, seed: int, groups: Sequence[Group], threads: Sequence[int], size: int) -> None:
        self._pool, self._seed, self._groups = pool, seed, groups
        self._threads, self._size = threads, size

    def get(self, number: int) -> Round:
        """Equal whenever it is asked for."""
        draw = Random(f"{self._seed}/round/{number}")
        group = draw.choices(self._groups, [_WEIGHTS.get(group.isa, 4) for group in self._groups])[0]
        settings = _settings(draw, self._threads)
        few = draw.random() < 0.4
        asked = self._asked(draw, group, settings, few)
        settings |= _few_blocks(draw, settings, asked) if few else {"num_blocks": _many_blocks(settings, asked)}
        return Round(group, settings, asked, *self._arrivals(draw, asked))

    def _asked(self, draw: Random, group: Group, settings: dict[str, Any], few_blocks: bool) -> list[Asked]:
        """Out of fewer, so that requests share and repeat."""
        longest, fewest = _longest(settings), 1
        if few_blocks:  # requests of like size, with outputs that need another block: running ones are preempted
            longest, fewest = min(longest, draw.choice((60, 100, 300, 2100))), 12
        drawn = (self._pool.get(group, draw.randrange(self._pool.size)) for _ in range(20 * self._size))
        fitting = (one for one in drawn if one.num_positions <= longest and (one.params.max_tokens or 1) >= fewest)
        found = list(itertools.islice(fitting, max(2, self._size // 2)))
        return draw.choices(found or [self._shortest(group)], k=self._size)

    def _shortest(self, group: Group) -> Asked:
        return min(
            (self._pool.get(group, number) for number in range(self._pool.size)), key=lambda one: one.num_positions
        )

    @staticmethod
    def _arrivals(draw: Random, asked: list[Asked]) -> tuple[list[int], dict[int, int], list[bool]]:
        bursts, left, most = [], len(asked), draw.choice((1, 4, 16, len(asked)))
        while left:
            bursts.append(min(left, draw.randint(0, most)))
            left -= bursts[-1]
        cancelled = {index: draw.choice((0, 1, 2, 5, 20)) for index in range(len(asked)) if draw.random() < 0.05}
        return bursts, cancelled, [draw.random() < 0.5 for _ in asked]


_WEIGHTS = {"portable": 1, "avx2": 3}  # slower ones come less often


def _settings(draw: Random, threads: Sequence[int]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_threads": draw.choice(threads),
        "max_num_batched_tokens": draw.choice(CHUNKS),
        "max_num_seqs": draw.choice((1, 2, 3, 4, 8, 8, 16, 32)),
        "enable_prefix_caching": draw.random() < 0.6,
        "policy": draw.choices(("mixed", "prefill_first", "padded"), (6, 2, 2))[0],
        "seed": draw.randrange(1000),
    }
    if settings["policy"] == "padded":
        settings["max_num_batched_tokens"] = 8192
        return settings
    if settings["policy"] == "prefill_first":
        settings["max_num_batched_tokens"] = draw.choice((256, 512, 2048, 8192))
    if draw.random() < 0.15:
        settings["kv_layout"] = "slot"
    else:
        settings["block_size"] = draw.choice(BLOCKS)
    settings["async_scheduling"] = draw.random() < 0.35
    if draw.random() < 0.35:
        settings |= {
            "speculative_method": "ngram",
            "num_speculative_tokens": draw.choice((1, 3, 4, 8)),
            "prompt_lookup_min": 1,
            "speculative_max_num_seqs": draw.choice((1, 4, 32)),
        }
    return settings


def _many_blocks(settings: dict[str, Any], asked: list[Asked]) -> int:
    """Enough for a dozen of the longest."""
    lengths = sorted((_padded(one) for one in asked), reverse=True)
    choices = max(one.params.n for one in asked)
    return math.ceil(sum(lengths[: 12 * choices]) / _block_size(settings)) + 2


def _few_blocks(draw: Random, settings: dict[str, Any], asked: list[Asked]) -> dict[str, Any]:
    """Enough for the longest and a little more, in small blocks."""
    if "block_size" in settings:
        settings = {**settings, "block_size": draw.choice((1, 2, 7, 16))}
    choices = max(one.params.n for one in asked)
    room = max(map(_padded, asked)) + draw.choice((0, 0, 30, 300))
    num_blocks = math.ceil(room / _block_size(settings)) + 1 + choices
    return {**settings, "num_blocks": num_blocks, "max_num_seqs": max(4, settings["max_num_seqs"])}


def _longest(settings: dict[str, Any]) -> int:
    """What can run, and no round takes ages: where chunks are small, or each token is a block."""
    chunk = int(settings["max_num_batched_tokens"])
    if settings["policy"] == "prefill_first":  # whole prompts
        return chunk
    if chunk < 100:
        return 2100
    return 4200 if settings.get("kv_layout") == "slot" else 10**9


def _block_size(settings: dict[str, Any]) -> int:
    if settings.get("kv_layout") == "slot":
        return 1
    return int(settings.get("block_size", 64 if settings["policy"] == "padded" else 16))


def _padded(asked: Asked) -> int:
    return math.ceil(asked.num_positions / 64) * 64
