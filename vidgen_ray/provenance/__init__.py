"""Provenance of written files: AI mark, tool, sources and signature.

`settings` says what is written, `record` what a file says about itself, `xmp` how the record is stored, `visible_label` draws a
text into the pixels, and `c2pa_signing` signs files. None of it knows the output folder or Ray.
"""
