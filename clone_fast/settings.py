"""What can be set about the tweak."""

from __future__ import annotations

from dataclasses import dataclass

from clone_fast.errors import SettingsError
from clone_fast.nn import Precision


@dataclass(frozen=True)
class TweakSettings:
    """How the generator is tweaked.

    Attributes:
        mode: "clone" is the method, "recon" the reconstruction alone (tuning as PTI does it), kept as a yardstick.
        steps: iterations at most.
        target_psnr: stop as soon as the clone is that near to the photo, in dB; None to take all steps.
        local_probability: p, with which the local term joins an iteration.
        reconstruction_weight: of L_recon, which is a mean over pixels here; in the paper it is a sum.
        adversarial_weight: lambda, of the local adversarial term; 0 to leave it out.
        cohesion_weight: of L_global; 1 in the paper, 0 to leave it out.
        paired_weight: of a second cohesion term, this project's addition: for the same z the tweaked and the original
            generator shall draw the same image. 0 for the paper's method.
        edit_weight: of a third one, likewise ours: a random move of the photo's own latent shall change the clone as it
            changes what the original draws. 0 for the paper's method.
        edit_reach: how far these moves go at most, as a share of the way from the mean of w to another latent.
        batch: images that the discriminator sees at once; the clone takes one of these places when it joins.
        generator_lr, discriminator_lr: of Adam, at the top of the ramp.
        noise_lr: likewise, of noise maps that belong to the photo alone: no other latent sees them. 0 to leave them.
        r1_gamma, r1_interval: R1 regularisation of D in every r1_interval-th iteration; gamma 0 for none.
        saturating: the generator's adversarial terms as the formula stands, log(1 - D), instead of -log D.
        one_pass: G's adversarial terms by the pass through D that D's own update takes, which spares a forward and a
            backward; their gradient is that of `Adversary.turn`, near but not exact. False, and in float16: by a pass
            of their own through the updated D, as in the paper; better without the paired term (see the README).
        tune_mapping: move the mapping network as well; the latent is fixed, so only the cohesion terms would.
        precision: what both networks compute in, "fp32", "tf32", "bf16" or "fp16"; weights are float32 in any case.
            None: bf16 on a GPU that has it, elsewhere tf32, which on a CPU is float32.
        recompute: save memory, about a fifth of a Clone iteration's, for a fifth of its time: backwards compute block
            after block of the networks once more.
        check_every: iterations between two reads of the loss.
    """

    mode: str = "clone"
    steps: int = 150
    target_psnr: float | None = None
    local_probability: float = 1.0
    reconstruction_weight: float = 400.0
    adversarial_weight: float = 1.0
    cohesion_weight: float = 1.0
    paired_weight: float = 400.0
    edit_weight: float = 150.0
    edit_reach: float = 0.4
    batch: int = 4
    generator_lr: float = 0.002
    discriminator_lr: float = 0.001
    noise_lr: float = 1.0
    r1_gamma: float = 0.1
    r1_interval: int = 16
    saturating: bool = False
    one_pass: bool = True
    tune_mapping: bool = False
    precision: str | None = None
    recompute: bool = False
    check_every: int = 5

    def __post_init__(self) -> None:
        if self.mode not in ("clone", "recon"):
            raise SettingsError(f"mode must be clone or recon, got {self.mode!r}")
        Precision.named(self.precision)
        if self.steps < 1:
            raise SettingsError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.local_probability <= 1:
            raise SettingsError(f"local_probability must be in (0, 1], got {self.local_probability}")
        if self.batch < 2:
            raise SettingsError(f"batch must be >= 2, one for the clone and one for the rest, got {self.batch}")
        for name in ("r1_interval", "check_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be >= 1, got {getattr(self, name)}")
        weights = ("reconstruction_weight", "adversarial_weight", "cohesion_weight", "paired_weight", "edit_weight")
        for name in (*weights, "edit_reach", "noise_lr", "r1_gamma"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name} must be >= 0, got {getattr(self, name)}")

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator takes part."""
        return self.mode == "clone" and (self.adversarial_weight > 0 or self.cohesion_weight > 0)

    @property
    def cohesive(self) -> bool:
        """Whether a term keeps the rest of the manifold in place."""
        return self.mode == "clone" and (self.cohesion_weight > 0 or self.paired_weight > 0)

    @property
    def others(self) -> bool:
        """Whether images of other latents take part."""
        return self.mode == "clone" and (self.adversarial or self.paired_weight > 0)

    @property
    def variants(self) -> list[tuple[bool, bool]]:
        """(with the local term, with R1) of the iterations, in the order in which they may come."""
        found = []
        for local in (True, False) if self.cohesive and self.local_probability < 1 else (True,):
            regular = self.judges(local) and self.r1_gamma > 0
            found += [(local, penalised) for penalised in ((True, False) if regular else (False,))]
        return found

    def judges(self, local: bool) -> bool:
        """Whether the discriminator takes part in an iteration with the local term, or without."""
        return self.adversarial and (local or self.cohesion_weight > 0)

    @property
    def edits(self) -> bool:
        """Whether moves of the photo's own latent take part, where the local term does."""
        return self.mode == "clone" and self.edit_weight > 0
