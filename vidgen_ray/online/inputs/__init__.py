"""Inputs of clients: uploads, image references, URLs."""
