"""One shot through many processes: workers with models, encoders, retries, Ray clusters."""
