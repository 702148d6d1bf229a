"""Checkpoints: their cards, their files on this machine, and how they become pipelines and networks."""
