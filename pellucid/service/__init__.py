"""The engine for many callers: the asynchronous engine, its streams, its owner thread, and the transports to it (thread or process)."""
