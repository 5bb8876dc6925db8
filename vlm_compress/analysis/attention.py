"""Where text looks, mean over pictures: attention to visual and VoCo tokens.

The single picture is `capture.attention_to_image`; this is its mean over a
quickstart's test pictures, in total and by what a visual token shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_compress.analysis.capture import attention_to_image
from vlm_compress.analysis.pruning import PLACES, Quickstart, places
from vlm_compress.eval.evaluator import questions_of
from vlm_compress.vlm import Vlm

_LABELS = {'visual': 'visual tokens', 'voco': 'VoCo tokens',
           'text': 'text tokens'}


@dataclasses.dataclass(frozen=True)
class Attention:
  """Mean attention over questions, and its spread; see `mean_attention`.

  Attributes:
    shares, stds: kind of key -> float[M], where text looks.
    text_by_place, voco_by_place: place -> float[M], attention of a visual
      token there, seen from text and from the VoCo tokens, as a multiple of
      that of the average visual token; empty where nobody looks.
  """
  shares: dict[str, np.ndarray]
  stds: dict[str, np.ndarray]
  text_by_place: dict[str, np.ndarray]
  voco_by_place: dict[str, np.ndarray]


def mean_attention(results: Quickstart, loaded: Vlm,
                   num_voco_tokens: int = 0, *, count: int = 24,
                   kind: str | None = None) -> Attention:
  """Where text looks, and what is looked at, mean over some questions.

  Args:
    results: of a quickstart; gives pictures and questions.
    loaded: the model that is asked.
    num_voco_tokens: C; with VoCo tokens the VoCo mask applies, and text sees
      no visual token at all.
    count: pictures, one question each; kind: as in `pruning.ask`.
  """
  kind = kind or results.kinds[0]
  questions = questions_of(results.examples[:count], {kind: 1})
  mask = 'voco' if num_voco_tokens else 'causal'
  found = [attention_to_image(
      loaded, results.examples[q.example], results.features[q.example],
      q.turn.question, mask, num_voco_tokens) for q in questions]
  stack = {label: np.stack([f[key] for f in found])
           for key, label in _LABELS.items()}
  place_maps = [places(results.examples[q.example], q.turn.question,
                       results.images[q.example].shape[0],
                       loaded.config.vision.grid_size) for q in questions]
  by_place = lambda key: _relative([f[key] for f in found], place_maps)
  stack = {label: values for label, values in stack.items() if values.any()}
  return Attention(
      shares={label: values.mean(0) for label, values in stack.items()},
      stds={label: values.std(0) for label, values in stack.items()},
      text_by_place=by_place('text_to_visual'),
      voco_by_place=by_place('voco_to_visual'))


def _relative(maps: Sequence[np.ndarray],
              place_maps: Sequence[Mapping[str, np.ndarray]]
              ) -> dict[str, np.ndarray]:
  """Mean attention of a token of each place / that of any visual token."""
  everything = np.stack(maps)
  average = everything.mean((0, 2, 3))
  if not (average > 0).all():
    return {}
  out = {}
  for name in PLACES:
    chosen = np.stack([place[name] for place in place_maps])
    if chosen.any():
      total = (everything * chosen[:, None]).sum((0, 2, 3))
      out[name] = total / chosen.sum() / average
  return out
