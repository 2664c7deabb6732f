"""Measurements of vidgen beside others. Each file that can be run prints a table and writes JSON; see README.md."""
