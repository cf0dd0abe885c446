"""What a run takes before anything is loaded, and where its weights go for it.

It imports the rooms up to `common.model`.
"""
