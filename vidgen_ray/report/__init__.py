"""Reports: the gallery of a run, and the identity sheet of photos."""
