"""From checkpoint files to modules: headers, rename tables, dtypes, float8, and blocks that stream.

It imports `common.system`, `common.registry` and `common.parallel`.
"""
