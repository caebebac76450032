"""Data sets, decoding, transforms and the loader that feeds the step."""
