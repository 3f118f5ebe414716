"""The engine: requests, blocks, scheduling, steps."""
