import pytest

from tff_fedavg.replacement import replacement


def test_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")
    with replacement(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_file_is_what_it_was_after_an_exception(tmp_path, error):
    path = tmp_path / "results.csv"
    path.write_text("old")
    with pytest.raises(error):
        with replacement(path) as temporary:
            temporary.write_text("half of the n")
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
