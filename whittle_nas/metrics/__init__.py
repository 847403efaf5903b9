"""What a sub-network costs: computed from its sizes, or measured."""
