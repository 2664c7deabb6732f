"""The job store: jobs, claims, characters, uploads and webhook messages in SQL."""
