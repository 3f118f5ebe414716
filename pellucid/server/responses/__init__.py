"""Responses of the OpenAI API."""
