"""Mosaics for argen: a sampler, a tokenizer, a generator and a command."""
