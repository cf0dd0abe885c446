"""Wan 2.1 and 2.2: the transformer and the autoencoders. There is no pipeline and no command line yet."""
