"""A command from its line to its files: options, launcher, ranks, pipeline, dry run, quantize.

It imports all other rooms, and alone the planner.
"""
