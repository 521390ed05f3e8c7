"""Layer 8, money: prices, costs, limits that hold over processes, the bill, and what clients and operators are told."""
import asyncio
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time

import pytest
import sinks
from conftest import REPOSITORY
from ledgers import first_schema, recent, totals

import pomex
from pomex import Usage

NOW = 1_795_305_600.0       # 2026-11-22 00:00 UTC, a Sunday
NOW_MS = int(NOW) * 1000
NANO = 10**9
SHARED_PRICES = REPOSITORY.parent / "shared" / "reference" / "prices.json"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "state" / "pomex.db")


@pytest.fixture
def ledger(path):
    ledger = pomex.Ledger.open(path)
    yield ledger
    ledger.close()


def entry(response_id, **more):
    return pomex.Entry(response_id, "req", NOW_MS, 1, "/v1/responses", "openai/gpt-5.5")._replace(**more)


def line(response_id, **more):
    return pomex.Line(response_id, 1, "azure", "gpt", "server_error", "", 10, 0, 0, 5, 0, 0, 0, "2 10 - - - -", pomex.ONE,
                      70_000)._replace(**more)


def key_of(ledger, name):
    return next(key for key in ledger.list_keys() if key.name == name)


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
    tariffs = pomex.builtin_tariffs()
    assert tariffs.keys() >= published.keys()

    def picos(row, name, *instead):
        value = next((row[each] for each in (name, *instead) if each in row), None)
        return None if value is None else int(value * 10**6)
    for name, row in published.items():
        for text, given in ((tariffs[name].base, row), (tariffs[name].long, row.get("long"))):
            price = pomex.price_of(text)
            assert (price is None) == (given is None), name
            if given:
                base, read, write = picos(given, "in"), picos(given, "cache_read"), picos(given, "cache_write")
                kept = picos(given, "cache_write_1h", "cache_write_12h")
                write = base if write is None else write
                assert price[:4] == (base, picos(given, "out"), base if read is None else read, write), name
                assert price[4] == (write if kept is None else kept) or given is row.get("long"), name
        assert len(tariffs[name].changes) == len(row.get("from", ()))
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
    assert pomex.builtin_tariffs()[model].price(at_ms, tokens) == price


def test_every_row_has_as_many_long_values_as_base_values():
    for name, tariff in pomex.builtin_tariffs().items():
        given = [word != "-" for word in tariff.base.split()]
        for text in (*filter(None, [tariff.long]), *(text for _, text in tariff.changes)):
            assert [word != "-" for word in text.split()] == given, name
        assert all(len(each.split()) == 6 and pomex.price_of(each) for each in filter(None, (tariff.base, tariff.long))), name
        assert all(0 < pomex.decimal.Decimal(number) <= 6 for factor in tariff.factors.values() for number in factor.split("/")), name
        assert not tariff.ends or pomex.datetime.date.fromisoformat(tariff.ends), name


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
    assert pomex.builtin_tariffs()[model].price(NOW_MS, tokens, tiers) == price


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
    assert decoder.resume()
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


def book(text=""):
    providers = "".join(f'[providers.{name}]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:1/v1"\n' for name in ("azure", "local"))
    return pomex.PriceBook(pomex.load_config(providers + text, "pomex.toml", {}))


def test_a_configured_price_is_taken_as_it_is_written():
    prices = book('[prices."openai/gpt-5.5"]\ninput = 0.1\noutput = 1\n[prices."local/m"]\ninput = 0.000001\noutput = 0.2\n'
                  'cache_read = 0\nlong_over = 10\nlong_input = 7\nlong_output = 8\n')
    assert prices.tariff("openai", "gpt-5.5").price(NOW_MS, 5) == "0.1 1 - - - -"
    local = prices.tariff("local", "m")
    assert pomex.price_of(local.price(NOW_MS, 10)) == (1, 200_000, 0, 1, 1, 0, 0)
    assert pomex.price_of(local.price(NOW_MS, 11))[:2] == (7_000_000, 8_000_000)


@pytest.mark.parametrize("provider, model, asked, known", [
    ("openai", "gpt-5.5", "openai/gpt-5.5", True), ("azure", "deployment", "openai/gpt-5.5", False),
    ("azure", "deployment", "team/coder", True), ("demo", "echo", "demo/echo", True), ("local", "x", "local/x", False),
])
def test_what_has_no_price_is_not_guessed(provider, model, asked, known):
    tariff = book('[prices."team/coder"]\ninput = 1\noutput = 2\n').tariff(provider, model, asked)
    assert (tariff is not None) == known


@pytest.mark.parametrize("provider, model, same", [
    ("anthropic", "claude-opus-4-5-20251101", "anthropic/claude-opus-4-5"), ("openai", "gpt-5.5-2026-04-23", "openai/gpt-5.5"),
    ("anthropic", "claude-haiku-4-5-latest", "anthropic/claude-haiku-4-5"), ("local", "m-2026-01-31", "local/m"),
    ("google", "gemini-flash-latest", "google/gemini-flash-latest"), ("openai", "gpt-5.5-pro-20260423", "openai/gpt-5.5-pro"),
    ("openai", "gpt-5.5-2026-04-23-x", None), ("openai", "gpt-5.5-20269", None), ("openai", "gpt-5.5-mini", None),
    ("openai", "gpt-5.5-99990101", None), ("azure", "gpt-5.5-2026-04-23", None), ("openai", "latest", None),
])
def test_a_dated_or_latest_name_has_the_price_of_its_family(provider, model, same):
    prices = book('[prices."local/m"]\ninput = 1\noutput = 2\n')
    tariff = prices.tariff(provider, model)
    assert tariff == (prices.known[same] if same else None)
    assert tariff is None or tariff.source.startswith(same + " in ")


def test_a_price_of_its_own_goes_before_its_familys_and_any_price_before_free():
    prices = book('[prices."openai/gpt-5.5-2026-04-23"]\ninput = 1\noutput = 2\n[prices."spare/m"]\ninput = 3\noutput = 4\n'
                  '[providers.spare]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:1/v1"\nfree = true\n')
    assert prices.tariff("openai", "gpt-5.5-2026-04-23").base.startswith("1 2 ")
    assert prices.tariff("spare", "m").base.startswith("3 4 ") and prices.tariff("spare", "m-latest").base.startswith("3 4 ")
    assert prices.tariff("spare", "other").base == pomex.FREE and prices.tariff("local", "other") is None


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

def test_sums_follow_their_rows_once_and_lines_of_lost_attempts_are_among_them(ledger):
    usual = entry("r1", provider="openai", input=1000, cached=400, output=50, price="2 10 0.2 - - -", cost_nanos=1_780_000,
                  lost=(line("r1"),))
    for _ in range(2):          # as after a crash: the second time nothing is added
        pomex.insert_entries(ledger._writer, [usual, entry("r2", status="failed", estimated="why")])
    assert totals(ledger) == {"requests": 2, "input": 1010, "cached": 400, "cache_write": 0, "output": 55, "reasoning": 0,
                               "cost_nanos": 1_850_000}
    by_provider = {row["provider"]: (row["requests"], row["cost_nanos"]) for row in
                   pomex.usage_report(ledger, "provider", 0, 10**6)}
    assert by_provider == {"openai": (1, 1_780_000), "azure": (0, 70_000), "": (1, 0)}
    assert pomex.verify(ledger) == (3, [])
    exported = list(pomex.export_rows(ledger, 0))
    assert [(row["response_id"], row["status"], row["cost_nanos"]) for row in exported] == [
        ("r1", "lost", 70_000), ("r2", "failed", 0), ("r1", "completed", 1_780_000)] or len(exported) == 3


@pytest.mark.parametrize("spoil, said", [
    ("UPDATE usage SET cost_nanos = cost_nanos + 1", "its price and tokens give"),
    ("UPDATE usage SET cached = input + 1, price = ''", "contradict"),
    ("UPDATE daily SET cost_nanos = 0", "daily sums differ"),
    ("DELETE FROM daily", "no daily sums"),
    ("UPDATE usage SET price = 'x y'", "give -1"),
])
def test_verify_finds_what_was_changed(ledger, spoil, said):
    pomex.insert_entries(ledger._writer, [entry("r1", input=9, output=1, price="1 1 - - - -", cost_nanos=10_000)])
    assert pomex.verify(ledger)[1] == []
    ledger.write(spoil)
    assert any(said in wrong for wrong in pomex.verify(ledger)[1])


def test_a_balance_is_the_sum_of_entries_that_can_only_be_added(ledger):
    pomex.create_account(ledger, "acme", True, None, 1_200_000, NOW)
    pomex.add_credit(ledger, "acme", 5 * NANO, "", NOW)
    pomex.add_credit(ledger, "acme", -1 * NANO, "double payment", NOW)
    pomex.insert_entries(ledger._writer, [entry("r1", account_id=2, cost_nanos=NANO)])
    account = pomex.list_accounts(ledger, NOW)[1]
    assert (account.name, account.credit_nanos, account.spent_nanos, account.month_nanos) == ("acme", 4 * NANO, NANO, NANO)
    for sql in ("UPDATE credits SET nanos = 0", "DELETE FROM credits"):
        with pytest.raises(sqlite3.IntegrityError, match="stay"):
            ledger.write(sql)
    with pytest.raises(pomex.BadRequest, match="no account named nobody"):
        pomex.add_credit(ledger, "nobody", 1, "", NOW)
    with pytest.raises(pomex.BadRequest, match="already"):
        pomex.create_account(ledger, "acme", False, None, pomex.ONE, NOW)


def test_a_statements_lines_add_up_to_the_cent(ledger):
    rows = [entry(f"r{n}", model=f"m{n}", input=1, cost_nanos=3_333_333) for n in range(3)]
    pomex.insert_entries(ledger._writer, [*rows, entry("old", started_ms=NOW_MS - 40 * pomex.DAY_MS, cost_nanos=NANO)])
    pomex.add_credit(ledger, "default", 2 * NANO, "", NOW - 40 * 86400)
    first, last = pomex.month_bounds("2026-11")
    bill = pomex.statement_rows(ledger, 1, first, last)
    assert (bill["before_nanos"], bill["spent_nanos"], bill["after_nanos"]) == (NANO, 9_999_999, NANO - 9_999_999)
    cents = pomex.apportion([row["cost_nanos"] for row in bill["charges"]], 10**7)
    assert sum(cents) == 1 and sorted(cents) == [0, 0, 1]
    for parts in ([-5, 7, 13], [0], [], [10**7] * 3, [4, 4, 4, -12], [-10_000_001, 5_000_000]):
        assert sum(pomex.apportion(parts, 10)) == (sum(parts) + 5) // 10


def test_pruning_removes_lines_and_keeps_every_sum(ledger, path):
    old, new = NOW_MS - 3 * pomex.DAY_MS, NOW_MS
    pomex.insert_entries(ledger._writer, [entry("r1", started_ms=old, cost_nanos=5, lost=(line("r1"),)),
                                          entry("r2", started_ms=new, cost_nanos=0)])
    before = totals(ledger)
    assert pomex.prune(ledger, new // pomex.DAY_MS) == 1
    assert totals(ledger) == before and pomex.verify(ledger) == (1, [])
    assert ledger.read("SELECT count(*) FROM attempts") == [(0,)]
    copy = path + "-copy"
    ledger.backup(copy)
    assert os.stat(copy).st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT sum(requests) FROM daily").fetchone() == (2,)
    with pytest.raises(pomex.LedgerError, match="File exists"):
        ledger.backup(copy)
    assert sorted(os.listdir(os.path.dirname(path))) == sorted({"pomex.db", "pomex.db-wal", "pomex.db-shm", "pomex.db-copy"})


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
        full.setattr(ledger, "_db", db)
        with pytest.raises(pomex.LedgerError, match="full"):
            ledger.backup(copy)
    assert not [name for name in os.listdir(os.path.dirname(path)) if "copy" in name]
    ledger.backup(copy)
    assert os.path.getsize(copy) > 4096


@pytest.mark.parametrize("rolled", [False, True], ids=["few rows", "rows that are summed up"])
def test_after_pruning_everything_new_rows_are_counted_and_shown(ledger, rolled, monkeypatch):
    monkeypatch.setattr(pomex, "ROLL_ROWS", 5 if rolled else 500)
    db, old = ledger._writer, NOW_MS - 9 * pomex.DAY_MS
    for part in range(2):
        pomex.insert_entries(db, [entry(f"old{part}{n}", started_ms=old, cost_nanos=0) for n in range(20)])
    pomex.insert_entries(db, [entry("last", started_ms=old, cost_nanos=0)])
    watched = pomex.last_row_id(db)
    assert pomex.prune(ledger, NOW_MS // pomex.DAY_MS) == 40
    for part in range(4):
        pomex.insert_entries(db, [entry(f"new{part}{n}", started_ms=NOW_MS, cost_nanos=0) for n in range(10)])
    since_ms = NOW_MS // pomex.HALF_HOUR_MS * pomex.HALF_HOUR_MS
    shown = pomex.parts(db, "provider", since_ms, pomex.HALF_HOUR_MS, since_ms + pomex.HALF_HOUR_MS, 0)
    assert sum(sums["requests"] for sums in shown.values()) == 40
    assert len(pomex.rows_after(db, watched, 100, 0)) == 40 and pomex.verify(ledger) == (41, [])


def test_ids_that_began_anew_under_an_older_program_are_counted(ledger):
    db = ledger._writer
    ledger.write("INSERT INTO settings VALUES ('rolled_up', 1200)")
    pomex.insert_entries(db, [entry(f"new{n}", started_ms=NOW_MS) for n in range(10)])
    assert pomex.rolled_up(db) == 0


def test_a_file_of_the_first_schema_is_upgraded_with_its_sums(path, monkeypatch):
    with first_schema(path, monkeypatch) as db:
        first = pomex.Entry._fields[:pomex.Entry._fields.index("account_id")]
        db.execute(f"INSERT INTO usage ({', '.join(first)}) VALUES ({', '.join('?' * len(first))})",
                   entry("r1", input=7)[:len(first)])
        db.execute("INSERT INTO keys (name, digest, hint, created_s) VALUES ('old', x'00', 'h', 1)")
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert totals(ledger)["input"] == 7 and pomex.verify(ledger) == (1, [])
        old = key_of(ledger, "old")
        assert not old.limited and old.account == "default" and old.may_use("any/thing")


def test_what_was_begun_and_never_settled_is_billed_for_its_estimated_input(path):
    async def leave():
        ledger = pomex.Ledger.open(path)
        ledger.start()
        await ledger.begin(pomex.Intent("r1", "req", NOW_MS, 1, "/v1/responses", "openai/gpt-5.5", 1, "openai", "gpt-5.5",
                                        1000, "5 30 - - - -", pomex.ONE, 5_000_000))
        os.close(ledger._journal.fd)        # as the end of a process does
    asyncio.run(leave())
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        row, = recent(ledger, 9)
        assert (row["error_code"], row["provider"], row["input"], row["cost_nanos"]) == ("interrupted", "openai", 1000, 5_000_000)
        assert row["estimated"] and pomex.verify(ledger) == (1, [])


# --- keys -----------------------------------------------------------------------------------------

def test_a_keys_settings_hold_at_once_and_in_other_processes_within_a_second(path, ledger):
    token = ledger.create_key("ci", NOW, budget_nanos=NANO, period="week", models="openai/* demo/echo", rpm=5)
    with contextlib.closing(pomex.Ledger.open(path)) as other:
        assert other.authorise(f"Bearer {token}", NOW).rpm == 5
        ledger.edit_key("ci", NOW, rpm=7, models="", budget_nanos=None)
        edited = other.authorise(f"Bearer {token}", NOW + pomex.KEYS_POLL_S)
        assert (edited.rpm, edited.models, edited.budget_nanos, edited.limited) == (7, "", None, True)
        ledger.write("UPDATE accounts SET prepaid = 1")
        assert other.authorise(f"Bearer {token}", NOW + 1).prepaid


@pytest.mark.parametrize("models, model, allowed", [
    ("", "a/b", True), ("openai/*", "openai/gpt", True), ("openai/*", "azure/gpt", False), ("x/y openai/*", "x/y", True),
    ("openai/gpt-?", "openai/gpt-55", False),
])
def test_a_key_may_use_the_models_of_its_patterns(ledger, models, model, allowed):
    ledger.create_key("k", NOW, models=models)
    assert key_of(ledger, "k").may_use(model) == allowed


# --- limits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("period, start, end", [
    ("day", "2026-11-22", "2026-11-23"), ("week", "2026-11-16", "2026-11-23"), ("month", "2026-11-01", "2026-12-01"),
    ("total", "1970-01-01", "1970-01-01"),
])
def test_periods_begin_and_end_with_days_of_utc(period, start, end):
    assert [pomex.day_text(day) for day in pomex.period_bounds(period, NOW + 86399)] == [start, end]


@contextlib.asynccontextmanager
async def started(path, count=1):
    ledgers = [pomex.Ledger.open(path) for _ in range(count)]
    try:
        for ledger in ledgers:
            ledger.start()
        yield ledgers
    finally:
        for ledger in ledgers:
            ledger.close()


PRICES = pomex.PriceBook(pomex.load_config("[prices.\"p/m\"]\ninput = 1\noutput = 10\n", "pomex.toml", {}))
TARGETS = [(pomex.ProviderConfig("p", wire_api="chat"), "m")]


def bill_for(ledger, name, response_id="r", at_s=None):
    return pomex.Bill(PRICES, ledger.budgets, key_of(ledger, name), response_id, "p/m", int((at_s or time.time()) * 1000))


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
"""


@pytest.mark.parametrize("target, asked, said, price", [
    ("openai/gpt-6.1-sol", "", "", "2 10 0.1 2.5 5 10"), ("openai/gpt-6.1-sol", "priority", "default", "2 10 0.1 2.5 5 10"),
    ("openai/gpt-6.1-sol", "auto", "priority", "4 20 0.2 5 10 10"), ("openai/gpt-6.1-sol", "priority", "", "4 20 0.2 5 10 10"),
    ("openai/gpt-6.1-sol", "fast", "", "4 20 0.2 5 10 10"), ("openai/gpt-6.1-sol", "flex", "", "2 10 0.1 2.5 5 10"),
    ("openai/gpt-6.1-sol", "flex", "flex", "1 5 0.05 1.25 2.5 10"), ("openai/gpt-6.1-sol", "ultrafast", "", "12 60 0.6 15 30 10"),
    ("openai/gpt-6.1-sol", "ultrafast", "priority", "4 20 0.2 5 10 10"), ("europe/m", "", "", "1.1 11 - - - -"),
    ("europe/m", "priority", "priority", "2.2 22 - - - -"), ("google/gemini-4-argon", "priority", "", "2 10 0.1 - - 14"),
    ("google/gemini-4-argon", "", "priority", "3.6 18 0.18 - - 14"),
])
def test_the_answer_says_what_it_is_billed_as_and_where_it_does_not_the_dearer_holds(ledger, target, asked, said, price):
    """Reserved is before an answer: the dearer of the standard tier and of the one asked for. Gemini is not asked for any."""
    book = pomex.PriceBook(pomex.load_config(TIERED, "pomex.toml", {}))
    ledger.create_key("k", NOW)
    bill = pomex.Bill(book, ledger.budgets, key_of(ledger, "k"), "r", target, NOW_MS, asked)
    assert bill.price(*target.split("/"), Usage(10, tier=said)) == price


def test_the_providers_own_cost_is_taken_where_there_is_no_price(ledger):
    ledger.create_key("k", NOW)
    bill = pomex.Bill(PRICES, ledger.budgets, key_of(ledger, "k"), "r", "p/other", NOW_MS)
    for model, price, nanos in (("other", "provider 0.012300000000", 12_300_000), ("m", "1 10 - - - -", 10_000)):
        charge = bill.charge("p", model, Usage(10, cost="0.012300000000"))
        assert (charge["price"], charge["cost_nanos"]) == (price, nanos)
    assert pomex.cost_nanos("provider 0.0123", 1_200_000, Usage(10**6)) == 14_760_000
    line = {"price": "provider 0.0123", "input": 10, "cached": 0, "cache_write": 0, "cache_write_1h": 0, "output": 5, "web_searches": 0,
            "multiplier": pomex.ONE}
    assert [(part["what"], part["nanos"]) for part in pomex.cost_parts(line) if part["nanos"]] == [("as the provider says", 12_300_000)]


def leased(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT coalesce(sum(amount), 0) FROM leases WHERE expires_s > ? AND slot = 0", (time.time(),)).fetchone()[0]


async def settled(ledger, bill, usage):
    charge = bill.charge("p", "m", usage)
    price, nanos = charge["price"], charge["cost_nanos"]
    bill.settle(nanos, usage)
    await ledger.settle(entry(bill.response_id, started_ms=bill.started_ms, key_id=bill.key.id, account_id=bill.key.account_id,
                              input=usage.input, output=usage.output, price=price, cost_nanos=nanos))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_many_at_once_in_several_processes_never_exceed_a_budget_and_nothing_stays_reserved(path, monkeypatch):
    monkeypatch.setattr(pomex, "TEND_S", 0.05)

    async def check():
        async with started(path, 4) as ledgers:
            ledgers[0].create_key("k", NOW, budget_nanos=50 * 11_000_000)         # for fifty of 1000 in and 1000 out
            pomex.insert_entries(ledgers[0]._writer, [entry("before", started_ms=int(time.time() * 1000), cost_nanos=110_000_000)])

            async def one(number):
                ledger = ledgers[number % 4]
                bill = bill_for(ledger, "k", f"r{number}")
                try:
                    cap = await bill.reserve(TARGETS, 1000, 1000, 16384)
                except pomex.Exceeded:
                    return 0
                assert leased(path) <= 550_000_000 - 110_000_000
                await asyncio.sleep(0.01)
                await settled(ledger, bill, Usage(1000, output=min(cap or 1000, 1000)))
                return 1
            served = sum(await asyncio.gather(*(one(number) for number in range(200))))
            for _ in range(100):
                await asyncio.sleep(0.03)
                if not leased(path) and not any(ledger._unsaved or ledger.budgets.leases for ledger in ledgers):
                    break
            spent = totals(ledgers[0])["cost_nanos"]
            assert 30 <= served and spent <= 550_000_000
            assert leased(path) == 0 and not any(ledger.budgets.leases for ledger in ledgers)
            return served
    assert run(check()) >= 30


def test_a_lease_whose_last_request_is_saved_while_it_is_renewed_goes_back(path):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("k", NOW, budget_nanos=550_000_000)
            await bill_for(ledger, "k").reserve(TARGETS, 1000, 1000, 16384)
            budgets, ask = ledger.budgets, ledger.budgets.ask
            (_, lease), = budgets.leases.values()

            async def ask_and_save(function, *args):
                await ask(function, *args)
                lease.held = lease.taken = 0            # as `saved` leaves it
            budgets.ask = ask_and_save
            await budgets._renew(time.time())
            assert leased(path)
            await budgets._renew(time.time())
            assert not leased(path) and not budgets.leases
    run(check())


def test_a_rate_holds_over_processes_and_says_when_to_come_again(path):
    async def check():
        async with started(path, 2) as ledgers:
            ledgers[0].create_key("k", NOW, rpm=10, tpm=1_000_000, concurrent=50)
            bills = [bill_for(ledgers[n % 2], "k", f"r{n}") for n in range(40)]
            results = await asyncio.gather(*(bill.reserve(TARGETS, 10, 0, 100) for bill in bills), return_exceptions=True)
            refused = [each for each in results if isinstance(each, pomex.Exceeded)]
            assert 9 <= 40 - len(refused) <= 10
            assert {no.limit.unit for no in refused} == {"requests"} and all(50 < no.wait_s <= 66 for no in refused)
            told = pomex.refusal(ledgers[0], key_of(ledgers[0], "k"), refused[0], time.time(), False)
            assert told.status == 429 and told.code == "rate_limit_exceeded" and dict(told.headers)["retry-after"].isdigit()
            headers = dict(bills[0].headers(time.time()))
            assert headers["x-ratelimit-limit-requests"] == "10" and headers["x-ratelimit-remaining-requests"] in "01"
            assert headers["x-ratelimit-limit-tokens"] == "1000000" and re.fullmatch(r"1m\ds", headers["x-ratelimit-reset-tokens"])
    run(check())


def test_open_requests_are_counted_and_their_place_is_free_again(path, monkeypatch):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("k", NOW, concurrent=2)
            bills = [bill_for(ledger, "k", f"r{n}") for n in range(3)]
            for bill in bills[:2]:
                await bill.reserve(TARGETS, 10, 0, 100)
            with pytest.raises(pomex.Exceeded):
                await bills[2].reserve(TARGETS, 10, 0, 100)
            bills[0].settle(0, Usage())
            await bills[2].reserve(TARGETS, 10, 0, 100)
    run(check())


def test_money_for_less_output_lowers_the_cap_and_for_too_little_refuses(path):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("k", NOW, budget_nanos=31_000_000)
            first = bill_for(ledger, "k", "r1")
            assert await first.reserve(TARGETS, 1000, 0, 16384) == 3000         # 1 + 30 thousandths of a dollar
            assert await first.cover(4 * 3000) and first.cap == 3000
            with pytest.raises(pomex.Exceeded) as no:
                await bill_for(ledger, "k", "r2").reserve(TARGETS, 1000, 0, 16384)
            told = pomex.refusal(ledger, key_of(ledger, "k"), no.value, NOW, True)
            assert (told.code, told.ledger_code, told.headers) == (
                "invalid_prompt", "insufficient_quota", (("x-should-retry", "false"),))
            await settled(ledger, first, Usage(1000, output=1000))
            assert await bill_for(ledger, "k", "r3").reserve(TARGETS, 1000, 0, 16384) == 1900
    run(check())


def test_a_cap_on_the_answer_is_none_on_the_money_where_thoughts_come_on_top(path):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("k", NOW, budget_nanos=31_000_000)
            bill = bill_for(ledger, "k")
            await bill.reserve(TARGETS, 1000, 1025, 16384)
            assert bill.reserved_output == 1025 and await bill.cover(4 * 1025) and bill.reserved_output == 1025
            assert await bill.cover(4 * 1100) and bill.reserved_output > 1100
            assert not await bill.cover(4 * 3001)
    run(check())


def test_a_reservation_grows_with_the_output_until_the_money_ends(path):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("k", NOW, budget_nanos=100_000_000)               # 10,000 tokens of output
            bill = bill_for(ledger, "k")
            await bill.reserve(TARGETS, 0, 0, 1000)
            held = []
            for tokens in range(0, 12_000, 100):
                if not await bill.cover(tokens * 4):
                    break
                held.append(bill.reserved_output)
            assert held[0] == 5096 and bill.reserved_output == 10_000 and tokens == 10_000
    run(check())


def test_what_a_killed_process_held_is_free_after_seconds_and_its_rows_count_first(path):
    code = ("import asyncio, pomex, sys, time, os, signal\n"
            "async def main():\n"
            "    ledger = pomex.Ledger.open(sys.argv[1]); ledger.start()\n"
            "    key, = ledger.list_keys()\n"
            "    limit = pomex.limits_of(key, int(time.time()))[0]\n"
            "    await ledger.budgets.take([(limit, 60)])\n"
            "    await ledger.settle(pomex.Entry('r1', 'q', int(time.time() * 1000), key.id, 'e', 'm', cost_nanos=25))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "asyncio.run(main())")
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        ledger.create_key("k", NOW, budget_nanos=100)
        environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(pomex.__file__))}
        subprocess.run([sys.executable, "-c", code, path], env=environ, timeout=20)
        limit = pomex.limits_of(key_of(ledger, "k"), int(time.time()))[0]
        (granted, room, _), = pomex.grant(ledger._writer, path, "us", [(limit, 50)], time.time())
        assert granted == 0 and room < 50
        (granted, room, _), = pomex.grant(ledger._writer, path, "us", [(limit, 50)], time.time() + pomex.LEASE_S + 1)
        assert granted >= 50 and granted + room == 75
        assert totals(ledger)["cost_nanos"] == 25


def test_keys_without_a_limit_touch_no_lease(path):
    async def check():
        async with started(path) as (ledger,):
            ledger.create_key("free", NOW)
            bill = bill_for(ledger, "free")
            assert await bill.reserve(TARGETS, 10**9, 0, 16384) == 0 and await bill.cover(10**9)
            bill.settle(5, Usage(1))
            assert not ledger.budgets.leases and not bill.headers(NOW)
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


async def row_of(ledger, count=1):
    for _ in range(100):
        if len(recent(ledger, 99)) >= count:
            break
        await asyncio.sleep(0.02)
    return recent(ledger, 99)[0]


def test_a_request_is_billed_at_the_price_its_row_keeps(path, caplog):
    caplog.set_level("INFO", "pomex")

    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = ledger.create_key("k", NOW)
            provider.answers += [(200, ["hi"], COUNTED), (200, ["hi"], COUNTED), (500, [], None), (500, [], None),
                                 (200, ["hi"], COUNTED)]
            assert (await ask(server, token, ASKED))[0] == 200
            row = await row_of(ledger)
            assert (row["price"], row["cost_nanos"], row["estimated"]) == ("1 10 - - - -", 200_000, "")
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            row = await row_of(ledger, 2)
            assert (row["price"], row["cost_nanos"]) == ("", 0)
            assert pomex.usage_report(ledger, "model", 0, 10**6)[1]["unpriced"] == 1
            provider.answers.insert(0, (200, ["hi"], {**COUNTED, "cost": 0.0123}))
            assert (await ask(server, token, {**ASKED, "model": "p/dearer"}))[0] == 200
            row = await row_of(ledger, 3)
            assert (row["price"], row["cost_nanos"]) == ("provider 0.012300000000", 12_300_000)
            await ask(server, token, {**ASKED, "model": "p/two"})               # a refusal costs nothing
            row = await row_of(ledger, 4)
            assert (row["provider"], row["cost_nanos"], row["attempts"]) == ("q", 400_000, 3)
            assert ledger.read("SELECT count(*) FROM attempts") == [(0,)] and pomex.verify(ledger) == (4, [])
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
            token = ledger.create_key("k", NOW)
            provider.answers.append((200, ["hi"], COUNTED))
            provider.named = {} if named is None else {"model": named}
            assert (await ask(server, token, {**ASKED, "model": f"p/{target}"}))[0] == 200
            row = await row_of(ledger)
            assert (row["upstream_model"], row["served_model"]) == (target, kept)
            pomex.insert_entries(ledger._writer, [entry("r2", attempts=2, lost=[line("r2")], served_model="z")])
            assert [each["served_model"] for each in pomex.export_rows(ledger, 0)][:2] == ["", "z"] and pomex.verify(ledger)[1] == []
    run(check())


def test_a_journal_of_a_version_without_that_column_is_read():
    old = [*entry("r1", lost=[[*line("r1")]])][:-1]
    (read,) = pomex.journal_entries(b"S" + json.dumps(old).encode() + b"\n")
    assert (read.served_model, len(read.lost)) == ("", 1)


def test_a_limit_of_money_is_never_served_what_has_no_price(path):
    """On loopback too: it may be a tunnel. What the message says to write into pomex.toml is a table that is read."""
    async def check():
        async with gateway(path) as (provider, ledger, server):
            add = ledger.write
            add("INSERT INTO accounts (name, prepaid, multiplier, created_s) VALUES ('paid', 1, 1000000, 0)")
            add("INSERT INTO credits (account_id, created_s, kind, nanos, reason) VALUES (2, 0, 'top-up', ?, '')", (NANO,))
            add("INSERT INTO accounts (name, prepaid, limit_nanos, multiplier, created_s) VALUES ('limit', 0, ?, 1000000, 0)", (NANO,))
            settings = {"budget": {"budget_nanos": NANO}, "paid": {"account_id": 2}, "limit": {"account_id": 3}}
            for name, given in settings.items():
                token = ledger.create_key(name, NOW, **given)
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
                assert (await row_of(ledger))["error_code"] == "price_unknown"
                status, headers, text = await ask(server, token, {**ASKED, "model": "p/other", "stream": False}, **CODEX)
                assert (status, json.loads(text)["error"]["code"]) == (400, "model_not_found")      # whose text it shows
                assert headers["x-pomex-error"] == (await row_of(ledger))["error_code"] == "price_unknown"
            assert not provider.bodies
            provider.answers += [(200, ["hi"], COUNTED)] * 6
            assert (await ask(server, token, {**ASKED, "model": "p/m-2026-11-02"}))[0] == 200      # of a family with a price
            assert (await row_of(ledger, 10))["cost_nanos"] == 200_000
            assert (await ask(server, token, {**ASKED, "model": "demo/echo"}))[0] == 200
            for name in settings:
                ledger.edit_key(name, NOW, allow_unpriced=1)
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            rated = ledger.create_key("rated", NOW, rpm=9, tpm=10**6, concurrent=3)                # no limit of money
            assert (await ask(server, rated, {**ASKED, "model": "p/other"}))[0] == 200
            assert pomex.verify(ledger)[1] == []
    run(check())


@pytest.mark.parametrize("section, line, price", [("[server]", "allow_unpriced", ""), ("[providers.p]", "free", pomex.FREE)])
def test_the_configuration_may_say_otherwise(path, section, line, price):
    async def check():
        async with gateway(path, edit=(section, f"{section}\n{line} = true")) as (provider, ledger, server):
            token = ledger.create_key("k", NOW, budget_nanos=NANO)
            provider.answers.append((200, ["hi"], COUNTED))
            assert (await ask(server, token, {**ASKED, "model": "p/other"}))[0] == 200
            row = await row_of(ledger)
            assert (row["price"], row["cost_nanos"]) == (price, 0)
    run(check())


def test_targets_without_a_price_are_passed_over_where_money_is_limited(path):
    async def check():
        async with gateway(path, '[models."p/either"]\ntargets = ["p:nameless", "q:m"]\n') as (provider, ledger, server):
            token, free = ledger.create_key("k", NOW, budget_nanos=NANO), ledger.create_key("free", NOW)
            provider.answers += [(200, ["hi"], COUNTED)] * 2
            for who, target, cost in ((free, "nameless", 0), (token, "m", 400_000)):
                assert (await ask(server, who, {**ASKED, "model": "p/either"}))[0] == 200
                row = await row_of(ledger, 1 + (who is token))
                assert (row["upstream_model"], row["cost_nanos"]) == (target, cost)
    run(check())


def test_an_attempt_that_began_and_broke_before_output_is_a_line_of_its_own(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = ledger.create_key("k", NOW)
            provider.answers += [(200, [], None), (200, ["hi"], COUNTED)]
            await ask(server, token, {**ASKED, "model": "p/two"})
            await row_of(ledger)
            (lost,) = ledger.read("SELECT provider, estimated, output, cost_nanos > 0 FROM attempts")
            assert lost == ("p", "no count from the provider", 0, 1)
            assert pomex.verify(ledger) == (2, [])
    run(check())


def test_a_used_budget_is_said_as_each_client_can_use_it(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = ledger.create_key("ci", time.time(), budget_nanos=200 * NANO)
            pomex.insert_entries(ledger._writer, [entry("r0", started_ms=int(time.time() * 1000), cost_nanos=200 * NANO)])
            sentence = r"Key ci has used 200\.00 of 200\.00 USD this month; it resets on 1 \w+\."
            status, headers, text = await ask(server, token, ASKED)
            error = json.loads(text)["error"]
            assert (status, error["code"], error["type"]) == (429, "insufficient_quota", "insufficient_quota")
            assert headers["x-should-retry"] == "false" and "retry-after" not in headers
            assert re.fullmatch(sentence, error["message"])
            status, headers, text = await ask(server, token, ASKED, **CODEX)
            failed = json.loads(text.split("event: response.failed\ndata: ")[1].split("\n")[0])["response"]
            assert status == 200 and failed["error"]["code"] == "invalid_prompt" and re.fullmatch(sentence, failed["error"]["message"])
            row = await row_of(ledger, 3)
            assert (row["status"], row["error_code"], row["input"], row["cost_nanos"]) == ("failed", "insufficient_quota", 0, 0)
            assert provider.bodies == []
            status, _, text = await ask(server, token, None, "/v1/key")
            data = json.loads(text)["data"]
            assert (data["limit"], data["usage"], data["limit_remaining"], data["limit_reset"][-10:]) == (200, 200, 0, "T00:00:00Z")
    run(check())


def test_a_refusal_says_the_true_sum_before_its_rows_are_saved(path, monkeypatch):
    monkeypatch.setattr(pomex, "SAVE_AFTER_S", 3600)

    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = ledger.create_key("ci", time.time(), budget_nanos=NANO)
            provider.answers.append((200, ["hi"], {"prompt_tokens": 100, "completion_tokens": 99_980}))
            assert (await ask(server, token, ASKED))[0] == 200
            assert recent(ledger, 9) == []                                          # not in the database yet
            status, _, text = await ask(server, token, ASKED)
            assert status == 429 and "Key ci has used 1.00 of 1.00 USD this month" in text, text
            assert round(json.loads((await ask(server, token, None, "/v1/key"))[2])["data"]["usage"], 4) == 0.9999
    run(check())


AMOUNTS = [     # as it is written, nano-dollars; None: refused
    ("12.50", 12_500_000_000), ("0", 0), (".5", 500_000_000), ("5.", 5_000_000_000), ("0.000000001", 1), ("-3", None), ("1e3", None),
    ("1e300000", None), ("1e900000", None), ("9" * 30, None), ("1_0", None), ("\u0661\u0662", None), ("\uff11", None), ("0.0000000001", None),
    ("1 000", None), (" 1", None), ("+1", None), ("nan", None), ("inf", None), ("", None), (".", None), ("-", None), ("1\n", None),
    ("9999999999", None), ("0x10", None), ("9" * 1_000_000, None),
]


@pytest.mark.parametrize("text, nanos", AMOUNTS, ids=[text[:12] for text, _ in AMOUNTS])
def test_an_amount_is_plain_digits_and_judged_at_once(text, nanos):
    started = time.monotonic()
    if nanos is None:
        with pytest.raises(ValueError):
            pomex.fraction(text, NANO)
        if text and text == text.strip():           # the form's blanks around an amount are none of it, its empty field is no limit
            with pytest.raises(pomex.BadRequest):
                pomex.read_fields(json.dumps({"budget": text}).encode(), pomex.KEY_FIELDS)
        with pytest.raises(pomex.argparse.ArgumentTypeError, match="must be like 50/month"):
            pomex.argument_type(pomex.KEY_FLAGS[0])(text + "/month")
    else:
        values = pomex.read_fields(json.dumps({"budget": text}).encode(), pomex.KEY_FIELDS)
        assert pomex.fraction(text, NANO) == values["budget"]["budget_nanos"] == nanos
    assert time.monotonic() - started < 0.1


@pytest.mark.parametrize("value", ["1e30", "9" * 30, "-1e30", "9" * 4000, "1e300", "inf", "nan", "1e-7", "0.0000001", "1e9"],
                         ids=lambda value: value[:9])
def test_a_price_is_judged_at_once_and_refused_with_a_sentence(value):
    for key in ("input", "tiers.priority"):
        started = time.monotonic()
        with pytest.raises(pomex.ConfigError, match="must be (an? |between 0 and )"):
            pomex.load_config(f'[prices."x/y"]\noutput = 1\n{key} = {value}\n', "pomex.toml", {})
        assert time.monotonic() - started < 0.1


def test_a_used_rate_is_said_with_the_time_to_wait(path):
    async def check():
        async with gateway(path) as (provider, ledger, server):
            token = ledger.create_key("ci", time.time(), rpm=1)
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
            token = ledger.create_key("ci", time.time(), models="demo/*")
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
            token = ledger.create_key("k", time.time(), budget_nanos=170_000_000)      # about 17,000 tokens of output
            provider.answers += [(200, ["word " * 800] * 30, None)]
            status, _, text = await ask(server, token, ASKED)
            assert status == 200 and "event: response.incomplete\n" in text and '"reason":"max_output_tokens"' in text
            row = await row_of(ledger)
            assert row["status"] == "incomplete" and row["estimated"] and 160_000_000 < row["cost_nanos"] < 180_000_000
            provider.answers += [(200, ["hi"], COUNTED)]
            status, _, text = await ask(server, ledger.create_key("less", time.time(), budget_nanos=10_000_000), ASKED)
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
    assert "balance is 20.00 USD" in told(capsys, "accounts", "credit", "acme", "20").err
    assert "balance is 19.50 USD" in told(capsys, "accounts", "credit", "acme", "--reason", "mistake", "--", "-0.5").err
    assert "needs its reason" in told(capsys, "accounts", "credit", "acme", "--", "-1", code=1).err
    assert "must not be 0" in told(capsys, "accounts", "credit", "acme", "0", code=1).err
    said = told(capsys, "keys", "create", "laptop", "--budget", "50/month", "--models", "openai/*", "--account", "acme", "--rpm", "60")
    assert re.fullmatch(r"sk-rh-\w{32}\n", said.out)
    assert said.err == ("Key laptop created: 50.00 USD a month, models openai/*, 60 requests a minute, account acme. "
                        "It is not shown again.\n")
    now_ms = int(time.time() * 1000)
    with contextlib.closing(pomex.Ledger.open(str(here / "pomex.db"))) as ledger:
        pomex.insert_entries(ledger._writer, [
            entry("r1", started_ms=now_ms, account_id=2, provider="openai", input=2_000_000, cached=500_000, output=10_000,
                  price="20 100 - - - -", multiplier=1_250_000, cost_nanos=51_250_000_000),
            entry("r2", started_ms=now_ms, account_id=2, model="local/q", provider="local", input=10, output=1)])
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
    assert told(capsys, "ledger", "export", "--csv").out.count("\n") == 3
    assert json.loads(told(capsys, "accounts", "list", "--json").out)[1]["balance_usd"] == "-31.750000000"
    assert "x 1.25" in told(capsys, "accounts", "list").out
    assert "no limits" in told(capsys, "keys", "edit", "laptop", "--budget", "none", "--rpm", "0", "--models", "all",
                               "--account", "default").err
    assert "0 lines" in told(capsys, "prune", "--older", "90d").err
    assert "Copied" in told(capsys, "backup", str(here / "copy.db")).err
    assert len(json.loads(told(capsys, "prices", "show", "--json").out)) == len(pomex.builtin_tariffs())
    assert "over 200 000" in told(capsys, "prices", "show").out


@pytest.mark.parametrize("argv", [
    ("keys", "create", "k", "--budget", "50"), ("keys", "create", "k", "--budget", "5/year"), ("keys", "create", "k", "--rpm", "-1"),
    ("usage", "--since", "yesterday"), ("statement", "a", "--month", "2026-13"), ("accounts", "credit", "a", "1.0000000001"),
    ("keys", "create", "k", "--budget", "nan/day"), ("ledger", "export"),
])
def test_a_value_that_makes_no_sense_is_refused(here, capsys, argv):
    told(capsys, *argv, code=2)


def test_money_is_printed_with_integers():
    assert [pomex.usd(nanos) for nanos in (0, 4_999_999, 5_000_000, -12_345_678_901, 10**18)] == [
        "0.00", "0.00", "0.01", "-12.35", "1000000000.00"]
    assert pomex.usd(41_234_567, 4) == "0.0412"
