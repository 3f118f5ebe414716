"""Quantised weights: which matrix is kept, or made, in which of the core's formats."""
