"""Who takes part and how they talk: launch, rendezvous, cluster, links, preflight."""
