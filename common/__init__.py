"""What the forks share, by rooms; see docs/map.md."""
