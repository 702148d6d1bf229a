"""The queue of jobs of all front ends, and its storage on disk."""
