"""What the three forks share: ranks, sequence-parallel attention, guidance, weights, text, VAE, video files."""
