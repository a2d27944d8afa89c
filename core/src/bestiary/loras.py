"""The adapters of one engine: the book of names and slots, and the executor with their matrices. Knows no request."""

from collections.abc import Callable, Iterator
from pathlib import Path

from bestiary import registry
from bestiary.adapters import Book, Entry, adapter_folder
from bestiary.architecture import Architecture
from bestiary.config import EngineConfig
from bestiary.errors import AdapterError, CapabilityMissing
from bestiary.executor import Executor

__all__ = ["Adapters"]


class Adapters:
    """Adapters by name. What they take of memory is given back as soon as nobody needs it."""

    def __init__(self, config: EngineConfig, executor: Callable[[], Executor]) -> None:
        self._config, self._executor = config, executor
        self.book = Book(config.max_loras, config.max_cpu_loras or config.max_loras)
        #: What the plugin declares, where it is known.
        self.architecture: Architecture | None = None

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.book)

    def find(self, name: str) -> Entry:
        """The content that a name stands for now. Raises RequestError where it stands for none."""
        return self.book.find(name)

    def load(self, name: str, folder: Path) -> None:
        """Let requests use a LoRA adapter, a folder as PEFT saves it, by this name; other content may have had it.

        Who runs with the old content keeps it, and nobody finds what the old content left in the cache. Raises
        AdapterError, RequestError or CapabilityMissing, and then everything is as it was.
        """
        if not self._config.enable_lora:
            raise CapabilityMissing(f"lora {name!r}: the model was loaded with enable_lora=False")
        if self.architecture is not None:
            registry.require(self.architecture, lora=True)
        key, path = self.book.new_key(name), adapter_folder(folder, self._config.allowed_lora_path)
        self.book.enter(Entry(name, path, key, self._executor().add_adapter(key, path)))
        self.tidy()

    def unload(self, name: str) -> None:
        """Take a name away. Requests that run with it go on. Raises RequestError for a name that nothing has."""
        self.book.remove(name)
        self.tidy()

    def tidy(self) -> None:
        """Let go what nobody needs any more, or what is too much."""
        for entry in self.book.surplus():
            self._executor().remove_adapter(entry.key)

    def seat(self) -> None:
        """Fill the slots that the next step needs. Whose adapter cannot be had fails when its row is made."""
        for slot, entry in self.book.moves():
            try:
                if not self.book.is_held(entry):
                    self._read_again(entry)
                self._executor().place_adapter(entry.key, slot)
            except Exception as failure:
                self.book.unseat(entry, str(failure))

    def _read_again(self, entry: Entry) -> None:
        """Its matrices had left memory."""
        if self._executor().add_adapter(entry.key, entry.folder) != entry.digest:
            self._executor().remove_adapter(entry.key)
            raise AdapterError(f"{entry.folder} has changed since adapter {entry.name!r} was loaded: load it again")
        self.book.held(entry)
        self.tidy()

    @staticmethod
    def slot(entry: Entry | None) -> int:
        """Where it sits, -1 for none. Raises AdapterError for one that could not be put into its slot."""
        if entry is None:
            return -1
        if entry.slot is None:
            raise AdapterError(f"adapter {entry.name!r} cannot be had any more: {entry.trouble}")
        return entry.slot
