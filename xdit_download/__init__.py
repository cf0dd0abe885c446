"""`xdit-download`: the weights the three programs read, from the hub into one folder each."""
