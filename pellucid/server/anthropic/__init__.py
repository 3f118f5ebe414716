"""Messages of the Anthropic API."""
