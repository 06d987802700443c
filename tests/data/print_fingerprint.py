"""Prints the fingerprint of the tokenizer in a folder."""

import sys

from p2p_llm_forge.data.tokenizer import load_tokenizer, tokenizer_fingerprint

print(tokenizer_fingerprint(load_tokenizer(sys.argv[1])))
