"""Programs: a module is called once with symbols; what it did is planned, packed, kept in one file and run by the core."""
