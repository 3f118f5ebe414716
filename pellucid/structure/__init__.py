"""Structured outputs: grammars from their sources, their matchers, and trials of what callers ask for."""
