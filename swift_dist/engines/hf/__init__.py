"""The hf engine: transformers' models under DDP, FSDP2 or DeepSpeed."""
