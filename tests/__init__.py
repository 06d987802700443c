"""Tests of everything that is promised, and the plain modules that they share."""

import os
from pathlib import Path

# Read by huggingface_hub at its import: without it, tests ask the network and wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
