"""Layer 8, money: prices, costs, limits that hold over processes, the bill, and what clients and operators are told."""
import asyncio
import contextlib
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import time

import pytest
import sinks
from conftest import REPOSITORY, of_a_file, of_a_server
from ledgers import (
    account_made,
    beats,
    change,
    dumped,
    insert,
    key_made,
    key_of,
    kill_under_load,
    locked,
    lost,
    read,
    recent,
    refusals,
    started,
    statements,
    totals,
    under_way,
    until,
)

import pomex
from pomex import Usage

NOW = 1_795_305_600.0       # 2026-11-22 00:00 UTC, a Sunday
NOW_MS = int(NOW) * 1000
NANO = 10**9
SHARED_PRICES = REPOSITORY.parent / "shared" / "reference" / "prices.json"


@pytest.fixture
def path(place):
    return place


@pytest.fixture
def ledger(path):
    ledger = pomex.Ledger.open(path)
    yield ledger
    ledger.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def used(response_id, **more):
    return pomex.UsageRow(response_id, "req", NOW_MS, 1, "/v1/responses", "openai/gpt-5.5", result="completed")._replace(**more)


def given_up(response_id, **more):
    return used(response_id, attempt=1, final=0, status="lost", provider="azure", upstream_model="gpt", error_code="server_error",
                input=10, output=5, price="2 10 - - - -", cost_nanos=70_000)._replace(**more)


def settled(ledger, *requests):
    """As the ledger settles requests together: the rows of each."""
    ledger.db.commit(lambda tx: pomex.settle_requests(tx, requests))


def sound(ledger, rows):
    """So many rows, and nothing wrong with them."""
    return run(pomex.verify(ledger.db)) == (rows, [])


# --- usage ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, sound", [
    (Usage(10, 4, 6, 5, 5), Usage(10, 4, 6, 5, 5)),
    (Usage(10, 11), Usage(10, 10)),
    (Usage(10, 4, 7), Usage(10, 4, 6)),
    (Usage(10, 12, 7, cache_write_1h=7), Usage(10, 10, 0, cache_write_1h=0)),
    (Usage(10, 0, 4, cache_write_1h=5), Usage(10, 0, 4, cache_write_1h=4)),
    (Usage(0, output=3, reasoning=4), Usage(0, output=3, reasoning=3)),
    (Usage(10**18), Usage(1 << 24)),
], ids=str)
def test_a_count_that_contradicts_itself_is_cut_to_size_and_marked_with_why(given, sound):
    checked = pomex.checked_usage(given)
    if given == sound:
        assert checked is given
    else:
        assert checked.estimated and "cannot be" in checked.inconsistency
        assert checked == pomex.dataclasses.replace(sound, estimated=True, inconsistency=checked.inconsistency)


def test_images_and_sealed_reasoning_do_not_count_as_text_in_an_estimate():
    assert pomex.weigh_input(b"x" * 4000) == 4000
    image = b'{"image_url":"data:image/png;base64,' + b"iVBORw0KGgo" * 50_000 + b'"}'
    assert pomex.weigh_input(image) < 6400


# --- prices ---------------------------------------------------------------------------------------

PRICED = [      # price, multiplier in millionths, usage, nano-dollars
    ("2 10 0.2 2.5 4 -", 1_000_000, Usage(1000, 0, 0, 100), 2_000_000 + 1_000_000),
    ("2 10 0.2 2.5 4 -", 1_000_000, Usage(1000, 600, 300, 0, cache_write_1h=100), 200_000 + 120_000 + 500_000 + 400_000),
    ("2 10 - - - -", 1_000_000, Usage(1000, 600, 300, 0, cache_write_1h=100), 2_000_000),     # no prices of their own
    ("2 10 - 2.5 - -", 1_000_000, Usage(100, 0, 100, 0, cache_write_1h=100), 250_000),
    ("2 10 - - - 10", 1_000_000, Usage(0, web_searches=3), 30_000_000),
    ("2 10 0.2 - - -", 1_200_000, Usage(1000), 2_400_000),
    ("0.003 0 - - - -", 1_000_000, Usage(1), 3),
    ("0.0005 0 - - - -", 1_000_000, Usage(1), 1),               # half a nano-dollar is rounded up, once
    ("0.0005 0.0005 - - - -", 1_000_000, Usage(1, output=1), 1),
    ("0.000499 0 - - - -", 1_000_000, Usage(1), 0),
    ("", 1_000_000, Usage(10**6, output=10**6), 0),
    ("0 0 0 0 0", 1_000_000, Usage(10**6, output=10**6), 0),
]


@pytest.mark.parametrize("price, multiplier, usage, nanos", PRICED)
def test_a_cost_is_exact_and_rounded_once(price, multiplier, usage, nanos):
    assert pomex.cost_nanos(price, multiplier, usage) == nanos


def test_the_builtin_table_is_the_published_one():
    if not SHARED_PRICES.is_file():
        pytest.skip("prices.json does not lie beside this repository")
    published = json.loads(SHARED_PRICES.read_text(), parse_float=pomex.decimal.Decimal)["models"]
    schedules = pomex.builtin_schedules()
    assert schedules.keys() >= published.keys()

    def picos(row, name, *instead):
        value = next((row[each] for each in (name, *instead) if each in row), None)
        return None if value is None else int(value * 10**6)
    for name, row in published.items():
        for text, given in ((schedules[name].base, row), (schedules[name].long, row.get("long"))):
            price = pomex.price_of(text)
            assert (price is None) == (given is None), name
            if given:
                base, read, write = picos(given, "in"), picos(given, "cache_read"), picos(given, "cache_write")
                kept = picos(given, "cache_write_1h", "cache_write_12h")
                write = base if write is None else write
                assert price[:4] == (base, picos(given, "out"), base if read is None else read, write), name
                assert price[4] == (write if kept is None else kept) or given is row.get("long"), name
        assert len(schedules[name].changes) == len(row.get("from", ()))
        facts = pomex.known_models(name.partition("/")[0])[name.partition("/")[2]]
        assert facts == (row["context"], row["max_out"])


@pytest.mark.parametrize("model, at_ms, tokens, price", [
    ("anthropic/claude-haiku-5-5", NOW_MS, 100_000, "0.1 0.5 0.01 0.125 0.2 10"),
    ("anthropic/claude-haiku-5-5", NOW_MS, 100_001, "0.5 2.5 0.05 0.625 1 10"),
    ("xai/grok-4.5", NOW_MS, 199_999, "2 6 0.3 - - 5"),
    ("xai/grok-4.5", NOW_MS, 200_000, "4 12 0.6 - - 5"),
    ("openai/gpt-6-sol", NOW_MS, 272_001, "4 15 0.4 5 10 10"),
    ("google/gemini-4-argon", NOW_MS + 9 * pomex.DAY_MS - 1, 5, "2 10 0.1 - - 14"),
    ("google/gemini-4-argon", NOW_MS + 9 * pomex.DAY_MS, 5, "4 20 0.2 - - 14"),        # 1 December 2026
    ("deepseek/deepseek-v4-pro", NOW_MS + 2 * 3_600_000, 5, "0.66 1.98 0.022 - - -"),  # Sunday
    ("deepseek/deepseek-v4-pro", NOW_MS + 26 * 3_600_000, 5, "1.32 3.96 0.044 - - -"),
    ("deepseek/deepseek-v4-pro", NOW_MS + 28 * 3_600_000, 5, "0.66 1.98 0.022 - - -"),
])
def test_a_price_follows_the_size_of_the_request_and_the_time_of_its_start(model, at_ms, tokens, price):
    assert pomex.builtin_schedules()[model].price(at_ms, tokens) == price


def test_every_row_has_as_many_long_values_as_base_values():
    for name, schedule in pomex.builtin_schedules().items():
        given = [word != "-" for word in schedule.base.split()]
        for text in (*filter(None, [schedule.long]), *(text for _, text in schedule.changes)):
            assert [word != "-" for word in text.split()] == given, name
        assert all(len(each.split()) == 6 and pomex.price_of(each) for each in filter(None, (schedule.base, schedule.long))), name
        assert all(0 < pomex.decimal.Decimal(number) <= 6 for factor in schedule.factors.values() for number in factor.split("/")), name
        assert not schedule.ends or pomex.datetime.date.fromisoformat(schedule.ends), name


@pytest.mark.parametrize("model, tokens, tiers, price", [
    ("openai/gpt-6.1-sol", 5, "default", "2 10 0.1 2.5 5 10"), ("openai/gpt-6.1-sol", 5, "priority", "4 20 0.2 5 10 10"),
    ("openai/gpt-6.1-sol", 5, "flex", "1 5 0.05 1.25 2.5 10"), ("openai/gpt-6.1-sol", 5, "ultrafast", "12 60 0.6 15 30 10"),
    ("openai/gpt-6.1-sol", 272_001, "priority", "8 30 0.4 10 20 10"), ("openai/gpt-6.1-sol", 5, "batch", "1 5 0.05 1.25 2.5 10"),
    ("openai/gpt-6.1-sol", 5, "priority geo", "4.4 22 0.22 5.5 11 10"), ("openai/gpt-6.1-sol", 5, "scale", "2 10 0.1 2.5 5 10"),
    ("openai/gpt-5.2", 5, "default geo", "1.75 14 0.175 - - 10"), ("openai/gpt-5.2", 5, "gov", "1.925 15.4 0.1925 - - 10"),
    ("openai/gpt-5.5", 5, "priority", "12.5 75 1.25 - - 10"), ("openai/gpt-4o-mini", 5, "priority", "0.25 1 0.125 - - 25"),
    ("google/gemini-3.1-pro-preview", 5, "flex", "1 6 0.2 - - 14"), ("google/gemini-2.5-pro", 5, "priority", "2.25 18 0.225 - - 35"),
    ("google/gemini-3.5-flash-lite", 5, "flex", "0.15 1.25 0.02 - - 14"), ("google/gemini-4-argon", 5, "standard", "2 10 0.1 - - 14"),
    ("anthropic/claude-opus-5-5", 5, "standard fast us", "8.8 44 0.44 11 17.6 10"),
    ("anthropic/claude-sonnet-5", 5, "priority us", "2.2 11 0.22 2.75 4.4 10"),
    ("anthropic/claude-sonnet-5", 5, "standard standard global", "2 10 0.2 2.5 4 10"),
])
def test_a_price_follows_what_the_answer_was_served_as(model, tokens, tiers, price):
    assert pomex.builtin_schedules()[model].price(NOW_MS, tokens, tiers) == price


def usage_in(answer):
    return pomex.usage_from(answer["usage"], answer)


SAID = {        # what an answer says, and what is read of it: searches, tier, model, cost
    "responses": (lambda: usage_in({"usage": {"input_tokens": 5}, "service_tier": "priority", "model": "gpt-6.1-sol-2026-09-01",
                                    "tool_usage": {"web_search": {"num_requests": 3}}}), (3, "priority", "gpt-6.1-sol-2026-09-01", "")),
    "responses, nothing said": (lambda: usage_in({"usage": {"input_tokens": 5}, "service_tier": "auto", "tool_usage": None}),
                                (0, "", "", "")),
    "responses, nonsense": (lambda: usage_in({"usage": {"input_tokens": 5, "cost": float("nan")}, "service_tier": {"a": 1},
                                              "tool_usage": {"web_search": [3]}, "model": None}), (0, "", "", "")),
    "chat": (lambda: usage_in({"usage": {"prompt_tokens": 5}, "service_tier": "Flex", "model": "m"}), (0, "flex", "m", "")),
    "chat, said twice": (lambda: usage_in({"usage": {"prompt_tokens": 5, "service_tier": "priority"}, "service_tier": "Priority"}),
                         (0, "priority", "", "")),
    "chat, xAI": (lambda: usage_in({"usage": {"prompt_tokens": 5, "server_side_tool_usage_details": {"web_search_calls": 2}}}),
                  (2, "", "", "")),
    "chat, OpenRouter": (lambda: usage_in({"usage": {"prompt_tokens": 5, "cost": 1.23e-5, "server_tool_use": {"web_search_requests": 1}},
                                           "model": "a/b"}), (1, "", "a/b", "0.000012300000")),
    "chat, a cost below nought": (lambda: usage_in({"usage": {"prompt_tokens": 5, "cost": -1}}), (0, "", "", "")),
    "messages": (lambda: pomex.messages_usage({"input_tokens": 5, "service_tier": "standard", "speed": "fast", "inference_geo": "us",
                                               "server_tool_use": {"web_search_requests": 4}, "model": "claude"}),
                 (4, "standard fast us", "claude", "")),
    "gemini 3": (lambda: pomex.gemini_usage({"promptTokenCount": 5, "serviceTier": "PRIORITY", "model": "gemini-3-flash-preview"},
                                            {"webSearchQueries": ["a", "b"]}), (2, "priority", "gemini-3-flash-preview", "")),
    "gemini 2.5": (lambda: pomex.gemini_usage({"promptTokenCount": 5, "trafficType": "ON_DEMAND_FLEX", "model": "gemini-2.5-pro"},
                                              {"webSearchQueries": ["a", "b"]}), (1, "flex", "gemini-2.5-pro", "")),
    "gemini, nothing said": (lambda: pomex.gemini_usage({"promptTokenCount": 5, "trafficType": "ON_DEMAND"}, {}), (0, "on_demand", "", "")),
}


@pytest.mark.parametrize("read, said", SAID.values(), ids=SAID)
def test_what_an_answer_says_of_its_cost_is_read(read, said):
    usage = read()
    assert (usage.web_searches, usage.tier, usage.model, usage.cost) == said and usage.input == 5


def read_by(decoder, *events):
    decoder.sink = sinks.View()
    return sinks.feed_all(decoder, events).usage


def test_a_paused_turn_of_anthropic_keeps_what_both_halves_say():
    decoder = pomex.MessagesDecoder(pomex.ToolMap([{"type": "web_search"}], searches=True))
    said = read_by(decoder, {"type": "message_start", "message": {"id": "1", "model": "claude-x", "usage": {"input_tokens": 5, "speed": "fast"}}},
                   {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                   {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hm"}},
                   {"type": "content_block_stop", "index": 0},
                   {"type": "message_delta", "delta": {"stop_reason": "pause_turn"},
                    "usage": {"output_tokens": 3, "server_tool_use": {"web_search_requests": 2}}})
    assert (said.input, said.output, said.web_searches, said.tier, said.model) == (5, 3, 2, "fast", "claude-x")
    assert decoder.paused
    decoder.paused = []
    said = read_by(decoder, {"type": "message_start", "message": {"id": "2", "model": "claude-x", "usage": {"input_tokens": 9, "speed": "fast"}}},
                   {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
                    "usage": {"output_tokens": 4, "server_tool_use": {"web_search_requests": 1}}})
    assert (said.input, said.output, said.web_searches, said.tier, said.model) == (14, 7, 3, "fast", "claude-x")


TEXT_OF_GEMINI = {"content": {"parts": [{"text": "hm"}]}, "groundingMetadata": {"webSearchQueries": ["a", "b"]}}
IN_PARTS = {    # streams whose events say each a part of it
    "chat": (lambda: pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"]),
             [{"model": "m", "service_tier": "priority", "choices": [{"delta": {"content": "hm"}}]},
              {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9, "cost": 0.5,
                                                                              "server_tool_use": {"web_search_requests": 2}}},
              {"model": "m", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}], (9, 4, 2, "priority", "m", "0.500000000000")),
    "gemini 3": (lambda: pomex.GeminiDecoder(pomex.ToolMap([])),
                 [{"modelVersion": "gemini-3-x", "candidates": [TEXT_OF_GEMINI], "usageMetadata": {"promptTokenCount": 9}},
                  {"candidates": [{"finishReason": "STOP"}]},
                  {"usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 4, "trafficType": "ON_DEMAND_PRIORITY"}}],
                 (9, 4, 2, "priority", "gemini-3-x", "")),
    "gemini 2": (lambda: pomex.GeminiDecoder(pomex.ToolMap([])),
                 [{"modelVersion": "gemini-2.5-pro", "candidates": [{**TEXT_OF_GEMINI, "finishReason": "STOP"}],
                   "usageMetadata": {"promptTokenCount": 9, "serviceTier": "flex"}},
                  {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 4, "serviceTier": "standard"}}],
                 (9, 4, 1, "flex", "gemini-2.5-pro", "")),
}


@pytest.mark.parametrize("made, events, said", IN_PARTS.values(), ids=IN_PARTS)
def test_what_one_event_says_of_the_cost_holds_when_a_later_one_is_silent(made, events, said):
    usage = read_by(made(), *events)
    assert (usage.input, usage.output, usage.web_searches, usage.tier, usage.model, usage.cost) == said


def price_table(text=""):
    providers = "".join(f'[providers.{name}]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:1/v1"\n' for name in ("azure", "local"))
    return pomex.PriceTable(pomex.load_config(providers + text, "pomex.toml", {}))


def test_a_configured_price_is_taken_as_it_is_written():
    prices = price_table('[prices."openai/gpt-5.5"]\ninput = 0.1\noutput = 1\n[prices."local/m"]\ninput = 0.000001\noutput = 0.2\n'
                  'cache_read = 0\nlong_over = 10\nlong_input = 7\nlong_output = 8\n')
    assert prices.schedule("openai", "gpt-5.5").price(NOW_MS, 5) == "0.1 1 - - - -"
    local = prices.schedule("local", "m")
    assert pomex.price_of(local.price(NOW_MS, 10)) == (1, 200_000, 0, 1, 1, 0, 0)
    assert pomex.price_of(local.price(NOW_MS, 11))[:2] == (7_000_000, 8_000_000)


@pytest.mark.parametrize("provider, model, asked, known", [
    ("openai", "gpt-5.5", "openai/gpt-5.5", True), ("azure", "deployment", "openai/gpt-5.5", False),
    ("azure", "deployment", "team/coder", True), ("demo", "echo", "demo/echo", True), ("local", "x", "local/x", False),
])
def test_what_has_no_price_is_not_guessed(provider, model, asked, known):
    schedule = price_table('[prices."team/coder"]\ninput = 1\noutput = 2\n').schedule(provider, model, asked)
    assert (schedule is not None) == known


@pytest.mark.parametrize("provider, model, same", [
    ("anthropic", "claude-opus-4-5-20251101", "anthropic/claude-opus-4-5"), ("openai", "gpt-5.5-2026-04-23", "openai/gpt-5.5"),
    ("anthropic", "claude-haiku-4-5-latest", "anthropic/claude-haiku-4-5"), ("local", "m-2026-01-31", "local/m"),
    ("google", "gemini-flash-latest", "google/gemini-flash-latest"), ("openai", "gpt-5.5-pro-20260423", "openai/gpt-5.5-pro"),
    ("openai", "gpt-5.5-2026-04-23-x", None), ("openai", "gpt-5.5-20269", None), ("openai", "gpt-5.5-mini", None),
    ("openai", "gpt-5.5-99990101", None), ("azure", "gpt-5.5-2026-04-23", None), ("openai", "latest", None),
])
def test_a_dated_or_latest_name_has_the_price_of_its_family(provider, model, same):
    prices = price_table('[prices."local/m"]\ninput = 1\noutput = 2\n')
    schedule = prices.schedule(provider, model)
    assert schedule == (prices.known[same] if same else None)
    assert schedule is None or schedule.source.startswith(same + " in ")


def test_a_price_of_its_own_goes_before_its_familys_and_any_price_before_free():
    prices = price_table('[prices."openai/gpt-5.5-2026-04-23"]\ninput = 1\noutput = 2\n[prices."spare/m"]\ninput = 3\noutput = 4\n'
                  '[providers.spare]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:1/v1"\nfree = true\n')
    assert prices.schedule("openai", "gpt-5.5-2026-04-23").base.startswith("1 2 ")
    assert prices.schedule("spare", "m").base.startswith("3 4 ") and prices.schedule("spare", "m-latest").base.startswith("3 4 ")
    assert prices.schedule("spare", "other").base == pomex.FREE and prices.schedule("local", "other") is None


@pytest.mark.parametrize("text, words", [
    ('[prices."x/y"]\ninput = "1"', "must be an amount"), ('[prices."x/y"]\ninput = 0.0000001', "at most six decimals"),
    ('[prices."x/y"]\ninput = -1', "must be"), ('[prices."xy"]\ninput = 1', "must be like"),
    ('[prices."x/y"]\nin = 1', "Known keys: input, output"), ('[prices."x/y"]\nlong_over = 5\ninput = 1\noutput = 1', "needs long_input"),
    ('[prices."x/y"]\ninput = 1', "needs input and output"), ('[prices."x/y"]\noutput = 1', "0 is free"),
    ('[prices."x/y"]\ninput = nan', "its value must be between 0 and 100000."),
])
def test_a_wrong_price_is_told_with_its_place(text, words):
    with pytest.raises(pomex.ConfigError, match=re.escape(words)) as told:
        pomex.load_config(text, "pomex.toml", {})
    assert re.match(r'pomex\.toml: .*"xy?/?y"', str(told.value))     # the file, and the table or the model that it is for


# --- the ledger -----------------------------------------------------------------------------------

def test_sums_follow_their_rows_once_and_attempts_that_were_given_up_are_among_them(ledger):
    usual = used("r1", attempt=2, provider="openai", input=1000, cached=400, output=50, price="2 10 0.2 - - -",
                 cost_nanos=1_780_000, saved_nanos=720_000)
    for _ in range(2):          # as after a crash: the second time nothing is added
        settled(ledger, [given_up("r1"), usual], [used("r2", status="failed", result="failed", estimated="why")])
    assert totals(ledger) == {"requests": 2, "input": 1010, "cached": 400, "cache_write": 0, "output": 55, "reasoning": 0,
                              "cost_nanos": 1_850_000}
    by_provider = {row["provider"]: (row["requests"], row["failed"], row["estimated"], row["cost_nanos"], row["saved_nanos"])
                   for row in run(pomex.usage_report(ledger.db, "provider", 0, 10**6))}
    assert by_provider == {"openai": (1, 0, 0, 1_780_000, 720_000), "azure": (0, 0, 0, 70_000, 0), "": (1, 1, 1, 0, 0)}
    assert sound(ledger, 3)

    async def exported(since_ms):
        return [(row["response_id"], row["status"], row["cost_nanos"]) async for row in pomex.rows_in_pages(ledger.db, since_ms)]
    assert run(exported(NOW_MS)) == [("r1", "lost", 70_000), ("r1", "completed", 1_780_000), ("r2", "failed", 0)]
    assert run(exported(NOW_MS + 1)) == []


def test_what_a_request_truly_cost_takes_the_endpoint_of_a_guess_in_every_sum_and_never_the_other_way_round(ledger):
    key_made(ledger, "k", NOW, budget_nanos=NANO)
    limit, = pomex.limits_of(key_of(ledger, "k"), NOW_MS // pomex.DAY_MS)
    ledger.db.commit(lambda tx: pomex.spent_and_granted(tx, limit))
    guess = pomex.interrupted(used("r1", provider="openai", input=100, price="1 1 - - - -", cost_nanos=100_000))
    true = used("r1", attempt=2, provider="openai", input=90, output=10, price="1 1 - - - -", cost_nanos=100_000)
    for rows, requests, failed, cost in (([guess], 1, 1, 100_000), ([given_up("r1"), true], 1, 0, 170_000),
                                         ([guess], 1, 0, 170_000), ([true], 1, 0, 170_000)):
        settled(ledger, rows)
        report, = run(pomex.usage_report(ledger.db, "key", 0, 10**6))
        assert (report["requests"], report["failed"], report["cost_nanos"]) == (requests, failed, cost)
        assert read(ledger, "SELECT spent FROM meters") == [(cost,)] and run(pomex.verify(ledger.db))[1] == []
    assert [row["attempt"] for row in recent(ledger, 9)] == [2]


@pytest.mark.parametrize("spoil, said", [
    ("UPDATE usage SET cost_nanos = cost_nanos + 1", "its price and tokens give"),
    ("UPDATE usage SET cached = input + 1, price = ''", "contradict"),
    ("UPDATE usage SET price = 'x y'", "give -1"),
    ("DELETE FROM usage", "the sums differ from the rows"),
    ("UPDATE usage SET started_ms = started_ms - 86400000", "the sums differ from the rows"),
    ("UPDATE usage_rollups SET cost_nanos = 0", "the sums differ from the rows"),
    ("UPDATE usage_rollups SET requests = 2", "the sums differ from the rows"),
    ("DELETE FROM usage_rollups", "the sums differ from the rows"),
    ("UPDATE meters SET spent = spent - 1 WHERE owner = 'key 1'", "key 1: its limit counts another sum"),
    ("UPDATE meters SET spent = 0 WHERE owner = 'account 1'", "account 1: its limit counts another sum"),
    ("UPDATE meters SET since_day = since_day + 30 WHERE owner = 'key 1'", "key 1: its limit counts another sum"),
])
def test_verify_finds_what_was_changed(ledger, spoil, said):
    change(ledger, "UPDATE accounts SET limit_nanos = 1")
    key_made(ledger, "k", NOW, budget_nanos=NANO, concurrent=5)
    for limit in pomex.limits_of(key_of(ledger, "k"), NOW_MS // pomex.DAY_MS):
        ledger.db.commit(lambda tx: pomex.spent_and_granted(tx, limit))
    insert(ledger, [used("r1", input=9, output=1, price="1 1 - - - -", cost_nanos=10_000)])
    assert sound(ledger, 1) and len(read(ledger, "SELECT * FROM meters")) == 3
    assert change(ledger, spoil) == 1
    assert any(said in wrong for wrong in run(pomex.verify(ledger.db))[1])


def test_a_balance_is_the_sum_of_credits_less_what_was_spent(ledger):
    run(account_made(ledger, "acme", True, None, 1_200_000, NOW))
    run(pomex.add_credit(ledger, "acme", 5 * NANO, "", NOW))
    run(pomex.add_credit(ledger, "acme", -1 * NANO, "double payment", NOW))
    insert(ledger, [used("r1", account_id=2, cost_nanos=NANO),
                    used("r2", account_id=2, started_ms=NOW_MS - 40 * pomex.DAY_MS, cost_nanos=7)])
    account = run(pomex.list_accounts(ledger.db, NOW))[1]
    assert tuple(account[name] for name in ("name", "credit_nanos", "spent_nanos", "month_nanos")) == ("acme", 4 * NANO, NANO + 7, NANO)
    for made, words in ((pomex.add_credit(ledger, "nobody", 1, "", NOW), "no account named nobody"),
                        (pomex.add_credit(ledger, "no\0body", 1, "", NOW), "no account named no"),
                        (pomex.add_credit(ledger, "acme", 0, "", NOW), "must not be 0"),
                        (pomex.add_credit(ledger, "acme", -1, "", NOW), "needs its reason"),
                        (account_made(ledger, "acme", False, None, pomex.ONE, NOW), "already")):
        with pytest.raises(pomex.BadRequest, match=words):
            run(made)
    assert read(ledger, "SELECT kind, nanos FROM credits") == [("top-up", 5 * NANO), ("adjustment", -NANO)]


def test_a_statements_lines_add_up_to_the_cent(ledger):
    rows = [used(f"r{n}", model=f"m{n}", input=1, cost_nanos=3_333_333) for n in range(3)]
    insert(ledger, [*rows, used("old", started_ms=NOW_MS - 40 * pomex.DAY_MS, cost_nanos=NANO)])
    run(pomex.add_credit(ledger, "default", 2 * NANO, "", NOW - 40 * 86400))
    first, last = pomex.month_bounds("2026-11")
    bill = run(pomex.statement_rows(ledger.db, 1, first, last))
    assert (bill["before_nanos"], bill["spent_nanos"], bill["after_nanos"]) == (NANO, 9_999_999, NANO - 9_999_999)
    cents = pomex.round_preserving_sum([row["cost_nanos"] for row in bill["charges"]], 10**7)
    assert sum(cents) == 1 and sorted(cents) == [0, 0, 1]
    for parts in ([-5, 7, 13], [0], [], [10**7] * 3, [4, 4, 4, -12], [-10_000_001, 5_000_000]):
        assert sum(pomex.round_preserving_sum(parts, 10)) == (sum(parts) + 5) // 10


def test_pruning_removes_rows_and_keeps_every_sum_and_balance(ledger):
    old, new = NOW_MS - 3 * pomex.DAY_MS, NOW_MS
    change(ledger, "UPDATE accounts SET prepaid = 1")
    key_made(ledger, "k", NOW, budget_nanos=NANO)
    limits = pomex.limits_of(key_of(ledger, "k"), new // pomex.DAY_MS)
    insert(ledger, [given_up("r1", started_ms=old), used("r2", started_ms=new),
                    used("r1", attempt=2, started_ms=old, price="provider 0.000000005", cost_nanos=5)])
    assert [ledger.db.commit(lambda tx: pomex.spent_and_granted(tx, limit)) for limit in limits] == [(70_005, 0)] * 2
    first, last = pomex.month_bounds("2026-11")

    def shown():
        return (totals(ledger), run(pomex.list_accounts(ledger.db, NOW)), run(pomex.statement_rows(ledger.db, 1, first, last)),
                run(pomex.key_rows(ledger, NOW)), read(ledger, "SELECT * FROM meters"))
    before = shown()
    assert run(pomex.prune(ledger, new // pomex.DAY_MS)) == 2
    assert shown() == before and sound(ledger, 1) and run(pomex.prune(ledger, old // pomex.DAY_MS)) == 0 and sound(ledger, 1)
    change(ledger, "DELETE FROM meters")            # one that is made after pruning is made of the sums
    assert [ledger.db.commit(lambda tx: pomex.spent_and_granted(tx, limit)) for limit in limits] == [(70_005, 0)] * 2


@of_a_file
def test_a_backup_is_a_whole_file_for_its_user_alone_and_overwrites_nothing(ledger, path):
    insert(ledger, [used("r1"), used("r2")])
    copy = path + "-copy"
    ledger.db.copy(copy)
    assert os.stat(copy).st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT sum(requests) FROM usage_rollups").fetchone() == (2,)
    with pytest.raises(pomex.LedgerError, match="File exists"):
        ledger.db.copy(copy)
    assert sorted(os.listdir(os.path.dirname(path))) == sorted({"pomex.db", "pomex.db-wal", "pomex.db-shm", "pomex.db-copy"})


@of_a_file
@pytest.mark.parametrize("left", [True, False], ids=["one of a run before", "none"])
def test_a_backup_that_fails_leaves_no_half_file_and_can_be_made_again(ledger, path, left, monkeypatch):
    class Full(sqlite3.Connection):
        def backup(self, target, **more):
            target.execute("CREATE TABLE half (x)")
            raise sqlite3.OperationalError("database or disk is full")
    copy = path + "-copy"
    if left:
        open(copy + ".part", "w").close()
    with monkeypatch.context() as full, contextlib.closing(sqlite3.connect(path, factory=Full)) as db:
        full.setattr(ledger.db, "reader", db)
        with pytest.raises(pomex.LedgerError, match="full"):
            ledger.db.copy(copy)
    assert not [name for name in os.listdir(os.path.dirname(path)) if "copy" in name]
    ledger.db.copy(copy)
    assert os.path.getsize(copy) > 4096


def test_after_pruning_everything_new_rows_are_counted_and_shown(ledger):
    old = NOW_MS - 9 * pomex.DAY_MS
    insert(ledger, [used(f"old{n}", started_ms=old) for n in range(40)])
    newest = read(ledger, "SELECT max(id) FROM usage")[0][0]
    assert run(pomex.prune(ledger, NOW_MS // pomex.DAY_MS)) == 40 and recent(ledger, 9) == []
    insert(ledger, [used(f"new{n}") for n in range(30)])
    assert read(ledger, "SELECT min(id) FROM usage")[0][0] > newest         # who watches asks for the ids after the last one seen
    shown = run(pomex.overview(ledger.db, NOW_MS, pomex.HALF_HOUR_MS, 1, NOW, 0))
    assert shown["totals"]["requests"] == 30 and len(run(pomex.usage_rows(ledger.db, "1 = 1", [], 100))) == 30
    assert totals(ledger)["requests"] == 70 and sound(ledger, 30)


# --- keys -----------------------------------------------------------------------------------------

def test_a_keys_settings_hold_at_once_and_in_other_processes_within_a_second(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await account_made(ledger, "paid", True, None, pomex.ONE, NOW)
            token = await ledger.create_key("ci", NOW, budget_nanos=NANO, period="week", models="openai/* demo/echo", rpm=5)
            assert (await other.authorise(f"Bearer {token}", NOW)).rpm == 5
            await ledger.edit_key("ci", rpm=7, models="", budget_nanos=None, account_id=2)
            edited = await ledger.authorise(f"Bearer {token}", NOW)
            assert (edited.rpm, edited.models, edited.budget_nanos, edited.money_limited, edited.prepaid) == (7, "", None, True, 1)
            await until(lambda: key_of(other, "ci") == edited, within_s=2 * pomex.KEYS_POLL_S)
            assert await other.authorise(f"Bearer {token}", NOW) == edited
            await ledger.revoke_key("ci", NOW)
            with pytest.raises(pomex.Unauthorized, match="was revoked"):
                await ledger.authorise(f"Bearer {token}", NOW)
            await until(lambda: key_of(other, "ci").revoked_s, within_s=2 * pomex.KEYS_POLL_S)
    run(check())


@pytest.mark.parametrize("models, model, allowed", [
    ("", "a/b", True), ("openai/*", "openai/gpt", True), ("openai/*", "azure/gpt", False), ("x/y openai/*", "x/y", True),
    ("openai/gpt-?", "openai/gpt-55", False),
])
def test_a_key_may_use_the_models_of_its_patterns(ledger, models, model, allowed):
    key_made(ledger, "k", models=models)
    assert key_of(ledger, "k").may_use(model) == allowed


# --- limits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("period, start, end", [
    ("day", "2026-11-22", "2026-11-23"), ("week", "2026-11-16", "2026-11-23"), ("month", "2026-11-01", "2026-12-01"),
    ("total", "1970-01-01", "1970-01-01"),
])
def test_periods_begin_and_end_with_days_of_utc(period, start, end):
    assert [pomex.day_text(day) for day in pomex.period_bounds(period, NOW + 86399)] == [start, end]


PRICES = pomex.PriceTable(pomex.load_config("[prices.\"p/m\"]\ninput = 1\noutput = 10\n", "pomex.toml", {}))
TARGETS = [(pomex.ProviderConfig("p", wire_api="chat"), "m")]
NAMED = {"request_id": "req", "endpoint": "/v1/responses", "session": "s", "client": "c"}


def reservation_for(ledger, name, response_id="r", at_s=None):
    return pomex.Reservation(PRICES, ledger, key_of(ledger, name), response_id, "p/m", int((at_s or time.time()) * 1000), NAMED)


async def reserve(reservation, input_tokens=1000, wanted=0, most=16384):
    return await reservation.reserve(TARGETS, input_tokens, wanted, most)


async def settle(reservation, usage):
    await reservation.settle(reservation.row("p", "m", usage, attempt=1, result="completed"))


async def everywhere(ledgers):
    """Every ledger knows the keys of each other."""
    for ledger in ledgers:
        await ledger.refresh()


def granted(ledger):
    return read(ledger, "SELECT coalesce(sum(granted), 0) FROM meters")[0][0]


def meters(ledger):
    return read(ledger, "SELECT owner, spent, granted FROM meters ORDER BY owner")


TIERED = """
[providers.openai]
api_key = "k"
[providers.europe]
wire_api = "responses"
base_url = "https://eu.api.openai.com/v1"
api_key = "k"
[prices."europe/m"]
input = 1
output = 10
tiers = { priority = 2, geo = 1.1 }
[providers.google]
api_key = "k"
[providers.anthropic]
api_key = "k"
"""


@pytest.mark.parametrize("target, asked, said, price", [
    ("openai/gpt-6.1-sol", "", "", "2 10 0.1 2.5 5 10"), ("openai/gpt-6.1-sol", "priority", "default", "2 10 0.1 2.5 5 10"),
    ("openai/gpt-6.1-sol", "auto", "priority", "4 20 0.2 5 10 10"), ("openai/gpt-6.1-sol", "priority", "", "4 20 0.2 5 10 10"),
    ("openai/gpt-6.1-sol", "fast", "", "4 20 0.2 5 10 10"), ("openai/gpt-6.1-sol", "flex", "", "2 10 0.1 2.5 5 10"),
    ("openai/gpt-6.1-sol", "flex", "flex", "1 5 0.05 1.25 2.5 10"), ("openai/gpt-6.1-sol", "ultrafast", "", "12 60 0.6 15 30 10"),
    ("openai/gpt-6.1-sol", "ultrafast", "priority", "4 20 0.2 5 10 10"), ("europe/m", "", "", "1.1 11 - - - -"),
    ("europe/m", "priority", "priority", "2.2 22 - - - -"), ("google/gemini-4-argon", "priority", "", "2 10 0.1 - - 14"),
    ("google/gemini-4-argon", "", "priority", "3.6 18 0.18 - - 14"), ("anthropic/claude-opus-4-8", "speed fast", "", "10 50 1 12.5 20 10"),
    ("anthropic/claude-opus-4-8", "fast", "", "5 25 0.5 6.25 10 10"),
])
def test_the_answer_says_what_it_is_billed_as_and_where_it_does_not_the_dearer_holds(ledger, target, asked, said, price):
    """Reserved is before an answer: the dearer of the standard tier and of the one asked for. Gemini is not asked for any."""
    prices = pomex.PriceTable(pomex.load_config(TIERED, "pomex.toml", {}))
    key_made(ledger, "k")
    reservation = pomex.Reservation(prices, ledger, key_of(ledger, "k"), "r", target, NOW_MS, NAMED, asked)
    assert reservation.price(*target.split("/"), Usage(10, tier=said)) == price


def test_the_providers_own_cost_is_taken_where_there_is_no_price(ledger):
    key_made(ledger, "k")
    reservation = pomex.Reservation(PRICES, ledger, key_of(ledger, "k"), "r", "p/other", NOW_MS, NAMED)
    for model, price, nanos in (("other", "provider 0.012300000000", 12_300_000), ("m", "1 10 - - - -", 10_000)):
        row = reservation.row("p", model, Usage(10, cost="0.012300000000"))
        assert (row.price, row.cost_nanos, row.input) == (price, nanos, 10)
    assert pomex.cost_nanos("provider 0.0123", 1_200_000, Usage(10**6)) == 14_760_000
    line = {"price": "provider 0.0123", "input": 10, "cached": 0, "cache_write": 0, "cache_write_1h": 0, "output": 5, "reasoning": 0, "web_searches": 0,
            "multiplier": pomex.ONE}
    assert [(part["what"], part["nanos"]) for part in pomex.cost_parts(line) if part["nanos"]] == [("as the provider says", 12_300_000)]


BUDGET = 50 * 11_000_000        # for fifty of 1000 in and 1000 out
MONEY = {                       # an account's prepaid and limit, a key's settings
    "a key's budget": ((False, None), {"budget_nanos": BUDGET}), "an account's limit": ((False, BUDGET), {}),
    "prepaid credit": ((True, None), {}), "all of them": ((True, BUDGET), {"budget_nanos": BUDGET}),
}


@pytest.mark.parametrize("account, settings", MONEY.values(), ids=MONEY)
def test_many_at_once_over_several_ledgers_never_exceed_their_money_and_nothing_stays_granted(path, account, settings):
    async def check():
        async with started(path, 4) as ledgers:
            first, over = ledgers[0], []
            await account_made(first, "acme", *account, pomex.ONE, NOW)
            await pomex.add_credit(first, "acme", BUDGET, "", NOW)
            await first.create_key("k", NOW, account_id=2, **settings)
            await everywhere(ledgers)
            insert(first, [used("before", started_ms=int(time.time() * 1000), account_id=2, price="provider 0.11",
                                cost_nanos=110_000_000)])

            def look():
                over.extend(read(first, "SELECT * FROM meters WHERE spent + granted > ? OR granted < 0", BUDGET))

            async def watch():
                while True:
                    look()
                    await asyncio.sleep(0)

            async def one(number):
                ledger = ledgers[number % 4]
                reservation = reservation_for(ledger, "k", f"r{number}")
                try:
                    most = await reserve(reservation, 1000, 1000)
                except pomex.LimitExceeded as no:
                    assert no.limit.unit == "nanos"
                    return 0
                look()
                await asyncio.sleep(0.001 * (number % 7))
                await settle(reservation, Usage(1000, output=min(most or 1000, 200 + number * 37 % 801)))
                look()
                return 1
            watching = asyncio.create_task(watch())
            served = 0
            while more := sum(await asyncio.gather(*(one(served * 1000 + number) for number in range(200)))):
                served += more
            watching.cancel()
            assert over == [] and served >= 40
            assert BUDGET - 12_000_000 < totals(first)["cost_nanos"] <= BUDGET
            assert granted(first) == 0 and under_way(first) == [] and not any(ledger.pending for ledger in ledgers)
            assert await pomex.verify(first.db) == (served + 1, [])
    run(check())


def test_a_budget_has_its_own_period_an_accounts_limit_is_a_months_and_credit_has_no_end(ledger):
    run(account_made(ledger, "acme", True, 7, pomex.ONE, NOW))
    key_made(ledger, "k", budget_nanos=5, period="day", account_id=2, concurrent=3, rpm=4, tpm=6)
    today, month = NOW_MS // pomex.DAY_MS, NOW_MS // pomex.DAY_MS - 21
    assert [(limit.owner, limit.unit, limit.maximum, limit.since_day) for limit in pomex.limits_of(key_of(ledger, "k"), today)] == [
        ("key 1", "nanos", 5, today), ("account 2", "nanos", 0, 0), ("account 2", "nanos", 7, month),
        ("key 1 open", "open", 3, 0), ("key 1 requests", "requests", 4, 0), ("key 1 tokens", "tokens", 6, 0)]


def test_what_is_spent_in_a_period_counts_in_that_one_alone(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=11_000_000, period="day")
            insert(ledger, [used("the day before", started_ms=NOW_MS - 1, cost_nanos=11_000_000)])
            late = reservation_for(ledger, "k", "r1", NOW + 86399)
            assert await reserve(late, 1000, 1000) == 0
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservation_for(ledger, "k", "r2", NOW + 1), 1000, 1000)
            await reserve(reservation_for(ledger, "k", "r3", NOW + 86400), 1000, 1000)         # the next day
            await settle(late, Usage(1000, output=1000))                                       # is still one of its own day
            assert read(ledger, "SELECT since_day, spent, granted FROM meters ORDER BY since_day") == [
                (NOW_MS // pomex.DAY_MS, 11_000_000, 0), (NOW_MS // pomex.DAY_MS + 1, 0, 11_000_000)]
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservation_for(ledger, "k", "r4", NOW + 2), 1000, 1000)
    run(check())


# --- limits a minute

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for its `pass_s`."""
    class Clock:
        ns = NOW_MS * 10**6

        def pass_s(self, seconds):
            self.ns += round(seconds * NANO)
    clock = Clock()
    monkeypatch.setattr(pomex.time, "time_ns", lambda: clock.ns)
    monkeypatch.setattr(pomex.PostgresTransaction, "now_ns", lambda _: clock.ns)
    return clock


async def allowed(ledgers, numbers):
    """Reserves at once over all ledgers: (how many there was room for, the refusals)."""
    reservations = [reservation_for(ledgers[n % len(ledgers)], "k", f"r{n}") for n in numbers]
    results = await asyncio.gather(*(reserve(each, 10, 0, 100) for each in reservations), return_exceptions=True)
    refused = [each for each in results if isinstance(each, pomex.LimitExceeded)]
    assert len(refused) + results.count(0) == len(results), results
    return results.count(0), refused


def test_a_rate_holds_over_ledgers_and_says_when_to_come_again(path, clock):
    async def check():
        async with started(path, 4) as ledgers:
            await ledgers[0].create_key("k", NOW, rpm=10, tpm=1_000_000, concurrent=50)
            await everywhere(ledgers)
            number, refused = await allowed(ledgers, range(40))
            assert number == 10 and len(refused) == 30
            assert {(no.limit.unit, no.wait_s) for no in refused} == {("requests", 6.0)}
            told = pomex.limit_error(key_of(ledgers[0], "k"), refused[0], NOW, False)
            assert (told.status, told.code, dict(told.headers)["retry-after"]) == (429, "rate_limit_exceeded", "6")
            for passed_s, room in ((5.999, 0), (0.001, 1), (0, 0), (15, 2), (3, 1), (120, 10), (0, 0)):
                clock.pass_s(passed_s)
                assert (await allowed(ledgers, range(clock.ns, clock.ns + 20)))[0] == room, passed_s
            clock.pass_s(6)
            last = reservation_for(ledgers[0], "k", "last")
            await reserve(last, 10, 0, 100)
            headers = dict(last.headers())
            assert [headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")] == ["10", "0", "60s"]
            assert headers["x-ratelimit-limit-tokens"] == "1000000" and re.fullmatch(r"\ds", headers["x-ratelimit-reset-tokens"])
            assert 990_000 < int(headers["x-ratelimit-remaining-tokens"]) < 1_000_000
            assert granted(ledgers[0]) == 10 + 1 + 2 + 1 + 10 + 1          # places of open requests; a rate has none
    run(check())


def test_a_stream_of_minutes_is_charged_as_it_writes_and_ends_when_its_tokens_a_minute_are_used_up(path, clock):
    async def written_s(reservation, tokens_a_second, seconds):
        """How long it may go on."""
        for second in range(1, seconds + 1):
            clock.pass_s(1)
            if not await reservation.extend(4 * tokens_a_second * second):
                return second
            ahead = reservation.reserved_output - tokens_a_second * second
            assert 0 <= ahead <= 16_384 or tokens_a_second > 1000
        return seconds

    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, tpm=60_000)
            slow = reservation_for(ledger, "k", "slow")
            await reserve(slow)
            assert await written_s(slow, 500, 300) == 300 and 150_000 <= slow.reserved_output <= 150_000 + 2 * pomex.RESERVED_STEP
            await settle(slow, Usage(1000, output=150_000))
            clock.pass_s(5)             # half of the rate was left all the time: it is all there again soon
            fast = reservation_for(ledger, "k", "fast")
            await reserve(fast)
            assert fast.headers()[1] == ("x-ratelimit-remaining-tokens", str(60_000 - 1000 - 4096))
            seconds = await written_s(fast, 2000, 300)
            assert 50 <= seconds <= 60 and not await fast.extend(4 * fast.reserved_output)
            assert 100_000 < fast.reserved_output <= 60_000 + 1000 * seconds - 1000
            await settle(fast, Usage(1000, output=2000 * seconds))
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "next"), 10_000, 1)
            assert no.value.limit.unit == "tokens" and 0 < no.value.wait_s <= 60
            clock.pass_s(no.value.wait_s)
            assert await reserve(reservation_for(ledger, "k", "next"), 10_000, 1) == 0
    run(check())


def test_tokens_that_were_reserved_and_not_used_are_there_again_and_more_than_a_minutes_pass_alone(path, clock):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, tpm=10_000)
            for number in range(20):
                reservation = reservation_for(ledger, "k", f"r{number}")
                await reserve(reservation, 1000, 4000)
                assert reservation.headers()[1] == ("x-ratelimit-remaining-tokens", str(10_000 - 200 * number - 5000))
                await settle(reservation, Usage(100, output=100))
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "large"), 50_000, 1)
            assert no.value.wait_s == pytest.approx(24, abs=0.1)        # until nothing of the 20 times 200 is left
            clock.pass_s(25)
            large = reservation_for(ledger, "k", "large")
            await reserve(large, 50_000, 1)
            await settle(large, Usage(50_000, output=1))
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "after"), 100, 1)
            assert 0 < no.value.wait_s <= 1
    run(check())


def test_a_rate_still_holds_after_requests_that_used_more_than_they_had_reserved(path, clock):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, tpm=10_000)
            reservations = [reservation_for(ledger, "k", f"r{number}") for number in range(5)]
            for reservation in reservations:
                await reserve(reservation, 10, 90)
            for reservation in reservations:            # thoughts that nobody saw
                await settle(reservation, Usage(10, output=50_000, reasoning=49_000))
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "next"), 10, 90)
            assert 60 <= no.value.wait_s <= 300
    run(check())


@pytest.mark.parametrize("back_s", [5, 3600, 10**8], ids=["a little", "an hour", "years"])
def test_a_clock_that_was_set_back_refuses_for_no_longer_than_a_minute(path, clock, back_s):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, rpm=10, tpm=100_000)
            assert (await allowed([ledger], range(11)))[0] == 10
            clock.pass_s(-back_s)
            number, refused = await allowed([ledger], range(100, 111))
            assert all(0 < no.wait_s <= 60 for no in refused)
            clock.pass_s(refused[0].wait_s)
            assert (await allowed([ledger], range(200, 211)))[0] == 1
            clock.pass_s(60)
            assert (await allowed([ledger], range(300, 311)))[0] == 10
    run(check())


# --- limits on requests under way

def test_open_requests_are_counted_over_ledgers_and_their_place_is_free_again(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await ledger.create_key("k", NOW, concurrent=2)
            await everywhere([ledger, other])
            reservations = [reservation_for(each, "k", f"r{n}") for n, each in enumerate((ledger, other, ledger, other))]
            for reservation in reservations[:2]:
                await reserve(reservation)
            for reservation in reservations[2:]:
                with pytest.raises(pomex.LimitExceeded) as no:
                    await reserve(reservation)
                assert no.value.limit.unit == "open" and no.value.remaining == 0
                told = pomex.limit_error(key_of(ledger, "k"), no.value, NOW, False)
                assert (told.status, str(told)) == (429, "Key k may have 2 requests open at once. Please try again in 1s.")
            await settle(reservations[0], Usage(10))
            await reserve(reservations[2])              # at once where the place became free
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservations[3])
            await settle(reservations[1], Usage(10))
            await reserve(reservations[3])
            assert granted(ledger) == 2
            for reservation in reservations[2:]:
                await settle(reservation, Usage(10))
            assert granted(ledger) == 0 and await pomex.verify(ledger.db) == (4, [])
    run(check())


def test_where_one_limit_has_no_room_nothing_is_taken_from_the_others(path, clock):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO, rpm=10, concurrent=10, tpm=1500)
            first = reservation_for(ledger, "k", "r1")
            await reserve(first, 500, 0, 500)

            def shown():
                return read(ledger, "SELECT owner, granted FROM meters"), read(ledger, "SELECT * FROM rates"), under_way(ledger)
            before = shown()
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "r2"), 500, 500)
            assert no.value.limit.unit == "tokens" and shown() == before
            assert before[0] == [("key 1", 5_500_000), ("key 1 open", 1)]
            assert not await first.extend(4 * 500) and shown() == before
    run(check())


def test_an_answer_is_cut_short_by_what_is_reserved_now_not_by_what_was(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await ledger.create_key("k", NOW, budget_nanos=200_000_000)
            await everywhere([ledger, other])
            first = reservation_for(ledger, "k", "r1")
            await reserve(first, 1000, 16384)
            assert await reserve(reservation_for(other, "k", "r2"), 30_000) == 516
            await settle(first, Usage(1000))
            assert await reserve(reservation_for(other, "k", "r3"), 30_000) == 13_384         # all that is left now
    run(check())


def test_money_for_less_output_lowers_the_cap_and_for_too_little_refuses(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=31_000_000)
            first = reservation_for(ledger, "k", "r1")
            assert await reserve(first) == 3000         # 1 + 30 thousandths of a dollar
            assert await first.extend(4 * 3000) and first.max_output_tokens == 3000
            with pytest.raises(pomex.LimitExceeded) as no:
                await reserve(reservation_for(ledger, "k", "r2"))
            told = pomex.limit_error(key_of(ledger, "k"), no.value, NOW, True)
            assert (told.code, told.ledger_code, told.headers) == (
                "invalid_prompt", "insufficient_quota", (("x-should-retry", "false"),))
            await settle(first, Usage(1000, output=1000))
            assert await reserve(reservation_for(ledger, "k", "r3")) == 1900
    run(check())


def test_a_cap_on_the_answer_is_none_on_the_money_where_thoughts_come_on_top(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=31_000_000)
            reservation = reservation_for(ledger, "k")
            await reserve(reservation, 1000, 1025)
            assert await reservation.extend(4 * 1025) and reservation.reserved_output == 1025
            assert await reservation.extend(4 * 1100) and reservation.reserved_output > 1100
            assert not await reservation.extend(4 * 3001)
    run(check())


def test_a_reservation_grows_with_the_output_until_the_money_ends(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=100_000_000)             # 10,000 tokens of output
            reservation = reservation_for(ledger, "k")
            await reserve(reservation, 0, 0, 1000)
            held = []
            for tokens in range(0, 12_000, 100):
                if not await reservation.extend(tokens * 4):
                    break
                held.append(reservation.reserved_output)
                assert granted(ledger) == reservation.reserved_output * 10_000 <= 100_000_000
            assert held[0] == 5096 and reservation.reserved_output == 10_000 and tokens == 10_000
            await settle(reservation, Usage(0, output=9900))
            assert meters(ledger) == [("key 1", 99_000_000, 0)]
    run(check())


def test_an_attempt_that_was_given_up_counts_against_every_limit(path, clock):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO, tpm=10_000)
            reservation = reservation_for(ledger, "k", at_s=NOW)
            await reserve(reservation, 100, 900)
            reservation.add_failed_attempt(1, "p", "m", Usage(), "server_error")                    # of which nothing is billed
            reservation.add_failed_attempt(1, "p", "m", Usage(4000, output=1000, estimated=True), "server_error")
            await reservation.settle(reservation.row("p", "m", Usage(100, output=900), attempt=2, result="failed over"))
            row, = lost(ledger)
            assert [row[name] for name in ("status", "error_code", "result", "session", "client", "request_id", "estimated")] == [
                "lost", "server_error", "failed over", "s", "c", "req", "no count from the provider"]
            assert meters(ledger) == [("key 1", 14_000_000 + 9_100_000, 0)]
            next_one = reservation_for(ledger, "k", "r2", NOW)
            await reserve(next_one, 100, 900)
            assert next_one.headers()[1] == ("x-ratelimit-remaining-tokens", str(10_000 - 6000 - 1000))
            assert await pomex.verify(ledger.db) == (2, [])
    run(check())


# --- what a caller, or a whole process, leaves behind

@pytest.mark.parametrize("settings", [{"budget_nanos": NANO}, {"concurrent": 1}, {"tpm": 100_000}], ids=str)
@pytest.mark.parametrize("meanwhile", ["the database is busy", "it is written"])
def test_a_caller_who_is_cancelled_while_it_reserves_leaves_nothing_granted(path, settings, meanwhile):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, **settings)
            with locked(path) if meanwhile == "the database is busy" else contextlib.nullcontext():
                reserving = asyncio.create_task(reserve(reservation_for(ledger, "k")))
                await asyncio.sleep(0.05 if meanwhile == "the database is busy" else 0)
                reserving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reserving
            await ledger.commit(lambda tx: None)          # behind what it had asked for
            await until(lambda: granted(ledger) == 0 and under_way(ledger) == [] and not ledger.pending, within_s=2)
            await reserve(reservation_for(ledger, "k", "next"))
    run(check())


def test_a_caller_who_cannot_reserve_since_the_database_stays_locked_leaves_nothing_under_way(path, monkeypatch):
    monkeypatch.setattr(pomex, "BUSY_S", 0.1)

    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO)
            with locked(path), pytest.raises(pomex.LedgerError, match="is locked by another program|cannot be written at the moment"):
                await reserve(reservation_for(ledger, "k", "r1"))
            await until(lambda: ledger.available() and granted(ledger) == 0 and under_way(ledger) == [] and not ledger.pending)
            await reserve(reservation_for(ledger, "k", "r2"))
    run(check())


@of_a_server
def test_a_server_that_is_killed_while_requests_reserve_and_settle_leaves_nothing_granted_and_every_sum_right(path, cluster, monkeypatch):
    """What was being committed may have been, or not."""
    monkeypatch.setattr(pomex, "RETRY_S", 0.05)
    served, refused = {}, []

    async def client(ledger, number):
        for count in itertools.count():
            reservation = reservation_for(ledger, "k", f"{number}-{count}")
            try:
                await reserve(reservation, 1000, 0, 1000)
            except pomex.LedgerError:
                refused.append(reservation.response_id)
                await asyncio.sleep(0.02)
                continue
            await asyncio.sleep(0.002)
            await settle(reservation, Usage(1000, output=count))
            served[reservation.response_id] = 1_000_000 + 10_000 * count

    async def check():
        async with started(path, 2) as ledgers:
            await ledgers[0].create_key("k", NOW, budget_nanos=1000 * NANO, concurrent=100)
            await everywhere(ledgers)
            await kill_under_load(cluster, ledgers, client, 3, served, 50, refused)
            begun = [name for ledger in ledgers for name in ledger.pending]
            await until(lambda: under_way(ledgers[0]) == sorted(begun))
            costs = {row["response_id"]: row["cost_nanos"] for row in recent(ledgers[0], 10**6)}
            assert served.items() <= costs.items() and len(costs) - len(served) <= 16 and not costs.keys() & set(refused)
            assert read(ledgers[0], "SELECT owner, spent FROM meters WHERE owner = 'key 1'") == [("key 1", sum(costs.values()))]
            assert await pomex.verify(ledgers[0].db) == (len(costs), [])
        return len(costs) + len(begun)
    count = run(check())
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert granted(ledger) == 0 and under_way(ledger) == [] and sound(ledger, count)


def test_a_caller_who_is_cancelled_while_it_extends_gives_back_all_of_it_when_it_settles(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO)
            reservation = reservation_for(ledger, "k")
            await reserve(reservation, 1000, 0, 1000)
            with locked(path):
                extending = asyncio.create_task(reservation.extend(4 * 1000))
                await asyncio.sleep(0.05)
                extending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await extending
            await ledger.commit(lambda tx: None)
            await settle(reservation, Usage(1000, output=1000))
            assert meters(ledger) == [("key 1", 11_000_000, 0)] and under_way(ledger) == []
    run(check())


def test_what_ends_with_its_process_is_settled_by_it_and_gives_back_what_it_held(path):
    async def leave():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO, concurrent=5)
            await ledger.create_key("free", NOW)
            await reserve(reservation_for(ledger, "k", "reserved"))
            await reserve(reservation_for(ledger, "free", "recorded"))
            await ledger.recorded("recorded")
            await reserve(reservation_for(ledger, "free", "begun just now"))
            assert granted(ledger) > 1000 and under_way(ledger) == ["recorded", "reserved"]
    asyncio.run(leave())
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert granted(ledger) == 0 and under_way(ledger) == [] and read(ledger, "SELECT * FROM processes") == []
        assert sorted((row["response_id"], row["error_code"], row["cost_nanos"]) for row in recent(ledger, 9)) == [
            (name, "interrupted", 1_000_000) for name in ("begun just now", "recorded", "reserved")]
        assert sound(ledger, 3)


KILLED = """
import asyncio, os, signal, sys, time
import pomex

async def main():
    ledger = pomex.Ledger.open(sys.argv[1])
    ledger.start()
    key, other = ledger.list_keys()

    def row(name, **more):
        now_ms = int(time.time() * 1000)
        return pomex.UsageRow(name, "q", now_ms, key.id, "/v1/responses", "p/m", provider="p", price="1 10 - - - -", **more)
    limit, place = pomex.limits_of(key, int(time.time()) // 86400)
    await ledger.reserve("r1", lambda: row("r1", status="in flight", input=1000, cost_nanos=1_000_000),
                         [(limit, 60_000_000), (place, 1)], {})
    await ledger.settle([row("r2", result="completed", input=25, cost_nanos=25_000)])
    ledger.begin("r3", lambda: row("r3", status="in flight", input=7, cost_nanos=7_000)._replace(key_id=other.id))
    await ledger.recorded("r3")
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.parametrize("found_by", ["the next to open the database", "a server that runs"])
def test_what_a_killed_process_held_is_given_back_and_its_rows_count_first(path, found_by):
    """Who opens a file asks this host for the process; of a server's, only who hears the others for a while may judge."""
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=100_000_000, concurrent=1)
            await ledger.create_key("other", NOW)
            environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(pomex.__file__))}
            ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", KILLED, path], env=environ, timeout=20)
            assert ended.returncode == -9
            assert meters(ledger) == [("key 1", 25_000, 60_000_000), ("key 1 open", 0, 1)]
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservation_for(ledger, "k", "early"), 0, 3000)
            if found_by == "a server that runs":
                await beats(ledger)
            else:
                pomex.Ledger.open(path).close()
            if found_by != "a server that runs" and not ledger.db.on_this_host:
                assert meters(ledger) == [("key 1", 25_000, 60_000_000), ("key 1 open", 0, 1)]
                await beats(ledger)
            assert meters(ledger) == [("key 1", 1_025_000, 0), ("key 1 open", 0, 0)]
            shown = ("response_id", "key", "status", "error_code", "input", "cost_nanos")
            assert sorted([row[name] for name in shown] + [row["estimated"] != ""] for row in recent(ledger, 9)) == [
                ["r1", "k", "failed", "interrupted", 1000, 1_000_000, True], ["r2", "k", "completed", "", 25, 25_000, False],
                ["r3", "other", "failed", "interrupted", 7, 7_000, True]]
            most = await reserve(reservation_for(ledger, "k", "late"), 0, 9999)
            assert most == 9897 and await pomex.verify(ledger.db) == (3, [])       # of 98.975 thousandths of a dollar
    run(check())


async def taken_for_dead(ledger, other):
    """As another server does with one whose signs of life have not come."""
    dead = await other.db.read("SELECT process, beats FROM processes WHERE process = ?", ledger.process)
    await other.db.write(lambda tx: pomex.recover_open_requests(tx, dead))


def test_a_process_that_was_taken_for_dead_and_goes_on_takes_its_reservation_again(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await ledger.create_key("k", NOW, budget_nanos=NANO, concurrent=1, rpm=1, tpm=7000)
            reservation = reservation_for(ledger, "k")
            await reserve(reservation, 1000, 0, 1000)
            assert read(ledger, "SELECT owner, granted FROM meters") == [("key 1", 11_000_000), ("key 1 open", 1)]
            await taken_for_dead(ledger, other)
            assert granted(ledger) == 0 and under_way(ledger) == [] and recent(ledger, 9)[0]["error_code"] == "interrupted"
            assert await reservation.extend(4 * 1000)
            assert reservation.reserved_output == 1000 + pomex.RESERVED_STEP and under_way(ledger) == ["r"]
            assert meters(ledger) == [("key 1", 1_000_000, 51_960_000), ("key 1 open", 0, 1)]
            name, remaining = reservation.headers()[4]      # a rate was not given back; a token comes back in 8.6 ms
            assert name == "x-ratelimit-remaining-tokens" and 904 <= int(remaining) < 1904
            await settle(reservation, Usage(1000, output=2000))
            assert meters(ledger) == [("key 1", 21_000_000, 0), ("key 1 open", 0, 0)]
            assert [(row["status"], row["error_code"]) for row in recent(ledger, 9)] == [("completed", "")]
            assert under_way(ledger) == [] and await pomex.verify(ledger.db) == (1, [])
    run(check())


def test_a_process_that_was_taken_for_dead_ends_its_answer_where_others_have_used_the_money(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await ledger.create_key("k", NOW, budget_nanos=30_000_000)
            await everywhere([ledger, other])
            reservation = reservation_for(ledger, "k")
            await reserve(reservation, 1000, 0, 2900)
            await taken_for_dead(ledger, other)
            assert await reserve(reservation_for(other, "k", "r2"), 1000, 2700) == 0
            assert await reservation.extend(4 * 2000)                   # so much was promised to it
            assert not await reservation.extend(4 * 2900) and reservation.reserved_output == 2900
            assert granted(ledger) == 28_000_000                        # of the other alone
            await settle(reservation, Usage(1000, output=2900))         # what was used is billed all the same
            assert meters(ledger) == [("key 1", 30_000_000, 28_000_000)]
    run(check())


def test_a_process_of_this_host_is_not_taken_for_dead_for_its_silence(path, monkeypatch):
    monkeypatch.setattr(pomex, "DEAD_S", 0.05)

    async def check():
        async with started(path, 3) as (ledger, *others):
            await ledger.create_key("k", NOW, budget_nanos=NANO)
            for number in range(3):             # each time the others have not heard of it for long
                reservation = reservation_for(ledger, "k", f"r{number}")
                await reserve(reservation)
                for other in others:
                    await other.beat()
                assert under_way(ledger) == [f"r{number}"] and granted(ledger) > 0
                await settle(reservation, Usage(1))
                await asyncio.sleep(0.06)
    run(check())


# --- what a limit costs

REFUSED = {     # a key's settings, what is reserved first, what there is no room for, and what there is; input and output
    "money": ({"budget_nanos": 11_000_000}, (1000, 900), (1000, 10), (100, 10)),
    "open": ({"concurrent": 1}, (1, 1), (1, 1), None), "requests": ({"rpm": 1}, (1, 1), (1, 1), None),
    "tokens": ({"tpm": 10_000}, (9000, 500), (100, 1000), (10, 10)),
}


@pytest.mark.parametrize("settings, first, too_much, enough", REFUSED.values(), ids=REFUSED)
def test_a_refusal_writes_nothing_and_ends_as_soon_as_there_is_room(path, clock, settings, first, too_much, enough):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, **settings)
            held = reservation_for(ledger, "k", "first")
            await reserve(held, *first)
            before = dumped(ledger)
            for number in range(50):
                with pytest.raises(pomex.LimitExceeded) as no:
                    await reserve(reservation_for(ledger, "k", f"no{number}"), *too_much)
                assert no.value.need > no.value.remaining
            await ledger.schedule_flush()
            assert dumped(ledger) == before and [*ledger.pending] == ["first"]
            if enough:                          # less than what was refused is asked for
                await reserve(reservation_for(ledger, "k", "enough"), *enough)
            await settle(held, Usage(1))
            if "rpm" in settings:               # settled, it is a request of this minute all the same
                with pytest.raises(pomex.LimitExceeded):
                    await reserve(reservation_for(ledger, "k", "later"), *too_much)
            else:                               # a settlement makes room at once
                assert await reserve(reservation_for(ledger, "k", "later"), *too_much) == 0
    run(check())


def test_a_raised_budget_holds_at_once(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("k", NOW, budget_nanos=NANO // 1000)
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservation_for(ledger, "k"))
            await ledger.edit_key("k", budget_nanos=NANO)
            assert await reserve(reservation_for(ledger, "k")) == 0
    run(check())


def test_a_prepaid_request_is_judged_without_reading_what_was_used_before(path):
    async def check():
        async with started(path) as (ledger,):
            await account_made(ledger, "paid", True, None, pomex.ONE, NOW)
            for _ in range(2):
                await pomex.add_credit(ledger, "paid", NANO, "", NOW)
            paid = await pomex.account_named(ledger.db, "paid")         # PostgreSQL leaves ids out after it was killed
            await ledger.create_key("k", NOW, account_id=paid, concurrent=9)
            insert(ledger, [used(f"r{n}", account_id=paid, started_ms=NOW_MS - n * pomex.DAY_MS, price="provider 0.01",
                                 cost_nanos=10_000_000) for n in range(100)])
            for number in range(3):
                reservation = reservation_for(ledger, "k", f"new{number}")
                with statements(ledger) as said:
                    await reserve(reservation, 1000, 0, 1000)
                    assert await reservation.extend(4 * 1000)
                assert any("usage" in each and each.startswith("SELECT") for each in said) == (number == 0), said
                assert said.count("COMMIT") == 2
                await settle(reservation, Usage(1000, output=9900))
            with pytest.raises(pomex.LimitExceeded) as no:              # 2 - 1 - 0.3 dollars are left
                await reserve(reservation_for(ledger, "k", "no"), 700_001, 1)
            assert str(pomex.limit_error(key_of(ledger, "k"), no.value, NOW, False)) == (
                "The credit of account paid is used up: 0.70 USD are left.")
            assert await reserve(reservation_for(ledger, "k", "yes"), 600_000, 10_000) == 0
            with pytest.raises(pomex.LimitExceeded):
                await reserve(reservation_for(ledger, "k", "none"), 1, 1)
            await pomex.add_credit(ledger, "paid", 1, "", NOW)
            assert await pomex.verify(ledger.db) == (103, [])
    run(check())


def test_keys_without_a_limit_touch_no_meter_and_write_nothing_before_they_settle(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("free", NOW)
            reservation = reservation_for(ledger, "free")
            with statements(ledger) as said:
                assert await reserve(reservation, 10**9) == 0 and await reservation.extend(10**9)
                assert said == [] and not reservation.headers() and list(ledger.pending) == ["r"]
                await settle(reservation, Usage(1))
            assert said.count("COMMIT") == 1 and not any("open_requests (" in each for each in said)
            assert read(ledger, "SELECT * FROM meters UNION ALL SELECT *, 0, 0 FROM rates") == [] and not ledger.pending
            assert await pomex.verify(ledger.db) == (1, [])
    run(check())


# --- through the gateway --------------------------------------------------------------------------

class Provider:
    """A chat server that answers with what `answers` says: text and usage, or a status."""

    def __init__(self):
        self.answers, self.bodies, self.named = [], [], {}

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head)[1])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                status, words, usage = self.answers.pop(0)
                if status != 200:
                    body = b'{"error": {"message": "busy", "type": "server_error"}}'
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
                    continue
                chunks = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
                if usage is not None:
                    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
                               {"choices": [], "usage": usage, **self.named}]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
                for chunk in [*map(json.dumps, chunks), *(["[DONE]"] if usage is not None else [])]:
                    data = f"data: {chunk}\n\n".encode()
                    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                    await writer.drain()
                    await asyncio.sleep(0.003 if len(chunks) > 9 else 0)
                if usage is None:
                    return writer.close()
                writer.write(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def gateway(path, more="", edit=("", "")):
    provider = Provider()
    upstream = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    text = ("[server]\nport = 0\n" + "".join(
        f'[providers.{name}]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:{port}/v1"\n' for name in ("p", "q"))
        + '[models."p/two"]\ntargets = ["p:m", "q:m"]\n[prices."p/m"]\ninput = 1\noutput = 10\n'
        + '[prices."q/m"]\ninput = 2\noutput = 20\n' + more)
    config = pomex.load_config(text.replace(*edit, 1), "pomex.toml", {})
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        async with pomex.running(config, ledger) as server:
            yield provider, ledger, server
    upstream.close()


async def ask(server, token, body=None, path="/v1/responses", **headers):
    reader, writer = await asyncio.open_connection(*server.address)
    payload = json.dumps(body).encode() if body is not None else b""
    fields = {"host": "127.0.0.1", "authorization": f"Bearer {token}", "content-length": str(len(payload)), "connection": "close",
              **headers}
    head = f"{'POST' if body is not None else 'GET'} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
    writer.write(head.encode() + b"\r\n" + payload)
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b"transfer-encoding: chunked" in head:
        rest = b"".join(re.findall(rb"(?s)[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n|$)", rest))
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(each.split(": ", 1) for each in lines[1:]), rest.decode()


ASKED = {"model": "p/m", "input": "hello", "stream": True}
CODEX = {"originator": "codex_exec"}
COUNTED = {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 40}}


def row_of(ledger, count=1):
    """The newest of so many: a row is in the database before the client sees how its request ended."""
    rows = recent(ledger, 99)
    assert len(rows) == count
    return rows[0]


async def refused(ledger):
    """The newest refusal."""
    await ledger.save_counts()
    return refusals(ledger)[0]


def test_a_request_is_billed_at_the_price_its_row_keeps(path, caplog):
    caplog.set_level("INFO", "pomex")

    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("k", NOW)
            provider.answers += [(200, ["hi"], COUNTED), (200, ["hi"], COUNTED), (500, [], None), (500, [], None),
                                 (200, ["hi"], COUNTED)]
            assert (await ask(server, token, ASKED))[0] == 200
            row = row_of(ledger)
            assert (row["price"], row["cost_nanos"], row["estimated"]) == ("1 10 - - - -", 200_000, "")
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            row = row_of(ledger, 2)
            assert (row["price"], row["cost_nanos"]) == ("", 0)
            assert (await pomex.usage_report(ledger.db, "model", 0, 10**6))[1]["unpriced"] == 1
            provider.answers.insert(0, (200, ["hi"], {**COUNTED, "cost": 0.0123}))
            assert (await ask(server, token, {**ASKED, "model": "p/dearer"}))[0] == 200
            row = row_of(ledger, 3)
            assert (row["price"], row["cost_nanos"]) == ("provider 0.012300000000", 12_300_000)
            await ask(server, token, {**ASKED, "model": "p/two"})               # a refusal costs nothing
            row = row_of(ledger, 4)
            assert (row["provider"], row["cost_nanos"], row["attempts"]) == ("q", 400_000, 3)
            assert lost(ledger) == [] and await pomex.verify(ledger.db) == (4, [])
            status, headers, text = await ask(server, "", None, "/metrics")
            assert headers["content-type"].startswith("text/plain; version=0.0.4")
            assert 'pomex_requests_total{endpoint="/v1/responses",model="other",provider="p",outcome="completed"} 3' in text
            assert 'pomex_cost_usd_total{model="p/two",provider="q"} 0.000400000' in text
            assert 'le="+Inf"' in text
    run(check())
    assert "$0.0002" in caplog.text and "no price" in caplog.text


@pytest.mark.parametrize("target, named, kept", [
    ("m", "m", ""), ("m", "m-2026-11-02", ""), ("m", "maker/M-20261102", ""), ("maker/m-latest", "m", ""), ("m", "", ""), ("m", None, ""),
    ("m", "m-mini", "m-mini"), ("m", "maker/other-2026-11-02", "maker/other-2026-11-02"), ("m", 5, "5"), ("m", "x" * 300, "x" * 200),
], ids=lambda text: str(text)[:30])
def test_another_model_in_the_answer_than_was_asked_for_is_kept_in_the_row(path, target, named, kept):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("k", NOW)
            provider.answers.append((200, ["hi"], COUNTED))
            provider.named = {} if named is None else {"model": named}
            assert (await ask(server, token, {**ASKED, "model": f"p/{target}"}))[0] == 200
            row = row_of(ledger)
            assert (row["upstream_model"], row["served_model"]) == (target, kept)
            insert(ledger, [given_up("r2"), used("r2", attempt=2, served_model="z")])
            assert [each["served_model"] async for each in pomex.rows_in_pages(ledger.db)] == [kept, "", "z"]
            assert await pomex.verify(ledger.db) == (3, [])
    run(check())


def test_a_limit_of_money_is_never_served_what_has_no_price(path):
    """On loopback too: it may be a tunnel. What the message says to write into pomex.toml is a table that is read."""
    async def check():
        async with gateway(path) as (provider, ledger, server):
            await account_made(ledger, "paid", True, None, pomex.ONE, NOW)
            await pomex.add_credit(ledger, "paid", NANO, "", NOW)
            await account_made(ledger, "limit", False, NANO, pomex.ONE, NOW)
            paid, limit = [await pomex.account_named(ledger.db, name) for name in ("paid", "limit")]
            settings = {"budget": {"budget_nanos": NANO}, "paid": {"account_id": paid}, "limit": {"account_id": limit}}
            for name, given in settings.items():
                token = await ledger.create_key(name, NOW, **given)
                status, _, text = await ask(server, token, {**ASKED, "model": "p/other"})
                error = json.loads(text)["error"]
                assert (status, error["code"], error["param"]) == (400, "price_unknown", "model"), name
                block = error["message"].split("\n\n")[1]
                config = pomex.load_config(block, "pomex.toml", {})
                assert config.prices["p/other"].input == config.prices["p/other"].output == 0
                status, _, text = await ask(server, token, {**ASKED, "model": "p/other"}, **CODEX)
                assert status == 200
                failed = json.loads(text.split("event: response.failed\ndata: ")[1].split("\n")[0])["response"]
                assert failed["error"] == {"code": "invalid_prompt", "message": error["message"]}
                assert (await refused(ledger))["code"] == "price_unknown"
                status, headers, text = await ask(server, token, {**ASKED, "model": "p/other", "stream": False}, **CODEX)
                assert (status, json.loads(text)["error"]["code"]) == (400, "model_not_found")      # whose text it shows
                assert headers["x-pomex-error"] == (await refused(ledger))["code"] == "price_unknown"
            assert not provider.bodies and recent(ledger, 9) == []
            assert (await ledger.counted())["pomex_refusals_total", "price_unknown"] == 9
            provider.answers += [(200, ["hi"], COUNTED)] * 6
            assert (await ask(server, token, {**ASKED, "model": "p/m-2026-11-02"}))[0] == 200      # of a family with a price
            assert row_of(ledger)["cost_nanos"] == 200_000
            assert (await ask(server, token, {**ASKED, "model": "demo/echo"}))[0] == 200
            for name in settings:
                await ledger.edit_key(name, allow_unpriced=1)
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            rated = await ledger.create_key("rated", NOW, rpm=9, tpm=10**6, concurrent=3)                # no limit of money
            assert (await ask(server, rated, {**ASKED, "model": "p/other"}))[0] == 200
            assert await pomex.verify(ledger.db) == (4, [])
    run(check())


@pytest.mark.parametrize("section, line, price", [("[server]", "allow_unpriced", ""), ("[providers.p]", "free", pomex.FREE)])
def test_the_configuration_may_say_otherwise(path, section, line, price):
    async def check():
        async with gateway(path, edit=(section, f"{section}\n{line} = true")) as (provider, ledger, server):
            token = await ledger.create_key("k", NOW, budget_nanos=NANO)
            provider.answers.append((200, ["hi"], COUNTED))
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            row = row_of(ledger)
            assert (row["price"], row["cost_nanos"]) == (price, 0)
    run(check())


def test_targets_without_a_price_are_passed_over_where_money_is_limited(path):
    async def check():
        async with gateway(path, '[models."p/either"]\ntargets = ["p:nameless", "q:m"]\n') as (provider, ledger, server):
            token, free = await ledger.create_key("k", NOW, budget_nanos=NANO), await ledger.create_key("free", NOW)
            provider.answers += [(200, ["hi"], COUNTED)] * 2
            for who, target, cost in ((free, "nameless", 0), (token, "m", 400_000)):
                assert (await ask(server, who, {**ASKED, "model": "p/either"}))[0] == 200
                row = row_of(ledger, 1 + (who is token))
                assert (row["upstream_model"], row["cost_nanos"]) == (target, cost)
    run(check())


def test_an_attempt_that_began_and_broke_before_output_is_a_line_of_its_own(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("k", NOW)
            provider.answers += [(200, [], None), (200, ["hi"], COUNTED)]
            await ask(server, token, {**ASKED, "model": "p/two"})
            assert row_of(ledger)["attempt"] == 2
            row, = lost(ledger)
            assert (row["provider"], row["attempt"], row["estimated"], row["output"]) == ("p", 1, "no count from the provider", 0)
            assert row["cost_nanos"] > 0 and await pomex.verify(ledger.db) == (2, [])
    run(check())


def test_a_used_budget_is_said_as_each_client_can_use_it(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("ci", time.time(), budget_nanos=200 * NANO)
            insert(ledger, [used("r0", started_ms=int(time.time() * 1000), cost_nanos=200 * NANO)])
            sentence = r"Key ci has used 200\.00 of 200\.00 USD this month; it resets on 1 \w+\."
            status, headers, text = await ask(server, token, ASKED)
            error = json.loads(text)["error"]
            assert (status, error["code"], error["type"]) == (429, "insufficient_quota", "insufficient_quota")
            assert headers["x-should-retry"] == "false" and "retry-after" not in headers
            assert re.fullmatch(sentence, error["message"])
            status, headers, text = await ask(server, token, ASKED, **CODEX)
            failed = json.loads(text.split("event: response.failed\ndata: ")[1].split("\n")[0])["response"]
            assert status == 200 and failed["error"]["code"] == "invalid_prompt" and re.fullmatch(sentence, failed["error"]["message"])
            assert row_of(ledger)["response_id"] == "r0" and provider.bodies == []
            await ledger.save_counts()
            assert [(each["code"], each["key"], each["count"], each["path"]) for each in refusals(ledger)] == [
                ("insufficient_quota", "ci", 2, "/v1/responses")]
            assert (await ledger.counted())["pomex_refusals_total", "insufficient_quota"] == 2
            status, _, text = await ask(server, token, None, "/v1/key")
            data = json.loads(text)["data"]
            assert (data["limit"], data["usage"], data["limit_remaining"], data["limit_reset"][-10:]) == (200, 200, 0, "T00:00:00Z")
    run(check())


def test_a_refusal_says_the_true_sum_of_what_was_just_answered(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("ci", time.time(), budget_nanos=NANO)
            provider.answers.append((200, ["hi"], {"prompt_tokens": 100, "completion_tokens": 99_980}))
            assert (await ask(server, token, ASKED))[0] == 200
            status, _, text = await ask(server, token, ASKED)
            assert status == 429 and "Key ci has used 1.00 of 1.00 USD this month" in text, text
            assert json.loads((await ask(server, token, None, "/v1/key"))[2])["data"]["usage"] == 0.9999
    run(check())


AMOUNTS = [     # as it is written, nano-dollars; None: refused
    ("12.50", 12_500_000_000), ("0", 0), (".5", 500_000_000), ("5.", 5_000_000_000), ("0.000000001", 1), ("-3", None), ("1e3", None),
    ("1e300000", None), ("1e900000", None), ("9" * 30, None), ("1_0", None), ("\u0661\u0662", None), ("\uff11", None), ("0.0000000001", None),
    ("1 000", None), (" 1", None), ("+1", None), ("nan", None), ("inf", None), ("", None), (".", None), ("-", None), ("1\n", None),
    ("9999999999", None), ("0x10", None), ("9" * 1_000_000, None),
]


@pytest.mark.parametrize("text, nanos", AMOUNTS, ids=[text[:12] for text, _ in AMOUNTS])
def test_an_amount_is_plain_digits_and_judged_at_once(text, nanos):
    started = time.process_time()
    if nanos is None:
        with pytest.raises(ValueError):
            pomex.parse_decimal(text, NANO)
        if text and text == text.strip():           # the form's blanks around an amount are none of it, its empty field is no limit
            with pytest.raises(pomex.BadRequest):
                pomex.read_fields(json.dumps({"budget": text}).encode(), pomex.KEY_BODY_FIELDS)
        with pytest.raises(pomex.argparse.ArgumentTypeError, match="must be like 50/month"):
            pomex.argument_type(pomex.KEY_FIELDS[0])(text + "/month")
    else:
        values = pomex.read_fields(json.dumps({"budget": text}).encode(), pomex.KEY_BODY_FIELDS)
        assert pomex.parse_decimal(text, NANO) == values["budget"]["budget_nanos"] == nanos
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("value", ["1e30", "9" * 30, "-1e30", "9" * 4000, "1e300", "inf", "nan", "1e-7", "0.0000001", "1e9"],
                         ids=lambda value: value[:9])
def test_a_price_is_judged_at_once_and_refused_with_a_sentence(value):
    for key in ("input", "tiers.priority"):
        started = time.process_time()
        with pytest.raises(pomex.ConfigError, match="must be (an? |between 0 and )"):
            pomex.load_config(f'[prices."x/y"]\noutput = 1\n{key} = {value}\n', "pomex.toml", {})
        assert time.process_time() - started < 0.1


def test_a_used_rate_is_said_with_the_time_to_wait(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("ci", time.time(), rpm=1)
            provider.answers += [(200, ["hi"], COUNTED)]
            status, headers, _ = await ask(server, token, ASKED)
            assert status == 200 and headers["x-ratelimit-remaining-requests"] == "0"
            status, headers, text = await ask(server, token, ASKED)
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 66 and headers["x-ratelimit-limit-requests"] == "1"
            assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"
            status, _, text = await ask(server, token, ASKED, **CODEX)
            assert status == 200 and re.search(r'"rate_limit_exceeded","message":"Key ci may send 1 requests a minute\. '
                                               r'Please try again in \d+s\."', text)
    run(check())


def test_a_model_that_the_key_may_not_use_is_refused_and_not_listed(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = await ledger.create_key("ci", time.time(), models="demo/*")
            for headers, *wanted in (({}, 403, "model_not_allowed"), (CODEX, 400, "model_not_found")):
                status, _, text = await ask(server, token, ASKED, **headers)
                error = json.loads(text)["error"]
                assert [status, error["code"], error["message"]] == [*wanted, "Key ci may use demo/*."]
            names = [each["id"] for each in json.loads((await ask(server, token, None, "/v1/models"))[2])["data"]]
            assert names and all(name.startswith("demo/") for name in names)
            assert recent(ledger, 9) == []
    run(check())


def test_an_answer_that_outgrows_the_money_ends_incomplete(path):
    async def check():
        async with gateway(path, "") as (provider, ledger, server):
            token = await ledger.create_key("k", time.time(), budget_nanos=170_000_000)      # about 17,000 tokens of output
            provider.answers += [(200, ["word " * 800] * 30, None)]
            status, _, text = await ask(server, token, ASKED)
            assert status == 200 and "event: response.incomplete\n" in text and '"reason":"max_output_tokens"' in text
            row = row_of(ledger)
            assert row["status"] == "incomplete" and row["estimated"] and 160_000_000 < row["cost_nanos"] < (
                180_000_000 if ledger.db.on_this_host else 191_000_000)         # a chunk of 1,000 tokens may be on its way
            provider.answers += [(200, ["hi"], COUNTED)]
            status, _, text = await ask(server, await ledger.create_key("less", time.time(), budget_nanos=10_000_000), ASKED)
            assert status == 200 and 0 < provider.bodies[-1]["max_tokens"] < 1001
    run(check())


# --- the command line -----------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pomex.toml").write_text("")
    return tmp_path


def told(capsys, *argv, code=0):
    assert pomex.main(list(argv)) == code
    return capsys.readouterr()


def test_keys_accounts_and_bills_by_command(here, capsys):
    said = told(capsys, "accounts", "create", "acme", "--prepaid", "--multiplier", "1.25")
    assert said.err.startswith("Account acme created.")
    assert told(capsys, "accounts", "credit", "acme", "20").err == "Top-up of 20.00 USD entered for account acme.\n"
    said = told(capsys, "accounts", "credit", "acme", "--reason", "mistake", "--", "-0.5")
    assert said.err == "Adjustment of -0.50 USD entered for account acme.\n"
    assert json.loads(told(capsys, "accounts", "list", "--json").out)[1]["balance_usd"] == "19.500000000"
    assert "needs its reason" in told(capsys, "accounts", "credit", "acme", "--", "-1", code=1).err
    assert "must not be 0" in told(capsys, "accounts", "credit", "acme", "0", code=1).err
    said = told(capsys, "keys", "create", "laptop", "--budget", "50/month", "--models", "openai/*", "--account", "acme", "--rpm", "60")
    assert re.fullmatch(r"sk-rh-\w{32}\n", said.out)
    assert said.err == ("Key laptop created: 50.00 USD a month, models openai/*, 60 requests a minute, account acme. "
                        "It is not shown again.\n")
    now_ms = int(time.time() * 1000)
    with contextlib.closing(pomex.Ledger.open(str(here / "pomex.db"))) as ledger:
        insert(ledger, [
            used("r1", started_ms=now_ms, account_id=2, provider="openai", input=2_000_000, cached=500_000, output=10_000,
                 price="20 100 - - - -", multiplier=1_250_000, cost_nanos=51_250_000_000),
            used("r2", started_ms=now_ms, account_id=2, model="local/q", provider="local", input=10, output=1)])
    listed = told(capsys, "keys", "list").out.splitlines()
    assert re.fullmatch(r"NAME +KEY +MODELS +SPENT +BUDGET +LAST USED +STATE", listed[0])
    assert re.fullmatch(r"laptop   sk-rh-\w{4}…\w{4}   openai/\*   51\.25   50\.00/month   \d s ago +102 % used", listed[1])
    usage = told(capsys, "usage", "--since", "7d", "--by", "model").out.splitlines()
    assert usage[0].split() == ["MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT", "USD"]
    assert usage[1].split() == ["openai/gpt-5.5", "1", "2.0", "M", "25.0", "%", "10", "000", "51.25"]
    assert usage[2].endswith("no price") and usage[3].split()[0] == "total" and "1 without a price" in usage[3]
    for by in pomex.REPORT_BY:
        assert json.loads(told(capsys, "usage", "--by", by, "--json").out)[0]["cost_nanos"]
    assert told(capsys, "usage", "--csv").out.startswith("model,requests,")
    assert len(told(capsys, "usage", "--jsonl").out.splitlines()) == 2
    bill = told(capsys, "statement", "acme").out
    assert "51.25" in bill and "balance after" in bill and "-31.75" in bill
    assert json.loads(told(capsys, "statement", "acme", "--json").out)["after_nanos"] == -31_750_000_000
    assert "2 lines computed again, 0 problems." in told(capsys, "ledger", "verify").out
    assert json.loads(told(capsys, "ledger", "export", "--jsonl").out.splitlines()[0])["key"] == "laptop"
    assert told(capsys, "ledger", "export", "--csv").out.count("\n") == 3 == told(capsys, "ledger", "export").out.count("\n")
    assert json.loads(told(capsys, "accounts", "list", "--json").out)[1]["balance_usd"] == "-31.750000000"
    assert "x 1.25" in told(capsys, "accounts", "list").out
    assert "no limits" in told(capsys, "keys", "edit", "laptop", "--budget", "none", "--rpm", "0", "--models", "all",
                               "--account", "default").err
    assert "0 rows" in told(capsys, "prune", "--older", "90d").err
    assert "Copied" in told(capsys, "backup", str(here / "copy.db")).err
    prices = json.loads(told(capsys, "prices", "show", "--json").out)
    assert len(prices) == len(pomex.builtin_schedules()) == told(capsys, "prices", "show").out.count("\n") - 1
    assert any(row["over"] == 200_000 and row["long"] for row in prices) and all(row["base"] for row in prices)


@pytest.mark.parametrize("argv", [
    ("keys", "create", "k", "--budget", "50"), ("keys", "create", "k", "--budget", "5/year"), ("keys", "create", "k", "--rpm", "-1"),
    ("usage", "--since", "yesterday"), ("statement", "a", "--month", "2026-13"), ("accounts", "credit", "a", "1.0000000001"),
    ("keys", "create", "k", "--budget", "nan/day"), ("ledger", "export", "--xml"),
])
def test_a_value_that_makes_no_sense_is_refused(here, capsys, argv):
    told(capsys, *argv, code=2)


def test_money_is_printed_with_integers():
    assert [pomex.format_usd(nanos) for nanos in (0, 4_999_999, 5_000_000, -12_345_678_901, 10**18)] == [
        "0.00", "0.00", "0.01", "-12.35", "1000000000.00"]
    assert pomex.format_usd(41_234_567, 4) == "0.0412"
