"""Traces of runs, as a file for Perfetto or as OpenTelemetry spans."""
