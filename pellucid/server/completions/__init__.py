"""Completions of the OpenAI API."""
