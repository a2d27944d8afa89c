"""A model's folder as data: its configuration, its tensors, and the way of each tensor into the model.

jsonfile     JSON of others, bounded and without doubles
config       config.json and generation_config.json, typed and strict
header       what one safetensors file holds, checked against its bytes
safetensors  the files of a folder as one checkpoint, through memory maps
operations   what happens to a tensor on its way: transpose, split, take turns
names        checkpoint names -> places in the model's tree
accounting   pour a checkpoint into a tree, and account for every tensor

Nothing here knows an architecture, and nothing imports torch until a tensor is read.
"""

from bestiary.checkpoint.accounting import Leaf, Place, fill
from bestiary.checkpoint.config import ConfigFile, RopeSettings, generation
from bestiary.checkpoint.names import Names, Target
from bestiary.checkpoint.operations import Interleaved, Split, Squeeze, Stacked, Transpose
from bestiary.checkpoint.safetensors import Checkpoint

__all__ = [
    "Checkpoint",
    "ConfigFile",
    "Interleaved",
    "Leaf",
    "Names",
    "Place",
    "RopeSettings",
    "Split",
    "Squeeze",
    "Stacked",
    "Target",
    "Transpose",
    "fill",
    "generation",
]
