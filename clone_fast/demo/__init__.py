"""The demo: a small network that comes with the package, the images it was trained on, and its training."""

from __future__ import annotations

from pathlib import Path

DEMO_NETWORK = Path(__file__).with_name("generator.safetensors")
"""The trained network: generator, discriminator and named directions, 128x128."""
