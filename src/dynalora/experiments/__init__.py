"""Whole jobs on a user's model and data: fine-tuning, the demo, the benchmark, and their run folders."""
