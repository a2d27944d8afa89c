"""Where this process stands among those that share one model. Knows no model."""

from dataclasses import dataclass

__all__ = ["Mesh"]


@dataclass(frozen=True)
class Mesh:
    """The pipeline stage of this rank. One process alone is the first and the last stage at once."""

    stage: int = 0
    stages: int = 1

    def layers_of(self, count: int) -> range:
        """Which of `count` layers this stage keeps: contiguous, the earlier stages take what does not divide."""
        base, extra = divmod(count, self.stages)
        first = self.stage * base + min(self.stage, extra)
        return range(first, first + base + (self.stage < extra))

    @property
    def is_first(self) -> bool:
        """This rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """This rank makes the logits."""
        return self.stage == self.stages - 1
