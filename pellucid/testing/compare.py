"""Outputs against a reference: token by token, log-probability by log-probability, with the first difference explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pellucid.api.outputs import CompletionOutput, RequestOutput

RTOL = 1e-3
ATOL = 1e-3

Decode = Callable[[int], str]


@dataclass(frozen=True)
class Generated:
    """What was generated for one prompt: tokens, the log-probability of each (empty: they are not compared), and, where they
    are known, those of other candidates at each position, by which a difference is explained."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    candidates: Sequence[Mapping[int, float]] = ()

    def __post_init__(self) -> None:
        for name in ("logprobs", "candidates"):
            count = len(getattr(self, name))
            if count and count != len(self.token_ids):
                raise ValueError(f"{name} has {count} entries; there are {len(self.token_ids)} tokens")

    @classmethod
    def of(cls, output: Generated | RequestOutput | CompletionOutput) -> Generated:
        """From an output of the engine; of a request, its first choice."""
        if isinstance(output, Generated):
            return output
        choice = output.outputs[0] if isinstance(output, RequestOutput) else output
        rows = [{token: one.logprob for token, one in row.items()} for row in choice.logprobs or []]
        return cls(
            choice.token_ids, [row[token] for row, token in zip(rows, choice.token_ids, strict=bool(rows))], rows
        )

    def logprob_of(self, position: int, token_id: int) -> float | None:
        """Of a token at a position, where it is known."""
        if self.logprobs and self.token_ids[position] == token_id:
            return self.logprobs[position]
        return self.candidates[position].get(token_id) if self.candidates else None


@dataclass(frozen=True)
class Difference:
    """Where an output leaves its reference first, and how."""

    kind: Literal["token", "length", "logprob"]
    position: int
    text: str  # for people


@dataclass(frozen=True)
class OutputComparison:
    """One prompt. Tokens are compared up to the first that differs, log-probabilities of all before it."""

    index: int
    num_tokens: int
    num_reference_tokens: int
    num_equal: int
    max_logprob_difference: float
    difference: Difference | None

    @property
    def matches(self) -> bool:
        """True when nothing differs by more than was allowed."""
        return self.difference is None


@dataclass(frozen=True)
class Comparison:
    """All prompts, in their order."""

    rows: list[OutputComparison] = field(default_factory=list)

    @property
    def all_match(self) -> bool:
        """True when no prompt differs."""
        return all(row.matches for row in self.rows)

    def table(self) -> str:
        """A line for each prompt, and behind it where it differs."""
        lines = ["prompt  tokens  reference   equal  max |logprob difference|  result"]
        for row in self.rows:
            result = "match" if row.difference is None else f"differs at token {row.difference.position}"
            lines.append(
                f"{row.index:6}  {row.num_tokens:6}  {row.num_reference_tokens:9}  {row.num_equal:6}  "
                f"{row.max_logprob_difference:24.2e}  {result}"
            )
        lines += [f"prompt {row.index}: {row.difference.text}" for row in self.rows if row.difference]
        return "\n".join(lines)


def compare_outputs(
    outputs: Sequence[Generated | RequestOutput | CompletionOutput],
    references: Sequence[Generated | RequestOutput | CompletionOutput],
    *,
    rtol: float = RTOL,
    atol: float = ATOL,
    decode: Decode | None = None,
) -> Comparison:
    """Compares outputs with references, pair by pair.

    Tokens must be equal. Log-probabilities, in nats, may differ by `atol + rtol * |reference|`; where a side has none they are
    not compared. `decode` gives the text of a token id, for the explanations.

    Raises:
        ValueError: the numbers of outputs and references differ.
    """
    if len(outputs) != len(references):
        raise ValueError(f"there are {len(outputs)} outputs and {len(references)} references")
    pairs = enumerate(zip(outputs, references, strict=True))
    rule = _Rule(rtol, atol, decode)
    return Comparison([rule.compare(i, Generated.of(ours), Generated.of(theirs)) for i, (ours, theirs) in pairs])


def assert_outputs_match(
    outputs: Sequence[Generated | RequestOutput | CompletionOutput],
    references: Sequence[Generated | RequestOutput | CompletionOutput],
    *,
    rtol: float = RTOL,
    atol: float = ATOL,
    decode: Decode | None = None,
) -> Comparison:
    """As `compare_outputs`; for tests.

    Raises:
        AssertionError: with the table, when a prompt differs.
    """
    comparison = compare_outputs(outputs, references, rtol=rtol, atol=atol, decode=decode)
    if not comparison.all_match:
        raise AssertionError(f"outputs differ from the reference\n{comparison.table()}")
    return comparison


@dataclass(frozen=True)
class _Rule:
    rtol: float
    atol: float
    decode: Decode | None

    def compare(self, index: int, ours: Generated, theirs: Generated) -> OutputComparison:
        num_equal = _num_equal(ours.token_ids, theirs.token_ids)
        gaps = [abs(a - b) for a, b in zip(ours.logprobs[:num_equal], theirs.logprobs, strict=False)]
        difference = self._logprob(gaps, ours, theirs) or self._token(num_equal, ours, theirs)
        counts = len(ours.token_ids), len(theirs.token_ids), num_equal
        return OutputComparison(index, *counts, max(gaps, default=0.0), difference)

    def _allowed(self, reference: float) -> float:
        return self.atol + self.rtol * abs(reference)

    def _logprob(self, gaps: Sequence[float], ours: Generated, theirs: Generated) -> Difference | None:
        for position, gap in enumerate(gaps):
            allowed = self._allowed(theirs.logprobs[position])
            if not gap <= allowed:  # so that NaN differs
                text = (
                    f"token {position}, {self._name(ours.token_ids[position])}, has logprob {ours.logprobs[position]:.6f}; the "
                    f"reference has {theirs.logprobs[position]:.6f}: {gap:.2e} apart, {allowed:.2e} allowed"
                )
                return Difference("logprob", position, text)
        return None

    def _token(self, position: int, ours: Generated, theirs: Generated) -> Difference | None:
        lengths = len(ours.token_ids), len(theirs.token_ids)
        if position == max(lengths):
            return None
        if position == min(lengths):
            text = f"it ends after {lengths[0]} tokens, the reference after {lengths[1]}; all before are equal"
            return Difference("length", position, text)
        own, other = ours.token_ids[position], theirs.token_ids[position]
        text = f"token {position} is {self._name(own)}; the reference has {self._name(other)}"
        return Difference("token", position, f"{text}{self._why(position, own, other, ours, theirs)}")

    def _why(self, position: int, own: int, other: int, ours: Generated, theirs: Generated) -> str:
        """What each side thinks of the two tokens."""
        parts, margins = [], []
        for name, side, chosen, rival in (("here", ours, own, other), ("reference", theirs, other, own)):
            first, second = side.logprob_of(position, chosen), side.logprob_of(position, rival)
            if first is None or second is None:
                continue
            parts.append(f"{name}: {first:.6f} against {second:.6f}")
            margins.append(abs(first - second) <= 2 * self._allowed(first))
        if not parts:
            return ""
        verdict = "a near tie" if all(margins) else "no near tie"
        return f" ({'; '.join(parts)}: {verdict})"

    def _name(self, token_id: int) -> str:
        return str(token_id) if self.decode is None else f"{token_id} {self.decode(token_id)!r}"


def _num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The length of the common beginning."""
    shorter = min(len(ours), len(theirs))
    return next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
