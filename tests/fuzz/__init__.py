"""Hostile input, seeded: commands, files, names, environments. `python -m tests.fuzz --cases 5000`."""
