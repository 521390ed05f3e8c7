"""What the README's pictures show: a made-up month of a small team, and one real request that fails over.

No provider is asked: two of them are this file's own, on a loopback port.
"""
import asyncio
import contextlib
import json
import random
import time

import pomex

CONFIG = """
[server]
port = 0
[database]
url = "sqlite:pictures.db"
[providers.openai]
api_key = "none"
base_url = "http://127.0.0.1:{port}/openai/v1"
[providers.anthropic]
api_key = "none"
base_url = "http://127.0.0.1:{port}/anthropic/v1"
[providers.google]
api_key = "none"
[providers.local]
wire_api = "chat"
base_url = "http://127.0.0.1:{port}/local/v1"
models = ["qwen-coder"]
[models."team/coder"]
targets = ["anthropic:claude-sonnet-5-5", "openai:gpt-5.3-codex"]
"""
MODELS = {  # how often, median seconds to the first output
    "openai/gpt-5.3-codex": (56, 0.8), "anthropic/claude-sonnet-5-5": (25, 1.3), "google/gemini-pro-latest": (12, 1.1),
    "local/qwen-coder": (7, 0.3)}
HOURS = (1, 1, 0, 0, 0, 0, 1, 4, 9, 13, 15, 11, 6, 10, 15, 14, 11, 7, 4, 3, 2, 2, 1, 1)      # of a working day


def month(ledger, config, now_s, seed=11):
    """Rows of thirty days up to now, the same in every run but for their times."""
    chance, table = random.Random(seed), pomex.PriceTable(config)
    keys = {key.name: key.id for key in ledger.list_keys()}
    for hour in range(30 * 24, -1, -1):
        start_s = now_s - hour * 3600
        clock = time.localtime(start_s)
        busy = HOURS[clock.tm_hour] * (0.2 if clock.tm_wday > 4 and hour > 40 else 1)
        for _ in range(int(busy + chance.random())):
            yield row(chance, table, keys, min(start_s + chance.random() * 3600, now_s - chance.random() * 600))


def row(chance, table, keys, at_s):
    model = chance.choices(list(MODELS), [often for often, _ in MODELS.values()])[0]
    provider, _, name = model.partition("/")
    tokens, ending = int(chance.lognormvariate(9.9, 0.8)), chance.random()
    used = pomex.Usage(input=tokens, cached=int(tokens * chance.uniform(0.4, 0.95)) if provider != "local" else 0,
                       output=int(chance.lognormvariate(6.6, 0.7)))
    first_ms = int(1000 * MODELS[model][1] * chance.lognormvariate(0, 0.5))
    schedule = table.schedule(provider, name, model)
    price = schedule.base if schedule else ""
    made = pomex.UsageRow(
        f"resp_{int(at_s * 1000):012x}{chance.getrandbits(80):020x}", f"req_{chance.getrandbits(128):032x}", int(at_s * 1000),
        keys[chance.choices(("laptop-jo", "ci-runner", "nightly-evals"), (5, 4, 2))[0]], "/v1/responses", model, provider=provider,
        upstream_model=name, status="failed" if ending < 0.004 else "completed",
        error_code="server_error" if ending < 0.004 else "",
        terminal_by="gateway" if 0.004 < ending < 0.008 else "upstream", input=used.input, cached=used.cached, output=used.output,
        reasoning=used.output // 3, first_ms=first_ms, total_ms=first_ms + used.output * 9, attempts=2 if ending > 0.982 else 1,
        price=price, cost_nanos=pomex.cost_nanos(price, 10**6, used), saved_nanos=pomex.saved_nanos(price, used.cached))
    return made._replace(result=pomex.result_of(made.status, made.terminal_by, made.attempts))


async def provider(reader, writer):
    """Anthropic is overloaded; the other answers with the pace of a model."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(line for line in head.lower().split("\r\n") if line.startswith("content-length"))
        await reader.readexactly(int(length.partition(":")[2]))
        if "/anthropic/" in head:
            await asyncio.sleep(0.3)
            body = b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'
            writer.write(b"HTTP/1.1 529 Overloaded\r\ncontent-type: application/json\r\nconnection: close\r\n"
                         b"content-length: %d\r\n\r\n%s" % (len(body), body))
        else:
            await asyncio.sleep(0.4)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: req_8f0c2a4e\r\nconnection: close\r\n\r\n")
            for event, wait_s in events():
                await asyncio.sleep(wait_s)
                writer.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        await writer.drain()
    writer.close()


def events():
    """(an event of the Responses stream, the seconds before it)."""
    part = {"type": "output_text", "text": "It builds.", "annotations": []}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    usage = {"input_tokens": 48200, "input_tokens_details": {"cached_tokens": 41900}, "output_tokens": 1130,
             "output_tokens_details": {"reasoning_tokens": 420}, "total_tokens": 49330}
    told = [({"type": "response.created", "response": response}, 0),
            ({"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress", "content": []}}, 0.2),
            ({"type": "response.content_part.added", **where, "part": {**part, "text": ""}}, 0),
            ({"type": "response.output_text.delta", **where, "delta": "It "}, 0),
            ({"type": "response.output_text.delta", **where, "delta": "builds."}, 0.9),
            ({"type": "response.output_text.done", **where, "text": "It builds."}, 0),
            ({"type": "response.content_part.done", **where, "part": part}, 0),
            ({"type": "response.output_item.done", "output_index": 0, "item": item}, 0),
            ({"type": "response.completed", "response": {**response, "status": "completed", "output": [item], "usage": usage}}, 0.1)]
    for number, (event, wait_s) in enumerate(told):
        yield {**event, "sequence_number": number}, wait_s


@contextlib.asynccontextmanager
async def demo(folder):
    """(the gateway's address, a login link's token, a key)."""
    async with await asyncio.start_server(provider, "127.0.0.1", 0) as upstream:
        text = CONFIG.format(port=upstream.sockets[0].getsockname()[1])
        config = pomex.load_config(text, str(folder / "pomex.toml"), {})
        with contextlib.closing(pomex.Ledger.open(str(folder / "pictures.db"))) as ledger:
            now_s = time.time()
            keys = [await ledger.create_key(name, now_s - 40 * 86400, budget_nanos=usd * 10**9)
                    for name, usd in (("nightly-evals", 15), ("ci-runner", 30), ("laptop-jo", 60))]
            rows = sorted(month(ledger, config, now_s), key=lambda row: row.started_ms)
            await ledger.db.write(lambda tx: pomex.insert_rows(tx, rows))
            async with pomex.running(config, ledger) as server:
                yield "http://%s:%d" % server.address, await pomex.open_session(ledger.db, "link", 0, 600, now_s), keys[-1]
