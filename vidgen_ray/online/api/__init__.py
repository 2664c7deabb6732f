"""The HTTP API: the shapes that OpenAI's clients speak, over the store. Knows nothing of Ray, and computes nothing."""
