"""What differs between two runs, and the overrides that turn one into the other."""
