"""Seeing what an adapter changed, and what the model forgot."""
