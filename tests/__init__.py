"""Tests never reach for the network; the hub client reads this once, when it is first imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
