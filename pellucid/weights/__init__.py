"""Weight files in, tensors out: safetensors, GGUF, checkpoints with Hugging Face names, and where models come from."""
