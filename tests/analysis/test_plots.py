"""The figures show the arrays that they are given."""

import io

import numpy as np
import pytest

pytest.importorskip('matplotlib', reason='needs the extra [demo]')

from vlm_compress.analysis import plots
from vlm_compress.eval import figures

LABELS = ['after layer 1', 'after layer 2']
IMAGE = np.full((8, 8, 3), 0.5)
KEEP = np.array([[[1, 1], [0, 1]], [[0, 1], [0, 0]]])


def rendered(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=40)
  return buffer.getbuffer().nbytes > 1000


def texts(figure):
  return [ax.get_title() for ax in figure.axes]


def test_keep_map_veils_exactly_the_dropped_cells():
  figure = plots.keep_map_figure(IMAGE, KEEP, LABELS,
                                 thresholds=[[0.25, 0.9], [0.5, 0.75]],
                                 title='what?')
  assert [len(ax.images) for ax in figure.axes] == [1, 2, 2]
  for ax, keep in zip(figure.axes[1:], KEEP):
    veil = np.asarray(ax.images[1].get_array())[..., 3]
    np.testing.assert_array_equal(veil > 0, keep == 0)
  assert texts(figure) == [
      'input', 'after layer 1\n3 of 4 kept\nθr 0.25   θs 0.90',
      'after layer 2\n1 of 4 kept\nθr 0.50   θs 0.75']
  assert rendered(figure)


def test_keep_map_outline_separates_kept_from_dropped():
  figure = plots.keep_map_figure(IMAGE, KEEP[1:], LABELS[1:])
  line, = figure.axes[1].lines
  x, y = (np.asarray(v).reshape(-1, 3)[:, :2] for v in line.get_data())
  got = {tuple(map(tuple, np.stack([a, b], 1).tolist())) for a, b in zip(x, y)}
  # The upper right cell of four: left, right, upper and lower side.
  assert got == {((0.5, 0.0), (0.5, 0.5)), ((1.0, 0.0), (1.0, 0.5)),
                 ((0.5, 0.0), (1.0, 0.0)), ((0.5, 0.5), (1.0, 0.5))}


def test_keep_map_grid():
  figure = plots.keep_map_grid_figure([IMAGE, IMAGE], [KEEP, 1 - KEEP], LABELS,
                                      titles=['first', 'second'])
  assert len(figure.axes) == 6
  assert texts(figure)[4] == 'after layer 1\n1 of 4 kept'
  assert figure.axes[3].get_ylabel() == 'second'
  assert rendered(figure)


def test_kept_counts_histogram_by_hand():
  figure = plots.kept_counts_figure([[2, 1], [2, 1], [3, 1], [4, 1]], LABELS)
  left, right = figure.axes
  bars = [(round(b.get_y() + b.get_height() / 2, 6), round(b.get_width(), 6),
           round(b.get_x() + b.get_width() / 2, 6)) for b in left.patches]
  # Module 0: two instances keep 2, one 3, one 4; module 1: all keep 1.
  assert bars == [(2, 0.84, 0), (3, 0.42, 0), (4, 0.42, 0), (1, 0.84, 1)]
  medians = [line.get_ydata()[0] for line in left.lines]
  assert medians == [2.5, 1]
  np.testing.assert_array_equal(right.lines[0].get_ydata(), [2, 1])
  np.testing.assert_array_equal(right.lines[-1].get_ydata(), [2.75, 1])
  assert rendered(figure)


def test_kept_counts_of_a_wide_range_are_binned():
  figure = plots.kept_counts_figure(np.arange(1, 577)[:, None], ['one'])
  bars = figure.axes[0].patches
  assert len(bars) <= figures.MAX_BINS
  assert len({b.get_height() for b in bars}) == 1
  low = min(b.get_y() for b in bars)
  high = max(b.get_y() + b.get_height() for b in bars)
  assert low <= 1 and high >= 576


def test_kept_per_layer_steps():
  figure = plots.kept_per_layer_figure({'ATP': ([4, 2, 1], [0, 1, 0])})
  band, steps = figure.axes[0].patches
  np.testing.assert_array_equal(steps.get_data().values, [4, 2, 1])
  np.testing.assert_array_equal(steps.get_data().edges, [0.5, 1.5, 2.5, 3.5])
  np.testing.assert_array_equal(band.get_data().values, [4, 3, 1])
  np.testing.assert_array_equal(band.get_data().baseline, [4, 1, 1])
  assert rendered(figure)


def test_thresholds_per_module_and_group():
  thresholds = np.array([[[0.1, 0.9], [0.2, 0.8]], [[0.3, 0.7], [0.4, 0.6]],
                         [[0.5, 0.5], [0.6, 0.4]]])
  figure = plots.threshold_figure(thresholds, LABELS, groups=['b', 'a', 'b'])
  first, second = figure.axes
  assert [line.get_label() for line in first.lines] == ['a', 'b']
  np.testing.assert_array_equal(first.lines[1].get_xydata(),
                                [[0.1, 0.9], [0.5, 0.5]])
  np.testing.assert_array_equal(second.lines[0].get_xydata(), [[0.4, 0.6]])
  assert [t.get_text() for t in figure.legends[0].get_texts()] == ['a', 'b']
  assert rendered(figure)
  assert not plots.threshold_figure(thresholds, LABELS).legends


def test_attention_lines():
  figure = plots.attention_figure({'visual tokens': [0.5, 0.25],
                                   'VoCo tokens': [0.1, 0.2]},
                                  stds={'VoCo tokens': [0.2, 0.1]})
  ax, = figure.axes
  np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 0.5], [2, 0.25]])
  assert ax.lines[1].get_label() == 'VoCo tokens'
  band = ax.collections[0].get_paths()[0].vertices
  assert band[:, 1].min() == 0.0 and band[:, 1].max() == pytest.approx(0.3)
  assert rendered(figure)


def test_attention_bars_stack():
  figure = plots.attention_shares_figure({'visual': np.array([0.5, 0.2]),
                                          'text': np.array([0.5, 0.3])})
  bars = figure.axes[0].patches
  assert [b.get_y() for b in bars] == [0, 0, 0.5, 0.2]
  np.testing.assert_allclose([b.get_height() for b in bars],
                             [0.5, 0.2, 0.5, 0.3])
  assert rendered(figure)
  with pytest.raises(ValueError, match='layer 2 sum to 1.200'):
    plots.attention_shares_figure({'a': [0.5, 0.6], 'b': [0.5, 0.6]})


def test_wrong_shapes_are_named():
  with pytest.raises(ValueError, match=r'keep_maps has shape \(2, 2\)'):
    plots.keep_map_figure(IMAGE, KEEP[0], LABELS)
  with pytest.raises(ValueError, match='labels has 1 entries; 2'):
    plots.keep_map_figure(IMAGE, KEEP, LABELS[:1])
  with pytest.raises(ValueError, match='counts has shape'):
    plots.kept_counts_figure(np.zeros((0, 2)), LABELS)
  with pytest.raises(ValueError, match='groups has 1 entries; 3'):
    plots.threshold_figure(np.zeros((3, 2, 2)), LABELS, groups=['a'])
