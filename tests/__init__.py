"""Tests of dynalora: references from the equations, one matrix over all methods, the driver under real trainers."""
