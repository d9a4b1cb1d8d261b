"""The picture that tells what happened compares each layer with its usual value, and is drawn before a run ends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabnorm.dashboard import live
from stabnorm.dashboard.heatmap import INFINITE, MARK, NO_VALUE, WIDTH
from stabnorm.dashboard.live import EVERY, SHOWN, LivePicture
from stabnorm.dashboard.readers import MemoryReader
from stabnorm.dashboard.relative_map import DIVERGING, relative_map
from stabnorm.dashboard.runs import Run
from stabnorm.monitor.record import Block, Event
from tests.dashboard.records import LAYERS, alert, calm, growing, write

TOP = 66 + 84 + 14  # of the map


def drawn(
    scale: np.ndarray, events: tuple[tuple[str, int, dict[str, Any]], ...] = (), names: tuple[str, ...] = LAYERS
) -> np.ndarray:
    layers = names[: scale.shape[1]]
    series = {"token_std_mean": scale, "loss": np.linspace(2, 1, len(scale)), "tokens": np.full(scale.shape, 9.0)}
    run = Run("run", MemoryReader({"": (layers, np.arange(len(scale)), series)}, [Event(*event) for event in events]))
    run.refresh()
    image = relative_map(run)
    assert image is not None
    return image


def cell(image: np.ndarray, layer: int, part: float) -> np.ndarray:
    """The colour of a layer, at a part of the run."""
    left = image.shape[1] - 30 - WIDTH
    colour: np.ndarray = image[TOP + layer * 26 + 20, left + int(part * (WIDTH - 1))].astype(int)
    return colour


def test_a_layer_that_doubles_is_red_and_one_that_halves_is_blue_whatever_their_size() -> None:
    scale = calm(400)
    scale[340:, 2] *= 2.2
    scale[340:, 7] *= 0.4
    image = drawn(scale)
    np.testing.assert_allclose(cell(image, 2, 0.87), DIVERGING[-1], atol=8)
    np.testing.assert_allclose(cell(image, 7, 0.87), DIVERGING[0], atol=8)
    for layer in (0, 1, 3, 8):
        assert np.ptp(cell(image, layer, 0.87)) < 25, "no colour where nothing happened"


def test_what_is_not_finite_and_what_is_not_known_have_colours_of_their_own() -> None:
    scale = calm(400)
    scale[350:, 3] = np.nan
    scale[380:, 4] = np.inf
    image = drawn(scale)
    assert cell(image, 3, 0.95).tolist() == list(INFINITE)
    assert cell(image, 4, 0.97).tolist() == list(INFINITE)
    assert cell(image, 0, 0.05).tolist() == list(NO_VALUE)


def test_the_frame_of_an_alert_lies_in_the_row_of_its_layer() -> None:
    for layer in (0, 4, 8):
        image = drawn(calm(400), (alert(300, LAYERS[layer]),))
        marked = np.all(image == MARK, axis=-1)
        marked[: TOP + 1] = False  # the line through the loss
        wide = np.flatnonzero(marked.sum(1) > 5)
        assert TOP + layer * 26 <= wide.min()
        assert wide.max() < TOP + (layer + 1) * 26


@pytest.mark.parametrize("steps", [1, 2, 49, 900, 30_000])
def test_any_length_is_a_picture(steps: int) -> None:
    assert drawn(calm(steps, 3)).shape[1] > WIDTH


def test_long_names_that_differ_at_their_end_differ_in_the_picture() -> None:
    image = drawn(calm(300, 2), names=tuple(f"{'a_block_' * 30}.{i}.norm" for i in range(2)))
    labels = image[TOP : TOP + 52, : image.shape[1] - 30 - WIDTH]
    assert (labels[:26] != labels[26:]).any()


def test_an_alert_beyond_the_last_step_is_not_drawn() -> None:
    alone, beyond = (drawn(calm(300), events) for events in ((), (alert(320, LAYERS[1]),)))
    np.testing.assert_array_equal(alone[66:TOP], beyond[66:TOP])  # the title tells of it


def test_a_record_without_a_scale_has_no_picture() -> None:
    run = Run("run", MemoryReader({"": (("a",), np.arange(3), {"crest": np.ones((3, 1))})}))
    run.refresh()
    assert relative_map(run) is None


class Seen:
    def __init__(self) -> None:
        self.pictures: list[int] = []
        self.texts: list[str] = []
        self.writer = LivePicture(
            lambda image, step: self.pictures.append(step), lambda text, step: self.texts.append(text)
        )


def test_every_alert_is_drawn_and_told_at_once() -> None:
    seen = Seen()
    write(seen.writer, growing(350), events=[alert(315, LAYERS[1]), alert(316, "norm")])
    assert seen.pictures == [349], "one picture for a flush"
    assert LAYERS[1] in seen.texts[0]
    assert "Where to look" in seen.texts[0]
    write(seen.writer, growing(50, 0), first=350, events=[alert(399, "norm")])
    assert seen.pictures == [349, 399]


def test_a_calm_run_is_drawn_now_and_then() -> None:
    seen = Seen()
    write(seen.writer, calm(2 * EVERY * 50 + 49))
    assert seen.pictures == [EVERY * 50 - 1, 2 * EVERY * 50 - 1]
    assert not seen.texts


def test_memory_is_bounded_and_the_end_shows_all_that_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "KEPT_BYTES", 200_000)
    seen = Seen()
    write(seen.writer, calm(2 * SHOWN, 3), layers=LAYERS[:3], events=[alert(2 * SHOWN - 1, "blocks.0.norm1")])
    steps = sum(block.num_steps for block in seen.writer._blocks)
    assert SHOWN < steps < 2 * SHOWN
    assert f"{SHOWN:,} steps" not in seen.writer.report()
    assert seen.writer.picture() is not None


def test_companions_are_left_to_their_own_pictures(tmp_path: Path) -> None:
    seen = Seen()
    seen.writer.write_block(Block(0, ("head",), {"attention_entropy": np.ones((50, 1), np.float32)}, "attention"))
    seen.writer.close()
    assert not seen.pictures
