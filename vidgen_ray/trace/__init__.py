"""Traces of runs: what each worker did when, as a file for Perfetto or as OpenTelemetry spans."""
