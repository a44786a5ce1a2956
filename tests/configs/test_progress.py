from configs.progress import format_duration, progress


def test_durations_are_written_for_people():
    written = [format_duration(seconds) for seconds in (0.4, 59, 61, 3599, 3660, 90_000)]
    assert written == ["0 s", "59 s", "1 min 01 s", "59 min 59 s", "1 h 01 min", "25 h 00 min"]


def test_a_log_file_gets_plain_lines_without_control_characters(capsys):
    with progress("scan", total=3, unit="shards") as bar:
        for _ in range(3):
            bar.advance(1, samples=100)
    line = capsys.readouterr().err
    assert line.startswith("scan: 3/3 shards, 300 samples, ")
    assert line.count("\n") == 1
    assert all(character == "\n" or character >= " " for character in line)
