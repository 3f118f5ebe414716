"""Names of activations with `*`: each stands for any text without dots, in a time that no pattern makes long."""

from __future__ import annotations

import random
import re
import time

from pellucid.api.hidden_states import CaptureParams, HiddenStatesLimits


def limits(names: list[str]) -> HiddenStatesLimits:
    return HiddenStatesLimits(2, 8, 1 << 30, dict.fromkeys(names, 8), {})


def test_any_pattern_when_resolved_then_the_names_of_its_regular_expression() -> None:
    draw = random.Random(1)
    names = ["".join(draw.choice("ab.") for _ in range(draw.randrange(1, 9))) for _ in range(200)]
    known = limits(names)
    for _ in range(2000):
        pattern = "".join(draw.choice("ab.*") for _ in range(draw.randrange(1, 8)))
        expression = re.compile(r"[^.]*".join(map(re.escape, pattern.split("*"))))
        wanted = tuple(name for name in known.activations if expression.fullmatch(name))
        if wanted:
            assert CaptureParams((pattern,)).resolve(known) == wanted


def test_pattern_of_many_stars_when_resolved_then_at_once() -> None:
    known = limits(["a" * 200, "b"])
    began = time.monotonic()
    assert CaptureParams(("*" * 200 + "b",)).resolve(known) == ("b",)
    assert CaptureParams(("*a" * 100 + "*",)).resolve(known) == ("a" * 200,)
    assert time.monotonic() - began < 5
