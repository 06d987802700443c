"""The causal language model: build, load, loss, document mask, optimizer, schedule."""
