"""Commands as Ray jobs, which use the cluster that they run on."""
