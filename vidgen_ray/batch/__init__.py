"""The graph on Ray Data: actors hold the models, shots stream through them, frames fan out to a pool of upscalers."""
