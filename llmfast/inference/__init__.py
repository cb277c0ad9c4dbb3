"""From a model to text: cache, sampling, decoders, the decode loop, scoring, `LLM` and `load`."""
