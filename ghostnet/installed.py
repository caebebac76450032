"""Imported first: one line, not a traceback, where what every command needs is not installed."""

import importlib.util
import sys

for needed in ("hydra", "omegaconf", "numpy", "torch", "torchvision", "simplejpeg", "rich"):
    if importlib.util.find_spec(needed) is None:
        raise SystemExit(
            f"error: {sys.executable} has no {needed}. Install: pip install -r requirements.txt; "
            "python -m ghostnet.tools.doctor tells what else is missing."
        )
