"""Inference and deployment: engines behind one OpenAI API, replicas on Ray Serve, HAProxy in front."""
