"""Importance of every part of a model, measured on calibration data, and sorting by it."""
