"""The stages of the chain, one file a stage. They know models; nothing of Ray, files or HTTP."""
