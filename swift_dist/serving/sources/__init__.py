"""What a user names (hub, folder, run, checkpoint, adapter) -> the Hugging Face folder that an engine serves."""
