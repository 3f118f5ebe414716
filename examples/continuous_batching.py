"""More prompts than places: they come and go while others run. Prints the texts, and compares them with transformers.

python examples/continuous_batching.py -n 4 --max-num-seqs 2 --max-tokens 20,65 --policy padded --compare-with-cpu
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle, islice

from compared import add_engine_options, compare, load, refused, run

from pellucid.errors import InvalidRequestError

PROMPTS = (
    "The three states of water are",
    "Write a short letter to a neighbour whose cat sleeps in your garden every afternoon.\n\nDear neighbour,",
    "def is_prime(n: int) -> bool:\n",
    "Q: Why is the sky blue?\nA:",
    "Once upon a time there was a lighthouse keeper who",
    "The largest planet of the solar system is",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, max_model_len=256)
    parser.add_argument("--num-prompts", "-n", type=int, default=4)
    parser.add_argument("--max-tokens", default="20,65", help="tokens of each prompt, in turns, as in 20,65")
    options = parser.parse_args(arguments)
    try:
        options.max_tokens = [int(count) for count in options.max_tokens.split(",")]
    except ValueError:
        parser.error(f"--max-tokens is {options.max_tokens!r}; it must be numbers with commas between them")
    if options.num_prompts < 1 or min(options.max_tokens) < 1:
        parser.error("--num-prompts and --max-tokens must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; gives the exit status."""
    options = parse(arguments)
    texts = list(islice(cycle(PROMPTS), options.num_prompts))
    max_tokens = list(islice(cycle(options.max_tokens), options.num_prompts))
    with load(options) as llm:
        try:
            outputs = run(llm, llm.encode(texts), max_tokens)
        except InvalidRequestError as error:
            return refused(error)
        for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
            print(f"\nprompt {index}: {text!r}\ngenerated ({len(output['token_ids'])} tokens): {output['text']!r}")
        print()
        return compare(options, llm, outputs) if options.compare_with_cpu else 0


if __name__ == "__main__":
    sys.exit(main())
