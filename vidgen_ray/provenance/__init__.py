"""Provenance of written files: AI mark, tool, sources and signature.

None of it knows the output folder or Ray.
"""
