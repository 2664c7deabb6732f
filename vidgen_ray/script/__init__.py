"""Read scripts and validate their lines."""
