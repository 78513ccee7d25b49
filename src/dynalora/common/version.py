"""The package's version, which its metadata, model cards and records of runs say."""

__version__ = "0.1.0"
