"""python forked.py N ARGUMENTS: N processes of one run of the command line, as a launcher would start them.

PyTorch is imported once, and then forked, so that a run of several processes takes as long as one. Each says its rank and
process number on stdout before it starts; in the end a line of JSON has their exit codes, -9 for one that was killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import torch

from clone_fast import cli, folder  # noqa: F401  # folder: imported now, once for all


def main(size: int, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            os.write(1, f"{rank} {os.getpid()}\n".encode())
            cli.main(arguments, prog_name="clone-fast")
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.write(1, (json.dumps(codes) + "\n").encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2:])
