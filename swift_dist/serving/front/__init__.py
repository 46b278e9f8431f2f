"""HAProxy in front of the replicas: keys, limits, retries, shares of versions; what it is told is a value (`state`)."""
