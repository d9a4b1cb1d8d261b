"""Paths, addresses of files and names of files mean the same on every platform."""

from pathlib import Path

import numpy as np
import pytest

from stabnorm.dashboard.images import log_image
from stabnorm.monitor.record import Block, FileRecord, read_record

REMOTE = ["s3://bucket/runs", "memory://runs", "gs://bucket"]


def test_the_address_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    record = FileRecord(folder.as_uri())
    record.write_block(Block(0, ("norm",), {"amax": np.ones((2, 1), np.float32)}))
    record.close()
    assert read_record(folder).steps.tolist() == read_record(folder.as_uri()).steps.tolist() == [0, 1]


@pytest.mark.parametrize("address", REMOTE)
def test_an_address_on_another_machine_is_refused_and_no_folder_is_made(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (FileRecord, read_record):
        with pytest.raises(ValueError, match="is not a folder of this machine"):
            use(address)
    assert not list(tmp_path.iterdir())


def test_a_statistic_with_any_name_gives_a_picture_that_windows_can_store(tmp_path: Path) -> None:
    log_image(None, 'stability/a:b*c?"<d>|e', np.zeros((2, 2, 3), np.uint8), 7, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stability_a_b_c___d__e_00000007.png"]
