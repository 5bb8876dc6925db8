"""What the report of a sweep shows, as blocks for HTML and Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.data import images
from vlm_compress.eval import blocks, example_log, floors, report, sweep_figures, tables
from vlm_compress.eval import page as page_lib
from vlm_compress.eval import sweep_tables as st

TITLE = 'Visual token compression: a sweep'
_LONGEST = 400  # characters of an answer that are shown


@dataclasses.dataclass(frozen=True)
class Details:
  """What a run's directory has besides its numbers.

  Attributes:
    examples: of examples.jsonl, by question id.
    answers: rows of answers.jsonl, by question id, of the examples.
  """
  examples: Mapping[str, Mapping[str, Any]]
  answers: Mapping[str, Mapping[str, Any]]


def page(found: Sequence[st.Bench], content: Mapping[str, Any],
         details: Mapping[str, Details]) -> list[Any]:
  """The blocks of the page.

  Args:
    found: tables of the benchmarks.
    content: of rows.json.
    details: of the runs, by cell.
  """
  out = _alerts(found, content)
  out.append(blocks.Note(_summary(found, content)))
  everything = st.overview(found)
  if everything is not None:
    out.append(blocks.Section('All benchmarks', [everything]))
  for bench in found:
    out.append(blocks.Section(f'{bench.metric} ({bench.name})', [
        *_bench(bench), *_examples(bench, details)]))
  out.append(blocks.Section('How to read the tables', [blocks.Bullets(st.HOW_TO_READ)]))
  out.append(_runs(found))
  if content.get('versions'):
    out.append(blocks.Section('Versions', [blocks.Pairs(content['versions'])]))
  return out


def _alerts(found: Sequence[st.Bench], content: Mapping[str, Any]) -> list[Any]:
  out: list[Any] = []
  problems = [f'{bench.name}: {line}.' for bench in found for line in bench.problems]
  if problems:
    out.append(blocks.Alert('Partial tables.', 'They must not be read as a comparison:',
                            problems))
  failed = [f'{one["cell"]}: {_last_line(one["error"])}' for one in content['failed']]
  if failed:
    out.append(blocks.Alert(
        'Failed runs.', f'{len(failed)} of the sweep have no numbers; error.txt in '
        'their directories has the traceback:', failed))
  if content['times_failed']:
    out.append(blocks.Alert('No times.', content['times_failed'], []))
  some = [f'{bench.name}: {bench.asked}.' for bench in found if bench.partial]
  if some:
    out.append(blocks.Alert('Part of the questions.', 'Numbers are of these only, and no '
                            'results of the benchmark:', some))
  return out


def _last_line(error: str) -> str:
  lines = error.strip().splitlines()
  return lines[-1] if lines else 'no message'


def _summary(found: Sequence[st.Bench], content: Mapping[str, Any]) -> str:
  rows = [row for bench in found for entry in bench.entries for row in entry.rows]
  checkpoints = sorted({row['checkpoint'] for row in rows})
  return (f'{len(rows)} finished run(s) on {len(found)} benchmark(s), of the checkpoint(s) '
          f'{", ".join(checkpoints)}; {len(content["failed"])} failed. Intervals are 95 %.')


def _bench(bench: st.Bench) -> list[Any]:
  """A benchmark's tables and figures."""
  out: list[Any] = [
      blocks.Bullets(floors.findings(bench.parts, bench.metric, bench.most, bench.show)),
      st.main_table(bench)]
  gaps = st.difference_table(bench)
  if gaps is not None:
    out.append(blocks.Section('Differences to the floors', [gaps], 3))
  figures = [_accuracy(bench)]
  if sweep_figures.has_latency(bench):
    figures.append(_latency(bench))
  out.append(blocks.Section('What accuracy costs', figures, 3))
  kinds = st.kind_tables(bench)
  if kinds:
    out.append(blocks.Section('By kind of question', [*_heat_map(bench), *[
        blocks.Section(title, [table], 4) for title, table in kinds]], 3))
  return out + _kept(bench)


def _accuracy(bench: st.Bench) -> blocks.Figure:
  return blocks.Figure(
      f'{bench.stem}-tokens', report.accuracy_png(
          bench.parts, ylabel=bench.metric, most=bench.most),
      f'{bench.metric} against visual tokens. Bars are 95 % intervals; markers of one '
      'budget are set apart a little. Hollow markers and crosses: training-free; grey: '
      'floors.',
      f'{bench.metric} against layer-average visual tokens, a line per method; the '
      'numbers are in the table above.')


def _latency(bench: st.Bench) -> blocks.Figure:
  figure = report.new_figure(report.FIGURE_WIDTH, 4.2)
  sweep_figures.draw_latency(figure, bench)
  return blocks.Figure(
      f'{bench.stem}-latency', report.png(figure),
      f'{bench.metric} against measured time: seconds of a question to its first token, '
      'texts and vision features ready, all methods in turn. Bars are 95 % intervals of the value. '
      'Lines join the budgets of a method.',
      f'{bench.metric} against seconds to the first token, a line per method; the '
      'numbers are in the table above.')


def _heat_map(bench: st.Bench) -> list[blocks.Figure]:
  kinds = sorted({kind for e in sweep_figures.kind_columns(bench) for kind in e.by_kind})
  columns = sweep_figures.kind_columns(bench)
  if not columns:
    return []
  figure = report.new_figure(report.FIGURE_WIDTH, 0.8 + 0.27 * len(kinds))
  sweep_figures.draw_kinds(figure.subplots(), columns, kinds)
  return [blocks.Figure(
      f'{bench.stem}-kinds', report.png(figure),
      'Score of each kind of question in per cent. Colour is the difference to the full '
      'model: red is worse, blue better, darkest at 25 points.',
      'Heat map of scores by kind of question and method; the numbers are in the tables '
      'below.')]


def _kept(bench: st.Bench) -> list[Any]:
  """Kept tokens per layer, and per instance behind each module."""
  png = report.kept_png(bench.parts, ())
  if png is None:
    return []
  out: list[Any] = [blocks.Figure(f'{bench.stem}-kept', png, page_lib.KEPT_CAPTION)]
  lines = report.kept_percentiles(bench.parts, ())
  if lines:
    out.append(blocks.Table(page_lib.KEPT_COLUMNS, [
        blocks.Line(tuple(line)) for line in lines], left=2, note=(
            'Tokens that are left after a module and enter the layers up to the next, over '
            'the questions with a picture.')))
  return [blocks.Section('Tokens kept', out, 3)]


# ---------------------------------------------------------------- examples


def _examples(bench: st.Bench, details: Mapping[str, Details]) -> list[Any]:
  """Questions that a run has recorded, with all methods' answers."""
  known: dict[str, Mapping[str, Any]] = {}
  for entry in bench.entries:
    for key, example in details[_cell(entry)].examples.items():
      known.setdefault(key, example)
  if not known:
    return []
  shown = [_example(bench, number, key, example, details)
           for number, (key, example) in enumerate(known.items())]
  credits = sorted({example['attribution'] for example in known.values()} - {''})
  words = ' '.join(credits) or (
      f'Pictures: of {bench.key}, under the licences of that benchmark.')
  return [blocks.Section('Pictures, questions, answers', [
      *shown, blocks.Note(
          'The examples are spread evenly over the benchmark, whatever was answered. '
          'Pictures are what the vision tower saw; cells of dropped tokens are faded out. '
          f'{words}')], 3)]


def _cell(entry: tables.Entry) -> str:
  return entry.rows[0]['cell']


def _example(bench: st.Bench, number: int, key: str, example: Mapping[str, Any],
             details: Mapping[str, Details]) -> blocks.Example:
  picture = example_log.picture(example)
  image = None if picture is None else np.asarray(images.decode(picture, f'of {key!r}'))
  stem, strips, replies, answers = f'{bench.stem}-example{number + 1}', [], [], []
  roles = {e.role for e in bench.entries if _masks(e, key, details) is not None}
  mapped = 'method' if 'method' in roles else 'floor'
  for entry in bench.entries:
    row = details[_cell(entry)].answers.get(key)
    if row is None:
      continue
    answers = row['answers'] or answers
    replies.append(_reply(entry, row))
    masks = _masks(entry, key, details)
    if image is not None and masks is not None and entry.role == mapped:
      places = details[_cell(entry)].examples[key]['prune_after']
      strips.append(blocks.Strip(
          f'{stem}-{len(strips) + 1}', _strip_title(entry, row, masks),
          report.keep_map_strip(image, masks, place_names(places), photo=True),
          1 + len(masks)))
  if image is not None and not strips:
    strips = [blocks.Strip(stem, '', report.keep_map_strip(image, [], (), photo=True), 1)]
  return blocks.Example(example['text'], ' / '.join(dict.fromkeys(answers)) or 'not public',
                        strips, replies)


def _masks(entry: tables.Entry, key: str, details: Mapping[str, Details]
           ) -> np.ndarray | None:
  """bool[L, g, g], None where nothing was recorded."""
  example = details[_cell(entry)].examples.get(key)
  return example_log.masks(example) if example is not None and example['keep'] else None


def place_names(prune_after: Sequence[int]) -> list[str]:
  """'after layer 4', ..."""
  return [f'after layer {place}' if place else 'before layer 1' for place in prune_after]


def _strip_title(entry: tables.Entry, row: Mapping[str, Any], masks: np.ndarray) -> str:
  title = (f'{entry.name}, {entry.average_tokens:.3g} tokens on average, '
           f'{np.mean(row["visual_tokens"]):.3g} here')
  counts, answered = masks.sum((1, 2)).tolist(), row.get('kept')
  if answered is not None and not all(map(math.isclose, counts, answered)):
    title += f' (kept when it was answered: {", ".join(f"{n:g}" for n in answered)})'
  return title


def _reply(entry: tables.Entry, row: Mapping[str, Any]) -> blocks.Reply:
  score, text = row.get('score'), row['prediction']
  about = f'seed {entry.rows[0]["seed"]}' if len(entry.rows) > 1 else ''
  if score is not None and score not in (0, 1):
    about = ', '.join(filter(None, (f'score {score:.2f}', about)))
  if len(text) > _LONGEST:
    text = f'{text[:_LONGEST]}…'
  name = entry.name if tables.is_full(entry) else (
      f'{entry.name}, {entry.average_tokens:.3g} tokens')
  return blocks.Reply(name, text, {0: False, 1: True}.get(score), about)


def _runs(found: Sequence[st.Bench]) -> blocks.Section:
  """Which directories the lines are made of."""
  lines = [blocks.Line((row['cell'], bench.name, (entry.name, st.tag(entry)),
                        f'{row["value"]:.2f}', f'{row["layer_average_tokens"]:.2f}'))
           for bench in found for entry in bench.entries for row in entry.rows]
  return blocks.Section('Runs', [blocks.Table(
      ('directory below runs/', 'benchmark', 'method', 'value', 'tokens avg'), lines, 3)])
