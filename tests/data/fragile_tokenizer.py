"""A tokenizer that brings its own code, with a mistake in it; copied beside what it loads."""

from transformers import ByT5Tokenizer


class Fragile(ByT5Tokenizer):
    """Fails on a text that holds `boom`."""

    def _tokenize(self, text, **names):
        if "boom" in text:
            raise ValueError("no such letters")
        print("a tokenizer may print")
        return super()._tokenize(text, **names)
