"""One shot through many processes: steps, weights on GPUs, files, Ray clusters."""
