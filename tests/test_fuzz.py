"""A hundred cases of tests/fuzz.py, of all kinds: broken input is a result or one line, and never a traceback."""
from tests import fuzz


def test_broken_input_of_every_kind_is_a_result_or_one_line(tmp_path):
    counts, faults = fuzz.run_cases(range(100), tmp_path)
    assert not faults, "\n".join(faults)
    assert set(counts) == {kind.__name__ for kind in fuzz.KINDS}
