"""Long prompts: sources of Python's standard library, cut to length. Each is continued by as many tokens as are left.

python examples/long_context.py --max-prompt-len 1024 --max-model-len 1088 --num-prompts 3 --compare-with-cpu
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

from compared import add_engine_options, compare, load, refused, run

from pellucid import LLM
from pellucid.config import PADDED_BLOCK_SIZE
from pellucid.errors import InvalidRequestError

MAX_SOURCE_CHARACTERS = 2**18  # more than enough for a prompt; tokenising all of it would only take time


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, max_model_len=576)
    parser.add_argument("--max-prompt-len", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument("--num-prompts", "-n", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, help="no more tokens than this, even where more are left")
    parser.add_argument("--trunc-print-len", type=int, default=200, help="characters of each text that are printed")
    options = parser.parse_args(arguments)
    for name in ("max_prompt_len", "num_prompts", "trunc_print_len"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error(f"--max-tokens is {options.max_tokens}; it must be at least 1")
    return options


def sources(llm: LLM, count: int, length: int) -> list[list[int]]:
    """`count` prompts from the longest to three quarters of it, each the beginning of another module that is long enough."""
    found: list[list[int]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        wanted = length - len(found) * (length // 4) // max(1, count - 1)
        (tokens,) = llm.encode(path.read_text(encoding="utf-8", errors="replace")[:MAX_SOURCE_CHARACTERS])
        if len(tokens) >= wanted:
            found.append(tokens[:wanted])
        if len(found) == count:
            return found
    sys.exit(f"error: the standard library has {len(found)} modules of {length} tokens; {count} prompts were asked for")


def tokens_left(num_prompt: int, max_model_len: int, most: int | None) -> int:
    """What a prompt leaves when it is counted in whole blocks, as policy `padded` counts."""
    left = max_model_len - -(-num_prompt // PADDED_BLOCK_SIZE) * PADDED_BLOCK_SIZE
    return left if most is None else min(left, most)


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; gives the exit status."""
    options = parse(arguments)
    # whole prompts, where the policy does not cut them
    with load(options, max_num_batched_tokens=max(512, options.max_prompt_len)) as llm:
        prompts = sources(llm, options.num_prompts, options.max_prompt_len)
        max_tokens = [tokens_left(len(prompt), options.max_model_len, options.max_tokens) for prompt in prompts]
        if min(max_tokens) < 1:
            longest = max(map(len, prompts))
            return refused(f"a prompt of {longest} tokens leaves nothing of --max-model-len {options.max_model_len}")
        try:
            outputs = run(llm, prompts, max_tokens)
        except InvalidRequestError as error:
            return refused(error)
        for index, output in enumerate(outputs):
            prompt = llm.get_tokenizer().decode(output.prompt_token_ids)
            print(f"\nprompt {index} ({len(output.prompt_token_ids)} tokens): {cut(prompt, options.trunc_print_len)!r}")
            print(f"generated ({len(output['token_ids'])} tokens): {cut(output['text'], options.trunc_print_len)!r}")
        print()
        return compare(options, llm, outputs) if options.compare_with_cpu else 0


def cut(text: str, length: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[:length] + "…"


if __name__ == "__main__":
    sys.exit(main())
