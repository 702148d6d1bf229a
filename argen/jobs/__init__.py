"""One queue of jobs for every face of argen, and what it keeps on disk."""
