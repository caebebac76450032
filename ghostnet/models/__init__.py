"""GhostNet and the readers of its published weights."""
