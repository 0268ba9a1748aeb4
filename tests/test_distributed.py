"""Sharded operations against one device: processes of torch, devices and processes of jax, each a child of this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def children(script, environments, *words, seconds=300):
    """Run the script once an environment, all at once; what the first one printed. Those that hang are ended."""
    runs = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        outputs = [run.communicate(timeout=seconds)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert not any(run.returncode for run in runs), "\n".join(outputs)
    return outputs[0]


def torch_processes(n):
    port = free_port()
    return [
        {"RANK": str(i), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for i in range(n)
    ]


def jax_processes(n, devices=1):
    port = free_port()
    return [{"RANK": str(i), "PROCESSES": str(n), "PORT": port, "DEVICES": str(devices)} for i in range(n)]


def test_two_processes_of_torch():
    """Every operation, its derivatives, what is refused, and the loss of a process."""
    pytest.importorskip("torch")
    said = children("distributed_torch.py", torch_processes(2), "--lose")
    assert "process 0 of the 2 in the default group (gloo) waited" in said
    assert "all right" in said


def test_two_devices_of_jax():
    pytest.importorskip("jax")
    assert "all right" in children("distributed_jax.py", [{"DEVICES": "2"}])


@pytest.mark.slow
def test_two_processes_of_jax():
    pytest.importorskip("jax")
    said = children("distributed_jax.py", jax_processes(2), "--lose")
    assert "waited for process 1 up to 5 s in vain" in said
    assert "all right" in said


@pytest.mark.slow
def test_two_processes_of_two_devices_of_jax():
    pytest.importorskip("jax")
    assert "all right" in children("distributed_jax.py", jax_processes(2, devices=2))


@pytest.mark.slow
def test_a_process_of_torch_that_is_late():
    pytest.importorskip("torch")
    said = children("distributed_torch.py", torch_processes(2), "--lose", "--late")
    assert "waited for the others up to 5 s in vain (Operation timed out" in said


@pytest.mark.slow
def test_four_processes_by_torchrun():
    pytest.importorskip("torch")
    script = str(HERE / "distributed_torch.py")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", script],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("all right") == 4


def test_without_a_group():
    torch = pytest.importorskip("torch")
    import gradlab
    from gradlab import distributed

    x = torch.ones(2)
    with pytest.raises(gradlab.StrategyError, match="no process group; start by torchrun"):
        distributed.hvp(lambda x, a: (x**3).sum() * a.mean(), x, x, x)
    with pytest.raises(gradlab.BackendError, match=r"distributed.hvp: the arguments hold no jax or torch"):
        distributed.hvp(lambda x, a: x, 1, 2, 3)
