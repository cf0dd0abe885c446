"""Groups of ranks that stay alive between jobs: what they are asked, what they tell, where they run.

The files of the process that asks need no torch.
"""
