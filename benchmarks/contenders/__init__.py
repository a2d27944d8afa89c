"""The programs that are compared: each loads one engine and answers requests of token ids over its standard input."""
