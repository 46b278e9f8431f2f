"""Text to tokens (`prepare`), and tokens to the micro-batches of every rank (`loader`)."""
