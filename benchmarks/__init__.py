"""Benchmarks: each module prints a Markdown table and the command that made it."""
