"""Strategies, one file each: how a model, its gradients and its optimizer are spread over the ranks."""
