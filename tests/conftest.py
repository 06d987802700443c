"""Settings of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
