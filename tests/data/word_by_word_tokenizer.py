"""A tokenizer that brings its own code: whole words, its end of text among them."""

import json
import os

from transformers import PreTrainedTokenizer


class WordByWord(PreTrainedTokenizer):
    """Fails on a text that holds `boom`."""

    vocab_files_names = {"words_file": "words.json"}

    def __init__(self, words_file, **settings):
        with open(words_file) as file:
            self._words = json.load(file)
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return len(self._words)

    def get_vocab(self):
        return {word: number for number, word in enumerate(self._words)}

    def _tokenize(self, text, **settings):
        if "boom" in text:
            raise ValueError("no such letters")
        return text.split()

    def _convert_token_to_id(self, token):
        return self._words.index(token) if token in self._words else 0

    def _convert_id_to_token(self, index):
        return self._words[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, "words.json")
        with open(path, "w") as file:
            json.dump(self._words, file)
        return (path,)
