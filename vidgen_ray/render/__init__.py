"""One shot in one process: steps, weights on the GPU, OOM fallback, stage cache and files. Does not use Ray."""
