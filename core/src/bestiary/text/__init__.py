"""Text in: tokenizers and chat templates, read from a checkpoint's folder as data. Knows no model and no engine."""

from bestiary.text.template import ChatTemplate
from bestiary.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Tokenizer"]
