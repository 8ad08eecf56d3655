"""Benchmarks: each is one command that prints its table and writes it to docs/. Not part of the tests."""
