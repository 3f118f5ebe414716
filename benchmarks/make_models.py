"""One set of bfloat16 weights in two formats: safetensors for Pellucid and transformers, GGUF for llama.cpp.

Made from the packaged SmolLM2-135M-Instruct, dequantised and rounded once. Needs the test extra. Prints the two paths as JSON.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.hub import cache_dir, resolve_model

MODEL = "smollm2-135m-instruct"


def write_safetensors(source: Path, folder: Path) -> None:
    """A Hugging Face folder with config.json and model.safetensors."""
    checkpoint = open_checkpoint(source)
    tensors = {}
    for name, view in checkpoint.tensors():
        raw = view.data.reshape(view.rows, view.row_bytes)
        kind = gguf.GGMLQuantizationType[view.dtype]
        values = dequantize(raw, kind) if view.dtype != "F32" else view.to_float32()
        tensors[name] = torch.from_numpy(values.reshape(view.shape).copy()).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "torch_dtype": "bfloat16"}))


def write_gguf(source: Path, target: Path) -> None:
    """The same file with every quantised tensor as BF16; vectors stay float32, as llama.cpp's own converter leaves them."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Makes both unless they are there."""
    source = resolve_model(MODEL)
    folder = cache_dir() / "benchmarks" / f"{MODEL}-bf16"
    target = folder / "model-bf16.gguf"
    hf = folder / "hf"
    if not (target.is_file() and (hf / "model.safetensors").is_file()):
        shutil.rmtree(folder, ignore_errors=True)
        write_safetensors(source, hf)
        write_gguf(source, target)
    print(json.dumps({"hf": str(hf), "gguf": str(target)}))


if __name__ == "__main__":
    main()
