"""The one server that the tests' processes are forked from: it has imported everything, and has no threads that a fork breaks."""

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
_MODULES: list[str] = []


def preload(*modules: str) -> None:
    """Has the server import modules; to be called while tests are collected, since it starts with the first process."""
    _MODULES.extend(modules)
    FORKSERVER.set_forkserver_preload(_MODULES)
