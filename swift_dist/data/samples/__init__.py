"""Samples: encoded rows on disk, their order, and the micro-batches that a rank is fed."""
