"""A picture, or a video with sound, from a prompt: the fork of docs/adding-a-fork.md."""
