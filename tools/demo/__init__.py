"""How the demo checkpoints are made: a synthetic world, training, evaluation. See README.md here."""
