"""What surrounds a run on its machine: files, streams, signals, the process among others, failures, progress.

It imports nothing of the project.
"""
