"""The first fifty cases of tests/fuzz.py, which include all kinds."""
from tests import fuzz


def test_broken_input_of_every_kind_gives_a_result_or_a_one_line_error(tmp_path):
    counts, faults = fuzz.run_cases(range(50), tmp_path)
    assert not faults, "\n".join(faults)
    assert set(counts) == {kind.__name__ for kind in fuzz.KINDS}
