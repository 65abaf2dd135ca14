// The types that openapi-typescript makes of the OpenAPI document, in openapi.d.ts beside this file, with openapi-fetch.
import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./openapi";

const client = createClient<paths, "application/json">({ baseUrl: process.env.TIDEWRIGHT_URL });
const messages: components["schemas"]["ChatRequest"]["messages"] = [{ role: "user", content: "Name three fruits." }];

async function openapi_fetch(): Promise<void> {
  const body = { model: "smollm2-135m", messages, max_tokens: 8, stream_options: null };
  const { data, error } = await client.POST("/v1/chat/completions", { body });
  assert.equal(error, undefined);
  assert.ok(data?.choices[0].message.content);
  // @ts-expect-error: a choice of a chat has a message
  assert.equal(data.choices[0].text, undefined);

  const refused = await client.POST("/v1/chat/completions", { body: { model: "gpt-9", messages } });
  const code: string | undefined = refused.error?.error.code;
  assert.equal(code, "model_not_found");
  const listed = await client.GET("/v1/models/{name}", { params: { path: { name: body.model } } });
  assert.equal(listed.data?.id, body.model);
}

void openapi_fetch();
