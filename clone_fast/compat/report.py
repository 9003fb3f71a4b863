"""What was replaced in other codebases, what was left alone, and why: a live account that can be printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["Report", "Replaced"]

MOST_REASONS = 5  # that a line shows


@dataclass
class Replaced:
    """One function or method of another codebase that calls ours.

    Attributes:
        where: its dotted name.
        by: what answers in its place.
        evidence: why that is right.
        served: calls that were answered by us.
        passed: calls that went on to the original, by the reason.
        active: False from `uninstall` on: a reference that somebody kept is the original then, too.
    """

    where: str
    by: str
    evidence: str
    served: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    active: bool = True

    def __str__(self) -> str:
        calls = f"{self.served} calls served"
        if self.passed:
            reasons = [f"{reason} ({count})" for reason, count in self.passed.most_common(MOST_REASONS)]
            calls += f", {self.passed.total()} passed on: {'; '.join(reasons)}"
        return f"{self.where} -> {self.by} ({self.evidence}); {calls}"


@dataclass
class Report:
    """What `clone_fast.install` or `accelerate` did, for `print`. It counts calls; install's grows with imports.

    Attributes:
        replaced: by dotted name.
        left_alone: the reason why, by dotted name.
    """

    replaced: dict[str, Replaced] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def about(self, modules: Collection[str]) -> Report:
        """The part that tells of functions and classes of these modules; it counts calls as this does."""

        def told(where: str) -> bool:
            return where.rpartition(".")[0] in modules

        return Report(
            {where: entry for where, entry in self.replaced.items() if told(where)},
            {where: reason for where, reason in self.left_alone.items() if told(where)},
        )

    def __str__(self) -> str:
        lines = [f"clone_fast: {len(self.replaced)} replaced, {len(self.left_alone)} left alone"]
        lines += [f"  replaced    {entry}" for entry in self.replaced.values()]
        lines += [f"  left alone  {where}: {reason}" for where, reason in self.left_alone.items()]
        return "\n".join([*lines, "On a CPU our ops run their reference in plain PyTorch: as exact, and not faster."])
