"""A Model Context Protocol server on stdio with one tool, for Codex to start: newline-delimited JSON-RPC."""
import json
import sys

TOOL = {"name": "get_weather", "description": "The weather of a city.",
        "inputSchema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def result(method: str, params: dict) -> dict:
    if method == "initialize":
        return {"protocolVersion": params.get("protocolVersion", "2025-06-18"), "capabilities": {"tools": {}},
                "serverInfo": {"name": "demo", "version": "1"}}
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        city = params["arguments"]["city"]
        return {"content": [{"type": "text", "text": f"{city}: 21 degrees, from the MCP server"}], "isError": False}
    return {}


for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
        answer = {"jsonrpc": "2.0", "id": message["id"],
                  "result": result(message.get("method", ""), message.get("params") or {})}
        print(json.dumps(answer), flush=True)
