"""The graph on Ray Serve: jobs that are stored before they are accepted, led through the stages, answered over HTTP."""
