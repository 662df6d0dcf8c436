# SPDX-License-Identifier: Apache-2.0
"""``tokenprune download`` against a server on this machine: resuming, checksums, and what goes wrong."""

import hashlib
import http.server
import json
import threading
from typing import ClassVar

import pytest

pytest.importorskip("typer")

from tokenprune_ext import cli, downloads
from tokenprune_ext._errors import UserError

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, parts of it on request; other paths misbehave."""

    asked: ClassVar[list] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if self.path == "/missing":
            return self.send_error(404)
        start = 0 if wanted is None or self.path == "/whole" else int(wanted[6:-1])
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) // 2 if self.path == "/short" and not start else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture
def server():
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def item(server, path="/file", checksum=f"sha256:{DIGEST[:8]}"):
    return downloads.Item("thing", server + path, "what", "models", "thing.pth", checksum)


def test_a_file_is_fetched_once(server, tmp_path):
    seen = []
    path = downloads.download(item(server), tmp_path / "new", progress=lambda *at: seen.append(at))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert downloads.download(item(server), tmp_path / "new") == path
    assert len(Handler.asked) == 1


@pytest.mark.parametrize("path, left", [("/file", 1000), ("/whole", 1000), ("/file", len(CONTENT))])
def test_an_interrupted_download_goes_on(path, left, server, tmp_path):
    (tmp_path / "thing.pth.part").write_bytes(CONTENT[:left])
    assert downloads.download(item(server, path), tmp_path).read_bytes() == CONTENT
    assert Handler.asked == [f"bytes={left}-"]
    assert not (tmp_path / "thing.pth.part").exists()


def test_a_broken_connection_is_told_and_continued(server, tmp_path):
    with pytest.raises(UserError, match="call again to continue"):
        downloads.download(item(server, "/short"), tmp_path)
    assert downloads.download(item(server, "/short"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_puts_the_file_aside(server, tmp_path):
    with pytest.raises(UserError, match="00000000 was published"):
        downloads.download(item(server, checksum="sha256:00000000"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.pth.part.broken"]


@pytest.mark.parametrize("path, text", [("/missing", "404"), ("/page", "fetch it with a browser")])
def test_what_the_server_says(path, text, server, tmp_path):
    with pytest.raises(UserError, match=text):
        downloads.download(item(server, path), tmp_path)


def test_no_network_is_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    def nobody(*arguments, **options):
        raise downloads.urllib.error.URLError("no route to host")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", nobody)
    assert cli.main(["download", "deit_small_patch16_224", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "cannot be reached from here (no route to host)" in error
    assert str(tmp_path / "deit_small_patch16_224-cd65a155.pth") in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "needs a name"),
        (["vit_l16_in1"], "did you mean vit_l16_in1k"),
        (["imagenet"], "image-net.org"),
        (["spvit"], "ever published"),
    ],
)
def test_mistakes_give_one_line_and_code_2(arguments, text, capsys):
    assert cli.main(["download", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert len(error.splitlines()) == 1


def test_the_list_holds_every_system(capsys):
    assert cli.main(["download", "--list", "--json", "-"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"vit_h14_in1k", "deit_base_patch16_224", "lvvit_m", "evit_deit_s_fused_0.7", "coco-val2017"} <= rows.keys()
    assert rows["dynamicvit_deit_s_0.7"]["url"].startswith("https://drive.google.com/file/d/")
    hosts = {downloads.host(found) for found in downloads.items().values()}
    assert hosts == {
        "dl.fbaipublicfiles.com",
        "download.pytorch.org",
        "github.com",
        "drive.google.com",
        "images.cocodataset.org",
    }
    assert rows["deit_small_patch16_224"]["checksum"] == "sha256:cd65a155"
    assert len(downloads.find("coco")) == 3
    assert len({found.file for found in downloads.items().values()}) == len(rows)
