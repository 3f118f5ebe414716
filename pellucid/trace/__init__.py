"""Step records: how they are written, read, compared, explained and drawn."""
