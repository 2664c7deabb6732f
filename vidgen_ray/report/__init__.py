"""Reports: the gallery and the contact sheet of a run, and the identity sheet of photos."""
