"""Whole jobs on a user's model and data, one file or folder each."""
