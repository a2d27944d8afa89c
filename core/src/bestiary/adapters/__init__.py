"""LoRA adapters: read from PEFT's folders, placed in a model's tree, and kept in slots.

peft   a folder to matrices by the names of the modules that they belong to
place  those names to places in the tree, through the plugin's own table
book   who has which slot: names, contents, what is in use and what goes first
"""

from bestiary.adapters.book import Book, Entry
from bestiary.adapters.peft import Adapter, adapter_folder, read
from bestiary.adapters.place import place

__all__ = ["Adapter", "Book", "Entry", "adapter_folder", "place", "read"]
