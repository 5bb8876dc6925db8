"""From files to batches: examples, conversation templates, tokenizers, label
masks, and the input pipeline that shuffles, shards and resumes.
"""
