"""The launcher with ranks that do not import torch: every way a rank can end, in fractions of a second each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from common.parallel.mesh import Layout, distributed
from common.run import children, launch
from common.run.children import free_port, shared_environment
from common.run.supervise import supervise
from common.system import environment
from common.system.environment import Process, this_process
from common.system.failure import Failure, describe, is_out_of_memory, verdict
from common.system.stopping import Stopped, stoppable
from tests.fake_fork.fork import FORK as FAKE
from tests.helpers.programs import main

ROOT = Path(__file__).resolve().parents[1]
RANK = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.run import channel as common_link
from common.system.environment import this_process
from common.run.channel import Channel, handed_down
at = this_process()
channel = Channel(at)
with open(sys.argv[1] + f"/{{at.rank}}", "w") as file:
    file.write(str(os.getpid()))
channel.at_stage("sampling step 3/8")
def fail(error):
    channel.failed("sampling step 3/8", error)
    os._exit(1)
def wait():
    time.sleep(60)
def after(rank):
    while not os.path.exists(sys.argv[1] + f"/{{rank}}"):
        time.sleep(.02)
    time.sleep(.3)
def fail_after_rank_1(error):
    after(1)
    fail(error)
"""
GONE = 'RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6276")'
LATE = 'RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation")'


def script(folder: Path, *bodies: str) -> list[str]:
    """A command whose rank i runs bodies[i], the last one for all others; all write their process ids first."""
    text = RANK + "\n".join(
        f"if at.rank == {rank}:\n    {body}\n    sys.exit()" for rank, body in enumerate(bodies[:-1])
    )
    (folder / "rank.py").write_text(f"{text}\n{bodies[-1]}\n")
    (folder / "pids").mkdir(exist_ok=True)
    return [sys.executable, str(folder / "rank.py"), str(folder / "pids")]


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(folder: Path) -> list[int]:
    """Processes among the written ids that still run; one that nobody waits for is dead all the same."""
    pids = [int(path.read_text() or 0) for path in (folder / "pids").iterdir()]
    running = []
    for pid in filter(None, pids):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
        except psutil.NoSuchProcess:
            pass
    return running


def test_ranks_get_torchruns_variables(tmp_path, capfd):
    body = (
        "names = ('MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS'); "
        "print(at.rank, at.world_size, at.local_rank, at.launcher, *(os.environ[name] for name in names), "
        "handed_down().decode(), flush=True)"
    )
    os.environ.pop("OMP_NUM_THREADS", None)
    assert supervise(script(tmp_path, body), 3, cpu=True, request=b"hello") == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    for rank, line in enumerate(lines):
        threads = max(1, environment.cores() // 3)
        port = line.split()[5]
        assert line == f"{rank} 3 {rank} supervise 127.0.0.1 {port} {threads} hello" and 1024 < int(port) < 65536


@pytest.mark.parametrize(
    ("bodies", "line"),
    [
        (
            ("wait()", 'fail(ValueError("tensor x\\nis missing"))'),
            "error: rank 1, sampling step 3/8: tensor x is missing",
        ),
        ((f"fail_after_rank_1({GONE})", 'fail(KeyError("x"))'), "error: rank 1, sampling step 3/8: KeyError: 'x'"),
        (
            (f"fail_after_rank_1({GONE})", "os.kill(os.getpid(), signal.SIGKILL)"),
            "error: rank 1, sampling step 3/8: killed by signal 9 (SIGKILL), "
            "which is also how the system ends a process when memory runs out",
        ),
        (
            (
                "wait()",
                'print("[W] noise", file=sys.stderr); print("it broke", file=sys.stderr, flush=True); os.abort()',
            ),
            "error: rank 1, sampling step 3/8: killed by signal 6 (SIGABRT); its last words: it broke",
        ),
        (("wait()", "os._exit(3)"), "error: rank 1, sampling step 3/8: ended with status 3"),
        (
            (f"fail_after_rank_1({LATE})", "os.kill(os.getpid(), signal.SIGSTOP)"),
            "error: rank 0, sampling step 3/8: another rank did not answer within --timeout; "
            "still silent: rank 1 (sampling step 3/8)",
        ),
        (
            (
                "wait()",
                'after(0); os.write(2, b"[E] Watchdog caught collective operation timeout: WorkNCCL"); os.abort()',
            ),
            "error: rank 1, sampling step 3/8: another rank did not answer within --timeout; "
            "still silent: rank 0 (sampling step 3/8)",
        ),
    ],
)
@pytest.mark.slow
def test_one_line_for_every_end(tmp_path, capfd, bodies, line):
    done = []
    status = supervise(script(tmp_path, *bodies), 2, cpu=True, leave=lambda all_done: done.append(1) or "")
    assert status == 1 and capfd.readouterr().err == line + "\n"
    assert done == [1] and alive(tmp_path) == []


def test_wrong_use_found_by_a_rank_keeps_its_status(tmp_path, capfd):
    body = 'channel.failed("opening", ValueError("no such kernel"), status=2); os._exit(2)'
    assert supervise(script(tmp_path, body), 2, cpu=True, leave=lambda done: "; kept x") == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "no such kernel; kept x" in told


@pytest.mark.slow
def test_what_a_rank_started_ends_with_it(tmp_path, capfd):
    child = 'p = subprocess.Popen(["sleep", "60"]); open(sys.argv[1] + "/child", "w").write(str(p.pid)); '
    assert supervise(script(tmp_path, child + "time.sleep(.5); fail(ValueError())", "wait()"), 2, cpu=True) == 1
    assert (tmp_path / "pids" / "child").exists() and eventually(lambda: alive(tmp_path) == [])


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert supervise(script(tmp_path, "pass"), 1, cpu=True) == 0
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.fixture
def parent(tmp_path):
    """A launcher in a process of its own whose two ranks wait."""
    command = script(tmp_path, "wait()")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.run.supervise import supervise; "
    code += f"sys.exit(supervise({command!r}, 2, cpu=True))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(alive(tmp_path)) == 2)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_all_ranks_quietly(parent, tmp_path, number, status):
    parent.send_signal(number)
    assert parent.wait(timeout=20) == status and parent.stderr.read() == ""
    assert alive(tmp_path) == []


def test_an_interrupted_run_says_what_it_has_kept(tmp_path, capfd):
    body = "time.sleep(.5); os.kill(os.getppid(), signal.SIGTERM); wait()"
    assert supervise(script(tmp_path, body), 1, cpu=True, leave=lambda done: "; x is kept") == 143
    assert capfd.readouterr().err == "interrupted; x is kept\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(tmp_path, capfd, number):
    """As under nohup, or after a script's `&`: in the parent, while it watches, and in its ranks."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        body = f"os.kill(os.getpid(), {number}); os.kill(os.getppid(), {number}); time.sleep(.3)"
        assert supervise(script(tmp_path, body), 2, cpu=True) == 0
        with stoppable():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("once", [False, True])
def test_a_signal_that_comes_in_a_finalizer_is_not_lost(capsys, once):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(Stopped), stoppable(once) as signals:
        Finalized()
        time.sleep(10)
    assert signals.number == signal.SIGHUP
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_ranks_start_where_standard_streams_are_closed(tmp_path, closed):
    command = script(tmp_path, "os.fstat(0); os.fstat(1); os.fstat(2); channel.stderr.write('told'); channel.leave(0)")
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from common.run.supervise import supervise; "
    code += f"os._exit(supervise({command!r}, 2, cpu=True, request=b'request'))"
    shell = f'exec {sys.executable} -c "$0" ' + " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(["sh", "-c", shell, code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stderr == "toldtold") is (2 not in closed)


def test_ranks_die_with_their_parent(parent, tmp_path):
    parent.kill()
    assert eventually(lambda: alive(tmp_path) == [])


def test_ranks_die_with_their_parent_where_the_kernel_sends_no_signal(tmp_path):
    """The second line of defence alone: the pipe that closes."""
    command = script(tmp_path, "wait()")
    (tmp_path / "rank.py").write_text(
        RANK.replace("at = ", "common_link._die_with_parent = lambda: None; at = ") + "wait()"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.run.supervise import supervise; "
    process = subprocess.Popen([sys.executable, "-c", code + f"supervise({command!r}, 2, cpu=True)"])
    assert eventually(lambda: len(alive(tmp_path)) == 2)
    process.kill()
    process.wait()
    assert eventually(lambda: alive(tmp_path) == [])


def test_ranks_of_torchrun_die_with_their_agent(tmp_path):
    code = f"import subprocess, os; subprocess.run({script(tmp_path, 'wait()')!r}, env=os.environ | {{'RANK': '0', "
    agent = subprocess.Popen([sys.executable, "-c", code + "'WORLD_SIZE': '2', 'LOCAL_RANK': '0'})"])
    assert eventually(lambda: len(alive(tmp_path)) == 1)
    agent.kill()
    agent.wait()
    assert eventually(lambda: alive(tmp_path) == [])


RANK_5_OF_8 = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Process()),
        (RANK_5_OF_8, Process(5, 8, 1, 4, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Process(1, 2, 0, 2, "torchrun")),
        ({"WORLD_SIZE": "4"}, Process()),
        # A scheduler's world of one is no launcher; torchrun's is.
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Process()),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, Process(launcher="torchrun")),
    ],
)
def test_places(environment, place):
    assert this_process(environment) == place


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("", "abc", "-1", "8", "1.5", "²", "9" * 30)),
        *(("WORLD_SIZE", value) for value in ("", "abc", "0", "-2", "inf")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("", "0", "9")),
        *(("LOCAL_RANK", value) for value in ("", "x", "4")),
    ],
)
def test_variables_that_name_no_rank(monkeypatch, capfd, name, value):
    for key, good in (RANK_5_OF_8 | {name: value}).items():
        monkeypatch.setenv(key, good)
    assert main(FAKE, ["--demo", "--device", "cpu"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: the environment has {name}={value[:40]!r}") and "unset RANK" in line


def test_a_mesh_stands_where_the_launcher_says(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed(Layout(), "cpu").world.size == 1


def test_ranks_do_not_look_for_the_store_of_a_torchrun_around_them(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    body = "print([name for name in os.environ if name.startswith('TORCHELASTIC')], flush=True)"
    assert supervise(script(tmp_path, body), 1, cpu=True) == 0
    assert capfd.readouterr().out == "[]\n"


def test_a_gpu_whose_driver_is_too_old_is_not_counted(monkeypatch):
    """The driver's own library counts it; CUDA, which warns, does not."""
    monkeypatch.setattr(environment, "driver_present", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert environment.visible_gpus() == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert environment.visible_gpus() == 2


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


OUT_OF_MEMORY = (
    "GET was unable to find an engine to execute this computation",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "CUDA error: out of memory",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4611686018427387904 bytes. Error code 12 (Cannot allocate memory)",
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a\n  b"), "a b"),
        (RuntimeError("shape mismatch"), "shape mismatch"),
        (FloatingPointError("NaN"), "NaN"),
        (AssertionError(), "AssertionError"),
        (KeyError("x"), "KeyError: 'x'"),
        (FileNotFoundError(2, "No such file or directory", "/a"), "/a: no such file or directory"),
        (OSError(28, "No space left on device", "/a"), "no space is left on the disk"),
        (MemoryError("no plan fits"), "out of memory: no plan fits"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of memory"),
        *((RuntimeError(words), "out of memory: ") for words in OUT_OF_MEMORY),
    ],
)
def test_descriptions_are_one_line(error, message):
    failure = describe(error, 2, "decoding")
    assert failure.message.startswith(message) and "\n" not in failure.message and not failure.secondary


def test_every_form_of_out_of_memory_is_recognised():
    class OutOfMemoryError(Exception):
        pass

    errors = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError("another build's")]
    assert all(map(is_out_of_memory, errors + [RuntimeError(words) for words in OUT_OF_MEMORY]))
    others = [RuntimeError("shape mismatch"), ValueError("out of memory is no value"), RuntimeError("NCCL timed out")]
    assert not any(map(is_out_of_memory, [*others, RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")]))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_cause_is_told_and_not_its_echoes():
    echo = Failure(0, "sampling", "lost the connection", when=1.0, secondary=True)
    cause = Failure(2, "sampling", "tensor x", when=2.0)
    later = Failure(1, "sampling", "tensor y", when=3.0, status=2)
    assert verdict([later, echo, cause], []) == (1, "rank 2, sampling: tensor x")
    assert verdict([echo], [(1, "loading")]) == (1, "rank 0, sampling: lost the connection")


def test_a_rank_that_outlives_sigkill_is_named_beside_the_cause(tmp_path, capfd, monkeypatch):
    """As one that waits inside a driver does; here it only seems to."""
    wait = subprocess.Popen.wait

    def late(process, timeout=None):
        if timeout is not None and process.args == command:
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    command = script(tmp_path, "fail(KeyError('x'))")
    monkeypatch.setattr(subprocess.Popen, "wait", late)
    assert supervise(command, 1, cpu=True, leave=lambda done: "; kept y") == 1
    told = capfd.readouterr().err
    assert told.startswith("error: rank 0, sampling step 3/8: KeyError: 'x'; rank 0 (process ")
    assert told.endswith("; kept y\n") and "was killed and has not ended" in told
    assert eventually(lambda: alive(tmp_path) == [])


def test_ranks_start_without_a_folder_for_temporary_files(tmp_path, capfd, monkeypatch):
    def none(*arguments, **options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(children.tempfile, "TemporaryFile", none)
    body = "print(handed_down().decode(), flush=True); print('broken', file=sys.stderr); os._exit(3)"
    assert supervise(script(tmp_path, body), 1, cpu=True, request=b"hello") == 1
    told = capfd.readouterr()
    assert told.out == "hello\n" and "its last words: broken" in told.err


def test_cuda_ranks_get_an_allocator_setting_unless_the_user_has_one(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert shared_environment(2, cpu=False)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in shared_environment(2, cpu=True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_ALLOC_CONF" not in shared_environment(2, cpu=False)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in shared_environment(2, cpu=False)


@pytest.mark.parametrize("module", ["mochi_xdit", "cogvideox_xdit", "consisid_xdit"])
def test_an_interrupt_while_importing_is_quiet(tmp_path, module):
    """The first import after the program began is one that waits to be interrupted."""
    (tmp_path / "click.py").write_text("import os, time\nos.write(1, b'importing')\ntime.sleep(60)\n")
    for command in (["-m", module], [str(ROOT / module / "cli.py")]):
        settings = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        process = subprocess.Popen(
            [sys.executable, *command], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout.read(9) == b"importing"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (130, b"")


def test_an_error_that_a_library_made_of_a_signal_is_no_error(tmp_path, capfd, monkeypatch):
    def swallow(request, mesh, report):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            raise ImportError("could not import module") from None

    monkeypatch.chdir(tmp_path)
    assert launch.run(FAKE, swallow, ["--demo", "--device", "cpu", "--gpus", "1"]) == 143
    assert "error" not in capfd.readouterr().err
