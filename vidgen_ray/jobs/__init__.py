"""Commands as Ray jobs on the cluster that runs them."""
