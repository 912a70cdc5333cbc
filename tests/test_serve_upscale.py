"""POST /v1/upscale: the pixels of Upscaler, whatever a client sends, and what it is told otherwise."""

from __future__ import annotations

import io
import logging
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bundles
import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")

import serving
from serving import Slow, decoded, encoded, left_files, photo, until

from sdk import OutOfMemory, OutputError, Upscaler
from sdk.serve import connections
from sdk.serve import models as serve_models
from sdk.serve.orders import MEDIA_TYPES


@pytest.fixture(scope="module")
def upscaler():
    with Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return serving.make_server(
        tmp_path_factory.mktemp("state"), max_body_mib=1, max_pixels=10_000, max_result_pixels=90_000
    )


@pytest.fixture(scope="module")
def client(server):
    with serving.client(server) as made:
        yield made


@pytest.fixture
def open_client(tmp_path):
    """Give `open_client(**options)`, a client of a server of its own, which ends with the test."""
    opened = []

    def make(**options: object):
        made = serving.make_server(tmp_path / f"state{len(opened)}", **options)
        context = serving.client(made)
        opened.append(context)
        return context.__enter__(), made

    yield make
    for context in opened:
        context.__exit__(None, None, None)


def test_the_pixels_are_those_of_upscaler(client, upscaler):
    image = photo()
    answer = client.post("/v1/upscale", content=encoded(image))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(decoded(answer.content), upscaler.upscale(image))


def test_a_form_and_a_body_give_the_same_file_as_upscale_file(client, upscaler, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    data = encoded(photo(), "JPEG", quality=90, exif=exif)
    (tmp_path / "in.jpg").write_bytes(data)
    upscaler.upscale_file(tmp_path / "in.jpg", tmp_path / "out.png")
    expected = (tmp_path / "out.png").read_bytes()
    assert decoded(expected).shape == (60, 48, 3)
    assert client.post("/v1/upscale", content=data).content == expected
    assert client.post("/v1/upscale", files={"file": ("../../etc/passwd", data, "text/html")}).content == expected


@pytest.mark.parametrize(
    "declared", ["application/json", "image/png", "text/html", "application/x-www-form-urlencoded"]
)
def test_content_tells_what_is_sent_and_not_the_header(client, upscaler, declared):
    image = photo()
    answer = client.post("/v1/upscale", content=encoded(image, "BMP"), headers={"Content-Type": declared})
    np.testing.assert_array_equal(decoded(answer.content), upscaler.upscale(image))


@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_every_format_comes_back_as_what_it_says(client, kind):
    answer = client.post("/v1/upscale", params={"format": kind}, content=encoded(photo()))
    assert answer.status_code == 200, answer.text
    full = {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind)
    assert answer.headers["content-type"] == f"image/{full}"
    opened = Image.open(io.BytesIO(answer.content))
    assert (opened.format.lower(), opened.size) == (full, (60, 48))


def test_a_factor_and_a_quality(client, upscaler):
    image = photo()
    answer = client.post("/v1/upscale", params={"factor": 1.5}, content=encoded(image))
    np.testing.assert_array_equal(decoded(answer.content), upscaler.upscale(image, factor=1.5))
    small, large = (
        client.post("/v1/upscale", params={"format": "jpeg", "quality": quality}, content=encoded(image)).content
        for quality in (10, 100)
    )
    assert len(small) < len(large) / 2


def test_deep_alpha_and_moving_pictures_stay_what_they_are(client, upscaler, tmp_path):
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "deep.png")
    answer = client.post("/v1/upscale", content=(tmp_path / "deep.png").read_bytes())
    assert Image.open(io.BytesIO(answer.content)).mode == "I;16"
    image = photo(channels=4)
    answer = client.post("/v1/upscale", content=encoded(image))
    np.testing.assert_array_equal(decoded(answer.content), upscaler.upscale(image))
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=[50, 60, 70])
    answer = client.post("/v1/upscale", content=(tmp_path / "in.gif").read_bytes())
    assert Image.open(io.BytesIO(answer.content)).n_frames == 3


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"model": "../../etc"}, "model '../../etc': this server has blur"),
        ({"model": str(bundles.shared("unet"))}, "this server has blur"),
        ({"scale": 4}, "Extra inputs are not permitted"),
        ({"factor": "nan"}, "finite number"),
        ({"factor": 0}, "greater than 0"),
        ({"factor": 65}, "less than or equal to 64"),
        ({"factor": 16}, "the picture: would become 480 x 384 pixels, and results have at most 90000"),
        ({"format": "exe"}, "Input should be"),
        ({"format": "../x"}, "Input should be"),
        ({"quality": 0}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_ordered_is_refused(client, params, told):
    answer = client.post("/v1/upscale", params=params, content=encoded(photo()))
    assert answer.status_code == 422
    assert told in answer.text


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "nothing was sent"),
        (b"hello", "the picture: not a picture in a known format"),
        (encoded(photo())[:200], "the picture: "),
        (encoded(photo(101, 100)), "10000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "the picture: not a picture in a known format"),
    ],
)  # fmt: skip
def test_what_is_no_good_picture_is_refused(client, server, data, told):
    answer = client.post("/v1/upscale", content=data)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert "/" not in answer.json()["detail"]  # no path of the server
    until(lambda: not left_files(server))


@pytest.mark.parametrize(
    "form",
    [{"files": {"other": encoded(photo())}}, {"data": {"file": "text"}},
     {"files": [("file", encoded(photo())), ("file", encoded(photo()))]},
     {"content": b"--x\r\nrubbish", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
     {"content": b"rubbish", "headers": {"Content-Type": "multipart/form-data"}}],
)  # fmt: skip
def test_a_form_without_one_file_is_refused(client, server, form):
    answer = client.post("/v1/upscale", **form)
    assert answer.status_code in (400, 422)
    assert re.search("form|boundary|files", answer.json()["detail"])
    until(lambda: not left_files(server))


@pytest.mark.parametrize("route", ["/v1/upscale", "/v1/jobs"])
def test_a_body_beyond_the_limit_is_refused_announced_or_not(client, server, route):
    data = bytes(1 << 20) + b"x"
    answer = client.post(route, content=data)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "the body has more than 1048576 bytes"
    assert client.post(route, content=iter([data[:100], data[100:]])).status_code == 413  # in chunks
    assert client.post(route, files={"file": data}).status_code == 413
    until(lambda: not left_files(server))


def test_a_format_that_cannot_hold_the_picture_is_the_clients_fault(client):
    answer = client.post("/v1/upscale", params={"format": "jpeg"}, content=encoded(photo(channels=4)))
    assert (answer.status_code, answer.json()["detail"]) == (
        422, "the result: JPEG has no alpha channel; write PNG, WebP, AVIF or TIFF",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "status"),
    [(OutOfMemory("no memory"), 503), (OutputError("disk"), 422), (OSError(28, "No space left on device"), 507)],
)
def test_failures_of_the_server_have_their_status(client, server, monkeypatch, failure, status):
    def run_file(*arguments: object, **options: object) -> None:
        if isinstance(failure, OSError):
            raise OutputError("the file cannot be written") from failure
        raise failure

    monkeypatch.setattr(serve_models.jobs, "run_file", run_file)
    assert client.post("/v1/upscale", content=encoded(photo())).status_code == status
    until(lambda: not left_files(server))


def test_too_many_requests_are_told_when_to_come_again(open_client, monkeypatch):
    slow = Slow(monkeypatch)
    client, server = open_client(workers=1, places=2)
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(client.post, "/v1/upscale", content=encoded(photo())) for _ in range(2)]
        until(lambda: server.desk.taken == 2)
        refused = client.post("/v1/upscale", content=encoded(photo()))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.post("/v1/jobs", content=encoded(photo())).status_code == 202  # which take no place
        assert client.get("/healthz").status_code == 200
        slow.go.set()
        assert [future.result().status_code for future in held] == [200, 200]
    assert client.post("/v1/upscale", content=encoded(photo())).status_code == 200


def test_work_that_takes_too_long_is_ended(open_client, monkeypatch):
    slow = Slow(monkeypatch)
    client, server = open_client(request_s=0.2)
    answer = client.post("/v1/upscale", content=encoded(photo()))
    assert answer.status_code == 504
    assert answer.json()["detail"] == "not done within 0.2 s: send a smaller picture, or post it to /v1/jobs"
    assert slow.ended.wait(serving.WAIT_S)
    until(lambda: not left_files(server))


def test_work_for_a_client_that_leaves_is_ended(open_client, monkeypatch):
    slow = Slow(monkeypatch)
    client, server = open_client(workers=1)
    data = encoded(photo())
    head = f"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    address = client.base_url.host, client.base_url.port
    with socket.create_connection(address) as working, socket.create_connection(address) as waiting:
        working.sendall(head + data)
        assert slow.begun.acquire(timeout=serving.WAIT_S)
        waiting.sendall(head + data)
        until(lambda: server.desk.taken == 2)
    assert slow.ended.wait(serving.WAIT_S)
    until(lambda: server.desk.taken == 0)
    until(lambda: not left_files(server))
    assert not slow.begun.acquire(blocking=False)  # the one that waited never began


def test_a_request_that_the_end_of_the_server_cuts_off_is_told(open_client, monkeypatch):
    slow = Slow(monkeypatch)
    client, server = open_client(grace_s=1, workers=1)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.post, "/v1/upscale", content=encoded(photo())) for _ in range(2)]
        assert slow.begun.acquire(timeout=serving.WAIT_S)
        until(lambda: server.desk.taken == 2)
        server.drain()
        for future in asked:
            answer = future.result()
            assert answer.status_code == 503
            assert answer.json()["detail"] == "the server is about to end"
            assert int(answer.headers["retry-after"]) > 0


def test_a_body_that_does_not_come_gives_its_place_back(open_client):
    client, server = open_client(transfer_s=0.2)
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello")
        connection.settimeout(serving.WAIT_S)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    until(lambda: server.desk.receiving == 0)
    until(lambda: not left_files(server))


def test_only_those_with_a_key_are_served(open_client):
    client, _ = open_client(keys=("first", "second"))
    data = encoded(photo())
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first"},
        {"Authorization": "Bearer"},
    ):
        for answer in (
            client.post("/v1/upscale", content=data, headers=headers),
            client.post("/v1/jobs", content=data, headers=headers),
            client.get("/v1/models", headers=headers),
            client.get("/v1/jobs/x", headers=headers),
            client.delete("/v1/jobs/x", headers=headers),
            client.get("/metrics", headers=headers),
        ):
            assert answer.status_code == 401, answer.request.url
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("first", "second"):
        assert client.post("/v1/upscale", content=data, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(client, headers, status):
    answer = client.post("/v1/upscale", content=encoded(photo()), headers=headers)
    assert answer.status_code == status
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_mistake_of_ours_is_a_500_and_counted_as_one(open_client, monkeypatch):
    client, server = open_client()
    monkeypatch.setattr(server.models, "describe", lambda: 1 / 0)
    answer = client.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "the server made a mistake; its log tells more"
    metrics = httpx.get(client.base_url.join("/metrics")).text
    assert 'sr_http_requests_total{method="GET",route="/v1/models",status="500"} 1.0' in metrics


def test_clients_that_leave_while_sending_are_no_news(open_client, caplog):
    client, server = open_client()
    for _ in range(5):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello")
    until(lambda: 'status="499"} 5.0' in client.get("/metrics").text)
    assert server.desk.receiving == 0
    assert "Traceback" not in caplog.text
    until(lambda: not left_files(server))


def test_results_that_nobody_reads_keep_their_place_and_go(open_client):
    client, server = open_client(transfer_s=0.5, places=1)
    large, stream = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(large).save(stream, "PNG")
    head = f"POST /v1/upscale?format=bmp HTTP/1.1\r\nHost: x\r\nContent-Length: {stream.tell()}\r\n\r\n".encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head + stream.getvalue())
        until(lambda: server.desk.taken == 1 and not server.desk.working and left_files(server))
        assert client.post("/v1/upscale", content=encoded(photo())).status_code == 429
        until(lambda: server.desk.taken == 0)
        until(lambda: not left_files(server))


def test_a_client_that_asks_one_after_the_other_finds_its_place_free(open_client):
    client, _ = open_client(places=1, batch=1)
    data = encoded(photo())
    assert {client.post("/v1/upscale", content=data).status_code for _ in range(200)} == {200}


def test_connections_that_say_nothing_are_closed(open_client, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    client, _ = open_client()
    address = client.base_url.host, client.base_url.port
    heads = [b"", b"GET /healthz HTTP/1.1\r\nHo"]
    heads.append(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + heads[1])  # the second one of a connection
    for head in heads:
        with socket.create_connection(address, timeout=serving.WAIT_S) as connection:
            connection.sendall(head)
            while connection.recv(4096):
                pass  # until it is closed
    assert client.get("/healthz").status_code == 200


def test_there_are_not_more_connections_than_files(open_client):
    client, _ = open_client()
    address = client.base_url.host, client.base_url.port
    held = []
    for _ in range(110):  # the server of these tests takes 100
        held.append(socket.create_connection(address, timeout=serving.WAIT_S))
    closed = 0
    for connection in held[-5:]:
        try:
            closed += connection.recv(1) == b""
        except ConnectionResetError:
            closed += 1
    assert closed == 5
    for connection in held:
        connection.close()
    until(lambda: _answers(client))
    assert connections.connection_limit() >= 1


def _answers(client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_avif_has_a_limit_of_its_own(open_client):
    client, _ = open_client(max_result_pixels=8 * 2000)
    assert client.post("/v1/upscale", params={"format": "avif"}, content=encoded(photo())).status_code == 422
    assert client.post("/v1/upscale", params={"format": "avif"}, content=encoded(photo(10, 10))).status_code == 200
    assert client.post("/v1/upscale", content=encoded(photo())).status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(client):
    for path in ("/", "/app.js", "/style.css", "/docs", "/redoc", "/v1/models"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
    for path in ("/", "/app.js", "/style.css"):
        assert "://" not in client.get(path).text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/%2e%2e/app.py", "/..%2fapp.py", "//etc/passwd", "/v1/jobs/..%2f"]
)
def test_no_path_leads_out_of_the_page(client, path):
    assert client.get(path).status_code == 404


def test_metrics_tell_what_was_done(open_client):
    client, _ = open_client()
    client.post("/v1/upscale", content=encoded(photo()))
    client.post("/v1/upscale", content=b"hello")
    client.get("/nothing/here")
    lines = client.get("/metrics").text.splitlines()
    assert 'sr_http_requests_total{method="POST",route="/v1/upscale",status="200"} 1.0' in lines
    assert 'sr_http_requests_total{method="POST",route="/v1/upscale",status="422"} 1.0' in lines
    assert 'sr_http_requests_total{method="GET",route="other",status="404"} 1.0' in lines
    assert 'sr_pictures_total{model="blur"} 1.0' in lines
    assert 'sr_pixels_total{model="blur"} 720.0' in lines
    assert 'sr_jobs{state="queued"} 0.0' in lines
    assert "sr_requests_taken 0.0" in lines


def test_the_models_are_listed_the_default_first(open_client):
    client, _ = open_client(models=(str(bundles.shared("unet")), str(bundles.shared("blur"))))
    listed = client.get("/v1/models").json()
    assert [(model["name"], model["scale"], model["default"]) for model in listed] == [
        ("unet", 2, True), ("blur", 2, False),
    ]  # fmt: skip
    image = photo()
    results = [client.post("/v1/upscale", params=params, content=encoded(image)) for params in ({}, {"model": "blur"})]
    assert results[0].content != results[1].content


def test_many_clients_at_once_get_each_their_own_picture(open_client, upscaler, caplog):
    caplog.set_level(logging.WARNING)
    client, server = open_client(batch=4)
    images = [photo(24 + number % 3, 30, seed=number) for number in range(50)]

    def ask(image: np.ndarray) -> bytes:
        while (answer := client.post("/v1/upscale", content=encoded(image))).status_code == 429:
            pass
        assert answer.status_code == 200, answer.text
        return answer.content

    with ThreadPoolExecutor(50) as pool:
        for _ in range(4):
            for image, result in zip(images, pool.map(ask, images), strict=True):
                np.testing.assert_array_equal(decoded(result), upscaler.upscale(image))
    assert server.desk.taken == 0
    until(lambda: server.desk.working == 0)  # a client has its answer a moment before
    until(lambda: not left_files(server))
    assert Path(server.models.new_file("x")).parent.is_dir()
