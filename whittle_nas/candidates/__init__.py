"""UNAST's library: for every attention and MLP of a model several cheaper ones, with scores."""
