"""How fast is it, and what do others take for the same work: python -m ghostnet.tools.benchmark."""
