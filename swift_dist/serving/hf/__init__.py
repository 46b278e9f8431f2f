"""The hf engine: transformers' models with continuous batching, on any device that torch has."""
