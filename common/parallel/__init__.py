"""Ranks: the mesh and its process groups, attention over them, guidance, what memory they all have.

It imports `common.system` and `common.registry`.
"""
