import math

import pytest

from tff_fedavg.metrics_table import MetricsTable, read_metrics


def test_metrics_are_read_as_numbers_without_the_gaps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("round_num,evaluation/accuracy,loss\n0,0.5,\n1,,2.5\n2,0.75,nan\n")
    rows = read_metrics(path)
    assert rows[:2] == [{"round_num": 0.0, "evaluation/accuracy": 0.5}, {"round_num": 1.0, "loss": 2.5}]
    assert math.isnan(rows[2]["loss"])
    assert read_metrics(tmp_path / "missing.csv") == []


def test_rows_are_appended_and_a_new_metric_becomes_a_column(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append(0, {"accuracy": 0.1})
    table.append(1, {"loss": 1 / 3, "seconds": 2})
    table.append(2, {"accuracy": 1e-30, "loss": math.inf})
    content = (tmp_path / "metrics.csv").read_bytes()
    assert content.decode().splitlines() == [
        "round_num,accuracy,loss,seconds",
        "0,0.1,,",
        "1,,0.3333333333333333,2",
        "2,1e-30,inf,",
    ]
    assert content == table.content
    assert read_metrics(tmp_path / "metrics.csv")[1] == {"round_num": 1, "loss": 1 / 3, "seconds": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_round_is_written_without_the_rounds_before_it(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    for round_number in range(100):
        table.append(round_number, {"loss": 0.5})
    size = (tmp_path / "metrics.csv").stat().st_size
    inode = (tmp_path / "metrics.csv").stat().st_ino
    table.append(100, {"loss": 0.5})
    assert (tmp_path / "metrics.csv").stat().st_size == size + len("100,0.5\r\n")
    assert (tmp_path / "metrics.csv").stat().st_ino == inode


def test_a_last_row_that_is_not_finished_is_none(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("round_num,loss\n0,0.5\n1,0.4")
    assert read_metrics(path) == [{"round_num": 0.0, "loss": 0.5}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"round_num,loss\n0,a\n", "row 1 is no row of numbers"),
        (b"round_num,loss\n0,1\n0,1\n", "row 2 .*its round is not after the one before it"),
        (b"round_num,loss\n0,1\nnan,1\n", "row 2"),
        (b"round_num,loss\ninf,1\n", "row 1"),
        (b"round_num,loss\n0,1,2\n", "row 1"),
        (b"loss\n1\n", "row 1"),
        (b"\xff\xfe\n0\n", "is damaged: "),
        (b'round_num,loss\n0,"1\n', "is damaged: "),
    ],
)
def test_a_damaged_table_is_told_by_its_row(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is damaged: .*") as error:
        read_metrics(path)
    assert error.match(f".*{message}")
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_what_was_saved_is_told(tmp_path):
    path = tmp_path / "metrics.csv"
    saved = b"round_num,loss\n0,0.5\n1,nan\n"
    path.write_bytes(saved.replace(b"nan", b"0.4"))
    with pytest.raises(ValueError, match="is not what was written up to round 1: the run mends it when it goes on"):
        read_metrics(path, saved=saved, last_round=1)
    path.write_bytes(b"round_num,loss,new\n0,0.5,\n1,nan,\n2,7,8\n")  # Since then a metric has become a column.
    assert len(read_metrics(path, saved=saved, last_round=1)) == 3
    assert len(read_metrics(path, saved=saved.replace(b"nan", b"8"), last_round=0)) == 3


def test_a_table_that_is_gone_is_not_begun_anew_in_its_middle(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.append(0, {"loss": 0.5})
    (tmp_path / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError):
        table.append(1, {"loss": 0.4})
