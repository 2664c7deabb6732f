"""Benchmarks of stages and chains: measurements, published configurations and random weights. The core never imports it."""
