"""The output folder: shot files, stage cache, manifest and failures. A partly written file is never visible."""
