"""`swift-dist infer`: engines asked as one pool, a conversation, a dataset's rows each exactly once."""
