"""What transformers share inside: rotations, elementwise passes, what is compiled.

It imports the rooms up to `common.video`.
"""
