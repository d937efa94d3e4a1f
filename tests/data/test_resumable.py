"""One pass over a loader, and the position that it reports."""

from trainer.data.position_codec import encode
from trainer.data.resumable import LoaderPass, LoaderPosition


def test_a_pass_that_draws_ahead_says_where_it_was_before():
    class Counter:
        def __init__(self):
            self.count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            return self.count

        def get_state(self):
            return self.count

        def set_state(self, state):
            self.count = state

    batches = LoaderPass(Counter(), 1, "loader", None)
    batches.open()
    assert [next(batches) for _ in range(3)] == [1, 2, 3]
    assert batches.position(3) == LoaderPosition(encode(3), 3, loader="Counter")
    assert [next(batches) for _ in range(2)] == [4, 5]
    ahead = batches.position(4)
    assert ahead == LoaderPosition(encode(3), 3, loader="Counter")
    again = LoaderPass(Counter(), 1, "loader", None)
    again.open(ahead, 4)
    assert next(again) == 5
