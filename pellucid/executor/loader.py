"""Loading: a model's files become a packed program, kept in the user's cache and mapped at the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.errors import (
    ConfigError,
    ForeignOperationError,
    ModelNotFoundError,
    PellucidError,
    StorageError,
    UnsupportedModelError,
    WeightFormatError,
    about,
    shown,
)
from pellucid.executor.file_values import FileValues, Origins
from pellucid.executor.program_cache import PROGRAM_SUFFIX, ProgramCache
from pellucid.files import storage_errors
from pellucid.models.config import ModelConfig, architecture_of
from pellucid.models.registry import ModelRegistry
from pellucid.program.builder import FORMAT_VERSION, build_program_file
from pellucid.program.file import ProgramFile, open_program_file
from pellucid.program.scheme import WeightScheme
from pellucid.program.verify import verify_file
from pellucid.text.tokenizer import Tokenizer
from pellucid.version import VERSION
from pellucid.weights.hub import cache_dir, remove_leftovers, resolve_model

if TYPE_CHECKING:
    from pellucid.weights.checkpoint import Checkpoint

# Rooms whose code decides what a program is: a change there makes cached programs stale.
_CODE_OF_A_PROGRAM = ("layers", "models", "ops", "program", "core", "text", "weights")
_PACKING_ATTEMPTS = 3  # another process may remove a program before this one holds it
_CORE_DTYPES = {"float32": abi.F32, "bfloat16": abi.BF16}

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model's program, and the values of its files."""

    config: ModelConfig
    generation_config: dict[str, Any]  # as `FileValues` has it
    eos_token_ids: tuple[int, ...]  # what ends a request
    file: ProgramFile | None  # None: the module cannot become a program, and runs eagerly
    fingerprint: str
    dtype: str  # float32 or bfloat16
    from_cache: bool
    is_ours: bool = False  # the file is one of the cache's, not one that somebody gave
    why_eager: str = ""  # why there is no file

    @property
    def program(self) -> ProgramFile:
        """The packed model. Raises UnsupportedModelError: there is none, for the module can only run eagerly."""
        if self.file is None:
            raise UnsupportedModelError(f"{self.config.architecture} is no program: its module runs eagerly")
        return self.file


def model_files(path: Path) -> list[Path]:
    """The files that a model consists of: weights, configuration, tokenizer; sorted.

    Raises:
        ModelNotFoundError: there is no such folder, or it cannot be read.
    """
    if path.is_file():
        return [path]
    suffixes = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
    try:
        return sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    except OSError as error:
        raise ModelNotFoundError(f"the folder {path} cannot be read: {error.strerror}") from None


def _stamps(files: Iterator[Path] | list[Path]) -> list[tuple[str, int, int]]:
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _code_stamps() -> list[tuple[str, int, int]]:
    package = Path(__file__).resolve().parent.parent
    return [stamp for room in _CODE_OF_A_PROGRAM for stamp in _stamps(sorted((package / room).glob("*.py")))]


def fingerprint(path: Path, config: EngineConfig) -> str:
    """Names a program: changes with the model's files, the settings that shape it, and the code that made it."""
    tokenizer = [] if config.tokenizer is None else _stamps(model_files(Path(config.tokenizer)))
    parts = (
        FORMAT_VERSION,
        VERSION,
        str(path.resolve()),
        _stamps(model_files(path)),
        tokenizer,
        config.dtype,
        config.quantization,
        ModelRegistry.registered_digest(),
        _code_stamps(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load_model(config: EngineConfig, context: abi.Context, progress: Progress | None = None) -> LoadedModel:
    """The model as a mapped program: from the cache, or traced and packed into it first. With `verify` all of it was read
    against its checksums.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ConfigError, WeightFormatError, TokenizerError: what is wrong with it.
        DamagedFileError: a compiled model is not as it was written.
        StorageError: the program cannot be packed into the cache: no room, or no such folder.
    """
    path = resolve_model(config.model)
    if path.is_file() and path.suffix == PROGRAM_SUFFIX:
        return _read_compiled(path, config)
    key = fingerprint(path, config)
    cache = ProgramCache(cache_dir() / "programs", config.program_cache_max_mb * 1_000_000)
    remove_leftovers()
    try:
        return _from_cache(cache, key, config) or _packed(cache, key, path, config, context, progress)
    except ForeignOperationError as error:
        return _without_program(path, key, config, str(error))
    except (PellucidError, OSError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # the module's own: it may insist on tensors, or be wrong, which its eager run then shows
        if not config.enforce_eager:
            raise
        return _without_program(path, key, config, f"{path.name} cannot be traced ({type(error).__name__}: {error})")
    finally:
        cache.tidy(cache.path(key))


def _from_cache(cache: ProgramCache, key: str, config: EngineConfig) -> LoadedModel | None:
    """None: there is none, or it was damaged."""
    file = cache.open(key)
    if file is None:
        return None
    try:
        if config.verify:
            verify_file(file, is_ours=True)
        return _loaded(file, key, from_cache=True, is_ours=True)
    except WeightFormatError as error:
        _log.warning("%s; it is packed anew", error)
        file.path.unlink(missing_ok=True)
        return None


def _packed(
    cache: ProgramCache,
    key: str,
    path: Path,
    config: EngineConfig,
    context: abi.Context,
    progress: Progress | None,
) -> LoadedModel:
    for _ in range(_PACKING_ATTEMPTS):
        with about(path.name):
            compile_program(open_model(path, config), config, context, cache.path(key), progress)
        model = _from_cache(cache, key, config)
        if model is not None and model.file is not None:
            cache.drop_stale(cache.path(key), model.file.meta)
            return replace(model, from_cache=False)
    raise StorageError(
        f"{cache.path(key)} was packed {_PACKING_ATTEMPTS} times and was gone or damaged at once: the disk fails, or other "
        f"processes remove it, for program_cache_max_mb is {config.program_cache_max_mb:,}"
    )


def _without_program(path: Path, key: str, config: EngineConfig, reason: str) -> LoadedModel:
    if config.quantization is not None:
        raise ConfigError(f"quantization is {config.quantization!r}; {reason}: it runs eagerly, in float32 or bfloat16")
    opened = open_model(path, config)
    for problem in opened.values.problems:
        _log.warning("%s", problem)
    return LoadedModel(
        config=opened.config,
        generation_config=opened.values.generation_config,
        eos_token_ids=opened.values.eos_token_ids,
        file=None,
        fingerprint=key,
        dtype="float32"
        if config.dtype == "auto"
        else config.dtype,  # torch multiplies no float32 rows by bfloat16 weights
        from_cache=False,
        why_eager=reason,
    )


def _read_compiled(path: Path, config: EngineConfig) -> LoadedModel:
    """A program that `pellucid compile` wrote: its precision is what it was compiled with."""
    for name in ("dtype", "quantization", "tokenizer"):
        value = getattr(config, name)
        if value not in (None, "auto"):
            raise ConfigError(f"{name} is {value!r}, but {path.name} is compiled: give it to `pellucid compile`")
    if config.enforce_eager:
        raise ConfigError(f"enforce_eager needs the model's own files; {path.name} is compiled")
    stamp = (path.stat().st_size, path.stat().st_mtime_ns)
    key = hashlib.sha256(repr((str(path.resolve()), stamp)).encode()).hexdigest()[:32]
    with storage_errors(path, verb="read"):
        file = open_program_file(path)
    if config.verify:
        verify_file(file, is_ours=False)
    return _loaded(file, key, from_cache=True, is_ours=False)


@dataclass(frozen=True)
class OpenedModel:
    """A model's files, opened: nothing of the weights is read or copied yet."""

    path: Path
    checkpoint: Checkpoint
    config: ModelConfig
    module: Any  # each parameter knows its pieces of the checkpoint
    tokenizer: Tokenizer | None
    origins: Origins
    values: FileValues


def open_model(path: Path, config: EngineConfig) -> OpenedModel:
    """The configuration, module and tokenizer of a checkpoint.

    Raises:
        ConfigError, UnsupportedModelError, WeightFormatError, TokenizerError: what is wrong with the files, by name.
    """
    from pellucid.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    origins = Origins(*map(checkpoint.origin, ("config.json", "generation_config.json", "tokenizer.json")))
    model_config, module = open_module(checkpoint)
    tokenizer = load_tokenizer(path, config, checkpoint)
    ends = () if tokenizer is None else tokenizer.eos_token_ids
    values = FileValues.of(model_config, checkpoint.generation_config, ends, origins)
    return OpenedModel(path, checkpoint, model_config, module, tokenizer, origins, values)


def compile_program(
    opened: OpenedModel, config: EngineConfig, context: abi.Context, target: Path, progress: Progress | None = None
) -> None:
    """Traces a module and packs it into `target`.

    Raises:
        ForeignOperationError: the module uses an operation that no program has.
        ConfigError, WeightFormatError: its weights cannot be packed as asked.
        StorageError: `target` cannot be written.
    """
    from pellucid.program.tracer import trace

    path, checkpoint, model_config, tokenizer = opened.path, opened.checkpoint, opened.config, opened.tokenizer
    origins = opened.origins
    recording = trace(opened.module)
    dtype = resolve_dtype(config.dtype, [view.dtype for view in _views(opened.module)], config.quantization)
    scheme = WeightScheme(_CORE_DTYPES[dtype], config.dtype == "auto", config.quantization)
    meta = {
        "kind": "program",
        "model": path.name,
        "source": str(path.resolve()),
        "dtype": dtype,
        "quantization": config.quantization,
        "keeps": scheme.keep,
        "tokenizer_ends": [] if tokenizer is None else tokenizer.eos_token_ids,
        "origins": [origins.config, origins.generation_config, origins.tokenizer],
    }
    texts = {
        "config": json.dumps(checkpoint.config).encode(),
        "generation_config": json.dumps(checkpoint.generation_config).encode(),
        "tokenizer": bundle_json(tokenizer),
    }
    build_program_file(
        target,
        recording,
        context,
        scheme=scheme,
        model={
            "n_layers": model_config.num_hidden_layers,
            "n_kv_heads": model_config.num_key_value_heads,
            "head_dim": model_config.head_dim,
            "max_positions": model_config.max_position_embeddings,
            "kv_dtype": _CORE_DTYPES[dtype],
            "end_tokens": opened.values.eos_token_ids,
        },
        vocab_size=model_config.vocab_size,
        meta=meta,
        texts=texts,
        progress=progress,
    )


def bundle_json(tokenizer: Tokenizer | None) -> bytes:
    """What `Tokenizer.from_json` reads."""
    return json.dumps(None if tokenizer is None else tokenizer.to_bundle()).encode()


def open_module(checkpoint: Checkpoint) -> tuple[ModelConfig, Any]:
    """A checkpoint's configuration and its module, each parameter of which knows its pieces.

    Raises:
        ConfigError, UnsupportedModelError, WeightFormatError: what is wrong with the files, by name.
    """
    with about(checkpoint.origin("config.json")):
        model_class = ModelRegistry.resolve(architecture_of(checkpoint.config))
        config = ModelConfig.from_dict(checkpoint.config)
        model = model_class(config)
    with about(checkpoint.path.name):
        model.load_weights(checkpoint.tensors())
    return config, model


def _views(model: Any) -> Iterator[Any]:
    for _, parameter in model.named_parameters():
        yield from getattr(parameter, "pieces", ())


def load_tokenizer(path: Path, config: EngineConfig, checkpoint: Any) -> Tokenizer | None:
    """The tokenizer named by the config, else the model's own; None when it has none."""
    if config.tokenizer is not None:
        return Tokenizer.from_directory(Path(config.tokenizer))
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_directory(folder)
    if checkpoint.gguf is not None and checkpoint.gguf.metadata.get("tokenizer.ggml.model", "no_vocab") != "no_vocab":
        with about(checkpoint.gguf.path.name):
            return Tokenizer.from_gguf(checkpoint.gguf.metadata)
    return None


def resolve_dtype(asked: str, stored: list[str], quantization: str | None = None) -> str:
    """What is not quantised, and keys and values: float32 for a checkpoint all of whose tensors are stored so, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if quantization is None and stored and all(dtype == "F32" for dtype in stored) else "bfloat16"


def _loaded(file: ProgramFile, key: str, *, from_cache: bool, is_ours: bool) -> LoadedModel:
    hf_config, generation_config = file.text("config"), file.text("generation_config")
    name, dtype = file.path.name, file.meta.get("dtype")
    if not isinstance(dtype, str) or dtype not in _CORE_DTYPES:
        raise WeightFormatError(f"{name}: dtype is {shown(dtype)}; it must be one of {', '.join(_CORE_DTYPES)}")
    ends = file.meta.get("tokenizer_ends")
    if not isinstance(ends, list) or any(type(token) is not int for token in ends) or "tokenizer" not in file.sections:
        raise WeightFormatError(f"{name}: its tokenizer's end tokens are {shown(ends)}; compile the model again")
    if not isinstance(generation_config, dict):
        raise WeightFormatError(f"{name}: generation_config is {shown(generation_config)}; it must be an object")
    with about(name):
        model_config = ModelConfig.from_dict(hf_config)
        origins = Origins.read(file.meta.get("origins"), name)
        values = FileValues.of(model_config, generation_config, ends, origins)
    for problem in values.problems:
        _log.warning("%s", problem)
    return LoadedModel(
        config=model_config,
        generation_config=values.generation_config,
        eos_token_ids=values.eos_token_ids,
        file=file,
        fingerprint=key,
        dtype=dtype,
        from_cache=from_cache,
        is_ours=is_ours,
    )


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of keys and values that one token occupies in all layers."""
    width = {"float32": 4, "bfloat16": 2, "int8": 1}[kv_dtype]
    scale = 4 if kv_dtype == "int8" else 0
    return 2 * config.num_hidden_layers * config.num_key_value_heads * (config.head_dim * width + scale)


def resolve_max_model_len(asked: int | None, config: ModelConfig) -> int:
    """The model's own limit, or a lower one that was asked for.

    Raises:
        ConfigError: more was asked for than the model has positions.
    """
    limit = config.max_position_embeddings
    if asked is None:
        return limit
    if asked > limit:
        raise ConfigError(f"max_model_len is {asked:,}; the model has {limit:,} positions")
    return asked


def resolve_num_blocks(config: EngineConfig, max_model_len: int, bytes_per_token: int, available: int) -> int:
    """As asked; else enough for all requests at full length, within 40 % of the memory that is available.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    wanted = config.max_num_seqs * math.ceil(max_model_len / config.block_size)
    fitting = int(available * 0.4) // (bytes_per_token * config.block_size)
    if fitting < 1:
        raise ConfigError(
            f"no block of {bytes_per_token * config.block_size:,} bytes fits: {available:,} bytes are free"
        )
    return min(wanted, fitting)
