"""Text to verified blocks and back: sources, tokenizer, packing, pieces, order."""
