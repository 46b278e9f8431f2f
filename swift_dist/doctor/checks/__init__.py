"""One file a check, found by its name. Each holds one `CHECK` (`swift_dist.doctor.values.Check`)."""
