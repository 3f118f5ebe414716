"""Tokens, live state and traces, for those who look into a running server."""
