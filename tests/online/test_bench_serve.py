"""`pellucid bench serve`: what it measures is what a scripted server does, and what it asks is what was asked for."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from utils.children import child, finished
from utils.scripted_server import Script, ScriptedServer
from utils.tiny_models import build_tiny_checkpoint
from utils.waiting import until

from pellucid.bench.figures import percentile
from pellucid.bench.serve_bench import ServeResult, run_bench
from pellucid.bench.serve_client import Answer, ServerError
from pellucid.bench.serve_dataset import custom_requests, id_pool, prefix_requests, random_requests
from pellucid.bench.serve_events import EventParser
from pellucid.bench.serve_http import Address
from pellucid.bench.serve_load import Arrivals
from pellucid.bench.serve_metrics import Timing, is_good, most_open
from pellucid.bench.serve_options import ServeOptions
from pellucid.errors import InvalidRequestError
from pellucid.json_text import dumps
from pellucid.text.tokenizer import Tokenizer

SMALL: dict[str, Any] = {"num_prompts": 6, "random_input_len": 12, "random_output_len": 5}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_checkpoint(tmp_path_factory.mktemp("words"), "llama"))


def bench(script: Script, **options: Any) -> tuple[ServeResult, ScriptedServer]:
    with ScriptedServer(script) as server:
        return asyncio.run(run_bench(ServeOptions(base_url=server.url, **SMALL | options))), server


# ---- what is measured --------------------------------------------------------------------------------------------------


def test_bench_when_the_schedule_is_known_then_times_are_at_least_those_and_in_order() -> None:
    result, _ = bench(Script(first_delay=0.1, gap=0.02, tokens=9), max_concurrency=2)
    report = result.report
    assert (report["completed"], report["failed"]) == (6, 0)
    for timing in result.timings.values():
        assert timing.ttft >= 0.1
        assert len(timing.itl) == 4
        assert timing.e2el >= 0.1 + 4 * 0.02
        assert timing.e2el == pytest.approx(timing.ttft + math.fsum(timing.itl))
        assert timing.tpot == pytest.approx(math.fsum(timing.itl) / 4)
    assert report["mean_ttft_ms"] > report["mean_tpot_ms"]
    assert report["mean_e2el_ms"] > report["mean_ttft_ms"]
    assert report["duration"] >= 3 * (0.1 + 4 * 0.02)  # six requests, two at a time


def test_bench_when_a_gap_is_long_then_only_that_gap_is_in_the_latencies() -> None:
    slow, _ = bench(Script(first_delay=0.0, gap=0.15), num_prompts=1)
    fast, _ = bench(Script(first_delay=0.3, gap=0.0), num_prompts=1)
    assert slow.report["median_itl_ms"] >= 100
    assert slow.report["median_itl_ms"] > fast.report["median_itl_ms"]
    assert fast.report["median_ttft_ms"] >= 300
    assert fast.report["median_ttft_ms"] > fast.report["mean_tpot_ms"]


def test_bench_when_run_then_figures_have_vllms_names_and_follow_from_each_other() -> None:
    result, _ = bench(Script(gap=0.002), metric_percentiles="50,99,99.9", goodput=("ttft:60000 tpot:60000",))
    report = result.report
    seconds = report["duration"]
    assert (report["total_input_tokens"], report["total_output_tokens"], report["total_chunks"]) == (72, 30, 30)
    assert report["request_throughput"] == pytest.approx(6 / seconds)
    assert report["request_goodput"] == pytest.approx(6 / seconds)
    assert report["output_throughput"] == pytest.approx(30 / seconds)
    assert report["total_token_throughput"] == pytest.approx(102 / seconds)
    assert 1 <= report["max_concurrent_requests"] <= 6
    for name in ("ttft", "tpot", "itl", "e2el"):
        keys = [f"{word}_{name}_ms" for word in ("mean", "median", "std", "p50", "p99", "p99.9")]
        assert set(keys) <= set(report)
        assert report[keys[1]] == report[keys[3]] <= report[keys[4]] <= report[keys[5]]
    ttfts = [1000 * timing.ttft for timing in result.timings.values()]
    assert report["mean_ttft_ms"] == pytest.approx(statistics.fmean(ttfts))
    assert report["std_ttft_ms"] == pytest.approx(statistics.pstdev(ttfts))
    assert report["p99_ttft_ms"] == pytest.approx(percentile(ttfts, 99))
    detailed = result.detailed()
    assert detailed["input_lens"] == [12] * 6
    assert detailed["output_lens"] == [5] * 6
    assert detailed["errors"] == [""] * 6
    assert all(detailed["generated_texts"])


def test_bench_when_metrics_are_selected_then_the_others_are_not_described() -> None:
    result, _ = bench(Script(), percentile_metrics="ttft")
    assert "mean_ttft_ms" in result.report
    assert "mean_itl_ms" not in result.report


def test_bench_when_the_server_tells_no_usage_then_chunks_are_counted() -> None:
    result, _ = bench(Script(tells_usage=False))
    assert result.report["total_output_tokens"] == 30
    assert result.report["total_input_tokens"] == 72
    assert result.report["protocol_problems"] == {"no event has the usage that was asked for": 6}


def test_bench_when_requests_fail_then_they_are_counted_with_their_reasons_and_not_timed() -> None:
    with ScriptedServer() as server:
        server.script.concerns = lambda request: len(server.requests) in (3, 5)  # the first has tried the server
        server.script.fault = "disconnect"
        result = asyncio.run(run_bench(ServeOptions(base_url=server.url, **SMALL, max_concurrency=1)))
    assert (result.report["completed"], result.report["failed"]) == (4, 2)
    assert sum(result.report["failures"].values()) == 2
    assert "broke off" in next(iter(result.report["failures"]))
    assert len(result.timings) == 4


@pytest.mark.parametrize(
    ("timing", "limits", "good"),
    [
        (Timing(1, 5, 0.1, 0.5, []), {"ttft": 100.0}, True),
        (Timing(1, 5, 0.1, 0.5, []), {"ttft": 99.0}, False),
        (Timing(1, 5, 0.1, 0.5, []), {"ttft": 100.0, "tpot": 99.0}, False),
        (Timing(1, 5, 0.1, 0.5, []), {"ttft": 100.0, "tpot": 101.0, "e2el": 500.0}, True),
        (Timing(1, 1, 0.1, 0.1, []), {"tpot": 0.0}, True),  # a single token has no later one
    ],
)
def test_is_good_when_limits_are_given_then_all_must_hold(timing: Timing, limits: dict[str, float], good: bool) -> None:
    assert is_good(timing, limits) is good


def test_most_open_when_requests_touch_then_they_do_not_overlap() -> None:
    answers = [Answer(started=start, seconds=length) for start, length in ((0.0, 1.0), (1.0, 1.0), (1.5, 2.0))]
    assert most_open(answers) == 2
    assert most_open([]) == 0


# ---- what is asked -----------------------------------------------------------------------------------------------------


def test_bench_when_prompts_are_random_then_ids_have_exact_lengths_and_options_arrive() -> None:
    result, server = bench(
        Script(),
        random_prefix_len=7,
        random_range_ratio=0.5,
        random_vocab_size=500,
        ignore_eos=True,
        temperature=0.5,
        extra_body='{"top_k": 3}',
        num_warmups=2,
    )
    tried, warm, counted = server.requests[0], server.requests[1:3], server.requests[3:]
    assert tried["max_tokens"] == 1
    assert len(counted) == 6
    prefixes = {tuple(request["prompt"][:7]) for request in counted}
    assert len(prefixes) == 1
    assert prefixes.isdisjoint({tuple(request["prompt"][:7]) for request in [tried, *warm]})
    assert len({tuple(request["prompt"]) for request in counted}) == 6
    for request in counted:
        assert 7 + 6 <= len(request["prompt"]) <= 7 + 18
        assert all(100 <= token < 500 for token in request["prompt"])
        assert 2 <= request["max_tokens"] <= 8
        assert (request["ignore_eos"], request["temperature"], request["top_k"]) == (True, 0.5, 3)
    assert result.report["prompt_form"] == "token ids"


def test_bench_when_seeds_are_equal_then_the_same_is_asked_and_another_seed_asks_other() -> None:
    asked = [sorted(map(str, bench(Script(), seed=seed, max_concurrency=1)[1].requests)) for seed in (4, 4, 5)]
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize(("backend", "takes_ids"), [("openai", False), ("openai-chat", True)])
def test_bench_when_ids_cannot_be_sent_then_texts_have_the_same_number_of_tokens(
    backend: str, takes_ids: bool, tokenizer_folder: str
) -> None:
    options = {"backend": backend, "tokenizer": tokenizer_folder, "random_input_len": 40, "random_range_ratio": 0.5}
    result, server = bench(Script(takes_ids=takes_ids), **options)
    tokenizer = Tokenizer.from_directory(Path(tokenizer_folder))
    texts = [r["prompt"] if backend == "openai" else r["messages"][0]["content"] for r in server.requests[1:]]
    lengths = sorted(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert lengths == sorted(request.prompt_tokens for request in result.requests)
    assert result.report["prompt_form"] == ("text" if backend == "openai" else "messages")


def test_bench_when_ids_are_refused_without_a_tokenizer_then_says_what_to_give() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"refused token ids \(status 422: prompt must be a text\): --tokenizer"
    ):
        bench(Script(takes_ids=False))


def test_bench_when_prefixes_repeat_then_each_has_its_share_of_prompts() -> None:
    made = prefix_requests(id_pool(5000), 10, prefix_len=8, suffix_len=3, num_prefixes=3, output_len=4, seed=1)
    shares: dict[tuple[int, ...], int] = {}
    for request in made:
        assert isinstance(request.prompt, list)
        key = tuple(request.prompt[:8])  # type: ignore[arg-type]
        shares[key] = shares.get(key, 0) + 1
    assert sorted(shares.values()) == [3, 3, 3]
    assert {request.prompt_tokens for request in made} == {11}


def test_bench_when_the_data_set_is_a_file_then_lines_are_asked_in_order_and_again(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    lines = [{"prompt": "one two", "output_tokens": 2}, {"prompt": [5, 6, 7]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    custom = {"dataset_name": "custom", "dataset_path": path, "num_prompts": 3, "custom_output_len": 4}
    result, server = bench(Script(), max_concurrency=1, **custom)
    assert [r["prompt"] for r in server.requests[1:]] == ["one two", [5, 6, 7], "one two"]
    assert [r["max_tokens"] for r in server.requests[1:]] == [2, 4, 2]
    assert result.report["total_input_tokens"] == 2 + 3 + 2
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    _, server = bench(Script(), backend="openai-chat", **custom)
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 needs either prompt or messages"),
        ('{"prompt": "\\ud800"}', "prompt holds the lone surrogate U+D800"),
        ('{"prompt": "a", "output_tokens": NaN}', "line 1 is not JSON: NaN"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"prompt": "a", "messages": []}', "line 1 needs either prompt or messages"),
        ('{"prompt": ""}', "line 1: the prompt is ''"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens is 0"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens is True"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "they need --backend openai-chat"),
        ("", "has no lines"),
        ("\n\n[" + "[" * 100_000, "line 3 is not JSON: maximum recursion depth"),
        ('{"prompt": ' + "9" * 5_000 + "}", "line 1 is not JSON: Exceeds the limit"),
        ('{"prompt": "a", "output_tokens": "' + "x" * 999 + '"}', "it must be at least 1"),
    ],
)
def test_bench_when_a_line_of_the_file_is_wrong_then_it_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidRequestError) as caught:
        bench(Script(), dataset_name="custom", dataset_path=path)
    assert str(caught.value).startswith(f"dataset_path {path}")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_bench_when_a_text_of_the_file_has_other_ends_of_lines_then_it_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False).encode() + b"\r\n")
    (made,) = custom_requests(path, 1, output_len=1, is_chat=False)
    assert made.prompt == "a\u2028b\x85c"


def test_bench_when_options_are_infinite_or_texts_are_halves_then_the_result_is_strict_json(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may spell half a character, and say what is no number."""
    monkeypatch.setattr("utils.scripted_server._WORDS", ("half\ud83d", "whole"))
    monkeypatch.setattr("utils.scripted_server.usage_of", lambda request, count: {"completion_tokens": count})
    monkeypatch.setattr("utils.scripted_server.encoded", _ascii_events)
    result, _ = bench(Script(), request_rate=1000.0, burstiness=math.inf, tokenizer=tokenizer_folder)
    assert result.report["completed"] == 6
    text = dumps(result.detailed(), indent=1)
    found = json.loads(text.encode(), parse_constant=lambda constant: pytest.fail(constant))
    assert (found["burstiness"], found["request_rate"]) == ("inf", 1000.0)


def _ascii_events(events: list[tuple[float, Any]]) -> list[tuple[float, bytes]]:
    texts = [(wait, event if isinstance(event, str) else json.dumps(event)) for wait, event in events]
    return [(wait, f"data: {text}\n\n".encode()) for wait, text in texts]


# ---- when it is asked --------------------------------------------------------------------------------------------------


def test_arrivals_when_the_rate_is_constant_then_the_last_is_sent_at_count_over_rate() -> None:
    for burstiness in (0.3, 1.0, 5.0, math.inf):
        times = Arrivals(request_rate=20.0, burstiness=burstiness, seed=3).times(200)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(10.0)
    assert Arrivals().times(3) == [0.0] * 3


def test_arrivals_when_burstiness_differs_then_the_spread_of_gaps_does() -> None:
    spreads = []
    for burstiness in (0.3, 1.0, 5.0, math.inf):
        times = Arrivals(request_rate=1.0, burstiness=burstiness, seed=1).times(2000)
        spreads.append(statistics.pstdev(b - a for a, b in itertools.pairwise(times)))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] == pytest.approx(1 / math.sqrt(0.3), rel=0.2)  # a gamma's spread over its mean
    assert spreads[1] == pytest.approx(1.0, rel=0.15)
    assert spreads[3] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_arrivals_when_the_rate_ramps_up_then_it_goes_from_start_to_end(strategy: str) -> None:
    ramp = Arrivals(ramp_up_strategy=strategy, ramp_up_start_rps=2.0, ramp_up_end_rps=32.0)
    rates = ramp.rates(5)
    assert (rates[0], rates[-1]) == (2.0, 32.0)
    assert rates[2] == pytest.approx(17.0 if strategy == "linear" else 8.0)
    times = ramp.times(400)
    assert times[200] - times[0] > times[399] - times[200]


def test_bench_when_the_rate_is_given_then_requests_arrive_no_earlier_than_drawn() -> None:
    options = {"request_rate": 20.0, "burstiness": 2.0, "seed": 9}
    result, _ = bench(Script(), **options)
    due = Arrivals(20.0, 2.0, seed=9).times(6)
    sent = result.detailed()["start_times"]
    assert all(at >= wanted - 1e-3 for at, wanted in zip(sent, due, strict=True))
    assert result.report["duration"] >= 0.3


def test_bench_when_concurrency_is_limited_then_no_more_are_open() -> None:
    result, server = bench(Script(first_delay=0.05), max_concurrency=2, num_prompts=8)
    assert server.most_open == 2
    assert result.report["max_concurrent_requests"] <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"backend": "grpc"}, "backend has 'grpc'"),
        ({"dataset_name": "sharegpt"}, "dataset_name has 'sharegpt'"),
        ({"dataset_name": "custom"}, "dataset_path is for"),
        ({"request_rate": 0.0}, "request_rate is 0.0"),
        ({"request_rate": math.nan}, "request_rate is nan"),
        ({"burstiness": -1.0}, "burstiness is -1.0"),
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"ramp_up_start_rps": 1.0}, "need ramp_up_strategy"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0}, "ramp_up_end_rps is None"),
        ({"ramp_up_strategy": "linear", "request_rate": 3.0}, "request_rate is 3.0"),
        ({"goodput": ("itl:3",)}, "goodput has 'itl'"),
        ({"goodput": ("ttft:fast",)}, "goodput has 'ttft:fast'"),
        ({"percentile_metrics": "ttft,speed"}, "percentile_metrics has 'speed'"),
        ({"metric_percentiles": "50,101"}, "metric_percentiles has '101'"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"extra_body": "[]"}, "extra_body is no JSON object"),
    ],
)
def test_options_when_out_of_range_then_refused_with_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ServeOptions(base_url="http://127.0.0.1:9", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_address_when_it_is_none_then_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        Address.parse(url)


def test_bench_when_nothing_listens_then_says_so() -> None:
    with pytest.raises(ServerError, match=r"no connection to 127\.0\.0\.1:9"):
        asyncio.run(run_bench(ServeOptions(base_url="127.0.0.1:9", **SMALL)))


# ---- the stream of events ----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)), st.randoms())
def test_events_when_bytes_are_cut_anywhere_then_they_are_the_same(texts: list[str], draw: random.Random) -> None:
    data = b": a comment\r\n\r\n" + b"".join(f"event: x\ndata: {text}\n\n".encode() for text in texts)
    parser, found, at = EventParser(), [], 0
    while at < len(data):
        size = draw.randint(1, 7)
        found += parser.feed(data[at : at + size])
        at += size
    parser.end()
    assert found == texts
    assert parser.problems == []


def test_events_when_data_has_several_lines_then_they_are_one_event() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\ndata:b\r\n\r\ndata: c\n") == ["a\nb"]
    parser.end()
    assert parser.problems == ["the stream ends within an event"]


# ---- the command -------------------------------------------------------------------------------------------------------


def line_of(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pellucid.cli", "bench", "serve", *arguments]


ASK = ("--num-prompts", "4", "--random-input-len", "6", "--random-output-len", "5")


def test_command_when_run_then_prints_saves_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "timeline.svg"
    extra = ("--save-detailed", "--result-dir", str(tmp_path), "--plot-timeline", str(picture))
    with ScriptedServer(Script(api_key="k")) as server:
        host, port = server.url.removeprefix("http://").split(":")
        where = ("--host", host, "--port", port, "--api-key", "k")
        line = line_of(*where, *ASK, *extra, "--goodput", "ttft:60000", "e2el:60000", "--request-rate", "40")
        done = finished(line)
    assert done.returncode == 0, done.stderr
    for text in ("Successful requests:", "Request goodput (req/s):", "P99 TTFT (ms):", "Mean E2EL (ms):"):
        assert text in done.stdout
    (written,) = tmp_path.glob("openai-40.0qps-scripted-*.json")
    report = json.loads(written.read_text())
    assert (report["completed"], report["output_lens"]) == (4, [5] * 4)
    assert report["request_goodput"] == pytest.approx(report["request_throughput"])
    assert "<svg" in picture.read_text()[:2000]


def test_command_when_interrupted_then_shows_what_it_has() -> None:
    with ScriptedServer() as server:
        server.script.concerns = lambda request: len(server.requests) > 3
        server.script.fault = "never-answers"
        line = line_of("--base-url", server.url, *ASK, "--max-concurrency", "1")
        with child(line) as process:
            until(lambda: len(server.requests) == 4 or process.poll() is not None, "the fourth request")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Successful requests:                               2" in out


def test_command_when_every_request_fails_then_status_one() -> None:
    with ScriptedServer() as server:
        server.script.concerns = lambda request: len(server.requests) > 1
        server.script.fault = "status-500"
        line = line_of("--base-url", server.url, *ASK)
        done = finished(line)
    assert done.returncode == 1
    assert "failures: 4 x status 500: broken" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot-timeline", "x.pdf"), "it takes a file that ends in .png or .svg"),
        (("--save-result", "--result-dir", "/no/such"), "result_dir /no/such does not exist"),
        (("ttft:3",), "unexpected argument 'ttft:3'"),
    ],
)
def test_command_when_an_option_is_wrong_then_one_line_and_status_two(arguments: tuple[str, ...], message: str) -> None:
    done = finished(line_of(*arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_timeline_when_matplotlib_is_missing_then_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.bench.serve_timeline import check_timeline

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'pellucid\[bench\]'"):
        check_timeline(Path("x.png"))


def test_random_requests_when_drawn_then_no_id_is_outside_the_vocabulary() -> None:
    (one,) = random_requests(id_pool(50), 1, input_len=400, output_len=1)
    assert isinstance(one.prompt, list)
    assert {*one.prompt} == {49}  # special ids are left out, which leaves one
