"""Trace readers: a small file of each format, and the public traces when they are present."""

from __future__ import annotations

import gzip
import os
from itertools import pairwise
from pathlib import Path

import pytest

from stretto.bench.traces import read
from stretto.errors import InvalidRequest

DATA = Path(os.environ.get("STRETTO_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "traces"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [0, 2]}
{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}
"""
SESSIONS = """{"id": "s1", "requests": [{"t": 1.0, "type": "n", "in": 10, "out": 2}, \
{"t": 5.0, "type": "subagent", "requests": [{"t": 0.5, "type": "s", "in": 7, "out": 3}]}]}
{"id": "s2", "requests": [{"t": 2.0, "type": "s", "in": 20, "out": 4}]}
"""
AGENT = '{"timestamp": 3000000, "input": "%s", "output": "abcd", "session_id": "x"}\n' % ("word " * 40)
WINDOWS = """client,start_s,rate_rps,cv,pattern,param1,param2
0,0,0.05,1.0,Gamma,0.8,0.05
1,0,0,0,,0,0
1,600,0.1,2.0,Weibull,0.5,0.01
0,1200,0.02,1.0,Exponential,1,1
"""
LENGTHS = """{"client":0,"start_s":0,"input_tokens":"{10: 0.5, 20: 0.5}","output_tokens":"{3: 1.0}"}
{"client":0,"start_s":1000,"input_tokens":"{99: 1.0}","output_tokens":"{7: 1.0}"}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_azure_traces_are_read(tmp_path: Path):
    first, second = read(write(tmp_path, "conv.csv.gz", AZURE))
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579) and second.prefix == ()


def test_mooncake_traces_are_sorted_and_keep_their_prefixes(tmp_path: Path):
    first, second = read(write(tmp_path, "talk.jsonl", MOONCAKE))
    assert (first.output_tokens, second.at, second.prefix) == (9, 2.0, (0, 2))


def test_agent_sessions_are_interleaved_with_their_sub_agents(tmp_path: Path):
    arrivals = read(write(tmp_path, "agents.jsonl.gz", SESSIONS))
    assert [(one.at, one.prompt_tokens, one.tenant) for one in arrivals] == [
        (0.0, 10, "s1"),
        (1.0, 20, "s2"),
        (4.5, 7, "s1"),
    ]


def test_the_text_of_a_trace_is_counted_in_tokens(tmp_path: Path):
    (arrival,) = read(write(tmp_path, "agent.jsonl", AGENT))
    assert (arrival.prompt_tokens, arrival.output_tokens, arrival.tenant) == (50, 1, "x")


def test_servegen_draws_the_same_arrivals_from_the_same_seed(tmp_path: Path):
    path = write(tmp_path, "s_windows.csv.gz", WINDOWS)
    write(tmp_path, "s_lengths.jsonl.gz", LENGTHS)
    arrivals = read(path, seed=1)
    assert arrivals == read(path, seed=1) and arrivals != read(path, seed=2)
    assert 40 < len(arrivals) < 200
    assert {(one.prompt_tokens, one.output_tokens) for one in arrivals} == {(10, 3), (20, 3), (99, 7)}
    assert read(path, requests=5, seed=1) == arrivals[:5]
    assert all(early.at <= late.at for early, late in pairwise(arrivals))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "empty"),
        ("a.csv", "time,in,out\n1,2,3\n", "no trace that can be read"),
        ("a.csv", AZURE.splitlines()[0], "holds no request"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,,7\n", "line 4: tokens in"),
        ("a.csv", AZURE + "yesterday,1,7\n", "line 4: TIMESTAMP"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,5\n", "line 4: 2 columns"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,-5,1\n", "line 4: '-5'"),
        ("a.csv", AZURE + "2023-11-16 18:15:51,1e99,1\n", "line 4"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 1, "input_length": 5}\n', "line 3: tokens out"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 1, "inp', "line 3"),
        ("m.jsonl", MOONCAKE.replace("[0, 2]", '"x"'), r"line 1: .*\$\.hash_ids"),
        ("m.jsonl", '{"hello": 1}\n', "no trace that can be read"),
        ("m.jsonl", "[1, 2]\n", "no trace that can be read"),
        ("s.jsonl", '{"id": "s", "requests": [{"t": 0.0, "in": 1}]}\n', "line 1: tokens out"),
        ("s.jsonl", '{"id": "s", "requests": 4}\n', r"line 1: .*\$\.requests"),
        ("l.jsonl", '{"timestamp": 3, "input": 5, "output": "x"}\n', r"line 1: Expected `str`.*\$\.input"),
        ("lonely_windows.csv", WINDOWS, "needs its _lengths.jsonl"),
    ],
)
def test_an_incomplete_trace_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(InvalidRequest, match=message):
        read(write(tmp_path, name, text))


def test_incomplete_servegen_files_are_refused(tmp_path: Path):
    path = write(tmp_path, "s_windows.csv", WINDOWS)
    with pytest.raises(InvalidRequest, match="no lengths"):
        read((write(tmp_path, "s_lengths.jsonl", ""), path)[1])
    write(tmp_path, "s_lengths.jsonl", LENGTHS.replace("{3: 1.0}", "3"))
    with pytest.raises(InvalidRequest, match="line 1: output_tokens"):
        read(path)
    write(tmp_path, "s_lengths.jsonl", LENGTHS)
    with pytest.raises(InvalidRequest, match="Poisson"):
        read(write(tmp_path, "s_windows.csv", WINDOWS.replace("Gamma", "Poisson")))


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path):
    path = write(tmp_path, "conv.csv.gz", AZURE + "\n".join(AZURE.splitlines()[1:] * 50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read(path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read(tmp_path / "none.csv")


@pytest.mark.skipif(not DATA.is_dir(), reason="the public traces are not here (STRETTO_DATA)")
@pytest.mark.parametrize(
    ("name", "count", "span"),
    [
        ("azure_2023_conv.csv.gz", 19366, 3501.7),
        ("azure_2023_code.csv.gz", 8819, 3435.9),
        ("mooncake_fast25_conversation.jsonl.gz", 12031, 3536.0),
        ("lmcache_agent_taubench.jsonl.gz", 471, 180.9),
    ],
)
def test_public_traces_have_their_known_length_and_span(name: str, count: int, span: float):
    arrivals = read(DATA / name)
    assert len(arrivals) == count and arrivals[-1].at == pytest.approx(span, rel=0.01)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public traces are not here (STRETTO_DATA)")
@pytest.mark.parametrize(
    "name", ["servegen_m-small_windows.csv.gz", "kvcachetester_agentic_compact.jsonl.gz"]
)
def test_the_start_of_a_long_public_trace_is_read(name: str):
    arrivals = read(DATA / name, requests=500)
    assert len(arrivals) == 500 and arrivals[0].at == 0.0
