"""This machine: files, processes, caches and free memory."""
