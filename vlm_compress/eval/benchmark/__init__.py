"""How long it really takes: one process, alternating, medians, beside FLOPs."""
