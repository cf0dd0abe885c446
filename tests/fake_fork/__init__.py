"""A fork with a few all-reduces instead of a model: for everything around the models.

`python tests/fake_fork/cli.py` is a command line program like the forks'. `--fault KIND@RANK` makes a rank misbehave at
step 3.
"""
