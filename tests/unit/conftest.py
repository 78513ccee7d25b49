"""Fixtures of the unit tests."""

from tests.unit.program import program as program
