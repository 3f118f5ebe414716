"""`Module` is `torch.nn.Module` where torch is installed, and this small stand-in where it is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

HAS_TORCH = importlib.util.find_spec("torch") is not None


class DescribedParameter:
    """A parameter that is only a shape, until its pieces are packed into a program."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


class PlainModule:
    """As much of `torch.nn.Module` as a forward definition needs: children, parameters by name, and a call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def named_children(self) -> Iterator[tuple[str, PlainModule]]:
        """Child modules in the order in which they were set."""
        for name, value in vars(self).items():
            if isinstance(value, PlainModule):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, PlainModule]]:
        """This module and all below it, with dotted names."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, DescribedParameter]]:
        """Parameters with dotted names; one that is shared appears once, by its first name."""
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, DescribedParameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{prefix}.{name}" if prefix else name), value


class PlainModuleList(PlainModule):
    """A list of modules, named by index."""

    def __init__(self, modules: Sequence[PlainModule]) -> None:
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[PlainModule]:
        return (child for _, child in self.named_children())


if TYPE_CHECKING or not HAS_TORCH:
    Module = PlainModule
    ModuleList = PlainModuleList

    def new_parameter(shape: tuple[int, ...]) -> Any:
        """A parameter of `shape` that holds no memory yet."""
        return DescribedParameter(shape)
else:
    import torch

    Module = torch.nn.Module
    ModuleList = torch.nn.ModuleList

    def new_parameter(shape: tuple[int, ...]) -> Any:
        """A parameter of `shape` on the meta device: it holds no memory until it is materialised."""
        return torch.nn.Parameter(torch.empty(shape, device="meta"))
