"""What a step asks of the model for each sequence, and what it finds. Knows neither requests nor tensors' places.

Of these there are hundreds in a step: Python's garbage collector does not count them, since they never form a cycle.
"""

from collections.abc import Callable, Sequence

import msgspec
from torch import Tensor

from bestiary.inputs import NOTHING, Inputs
from bestiary.sampling.sampler import Choice, Row, TopLogprobs

__all__ = ["Compute", "StepResult", "StepRow"]


class StepRow(msgspec.Struct, gc=False):
    """The next tokens of one sequence, from position `start` on, and where its cache is."""

    tokens: Sequence[int]
    start: int
    #: By group of layers that keep alike.
    blocks: Sequence[Sequence[int]]
    #: Set where the step reaches the last token, so that its successor is chosen.
    sampling: Row | None
    #: Where the prompt's log-probabilities are wanted: for each of `tokens` its successor in the prompt (fewer at the
    #: prompt's end), and `prompt_logprobs` says how many.
    successors: Sequence[int] = ()
    #: What the sequence's prompt brings beside its tokens; and `is_crossed`, what it looks at is in the cache already.
    inputs: Inputs = NOTHING
    prompt_logprobs: int | None = None
    #: Vectors of so many of the last tokens are wanted, from a model that pools.
    num_vectors: int = 0
    is_crossed: bool = False
    #: The slot of the request's adapter, -1 for none.
    adapter: int = -1

    @property
    def decodes(self) -> bool:
        """One token, beyond all that its prompt brings, whose successor is chosen."""
        alone = len(self.tokens) == 1 and self.sampling is not None and not self.successors
        return alone and (self.is_crossed or not self.inputs.crossed) and self.inputs.ends_before(self.start)


class StepResult(msgspec.Struct, gc=False):
    """What a step found for one row."""

    choice: Choice | None = None
    prompt: Sequence[TopLogprobs] = ()
    #: [num_vectors, width] float32, on the CPU
    vectors: Tensor | None = None


#: Runs a step of these rows.
Compute = Callable[[Sequence[StepRow]], list[StepResult]]
