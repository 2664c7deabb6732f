"""Batch executor: render a script with Ray Data, GPU workers and encoders."""
