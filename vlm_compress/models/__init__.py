"""The models: vision towers, projector, LLaMA decoder, and LLaVA put together
from them.  Pure Flax Linen modules whose parameters carry the names of Hugging
Face; token types and positions come in with the batch as data.
"""
