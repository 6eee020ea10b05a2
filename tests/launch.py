"""Processes of one launch, with the environment that `torchrun` gives them, but forked: what is
imported stays imported."""

import multiprocessing
import os
import socket

import torch

FORK = multiprocessing.get_context("fork")


def launch(work, of=2):
    "Started processes, each of which calls `work(rank)`; an exception in it shows as exit code 1."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def run(rank):
        said = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=of, MASTER_PORT=port)
        os.environ.update({k: str(v) for k, v in said.items()}, MASTER_ADDR="127.0.0.1")
        # torch makes its pool of threads anew after a fork, and threads that ask for it at once,
        # as those that load a model do, may find none
        torch.set_num_threads(1)
        work(rank)

    children = [FORK.Process(target=run, args=(rank,)) for rank in range(of)]
    for child in children:
        child.start()
    return children


def ended(children):
    "Their exit codes."
    for child in children:
        child.join(300)
    return [child.exitcode for child in children]
