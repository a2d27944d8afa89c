"""GGUF read as data, and turned into a folder in Hugging Face's layout.

file       the container: metadata, tensors, their dequantised values
tokenizer  `tokenizer.ggml.*` -> the text of a tokenizer.json
folder     metadata and tensors -> config.json, model.safetensors, tokenizer and chat template, all or nothing

Which architecture a file holds, and what its tensors are called elsewhere, is a plugin's business.
"""

from bestiary.checkpoint.gguf.file import GGUFFile
from bestiary.checkpoint.gguf.folder import Stored, write_folder
from bestiary.checkpoint.gguf.tokenizer import tokenizer_json

__all__ = ["GGUFFile", "Stored", "tokenizer_json", "write_folder"]
