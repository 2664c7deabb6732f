"""Benchmarks of stages and chains, also with random weights. The core never imports it."""
