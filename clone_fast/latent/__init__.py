"""How the start is found: the latent whose image comes nearest to the photo, with the generator as it is.

Optimisation (optimise.py) works with any generator and needs nothing else. Encoders (ReStyle, e4e, pSp) will live in
encoder.py beside it, and a hybrid is an encoder's latent given to the optimisation as its start.
"""

from __future__ import annotations

from clone_fast.latent.latent import Latent
from clone_fast.latent.optimise import LatentSettings, Outcome, Search, optimise

__all__ = ["Latent", "LatentSettings", "Outcome", "Search", "optimise"]
