"""Checks of engine outputs for tests and examples: against a reference, against forced tokens, against tables of steps."""

from __future__ import annotations

from pellucid.testing.compare import Comparison, Difference, Generated, assert_outputs_match, compare_outputs
from pellucid.testing.golden import GoldenTokens, force_tokens
from pellucid.testing.step_tables import StepTable, TableRequest, TableRow, check_step_table, load_step_table
from pellucid.testing.transformers_reference import follow_with_transformers, load_transformers

__all__ = [
    "Comparison",
    "Difference",
    "Generated",
    "GoldenTokens",
    "StepTable",
    "TableRequest",
    "TableRow",
    "assert_outputs_match",
    "check_step_table",
    "compare_outputs",
    "follow_with_transformers",
    "force_tokens",
    "load_step_table",
    "load_transformers",
]
