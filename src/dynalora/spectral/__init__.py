"""Singular values and vectors of matrices and of products of factors; nothing here knows adapters."""
