"""A deployment while it runs: its driver, its controller, replicas on Ray Serve, and what is changed meanwhile."""
