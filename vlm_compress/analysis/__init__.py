"""Looking inside: what is kept in each layer, thresholds per image, and
attention of text to visual and VoCo tokens, as arrays and as figures.
"""
