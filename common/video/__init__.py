"""Frames: causal convolutions that stream, the decode over ranks, latents on disk, files of pictures and videos.

It imports the rooms up to `common.weights`.
"""
