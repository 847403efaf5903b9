"""One file per command: the function's signature is its options, its YAML schema and its help."""
