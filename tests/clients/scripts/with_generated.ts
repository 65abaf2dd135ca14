// The client that @hey-api/openapi-ts makes of the OpenAPI document, in the folder tidewright/ beside this file.
// `tsc --strict` is a test as well: what stands below @ts-expect-error must be wrong.
import assert from "node:assert/strict";
import { createMessage, createResponse, listModels, type ResponseEvent } from "./tidewright";
import { createChatCompletion, type ChatCompletionChunk } from "./tidewright";
import { client } from "./tidewright/client.gen";

client.setConfig({ baseUrl: process.env.TIDEWRIGHT_URL, auth: process.env.TIDEWRIGHT_KEY });

const model = "smollm2-135m";
const MESSAGES = [{ role: "user" as const, content: "Name three fruits." }];

async function chat(): Promise<void> {
  const { data, error } = await createChatCompletion({
    body: { model, messages: [{ role: "user", content: "Name three fruits." }], max_tokens: 32 },
  });
  if (error) throw new Error(error.error.message);
  console.log(data.choices[0].message.content, data.usage.total_tokens, "tokens");

  assert.ok(data.choices[0].message.content);
  assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
  // @ts-expect-error: a choice of a chat has a message
  assert.equal(data.choices[0].text, undefined);
}

async function stream(): Promise<void> {
  const { stream } = await client.sse.post<{ 200: ChatCompletionChunk | "[DONE]" }>({
    url: "/v1/chat/completions",
    headers: { "Content-Type": "application/json" },
    body: { model, messages: MESSAGES, max_tokens: 32, temperature: 0, stream: true },
    security: [{ type: "http", scheme: "bearer" }],
    sseMaxRetryAttempts: 1, // it would ask again for ever
    onSseError: (error) => { throw error; },
  });
  let text = "";
  for await (const chunk of stream) {
    if (chunk !== "[DONE]") text += chunk.choices[0]?.delta.content ?? "";
  }
  console.log(text);

  const whole = await createChatCompletion({ body: { model, messages: MESSAGES, max_tokens: 32, temperature: 0 } });
  assert.equal(text, whole.data?.choices[0].message.content);
}

async function errors(): Promise<void> {
  const { data, error, response } = await createChatCompletion({ body: { model: "gpt-9", messages: MESSAGES } });
  assert.equal(data, undefined);
  assert.equal(response.status, 404);
  const code: string | undefined = error?.error.code;
  assert.equal(code, "model_not_found");
  // @ts-expect-error: OpenAI's errors have no details
  assert.equal(error?.error.details, undefined);

  const refused = await createMessage({ body: { model, messages: MESSAGES, max_tokens: 8, temperature: 2 } });
  assert.equal(refused.error?.error.type, "invalid_request_error");
  assert.equal(refused.error?.error.details.error_code, "invalid_value");
}

async function models(): Promise<void> {
  const { data } = await listModels();
  assert.deepEqual(data?.data.map((one) => one.id), [model]);
  // @ts-expect-error: there is no such filter
  await listModels({ query: { filter: "x" } });
}

async function messages(): Promise<void> {
  const { data } = await createMessage({ body: { model, messages: MESSAGES, max_tokens: 8 } });
  const [block] = data?.content ?? [];
  assert.ok(block?.type === "text" && block.text);
  assert.equal(data?.usage.output_tokens, 8);
}

async function responses(): Promise<void> {
  const body = { model, input: "Name three fruits.", max_output_tokens: 8, temperature: 0 };
  const { data } = await createResponse({ body });
  const [item] = data?.output ?? [];
  assert.ok(item?.type === "message");
  const { stream } = await client.sse.post<{ 200: ResponseEvent }>({
    url: "/v1/responses",
    headers: { "Content-Type": "application/json" },
    body: { ...body, stream: true },
    sseMaxRetryAttempts: 1,
  });
  let text = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
    if (event.type === "response.incomplete") assert.equal(event.response.status, "incomplete");
  }
  assert.equal(text, item.content[0].text);
}

const checks: Record<string, () => Promise<void>> = { chat, stream, errors, models, messages, responses };
void checks[process.argv[2]]();
