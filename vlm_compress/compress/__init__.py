"""The two compression methods as functions of arrays: importance scores, spatial
scores, thresholds and masks of ATP-LLaVA, and the attention mask of VoCo-LLaMA.
The models call these functions; nothing in here reaches into a model.
"""
