"""Trainings on a user's own images, with the published recipes: one network a file, see docs/training.md."""
