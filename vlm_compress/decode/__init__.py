"""From a model to text: sampling, generation with a key/value cache, generation
with pruned visual tokens, and compressed images kept on disk.
"""
