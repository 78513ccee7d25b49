"""The demo: one small real model, one task, two adapters of the same rank, measured before and after."""
