"""The experiments around a training: runs, sweeps, searches, and what comes of them."""
