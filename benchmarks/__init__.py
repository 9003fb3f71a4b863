"""Benchmarks, a package so that they import one another; not installed."""
