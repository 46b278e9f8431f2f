"""Benchmarks that users run: `swift-dist bench ...`, one file a verb."""
