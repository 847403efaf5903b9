"""Finding the Pareto front of quality against cost among the sub-networks of one checkpoint."""
