"""From a model to text: sampling, and generation with a key/value cache."""
