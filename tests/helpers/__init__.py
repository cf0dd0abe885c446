"""What several test files share: small models with their references, counters, fake GPUs and groups, the ranks' pool.

Nothing here is a test and nothing in the product imports it. `fuzz/` and `soak/` beside it are programs of their own.
"""
