"""Slow float64 references, written from the papers' equations and sharing no code with the package."""
