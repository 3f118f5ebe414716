"""One tiny model for all tests over HTTP; each module starts the servers that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from utils.tiny_models import build_tiny_checkpoint

# As many templates are written: roles in special places, and what opens the assistant's turn.
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 300 tokens and 512 positions, with a tokenizer of bytes and a chat template."""
    return _with_template(tmp_path_factory.mktemp("tiny"), _TEMPLATE)


def _with_template(folder: Path, template: str, **sizes: int) -> Path:
    made = build_tiny_checkpoint(folder, "llama", **sizes)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return made


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8,192 positions: tools and their calls have room, and an answer may take seconds."""
    return _with_template(tmp_path_factory.mktemp("roomy"), _TEMPLATE, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same; its template opens the thoughts of each turn, unless `enable_thinking` is false."""
    opened = "<assistant> {% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
    template = _TEMPLATE.replace("<assistant> {% endif %}", opened)
    return _with_template(tmp_path_factory.mktemp("thinking"), template)


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8,192 positions: an answer takes seconds, so that a client can leave in its midst."""
    folder = tmp_path_factory.mktemp("long")
    return build_tiny_checkpoint(folder, "llama", max_position_embeddings=8192)
