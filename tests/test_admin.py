"""The admin API: who may ask, from where, and what the answers hold. Real sockets on loopback."""
import asyncio
import collections
import contextlib
import json
import logging
import re
import subprocess
import sys
import time

import pytest
from demos import slow_and_error
from ledgers import account_made, audited, change, insert, read, refusals, under_way

import pomex

TOKEN = "machine-token-0123456789"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
JSON_TYPE = {"content-type": "application/json"}


class Gateway:
    """A running gateway, and one request at a time to it."""

    def __init__(self, server, ledger, key, other):
        self.port, self.ledger, self.server, self.key, self.other = server.address[1], ledger, server, key, other

    async def ask(self, method, path, body=None, headers=(), read=None):
        """(status, headers, body); with `read` only so many bytes of a stream."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": f"127.0.0.1:{self.port}", "content-length": str(len(data)), "connection": "close", **dict(headers)}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        names = {line.partition(": ")[0]: line.partition(": ")[2] for line in head[1:] if line}
        if read:
            return int(head[0].split()[1]), names, reader, writer
        answer = await reader.read()
        writer.close()
        return int(head[0].split()[1]), names, answer

    async def get(self, path, headers=ADMIN):
        status, _, body = await self.ask("GET", "/admin/api/" + path, headers=headers)
        return status, json.loads(body)

    async def post(self, path, body, headers=ADMIN):
        status, names, answer = await self.ask("POST", "/admin/api/" + path, body, {**JSON_TYPE, **headers})
        return status, json.loads(answer), names

    async def answer(self, key, model="demo/echo", headers=(), words="hello"):
        body = {"model": model, "input": words}
        return await self.ask("POST", "/v1/responses", body, {**JSON_TYPE, "authorization": f"Bearer {key}", **dict(headers)})

    async def refused(self, headers=ADMIN):
        """What the set-up page shows of refusals, those of this second too."""
        await self.ledger.save_counts()
        await self.ledger.db.write(lambda _: None)          # what the gateway itself has begun to save is saved then too
        return (await self.get("setup", headers))[1]["refused"]

    async def feed(self, headers=ADMIN):
        """(reader, writer) of a live feed that knows what is old."""
        _, _, reader, writer = await self.ask("GET", "/admin/api/events", headers=headers, read=True)
        await reader.readuntil(b": hello\n\n")
        return reader, writer

    @property
    def page(self):
        return {"origin": f"http://127.0.0.1:{self.port}"}

    async def session(self, token):
        """The cookie of a login."""
        status, body, names = await self.post("login", {"token": token}, self.page)
        assert status == 200, body
        return {"cookie": names["set-cookie"].partition(";")[0]}, names["set-cookie"]


def gateway_test(test):
    """Runs a test as a coroutine beside a gateway of its own."""
    def run(tmp_path, *args, **kwargs):
        async def inside():
            text = f'[server]\nport = 0\nadmin_token = "{TOKEN}"\n[database]\nurl = "sqlite:{tmp_path}/p.db"\n'
            config = pomex.load_config(text, str(tmp_path / "pomex.toml"), {})
            with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
                key = await ledger.create_key("ana", time.time(), budget_nanos=5 * 10**9)
                other = await ledger.create_key("bo", time.time())
                with slow_and_error():
                    async with pomex.running(config, ledger) as server:
                        await test(Gateway(server, ledger, key, other), *args, **kwargs)
        asyncio.run(inside())
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def parametrized(names, rows):
    def wrap(test):
        inner = gateway_test(test)

        @pytest.mark.parametrize("row", rows, ids=lambda row: str(row[0])[:40])
        def run(tmp_path, row):
            inner(tmp_path, *row)
        run.__name__ = test.__name__
        return run
    return wrap


@gateway_test
async def test_the_page_is_served_to_anybody_gzipped_and_with_its_tag(gateway):
    status, names, body = await gateway.ask("GET", "/admin")
    assert status == 200 and body == pomex.PAGE.encode() and names["x-content-type-options"] == "nosniff"
    status, zipped_names, zipped = await gateway.ask("GET", "/admin", headers={"accept-encoding": "br, gzip"})
    assert zipped_names["content-encoding"] == "gzip" and len(zipped) < len(body) / 2
    assert zipped_names["etag"] != names["etag"], "a strong tag is that of the bytes"
    for tag, coding in ((names["etag"], "identity"), (zipped_names["etag"], "gzip")):
        status, _, body = await gateway.ask("GET", "/admin", headers={"if-none-match": tag, "accept-encoding": coding})
        assert (status, body) == (304, b"")


@gateway_test
async def test_a_login_link_opens_one_session_once(gateway):
    link = await pomex.open_session(gateway.ledger.db, "link", 0, 600, time.time())
    cookie, whole = await gateway.session(link)
    assert "HttpOnly" in whole and "SameSite=Strict" in whole and "Path=/admin" in whole and "Secure" not in whole
    assert (await gateway.get("session", cookie))[1]["role"] == "admin"
    assert (await gateway.post("login", {"token": link}, gateway.page))[0] == 401
    await gateway.post("logout", {}, {**cookie, **gateway.page})
    assert (await gateway.get("session", cookie))[0] == 401


@gateway_test
async def test_a_login_link_ends_after_its_time_and_is_no_session_itself(gateway):
    old = await pomex.open_session(gateway.ledger.db, "link", 0, 600, time.time() - 601)
    new = await pomex.open_session(gateway.ledger.db, "link", 0, 600, time.time())
    assert (await gateway.post("login", {"token": old}, gateway.page))[0] == 401
    assert (await gateway.get("session", {"cookie": f"pomex_{gateway.port}={new}"}))[0] == 401
    assert (await gateway.get("session", {"authorization": f"Bearer {new}"}))[0] == 401


@gateway_test
async def test_secure_is_set_where_the_browser_came_by_https(gateway):
    _, whole = await gateway.session(TOKEN)
    assert "Secure" not in whole
    host = f"127.0.0.1:{gateway.port}"
    _, _, names = await gateway.post("login", {"token": TOKEN}, {"origin": "https://" + host})
    assert names["set-cookie"].endswith("Secure")


@gateway_test
async def test_five_failed_logins_close_the_door_for_a_minute(gateway):
    seen = [await gateway.post("login", {"token": f"wrong-{n}"}, gateway.page) for n in range(6)]
    assert [status for status, _, _ in seen] == [401] * 5 + [429]
    assert 0 < int(seen[-1][2]["retry-after"]) <= 60
    for right in (ADMIN, {"authorization": f"Bearer {gateway.key}"}):      # who is right never waits for who is wrong
        assert (await gateway.get("session", right))[0] == 200
    link = (await pomex.login_link(gateway.ledger, "")).partition("=")[2]
    assert (await gateway.post("login", {"token": link}, gateway.page))[0] == 200
    assert (await gateway.post("login", {"token": "wrong"}, gateway.page))[0] == 429
    assert (await gateway.get("session", {"authorization": f"Bearer {pomex.new_key()}"}))[0] == 429, "a key that is none"


@parametrized("headers status", [
    ("another site", {"origin": "https://evil.example"}, 403),
    ("another port of this machine", {"origin": "http://127.0.0.1:1"}, 403),
    ("a sandboxed frame", {"origin": "null"}, 403),
    ("no origin", {}, 403),
    ("another site, as the browser says", {"sec-fetch-site": "cross-site"}, 403),
    ("the same site, but another port", {"sec-fetch-site": "same-site"}, 403),
    ("the page, as the browser says", {"sec-fetch-site": "same-origin"}, 200),
    ("a form", {"origin": "PAGE", "content-type": "text/plain"}, 415),
    ("a form of another kind", {"origin": "PAGE", "content-type": "application/x-www-form-urlencoded"}, 415),
    ("the page", {"origin": "PAGE"}, 200),
])
async def test_changes_with_a_cookie_are_taken_from_the_page_only(gateway, _, headers, status):
    cookie, _ = await gateway.session(TOKEN)
    headers = {name: gateway.page["origin"] if value == "PAGE" else value for name, value in headers.items()}
    assert (await gateway.post("keys", {"name": "new"}, {**cookie, **headers}))[0] == status
    assert len(gateway.ledger.list_keys()) == (3 if status == 200 else 2)


@parametrized("host status", [("evil.example", 421), ("127.0.0.1", 200), ("localhost:7", 200), ("[::1]:7", 200)])
async def test_only_hosts_that_are_ours_are_answered(gateway, host, status):
    assert (await gateway.ask("GET", "/admin", headers={"host": host}))[0] == status


@parametrized("host status", [("evil.example", 421), ("10.1.2.3:7663", 200), ("[fe80::1]", 200), ("localhost", 200)])
async def test_bound_to_every_interface_the_dashboard_still_answers_for_no_name(gateway, host, status):
    gateway.server.any_host = True
    assert (await gateway.ask("GET", "/admin", headers={"host": host}))[0] == status


@gateway_test
async def test_no_change_is_made_by_get(gateway):
    routes = {name for names in pomex.ADMIN_ROUTES.values() for name in names}
    assert {"POST logout", "POST keys/*", "POST providers/*/disable"} <= routes
    for method, path in map(str.split, routes):
        if method == "POST" and f"GET {path}" not in routes:
            status, names, _ = await gateway.ask("GET", "/admin/api/" + path.replace("*", "1"), headers=ADMIN)
            assert (status, names["allow"]) == (405, "POST"), path
    for path in ("nothing", "keys/1/nothing", "keys/1/revoke/now", "keys/", ""):
        assert (await gateway.post(path, {}))[0] == 404, path


@gateway_test
async def test_a_key_opens_the_view_of_its_holder_and_nothing_else(gateway):
    await gateway.answer(gateway.key)
    _, _, body = await gateway.answer(gateway.other)
    mine, theirs = {"authorization": f"Bearer {gateway.key}"}, json.loads(body)["id"]
    cookie, _ = await gateway.session(gateway.key)
    for who in (mine, cookie):
        status, session = await gateway.get("session", who)
        assert (session["role"], session["key"]["name"], session["key"]["budget_nanos"]) == ("key", "ana", 5 * 10**9)
        assert {row["key"] for row in (await gateway.get("usage", who))[1]["rows"]} == {"ana"}
        assert (await gateway.get("usage?key=bo", who))[1]["rows"] == []
        assert (await gateway.get("usage/" + theirs, who))[0] == 404
        assert (await gateway.get("overview", who))[1]["totals"]["requests"] == 1
        for method, path in map(str.split, pomex.ADMIN_ROUTES["admin"]):
            ask = gateway.get(path.replace("*", "1"), who) if method == "GET" else gateway.post(path.replace("*", "1"), {}, {**who, **gateway.page})
            status, error = (await ask)[:2]
            assert status == 403 and error["error"]["code"] == "admin_only", path
    await gateway.ledger.revoke_key("ana", time.time())
    assert (await gateway.get("session", cookie))[0] == 401


@gateway_test
async def test_the_export_of_a_holder_holds_his_rows_only(gateway):
    await gateway.answer(gateway.key)
    await gateway.answer(gateway.other)
    for kind in ("csv", "jsonl"):
        _, names, body = await gateway.ask("GET", f"/admin/api/usage.{kind}", headers={"authorization": f"Bearer {gateway.key}"})
        assert b"ana" in body and b",bo," not in body and b'"bo"' not in body and "attachment" in names["content-disposition"]
    row, = (json.loads(line) for line in body.splitlines() if line.startswith(b"{"))       # the others frame chunks
    assert (row["key"], row["model"], names["content-type"]) == ("ana", "demo/echo", "application/jsonl; charset=utf-8")


@parametrized("headers path code message", [
    ("no key", {"authorization": ""}, "/v1/responses", "invalid_api_key", "No API key was sent"),
    ("placeholder", {"authorization": "Bearer sk-rh-xxxxxxxxxxxx"}, "/v1/responses", "invalid_api_key", "guide's placeholder"),
    ("variable", {"authorization": "Bearer $POMEX_API_KEY"}, "/v1/responses", "invalid_api_key", "did not expand it"),
    ("codex exec", {"originator": "codex_exec"}, "/v1/responses", "invalid_api_key", "mistyped or cut"),
    ("the TUI's background server", {"originator": "codex-tui"}, "/v1/responses", "invalid_api_key",
     "mistyped or cut (sk-rh-…): its checksum does not fit. Copy the whole key again. Newer Codex keeps the key of its first start"),
    ("missing /v1", {}, "/responses", "wrong_base_url", "base_url must end with /v1"),
    ("an API of Ollama", {}, "/api/chat", "wrong_wire_api", "OpenAI-compatible provider"),
    ("Claude Code's address with /v1", {}, "/v1/v1/messages", "wrong_base_url", "ANTHROPIC_BASE_URL must be http://127.0.0.1"),
])
async def test_a_mistake_stands_on_the_set_up_page_in_the_log_and_in_the_answer(gateway, _, headers, path, code, message):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    pomex.log.addHandler(handler)
    pomex.log.setLevel(logging.INFO)
    try:
        _, _, answer = await gateway.ask("POST", path, {"model": "demo/echo"}, {**JSON_TYPE, "authorization": "Bearer sk-rh-a",
                                                                               "user-agent": "codex/1 <b>", **headers})
        gateway.server.flush_access_log()
    finally:
        pomex.log.removeHandler(handler)
    item, = await gateway.refused()
    assert (item["code"], item["user_agent"]) == (code, "codex/1 <b>") and message in item["message"]
    assert ("codex app-server daemon restart" in item["message"]) == (headers.get("originator") == "codex-tui")
    assert json.loads(answer)["error"]["message"] == item["message"]
    assert any(message in record.getMessage() for record in records)
    assert await gateway.refused({"authorization": f"Bearer {gateway.key}"}) == []


@gateway_test
async def test_refusals_are_kept_within_bounds_and_all_are_counted(gateway):
    for _ in range(60):
        await gateway.ask("POST", "/responses", {})
    shown = await gateway.refused()
    assert 1 <= len(shown) <= 3 and sum(item["count"] for item in shown) == 60, "of many alike in a second one is kept"
    for n in range(2 * pomex.REFUSALS_AT_ONCE):
        await gateway.ask("POST", f"/{n}/responses", {})
    assert len(await gateway.refused()) <= len(shown) + 2 * pomex.REFUSALS_AT_ONCE - 1, "of so many different ones not all"
    text = (await gateway.ask("GET", "/metrics"))[2].decode()
    assert f'pomex_refusals_total{{code="wrong_base_url"}} {60 + 2 * pomex.REFUSALS_AT_ONCE}\n' in text


@gateway_test
async def test_only_the_newest_refusals_stay_and_fewer_are_shown(gateway):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pomex, "REFUSALS_KEPT", pomex.REFUSALS_SHOWN + 5)
        for n in range(pomex.REFUSALS_SHOWN + 15):
            gateway.ledger.refuse(0, {"time_ms": n, "code": "x", "path": f"/{n}", "key_id": 0})
            await gateway.ledger.save_counts()
    assert [item["time_ms"] for item in refusals(gateway.ledger)] == [*range(pomex.REFUSALS_SHOWN + 14, 9, -1)]
    assert [item["time_ms"] for item in await gateway.refused()] == [*range(pomex.REFUSALS_SHOWN + 14, 14, -1)]


@gateway_test
async def test_the_live_feed_tells_of_rows_and_refusals_and_ends_with_the_gateway(gateway):
    status, names, reader, writer = await gateway.ask("GET", "/admin/api/events", headers=ADMIN, read=True)
    assert (status, names["content-type"]) == (200, "text/event-stream; charset=utf-8")
    await reader.readuntil(b": hello\n\n")
    await gateway.ask("POST", "/responses", {})
    await asyncio.wait_for(reader.readuntil(b"event: refused\n"), 3)
    await gateway.answer(gateway.key)
    await asyncio.wait_for(reader.readuntil(b"id: 1\nevent: usage\n"), 3)
    row = json.loads((await reader.readline())[6:])
    assert (row["key"], row["model"], row["result"]) == ("ana", "demo/echo", "completed")
    again = await gateway.ask("GET", "/admin/api/events", headers={**ADMIN, "last-event-id": "0"}, read=True)
    await asyncio.wait_for(again[2].readuntil(b"id: 1\nevent: usage\n"), 1)
    started = time.monotonic()
    await gateway.server.drain(5)
    assert time.monotonic() - started < 3
    writer.close()
    again[3].close()


@gateway_test
async def test_a_browser_that_comes_back_gets_each_row_that_it_missed_once(gateway):
    for _ in range(2):
        await gateway.answer(gateway.key)
    _, _, reader, writer = await gateway.ask("GET", "/admin/api/events", headers={**ADMIN, "last-event-id": "1"}, read=True)
    await asyncio.wait_for(reader.readuntil(b"id: 2\nevent: usage\n"), 2)
    await gateway.answer(gateway.key)
    more = await asyncio.wait_for(reader.readuntil(b"id: 3\nevent: usage\n"), 3)
    assert b"id: 1\n" not in more and b"id: 2\n" not in more
    writer.close()


@gateway_test
async def test_the_live_feed_tells_that_a_request_began_and_the_set_up_page_that_it_runs(gateway):
    reader, writer = await gateway.feed()
    asking = asyncio.ensure_future(gateway.answer(gateway.key, "demo/slow", {"user-agent": "codex_exec/9", "originator": "codex_exec"},
                                                  "a request that takes longer than a look"))
    while not (line := await asyncio.wait_for(reader.readline(), 5)).startswith(b"event"):
        pass
    assert line == b"event: started\n"
    told = json.loads((await reader.readline())[6:])
    assert (told["model"], told["key"], told["client"]) == ("demo/slow", "ana", "codex_exec/9")
    assert (await gateway.get("setup"))[1]["running"] == told
    asking.cancel()
    writer.close()


@gateway_test
async def test_a_request_that_ended_does_not_run_and_shows_when_its_provider_was_asked_and_began(gateway):
    await gateway.answer(gateway.key, "demo/flaky")
    assert (await gateway.get("setup"))[1]["running"] is None
    row, = (await gateway.get("usage"))[1]["rows"]
    found = (await gateway.get("usage/" + row["response_id"]))[1]
    assert found["row"] == row and row["tried"] == ["demo"] and len(found["trace"]["tried"]) == 1
    assert 0 < found["trace"]["tried_ms"][0] <= row["asked_ms"] <= row["answering_ms"] <= row["total_ms"]


@gateway_test
async def test_a_holders_feed_has_nothing_of_others(gateway):
    reader, writer = await gateway.feed({"authorization": f"Bearer {gateway.key}"})
    await gateway.ask("POST", "/responses", {})
    await gateway.answer(gateway.other)
    await gateway.answer(gateway.key)
    got = await asyncio.wait_for(reader.readuntil(b"event: usage\n"), 3) + await reader.readline()
    assert b"refused" not in got and b'"key":"ana"' in got
    writer.close()


@parametrized("body param", [
    ({"name": "a b"}, "name"), ({"name": "ana"}, "name"), ({"name": "x", "budget": "many"}, "budget"), ({"name": "x", "budget": "-1"}, "budget"),
    ({"name": "x", "budget": "1e400"}, "budget"), ({"name": "x", "budget": "NaN"}, "budget"), ({"name": "x", "period": "year"}, "period"),
    ({"name": "x", "models": "ä"}, "models"), ({"name": "x", "rpm": "-3"}, "rpm"), ({"name": "x", "expires_days": "soon"}, "expires_days"),
    ({"name": "x", "account": "nobody"}, "name"), ({"name": 5}, "name"),
])
async def test_a_wrong_field_is_named(gateway, body, param):
    status, error, _ = await gateway.post("keys", body)
    assert (status, error["error"]["param"]) == (400, param)
    assert len(gateway.ledger.list_keys()) == 2


@gateway_test
async def test_a_key_is_made_edited_and_revoked(gateway):
    status, made, _ = await gateway.post("keys", {"name": "new", "budget": "12.50", "period": "week", "models": "demo/*, openai/*"})
    assert status == 200 and (await gateway.answer(made["token"]))[0] == 200
    key = gateway.ledger.list_keys()[-1]
    assert (key.budget_nanos, key.period, key.models) == (12_500_000_000, "week", "demo/* openai/*")
    await gateway.post(f"keys/{key.id}", {"budget": "", "rpm": "5"})
    key = gateway.ledger.list_keys()[-1]
    assert (key.budget_nanos, key.rpm, key.period) == (None, 5, "week")
    assert (await gateway.post(f"keys/{key.id}/revoke", {}))[0] == 200
    assert (await gateway.answer(made["token"]))[0] == 401
    assert (await gateway.post(f"keys/{key.id}/revoke", {}))[0] == 404
    assert not any("token" in row or "digest" in row for row in (await gateway.get("keys"))[1]["keys"])


@parametrized("path, body, said", [
    ("keys", {"name": "y", "bugdet": "50"}, "no field 'bugdet'. Did you mean budget?"),
    ("keys", {"name": "y", "expire_days": "30"}, "Did you mean expires_days?"), ("keys/1", {"name": "y"}, "no field 'name'"),
    ("keys/1/revoke", {"now": True}, "no field 'now'"), ("keys", {"name": "y", "models": ","}, "patterns like openai/*"),
    ("keys", {"name": "y", "models": "\u043e/*"}, "patterns like openai/*"), ("keys", {"name": "y", "budget": -1}, "an amount like"),
    ("keys", {"name": "y", "allow_unpriced": "maybe"}, "allow_unpriced must be true or false"),
    ("accounts", {"name": "y", "prepaid": "never"}, "true or false"), ("accounts", {"name": "y", "multiplier": "-1"}, "a number like"),
    ("accounts/default/credit", {"amount": 0}, "must not be 0"), ("accounts/default/credit", {}, "must not be 0"),
    ("accounts/default/credit", {"amount": "-1"}, "needs its reason"),
    ("accounts", {"name": "y", "prepaid": []}, "true or false"), ("accounts/default/credit", {"amount": "1", "reason": "a\x1b[31m"}, "on one line"),
    ("accounts/default/credit", {"amount": "1", "reason": "\ud800"}, "on one line"), ("keys", {"name": "y", "account": "\u202ex"}, "on one line"),
])
async def test_a_field_that_is_not_right_changes_nothing(gateway, path, body, said):
    before = (await gateway.get("keys"))[1]
    status, answer, _ = await gateway.post(path, body)
    assert status == 400 and said in answer["error"]["message"], answer
    after = (await gateway.get("keys"))[1]
    assert [before["keys"], before["accounts"]] == [after["keys"], after["accounts"]]


@gateway_test
async def test_amounts_and_truths_may_be_json(gateway):
    assert (await gateway.post("keys", {"name": "y", "budget": 12.5, "rpm": 3}))[0] == 200
    assert [key["budget_nanos"] for key in (await gateway.get("keys"))[1]["keys"] if key["name"] == "y"] == [12_500_000_000]
    key = next(key for key in (await gateway.get("keys"))[1]["keys"] if key["name"] == "y")
    for allow, stored in ((True, 1), ("0", 0)):
        assert (await gateway.post(f"keys/{key['id']}", {"allow_unpriced": allow}))[0] == 200
        assert [each["allow_unpriced"] for each in (await gateway.get("keys"))[1]["keys"] if each["name"] == "y"] == [stored]
    for name, prepaid, stored in (("a", "0", 0), ("b", True, 1), ("c", "1", 1), ("d", "", 0)):
        assert (await gateway.post("accounts", {"name": name, "prepaid": prepaid}))[0] == 200
        assert [each["prepaid"] for each in (await gateway.get("keys"))[1]["accounts"] if each["name"] == name] == [stored]
    for month, status in (("9999-12", 200), ("9999-13", 400), ("10000-01", 400)):
        assert (await gateway.get(f"accounts/default/statement?month={month}"))[0] == status


@gateway_test
async def test_a_live_feed_without_news_sends_its_heartbeat_alone(gateway):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pomex, "FEED_HEARTBEAT_S", 2.5)
        reader, writer = await gateway.feed()
        await reader.readline()                     # the end of the chunk
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 1.8)
        assert await asyncio.wait_for(reader.readuntil(b": \n\n"), 4) == b"4\r\n: \n\n"
    writer.close()


@gateway_test
async def test_the_feed_of_a_key_ends_with_the_key(gateway):
    token = await gateway.ledger.create_key("soon", time.time(), expires_s=int(time.time()) + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pomex, "FEED_HEARTBEAT_S", 0.2)
        _, _, reader, writer = await gateway.ask("GET", "/admin/api/events", headers={"authorization": f"Bearer {token}"}, read=True)
        await asyncio.wait_for(reader.read(), 5)
    writer.close()


@gateway_test
async def test_an_origin_that_is_no_address_is_refused_like_another(gateway):
    for origin in ("http://[", "null", "http://evil.example", "http://127.0.0.1"):
        status, answer, _ = await gateway.post("login", {"token": "x"}, {"origin": origin})
        assert (status, answer["error"]["code"]) == (403, "cross_origin"), origin


@gateway_test
async def test_within_a_second_the_same_overview_is_computed_once_for_each_holder(gateway):
    computed, overview = [], pomex.overview
    async def counted(db, *args):
        computed.append(args[-1])
        return await overview(db, *args)
    holder = {"authorization": f"Bearer {gateway.key}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pomex, "overview", counted)
        await asyncio.sleep(1.02 - time.time() % 1)         # the rest lies within one second
        first = (await gateway.get("overview"))[1]
        assert (await gateway.get("overview"))[1] == first and computed == [0]
        assert (await gateway.get("overview", holder))[1]["providers"] == [] and computed == [0, 1]
        await gateway.get("overview?slots=2")
        assert computed == [0, 1, 0]
        for slots in range(3, 40):
            await gateway.get(f"overview?slots={slots}")
        assert len(gateway.server.gateway.overviews) <= pomex.OVERVIEWS_KEPT
        await gateway.answer(gateway.key)
        await asyncio.sleep(1.02 - time.time() % 1)
        assert (await gateway.get("overview"))[1]["totals"]["requests"] == 1


@gateway_test
async def test_a_key_is_told_its_account_models_limits_and_end(gateway):
    token = await gateway.ledger.create_key("cy", time.time(), models="demo/*", expires_s=4_000_000_000, rpm=60, concurrent=2)
    _, _, body = await gateway.ask("GET", "/v1/key", headers={"authorization": f"Bearer {token}"})
    data = json.loads(body)["data"]
    assert (data["label"], data["account"], data["models"], data["expires_at"]) == ("cy", "default", ["demo/*"], 4_000_000_000)
    assert data["rate_limit"] == {"requests_per_minute": 60, "tokens_per_minute": None, "concurrent_requests": 2}
    assert (data["limit"], data["limit_period"], data["limit_reset"]) == (None, "month", None)


@gateway_test
async def test_the_metrics_say_by_which_error_requests_failed_and_when_the_process_began(gateway):
    counters = collections.Counter()
    row = entry(gateway.ledger, 1, time.time(), status="failed", result="failed")
    for code in ("rate_limit_exceeded", "client_gone", "a_provider's_own"):
        pomex.count_request(counters, [row.model], [row._replace(error_code=code)])
    assert {place[-1] for place in counters if place[0] == "pomex_requests_total"} == {
        "rate_limit_exceeded", "client_gone", "failed"}
    _, _, text = await gateway.ask("GET", "/metrics")
    assert f"\nprocess_start_time_seconds {gateway.server.gateway.started_s}\n".encode() in text
    assert float(re.search(rb"\nprocess_cpu_seconds_total ([0-9.]+)\n", text)[1]) > 0


@pytest.mark.parametrize(("minutes", "state"), [
    ([[0, 0]] * 60, "no requests"), ([[9, 9], [0, 0], [4, 3]], "failing"), ([[4, 0], [4, 2], [0, 0]], "healthy"),
    ([[4, 3], [4, 0], [4, 0]], "recovering"), ([[4, 3], *[[1, 0]] * 5], "healthy")])
def test_a_provider_recovers_for_five_minutes_that_had_requests(minutes, state):
    assert pomex.provider_state(minutes) == state


@gateway_test
async def test_the_log_has_a_next_page_only_where_there_are_more_rows(gateway):
    for _ in range(4):
        await gateway.answer(gateway.key)
    first = (await gateway.get("usage?limit=2"))[1]
    last = (await gateway.get(f"usage?limit=2&cursor={first['cursor']}"))[1]
    assert [len(each["rows"]) for each in (first, last)] == [2, 2] and last["cursor"] is None


@gateway_test
async def test_what_another_process_began_is_open_until_that_process_has_ended(gateway):
    with contextlib.closing(pomex.Ledger.open(gateway.ledger.db.place)) as other:
        begun = entry(gateway.ledger, 1, time.time(), status="in flight")._replace(response_id="resp_other")
        other.begin("resp_other", lambda: begun)
        await other.recorded("resp_other")
        assert (await gateway.get("setup"))[1]["running"]["response_id"] == "resp_other"
        change(gateway.ledger, "UPDATE processes SET pid = ? WHERE process = ?", ended_process(), other.process)
        await gateway.ledger.beat()
    assert (await gateway.get("setup"))[1]["running"] is None
    row, = (await gateway.get("usage"))[1]["rows"]
    assert (row["response_id"], row["status"], row["error_code"]) == ("resp_other", "failed", "interrupted")


def ended_process():
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@gateway_test
async def test_where_a_request_breaks_it_is_settled_all_the_same(gateway):
    async def broken(*_):
        raise ZeroDivisionError
    gateway.server.gateway.router.route = broken
    assert (await gateway.answer(gateway.key))[0] == 500
    assert not under_way(gateway.ledger) and not gateway.ledger.pending
    assert len((await gateway.get("usage"))[1]["rows"]) == 1


@gateway_test
async def test_a_key_has_so_many_live_feeds(gateway):
    feeds = [await gateway.ask("GET", "/admin/api/events", headers={"authorization": f"Bearer {gateway.key}"}, read=True)
             for _ in range(pomex.FEEDS_A_KEY)]
    headers = {"authorization": f"Bearer {gateway.key}"}
    assert (await gateway.ask("GET", "/admin/api/events", headers=headers))[0] == 429
    assert (await gateway.ask("GET", "/admin/api/events", headers=ADMIN, read=True))[0] == 200
    for _, _, _, writer in feeds:
        writer.close()


@gateway_test
async def test_a_holder_is_told_nothing_of_the_others(gateway):
    counts = (await gateway.get("session", {"authorization": f"Bearer {gateway.key}"}))[1]["counts"]
    assert list(counts) == ["models"] and set((await gateway.get("session"))[1]["counts"]) == {"models", "keys", "providers"}


@gateway_test
async def test_a_wrong_filter_of_an_export_is_said(gateway):
    for name in ("usage.csv", "usage.jsonl"):
        assert (await gateway.get(name + "?bogus=1"))[0] == 400


@gateway_test
async def test_what_all_spend_is_for_this_machine_and_the_administrator(gateway):
    assert (await gateway.ask("GET", "/metrics"))[0] == 200
    for name in ("x-forwarded-for", "x-forwarded-host", "X-Forwarded-Proto", "x-real-ip", "via", "forwarded"):
        assert (await gateway.ask("GET", "/metrics", headers={name: ""}))[0] == 401, name
    proxied = {"x-forwarded-for": "203.0.113.5"}
    assert (await gateway.ask("GET", "/metrics", headers=proxied))[0] == 401
    assert (await gateway.ask("GET", "/metrics", headers={**proxied, "authorization": f"Bearer {gateway.key}"}))[0] == 403
    status, _, text = await gateway.ask("GET", "/metrics", headers={**proxied, **ADMIN})
    assert status == 200 and b"pomex_requests_total" in text


@gateway_test
async def test_a_providers_last_error_is_its_own_and_a_refusal_is_no_ended_stream(gateway):
    await gateway.answer(gateway.key, "demo/error")
    error = (await gateway.get("providers"))[1]["providers"][0]["error"]["message"]
    assert "No provider left" not in error and not error.startswith("demo:"), error
    row = (await gateway.get("usage"))[1]["rows"][0]
    assert (row["status"], row["terminal_by"]) == ("failed", "")
    assert b"pomex_terminal_fallbacks_total{" not in (await gateway.ask("GET", "/metrics"))[2]


@gateway_test
async def test_an_account_gets_credit_and_a_statement(gateway):
    await gateway.post("accounts", {"name": "team", "prepaid": "1"})
    await gateway.post("accounts/team/credit", {"amount": "20"})
    assert (await gateway.post("accounts/team/credit", {"amount": "-5"}))[0] == 400
    await gateway.post("accounts/team/credit", {"amount": "-5", "reason": "refund"})
    month = time.strftime("%Y-%m", time.gmtime())
    bill = (await gateway.get(f"accounts/team/statement?month={month}"))[1]
    assert (bill["after_nanos"], [entry["kind"] for entry in bill["credits"]]) == (15 * 10**9, ["top-up", "adjustment"])
    assert (await gateway.get("accounts/team/statement?month=soon"))[0] == 400


@gateway_test
async def test_a_disabled_provider_is_not_asked_by_any_process_until_it_is_enabled(gateway):
    assert (await gateway.post("providers/demo/disable", {}))[:2] == (200, {"name": "demo"})
    status, _, body = await gateway.answer(gateway.key)
    error = json.loads(body)["error"]
    assert status == 400 and error["code"] == "provider_disabled" and "disabled demo" in error["message"]
    assert (await gateway.get("providers"))[1]["providers"][0]["state"] == "disabled"
    assert {model["state"] for model in (await gateway.get("models"))[1]["models"]} == {"disabled"}
    with contextlib.closing(pomex.Ledger.open(gateway.ledger.db.place)) as other:     # another process, or after a restart
        assert other.disabled == {"demo"}
        await other.use_provider("demo", True)
    await asyncio.sleep(1)
    assert (await gateway.answer(gateway.key))[0] == 200
    assert (await gateway.post("providers/nobody/disable", {}))[0] == 404


def test_of_several_targets_those_of_a_disabled_provider_are_passed_over():
    text = """
[providers.one]
base_url = "http://127.0.0.1:9/v1"
wire_api = "chat"
[providers.two]
base_url = "http://127.0.0.1:9/v1"
wire_api = "chat"
[models."team/both"]
targets = ["one:m", "two:m"]
"""
    tiers = pomex.ModelCatalog(pomex.load_config(text, "pomex.toml", {}), {}).tiers("team/both")
    def left(*names):
        asked = pomex.parse_request(b'{"model": "team/both", "input": "hi"}')
        order = pomex.order_candidates(tiers, names, asked, pomex.Headers([]), pomex.Envelope(b"secret", "1"))
        return [each.provider.name for each in order]
    assert left() == ["one", "two"] and left("one") == ["two"] and left("other") == ["one", "two"]
    with pytest.raises(pomex.BadRequest, match="disabled one and two"):
        left("one", "two")


@gateway_test
async def test_the_playground_bills_a_key_that_nobody_holds(gateway):
    status, _, body = await gateway.ask("POST", "/admin/api/playground", {"model": "demo/echo", "input": "hi", "stream": True}, {**JSON_TYPE, **ADMIN})
    assert status == 200 and b"event: response.completed" in body
    assert [row["key"] for row in (await gateway.get("usage"))[1]["rows"]] == [pomex.PLAY_KEY]


HOSTILE = ["<img src=x onerror=alert(1)>", "'; DROP TABLE usage; --", "%", "a\x00b", "\u202e", "x" * 10_000, "\ud800"]


@parametrized("text", [(text,) for text in HOSTILE])
async def test_hostile_filters_find_nothing_and_break_nothing(gateway, text):
    await gateway.answer(gateway.key)
    quoted = pomex.urllib.parse.quote(text.encode("utf-8", "surrogatepass"))
    assert (await gateway.get(f"usage?result={quoted}"))[0] == (414 if len(text) > 8000 else 400)
    for name in ("key", "model", "provider", "session", "client", "text"):
        status, found = await gateway.get(f"usage?{name}={quoted}")
        assert status == 414 and len(text) > 8000 or status == 200 and found["rows"] == [], name
    assert (await gateway.get(f"usage/{quoted[:3000]}"))[0] == 404
    assert (await gateway.get("usage"))[1]["sums"]["requests"] == 1


@parametrized("query", [("cursor=x",), ("limit=9999",), ("from=now",), ("order=cost",), ("min_cost=-1",), ("result=good",)])
async def test_a_query_that_is_not_right_is_a_400(gateway, query):
    assert (await gateway.get("usage?" + query))[0] == 400


@gateway_test
async def test_a_wrong_filter_is_named_with_those_that_there_are(gateway):
    for query, param, words in (("order=cost", "order", "It has from, to, key,"), ("result=good", "result", "one of completed,"),
                                ("from=now", "from", "must be a whole number")):
        status, body = await gateway.get("usage?" + query)
        assert (status, body["error"]["param"]) == (400, param) and words in body["error"]["message"]
    assert (await gateway.get("usage?result=&key="))[1]["sums"] is not None, "an empty filter is none"


def test_the_models_page_can_show_a_model_whose_provider_is_not_configured(tmp_path):
    config = pomex.load_config('[models."openai/gpt-5.5"]\ndescription = "described"\n', "pomex.toml", {})
    with contextlib.closing(pomex.Ledger.open(str(tmp_path / "p.db"))) as ledger:
        gateway = pomex.Gateway(config, ledger, pomex.ConnectionPool(), {})
        views = {name: pomex.model_view(gateway, name) for name in gateway.catalogue.names}
    view = views["openai/gpt-5.5"]
    assert view["targets"] == [] and "openai is not configured" in view["state"] and view["description"] == "described"
    assert {frozenset(each) for each in views.values()} == {frozenset(view)} and view["price"]
    assert views["demo/echo"]["state"] == "ready" and views["demo/echo"]["description"]


def test_open_feeds_and_failed_logins_count_on_under_another_configuration(tmp_path):
    config = pomex.load_config("", "pomex.toml", {})
    with contextlib.closing(pomex.Ledger.open(str(tmp_path / "p.db"))) as ledger:
        old = pomex.Gateway(config, ledger, pomex.ConnectionPool(), {})
        new = pomex.Gateway(config, ledger, old.upstream, {}, old)
    assert new.watchers is old.watchers and new.login_failures is old.login_failures


def entry(ledger, n, when_s, **fields):
    key = ledger.list_keys()[n % 2]
    row = pomex.UsageRow(f"resp_{n:012x}", f"req_{n}", int(when_s * 1000), key.id, "/v1/responses", f"openai/m{n % 3}", **{
        "provider": "openai", "upstream_model": "m", "input": 1000, "cached": 400, "output": 100, "first_ms": 500,
        "total_ms": 2000, "attempts": 1, "price": "2 10 0.5", "cost_nanos": 2_400_000, **fields})
    return row._replace(result=pomex.result_of(row.status, row.terminal_by, row.attempts),
                        saved_nanos=pomex.saved_nanos(row.price, row.cached))


def lost_attempt(row, **fields):
    """An attempt of a request that was given up at another provider, before the one that `row` is of."""
    return row._replace(**{"attempt": row.attempt - 1, "final": 0, "status": "lost", "provider": "azure", "cached": 0,
                           "output": 0, "saved_nanos": 0, **fields})


@gateway_test
async def test_the_overview_is_the_sum_of_its_rows_and_stays_when_they_are_pruned(gateway):
    now = time.time()
    rows = []
    for n in range(1, 1300):
        how = {"status": "failed"} if n % 50 == 0 else {"attempts": 2} if n % 70 == 0 else {}
        rows.append(entry(gateway.ledger, n, now - n * 20, attempt=1, **how))
        if n % 70 == 0:
            rows.append(lost_attempt(rows[-1], input=5, cost_nanos=10_000))
    insert(gateway.ledger, rows)
    since, seen = int((now - 86400) // 86400 * 86400) * 1000, []
    for _ in range(2):
        for key_id in (0, 1):
            whole = await pomex.overview(gateway.ledger.db, since, 3_600_000, 48, now, key_id)
            for times in ("first_ms", "total_ms"):      # of rows alone
                assert whole.pop(times) == ([0, 0] if len(seen) > 1 else [{"first_ms": 500, "total_ms": 2000}[times]] * 2)
            seen.append(whole)
        await pomex.prune(gateway.ledger, int(now // 86400) + 1)
        assert read(gateway.ledger, "SELECT count(*) FROM usage") == [(0,)]
    assert seen[:2] == seen[2:]
    for key_id, whole in enumerate(seen[:2]):
        mine = [row for row in rows if key_id in (0, row.key_id)]
        sums = {**{name: sum(getattr(row, name) for row in mine) for name in pomex.SUMS[4:]},
                "requests": sum(row.final for row in mine), "failed": sum(row.status == "failed" for row in mine),
                "estimated": 0, "unpriced": 0}
        assert whole["totals"] == sums
        for name in whole["by"]:
            assert {column: sum(each[column] for each in whole["by"][name]) for column in sums} == sums, name
        assert sum(sum(line["cost_nanos"]) for line in whole["series"]) == sums["cost_nanos"]
        results = collections.Counter(row.result for row in mine if row.final)
        assert {each["name"]: each["requests"] for each in whole["by"]["result"]} == results and len(results) == 3


@gateway_test
async def test_one_request_shows_its_lines(gateway):
    row = entry(gateway.ledger, 7, time.time(), attempts=2, attempt=2)
    insert(gateway.ledger, [row, lost_attempt(row, error_code="overload", input=100, cost_nanos=200_000)])
    found = (await gateway.get("usage/resp_000000000007"))[1]
    assert found["row"]["cost_nanos"] == 2_600_000 and found["row"]["result"] == "failed over"
    assert [[(part["what"], part["count"], part["nanos"]) for part in line["parts"]] for line in found["lines"]] == [
        [("input", 100, 200_000)], [("input", 600, 1_200_000), ("cached input", 400, 200_000), ("output", 100, 1_000_000)]]
    row, = (await gateway.get("usage"))[1]["rows"]
    assert (row["response_id"], row["cost_nanos"]) == ("resp_000000000007", 2_600_000), "one line a request"


# --- what a row says of its client ----------------------------------------------------------------

@gateway_test
async def test_a_row_says_whose_conversation_it_was_with_which_client_and_what_was_wrong(gateway):
    asked = [("demo/echo", {"session_id": "talk-1", "user-agent": "codex_exec/0.171 (Linux)"}),
             ("demo/error", {"x-session-id": "talk-2", "user-agent": "My_Script/1"}),
             ("demo/echo", {"user-agent": "MyXScript/1"})]
    for model, headers in asked:
        await gateway.answer(gateway.key, model, headers)
    insert(gateway.ledger, [entry(gateway.ledger, 9, time.time(), tier="priority")])
    rows = (await gateway.get("usage"))[1]["rows"]
    assert [(row["session"], row["client"], row["tier"]) for row in rows] == [
        ("", "", "priority"), ("", "MyXScript/1", ""), ("talk-2", "My_Script/1", ""), ("talk-1", "codex_exec/0.171 (Linux)", "")]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    assert "fails on purpose" in rows[2]["error"]
    for query, expected in {
        "session=talk-1": {3}, "session=talk": set(), "client=codex": {3}, "client=my_script": {2}, "client=SCRIPT": {1, 2},
        "client=m%25": set(), "client=!": set(), "session=talk-2&client=codex": set(), "text=on%20purpose": {2},
    }.items():
        found = (await gateway.get("usage?" + query))[1]
        assert {row["response_id"] for row in found["rows"]} == {rows[number]["response_id"] for number in expected}, query
        assert found["sums"]["requests"] == len(expected), query
    _, _, csv = await gateway.ask("GET", "/admin/api/usage.csv?session=talk-1", headers=ADMIN)
    head, line = [line for line in csv.decode().split("\r\n") if line.count(",") > 20]
    cells = dict(zip(head.split(","), line.split(",")))
    assert {"error", "tier"} <= set(cells) and (cells["session"], cells["client"]) == ("talk-1", "codex_exec/0.171 (Linux)")


@gateway_test
async def test_a_hostile_client_names_itself_within_bounds(gateway):
    await gateway.answer(gateway.key, "demo/echo", {"session_id": "s" * 5000, "user-agent": "<b>é" + "u" * 5000})
    row, = (await gateway.get("usage"))[1]["rows"]
    assert len(row["session"]) == 128 and len(row["client"]) == 200 and row["client"].startswith("<b>??uuu")


# --- the audit log --------------------------------------------------------------------------------

@gateway_test
async def test_every_change_is_in_the_audit_log_with_who_made_it_and_what_was_before(gateway):
    cookie, _ = await gateway.session(TOKEN)
    by_session = {**cookie, **gateway.page}
    _, made, _ = await gateway.post("keys", {"name": "new", "budget": "12.50", "rpm": 3})
    number = gateway.ledger.list_keys()[-1].id
    await gateway.post(f"keys/{number}", {"budget": "", "rpm": "5"}, by_session)
    await gateway.post(f"keys/{number}", {"rpm": "-1"})                     # refused: no change
    await gateway.post(f"keys/{number}/revoke", {}, by_session)
    await gateway.post("accounts", {"name": "team", "prepaid": True, "limit": "7"})
    await gateway.post("accounts/team/credit", {"amount": "20"})
    await gateway.post("accounts/team/credit", {"amount": "-5", "reason": "refund"})
    await gateway.post("providers/demo/disable", {})
    await gateway.post("providers/demo/enable", {}, by_session)
    await gateway.ask("POST", "/admin/api/playground", {"model": "demo/echo", "input": "hi"}, {**JSON_TYPE, **ADMIN})
    token, session = "admin_token from 127.0.0.1", "session 1 from 127.0.0.1"
    expected = [
        (token, "key created", "new", {}, {"budget_usd": "12.5", "rpm": 3}),
        (session, "key edited", "new", {"budget_usd": "12.5", "rpm": 3}, {"budget_usd": None, "rpm": 5}),
        (session, "key revoked", "new", {"revoked_s": 0}, {"revoked_s": gateway.ledger.keys[number].revoked_s}),
        (token, "account created", "team", {}, {"prepaid": 1, "limit_usd": "7", "multiplier": 1_000_000}),
        (token, "credit added", "team", {}, {"kind": "top-up", "usd": "20", "reason": ""}),
        (token, "credit added", "team", {}, {"kind": "adjustment", "usd": "-5", "reason": "refund"}),
        (token, "provider disabled", "demo", {"disabled": False}, {"disabled": True}),
        (session, "provider enabled", "demo", {"disabled": True}, {"disabled": False}),
        (token, "key created", pomex.PLAY_KEY, {}, {})]
    status, found = await gateway.get("audit")
    columns = ("who", "action", "name", "before", "after")
    assert status == 200 and found["cursor"] is None
    assert [tuple(row[name] for name in columns) for row in found["rows"][:len(expected)]] == expected[::-1], "newest first"
    assert audited(gateway.ledger)[-len(expected):] == expected
    assert all(abs(row["time_ms"] / 1000 - time.time()) < 60 for row in found["rows"])
    whole, key = json.dumps(found), gateway.ledger.keys[number]
    assert made["token"] not in whole and made["token"][10:30] not in whole and key.digest not in whole and TOKEN not in whole
    assert key.hint not in whole and cookie["cookie"].partition("=")[2] not in whole


@gateway_test
async def test_the_audit_log_is_read_in_pages_by_the_administrator_alone(gateway):
    for n in range(5):
        await gateway.post("accounts", {"name": f"team{n}"})
    names, query = [], "audit?limit=2"
    while True:
        page = (await gateway.get(query))[1]
        assert len(page["rows"]) <= 2
        names += [row["name"] for row in page["rows"]]
        if page["cursor"] is None:
            break
        query = f"audit?limit=2&cursor={page['cursor']}"
    assert names == ["team4", "team3", "team2", "team1", "team0", "bo", "ana"]
    for wrong in ("cursor=x", "limit=0x10", "limit=501", "cursor=-1"):
        assert (await gateway.get("audit?" + wrong))[0] == 400, wrong
    assert (await gateway.get("audit", {"authorization": f"Bearer {gateway.key}"}))[0] == 403
    assert (await gateway.get("audit", {}))[0] == 401


@gateway_test
async def test_the_live_feed_tells_of_changes_that_another_process_made(gateway):
    reader, writer = await gateway.feed()
    holder, holder_writer = await gateway.feed({"authorization": f"Bearer {gateway.key}"})
    with contextlib.closing(pomex.Ledger.open(gateway.ledger.db.place)) as other:
        await other.create_key("late", time.time())
        await account_made(other, "team", False, None, pomex.ONE, time.time())
        await pomex.add_credit(other, "team", 10**9, "", time.time())
        await other.use_provider("demo", False)
    for kind, name in (("key", "late"), ("key", "team"), ("key", "team"), ("provider", "demo")):
        await asyncio.wait_for(reader.readuntil(f'event: {kind}\ndata: {{"name":"{name}"}}\n\n'.encode()), 3)
    with pytest.raises(TimeoutError):           # whose view it is not
        await asyncio.wait_for(holder.readuntil(b"event: "), 0.1)
    writer.close()
    holder_writer.close()


@pytest.mark.parametrize("token, good", [("short", False), ("sk-rh-abcdefghijklmnop", False), ("with space in it 0123", False),
                                         ("env:MISSING", False), ("long-enough-token", True), ("env:ADMIN", True)])
def test_an_admin_token_is_long_and_no_key(token, good):
    text = f'[server]\nadmin_token = "{token}"\n'
    if good:
        assert pomex.load_config(text, "pomex.toml", {"ADMIN": "another-long-token"}).server.admin_token
    else:
        with pytest.raises(pomex.ConfigError) as caught:
            pomex.load_config(text, "pomex.toml", {})
        assert token.startswith("env:") or token not in str(caught.value)


def test_admin_tokens_may_be_several_while_one_is_replaced(tmp_path):
    async def inside():
        text = f'[server]\nport = 0\nadmin_token = ["file:new", "{TOKEN}"]\n[database]\nurl = "sqlite:{tmp_path}/p.db"\n'
        (tmp_path / "new").write_text("another-machine-token\n")
        config = pomex.load_config(text, str(tmp_path / "pomex.toml"), {}, pomex.read_text)
        assert config.server.admin_token == ("another-machine-token", TOKEN)
        assert pomex.load_config("", "", {"POMEX_ADMIN_TOKEN": TOKEN}).server.admin_token == (TOKEN,)
        with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
            async with pomex.running(config, ledger) as server:
                gateway = Gateway(server, ledger, "", "")
                for token, status in (("another-machine-token", 200), (TOKEN, 200), ("another-machine-tokem", 401), ("", 401)):
                    assert (await gateway.get("keys", {"authorization": f"Bearer {token}"}))[0] == status, token
                assert server.gateway.upstream.secrets.search("x another-machine-token x") and server.gateway.upstream.secrets.search(TOKEN)
    asyncio.run(inside())


@pytest.mark.parametrize("value", ['["short"]', '[""]', "[1]", "5", f'["{TOKEN}", "env:MISSING"]'])
def test_a_wrong_one_of_several_admin_tokens_is_refused_and_not_shown(value):
    if value == '[""]':
        assert pomex.load_config("[server]\nadmin_token = [\"\"]\n", "pomex.toml", {}).server.admin_token == ()
        return
    with pytest.raises(pomex.ConfigError) as caught:
        pomex.load_config(f"[server]\nadmin_token = {value}\n", "pomex.toml", {})
    assert "admin_token" in str(caught.value) and TOKEN not in str(caught.value) and "short" not in str(caught.value)


@gateway_test
async def test_a_keys_end_may_be_given_as_on_the_command_line(gateway):
    assert (await gateway.post("keys", {"name": "y", "expires": "30d", "allow_unpriced": "yes"}))[0] == 200
    key = gateway.ledger.list_keys()[-1]
    assert abs(key.expires_s - time.time() - 30 * 86400) < 60 and key.allow_unpriced == 1
    await gateway.post(f"keys/{key.id}", {"expires": ""})
    assert gateway.ledger.list_keys()[-1].expires_s == 0
    assert (await gateway.post(f"keys/{key.id}", {"expires": "yesterday"}))[1]["error"]["param"] == "expires"


@gateway_test
async def test_a_statement_without_a_month_is_that_of_this_one(gateway):
    this = time.strftime("%Y-%m", time.gmtime())
    bills = [(await gateway.get(f"accounts/default/statement{query}"))[1] for query in ("", "?month=", f"?month={this}")]
    assert bills[0] == bills[1] == bills[2] and bills[0]["account"] == "default"


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    assert pomex.csv_line(["=1+1", "a,b", 'say "x"', -5, "@x"]) == "'=1+1,\"a,b\",\"say \"\"x\"\"\",-5,'@x"
    assert pomex.csv_line(["a;=1+1", 'a;"@x', "a;b"]) == "a;'=1+1,\"a;\"\"'@x\",a;b", "where a semicolon parts cells"
