"""Mutators for files that others wrote: each a seeded, endless source of damaged or malicious variants."""
