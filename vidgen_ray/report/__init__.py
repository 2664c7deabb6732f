"""Report of a run: its gallery."""
