"""A checkpoint on disk, whatever its format: its configuration and its tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.errors import ModelNotFoundError, UnsupportedModelError, WeightFormatError, shown
from pellucid.weights.gguf import GGUFFile, open_gguf
from pellucid.weights.gguf_config import architecture_names, gguf_config, gguf_generation_config
from pellucid.weights.gguf_names import NOT_PARAMETERS, hugging_face_name
from pellucid.weights.json_files import format_error, read_config
from pellucid.weights.safetensors import index_shards, open_index, open_safetensors
from pellucid.weights.tensor import TensorView, from_float32

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_PICKLED = (".bin", ".pt", ".pth")
# What says that matrices are quantised; some older tools wrote a file of their own.
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `config` and `generation_config` read as Hugging Face's JSON files of those names."""

    path: Path
    format: str  # "safetensors" or "gguf"
    files: tuple[Path, ...]
    config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    gguf: GGUFFile | None = field(repr=False)
    _views: Mapping[str, TensorView] = field(repr=False)
    _prepare: Mapping[str, Callable[[TensorView], TensorView]] = field(repr=False)

    def origin(self, name: str) -> str:
        """How a message calls what a file of this name says: a GGUF file says it itself."""
        return self.path.name + f"/{name}" if self.gguf is None else self.gguf.path.name

    def names(self) -> tuple[str, ...]:
        """The parameter names, in file order."""
        return tuple(self._views)

    def tensors(self) -> Iterator[tuple[str, TensorView]]:
        """(Hugging Face parameter name, tensor) pairs, each equal to what Hugging Face's model has under that name."""
        for name, view in self._views.items():
            prepare = self._prepare.get(name)
            yield name, view if prepare is None else prepare(view)

    def tensor(self, name: str) -> TensorView:
        """One tensor by its Hugging Face name; KeyError when there is none."""
        view = self._views[name]
        prepare = self._prepare.get(name)
        return view if prepare is None else prepare(view)


def _unpermute(heads: int) -> Callable[[TensorView], TensorView]:
    """Rows of q or k from neighbouring rotary pairs (x0 y0 x1 y1 …) back to halves (x0 x1 … y0 y1 …), per head."""

    def apply(view: TensorView) -> TensorView:
        count = view.shape[0]
        order = np.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)
        if len(view.shape) > 1:
            return view.select_rows(order)
        return from_float32(view.name, view.to_float32()[order])  # a bias

    return apply


def _minus_one(view: TensorView) -> TensorView:
    return from_float32(view.name, view.to_float32() - np.float32(1))


def _gguf_tensors(
    file: GGUFFile, config: dict[str, Any]
) -> tuple[dict[str, TensorView], dict[str, Callable[[TensorView], TensorView]]]:
    """The tensors of a GGUF file under Hugging Face names, and what has to be undone on some of them."""
    names = architecture_names(file)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    views: dict[str, TensorView] = {}
    prepare: dict[str, Callable[[TensorView], TensorView]] = {}
    for gguf_name, view in file.tensors.items():
        if gguf_name in NOT_PARAMETERS:
            continue
        name = hugging_face_name(gguf_name, names)
        if name is None:
            raise UnsupportedModelError(
                f"{file.path.name}: tensor {gguf_name!r} is not known in architecture {file.architecture!r}"
            )
        if name in views:
            raise format_error(file.path, "tensor", gguf_name, f"{name} is there already under another spelling")
        views[name] = view.renamed(name)
        module = name.split(".")[-2]
        if names.permuted_qk and module in heads:
            if view.shape[0] % (2 * heads[module]):
                limit = f"they must be a multiple of 2 x {heads[module]} heads"
                raise format_error(file.path, f"rows of {gguf_name}", view.shape[0], limit)
            prepare[name] = _unpermute(heads[module])
        if names.norms_plus_one and module.endswith("norm"):
            prepare[name] = _minus_one
    return views, prepare


def _open_gguf_checkpoint(path: Path) -> Checkpoint:
    file = open_gguf(path)
    config = gguf_config(file)
    views, prepare = _gguf_tensors(file, config)
    return Checkpoint(path, "gguf", (path,), config, gguf_generation_config(file), file, views, prepare)


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses checkpoints whose matrices are stored in a scheme of their own, by its name, before the first odd tensor is met."""
    said = next((f"{CONFIG_FILE}: {key}{_method(config[key])}" for key in _QUANTISED_KEYS if config.get(key)), None)
    said = said or next((f"{name}" for name in _QUANTISED_FILES if (folder / name).is_file()), None)
    if said is not None:
        raise UnsupportedModelError(
            f"{folder.name}/{said}: quantised matrices are read from GGUF files only; take the model's GGUF file, or its "
            "weights as they were before, with the option quantization"
        )


def _method(value: object) -> str:
    method = value.get("quant_method") if isinstance(value, dict) else value
    return "" if method is None else f" {shown(method)}"


def _open_safetensors_checkpoint(folder: Path, weights: Path) -> Checkpoint:
    config = read_config(folder / CONFIG_FILE)
    _refuse_quantised(folder, config)
    generation = folder / GENERATION_CONFIG_FILE
    generation_config = read_config(generation) if generation.is_file() else {}
    if weights.name.endswith(".index.json"):
        files, views = index_shards(weights), open_index(weights)
    else:
        files, views = (weights,), open_safetensors(weights)
    return Checkpoint(folder, "safetensors", files, config, generation_config, None, views, {})


_WHAT_OF_SEVERAL = {
    "*.gguf": "; name the file itself",
    "*.safetensors": f", but no {INDEX_FILE}: it belongs to the model and says which tensor lies where",
}


def _only(folder: Path, pattern: str) -> Path | None:
    """The one file that matches, or None; ModelNotFoundError naming them when there are several."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise ModelNotFoundError(f"{folder} has {len(found)} files {pattern} ({names}){_WHAT_OF_SEVERAL[pattern]}")
    return found[0] if found else None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model folder (safetensors, sharded or not, or one GGUF file inside) or a single .gguf file.

    Raises ModelNotFoundError when nothing loadable is there, WeightFormatError when a file contradicts its format,
    UnsupportedModelError when a GGUF architecture is not known. Nothing is copied; the tensors stay in the mapping.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightFormatError(f"{path.name}: a single weight file must be .gguf; else name the model's folder")
        return _open_gguf_checkpoint(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"no model at {path}: neither a folder nor a .gguf file")
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).is_file():
            return _open_safetensors_checkpoint(path, path / name)
    gguf = _only(path, "*.gguf")
    if gguf is not None:
        return _open_gguf_checkpoint(gguf)
    weights = _only(path, "*.safetensors")
    if weights is not None:
        return _open_safetensors_checkpoint(path, weights)
    pickled = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in _PICKLED]
    hint = f"; {pickled[0]} may run code when loaded and is never read: convert it to safetensors" if pickled else ""
    raise ModelNotFoundError(f"{path} has no {SINGLE_FILE}, {INDEX_FILE} or *.gguf{hint}")
