"""The HTTP server: OpenAI's API over the asynchronous engine. It parses, templates, tokenises and formats."""
