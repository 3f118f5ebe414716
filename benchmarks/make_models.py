"""One set of bfloat16 weights in every peer's format, and at 8 and 4 bits by the peer's own converter.

    python benchmarks/make_models.py smollm2|smollm2-shuffled|llama-1b [--peers FOLDER] [--formats hf gguf q8_0 q4_0 openvino-bf16 ...]

smollm2: the packaged SmolLM2-135M-Instruct, dequantised and rounded once. smollm2-shuffled: the same function with its channels in another
order, so that its weights do not lie on the 4-bit grid that they came from. llama-1b: random weights in the shape of Llama-3.2-1B.
FOLDER holds the environments that `setup_peers.py` makes. Needs the test extra. Prints the paths as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file

from pellucid.text.tokenizer import Tokenizer
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.hub import cache_dir, resolve_model

PACKAGED = "smollm2-135m-instruct"
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128_256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def save_tokenizer(folder: Path) -> None:
    """Peers want one beside the weights; prompts are token ids, so it is never used."""
    checkpoint = open_checkpoint(resolve_model(PACKAGED))
    tokenizer = Tokenizer.from_gguf(checkpoint.gguf.metadata)
    (folder / "tokenizer.json").write_text(str(tokenizer.to_bundle()["tokenizer_json"]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
        )
    )


def packaged_tensors() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """SmolLM2's configuration and its tensors in bfloat16."""
    checkpoint = open_checkpoint(resolve_model(PACKAGED))
    tensors = {}
    for name, view in checkpoint.tensors():
        raw = view.data.reshape(view.rows, view.row_bytes)
        kind = gguf.GGMLQuantizationType[view.dtype]
        values = dequantize(raw, kind) if view.dtype != "F32" else view.to_float32()
        tensors[name] = torch.from_numpy(values.reshape(view.shape).copy()).to(torch.bfloat16)
    return {**checkpoint.config, "torch_dtype": "bfloat16"}, tensors


def shuffled(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with the channels of the residual stream, of each ffn and of each head's values in a random order.

    The packaged weights were stored in Q4_1: rounding them to groups of 32 again would find the very grid that they lie on, and flatter
    that format. Here a group holds values of many grids. Values of each head are permuted alike in v's rows and o's columns.
    """
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    stream = torch.randperm(width, generator=generator)
    found = dict(tensors)
    found["model.norm.weight"] = tensors["model.norm.weight"][stream]
    found["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, stream]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        ffn = torch.randperm(config["intermediate_size"], generator=generator)
        values = torch.stack([torch.randperm(head_dim, generator=generator) + h * head_dim for h in range(kv_heads)])
        of_head = values.repeat_interleave(heads // kv_heads, 0) % head_dim + torch.arange(heads)[:, None] * head_dim
        orders = {  # rows, columns; None: as they are
            "self_attn.q_proj": (None, stream),
            "self_attn.k_proj": (None, stream),
            "self_attn.v_proj": (values.flatten(), stream),
            "self_attn.o_proj": (stream, of_head.flatten()),
            "mlp.gate_proj": (ffn, stream),
            "mlp.up_proj": (ffn, stream),
            "mlp.down_proj": (stream, ffn),
        }
        for name, (rows, cols) in orders.items():
            matrix = tensors[f"{prefix}{name}.weight"]
            found[f"{prefix}{name}.weight"] = (matrix if rows is None else matrix[rows])[:, cols]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = tensors[f"{prefix}{norm}.weight"][stream]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _write_hf(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def write_packaged(folder: Path) -> None:
    """SmolLM2 as a Hugging Face folder."""
    _write_hf(folder, *packaged_tensors())


def write_shuffled(folder: Path) -> None:
    """SmolLM2 with its channels in another order."""
    config, tensors = packaged_tensors()
    _write_hf(folder, config, shuffled(config, tensors))


def write_llama_1b(folder: Path) -> None:
    """Random weights of the spread that such models have."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    c = LLAMA_1B
    width, ffn, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
    ones = torch.ones(width, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": random(c["vocab_size"], width), "model.norm.weight": ones}
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    for layer in range(c["num_hidden_layers"]):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _rotated(values: Any, heads: int) -> Any:
    """Rows of a head in the order of llama.cpp's rotation of neighbours."""
    rows, cols = values.shape
    return values.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(hf: Path, target: Path) -> None:
    """BF16 matrices, float32 vectors, no vocabulary: prompts are token ids."""
    checkpoint = open_checkpoint(hf)
    c = checkpoint.config
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(c.get("head_dim") or c["hidden_size"] // heads)
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, view in checkpoint.tensors():
        if len(view.shape) == 1:
            writer.add_tensor(_gguf_name(name), view.to_float32())
            continue
        values = view.data.view("<u2").reshape(view.shape)
        if "q_proj" in name or "k_proj" in name:
            values = _rotated(values, heads if "q_proj" in name else kv_heads)
        raw = values.copy().view("u1").reshape(view.shape[0], -1)
        writer.add_tensor(_gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_served(source: Path, target: Path) -> None:
    """A GGUF file with the packaged model's vocabulary: servers send text, also where prompts are token ids."""
    reader, packaged = gguf.GGUFReader(source), gguf.GGUFReader(resolve_model(PACKAGED))
    writer = gguf.GGUFWriter(target, "llama")
    fields = [field for name, field in reader.fields.items() if not name.startswith(("tokenizer.", "GGUF."))]
    fields += [field for name, field in packaged.fields.items() if name.startswith("tokenizer.")]
    for field in fields:
        if field.name != "general.architecture":
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# llama.cpp's own quantiser, called in its environment.
_QUANTISE = """
import sys, llama_cpp as C
params = C.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), 2
sys.exit(C.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
_FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_1": 3, "q4_k": 15, "q5_k": 17, "q6_k": 18}
_OPENVINO = {
    "openvino-bf16": ["--weight-format", "fp16"],
    "openvino-int8": ["--weight-format", "int8"],
    "openvino-int4": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"],
}


def _convert(format: str, folder: Path, target: Path, peers: Path) -> None:
    """One format, by its peer."""
    hf = folder / "hf"
    if format in _FILE_TYPES:
        python = peers / "llama.cpp" / "bin" / "python"
        source = folder / "model-bf16.gguf"
        subprocess.run([python, "-c", _QUANTISE, source, target, str(_FILE_TYPES[format])], check=True)
    elif format in _OPENVINO:
        tool = peers / "openvino" / "bin" / "optimum-cli"
        task = ["--task", "text-generation-with-past"]
        subprocess.run([tool, "export", "openvino", "-m", hf, *task, *_OPENVINO[format], target], check=True)
    else:
        python = peers / "onnxruntime-genai" / "bin" / "python"
        builder = ["-m", "onnxruntime_genai.models.builder", "-m", hf, "-o", target, "-p", "int4", "-e", "cpu"]
        subprocess.run([python, *builder], check=True)


# The same files with a vocabulary. Only for models of the packaged one's vocabulary.
_SERVED = {f"served-{format}": format for format in ("gguf", *_FILE_TYPES)}
FORMATS = ("hf", "gguf", *_FILE_TYPES, *_SERVED, *_OPENVINO, "onnx-int4")
_WRITERS: dict[str, Callable[[Path], None]] = {
    "smollm2": write_packaged,
    "smollm2-shuffled": write_shuffled,
    "llama-1b": write_llama_1b,
}


def place_of(model: str, format: str) -> Path:
    """Where a format lies, made or not."""
    folder = cache_dir() / "benchmarks" / model
    if format in ("gguf", "served-gguf"):
        return folder / f"{'served' if format in _SERVED else 'model'}-bf16.gguf"
    if format in _SERVED:
        return folder / f"{format}.gguf"
    return folder / (f"model-{format}.gguf" if format in _FILE_TYPES else format)


def make(model: str, formats: list[str], peers: Path) -> dict[str, str]:
    """Makes what is not there yet; the paths by format. A converter that fails is reported and left out."""
    folder = cache_dir() / "benchmarks" / model
    hf = folder / "hf"
    if not (hf / "tokenizer_config.json").is_file():
        hf.mkdir(parents=True, exist_ok=True)
        _WRITERS[model](hf)
        save_tokenizer(hf)
    found = {}
    for format in formats:
        target = place_of(model, format)
        try:
            if format == "gguf" and not target.is_file():
                write_gguf(hf, target)
            elif format in _SERVED and not target.is_file():
                write_served(Path(make(model, [_SERVED[format]], peers)[_SERVED[format]]), target)
            elif format not in ("hf", "gguf") and not target.exists():
                _convert(format, folder, target, peers)
            found[format] = str(target)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{model} {format}: {error}", file=sys.stderr)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=_WRITERS)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["hf", "gguf"])
    options = parser.parse_args()
    print(json.dumps(make(options.model, options.formats, options.peers)))


if __name__ == "__main__":
    main()
