"""Prompts to features: tokenizers and text encoders.

It imports the rooms up to `common.weights`.
"""
