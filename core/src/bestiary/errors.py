"""Every error that a user can meet, each with its remedy in the text. Knows nothing of what raises them.

BestiaryError
├── PluginError
│   ├── UnknownArchitecture        no plugin is known for it
│   ├── PluginNotInstalled         known, not installed: the `pip install` line
│   ├── PluginIncompatible         installed for another contract, or a dependency does not fit
│   ├── PluginBroken               installed, and fails to import or declares nonsense
│   ├── PluginConflict             two distributions claim one name
│   └── CapabilityMissing          installed, and lacks what was asked
├── CheckpointError
│   ├── CheckpointNotFound         no such folder, model or file
│   ├── CheckpointMalformed        a file that cannot be what it claims to be
│   ├── ConfigUnsupported          a key of config.json that is missing, mistyped or has a value nobody implements
│   ├── TensorMismatch             tensors missing, extra or misshapen
│   └── AdapterError               an adapter that is malformed, does not fit the model or is of a kind not served
├── RequestError (a ValueError)    a request that cannot be served; the engine serves on
├── SettingError (a ValueError)    an engine setting out of its range, or that does not fit the machine
└── EngineError                    the engine itself failed; the requests in flight carry this
    └── WorkerDied                 a process that runs a part of the model is gone; the engine can be restarted
"""

__all__ = [
    "AdapterError",
    "BestiaryError",
    "CapabilityMissing",
    "CheckpointError",
    "CheckpointMalformed",
    "CheckpointNotFound",
    "ConfigUnsupported",
    "EngineError",
    "PluginBroken",
    "PluginConflict",
    "PluginError",
    "PluginIncompatible",
    "PluginNotInstalled",
    "RequestError",
    "SettingError",
    "TensorMismatch",
    "UnknownArchitecture",
    "WorkerDied",
]


class BestiaryError(Exception):
    """The root: what Bestiary itself says is wrong, and how to mend it."""


class PluginError(BestiaryError):
    """Something about an installed or missing plugin."""


class UnknownArchitecture(PluginError):
    """No plugin is known for an architecture."""


class PluginNotInstalled(PluginError):
    """A plugin is known for an architecture, but is not installed."""


class PluginIncompatible(PluginError):
    """A plugin was written for another contract, or a distribution it needs does not fit."""


class PluginBroken(PluginError):
    """A plugin fails to import, or its entry point does not hold what it must."""


class PluginConflict(PluginError):
    """Two distributions claim one architecture."""


class CapabilityMissing(PluginError):
    """The plugin, or this engine, does not have what was asked for."""


class CheckpointError(BestiaryError):
    """Something about a model's folder or files."""


class CheckpointNotFound(CheckpointError):
    """No such folder, model or file."""


class CheckpointMalformed(CheckpointError):
    """A file that cannot be what it claims to be."""


class ConfigUnsupported(CheckpointError):
    """A key of config.json is missing, has the wrong type, or a value that nobody implements."""


class TensorMismatch(CheckpointError):
    """Tensors of the checkpoint are missing, extra or misshapen."""


class AdapterError(CheckpointError, ValueError):
    """An adapter that cannot be loaded; what was loaded before stays as it was."""


class RequestError(BestiaryError, ValueError):
    """A request that cannot be served as it stands."""


class SettingError(BestiaryError, ValueError):
    """An engine setting that is out of range, or does not fit the machine."""


class EngineError(BestiaryError):
    """The engine failed while it worked on a request."""


class WorkerDied(EngineError):
    """A process that runs a part of the model died or hangs: nothing runs until the engine is restarted."""
