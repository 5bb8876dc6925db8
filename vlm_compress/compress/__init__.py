"""The two compression methods as functions of arrays: importance scores, spatial
scores, thresholds and masks of ATP-LLaVA, and the compaction of what is kept.
The models call these functions; nothing in here reaches into a model.
"""
