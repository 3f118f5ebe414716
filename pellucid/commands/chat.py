"""`pellucid chat`: a conversation, streamed; rich on a terminal, plain in a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pellucid.api.sampling_params import SamplingParams
from pellucid.errors import InvalidRequestError
from pellucid.llm import LLM

HELP = """/system TEXT   set the system message (without TEXT: remove it); begins anew
/reset         forget the conversation
/help          this text
/exit          leave (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass
class Totals:
    """What was generated, for the line on leaving."""

    num_tokens: int = 0
    decode_seconds: float = 0.0
    num_decoded: int = 0
    first_token_seconds: list[float] = field(default_factory=list)

    def line(self) -> str:
        """Tokens, tokens per second and time to the first token."""
        if not self.first_token_seconds:
            return "no tokens generated"
        mean = sum(self.first_token_seconds) / len(self.first_token_seconds)
        speed = self.num_decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0
        return f"{self.num_tokens} tokens, {speed:.1f} tokens/s, first token after {mean * 1000:.0f} ms on average"


class Conversation:
    """Messages so far, and how the next answer is made."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.messages: list[dict[str, Any]] = []
        self.totals = Totals()

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self.messages = []

    def answer(self, text: str) -> Iterator[str]:
        """Adds a turn and yields the answer as it is made; what was made stays in the conversation when it is left early."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": text}
        prompt = self.llm.get_tokenizer().encode_chat([*system, *self.messages, turn])
        made: list[str] = []
        began = time.perf_counter()
        first: float | None = None
        stream = self.llm.stream(prompt, self.params)
        try:
            for chunk in stream:
                now = time.perf_counter()
                if chunk.token_ids:
                    self.totals.num_tokens += len(chunk.token_ids)
                    if first is None:
                        first = now
                        self.totals.first_token_seconds.append(now - began)
                    else:
                        self.totals.num_decoded += len(chunk.token_ids)
                made.append(chunk.text)
                yield chunk.text
        finally:
            stream.close()  # type: ignore[attr-defined]
            if first is not None:
                self.totals.decode_seconds += time.perf_counter() - first
                self.messages += [turn, {"role": "assistant", "content": "".join(made)}]


def run_chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Reads turns until the end of the input. Commands begin with a slash."""
    conversation = Conversation(llm, params, system)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{llm.config.model}: type a message, or /help", file=sys.stderr)
    try:
        while not _talk(conversation, interactive):
            print()  # Ctrl-C between two answers only begins a new line
    finally:
        print(conversation.totals.line(), file=sys.stderr)


def _talk(conversation: Conversation, interactive: bool) -> bool:
    """Takes turns until the end, then True; False when an interrupt at a terminal ended them."""
    try:
        for text in _turns(interactive):
            if not text.startswith("/"):
                _say(conversation, text, interactive)
            elif not _command(conversation, text):
                break
    except KeyboardInterrupt:
        if not interactive:
            raise
        return False
    return True


def _turns(interactive: bool) -> Iterator[str]:
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _command(conversation: Conversation, text: str) -> bool:
    """Runs a slash command; False to leave."""
    name, _, rest = text.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.reset()
        print("(new conversation)", file=sys.stderr)
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        print(f"(system message: {conversation.system or 'none'})", file=sys.stderr)
    else:
        print(HELP if name == "/help" else f"unknown command {name}\n{HELP}", file=sys.stderr)
    return True


def _say(conversation: Conversation, text: str, interactive: bool) -> None:
    try:
        if not interactive:
            for delta in conversation.answer(text):
                print(delta, end="", flush=True)
            print(flush=True)
            return
        with _interrupt_flag() as is_interrupted:
            _print_rich(conversation.answer(text), is_interrupted)
            if is_interrupted():
                print("(stopped)", file=sys.stderr)
    except InvalidRequestError as error:
        print(f"error: {error}; /reset begins anew", file=sys.stderr)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, so that it never falls into the middle of a step; a second one interrupts as ever."""
    interrupted = False

    def note(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _print_rich(deltas: Iterator[str], is_interrupted: Callable[[], bool]) -> None:
    """The answer as Markdown. Paragraphs are printed for good as they end; only the last one is redrawn."""
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    shown = ""
    with Live(console=Console(), refresh_per_second=12) as live, contextlib.closing(deltas):  # type: ignore[type-var]
        for delta in deltas:
            ended, shown = _split_paragraphs(shown + delta)
            if ended:
                live.console.print(Markdown(ended), end="\n\n")
            live.update(Markdown(shown))
            if is_interrupted():
                return


def _split_paragraphs(text: str) -> tuple[str, str]:
    """(paragraphs that have ended, the rest); a fenced block of code is never cut."""
    end = text.rfind("\n\n")
    while end > 0 and text.count("```", 0, end) % 2:
        end = text.rfind("\n\n", 0, end)
    return ("", text) if end <= 0 else (text[:end], text[end + 2 :])
