"""The cards of this package."""
