"""Checkpoints: whole or not at all, whatever happens to the writer, and nothing foreign is taken for one."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from ghostnet import checkpoint
from ghostnet.errors import UserError

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.full((2,), 0.1, dtype=torch.bfloat16)}}, "param_groups": []},
    "step": 7,
    "best": {"eval/top1": 71.25, "best": True},
    "ema": None,
    "classes": ["a", "b"],
}
PREAMBLE = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from ghostnet import checkpoint
from ghostnet.errors import UserError

def state(step):
    return {"step": step, "weights": torch.full((200_000,), float(step))}
"""


def in_a_process(script, *words):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, words)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    checkpoint.save(STATE, tmp_path / "last.pt")
    loaded = checkpoint.load(tmp_path / "last.pt")
    torch.testing.assert_close(loaded.pop("optimizer"), STATE["optimizer"], rtol=0, atol=0)
    torch.testing.assert_close(loaded.pop("model"), STATE["model"], rtol=0, atol=0)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert loaded.pop("sealed")
    assert loaded == {key: value for key, value in STATE.items() if key not in ("model", "optimizer")}
    assert names(tmp_path) == ["last.pt"]


def test_what_is_saved_is_the_moment_of_saving(tmp_path):
    weight = torch.zeros(3)
    checkpoint.save({"weight": weight}, tmp_path / "last.pt")
    weight.fill_(1)
    assert torch.equal(checkpoint.load(tmp_path / "last.pt")["weight"], torch.zeros(3))


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint_no_older_than_the_last_finished_save(tmp_path):
    lines = in_a_process(
        """
        import random
        path = Path(sys.argv[1]) / "last.pt"
        draw, step, most = random.Random(0), 0, 0
        for round in range(25):
            read_end, write_end = os.pipe()
            child = os.fork()
            if not child:
                os.close(read_end)
                while True:
                    step += 1
                    checkpoint.save(state(step), path)
                    os.write(write_end, b"%d\\n" % step)
            os.close(write_end)
            with os.fdopen(read_end, "rb") as pipe:
                first = pipe.readline()
                time.sleep(draw.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                finished = int((first + pipe.read()).split()[-1])
            saved = checkpoint.load(path)
            assert saved["step"] in (finished, finished + 1), (saved["step"], finished)
            assert (saved["weights"] == saved["step"]).all()
            step = saved["step"]
            most = max(most, len(list(path.parent.glob(".*.tmp"))))
        checkpoint.save(state(step + 1), path)
        print(most, step)
        """,
        tmp_path,
    )
    most, step = map(int, lines[-1].split())
    assert most <= 1  # the one cut off last: the next save clears it away
    assert step > 25
    assert names(tmp_path) == ["last.pt"]


def test_leftovers_of_killed_writers_are_cleared_away_and_nothing_else(tmp_path):
    for name in (".last.pt.123.tmp", ".last.pt.99999.tmp", ".best.pt.123.tmp", "last.pt.tmp", ".last.pt", "x.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    checkpoint.save(STATE, tmp_path / "last.pt")
    assert names(tmp_path) == [".best.pt.123.tmp", ".last.pt", "last.pt", "last.pt.tmp", "x.tmp"]


def test_a_full_disk_ends_in_one_message_and_keeps_the_old_checkpoint(tmp_path):
    checkpoint.save(STATE, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    lines = in_a_process(
        """
        for limit in (0, 1, 4096, 100_000, 799_999):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                checkpoint.save(state(1), Path(sys.argv[1]) / "last.pt")
            except UserError as error:
                print(error)
        """,
        tmp_path,
    )
    start, kept = (
        f"{tmp_path}/last.pt can't be written: File too large: it takes ",
        "The last.pt of before is kept, and whole.",
    )
    assert [line.startswith(start) and kept in line for line in lines] == 5 * [True]
    assert (tmp_path / "last.pt").read_bytes() == before
    assert names(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/last.pt", "Not a directory"),
        ("missing/last.pt", "No such file or directory"),
        ("folder", "Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_ends_in_one_message(tmp_path, place, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/{place} can't be written: {reason}"):
        checkpoint.save(STATE, tmp_path / place)
    assert names(tmp_path) == ["file", "folder"]


def test_a_ctrl_c_while_writing_leaves_the_old_checkpoint_and_no_temporary(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    checkpoint.save(STATE, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr("ghostnet.checkpoint.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 8}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert names(tmp_path) == ["last.pt"]


def test_the_content_is_on_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("fsync", path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def note_replace(source, target):
        events.append(("rename", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoint.save(STATE, tmp_path / "last.pt")
    temporary = f".last.pt.{os.getpid()}.tmp"
    size = (tmp_path / "last.pt").stat().st_size
    assert events == [("fsync", temporary, size), ("rename", temporary, "last.pt"), ("fsync", tmp_path.name, None)]


class Evil:
    """Runs code when it is unpickled in the old way."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"state_dict": {"weight": torch.ones(2)}}, id="the reference's"),
        pytest.param({"weight": torch.ones(2)}, id="a state dict"),
        pytest.param([torch.ones(2)], id="a list"),
        pytest.param(torch.ones(2), id="a tensor"),
        pytest.param({"format": "another", "step": 1}, id="another format"),
    ],
)
def test_a_checkpoint_of_another_program_is_refused_with_the_way_out(tmp_path, content):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt is no checkpoint of this project.*model\.weights=PATH"):
        checkpoint.load(tmp_path / "foreign.pt")


def test_a_file_that_is_no_checkpoint_is_refused_and_nothing_in_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "step": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("step: 7")
    (tmp_path / "empty.pt").write_bytes(b"")
    checkpoint.save(STATE, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("evil.pt", "text.pt", "empty.pt", "torn.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_is_found_by_its_file_or_its_run_folder(tmp_path):
    checkpoint.save(STATE, tmp_path / "last.pt")
    checkpoint.save(STATE, tmp_path / "best.pt")
    assert checkpoint.find(tmp_path, checkpoint.LAST) == tmp_path / "last.pt"
    assert checkpoint.find(str(tmp_path), checkpoint.BEST) == tmp_path / "best.pt"
    assert checkpoint.find(tmp_path / "last.pt", checkpoint.BEST) == tmp_path / "last.pt"


def test_a_checkpoint_that_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(UserError, match=r"holds no last\.pt \(it holds no checkpoint\)"):
        checkpoint.find(tmp_path, checkpoint.LAST)
    checkpoint.save(STATE, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"holds no last\.pt \(it holds best\.pt\)"):
        checkpoint.find(tmp_path, checkpoint.LAST)
    with pytest.raises(UserError, match=r"elsewhere\.pt does not exist"):
        checkpoint.find(tmp_path / "elsewhere.pt", checkpoint.LAST)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 41), *range(len(whole) - 120, len(whole))]:
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"last\.pt"):
                checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["step"] == 7


def test_a_checkpoint_is_a_zip_archive_and_one_without_checksum_is_still_read(tmp_path):
    checkpoint.save(STATE, tmp_path / "last.pt")
    with zipfile.ZipFile(tmp_path / "last.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"ghostnet sha256 ")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 7
    torch.save({"format": checkpoint.FORMAT, **STATE}, tmp_path / "of version 0.3.pt")
    assert checkpoint.load(tmp_path / "of version 0.3.pt")["step"] == 7


def test_the_last_saves_are_kept_and_no_more(tmp_path):
    for step in range(1, 6):
        checkpoint.save(STATE | {"step": step}, tmp_path / "last.pt", keep=3)
    steps = {name: checkpoint.load(tmp_path / name)["step"] for name in names(tmp_path)}
    assert steps == {"last.pt": 5, "previous-1.pt": 4, "previous-2.pt": 3}
    checkpoint.save(STATE | {"step": 6}, tmp_path / "last.pt", keep=2)
    steps = {name: checkpoint.load(tmp_path / name)["step"] for name in names(tmp_path)}
    assert steps == {"last.pt": 6, "previous-1.pt": 5}


def test_where_there_are_no_hard_links_the_one_before_is_kept_by_its_name(tmp_path, monkeypatch):
    def refused(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    for step in (1, 2, 3):
        checkpoint.save(STATE | {"step": step}, tmp_path / "last.pt", keep=2)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous-1.pt")["step"] == 2


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_ones_named(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step, name in ((9, "last.pt"), (7, "previous-1.pt"), (5, "previous-2.pt"), (6, "best.pt")):
        checkpoint.save(STATE | {"step": step}, tmp_path / name)
    found = checkpoint.newest(tmp_path)
    assert (found.path.name, found.damaged) == ("last.pt", {})
    for name, expected in (("last.pt", "previous-1.pt"), ("previous-1.pt", "best.pt"), ("best.pt", "previous-2.pt")):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
        found = checkpoint.newest(tmp_path)
        assert found.path.name == expected
        assert found.state["step"] == {"previous-1.pt": 7, "best.pt": 6, "previous-2.pt": 5}[expected]
        assert tmp_path / name in found.damaged
    (tmp_path / "previous-2.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no whole checkpoint: .*last\.pt.*previous-2\.pt is empty"):
        checkpoint.newest(tmp_path)


def test_a_writer_that_keeps_some_leaves_whole_files_alone_wherever_it_is_killed(tmp_path):
    lines = in_a_process(
        """
        import random
        folder = Path(sys.argv[1])
        draw, step = random.Random(1), 0
        for round in range(25):
            read_end, write_end = os.pipe()
            child = os.fork()
            if not child:
                os.close(read_end)
                while True:
                    step += 1
                    checkpoint.save(state(step), folder / "last.pt", keep=3)
                    os.write(write_end, b"%d\\n" % step)
            os.close(write_end)
            with os.fdopen(read_end, "rb") as pipe:
                first = pipe.readline()
                time.sleep(draw.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                finished = int((first + pipe.read()).split()[-1])
            found = checkpoint.newest(folder)
            assert found.state["step"] in (finished, finished + 1) and not found.damaged
            before = [checkpoint.load(path)["step"] for path in checkpoint.previous(folder)]
            assert before == sorted(before, reverse=True) and len(before) <= 2, before
            step = found.state["step"]
        print(step)
        """,
        tmp_path,
    )
    assert int(lines[-1]) > 25
