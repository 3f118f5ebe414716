"""Models: one small file a family, chosen by architecture name from the registry."""
