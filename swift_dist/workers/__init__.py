"""One task spread over processes of this machine (`pool`) or actors of a Ray cluster (`ray_pool`)."""
