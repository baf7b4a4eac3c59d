"""Benchmarks that `ringfa3 bench` runs."""
