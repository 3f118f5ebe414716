"""Chat completions of the OpenAI API."""
