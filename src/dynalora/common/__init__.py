"""Small helpers that know nothing of adapters."""
