"""The `convert` verbs: weights from one format to another, looked at, and compared. What they do with bytes is the
converters' (swift_dist/converters); here it meets families, checkpoints and worker processes."""
