"""An S3 server of moto in threads of this process, and what makes s3fs use it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

from kd_pipeline.storage import connections

__all__ = ["S3Server", "fresh_connections", "serve_s3"]

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHAREDCREDENTIALS_FILE": os.devnull,
}


class S3Server:
    """What tests see of the server: a bucket named `bucket`, to which other clients than the tested one write."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = boto3.client("s3", endpoint_url=url)
        self.client.create_bucket(Bucket="bucket")

    def put(self, key: str, content: bytes) -> str:
        """Write an object; returns its URL."""
        self.client.put_object(Bucket="bucket", Key=key, Body=content)
        return f"s3://bucket/{key}"


@contextmanager
def fresh_connections(endpoint: str) -> Iterator[None]:
    """Have s3:// at another server than the process may have connected to."""
    used = connections._Connections()
    environment = mock.patch.dict(os.environ, CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint})
    with environment, mock.patch.object(connections, "_connections", used):
        try:
            yield
        finally:
            used.close()


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Serve S3 on a free port of this machine; while it runs, s3:// and boto3 use it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        with fresh_connections(url):
            yield S3Server(url)
    finally:
        server.stop()
