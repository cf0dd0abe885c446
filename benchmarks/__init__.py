"""Measuring, comparing with what was published, and calibrating the planner."""
