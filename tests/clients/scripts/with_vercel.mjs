// Vercel's AI SDK through its three providers: openai-compatible, openai (the Responses API), anthropic (Messages).
import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";
import { createRequire } from "node:module";

// Packages are looked up beside a script; these lie in an environment of their own.
const require = createRequire(`${process.env.NODE_ENVIRONMENT}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { generateText, streamText, Output, stepCountIs, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");

const { BASE_URL: baseURL, MODEL, API_KEY: apiKey } = process.env;
const QUESTION = "Name three fruits.";
const CITY_QUESTION = "What is the weather in Oslo?";
const options = { temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

const fruit = z.object({
  name: z.enum(["apple", "pear", "plum"]),
  count: z.number().int().min(0).max(9),
  ripe: z.boolean(),
});
const weather = z.object({ city: z.enum(["Oslo", "Paris"]), unit: z.enum(["celsius", "fahrenheit"]) });
// The model is too small to end a list of calls by itself.
const oneCall = {
  tidewright: { parallel_tool_calls: false },
  openai: { parallelToolCalls: false },
  anthropic: { disableParallelToolUse: true },
};
const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: weather,
    execute: async () => "4 degrees",
  }),
};

// supportsStructuredOutputs: without it the provider sends json_object in place of the schema.
// includeUsage: without it a stream's usage is undefined.
const compatible = createOpenAICompatible({
  name: "tidewright",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
})(MODEL);
const responsesModel = createOpenAI({ baseURL, apiKey }).responses(MODEL);
const messagesModel = createAnthropic({ baseURL, apiKey })(MODEL);

async function streamed(settings) {
  const result = streamText({ ...settings, onError: () => {} });
  const parts = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  return { result, parts };
}

async function text(model, providerOptions = {}) {
  const asked = { model, prompt: QUESTION, ...options, providerOptions };
  const whole = await generateText(asked);
  assert.ok(whole.text.length > 0);
  assert.ok(["stop", "length"].includes(whole.finishReason), whole.finishReason);
  assert.ok(whole.usage.outputTokens > 0);
  const { result, parts } = await streamed(asked);
  assert.equal(await result.text, whole.text);
  assert.equal(await result.finishReason, whole.finishReason);
  assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
  const kinds = parts.map((part) => part.type).filter((kind, at, all) => kind !== all[at - 1]);
  const order = ["start", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish"];
  assert.deepEqual(kinds.filter((kind) => order.includes(kind)), order);
  await followUp(model, whole, providerOptions);
}

async function followUp(model, whole, providerOptions) {
  const messages = [
    { role: "user", content: QUESTION },
    ...whole.response.messages,
    { role: "user", content: "Another one." },
  ];
  assert.ok((await generateText({ model, messages, ...options, providerOptions })).text.length > 0);
}

async function structured(model) {
  const asked = { model, prompt: QUESTION, ...options, maxOutputTokens: 64, output: Output.object({ schema: fruit }) };
  const whole = await generateText(asked);
  assert.deepEqual(fruit.parse(whole.output), whole.output);
  const result = streamText(asked);
  let last;
  for await (const partial of result.partialOutputStream) last = partial;
  assert.deepEqual(last, whole.output);
  assert.deepEqual(await result.output, whole.output);
}

async function toolCalls(model) {
  const asked = {
    ...{ model, prompt: CITY_QUESTION, ...options, maxOutputTokens: 128, tools },
    ...{ toolChoice: "required", stopWhen: stepCountIs(1), providerOptions: oneCall },
  };
  const whole = await generateText(asked);
  assert.equal(whole.finishReason, "tool-calls");
  assert.ok(whole.toolCalls.length > 0);
  for (const call of whole.toolCalls) {
    assert.ok(!call.invalid);
    assert.equal(call.toolName, "get_weather");
    assert.deepEqual(weather.parse(call.input), call.input);
  }
  assert.deepEqual(whole.toolResults.map((result) => result.output), whole.toolCalls.map(() => "4 degrees"));
  const { result, parts } = await streamed(asked);
  assert.deepEqual((await result.toolCalls).map((call) => call.input), whole.toolCalls.map((call) => call.input));
  assert.ok(parts.some((part) => part.type === "tool-input-delta"));
  assert.equal(await result.finishReason, "tool-calls");
  const messages = [{ role: "user", content: CITY_QUESTION }, ...whole.response.messages];
  const final = await generateText({ model, messages, ...options, tools, toolChoice: "none" });
  assert.ok(final.text.length > 0);
}

const checks = {
  chat: () => text(compatible),
  structured: () => structured(compatible),
  tools: () => toolCalls(compatible),
  responses: async () => {
    await text(responsesModel, { openai: { store: false } }); // it then sends earlier answers themselves, not their ids
    await structured(responsesModel);
  },
  responses_by_reference: async () =>
    followUp(responsesModel, await generateText({ model: responsesModel, prompt: QUESTION, ...options }), {}),
  responses_tools: () => toolCalls(responsesModel),
  messages: () => text(messagesModel),
  messages_tools: () => toolCalls(messagesModel),
};
await checks[process.argv[2]]();
