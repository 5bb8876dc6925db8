"""Building blocks of a transformer: norms, projections, RoPE, masks, attention,
key/value cache.  They know arrays and integers and no word of this project:
what may attend to what, and where a token sits, are arguments.
"""
