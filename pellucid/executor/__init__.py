"""Executors: what turns a step's plan into sampled tokens."""
