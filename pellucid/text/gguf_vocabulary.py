"""Turns the tokenizer metadata of a GGUF file into the text of a tokenizer.json.

Keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (section "Tokenizer").
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from pellucid.errors import TokenizerError
from pellucid.text.backend import SpecialTokens
from pellucid.text.byte_alphabet import BYTE_OF_CHARACTER, spell_bytes

_MAX_TOKENS = 1 << 22
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_T = TypeVar("_T")


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text before merging.

    `pattern` is the splitting expression, None for GPT-2's own; `digits` cuts every digit off first;
    `ignore_merges` takes a word that is in the vocabulary as it is.
    """

    pattern: str | None = None
    digits: bool = False
    ignore_merges: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_UPPER_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPERS_LOWER = r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN = _UPPER_LOWER + _UPPERS_LOWER + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_GPT4O = (
    _UPPER_LOWER + _CONTRACTIONS + "?" + _UPPERS_LOWER + _CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)

_KINDS: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (PreTokenizer(), ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "gigachat")),
    (PreTokenizer(digits=True), ("smollm", "starcoder", "refact", "command-r", "codeshell")),
    (PreTokenizer(_LLAMA3, ignore_merges=True), ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "lfm2")),
    (PreTokenizer(_LLAMA3), ("dbrx", "smaug-bpe")),
    (PreTokenizer(_QWEN2), ("qwen2", "qwen3", "stablelm2", "deepseek-r1-qwen", "megrez")),
    (PreTokenizer(_QWEN35), ("qwen35",)),
    (PreTokenizer(_TEKKEN, ignore_merges=True), ("tekken",)),
    (PreTokenizer(_GPT4O), ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
)
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS for name in names}
"""`tokenizer.ggml.pre` -> how to cut."""

_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
"""Control tokens that end a turn and so a generation, where the model's chat template writes them."""

_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_gguf(metadata: Mapping[str, object]) -> tuple[str, SpecialTokens, int]:
    """(tokenizer.json text, special tokens, first id beyond the vocabulary).

    Raises:
        TokenizerError: see `Tokenizer.from_gguf`.
    """
    vocabulary = _Vocabulary.read(metadata)
    builder = _MODELS.get(vocabulary.model)
    if builder is None:
        raise TokenizerError(
            f"tokenizer.ggml.model is {vocabulary.model!r}; implemented are {', '.join(sorted(_MODELS))}"
        )
    parts = builder(vocabulary)
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(vocabulary, parts["model"]["vocab"]),
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": _post_processor(vocabulary),
            **parts,
        },
        ensure_ascii=False,
    )
    return text, _special_tokens(vocabulary), len(vocabulary.tokens)


@dataclass(frozen=True)
class _Vocabulary:
    """The metadata, checked."""

    model: str
    pre: str
    architecture: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    named: dict[str, int]  # "bos_token" -> id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: dict[str, str]
    turn_ends: tuple[int, ...]

    @classmethod
    def read(cls, metadata: Mapping[str, object]) -> _Vocabulary:
        get = _Reader(metadata)
        model = get.scalar("tokenizer.ggml.model", str)
        tokens = get.array("tokenizer.ggml.tokens", _as_text)
        if model is None or tokens is None:
            raise TokenizerError("the GGUF metadata has no tokenizer.ggml.model and tokenizer.ggml.tokens")
        if not 0 < len(tokens) <= _MAX_TOKENS:
            raise TokenizerError(f"tokenizer.ggml.tokens has {len(tokens)} entries; it must have 1..{_MAX_TOKENS}")
        architecture = get.scalar("general.architecture", str) or ""
        named = {name: get.token_id(f"tokenizer.ggml.{key}", len(tokens)) for name, key in _NAMED_IDS.items()}
        ends = (get.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens)) for key in ("eot", "eom"))
        prefix = get.scalar("tokenizer.ggml.add_space_prefix", bool)
        add_bos = get.scalar("tokenizer.ggml.add_bos_token", bool)
        template = get.scalar("tokenizer.chat_template", str)
        types = get.array("tokenizer.ggml.token_type", operator.index, len(tokens))
        return cls(
            model=model,
            pre=get.scalar("tokenizer.ggml.pre", str) or "default",
            architecture=architecture,
            tokens=tokens,
            types=types if types is not None else [_NORMAL] * len(tokens),
            scores=get.array("tokenizer.ggml.scores", float, len(tokens)),
            merges=get.array("tokenizer.ggml.merges", _as_text),
            named={name: token_id for name, token_id in named.items() if token_id is not None},
            # Older files have no flag; a SentencePiece vocabulary then begins with BOS.
            add_bos=add_bos if add_bos is not None else model == "llama",
            add_eos=bool(get.scalar("tokenizer.ggml.add_eos_token", bool)),
            add_space_prefix=prefix if prefix is not None else not architecture.startswith("gemma"),
            chat_templates={"default": template} if template else {},
            turn_ends=tuple(token_id for token_id in ends if token_id is not None),
        )


class _Reader:
    """Typed access to metadata: a wrong type is a TokenizerError that names the key."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def scalar(self, key: str, kind: type[_T]) -> _T | None:
        value: Any = self._metadata.get(key)
        if value is None:
            return None
        if kind is str:
            value = _as_text(value, key)
        elif type(value).__name__ in ("bool", "bool_"):
            value = bool(value)
        if not isinstance(value, kind):
            raise TokenizerError(f"{key} is a {type(value).__name__}; it must be a {kind.__name__}")
        return value

    def array(self, key: str, convert: Callable[[Any], _T], length: int | None = None) -> list[_T] | None:
        value: Any = self._metadata.get(key)
        if value is None:
            return None
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TokenizerError(f"{key} is a {type(value).__name__}; it must be an array")
        if length is not None and len(value) != length:
            raise TokenizerError(f"{key} has {len(value)} entries; tokenizer.ggml.tokens has {length}")
        try:
            return [convert(entry) for entry in value]
        except (TypeError, ValueError, TokenizerError) as error:
            raise TokenizerError(f"{key} holds an entry of a wrong type: {error}") from error

    def token_id(self, key: str, limit: int) -> int | None:
        value: Any = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TokenizerError(f"{key} is a {type(value).__name__}; it must be an integer")
        token_id = operator.index(value)
        return token_id if 0 <= token_id < limit else None  # some files write -1 for none


def _as_text(value: object, key: str = "") -> str:
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{key or 'an entry'} is not UTF-8: {error}") from error
    if not isinstance(value, str):
        raise TokenizerError(f"{key or 'an entry'} is a {type(value).__name__}; it must be a string")
    return value


# --- byte-level BPE --------------------------------------------------------------------------------------


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    kind = PRE_TOKENIZERS.get(vocabulary.pre)
    if kind is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {vocabulary.pre!r}; implemented are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    if vocabulary.merges is None:
        raise TokenizerError("a byte-level vocabulary (tokenizer.ggml.model 'gpt2') needs tokenizer.ggml.merges")
    alphabet = frozenset(BYTE_OF_CHARACTER)
    whole = (_CONTROL, _USER_DEFINED)
    vocab = {
        # Ordinary tokens are spelled in the byte alphabet; those that are matched whole keep their text.
        token if token_type in whole or alphabet.issuperset(token) else spell_bytes(token): index
        for index, (token, token_type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not kind.pattern}
    steps: list[dict[str, object]] = []
    if kind.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if kind.pattern:
        steps.append({"type": "Split", "pattern": {"Regex": kind.pattern}, "behavior": "Isolated", "invert": False})
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "decoder": {**byte_level, "use_regex": True},
        "model": _bpe(vocab, _listed_merges(vocabulary.merges, vocab), ignore_merges=kind.ignore_merges),
    }


def _listed_merges(lines: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for index, line in enumerate(lines):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(f"tokenizer.ggml.merges[{index}] is {line!r}; it must join two tokens into a third")
        merges.append((left, right))
    return merges


# --- SentencePiece BPE -----------------------------------------------------------------------------------


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    gemma = vocabulary.architecture.startswith("gemma")
    tokens = vocabulary.tokens
    if gemma:
        # Runs of spaces are stored as spaces, while text reaches the merges with U+2581 in their place.
        tokens = ["\u2581" * len(token) if token.isspace() and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    if vocabulary.merges is not None:
        merges = _listed_merges(vocabulary.merges, vocab)
    elif gemma:
        # Gemma's scores do not follow the order of its merges; the order of its tokens does.
        merges = _merges_by_score(vocab, {token: -index for token, index in vocab.items()})
    elif vocabulary.scores is not None:
        merges = _merges_by_score(vocab, dict(zip(tokens, vocabulary.scores, strict=True)))
    else:
        raise TokenizerError("a SentencePiece vocabulary (tokenizer.ggml.model 'llama') needs tokenizer.ggml.scores")
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.named.get("unk_token")
    return {
        **_space_handling(vocabulary),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[unknown] if gemma and unknown is not None else None,
        ),
    }


def _space_handling(vocabulary: _Vocabulary) -> dict[str, object]:
    """How spaces become U+2581, and where one is put before the text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if not vocabulary.add_space_prefix:
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        return {"normalizer": replace, "pre_tokenizer": split}
    if vocabulary.architecture == "phi3":
        # The only family that also prepends to a text which begins with a space.
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        return {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return {"pre_tokenizer": metaspace}


def _merges_by_score(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best score first; of equal score the longer left part, then right.

    SentencePiece joins the neighbours whose union scores best, so a score is the rank of a merge.
    """
    best_first = sorted(scores.items(), key=operator.itemgetter(1), reverse=True)
    merges: list[tuple[str, str]] = []
    for _, group in groupby(best_first, key=operator.itemgetter(1)):
        cuts = [
            (left, right)
            for token, _ in group
            for cut in range(len(token) - 1, 0, -1)
            if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab
        ]
        if len(cuts) > 1:
            cuts.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        merges += cuts
    return merges


# --- shared ----------------------------------------------------------------------------------------------


def _bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    ignore_merges: bool = False,
    unk_token: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _added_tokens(vocabulary: _Vocabulary, vocab: Mapping[str, int]) -> list[dict[str, object]]:
    """The tokens that are matched whole in text: control (special) and user-defined, and those that have a name."""
    named = frozenset(vocabulary.named.values())
    added: list[dict[str, object]] = []
    for index, (token, token_type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = token_type == _CONTROL or index in named
        if (special or token_type == _USER_DEFINED) and token and vocab.get(token) == index:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": index, "content": token, **flags, "special": special})
    return added


def _post_processor(vocabulary: _Vocabulary) -> dict[str, object] | None:
    """BOS before and EOS after the text, as the flags say."""
    around: dict[str, int] = {}
    for name, wanted in (("bos_token", vocabulary.add_bos), ("eos_token", vocabulary.add_eos)):
        if wanted and name in vocabulary.named:
            around[name] = vocabulary.named[name]
    if not around:
        return None

    def sequence(name: str, type_id: int) -> list[dict[str, object]]:
        def special(key: str) -> list[dict[str, object]]:
            return [{"SpecialToken": {"id": key, "type_id": type_id}}] if key in around else []

        text: dict[str, object] = {"Sequence": {"id": name, "type_id": type_id}}
        return [*special("bos_token"), text, *special("eos_token")]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]}
            for name, token_id in around.items()
        },
    }


def _special_tokens(vocabulary: _Vocabulary) -> SpecialTokens:
    named = vocabulary.named
    template = vocabulary.chat_templates.get("default", "")
    written = frozenset(token for token in _TURN_ENDS if token in template)
    ends = [
        index
        for index, (token, token_type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if token_type == _CONTROL and token in written
    ]
    own = [named["eos_token"]] if "eos_token" in named else []
    return SpecialTokens(
        bos_token_id=named.get("bos_token"),
        eos_token_ids=tuple(dict.fromkeys([*own, *vocabulary.turn_ends, *ends])),
        pad_token_id=named.get("pad_token"),
        names={name: vocabulary.tokens[token_id] for name, token_id in named.items()},
        chat_templates=vocabulary.chat_templates,
    )


_MODELS: dict[str, Callable[[_Vocabulary], dict[str, Any]]] = {"gpt2": _byte_level, "llama": _sentencepiece}
