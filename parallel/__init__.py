"""Device mesh, token dispatch and launch-time process groups."""
