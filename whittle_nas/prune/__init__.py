"""Other people's methods of compression, one in a file, on one calibration pass."""
