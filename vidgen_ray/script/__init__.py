"""Read scripts and check every line."""
