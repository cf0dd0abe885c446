"""`make gpu-check`: what this program claims of GPUs, measured on the machine at hand.

parts.py says what is measured, measures.py measures it on ranks, claims.py compares it with what is claimed, runner.py
runs the parts one by one, each in processes of its own, and keeps every result on disk as soon as it is there.
"""
