"""What clients send: uploads, image references, URLs."""
