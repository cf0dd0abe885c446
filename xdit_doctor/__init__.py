"""`xdit-doctor`: what a machine has, how fast its ranks talk, and a hardware profile of it for the planner."""
