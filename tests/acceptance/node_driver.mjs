// Runs beside node_modules with openai, @anthropic-ai/sdk and the AI SDK: told and answering as in chat_driver.py.
// Its argument is the client: openai | anthropic | ai-chat | ai-messages.
import readline from "node:readline";

const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const description = "The weather of a city.";
const hi = [{ role: "user", content: "Hi" }];
const weather = [{ role: "user", content: "Weather?" }];

async function openai({ base_url, key }) {
  const { default: OpenAI } = await import("openai");
  const api = new OpenAI({ baseURL: base_url, apiKey: key, maxRetries: 0 }).chat.completions;
  const tools = [{ type: "function", function: { name: "get_weather", description, parameters: schema } }];
  const ask = (way, body) => way === "streamed"
    ? api.stream({ ...body, stream_options: { include_usage: true } }).finalChatCompletion() : api.create(body);
  const told = (made) => ({
    text: made.choices[0].message.content, stop: made.choices[0].finish_reason,
    calls: (made.choices[0].message.tool_calls ?? []).map((c) => [c.function.name, JSON.parse(c.function.arguments)]),
    usage: [made.usage.prompt_tokens, made.usage.prompt_tokens_details.cached_tokens, made.usage.completion_tokens],
  });
  return {
    text: async ({ way, model }) => told(await ask(way, { model, messages: hi })),
    tool: async ({ way, model }) => {
      const first = await ask(way, { model, messages: weather, tools });
      const { role, content, tool_calls } = first.choices[0].message;
      const results = tool_calls.map((c) => ({ role: "tool", tool_call_id: c.id, content: "21 degrees" }));
      const kept = tool_calls.map(({ id, type, function: { name, arguments: text } }) =>
        ({ id, type, function: { name, arguments: text } }));
      const messages = [...weather, { role, content, tool_calls: kept }, ...results];
      const second = await ask(way, { model, messages, tools });
      return { ...told(second), calls: told(first).calls };
    },
  };
}

async function anthropic({ base_url, key }) {
  const { default: Anthropic } = await import("@anthropic-ai/sdk");
  const api = new Anthropic({ baseURL: base_url.replace(/\/v1$/, ""), apiKey: key, maxRetries: 0 }).messages;
  const tools = [{ name: "get_weather", description, input_schema: schema }];
  const ask = (way, body) => way === "streamed"
    ? api.stream({ max_tokens: 4096, ...body }).finalMessage() : api.create({ max_tokens: 4096, ...body });
  const told = (made) => ({
    text: made.content.filter((b) => b.type === "text").map((b) => b.text).join(""), stop: made.stop_reason,
    calls: made.content.filter((b) => b.type === "tool_use").map((b) => [b.name, b.input]),
    usage: [made.usage.input_tokens + made.usage.cache_read_input_tokens, made.usage.cache_read_input_tokens,
      made.usage.output_tokens],
  });
  return {
    text: async ({ way, model }) => told(await ask(way, { model, messages: hi })),
    tool: async ({ way, model }) => {
      const first = await ask(way, { model, messages: weather, tools });
      const results = first.content.filter((b) => b.type === "tool_use")
        .map((b) => ({ type: "tool_result", tool_use_id: b.id, content: "21 degrees" }));
      const messages = [...weather, { role: "assistant", content: first.content }, { role: "user", content: results }];
      const second = await ask(way, { model, messages, tools });
      return { ...told(second), calls: told(first).calls };
    },
  };
}

async function aiSdk(provider) {
  const { generateText, streamText, jsonSchema, stepCountIs, tool } = await import("ai");
  const get_weather = tool({ description, inputSchema: jsonSchema(schema), execute: async () => "21 degrees" });
  const ask = async (way, options) => {
    const settings = { maxRetries: 0, ...options };
    if (way !== "streamed") return generateText(settings);
    let failed;
    const made = streamText({ ...settings, onError: ({ error }) => { failed = error; } });
    await made.consumeStream();
    if (failed) throw failed;
    return { text: await made.text, steps: await made.steps };
  };
  const told = (made) => {
    const usage = made.steps.at(-1).usage;
    return {
      text: made.text, stop: made.steps.at(-1).rawFinishReason,
      calls: made.steps.flatMap((step) => step.toolCalls).map((c) => [c.toolName, c.input]),
      usage: [usage.inputTokens, usage.inputTokenDetails.cacheReadTokens, usage.outputTokens],
    };
  };
  return {
    text: async ({ way, model }) => told(await ask(way, { model: provider(model), prompt: "Hi" })),
    tool: async ({ way, model }) => told(await ask(way, {
      model: provider(model), prompt: "Weather?", tools: { get_weather }, stopWhen: stepCountIs(3) })),
  };
}

const clients = {
  openai, anthropic,
  "ai-chat": async ({ base_url, key }) => {
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    return aiSdk(createOpenAICompatible({ name: "pomex", baseURL: base_url, apiKey: key, includeUsage: true }));
  },
  "ai-messages": async ({ base_url, key }) => {
    const { createAnthropic } = await import("@ai-sdk/anthropic");
    return aiSdk(createAnthropic({ baseURL: base_url, apiKey: key }));
  },
};

globalThis.AI_SDK_LOG_WARNINGS = false;
for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    const client = await clients[process.argv[2]](request);
    answer = { result: await client[request.do](request.arguments) };
  } catch (error) {
    const message = String(error.message);
    answer = { raised: { type: error.name ?? error.constructor.name, status: error.status ?? error.statusCode, message } };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
