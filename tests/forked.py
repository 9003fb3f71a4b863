"""Runs of several processes on demand, from a process that has imported PyTorch once and then only forks.

Reads a line of JSON for each run: {"size", "arguments" of the command line, "said" and "errors", files for stdout and
stderr of all}. Answers with a line {"pids"} as soon as they run, with the variables that a launcher sets, and with a
line {"codes"} when all have ended: an exit code, or -9 for one that was killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import torch

from clone_fast import cli, folder  # noqa: F401  # folder: imported now, once for all


def child(rank: int, size: int, port: int, arguments: list[str], said: str, errors: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, path in ((1, said), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    cli.main(arguments, prog_name="clone-fast")


def run(size: int, arguments: list[str], said: str, errors: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            child(rank, size, port, arguments, said, errors)
        pids.append(pid)
    answer({"pids": pids})
    answer({"codes": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]})


def answer(content: Any) -> None:
    os.write(1, (json.dumps(content) + "\n").encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    while order := sys.stdin.readline():
        run(**json.loads(order))
