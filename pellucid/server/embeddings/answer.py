"""/v1/embeddings: inputs to vectors, pooled from the rows that the head would read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.api.hidden_states import HiddenStatesParams
from pellucid.api.outputs import RequestOutput
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams
from pellucid.errors import InvalidRequestError, RequestFailedError
from pellucid.server.embeddings.protocol import EmbeddingRequest
from pellucid.server.generate.generation import Usage
from pellucid.server.generate.states import to_base64

F32 = npt.NDArray[np.float32]
# The one token that ends a request behind its prompt; it is not looked at.
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)


def wanted_options(
    request: EmbeddingRequest, prompts: Sequence[Sequence[int]], hidden_size: int
) -> list[RequestOptions]:
    """Of each input: the rows that its embedding is pooled from.

    Raises:
        InvalidRequestError: `dimensions` is not the model's width.
    """
    if request.dimensions is not None and request.dimensions != hidden_size:
        raise InvalidRequestError(
            "dimensions", f"is {request.dimensions:,}", limit=f"embeddings are not cut: it must be {hidden_size:,}"
        )
    rows = [(-1,) if request.pooling == "last" else tuple(range(len(prompt))) for prompt in prompts]
    return [RequestOptions(request.priority or 0, hidden_states=HiddenStatesParams(wanted)) for wanted in rows]


def pooled(rows_RD: F32, normalize: bool) -> F32:
    """The mean of the rows, in float64 so that its rounding is the last; scaled to length 1 where that is wanted."""
    mean_D = rows_RD.astype(np.float64).mean(axis=0)
    length = float(np.linalg.norm(mean_D))
    scaled_D: F32 = (mean_D / length if normalize and length > 0 else mean_D).astype(np.float32)
    return scaled_D


def answer(request: EmbeddingRequest, model: str, outputs: Sequence[RequestOutput], usage: Usage) -> dict[str, Any]:
    """OpenAI's list of embeddings, in the order of the inputs.

    Raises:
        RequestFailedError: a request was ended before its rows were there.
    """
    normalize = True if request.normalize is None else request.normalize
    data = []
    for index, output in enumerate(outputs):
        choice = output.outputs[0]
        states = choice.hidden_states
        if states is None or not len(states):
            raise RequestFailedError(f"input {index} has no embedding: its request ended with {choice.finish_reason!r}")
        vector = pooled(states, normalize)
        shown = to_base64(vector).decode() if request.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": tokens}
