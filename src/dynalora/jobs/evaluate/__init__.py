"""Measure a model, or an adapter on its base model, on benchmarks by name."""
