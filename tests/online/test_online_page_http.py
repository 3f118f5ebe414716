"""The page's files and its endpoint as HTTP: headers, revalidation, keys, the switch, and what the live view tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from utils.http_server import RunningServer, running_server

from pellucid.server.http import page as page_module
from pellucid.server.http.page import Page

_TIMEOUT = 120.0


@pytest.fixture(scope="module")
def keyed(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(tiny_model, api_key=("key",), admin_key="boss", max_num_seqs=2) as running:
        yield running


def get(server: RunningServer, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=_TIMEOUT)


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    body = {"prompt": [5] * 40, "max_tokens": 4, "ignore_eos": True, "temperature": 0, **fields}
    headers = {"authorization": "Bearer key"}
    return dict(httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=_TIMEOUT).json())


@pytest.mark.parametrize("path", sorted(Page().paths))
def test_file_of_the_page_when_asked_for_then_it_needs_no_key_and_allows_nothing_foreign(
    keyed: RunningServer, path: str
) -> None:
    answer = get(keyed, path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text.count("http://www.w3.org/2000/svg") == answer.text.count("http"), "an address outside"


def test_file_that_is_known_when_asked_for_again_then_304_without_a_body(keyed: RunningServer) -> None:
    etag = get(keyed, "/").headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = get(keyed, "/", **{"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert get(keyed, "/", **{"if-none-match": '"other"'}).status_code == 200
    head = httpx.head(f"{keyed.url}/static/main.js", timeout=_TIMEOUT)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("path", ["/static/", "/static/page.py", "/static/..%2fpage.py", "/static/%2e%2e/page.py"])
def test_path_that_is_no_file_of_the_page_when_asked_for_then_it_is_as_closed_as_any_other(
    keyed: RunningServer, path: str
) -> None:
    assert get(keyed, path).status_code == 401
    assert get(keyed, path, authorization="Bearer key").status_code == 404


def test_no_page_when_it_is_switched_off_then_its_paths_do_not_exist(tiny_model: Path) -> None:
    with running_server(tiny_model, page=False) as server:
        assert [get(server, path).status_code for path in ("/", "/static/main.js", "/health")] == [404, 404, 200]


def test_openapi_when_the_page_is_served_then_it_names_the_api_alone(keyed: RunningServer) -> None:
    paths = get(keyed, "/openapi.json", authorization="Bearer key").json()["paths"]
    assert "/" not in paths
    assert not any(path.startswith("/static") for path in paths)


def test_package_when_built_then_every_file_of_the_page_is_in_its_folder() -> None:
    """The wheel takes `pellucid/` as it stands; a name that another tool ignores would be lost."""
    folder = Path(page_module.__file__).parent.parent / "static"
    assert {path.name for path in folder.iterdir()} == {Path(path).name or "index.html" for path in Page().paths}
    referred = [name for name in Page().paths if name != "/"]
    text = "".join(path.read_text() for path in folder.iterdir())
    assert all(Path(name).name in text for name in referred), "a file that nothing loads"


def test_live_when_asked_without_the_admin_key_then_nothing_is_told(keyed: RunningServer) -> None:
    assert get(keyed, "/debug/live").status_code == 401
    assert get(keyed, "/debug/live", authorization="Bearer key").status_code == 401
    assert get(keyed, "/debug/live", authorization="Bearer boss").status_code == 200


def test_live_when_requests_ran_then_it_tells_the_same_as_the_records(keyed: RunningServer) -> None:
    admin = {"authorization": "Bearer boss"}
    before = get(keyed, "/debug/live", **admin).json()
    complete(keyed, request_id="seen", n=2)
    view = get(keyed, f"/debug/live?since={before['next']}", **admin).json()
    records = get(keyed, f"/debug/steps?since={before['next']}", **admin).json()["steps"]
    names = view["ids"]
    told = [
        {
            "step": step["step"],
            "kind": step["kind"],
            "tokens": {names[place]: count for place, count in zip(step["requests"], step["tokens"], strict=True)},
            "request_outputs": [names[place] for place in step["sampled"]],
            "waiting": [names[place] for place in step["waiting"]],
            "finished_requests": [names[place] for place in step["finished"]],
            "n_used_blocks": step["used_blocks"],
        }
        for step in view["steps"]
    ]
    assert told == [{key: record[key] for key in told[0]} for record in records]
    assert set(names) == {"seen/0", "seen/1"}
    assert view["stats"]["generation_tokens"] - before["stats"]["generation_tokens"] == 8
    assert view["seconds"] > before["seconds"]
    assert view["next"] == records[-1]["step"] + 1


def test_live_when_a_prompt_was_computed_then_its_full_blocks_count_as_cached(keyed: RunningServer) -> None:
    complete(keyed, prompt=[7] * 40)
    stats = get(keyed, "/debug/live", authorization="Bearer boss").json()["stats"]
    assert stats["used_blocks"] == 0
    assert stats["cached_blocks"] >= 2  # blocks of 16
    repeated = complete(keyed, prompt=[7] * 40)
    assert repeated["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


def test_live_when_since_is_no_step_number_then_400_names_it(keyed: RunningServer) -> None:
    answer = get(keyed, "/debug/live?since=-1", authorization="Bearer boss")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "since")
