"""Measuring a model on a task: questions from a seed, greedy answers, and scores with their intervals."""
