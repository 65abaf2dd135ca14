"""The engine process: scheduler, model runner, sampler and the loop that joins them."""

import os

# Looking for devices that torch itself does not know takes a tenth of its import, which each start waits for.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
