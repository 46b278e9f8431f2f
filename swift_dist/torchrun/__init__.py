"""A job without Ray: `driver` starts a machine's ranks through torchrun and watches the run; `rank` is one of them."""
