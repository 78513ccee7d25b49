"""Forgetting in stages, recovery from it, and transfer between tasks."""
