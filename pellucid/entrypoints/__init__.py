"""Ways in: the offline API."""
