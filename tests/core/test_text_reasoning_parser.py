"""Reasoning told apart from the answer, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.text.deltas import ContentDelta, Delta, ReasoningDelta
from pellucid.text.reasoning_parser import (
    REASONING_DIALECTS,
    ReasoningParser,
    detect_reasoning,
    opens_in_prompt,
    stands_behind,
)

# dialect, the prompt opened it, text, reasoning, content
TRANSCRIPTS = [
    ("think", False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("think", False, "<think>\n\n</think>\n\nYes.\n", "", "Yes.\n"),
    ("think", False, "\n<think>a</think><think>b</think>c", "ab", "c"),
    ("think", True, "Hm.</think>Yes.", "Hm.", "Yes."),
    ("think", True, "<think>\nHm.</think>Yes.", "Hm.", "Yes."),
    ("think", False, "<think>It goes on", "It goes on", ""),
    ("think", True, "It goes on </thi", "It goes on </thi", ""),
    ("think", False, "<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
    ("think", False, "No reasoning, but <think> as a word</think>. ", "", "No reasoning, but <think> as a word</think>. "),
    ("think", False, "  \n", "", "  \n"),
    ("think", False, "a < b <t", "", "a < b <t"),
    ("think", False, "<think>a\n\nb  c</think>d", "a\n\nb  c", "d"),
    ("mistral", False, "[THINK]a[/THINK]b", "a", "b"),
    ("kimi", False, "◁think▷a◁/think▷b", "a", "b"),
    ("seed", False, "<seed:think>a</seed:think>b", "a", "b"),
    ("command", False, "<|START_THINKING|>a<|END_THINKING|>b", "a", "b"),
    ("granite", False, "Here is my thought process: a.\n\nHere is my response: b", "a.", "b"),
    ("granite", False, "Here is my thought.", "", "Here is my thought."),
    ("harmony", False, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "a", "b"),
    ("harmony", False, "<|channel|>final<|message|>b", "", "b"),
]  # fmt: skip


def run(dialect: str, starts_inside: bool, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(REASONING_DIALECTS[dialect], starts_inside=starts_inside)
    deltas: list[Delta] = [*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()]
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return reasoning, "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))


@pytest.mark.parametrize(
    ("dialect", "starts_inside", "text", "reasoning", "content"), TRANSCRIPTS, ids=range(len(TRANSCRIPTS))
)
def test_transcript_when_parsed_whole_or_by_characters_then_reasoning_and_content(
    dialect: str, starts_inside: bool, text: str, reasoning: str, content: str
) -> None:
    assert run(dialect, starts_inside, [text]) == (reasoning, content)
    assert run(dialect, starts_inside, list(text)) == (reasoning, content)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(REASONING_DIALECTS)),
    st.booleans(),
    st.lists(st.sampled_from(["<", ">", " ", "\n", "a", "OPEN", "CLOSE", "SILENT", "<thi", "Here is"]), max_size=20),
    st.lists(st.integers(0, 300), max_size=8),
)
def test_any_text_when_cut_anywhere_then_same_as_whole(
    dialect: str, starts_inside: bool, words: list[str], places: list[int]
) -> None:
    one = REASONING_DIALECTS[dialect]
    spelled = {"OPEN": one.opens[0], "CLOSE": one.closes[0], "SILENT": (one.silent or ("",))[0]}
    text = "".join(spelled.get(word, word) for word in words)
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert run(dialect, starts_inside, [text]) == run(dialect, starts_inside, pieces)


def test_answer_when_it_streams_then_nothing_is_held_but_what_may_be_a_marker() -> None:
    parser = ReasoningParser(REASONING_DIALECTS["think"])
    assert parser.feed("<thi") == []
    assert parser.feed("nk>Hm") == [ReasoningDelta("Hm")]
    assert parser.feed(" so</th") == [ReasoningDelta(" so")]
    assert parser.feed("e") == [ReasoningDelta("</the")]
    assert parser.feed("</think>") == []
    assert parser.feed("\n\nYes, <") == [ContentDelta("Yes, <")]
    assert parser.feed("b>  ") == [ContentDelta("b>")]
    assert parser.finish() == [ContentDelta("  ")]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|assistant|><think>\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("user: what is <think>?", False),
        ("", False),
    ],
)
def test_prompt_when_it_ends_with_an_opening_marker_then_the_output_begins_inside(prompt: str, opened: bool) -> None:
    assert opens_in_prompt(REASONING_DIALECTS["think"], prompt) is opened


@pytest.mark.parametrize(
    ("template", "name"),
    [("... '</think>' ...", "think"), ("[THINK]", "mistral"), ("◁think▷", "kimi"), ("plain", None), (None, None)],
)
def test_template_when_it_has_a_marker_then_its_dialect_is_found(template: str | None, name: str | None) -> None:
    found = detect_reasoning(template)
    assert (None if found is None else found.name) == name


# what the prompt holds of the answer, what the model writes, reasoning, content
BEGUN = [
    ("", "<think>a</think>b", "a", "b"),
    ("<think>", "a</think>b", "a", "b"),
    ("<think>\n", "\na</think>b", "a", "b"),
    ("<think>a", " b</think>c", " b", "c"),
    ("<think>a ", "b</think> c", "b", "c"),
    ("<think>a</think>", "b", "", "b"),
    ("<think>a</think>b", " c <think>d", "", " c <think>d"),
    ("The tag is <think>", " it is</think>.", "", " it is</think>."),
    ("The answer is:", " <think>", "", " <think>"),
    ("<thi", "nk>a</think>", "", "nk>a</think>"),
]


@pytest.mark.parametrize(("begun", "text", "reasoning", "content"), BEGUN)
def test_output_when_it_goes_on_from_a_beginning_then_that_says_what_it_is(
    begun: str, text: str, reasoning: str, content: str
) -> None:
    inside, has_begun = stands_behind(REASONING_DIALECTS["think"], begun)
    for pieces in ([text], list(text)):
        parser = ReasoningParser(REASONING_DIALECTS["think"], starts_inside=inside, has_begun=has_begun)
        deltas: list[Delta] = [*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()]
        assert "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)) == reasoning
        assert "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)) == content


@pytest.mark.parametrize(("begun", "has_begun"), [("", False), (" \n", False), ("a", True)])
def test_output_of_a_model_that_does_not_reason_when_begun_then_it_has_begun(begun: str, has_begun: bool) -> None:
    assert stands_behind(None, begun) == (False, has_begun)
