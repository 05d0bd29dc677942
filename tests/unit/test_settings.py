"""Settings from the environment and the command line."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from errors import OptionError
from settings import Settings, add_arguments, setting_docs, with_dashes


def parse(*argv: str) -> Settings:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_arguments(parser)
    return Settings().with_arguments(parser.parse_args(with_dashes(argv)))


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_setting_has_a_doc_an_option_and_a_variable(field: object) -> None:
    name = field.name  # type: ignore[attr-defined]
    assert setting_docs()[name].endswith((".", ")"))
    default = getattr(Settings(), name)
    if isinstance(default, bool):
        argv, text, value = [f"--no-{name}" if default else f"--{name}"], "no" if default else "yes", not default
    elif name in ("engine", "log_level"):
        value = {"engine": "reference", "log_level": "debug"}[name]
        argv, text = [f"--{name}", value], value
    elif name.startswith("ssl_"):
        return
    else:
        text = "7" if isinstance(default, int | float) else "/x"
        value = type(default)(text) if default is not None else Path(text)
        argv = [f"--{name}", text]
    assert getattr(parse(*argv), name) == value
    assert getattr(parse(argv[0].replace("_", "-"), *argv[1:]), name) == value
    assert getattr(Settings.from_env({f"SOTTO_{name.upper()}": text}), name) == value


def test_the_last_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HF_TOKEN": "hub", "HF_ENDPOINT": "https://mirror", "HF_HUB_OFFLINE": "1"}
    settings = Settings.from_env(environ)
    assert (settings.hf_token, settings.hub_mirror, settings.offline) == ("hub", "https://mirror", True)
    settings = Settings.from_env({**environ, "SOTTO_HF_TOKEN": "ours", "SOTTO_OFFLINE": "no", "SOTTO_SERVER_PORT": "1"})
    assert (settings.hf_token, settings.offline, settings.server_port) == ("ours", False, 1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    changed = settings.with_arguments(parser.parse_args(["--server-port", "2"]))
    assert (changed.server_port, changed.hf_token) == (2, "ours")


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Settings(hf_token="secret"))


def test_paths_know_the_home_folder() -> None:
    assert Settings(work_dir=Path("~/x")).work_dir == Path.home() / "x"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"server_port": 70000}, "--server-port is 70000"),
        ({"batch_size": -1}, "--batch-size"),
        ({"max_upload_mb": 0}, "--max-upload-mb"),
        ({"max_duration_h": 0.0}, "--max-duration-h"),
        ({"engine": "warp"}, "choose one of auto, fast, reference"),
        ({"log_level": "loud"}, "debug, info"),
        ({"ssl_certfile": Path("a")}, "both --ssl-certfile and --ssl-keyfile"),
    ],
)
def test_values_outside_their_range_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        Settings(**values)


@pytest.mark.parametrize(
    ("variable", "text", "kind"),
    [
        ("SOTTO_SERVER_PORT", "x", "a whole number"),
        ("SOTTO_OFFLINE", "perhaps", "yes or no"),
        ("SOTTO_MAX_DURATION_H", "x", "a number"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, kind: str) -> None:
    with pytest.raises(OptionError, match=f"{variable} is '{text}'; it must be {kind}"):
        Settings.from_env({variable: text})


def test_underscores_are_only_changed_in_option_names() -> None:
    assert with_dashes(["--a_b=c_d", "e_f", "--", "--g_h"]) == ["--a-b=c_d", "e_f", "--", "--g_h"]
