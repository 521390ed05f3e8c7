"""The gateway as a whole over loopback: scripted upstreams behind it, plain HTTP clients before it."""
import asyncio
import contextlib
import http.client
import json
import threading

import pytest
import streams
from ledgers import read, recent, refusals, under_way

import pomex

CODEX = {"originator": "codex_exec"}
OLD_CODEX = {"originator": "codex_exec", "user-agent": "codex_exec/0.128.0 (Linux)"}


def chat(*deltas, finish="stop", usage=True, done=True):
    """A chat stream of these deltas."""
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        chunks.append({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 5,
                                                "prompt_tokens_details": {"cached_tokens": 8}}})
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + (b"data: [DONE]\n\n" if done else b"")


def native(text="Hello", model="gpt-x"):
    """A Responses stream as OpenAI sends it."""
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]}
    head = {"id": "resp_theirs", "object": "response", "created_at": 1, "model": model, "output": []}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    usage = {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0}, "output_tokens": 5,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 25}
    events = [{"type": "response.created", "response": {**head, "status": "in_progress"}},
              {"type": "response.in_progress", "response": {**head, "status": "in_progress"}},
              {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress", "content": []}},
              {"type": "response.content_part.added", **place, "part": part},
              {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
              {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
              {"type": "response.content_part.done", **place, "part": item["content"][0]},
              {"type": "response.output_item.done", "output_index": 0, "item": item},
              {"type": "response.completed", "response": {**head, "status": "completed", "output": [item], "usage": usage}}]
    return [f"event: {e['type']}\ndata: {json.dumps({**e, 'sequence_number': n})}\n\n".encode() for n, e in enumerate(events)]


def http_answer(status, body, kind="application/json", *headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def sse(*steps, cut=False):
    """An SSE answer in steps: bytes are sent, numbers waited; cut: the connection is reset at the end."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nopenai-model: other\r\nconnection: close\r\n\r\n"
    return [head, *steps, *([None] if cut else [])]


class Upstream:
    """Plays one answer a request, the last one again and again; keeps what it was asked and when clients left."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.left = asyncio.Event()

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.asked.append((head.decode(), json.loads(await reader.readexactly(length))))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                for step in [answer] if isinstance(answer, bytes) else answer:
                    if step is None:
                        writer.transport.abort()
                    elif isinstance(step, bytes):
                        writer.write(step)
                    elif not await self.waited(reader, step):
                        return
                if not isinstance(answer, bytes):
                    break
        writer.close()

    async def waited(self, reader, seconds):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await reader.read(1)
                self.left.set()
                return False
        return True


class World:
    """A running gateway, its key and its upstreams."""

    def __init__(self, server, ledger, token, upstreams):
        self.server, self.ledger, self.token, self.upstreams = server, ledger, token, upstreams

    def ask(self, method, path, body=None, key=None, **headers):
        connection = http.client.HTTPConnection(*self.server.address, timeout=10)
        sent = {"authorization": f"Bearer {self.token if key is None else key}"} if key != "" else {}
        connection.request(method, path, body if isinstance(body, bytes) or body is None else json.dumps(body).encode(),
                           {**sent, **headers})
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, raw

    async def get(self, path, **more):
        return await asyncio.to_thread(self.ask, "GET", path, **more)

    async def post(self, model, stream=True, headers=None, **fields):
        body = {"model": model, "input": "Hi", "stream": stream, **fields}
        return await asyncio.to_thread(lambda: self.ask("POST", "/v1/responses", body, **(headers or {})))

    async def row(self):
        for _ in range(100):
            if recent(self.ledger, 1):
                return recent(self.ledger, 1)[0]
            await asyncio.sleep(0.01)
        raise AssertionError("no usage row")


def run(tmp_path, scenario, upstreams, server="", more=""):
    """`upstreams` maps a provider's name to (wire_api, relay, answers)."""
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            text, made = f"[server]\nport = 0\n{server}\n", {}
            for name, (wire, relay, answers) in upstreams.items():
                made[name] = Upstream(*answers)
                listening = await asyncio.start_server(made[name].serve, "127.0.0.1", 0)
                stack.callback(listening.close)
                text += (f'[providers.{name}]\nwire_api = "{wire}"\nrelay = "{relay}"\nbase_url = '
                         f'"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"\napi_key = "sk-theirs"\n')
            ledger = stack.enter_context(contextlib.closing(pomex.Ledger.open(str(tmp_path / "pomex.db"))))
            token = await ledger.create_key("laptop", 1_800_000_000)
            gateway = await stack.enter_async_context(pomex.running(pomex.load_config(text + more, "pomex.toml", {}), ledger))
            await scenario(World(gateway, ledger, token, made))
    asyncio.run(asyncio.wait_for(main(), 20))


def told(raw):
    """(code, message) of an error body."""
    error = json.loads(raw)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error["code"], error["message"]


# --- what is refused ------------------------------------------------------------------------------

GOOD = {"model": "demo/echo", "input": "Hi"}
MISTAKES = {
    "no key": (("POST", "/v1/responses", GOOD, ""), 401, "invalid_api_key", "No API key was sent."),
    "the placeholder": (("POST", "/v1/responses", GOOD, "sk-rh-xxxxxxxxxxxx"), 401, "invalid_api_key", "guide's placeholder"),
    "not expanded": (("POST", "/v1/responses", GOOD, "$POMEX_API_KEY"), 401, "invalid_api_key", "did not expand"),
    "another's key": (("POST", "/v1/responses", GOOD, "sk-proj-abcdef"), 401, "invalid_api_key", "another provider's key"),
    "a key on models": (("GET", "/v1/models", None, ""), 401, "invalid_api_key", "No API key was sent."),
    "a typo in the model": (("POST", "/v1/responses", {**GOOD, "model": "demo/ecko"}, None), 400, "model_not_found",
                            "Did you mean demo/echo?"),
    "no provider": (("POST", "/v1/responses", {**GOOD, "model": "ecko"}, None), 400, "model_not_found",
                    'Model names are provider/model-name, and no provider lists "ecko". Did you mean demo/echo?'),
    "no key for a bare name": (("POST", "/v1/responses", {**GOOD, "model": "claude-opus-5"}, None), 400,
                               "provider_not_configured", "anthropic/claude-opus-5 cannot be used"),
    "no key for it": (("POST", "/v1/responses", {**GOOD, "model": "openai/gpt-5.5"}, None), 400, "provider_not_configured",
                      "Set OPENAI_API_KEY and restart"),
    "a foreign word as key": (("POST", "/v1/responses", GOOD, "bad"), 401, "invalid_api_key", "This is no Pomex key"),
    "Bearer twice": (("POST", "/v1/responses", GOOD, "Bearer sk-rh-a"), 401, "invalid_api_key", 'The key was sent with "Bearer "'),
    **{path: (("POST", path, GOOD, None), 404, "wrong_base_url", f"The client adds the rest; this request came to {path}.")
       for path in ("/responses", "/models", "/chat/completions", "/v1/responses/responses", "/v1/responses/models", "/v1//responses",
                    "/v1/v1/responses", "/v1/v1/models", "/v1/chat/completions/responses", "/openai/v1/responses")},
    **{path: (("POST", path, GOOD, None), 400, "wrong_base_url", f"without /v1 (in opencode with it); this request came to {path}.")
       for path in ("/v1/v1/messages", "/v1/v1/messages/count_tokens", "/messages", "/anthropic/v1/messages")},
    "no /v1": (("GET", "/models", None, None), 404, "wrong_base_url", "base_url must end with /v1: http://127.0.0.1:"),
    **{path: (("POST", path, GOOD, None), 404, code, words) for path, code, words in (
        ("/v1/completions", "wrong_wire_api", "Set the client to an OpenAI-compatible provider at http://127.0.0.1:"),
        ("/api/chat", "wrong_wire_api", "This API is not served: /api/chat. Set the client to an OpenAI-compatible provider"),
        ("/v1beta/models/m:generateContent", "wrong_wire_api", "This API is not served"),
        ("/v1/embeddings", "not_found", "not /v1/embeddings. Send this to the provider itself."),
        ("/v1/images/generations", "not_found", "not /v1/images/generations."),
        ("/v1/audio/speech", "not_found", "not /v1/audio/speech."), ("/v1/files/file_1/content", "not_found", "provider itself"),
        ("/v1/responses/input_tokens", "not_found", "does not count tokens beforehand"),
        ("/v1/responses/compact", "not_found", 'set name = "Pomex API"'),
        ("/v1/responses/resp_1/cancel", "not_found", "stores no responses"),
        ("/v1/alpha/search", "not_found", "Leave supports_standalone_web_search out"),
        ("/v1/conversations", "not_found", "stores no conversations"),
        ("/v1/conversations/conv_1/items", "not_found", "stores no conversations"))},
    "a stored response": (("GET", "/v1/responses/resp_1", None, None), 404, "not_found", "stores no responses"),
    "a prompt template": (("POST", "/v1/responses", {"prompt": {"id": "pmpt_1"}}, None), 400, "unsupported_parameter",
                          "Pomex stores no prompt templates: send instructions and input."),
    "a conversation": (("POST", "/v1/responses", {"model": "demo/echo", "conversation": "conv_1"}, None), 400,
                       "unsupported_parameter", "stores no conversations"),
    "in the background": (("POST", "/v1/responses", {**GOOD, "background": True}, None), 400, "unsupported_parameter",
                          "runs no background responses"),
    "elsewhere": (("GET", "/x%E9", None, None), 404, "not_found",
                  "There is nothing at /x%E9"),
    "the wrong method": (("GET", "/v1/responses", None, None), 405, "method_not_allowed", "POST is"),
    "compaction": (("POST", "/v1/responses", {**GOOD, "input": [{"role": "user", "content": "Hi"}, {"type": "compaction_trigger"}]},
                    None), 400, "unsupported_parameter", 'Codex does it by itself unless its provider is named "OpenAI"'),
    "no JSON": (("POST", "/v1/responses", b"{", None), 400, "invalid_json", "not valid JSON"),
    "no input": (("POST", "/v1/responses", {"model": "demo/echo"}, None), 400, "missing_required_parameter", "input"),
    "too old": (("POST", "/v1/responses", {**GOOD, "previous_response_id": "resp_1"}, None), 400,
                "previous_response_not_found", "send the whole history"),
}


def test_every_mistake_gets_its_status_code_and_cure(tmp_path):
    async def scenario(world):
        for name, (call, status, code, words) in MISTAKES.items():
            method, path, body, key = call
            got, headers, raw = await asyncio.to_thread(world.ask, method, path, body, key)
            assert (got, told(raw)[0]) == (status, code), name
            assert words in told(raw)[1], name
            assert headers["x-request-id"], name
        assert not recent(world.ledger, 1)       # what is refused makes no row, and is counted
        await world.ledger.save_counts()
        assert sum(count for count, in read(world.ledger, "SELECT value FROM counters")) == len(MISTAKES)
    run(tmp_path, scenario, {})


def test_the_root_sends_a_browser_to_the_dashboard_and_answers_others(tmp_path):
    async def scenario(world):
        status, headers, _ = await world.get("/", key="", accept="text/html,application/xhtml+xml;q=0.9")
        assert (status, headers["location"]) == (303, "/admin")
        for accept in ("*/*", "application/json"):
            status, _, raw = await world.get("/", key="", accept=accept)
            assert (status, json.loads(raw)["status"]) == (200, "ok")
        status, _, raw = await asyncio.to_thread(world.ask, "HEAD", "/", key="")
        assert (status, raw) == (200, b"")
        assert (await asyncio.to_thread(world.ask, "POST", "/", GOOD))[0] == 405
        status, _, raw = await world.get("/", host="evil.example", accept="text/html")
        assert (status, told(raw)[0]) == (421, "misdirected_request")
    run(tmp_path, scenario, {})


@pytest.mark.parametrize("wire", ["chat", "relayed", "normalised"])
def test_store_is_told_as_it_is_kept(tmp_path, wire):
    async def scenario(world):
        for stream in (True, False):
            _, _, raw = await world.post("up/m", stream, store=True)
            final = streams.check(raw, relayed=wire == "relayed") if stream else json.loads(raw)
            assert wire == "relayed" or final["store"] is False         # there the provider says it itself
        assert all(body.get("store", False) is False for _, body in world.upstreams["up"].asked)
    run(tmp_path, scenario, {"up": WIRES[wire]})


def test_a_websocket_is_refused_with_426(tmp_path):
    async def scenario(world):
        status, _, raw = await world.get("/v1/responses", connection="Upgrade", upgrade="websocket")
        assert (status, told(raw)[0]) == (426, "use_http_sse")
    run(tmp_path, scenario, {})


# --- models and health ----------------------------------------------------------------------------

def test_one_body_is_openais_list_and_codexs_catalogue(tmp_path):
    async def scenario(world):
        status, headers, raw = await world.get("/v1/models?client_version=0.169.0")
        body = json.loads(raw)
        assert (status, body["object"]) == (200, "list")
        names = [row["id"] for row in body["data"]]
        assert names == [entry["slug"] for entry in body["models"]] and names[0] == "big/one"
        assert {"demo/echo", "up/*"} & set(names) == {"demo/echo"}
        first = body["models"][0]
        assert first["context_window"] == 1234 and first["base_instructions"] and first["apply_patch_tool_type"] == "freeform"
        again, headers_again, empty = await world.get("/v1/models?client_version=0.169.0", **{"if-none-match": headers["etag"]})
        assert (again, empty, headers_again["etag"]) == (304, b"", headers["etag"])
        assert json.loads((await world.get("/v1/models/demo/echo"))[2])["id"] == "demo/echo"
        for query, last in (("?client_version=0.171.0", "max"), ("?client_version=0.128.0", "xhigh"), ("", "xhigh")):
            entry = json.loads((await world.get(f"/v1/models{query}"))[2])["models"][0]
            assert entry["supported_reasoning_levels"][-1]["effort"] == last       # 0.128 reads no list with a level it does not know
        missing = await world.get("/v1/models/demo/ecko")
        assert missing[0] == 404 and "Did you mean demo/echo?" in told(missing[2])[1]
    run(tmp_path, scenario, {"up": ("chat", "normalise", [b""])},
        more='[models."big/one"]\ntargets = ["up:one"]\ncontext_window = 1234\n')


# model -> window, the largest; default effort, the highest; has code mode, a service tier, and a default verbosity
ENTRIES = {
    "gpt-6.2-sol": (500000, 872000, "low", "ultra", True, True, "low"),
    "gpt-6.2-astra": (272000, 872000, "low", "ultra", True, True, "low"),
    "gpt-6.1-terra-2026-10-01": (500000, 872000, "low", "ultra", True, True, "low"),
    "gpt-6-luna": (272000, 872000, "medium", "max", True, True, "low"),
    "gpt-5.5": (272000, 272000, "medium", "xhigh", False, True, "low"),
    "gpt-daybreak-red-latest": (372000, 372000, "medium", "ultra", True, True, "high"),
    "gpt-5.4": (272000, 1000000, "xhigh", "xhigh", False, True, "low"),
    "gpt-5.4-mini": (272000, 272000, "medium", "xhigh", False, True, "medium"),
    "own": (128000, 128000, "medium", "max", False, True, None),
}


def test_a_catalogue_entry_has_all_that_codex_knows_of_a_model():
    text = f"""
[providers.openai]
wire_api = "responses"
base_url = "http://127.0.0.1:1/v1"
models = {json.dumps(list(ENTRIES))}
[providers.talk]
wire_api = "chat"
base_url = "http://127.0.0.1:1/v1"
[models."openai/gpt-5.5-small"]
targets = ["openai:gpt-5.5"]
context_window = 4321
[models."talk/other"]
targets = ["talk:other"]
"""
    class Running:
        config = pomex.load_config(text, "pomex.toml", {})
        catalogue = pomex.ModelCatalog(config, {})

    def summary(name):
        entry = pomex.codex_entry(Running, name, 0, 171)
        old = pomex.codex_entry(Running, name, 0, 128)
        levels = [level["effort"] for level in entry["supported_reasoning_levels"]]
        assert [level["effort"] for level in old.pop("supported_reasoning_levels")] == levels[:levels.index("xhigh") + 1]
        assert old == {field: value for field, value in entry.items() if field != "supported_reasoning_levels"}
        assert entry["support_verbosity"] is bool(entry["service_tiers"])
        return (entry["context_window"], entry["max_context_window"], entry["default_reasoning_level"],
                entry["supported_reasoning_levels"][-1]["effort"], entry.get("tool_mode") == "code_mode_only",
                bool(entry["service_tiers"]), entry.get("default_verbosity"))

    assert {name: summary(f"openai/{name}") for name in ENTRIES} == ENTRIES
    assert summary("openai/gpt-5.5-small") == (4321, 4321, *ENTRIES["gpt-5.5"][2:])      # what the operator says wins
    assert summary("talk/other") == (128000, 128000, "medium", "max", False, False, None)    # this wire carries neither


@pytest.mark.parametrize("model, known", [
    ("openai/gpt-6.2-astra", True), ("openai/gpt-5.5-2026-01-01", True), ("gpt-6-sol", True), ("openai/gpt-5.3-codex", False),
    ("openrouter/openai/gpt-6-sol", False), ("anthropic/claude-opus-5-5", False)])
def test_the_printed_block_leaves_codex_its_own_idea_of_a_model(model, known):
    block = pomex.agent_settings(pomex.CODEX_AGENT, "http://127.0.0.1:7663", model)
    assert ("model_catalog_url" in block) is not known


def test_health_and_readiness_ask_for_no_key(tmp_path):
    async def scenario(world):
        for path in ("/health", "/healthz", "/livez"):
            assert json.loads((await world.get(path, key=""))[2]) == {"status": "ok", "version": pomex.VERSION}
        assert (await world.get("/ready", key=""))[0] == 200
        world.ledger.healthy = False
        status, _, raw = await world.get("/readyz", key="")
        assert status == 503 and json.loads(raw)["checks"]["ledger"] == "failed"
        refused = await world.post("demo/echo")
        assert (refused[0], told(refused[2])[0]) == (503, "ledger_unavailable")
    run(tmp_path, scenario, {})


# --- names without a provider -----------------------------------------------------------------------

PROVIDERS = """
[providers.openai]
wire_api = "responses"
base_url = "http://127.0.0.1:1/v1"
[providers.azure]
wire_api = "responses"
base_url = "http://127.0.0.1:1/v1"
models = ["gpt-5.5", "gpt-4*", "mine"]
[providers.local]
wire_api = "chat"
base_url = "http://127.0.0.1:1/v1"
[providers.any]
wire_api = "chat"
base_url = "http://127.0.0.1:1/v1"
[models."quick"]
targets = ["local:x"]
[models."gpt-6-luna"]
targets = ["azure:mine"]
[models."team/gpt-6-sol"]
targets = ["local:x"]
"""
NAMES = {       # bare name -> the full one, or a part of the refusal
    "quick": "quick", "gpt-6-luna": "gpt-6-luna",                       # a [models] entry comes first
    "gpt-6-sol": "openai/gpt-6-sol",                                    # the vendor's table; team/... is nobody's list
    "mine": "azure/mine",                                               # the configuration
    "tiny": "local/tiny", "echo": "demo/echo",                          # what a server lists
    "gpt-4o": "openai/gpt-4o",                                          # azure's pattern lists no name
    "gpt-5.5": "several providers have this one. Did you mean openai/gpt-5.5 or azure/gpt-5.5?",
    "gpt-9": "no provider lists \"gpt-9\".", "gpt-6-sool": "Did you mean team/gpt-6-sol?",
    "any/x": "any/x", "openai/gpt-5.5": "openai/gpt-5.5", "nobody/x": "nobody/x",
    "claude-opus-5": "anthropic/claude-opus-5",                         # whose key is what is missing
}


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_name_is_that_of_the_one_provider_that_lists_it(name):
    catalogue = pomex.ModelCatalog(pomex.load_config(PROVIDERS, "pomex.toml", {}), {"local": ["tiny"]})
    try:
        assert catalogue.full_name(name) == NAMES[name]
    except pomex.BadRequest as error:
        assert NAMES[name] in str(error) and (error.status, error.code, error.param) == (400, "model_not_found", "model")


def test_what_is_allowed_counted_and_answered_is_the_full_name(tmp_path):
    async def scenario(world):
        await world.ledger.edit_key("laptop", models="up/*")
        status, _, raw = await world.post("gpt-x", stream=False)
        assert (status, json.loads(raw)["model"], (await world.row())["model"]) == (200, "up/gpt-x", "up/gpt-x")
        assert world.upstreams["up"].asked[0][1]["model"] == "gpt-x"
        assert json.loads((await world.get("/v1/models/gpt-x"))[2])["id"] == "up/gpt-x"
        status, headers, raw = await world.post("echo")
        assert (status, told(raw)[0]) == (403, "model_not_allowed")
        await world.ledger.edit_key("laptop", models="gpt-x")
        assert (await world.post("gpt-x"))[0] == 403
        await world.ledger.edit_key("laptop", models="")
        await world.ledger.use_provider("up", False)          # out of use, its name stays its own
        status, _, raw = await world.post("gpt-x")
        assert (status, told(raw)[0]) == (400, "provider_disabled")
    run(tmp_path, scenario, {"up": ("responses", "bytes", [sse(*native())])}, more='models = ["gpt-x"]\n')


# --- what is answered -----------------------------------------------------------------------------

WIRES = {
    "chat": ("chat", "normalise", [sse(chat({"content": "Hello"}))]),
    "relayed": ("responses", "bytes", [sse(*native())]),
    "normalised": ("responses", "normalise", [sse(*native())]),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_and_its_row(tmp_path, wire, stream):
    async def scenario(world):
        status, headers, raw = await world.post("up/m", stream)
        final = streams.check(raw, relayed=wire == "relayed") if stream else json.loads(raw)
        assert (status, final["status"], final["model"]) == (200, "completed", "up/m")
        assert final["id"].startswith("resp_") and final["id"] != "resp_theirs"
        assert final["output"][0]["content"][0]["text"] == "Hello"
        assert (final["usage"]["input_tokens"], final["usage"]["output_tokens"]) == (20, 5)
        assert headers["x-pomex-provider"] == "up" and headers["x-pomex-attempts"] == "1" and "openai-model" not in headers
        row = await world.row()
        kept = {k: row[k] for k in ("key", "model", "provider", "upstream_model", "status", "input", "cached", "output",
                                    "estimated", "endpoint", "response_id", "attempts")}
        assert kept == {"key": "laptop", "model": "up/m", "provider": "up", "upstream_model": "m", "status": "completed",
                        "input": 20, "cached": 8, "output": 5, "estimated": "", "endpoint": "/v1/responses",
                        "response_id": final["id"], "attempts": 1}
        head, body = world.upstreams["up"].asked[0]
        assert "authorization: Bearer sk-theirs" in head and body["model"] == "m" and world.token not in head
    run(tmp_path, scenario, {"up": WIRES[wire]})


CONVERSATIONS = [        # headers, fields of the body -> the session of the row
    ({"session_id": "a"}, {}, "a"), ({"session-id": "a"}, {}, "a"), ({"thread-id": "b"}, {}, "b"),
    ({"x-session-id": "c"}, {}, "c"), ({"x-claude-code-session-id": "d"}, {}, "d"), ({}, {"prompt_cache_key": "e"}, "e"),
    ({"session_id": "a"}, {"prompt_cache_key": "e"}, "a"), ({}, {}, "")]


def test_a_row_names_the_conversation_and_the_client(tmp_path):
    async def scenario(world):
        for headers, fields, session in CONVERSATIONS:
            assert (await world.post("demo/echo", headers={"user-agent": "my-client/1", **headers}, **fields))[0] == 200
            row = recent(world.ledger, 1)[0]
            assert (row["session"], row["client"]) == (session, "my-client/1"), (headers, fields)
    run(tmp_path, scenario, {})


def test_a_row_says_why_it_failed_what_was_tried_and_what_was_not_carried(tmp_path):
    failing = http_answer(503, {"error": {"message": "busy\n\u202e"}}, "application/json", "x-request-id: theirs-7")

    async def scenario(world):
        await world.post("up/m", tools=[{"type": "web_search"}])
        row = await world.row()
        detail = json.loads(row["detail"])
        assert (row["status"], row["error_code"], row["upstream_id"]) == ("failed", "server_error", "theirs-7")
        assert "busy" in row["error"] and row["error"].isprintable()
        assert len(detail["tried"]) == len(detail["tried_ms"]) == row["attempts"] > 1 and detail["dropped"] == ["tools:web_search"]
        assert all(text.startswith("up: 503") for text in detail["tried"]) and detail["tried_ms"] == sorted(detail["tried_ms"])
        await world.post("demo/echo")
        row = await world.row()
        assert (row["status"], row["error"], row["detail"]) == ("completed", "", "")
    run(tmp_path, scenario, {"up": ("chat", "normalise", [failing])})


def test_what_cannot_be_carried_is_named(tmp_path):
    async def scenario(world):
        _, headers, _ = await world.post("up/m", tools=[{"type": "web_search"}])
        assert headers["x-pomex-dropped"] == "tools:web_search"
    run(tmp_path, scenario, {"up": WIRES["chat"]})


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("size, off_loop", [(1000, False), (300_000, True)])
def test_a_large_body_is_read_and_encoded_off_the_loop(tmp_path, monkeypatch, wire, size, off_loop):
    threads = []

    def noting(function):
        def noted(*arguments):
            threads.append(threading.current_thread() is not threading.main_thread())
            return function(*arguments)
        return noted

    async def scenario(world):
        status, _, raw = await world.post("up/m", input="x" * size)
        assert (status, streams.check(raw, relayed=wire == "relayed")["status"]) == (200, "completed")
        assert threads == [off_loop, off_loop]
        status, _, raw = await world.post("up/m", input=[{"type": "message", "role": "user", "content": 1}, "x" * size])
        assert (status, json.loads(raw)["error"]["param"]) == (400, "input[0].content")
    monkeypatch.setattr(pomex, "parse_request", noting(pomex.parse_request))
    monkeypatch.setattr(pomex, "encode_call", noting(pomex.encode_call))
    run(tmp_path, scenario, {"up": WIRES[wire]})


def test_a_request_that_is_given_up_waits_for_its_thread(tmp_path):
    async def main():
        begun, go_on, ended = threading.Event(), threading.Event(), []

        def work():
            begun.set()
            ended.append(go_on.wait(5))
        task = asyncio.create_task(pomex.off_loop(pomex.LARGE_BODY_BYTES, work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]
    asyncio.run(main())


# --- silence --------------------------------------------------------------------------------------

IMPATIENT = "early_200_after_s = 0.1\nheartbeat_s = 0.1"


@pytest.mark.parametrize("wire", WIRES)
def test_silence_brings_an_early_200_and_heartbeats_and_the_numbers_go_on(tmp_path, wire):
    kind, relay, answers = WIRES[wire]
    steps = answers[0][1:]
    middle = len(steps) // 2
    late = [0.35, answers[0][0], 0.15, *steps[:middle], 0.25, *steps[middle:]]

    async def scenario(world):
        status, _, raw = await world.post("up/m")
        final = streams.check(raw, relayed=wire == "relayed")
        kinds = [event["type"] for event in streams.events(raw)]
        assert (status, final["status"]) == (200, "completed")
        assert kinds[0] == "response.created" and kinds.count("response.created") == 1
        assert kinds.count("response.in_progress") >= 3
    run(tmp_path, scenario, {"up": (kind, relay, [late])}, IMPATIENT)


@pytest.mark.parametrize("headers, kinds", [({}, ["error", "response.failed"]), (CODEX, ["response.failed"])])
def test_a_failure_behind_an_early_200_is_an_event(tmp_path, headers, kinds):
    async def scenario(world):
        status, _, raw = await world.post("up/m", headers=headers)
        assert (status, streams.check(raw, codex=bool(headers))["status"]) == (200, "failed")
        assert [e["type"] for e in streams.events(raw)][-len(kinds):] == kinds
    run(tmp_path, scenario, {"up": ("chat", "normalise", [[0.2, http_answer(503, {"error": {"message": "busy"}})]])}, IMPATIENT)


def test_a_finished_answer_does_not_wait_for_a_missing_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pomex, "AFTER_STOP_S", 0.1)

    async def scenario(world):
        final = streams.check((await world.post("up/m"))[2])
        assert final["status"] == "completed" and (await world.row())["terminal_by"] == "gateway"
    run(tmp_path, scenario, {"up": ("chat", "normalise", [sse(chat({"content": "Hi"}, usage=False, done=False), 8.0)])})


# --- failures -------------------------------------------------------------------------------------

# what the upstream answers -> status and code for a standard client, and for Codex when it streams
FAILURES = {
    "overloaded": (http_answer(503, {"error": {"message": "busy"}}), (503, "server_error"), (200, "server_error")),
    "bad key": (http_answer(401, {"error": {"message": "Incorrect API key sk-theirs"}}), (502, "server_error"),
                (200, "server_error")),
    "rate": (http_answer(429, {"error": {"message": "slow", "code": "rate_limit_exceeded"}}, "application/json", "retry-after: 7"),
             (429, "rate_limit_exceeded"), (200, "rate_limit_exceeded")),
    "quota": (http_answer(429, {"error": {"message": "empty", "code": "insufficient_quota"}}), (429, "insufficient_quota"),
              (200, "insufficient_quota")),
    "context": (http_answer(400, {"error": {"message": "too long", "code": "context_length_exceeded"}}),
                (400, "context_length_exceeded"), (200, "context_length_exceeded")),
    "bad request": (http_answer(400, {"error": {"message": "no such field", "param": "x"}}), (400, "invalid_request_error"),
                    (400, "invalid_prompt")),
    "no such model": (http_answer(404, {"error": {"message": "nope", "code": "model_not_found"}}), (400, "model_not_found"),
                      (400, "model_not_found")),
    "redirect": (http_answer(302, b"", "text/plain", "location: http://127.0.0.1:1/"), (502, "server_error"),
                 (200, "server_error")),
    "html": (http_answer(200, b"<html>Welcome</html>", "text/html"), (502, "server_error"), (200, "server_error")),
    "cut": (sse(b'data: {"choi', cut=True), (502, "server_error"), (200, "server_error")),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_each_client_is_told_when_the_provider_fails(tmp_path, name):
    answer, standard, codex = FAILURES[name]

    async def scenario(world):
        for stream in (True, False):
            status, headers, raw = await world.post("up/m", stream)
            assert (status, told(raw)[0]) == standard
            assert "sk-theirs" not in raw.decode()
            if name == "rate":
                assert headers["retry-after"] == "7"
            if name == "quota":
                assert headers["x-should-retry"] == "false"
        status, _, raw = await world.post("up/m", headers=CODEX)
        if codex[0] == 200:
            final = streams.check(raw, codex=True)
            assert (final["status"], final["error"]["code"]) == ("failed", codex[1])
            assert name != "rate" or "try again in 7s" in final["error"]["message"]
        else:
            assert (status, told(raw)[0]) == codex
        assert (await world.row())["status"] == "failed"
    run(tmp_path, scenario, {"up": ("chat", "normalise", [answer])})


@pytest.mark.parametrize("first", ["overloaded", "bad key", "rate", "quota", "redirect", "html", "cut"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_second_target_makes_a_failure_before_output_invisible(tmp_path, first, stream):
    async def scenario(world):
        status, headers, raw = await world.post("two/m", stream)
        final = streams.check(raw) if stream else json.loads(raw)
        assert (status, final["status"], final["output"][0]["content"][0]["text"]) == (200, "completed", "Hello")
        calls = 2 if first in ("bad key", "rate", "quota") else 3       # the others get a second chance
        assert (headers["x-pomex-provider"], headers["x-pomex-attempts"]) == ("good", str(calls))
    run(tmp_path, scenario, {"bad": ("chat", "normalise", [FAILURES[first][0]]), "good": WIRES["chat"]},
        more='[models."two/m"]\ntargets = ["bad:m", "good:m"]\n')


def test_after_output_no_other_target_is_asked(tmp_path):
    async def scenario(world):
        final = streams.check((await world.post("two/m"))[2])
        assert final["status"] == "failed" and not world.upstreams["good"].asked
        assert final["output"][0]["content"][0]["text"] == "Half"
    run(tmp_path, scenario, {"bad": ("chat", "normalise", [sse(chat({"content": "Half"}, finish="", usage=False, done=False),
                                                               cut=True)]), "good": WIRES["chat"]},
        more='[models."two/m"]\ntargets = ["bad:m", "good:m"]\n')


# DESIGN 8. What is asked -> for a standard client: status, code; for Codex: the same, the exact code in header or ledger
BAD_400 = http_answer(400, {"error": {"message": "no such field", "code": "unknown_parameter"}})
REFUSALS = {
    "unknown model": ({"model": "demo/ecko"}, (400, "model_not_found"), (400, "model_not_found", "model_not_found")),
    "not configured": ({"model": "xai/x"}, (400, "provider_not_configured"), (400, "model_not_found", "provider_not_configured")),
    "disabled": ({"model": "off/x"}, (400, "provider_disabled"), (400, "model_not_found", "provider_disabled")),
    "not allowed": ({"key": "narrow", "model": "demo/echo"}, (403, "model_not_allowed"),
                    (400, "model_not_found", "model_not_allowed")),
    "a bad model": ({"model": 7}, (400, "invalid_type"), (400, "model_not_found", "invalid_type")),
    "a bad parameter": ({"temperature": 9}, (400, "invalid_value"), (400, "invalid_prompt", "invalid_value")),
    "a bad item": ({"input": [{"role": "nobody"}]}, (400, "invalid_value"), (400, "invalid_prompt", "invalid_value")),
    "a needless field": ({"background": True}, (400, "unsupported_parameter"), (400, "invalid_prompt", "unsupported_parameter")),
    "no JSON": (b"{", (400, "invalid_json"), (400, "invalid_prompt", "invalid_json")),
    "budget": ({"key": "poor", "model": "up/m"}, (429, "insufficient_quota"), (200, "invalid_prompt", "insufficient_quota")),
    "rate": ({"key": "slow"}, (429, "rate_limit_exceeded"), (200, "rate_limit_exceeded", "rate_limit_exceeded")),
    "the provider's 400": ({"model": "bad/x"}, (400, "unknown_parameter"), (400, "invalid_prompt", "unknown_parameter")),
    "every target failed": ({"model": "team/x"}, (503, "upstream_unavailable"), (200, "server_error", "server_error")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_kind_of_client_is_refused_in_a_form_whose_text_it_shows(tmp_path, name):
    asked, standard, codex = REFUSALS[name]

    async def scenario(world):
        now = 1_800_000_000
        keys = {name: await world.ledger.create_key(name, now, **settings) for name, settings in
                (("narrow", {"models": "up/*"}), ("poor", {"budget_nanos": 1}), ("slow", {"rpm": 1}))}
        await world.ledger.use_provider("off", False)
        fields = asked if isinstance(asked, dict) else {}
        key = keys.get(fields.get("key"))
        body = {**GOOD, "stream": True, **{k: v for k, v in fields.items() if k != "key"}}

        async def ask(headers):
            sent = body if isinstance(asked, dict) else asked
            return await asyncio.to_thread(lambda: world.ask("POST", "/v1/responses", sent, key, **headers))

        if name == "rate":
            await ask({})
        status, headers, raw = await ask({})
        assert (status, told(raw)[0], "x-pomex-error" in headers) == (*standard, False)
        sentence = told(raw)[1]
        assert name != "budget" or headers["x-should-retry"] == "false"
        status, headers, raw = await ask(CODEX)
        if codex[0] == 200:
            error = streams.check(raw, codex=True)["error"]
            if name == "every target failed":
                kept, _ = recent(world.ledger, 9)
            else:                   # a limit has no row
                await world.ledger.save_counts()
                kept = {"error_code": refusals(world.ledger)[0]["code"]}
                assert len(recent(world.ledger, 9)) == (name == "rate")
            assert (status, error["code"], kept["error_code"]) == codex
            assert name in ("rate", "every target failed") or error["message"] == sentence
        else:
            assert (status, told(raw)[0], headers["x-pomex-error"]) == codex and told(raw)[1] == sentence
            status, headers, raw = await ask(OLD_CODEX)     # it shows the body of a 400 as it is
            assert (status, raw.decode(), headers["x-pomex-error"]) == (400, sentence, codex[2])
            assert headers["content-type"] == "text/plain; charset=utf-8"
    failing = ("chat", "normalise", [http_answer(503, {"error": {"message": "busy"}})])
    run(tmp_path, scenario, {"up": WIRES["chat"], "off": WIRES["chat"], "bad": ("chat", "normalise", [BAD_400]), "one": failing,
                             "two": failing},
        more='[models."team/x"]\ntargets = ["one:x", "two:x"]\n[prices."up/m"]\ninput = 1\noutput = 1\n')


def test_behind_an_early_200_codex_does_not_repeat_what_the_provider_refused(tmp_path):
    async def scenario(world):
        status, _, raw = await world.post("up/m", headers=CODEX)
        error = streams.check(raw, codex=True)["error"]
        assert (status, error["code"], error["message"]) == (200, "invalid_prompt", "no such field")
        assert (await world.row())["error_code"] == "unknown_parameter"
    run(tmp_path, scenario, {"up": ("chat", "normalise", [[0.3, BAD_400]])}, IMPATIENT)


# --- leaving and stopping -------------------------------------------------------------------------

@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_closes_the_upstream_and_has_its_row(tmp_path, begun):
    first = chat({"content": "Some words of an answer"}, finish="", usage=False, done=False)
    steps = sse(first, 8.0) if begun else [8.0, b""]

    async def scenario(world):
        reader, writer = await asyncio.open_connection(*world.server.address)
        body = json.dumps({"model": "up/m", "input": "Hi", "stream": True}).encode()
        writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s"
                     % (world.token.encode(), len(body), body))
        if begun:
            await reader.readuntil(b"Some words")
        else:
            await asyncio.sleep(0.1)
        writer.transport.abort()
        await asyncio.wait_for(world.upstreams["up"].left.wait(), 1)
        row = await world.row()
        assert (row["status"], row["error_code"], row["estimated"] != "") == ("cancelled", "client_gone", True)
        assert (row["output"] > 0) is begun
    run(tmp_path, scenario, {"up": ("chat", "normalise", [steps])})


LIMITS = {"none": {}, "money": {"budget_nanos": 10**9}, "requests": {"rpm": 5}, "tokens": {"tpm": 10**6},
          "at once": {"concurrent": 1}}


@pytest.mark.parametrize("price", [0, 1])
@pytest.mark.parametrize("limit", LIMITS)
def test_an_open_request_is_in_the_database_before_its_client_sees_a_byte(tmp_path, limit, price):
    first = chat({"content": "Some words"}, finish="", usage=False, done=False)

    async def scenario(world):
        await world.ledger.edit_key("laptop", models="", **LIMITS[limit])
        reader, writer = await asyncio.open_connection(*world.server.address)
        body = json.dumps({"model": "up/m", "input": "Hi", "stream": True}).encode()
        writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nx-request-id: mine\r\nauthorization: Bearer %s\r\n"
                     b"content-length: %d\r\n\r\n%s" % (world.token.encode(), len(body), body))
        await reader.readexactly(1)
        assert read(world.ledger, "SELECT request_id, key_id, model FROM open_requests") == [("mine", 1, "up/m")]
        writer.transport.abort()
        assert (await world.row())["request_id"] == "mine"
        assert not under_way(world.ledger) and not world.ledger.pending
        while world.ledger.flushing:            # its success would end what follows
            await asyncio.sleep(0.01)
        world.ledger.healthy = False            # nobody is asked what could not be recorded
        status, _, raw = await world.post("up/m")
        assert (status, told(raw)[0], len(world.upstreams["up"].asked)) == (503, "ledger_unavailable", 1)
        world.ledger.healthy = True
    run(tmp_path, scenario, {"up": ("chat", "normalise", [sse(first, 8.0)])},
        more=f'[prices."up/m"]\ninput = {price}\noutput = {price}\n')


def test_a_stopping_gateway_gives_open_streams_their_terminal_event(tmp_path):
    first = chat({"content": "Some words"}, finish="", usage=False, done=False)

    async def scenario(world):
        asked = asyncio.create_task(world.post("up/m"))
        while not world.upstreams["up"].asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await world.server.drain(0.1)
        final = streams.check((await asked)[2])
        assert final["status"] == "failed" and "stopping" in final["error"]["message"]
    run(tmp_path, scenario, {"up": ("chat", "normalise", [sse(first, 8.0)])})


def test_a_conversation_is_remembered_by_key_and_within_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pomex, "REMEMBERED_BYTES", 100)
    used = []
    grown_body = pomex.grown_body
    monkeypatch.setattr(pomex, "grown_body", lambda *given: used.append(grown_body(*given) is not None) or grown_body(*given))
    first = [{"role": "user", "content": "x" * 100}]
    more = [*first, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]

    async def scenario(world):
        async def ask(items, headers=None, **fields):
            used.clear()
            status, _, _ = await world.post("up/m", input=items, headers=headers, **fields)
            assert status == 200
            return [message["content"] for message in world.upstreams["up"].asked[-1][1]["messages"]], used
        assert await ask(first, prompt_cache_key="a") == (["x" * 100], [])
        assert await ask(more, prompt_cache_key="a") == (["x" * 100, "y", "z"], [True])
        assert (await ask(more, prompt_cache_key="b"))[1] == []                 # another conversation
        assert (await ask(first, {"session_id": "s"}))[1] == []
        assert (await ask(more, {"session_id": "s"}))[1] == [True]
        token = await world.ledger.create_key("other", 1_800_000_000)                  # another key
        assert (await ask(more, {"session_id": "s", "authorization": f"Bearer {token}"}))[1] == []
        monkeypatch.setattr(pomex, "MEMO_BYTES", 1)
        assert (await ask(more, {"session_id": "s"}))[1] == [False]             # as long as before: not grown
        assert (await ask(more, {"session_id": "s"}))[1] == []                  # forgotten
    run(tmp_path, scenario, {"up": WIRES["chat"]})
