"""The job store: jobs, leases, characters, uploads and webhook messages in SQL."""
