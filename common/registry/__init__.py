"""Values without torch: layouts, checks at the door, settings, requests, and what each fork says of itself.

It imports `common.system`.
"""
