"""A history as a frame of pandas."""

import math

import pytest

from trainer import History


@pytest.mark.third_party
def test_a_history_is_a_frame_of_numbers_by_step():
    pandas = pytest.importorskip("pandas")
    history = History.from_rows(
        [{"step": 1, "loss": 0.5, "note": "x"}, {"step": 2, "val_loss": 0.25}, {"step": 3, "loss": math.inf}]
    )
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "step"
    assert list(frame.index) == [1, 2, 3]
    assert list(frame.columns) == ["loss", "note", "val_loss"]
    assert frame.dtypes["loss"] == frame.dtypes["val_loss"] == "float64"
    assert frame["loss"].isna().tolist() == [False, True, False]
    assert frame.loc[3, "loss"] == math.inf
    assert History().to_pandas().empty
