"""Runs where the Agents SDK is: its model for chat completions, told and answering as in chat_driver.py."""
from __future__ import annotations

import asyncio
import json

import agents
import openai
from driver_lines import answer_lines

agents.set_tracing_disabled(True)


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return "21 degrees"


async def run(request, tools):
    arguments = request["arguments"]
    client = openai.AsyncOpenAI(base_url=request["base_url"], api_key=request["key"], max_retries=0, timeout=60)
    agent = agents.Agent("A", tools=tools, model=agents.OpenAIChatCompletionsModel(arguments["model"], client),
                         model_settings=agents.ModelSettings(include_usage=True))
    if arguments["way"] == "streamed":
        made = agents.Runner.run_streamed(agent, "Weather?" if tools else "Hi")
        async for _ in made.stream_events():
            pass
    else:
        made = await agents.Runner.run(agent, "Weather?" if tools else "Hi")
    usage = made.context_wrapper.usage
    calls = [[item.raw_item.name, json.loads(item.raw_item.arguments)] for item in made.new_items
             if item.type == "tool_call_item"]
    return {"text": made.final_output, "calls": calls,
            "usage": [usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens]}


def answer(request):
    return asyncio.run(run(request, [get_weather] if request["do"] == "tool" else []))


answer_lines(answer, openai.APIStatusError)
