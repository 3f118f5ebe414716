"""Embeddings of the OpenAI API."""
