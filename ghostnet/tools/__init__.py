"""Programs beside training, each run as python -m ghostnet.tools.<name>."""
