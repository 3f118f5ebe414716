"""The command line at a terminal and among other programs: interrupts, closed pipes, history, what it imports."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from utils.children import Terminal, child, finished
from utils.tiny_models import build_tiny_checkpoint
from utils.waiting import PATIENCE

from pellucid.api.sampling_params import SamplingParams
from pellucid.commands.chat import Conversation, _split_paragraphs
from pellucid.commands.load import sampling_of
from pellucid.llm import LLM

# Answers that go on for minutes, so that there is time to interrupt one.
LONG = ("--temperature", "0", "--max-tokens", "100000", "--ignore-eos", "--num-threads", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny_checkpoint(tmp_path_factory.mktemp("cli_terminal"), "llama", max_position_embeddings=2**20))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pellucid.cli", *arguments]


class ShownTerminal(Terminal):
    """The command at a terminal, and what it shows there."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(command(*arguments), {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"})

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def press_until(self, key: str, expected: str) -> None:
        """Presses a key every second until what is expected is shown: readline hears an interrupt that came before it waits
        with the next key only, though its echo is shown at once."""
        shown, end = "", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.send(key)
            while select.select([self.file], [], [], 1.0)[0]:
                shown += os.read(self.file, 65536).decode(errors="replace")
                if expected in shown:
                    return
        pytest.fail(f"{expected!r} was not shown, but {shown[-300:]!r}")

    def read_until(self, expected: str, seconds: float = 30.0) -> str:
        """What is shown up to `expected`; the test fails when that does not come in time."""
        shown, end = "", time.monotonic() + seconds
        while expected not in shown:
            if not select.select([self.file], [], [], max(0.0, end - time.monotonic()))[0]:
                pytest.fail(f"{expected!r} was not shown within {seconds} s, but {shown[-300:]!r}")
            try:
                shown += os.read(self.file, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"the program left before it showed {expected!r}: {shown[-300:]!r}")
        return shown


def test_chat_at_a_terminal_when_interrupted_then_the_answer_stops_and_the_talk_goes_on(checkpoint: Path) -> None:
    with ShownTerminal("chat", "-m", str(checkpoint), *LONG, "--num-blocks", "4000") as terminal:
        terminal.read_until("/help")
        terminal.send("hello\n")
        terminal.read_until("\x1b[?25l")  # the answer is being drawn
        time.sleep(0.3)
        terminal.send("\x03")
        terminal.read_until("(stopped)")
        terminal.send("/help\n")
        terminal.read_until("stops an answer\r\n> ")
        terminal.press_until("\x03", "> ")  # at the prompt it only begins a new line
        time.sleep(0.1)
        terminal.send("\x04")
        shown = terminal.read_until("tokens/s")
        assert "Traceback" not in shown
        assert terminal.status() == 0


def test_generate_when_interrupted_then_status_130_without_a_traceback(checkpoint: Path) -> None:
    arguments = command("generate", "hello", "-m", str(checkpoint), *LONG, "--num-blocks", "4000")
    with child(arguments) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_output_when_its_reader_leaves_then_ends_quietly(checkpoint: Path) -> None:
    arguments = command("generate", "hello", "-m", str(checkpoint), *LONG, "--num-blocks", "4000")
    with child(arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        status = process.wait(timeout=30)
    assert status == 1
    assert errors == ""


def test_run_when_its_input_goes_on_then_results_come_as_soon_as_they_are_next(checkpoint: Path) -> None:
    arguments = command("run", "-", "-m", str(checkpoint), "--max-num-seqs", "1", "--num-blocks", "16")
    lines = b"".join(json.dumps({"prompt": [5, 6], "max_tokens": 1}).encode() + b"\n" for _ in range(7))
    with child(arguments, stdin=PIPE, stderr=None, text=False) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(lines)
        process.stdin.flush()  # the input stays open: the first results must not wait for its end
        first = json.loads(process.stdout.readline())
        process.stdin.close()
        rest = process.stdout.read().splitlines()
        assert process.wait(timeout=30) == 0
    assert first["request_id"]
    assert len(rest) == 6


def test_conversation_when_it_goes_on_then_earlier_turns_come_from_the_prefix_cache(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(checkpoint, num_blocks=256, max_model_len=2048, num_threads=1) as llm:
        conversation = Conversation(llm, params, "be brief")
        "".join(conversation.answer("hello " * 20))
        before = llm.kv_cache_stats()["prefix_saved_tokens"]
        "".join(conversation.answer("again"))
        assert llm.kv_cache_stats()["prefix_saved_tokens"] >= before + 16
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
        assert conversation.totals.num_tokens == 8
        conversation.reset()
        assert conversation.messages == []


def test_sampling_when_the_model_has_a_generation_config_then_it_stands_between_options_and_defaults(
    tmp_path: Path,
) -> None:
    folder = Path(build_tiny_checkpoint(tmp_path, "llama"))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20}))
    with LLM(folder, num_blocks=16, num_threads=1) as llm:
        params = sampling_of(llm, {"top_k": 5}, temperature=0.7, top_p=0.95)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", ("", "one")),
        ("one\n\ntwo", ("one", "two")),
        ("one\n\ntwo\n\nthree", ("one\n\ntwo", "three")),
        ("```\na\n\nb", ("", "```\na\n\nb")),
        ("one\n\n```\na\n\nb", ("one", "```\na\n\nb")),
        ("```\na\n\nb\n```\n\nend", ("```\na\n\nb\n```", "end")),
        ("\n\nx", ("", "\n\nx")),
    ],
)
def test_paragraphs_when_split_then_code_stays_whole(text: str, expected: tuple[str, str]) -> None:
    assert _split_paragraphs(text) == expected


def test_start_when_text_is_generated_into_a_pipe_then_nothing_heavy_is_imported(checkpoint: Path) -> None:
    program = (
        "import sys; from pellucid.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'rich.console', 'huggingface_hub') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", program, "generate", "hello", "-m", str(checkpoint), "--max-tokens", "1"]
    done = finished([*arguments, "--num-blocks", "16"], check=True)
    assert done.stdout.splitlines()[-1] == "[]"
