"""Benchmarks of Pellucid itself, behind `pellucid bench`. Comparisons with other engines live in benchmarks/ of the source tree."""
