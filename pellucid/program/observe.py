"""Activations by name: what each module of a model gives, seen from outside while the model is called.

A name is the module's path without a leading `model.`: `layers.3.mlp`, `norm`. A module that gives several tensors says in
`named_outputs(output)` which of them have names: suffix -> the terms whose sum the activation is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Is told a name and the terms; what it gives, if anything, is added to the first term.
Observer = Callable[[str, tuple[Any, ...]], Any]
_ROOT = "model."


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Tells `observer` the name and the terms of each activation while `model` is called inside."""
    modules = [(name, module) for name, module in _modules(model) if f"{name}." not in (".", _ROOT)]
    own = [(module, vars(module).get("forward")) for _, module in modules]  # None: the class's
    for name, module in modules:
        module.forward = _observed_forward(name.removeprefix(_ROOT), module, observer)
    try:
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_modules() if hasattr(model, "named_modules") else ()


def _observed_forward(name: str, module: Any, observer: Observer) -> Callable[..., Any]:
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for suffix, terms in _named_outputs(module, output).items():
            added = observer(name + suffix, terms)
            if added is not None:
                output = (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added
        return output

    return call


def _named_outputs(module: Any, output: Any) -> Mapping[str, tuple[Any, ...]]:
    if hasattr(module, "named_outputs"):
        found: Mapping[str, tuple[Any, ...]] = module.named_outputs(output)
        return found
    return {"": (output[0] if isinstance(output, tuple) else output,)}
