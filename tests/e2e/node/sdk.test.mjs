// OpenAI's Node SDK, unmodified, against a gateway: its address and keys come in through the environment.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI, {
  APIError,
  AuthenticationError,
  BadRequestError,
  NotFoundError,
  PermissionDeniedError,
  RateLimitError,
} from "openai";

const { BASE_URL, API_KEY, SPENT_KEY, MODEL, EMBEDDER, FAST_BASE_URL, FAST_KEY } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const fast = new OpenAI({ baseURL: FAST_BASE_URL, apiKey: FAST_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello to the town." }];

test("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages, max_completion_tokens: 8 });
  assert.equal(answer.model, MODEL);
  assert.ok(answer.choices[0].message.content);
  assert.ok(answer.usage.completion_tokens <= 8);
});

test("chat, streamed, with usage", async () => {
  const stream = await client.chat.completions.create({
    model: MODEL,
    messages,
    max_completion_tokens: 8,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await Array.fromAsync(stream);
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.ok(last.usage.completion_tokens > 0);
  assert.ok(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""));
  assert.ok(chunks.every((chunk) => chunk.usage === undefined || chunk.usage === null));
});

test("chat, streamed, without usage", async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages, max_completion_tokens: 4, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.choices.length, 1);
    assert.ok(chunk.usage === undefined || chunk.usage === null);
  }
});

test("completions, of text and of token ids", async () => {
  for (const prompt of ["Once upon a time", [6403, 1980, 253, 655]]) {
    const answer = await client.completions.create({ model: MODEL, prompt, max_tokens: 4 });
    assert.equal(answer.choices.length, 1);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  }
});

test("the raw response", async () => {
  const { data, response } = await client.chat.completions
    .create({ model: MODEL, messages, max_completion_tokens: 2 })
    .withResponse();
  assert.equal(response.status, 200);
  assert.match(response.headers.get("x-request-id"), /^hr-/);
  assert.equal(data.object, "chat.completion");
});

test("embeddings, as numbers and as the SDK asks for them", async () => {
  const input = ["Where is my parcel?", "I want my money back."];
  const numbers = await client.embeddings.create({ model: EMBEDDER, input, encoding_format: "float" });
  const byDefault = await client.embeddings.create({ model: EMBEDDER, input });
  assert.equal(byDefault.data.length, 2);
  for (const [index, { embedding }] of byDefault.data.entries()) {
    assert.equal(embedding.length, numbers.data[index].embedding.length);
    assert.ok(embedding.every((value, at) => Math.abs(value - numbers.data[index].embedding[at]) < 1e-6));
  }
});

test("models", async () => {
  const ids = (await Array.fromAsync(client.models.list())).map((model) => model.id);
  assert.deepEqual(ids, [MODEL, EMBEDDER, "support-intent"]);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});

test("each refusal has its class", async () => {
  const ask = { model: MODEL, messages, max_completion_tokens: 2 };
  const stranger = new OpenAI({ baseURL: BASE_URL, apiKey: "sk-wrong", maxRetries: 0 });
  await assert.rejects(stranger.chat.completions.create(ask), (error) => {
    assert.ok(error instanceof AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...ask, model: "gpt-5" }), (error) => {
    assert.ok(error instanceof NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, "temperature");
    assert.equal(typeof error.code, "string");
    return true;
  });
  const spent = new OpenAI({ baseURL: BASE_URL, apiKey: SPENT_KEY, maxRetries: 0 });
  await assert.rejects(spent.chat.completions.create(ask), (error) => {
    assert.ok(error instanceof RateLimitError);
    assert.ok(Number(error.headers.get("retry-after")) > 0);
    return true;
  });
  await assert.rejects(spent.chat.completions.create({ ...ask, model: "minilm" }), PermissionDeniedError);
});

test("a stream that its provider cuts raises", async () => {
  const stream = await fast.chat.completions.create({ model: "relay", messages, stream: true, fault: "closes_amid" });
  const words = [];
  await assert.rejects(async () => {
    for await (const chunk of stream) words.push(chunk.choices[0].delta.content);
  }, APIError);
  assert.deepEqual(words, ["All "]);
});

test("a stream that is aborted ends, and the connection can be used no more", async () => {
  const stream = await client.chat.completions.create({
    model: MODEL,
    messages,
    max_tokens: 900,
    min_tokens: 900,
    stream: true,
  });
  let chunks = 0;
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    if (++chunks === 3) stream.controller.abort();
  }
  assert.ok(chunks < 900);
});
