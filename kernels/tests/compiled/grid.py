"""What the cases of the grid launch: every setting, in small shapes. What comes of it is rubbish, and not looked at."""

import random
from contextlib import suppress

import torch

from ..grid import CASES
from ..grid.draw import Seeded

_DRAWS = 4


def every_case() -> None:
    for case in CASES.values():
        for seed in range(_DRAWS):
            with suppress(Exception):  # what the compiler says is kept
                case(Seeded(random.Random(seed)), torch.device("cpu"))
