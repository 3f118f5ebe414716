"""Tools as requests speak of them: definitions, choices, and calls that were made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pellucid.server.generate.protocol import Strict
from pellucid.text.json_mending import mended_object
from pellucid.text.tool_dialects import MAX_TOOLS

__all__ = ["MAX_TOOLS", "FunctionCall", "NamedFunction", "NamedTool", "ToolCall", "ToolDefinition"]


class FunctionDefinition(Strict):
    """A function that a model may call."""

    name: str = Field(description="1 to 64 letters, digits, dots, dashes or underscores.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of its arguments; none by default.")
    strict: bool | None = Field(None, description="Arguments of forced calls follow the schema in any case.")


class ToolDefinition(Strict):
    """A tool."""

    type: Literal["function"] = Field(description="Only functions.")
    function: FunctionDefinition = Field(description="The function.")

    def to_template(self) -> dict[str, Any]:
        """OpenAI's shape, which chat templates read: only what was given."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(Strict):
    """The name of a function."""

    name: str = Field(description="One of the tools.")


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"] = Field(description="Only functions.")
    function: NamedFunction = Field(description="The function.")


class FunctionCall(Strict):
    """A call that the model made."""

    name: str = Field(max_length=256, description="The function.")
    arguments: str = Field(description="Its arguments, as JSON.")


class ToolCall(Strict):
    """A tool call in an assistant's message."""

    id: str | None = Field(None, max_length=256, description="Ties the tool's answer to the call.")
    type: Literal["function"] = Field("function", description="Only functions.")
    function: FunctionCall = Field(description="What was called.")
    index: int | None = Field(None, description="As streamed; not read.")

    def to_template(self) -> dict[str, Any]:
        """What a chat template gets: templates read arguments as an object. What cannot be one stays the text that it is."""
        arguments: Any = mended_object(self.function.arguments)
        if arguments is None:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {**({} if self.id is None else {"id": self.id}), "type": self.type, "function": function}
