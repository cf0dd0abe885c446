"""The page at /: who may see it, how it looks, what its buttons do. Needs the extra `page`."""
