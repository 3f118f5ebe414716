"""Pellucid: an LLM inference engine you can see into and train through."""

__version__ = "0.1.0"
