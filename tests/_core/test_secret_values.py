"""Secrets are hidden by the names of their keys, in settings, arguments and URLs, and hidden values are not used."""

import pytest

from kd_pipeline._core.secret_values import (
    hide_in_arguments,
    hide_in_settings,
    hide_in_text,
    is_secret,
    refuse_hidden,
)
from kd_pipeline.errors import ConfigError

SECRET = (
    *("password", "DB_PASSWORD", "dbpassword", "passwd", "secret", "client_secret", "token", "hf_token", "accessToken"),
    *("api_key", "apikey", "apiKey", "API-KEY", "logger.kwargs.api_key", "aws_access_key_id", "private_key"),
    *("auth", "http_auth", "authorization", "credentials", "--token", "pwd", "password2", "X-Amz-Signature", "sig"),
)
NOT_SECRET = (
    *("author", "key", "keys", "checkpoint_key", "num_classes", "reg_tokens", "tokenizer", "monkey", "passes"),
    *("hw_decoder_load", "train.optimizer.lr", "authored", "sigma", "design", "signal"),
)


@pytest.mark.parametrize("name", SECRET)
def test_secret_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", NOT_SECRET)
def test_name_of_no_secret(name: str) -> None:
    assert not is_secret(name)


def test_values_are_hidden_at_any_depth() -> None:
    settings = {
        "student": {"kwargs": {"width": 8, "api_key": "abc", "auth": {"user": "me", "retry": True, "list": ["x", 5]}}},
        "losses": [{"kwargs": {"password": 1234, "pin": 1234}}],
        "class_token": False,
        "num_token": 4,
        "token": "",
        "uri": "postgres://me:abc@host/db",
        "none": None,
    }
    assert hide_in_settings(settings) == {
        "student": {
            "kwargs": {"width": 8, "api_key": "***", "auth": {"user": "***", "retry": True, "list": ["***", "***"]}}
        },
        "losses": [{"kwargs": {"password": "***", "pin": 1234}}],
        "class_token": False,
        "num_token": 4,
        "token": "",
        "uri": "postgres://***@host/db",
        "none": None,
    }


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["student.kwargs.api_key=abc", "seed=1"], ["student.kwargs.api_key=***", "seed=1"]),
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--token=abc"], ["--token=***"]),
        (["--token", "--fresh"], ["--token", "--fresh"]),
        (["--set", "a.password=b=c"], ["--set", "a.password=***"]),
        (["student.kwargs={width: 4, 'api_key': abc}"], ["student.kwargs=***"]),
        (['{"password": "abc"}'], ["***"]),
        (["student.kwargs={width: 4}"], ["student.kwargs={width: 4}"]),
        (["uri=https://me:abc@host/x?a=1&token=abc"], ["uri=https://***@host/x?a=1&token=***"]),
        (["https://abc@host"], ["https://***@host"]),
        (["-c", "a@b.yaml"], ["-c", "a@b.yaml"]),
    ],
)
def test_arguments(typed: list[str], shown: list[str]) -> None:
    assert hide_in_arguments(typed) == shown


def test_text_keeps_all_but_users_and_secrets_of_urls() -> None:
    text = "cannot reach https://me:a@c@host:80/p?api_key=abc&n=1; see https://host/x, mail me@host"
    assert hide_in_text(text) == "cannot reach https://***@host:80/p?api_key=***&n=1; see https://host/x, mail me@host"


def test_hidden_values_are_refused_by_their_keys() -> None:
    refuse_hidden({"a": "**", "b": [1, None, "x://h"]}, "file")
    settings = {"a": {"token": "***"}, "b": ["x", "x://***@h", "x://h?token=***"]}
    with pytest.raises(ConfigError, match=r"^run/config.yaml: a.token, b.1, b.2: the value is \*\*\*, .* put the "):
        refuse_hidden(settings, "run/config.yaml")
