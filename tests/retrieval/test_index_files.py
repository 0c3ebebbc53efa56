"""Files of an index: what comes back, what is refused, and what a killed save leaves."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from velm_kernels import ImageTextIndex
from velm_kernels.retrieval import files

from . import saving

safetensors = pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:velm_kernels. topk_similarity runs on plain torch")

METADATA = [{"caption": "ä" * (row % 5), "row": row} if row % 3 else None for row in range(60)]


def filled(dtype: torch.dtype = torch.float32, metric: str = "dot") -> ImageTextIndex:
    """With removed rows, an updated one, and ids in no order."""
    torch.manual_seed(0)
    index = ImageTextIndex(5, metric=metric, dtype=dtype)
    index.add(torch.randn(60, 5), torch.randperm(60) * 3, METADATA)
    index.remove([0, 30, 177])
    index.update([3], torch.ones(1, 5), ["updated"])
    return index


def same(a: ImageTextIndex, b: ImageTextIndex) -> None:
    assert torch.equal(a.ids, b.ids) and len(a) == len(b)
    assert (a.dim, a.metric, a.dtype, a.device) == (b.dim, b.metric, b.dtype, b.device)
    assert torch.equal(a.features(a.ids), b.features(b.ids)) and a.features(a.ids).dtype == b.dtype
    assert a.metadata(a.ids) == b.metadata(b.ids)
    queries = torch.randn(3, a.dim)
    assert all(torch.equal(*both) for both in zip(a.search(queries, 70), b.search(queries, 70)))
    wanted = {"row": [1, 2, 3]}
    assert torch.equal(a.search(queries, 4, where=wanted).ids, b.search(queries, 4, where=wanted).ids)


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_comes_back(tmp_path: Path, dtype: torch.dtype, memory_map: bool) -> None:
    index, path = filled(dtype, "l2"), tmp_path / "pictures.index"
    index.save(path)
    loaded = ImageTextIndex.load(path, memory_map=memory_map)
    same(index, loaded)
    for one in (index, loaded):
        assert one.add(torch.zeros(2, 5), metadata=["new", None]).tolist() == [178, 179]
        one.remove([6, 178])
        one.update([9], torch.zeros(1, 5))
    same(index, loaded)
    loaded.refresh(lambda ids, _: torch.ones(len(ids), 5) * ids[:, None])
    index.refresh(lambda ids, _: torch.ones(len(ids), 5) * ids[:, None])
    same(index, loaded)
    # On the file that is mapped.
    loaded.save(path)
    same(index, ImageTextIndex.load(str(path), memory_map, metric="l2"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["pictures.index"]


def test_an_empty_index_comes_back(tmp_path: Path) -> None:
    index = ImageTextIndex(3)
    index.save(tmp_path / "none")
    loaded = ImageTextIndex.load(tmp_path / "none")
    assert len(loaded) == 0 and loaded.search(torch.ones(1, 3), 2).ids.tolist() == [[-1, -1]]
    assert loaded.add(torch.ones(1, 3)).tolist() == [0]
    index.add(torch.ones(1, 3))
    index.remove([0])
    index.save(tmp_path / "none")
    assert ImageTextIndex.load(tmp_path / "none").add(torch.ones(1, 3)).tolist() == [1]


def test_a_file_is_safetensors_of_what_is_there(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    index = filled(torch.bfloat16)
    index.save(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert torch.equal(found["ids"], index.ids) and torch.equal(found["features"], index.features(index.ids))
    ends = found["offsets"].tolist()
    texts = [bytes(found["metadata"][start:stop].tolist()) for start, stop in itertools.pairwise(ends)]
    assert [json.loads(text or b"null") for text in texts] == index.metadata(index.ids)


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    index = ImageTextIndex(256)
    index.add(torch.ones(40000, 256))
    index.save(tmp_path / "large")
    del index

    def in_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

    before = in_memory()
    loaded = ImageTextIndex.load(tmp_path / "large")
    loaded.add(torch.ones(10, 256))
    loaded.remove(range(30000))
    loaded.metadata([30000])
    # Of 40 MB; the ids are in order.
    assert in_memory() - before < 8000
    assert any("large" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    filled().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").is_file()
    same(filled(), ImageTextIndex.load(tmp_path / "link"))


def _cut(path: Path, told: dict[str, Any]) -> None:
    os.truncate(path, path.stat().st_size - 40)


def _empty(path: Path, told: dict[str, Any]) -> None:
    path.write_bytes(b"")


def _text(path: Path, told: dict[str, Any]) -> None:
    path.write_text("no index at all, but long enough for the size of a header")


def _flipped(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def flip(path: Path, told: dict[str, Any]) -> None:
        content = bytearray(path.read_bytes())
        content[8 + int.from_bytes(content[:8], "little") + told[name]["data_offsets"][0]] ^= 1
        path.write_bytes(content)

    return flip


def _other(
    facts: dict[str, str] | None = None, **tensors: torch.Tensor | None
) -> Callable[[Path, dict[str, Any]], None]:
    """The file written with other contents, and checksums that fit them."""

    def write(path: Path, told: dict[str, Any]) -> None:
        found = files.read(path, False)
        parts = {name: tensors.get(name, tensor) for name, tensor in found.tensors.items()}
        kept = [files.whole(name, tensor) for name, tensor in parts.items() if tensor is not None]
        files.write(path, {**found.facts, **(facts or {})}, kept)
        if facts and "version" in facts:
            path.write_bytes(path.read_bytes().replace(b'"version": "1"', b'"version": "9"'))

    return write


def _foreign(path: Path, told: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, path)


BROKEN = [
    (_cut, "broken or cut short"),
    (_empty, "broken or cut short"),
    (_text, "broken or cut short"),
    (_foreign, r"other safetensors \(None\)"),
    (_flipped("ids"), "ids are not what was written"),
    (_flipped("metadata"), "metadata are not what was written"),
    (_flipped("offsets"), "offsets are not what was written"),
    (_other({"version": "9"}), "expected version 1 of the format, given 9"),
    (_other({"metric": "angle"}), "expected one of the metrics dot, cosine, l2, given 'angle'"),
    (_other({"next_id": "5"}), "the id that comes next"),
    (_other(features=None), "given none of features"),
    (_other(features=torch.ones(57, 5, dtype=torch.int64)), "expected the index of features"),
    (_other(features=torch.ones(56, 5)), r"an id for each of 56 rows, given \(57,\)"),
    (_other(ids=torch.arange(57) // 2), "ids: expected different ids, given 0, 1"),
    (_other(ids=torch.arange(57) - 1), "ids: expected integers from 0 on, given -1"),
    (_other(offsets=torch.zeros(58, dtype=torch.int64)), "given other offsets"),
    (_other(offsets=torch.zeros(3, dtype=torch.int64)), "metadata for each of 57 rows"),
]


@pytest.mark.parametrize(("damage", "told"), BROKEN, ids=[one[1][:30] for one in BROKEN])
def test_broken_files_are_refused(tmp_path: Path, damage: Callable[[Path, dict[str, Any]], None], told: str) -> None:
    path = tmp_path / "file"
    filled().save(path)
    content = path.read_bytes()
    damage(path, json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    for memory_map in (True, False):
        with pytest.raises(ValueError, match=told) as raised:
            ImageTextIndex.load(path, memory_map)
        assert str(path) in str(raised.value)


def test_changed_features_are_noticed_where_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    filled().save(path)
    content = path.read_bytes()
    _flipped("features")(path, json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    with pytest.raises(ValueError, match="features are not what was written"):
        ImageTextIndex.load(path, memory_map=False)


def test_other_arguments_of_load(tmp_path: Path) -> None:
    filled().save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"metric: expected 'dot' like .*file, given 'cosine'"):
        ImageTextIndex.load(tmp_path / "file", metric="cosine")
    with pytest.raises(FileNotFoundError, match="there is none at"):
        ImageTextIndex.load(tmp_path / "other")
    with pytest.raises(IsADirectoryError, match="path: expected that of a file"):
        filled().save(tmp_path)
    with pytest.raises(FileNotFoundError):
        filled().save(tmp_path / "nowhere" / "file")


def test_a_save_that_fails_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    filled().save(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        saving.MADE[1].save(path)
    same(filled(), ImageTextIndex.load(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without power only what was brought to the disk is there: the file, and then its name."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(at: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{at}") else f"{os.fstat(at).st_size} bytes")
        fsync(at)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    filled().save(tmp_path / "file")
    assert done == [f"{(tmp_path / 'file').stat().st_size} bytes", "renamed", "folder"]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Forked from a process that has imported what they need, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.retrieval.saving"])
    return context


def test_killed_at_any_moment(tmp_path: Path, processes: Any) -> None:
    """50 times, while the file that was there first is mapped."""
    path = tmp_path / "file"
    saving.MADE[0].save(path)
    reader = ImageTextIndex.load(path)
    draw = random.Random(0)
    found, left_over = [], 0
    for _ in range(50):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=saving.save_on_and_on, args=(str(path), theirs))
        process.start()
        time.sleep(draw.uniform(0, 3 * ours.recv()))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found.append(saving.version_of(ImageTextIndex.load(path, memory_map=draw.random() < 0.5)))
        left_over += any(entry.name.endswith(files.ASIDE) for entry in tmp_path.iterdir())
    assert set(found) == {1, 2}
    # Most were killed while they were writing.
    assert left_over > 10
    assert saving.version_of(reader) == 0
    saving.MADE[1].save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_killed_at_every_step(tmp_path: Path, processes: Any) -> None:
    path, found = tmp_path / "file", []
    for step in range(1, 30):
        saving.MADE[1].save(path)
        process = processes.Process(target=saving.save_and_stop, args=(str(path), step))
        process.start()
        process.join()
        found.append(saving.version_of(ImageTextIndex.load(path)))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # The old one up to the renaming, then the new one: before its name is on the disk, and at the end.
    assert len(found) > 8
    assert found == [1] * (len(found) - 3) + [2, 2, 2]


def test_saves_at_the_same_time(tmp_path: Path) -> None:
    """None takes another one's file for left over."""
    path, wrong = tmp_path / "file", []

    def save(version: int) -> None:
        index = saving.MADE[version]
        try:
            for _ in range(5):
                index.save(path)
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=save, args=(version,)) for version in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert saving.version_of(ImageTextIndex.load(path)) in (0, 1, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_is_added_while_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, write = saving.made(1), files.write

    def slow(*args: Any) -> None:
        index.add(torch.ones(5, 32))
        index.remove([1, 3])
        write(*args)

    monkeypatch.setattr(files, "write", slow)
    index.save(tmp_path / "file")
    assert saving.version_of(ImageTextIndex.load(tmp_path / "file")) == 1
