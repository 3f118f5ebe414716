"""What every causal language model shares: the contract, and loading by a name map that is data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pellucid.errors import WeightFormatError
from pellucid.layers.module import Module
from pellucid.models.config import ModelConfig
from pellucid.weights.tensor import TensorView


class CausalLM(Module):
    """The model contract: `forward(input_ids, positions)` gives hidden states, `compute_logits` maps rows of them to logits.

    `stacked` names the parts of fused matrices in the order of their rows: a checkpoint's `q_proj` is the first part of `qkv_proj`.
    """

    stacked: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    # Checkpoint tensors that carry nothing: buffers that old checkpoints saved.
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")

    def __init__(self, config: ModelConfig, prefix: str = "") -> None:
        super().__init__()
        self.config, self.prefix = config, prefix

    def compute_logits(self, hidden_LD: Any) -> Any:
        """logits_LV of the rows that need them."""
        raise NotImplementedError(f"{type(self).__name__} has no compute_logits")

    def load_weights(self, weights: Iterable[tuple[str, TensorView]]) -> set[str]:
        """Gives each parameter its pieces, as views of the checkpoint; nothing is copied yet. Returns the names that were filled.

        Raises:
            WeightFormatError: a tensor fits no parameter, has another shape, or a parameter stays without its tensors.
        """
        parameters: dict[str, Any] = dict(self.named_parameters())
        parts = {part: (fused, i) for fused, names in self.stacked.items() for i, part in enumerate(names)}
        pieces: dict[str, dict[int, TensorView]] = {}
        for name, view in weights:
            if name.endswith(self.ignored):
                continue
            target, part = self._target(name, parts)
            if target not in parameters:
                if self._is_tied_head(name):
                    continue
                raise WeightFormatError(f"tensor {name!r} fits no parameter of {type(self).__name__}")
            if part in pieces.setdefault(target, {}):
                raise WeightFormatError(f"tensor {name!r} stands twice in the checkpoint")
            pieces[target][part] = view
        for name, parameter in parameters.items():
            self._fill(name, parameter, pieces.get(name, {}))
        return set(pieces)

    def _target(self, name: str, parts: dict[str, tuple[str, int]]) -> tuple[str, int]:
        segments = name.split(".")
        for i, segment in enumerate(segments):
            if segment in parts:
                fused, part = parts[segment]
                return ".".join([*segments[:i], fused, *segments[i + 1 :]]), part
        return name, 0

    def _is_tied_head(self, name: str) -> bool:
        return self.config.tie_word_embeddings and name == "lm_head.weight"

    def _fill(self, name: str, parameter: Any, pieces: dict[int, TensorView]) -> None:
        leaf = name.split(".")[-2] if "." in name else name
        expected = len(self.stacked.get(leaf, ("",)))
        if sorted(pieces) != list(range(expected)):
            raise WeightFormatError(f"parameter {name!r} has {len(pieces)} of its {expected} tensors in the checkpoint")
        views = [pieces[i] for i in range(expected)]
        shape = tuple(int(n) for n in parameter.shape)
        found = (sum(v.shape[0] for v in views), *views[0].shape[1:]) if views[0].shape else ()
        if found != shape or any(v.shape[1:] != views[0].shape[1:] for v in views):
            raise WeightFormatError(f"parameter {name!r} has shape {list(shape)}; the checkpoint has {list(found)}")
        parameter.pieces = views
