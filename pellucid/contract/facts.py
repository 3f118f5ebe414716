"""What the engine, the service and the trace know of a model: plain data that can be sent, without its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec


class ContractDigest(msgspec.Struct, frozen=True):
    """What the bits of an engine depend on: engines of equal contracts give equal bits for equal requests."""

    recipe: int  # number of the core's arithmetic: docs/kernels.md
    isa: str  # instruction set of the kernels
    weights: str  # digest of the configuration and of all weights as they are packed
    formats: tuple[str, ...]  # storage formats of the weights, sorted
    kv_cache_dtype: str
    rotary: str  # digest of the frequencies of all rotary tables
    ops: str = ""  # digest of the program's ops, or of the module's code where there is no program
    tokenizer: str = ""  # digest of its bundle; empty: there is none
    adapter: str = ""

    @property
    def digest(self) -> str:
        """All of it as 32 hexadecimal digits."""
        return hashlib.sha256(repr(msgspec.structs.astuple(self)).encode()).hexdigest()[:32]


class ModelFacts(msgspec.Struct, frozen=True):
    """All that is known of a loaded model outside its executor."""

    name: str  # of its files, without their folder; or what it was asked for by
    model_type: str  # Hugging Face's name of the family
    dtype: str  # of what is not quantized: float32 or bfloat16
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: tuple[int, ...]
    generation_config: dict[str, Any]  # the usable values of generation_config.json
    activations: dict[str, int]  # names that can be captured, in the order in which they are computed, and their widths
    steerable: dict[str, int]  # those of them that a vector can be added to
    fingerprint: str  # of the program on this machine
    contract: ContractDigest
    num_threads: int
    tokenizer: memoryview = memoryview(b"null")  # JSON of its bundle (`Tokenizer.to_bundle`); null: there is none

    def __repr__(self) -> str:
        """Without the tokenizer, which may have megabytes."""
        shown = (f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "tokenizer")
        return f"{type(self).__name__}({', '.join(shown)})"
