"""The HTTP server: OpenAI's API over the asynchronous engine. Parses, templates, tokenises, formats; it never touches the engine's state."""
