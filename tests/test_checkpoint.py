import json
import os
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from rlloop import checkpoint as checkpoint_module
from rlloop.checkpoint import newest_checkpoint, write_checkpoint
from rlloop.errors import CheckpointError, RankDied, TrainerError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 kB: what a full disk looks like, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saver(content: bytes) -> Callable[[Path], Awaitable[None]]:
    async def save(folder: Path) -> None:
        for name in ("adapter", "state/rank_0"):
            (folder / name).mkdir(parents=True)
            (folder / name / "weights").write_bytes(content)

    return save


async def write(root: Path, step: int, content: bytes | None = None, keep: int = 2) -> Path:
    content = f"weights {step}".encode() if content is None else content
    return await write_checkpoint(root, step, saver(content), {"low_water": step}, {"policy_version": step}, keep)


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root / "checkpoints"))


async def test_layout_and_manifest(tmp_path):
    folder = await write(tmp_path, 17)
    assert folder == tmp_path / "checkpoints/step_000017"
    assert os.readlink(tmp_path / "latest") == "checkpoints/step_000017"
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    sums = await anyio.run_process(["sha256sum", *manifest["files"]], cwd=folder)
    expected = [[entry["sha256"], name] for name, entry in manifest["files"].items()]
    assert [line.split() for line in sums.stdout.decode().splitlines()] == expected
    assert (manifest["step"], manifest["policy_version"]) == (17, 17)
    assert manifest["versions"]["rlloop"]

    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.folder, checkpoint.ledger) == (17, folder, {"low_water": 17})
    assert (checkpoint.manifest, checkpoint.passed_over) == (manifest, ())


async def test_keeps_the_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        await write(tmp_path, step)
    assert names(tmp_path) == ["step_000010", "step_000015"]
    assert (tmp_path / "latest/adapter/weights").read_bytes() == b"weights 15"


async def test_a_sound_checkpoint_of_the_same_step_is_left_as_it_is(tmp_path):
    await write(tmp_path, 5)
    (tmp_path / "latest").unlink()
    await write(tmp_path, 5, b"other")
    assert (tmp_path / "latest/adapter/weights").read_bytes() == b"weights 5"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "torn manifest"])
async def test_falls_back_to_the_newest_that_is_sound_and_says_so(tmp_path, damage):
    await write(tmp_path, 5)
    broken = await write(tmp_path, 10)
    file = broken / ("manifest.json" if "manifest" in damage else "adapter/weights")
    if damage in ("missing", "no manifest"):
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(b"Weights 10")
    else:
        file.write_bytes(file.read_bytes()[:-3])

    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert len(checkpoint.passed_over) == 1
    assert "step_000010" in checkpoint.passed_over[0]
    assert ("manifest" if "manifest" in damage else "weights") in checkpoint.passed_over[0]

    await write(tmp_path, 7)  # the run that went on from step 5: the broken checkpoint must never win again
    assert names(tmp_path) == ["step_000005", "step_000007"]
    (broken / "adapter").mkdir(parents=True)
    await write(tmp_path, 10)
    assert newest_checkpoint(tmp_path).step == 10  # type: ignore[union-attr]


async def test_only_broken_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    folder = await write(tmp_path, 5)
    (folder / "ledger.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound.*step_000005"):
        newest_checkpoint(tmp_path)


@pytest.mark.usefixtures("small_files")
async def test_full_disk(tmp_path):
    await write(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step 10 could not be written to .*File too large.*disk space"):
        await write(tmp_path, 10, b"x" * 200_000)
    assert names(tmp_path) == ["step_000005"]
    assert (tmp_path / "latest/adapter/weights").read_bytes() == b"weights 5"


@pytest.mark.usefixtures("small_files")
async def test_full_disk_while_the_ledger_is_written(tmp_path):
    await write(tmp_path, 5)
    with pytest.raises(CheckpointError, match="File too large"):
        await write_checkpoint(tmp_path, 10, saver(b"small"), {"done": list(range(50_000))}, {})
    assert names(tmp_path) == ["step_000005"]


async def test_a_rank_that_dies_in_a_save_is_the_error(tmp_path):
    async def die(folder: Path) -> None:
        raise RankDied("trainer rank 0 was killed")

    await write(tmp_path, 5)
    with pytest.raises(RankDied, match="trainer rank 0 was killed"):
        await write_checkpoint(tmp_path, 10, die, {}, {})
    assert names(tmp_path) == ["step_000005"]


async def test_failing_save(tmp_path):
    async def fail(folder: Path) -> None:
        (folder / "adapter").mkdir()
        raise TrainerError("rank 0 has died")

    await write(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"step 10 .*rank 0 has died") as caught:
        await write_checkpoint(tmp_path, 10, fail, {}, {})
    assert isinstance(caught.value.__cause__, TrainerError)
    assert names(tmp_path) == ["step_000005"]


async def test_what_is_cancelled_while_it_saves_saves_to_its_end(tmp_path):
    async def save(folder: Path) -> None:
        scope.cancel()
        await anyio.sleep(0.001)
        await saver(b"weights")(folder)

    with anyio.CancelScope() as scope:
        await write_checkpoint(tmp_path, 10, save, {}, {})
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert names(tmp_path) == ["step_000010"]
    assert newest_checkpoint(tmp_path) is not None


KILLED = """
import asyncio, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from test_checkpoint import write

root, pending = Path(sys.argv[1]), None

def on_event(event, arguments):
    # Any change of the file system below root: the process ends before the pending-th one.
    global pending
    changes = event in ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir")
    changes = changes or event == "open" and arguments[1] is not None and set(arguments[1]) & set("wax+")
    if pending is not None and changes and (event in ("os.rmdir", "os.remove") or str(root) in str(arguments[0])):
        pending -= 1
        if pending == 0:
            os._exit(9)

sys.addaudithook(on_event)
for number in range(1, 1000):
    case = root / str(number)
    if (child := os.fork()) == 0:
        asyncio.run(write(case, 1))
        asyncio.run(write(case, 2))
        pending = number
        asyncio.run(write(case, 3))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(number)
"""


def test_killed_before_any_change_of_the_file_system(tmp_path):
    """A resume always finds a whole checkpoint, and can write the next one."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    number_of_kills = int(run.stdout) - 1
    assert number_of_kills > 10
    found = []
    for number in range(1, number_of_kills + 1):
        root = tmp_path / str(number)
        checkpoint = newest_checkpoint(root)
        assert checkpoint is not None
        assert checkpoint.passed_over == ()
        weights = f"weights {checkpoint.step}".encode()
        assert (checkpoint.folder / "state/rank_0/weights").read_bytes() == weights
        assert checkpoint.ledger == {"low_water": checkpoint.step}
        latest = (root / "latest/adapter/weights").read_bytes()
        assert latest in (weights, f"weights {checkpoint.step - 1}".encode())  # killed before `latest` was moved
        found.append(checkpoint.step)
    assert found == sorted(found)
    assert set(found) == {2, 3}
    for root in (tmp_path / "1", tmp_path / str(number_of_kills // 2), tmp_path / str(number_of_kills)):
        anyio.run(write, root, 3)
        assert names(root) == ["step_000002", "step_000003"]
        assert sorted(os.listdir(root)) == ["checkpoints", "latest"]
        assert (root / "latest/adapter/weights").read_bytes() == b"weights 3"


async def test_what_the_disk_gives_back_differently_is_no_checkpoint(tmp_path, monkeypatch):
    await write(tmp_path, 5)
    sync = checkpoint_module._sync

    def rot(path: Path) -> None:
        sync(path)
        if path.name == "checkpoints":  # just renamed
            (path / "step_000010" / "adapter" / "weights").write_bytes(b"Weights 10")

    monkeypatch.setattr(checkpoint_module, "_sync", rot)
    with pytest.raises(CheckpointError, match=r"step 10 .*reads back differently: adapter/weights is not what"):
        await write(tmp_path, 10)
    assert names(tmp_path) == ["step_000005"]
    assert os.readlink(tmp_path / "latest") == "checkpoints/step_000005"


async def test_a_checkpoint_of_another_format_is_passed_over(tmp_path):
    await write(tmp_path, 5)
    path = await write(tmp_path, 10) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, len(checkpoint.passed_over)) == (5, 1)
    assert "is not of format 1" in checkpoint.passed_over[0]
