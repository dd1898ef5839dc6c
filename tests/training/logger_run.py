"""A run with all loggers, offline, in a process of its own, because their packages change global state.

    python -m tests.training.logger_run FOLDER

Both stages run. What asks for the network is written to `asked.txt` in the folder, and refused.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Any

from kd_pipeline.workflows._train import train
from tests.training import networks, tiny_run

LOGGERS = ("tensorboard", "wandb", "comet", "mlflow")
LOCAL = ("127.0.0.1", "::1", "localhost", None)


def refuse_network(record: Path) -> None:
    """Let sockets and name look-ups of this process reach this machine alone.

    A datagram socket may be connected: that sends nothing, and is how Comet finds the address of the machine.
    """
    record.touch()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def check(host: Any) -> None:
        if host not in LOCAL:
            with record.open("a") as file:
                file.write(f"{host}\n")
            raise ConnectionRefusedError("there is no network in this test")

    def checked_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM:
            check(address[0])
        connect(self, address)

    def checked_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return look_up(host, *args, **kwargs)

    socket.socket.connect = checked_connect  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = checked_look_up


def main(folder: Path) -> None:
    refuse_network(folder / "asked.txt")
    plain = {"factory": "tests.training.networks:plain"}
    secret = os.environ["TEST_SECRET"]
    kwargs = {"api_key": secret, "uri": f"https://{secret}@host"}
    student = {"factory": "tests.training.networks:with_key", "kwargs": kwargs}
    config = tiny_run.settings(
        folder,
        "all",
        stage="all",
        teacher={"model": plain, "backend": "pytorch"},
        student=student,
        train__loggers=["csv", *LOGGERS],
    )
    train(config, plugins=[networks.__name__])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
