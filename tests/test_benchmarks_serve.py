from __future__ import annotations

import json

import bundles
import pytest
from click.testing import CliRunner

from benchmarks import serve
from benchmarks.cli import main
from sdk import BackendError

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")

ENGINE = ["--model", str(bundles.shared("blur")), "--backend", "onnxruntime", "--device", "cpu"]
SMALL = ["--photographs", "3", "--clients", "2", "--rounds", "1"]


def run(*arguments: str, expect: int = 0):
    result = CliRunner().invoke(main, ["serve", *ENGINE, *SMALL, *arguments])
    assert result.exit_code == expect, result.output
    return result


def test_the_server_is_held_against_files(tmp_path):
    out = tmp_path / "serve.json"
    run("--json", str(out))
    result = json.loads(out.read_text())
    assert result["kind"] == "serve"
    assert [row["unit"] for row in result["rows"]] == ["x", "x", "ms", "pictures"]
    beside, _, latency, wrong = result["rows"]
    assert beside["target"] == pytest.approx(1 / 0.9)
    assert beside["value"] == pytest.approx(beside["details"]["served_s"] / beside["details"]["files_s"], rel=0.01)
    assert latency["value"] > 0
    assert (wrong["value"], wrong["met"], wrong["details"]["answers"]) == (0, True, 3)


def test_wrong_pixels_are_counted(tmp_path, monkeypatch):
    ask = serve._ask

    def spoil(connection, body):
        answer = ask(connection, body)
        return serve.Answer(answer.status, answer.body + b"!", answer.seconds, answer.refusals)

    monkeypatch.setattr(serve, "_ask", spoil)
    out = tmp_path / "serve.json"
    run("--json", str(out))
    wrong = json.loads(out.read_text())["rows"][-1]
    assert wrong["value"] == 6  # of the round that warms, too
    assert not wrong["met"]


def test_a_refusal_is_sent_again_and_another_answer_is_an_error(tmp_path):
    import serving

    with serving.running(serving.make_server(tmp_path / "state", places=1)) as address:
        data = serving.encoded(serving.photo(200, 200))
        answers = serve.ask_all(address, [data] * 12, clients=6)
        assert len(answers) == 12
        assert len({answer.body for answer in answers}) == 1
        with pytest.raises(BackendError, match=r"sr-serve answered 422: .*not a picture"):
            serve.ask_all(address, [b"hello"], clients=1)


def test_a_server_that_does_not_come_up_is_told(monkeypatch):
    monkeypatch.setattr(serve.sys, "executable", "false")
    assert "sr-serve does not come up" in run(expect=1).output
